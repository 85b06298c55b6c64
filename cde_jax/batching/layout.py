"""Chunks of texts of a few static lengths.

Texts of many lengths become chunks of a few static lengths, chosen before training to pad the least. The texts of a
plan batch, queries and documents together, are sorted by length and cut into chunks of about equally many positions (in
joint attention every text takes those of the context slots beside its tokens); a chunk is padded to what its longest
text needs. The arrays have room for the most chunks of each length that any batch needs, and the training step skips
empty ones: every step has the same shapes, and one program is compiled.
"""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64

from cde_jax.data.files import fingerprint, read_json, write_json

log = logging.getLogger(__name__)

MULTIPLE = 8  # padded lengths are multiples of it
# The default size of a chunk: 1/32 of a plan batch's positions, for on average half of the last chunk of each length is
# empty. Fewer than 512 do not keep even a CPU busy, and 1,024 are better (docs/speed.md) where that leaves six chunks
# a length. It is never more than a quarter of a plan batch.
CHUNKS_PER_BATCH, CHUNKS_PER_LENGTH, MIN_CHUNKS = 32, 6, 4
MIN_POSITIONS, PREFERRED_POSITIONS = 512, 1024


class Layout(NamedTuple):
    """The chunks that the arrays of a plan batch have room for: three tuples with one entry per padded length."""

    lengths: tuple[int, ...]  # tokens, ascending
    texts: tuple[int, ...]  # per chunk
    chunks: tuple[int, ...]


class LengthCounts(NamedTuple):
    """How long the texts of every plan batch are: all that a layout is chosen by."""

    texts: Int[np.ndarray, "S candidates"]  # that fit candidate length j (`_candidates`) and no shorter one
    longest: int
    tokens: int  # of all plan batches together


def count_lengths(batches: Iterable[Int[np.ndarray, "..."]]) -> LengthCounts:
    """Of the token counts of all plan batches' texts, given by the plan batch [m] or by blocks of them [s, m]."""
    blocks, longest, tokens = [], 0, 0
    for sizes in map(np.atleast_2d, batches):
        longest, tokens = max(longest, int(sizes.max(initial=0))), tokens + int(sizes.sum())
        candidates = -(-max(longest, 1) // MULTIPLE)
        cells = np.maximum(sizes - 1, 0) // MULTIPLE + np.arange(len(sizes))[:, None] * candidates
        counts = np.bincount(cells.ravel(), minlength=len(sizes) * candidates).reshape(len(sizes), candidates)
        blocks.append(counts.astype(np.min_scalar_type(sizes.shape[1])))
    counts = np.concatenate([np.pad(block, ((0, 0), (0, candidates - block.shape[1]))) for block in blocks])
    return LengthCounts(counts, longest, tokens)


def choose_layout(counted: LengthCounts, lengths: int, positions: int = 0, slots: int = 0) -> Layout:
    """The layout of at most `lengths` lengths that holds every plan batch.

    positions: of a chunk, where a text takes its padded length and `slots` more; 0: chosen by the average plan batch.
    """
    candidates, of_batch = _candidates(counted.longest), counted.texts.sum(axis=1, dtype=np.int64)
    of_length = np.zeros(candidates[-1] + 1, np.int64)
    of_length[candidates] = counted.texts.sum(axis=0, dtype=np.int64)
    chosen = choose_lengths(of_length, lengths)
    average = (counted.tokens + slots * int(of_batch.sum())) // len(of_batch)
    least = int(np.clip(average // (CHUNKS_PER_LENGTH * len(chosen)), MIN_POSITIONS, PREFERRED_POSITIONS))
    positions = positions or max(average // CHUNKS_PER_BATCH, min(average // MIN_CHUNKS, least))
    texts = [min(max(1, positions // (length + slots)), int(of_batch.max())) for length in chosen]
    first = np.searchsorted(candidates, [0, *chosen[:-1]], side="right")  # candidate of each length
    needed = np.add.reduceat(counted.texts, first, axis=1, dtype=np.int64)[:, ::-1].cumsum(axis=1)[:, ::-1]
    # As `split_by_length` does, of all plan batches at once: needed[s, k] texts are of length k or longer.
    chunks, fullest, placed = [0] * len(chosen), [0] * len(chosen), np.zeros_like(of_batch)
    for k in reversed(range(len(chosen))):
        used = -(-np.maximum(needed[:, k] - placed, 0) // texts[k])
        chunks[k] = int(used.max())
        fullest[k] = int(np.minimum(texts[k], of_batch - placed)[used > 0].max(initial=0))
        placed = np.minimum(placed + used * texts[k], of_batch)
    kept = [k for k, count in enumerate(chunks) if count]
    return Layout(*(tuple(values[k] for k in kept) for values in (chosen, fullest, chunks)))


def choose_lengths(counts: Int64[np.ndarray, " sizes"], most: int) -> tuple[int, ...]:
    """At most `most` padded lengths, ascending, with the fewest padded tokens for `counts[s]` texts of s tokens.

    Multiples of 8, or the longest text's own length. Exact, by dynamic programming over the lengths.
    """
    longest = max(1, int(np.flatnonzero(counts).max(initial=0)))
    candidates = _candidates(longest)
    shorter = np.cumsum(np.pad(counts, (0, 1)))[candidates]  # texts that fit each candidate
    cost = shorter * candidates  # of all texts up to candidate j, at one length
    came_from: list[Int64[np.ndarray, " candidates"]] = []
    for _ in range(most - 1):
        # One length more: the texts above candidate i run at candidate j.
        step = cost[:, None] + (shorter[None, :] - shorter[:, None]) * candidates[None, :]  # [i, j]
        came_from.append(step.argmin(axis=0))
        cost = step.min(axis=0)
    chosen = {at := len(candidates) - 1}
    for before in reversed(came_from):
        chosen.add(at := int(before[at]))
    return tuple(candidates[sorted(chosen)].tolist())


def _candidates(longest: int) -> Int64[np.ndarray, " candidates"]:
    """Padded lengths to choose from: multiples of 8, and the longest text's own."""
    return np.array([*range(MULTIPLE, longest, MULTIPLE), max(longest, 1)])


def split_by_length(
    sizes: Int[np.ndarray, " m"], lengths: tuple[int, ...], texts: tuple[int, ...]
) -> Iterator[tuple[int, Int64[np.ndarray, " rows"]]]:
    """The chunks of a plan batch: which of `lengths`, and the indices of its texts, the longest first.

    A chunk is filled up with shorter texts, so only the last one has room left.
    """
    order = np.argsort(-sizes, kind="stable")
    needed = np.searchsorted(lengths, sizes[order])
    start = 0
    while start < len(order):
        k = int(needed[start])
        rows = order[start : start + texts[k]]
        start += len(rows)
        yield k, rows


def to_chunks(
    ids: Int32[np.ndarray, "m L"], mask: Bool[np.ndarray, "m L"], layout: Layout, devices: int = 1
) -> dict[str, Any]:
    """A plan batch's m texts, padded on the right to the longest of the layout's lengths or more, as chunks.

    Returns "ids" (int32) and "mask" (bool), for each of the layout's lengths ℓ an array [chunks, texts, ℓ], and "place"
    int32 [m]: the row of each text when the chunks of all lengths are concatenated. Rows without a text are all False.

    devices: how many share the plan batch. The chunks are dealt out to them in turn, so that each gets about as many of
    every length: of an array [chunks, …], `chunks` then being a multiple of `devices`, each takes its part in order.
    """
    each = [-(-chunks // devices) for chunks in layout.chunks]  # of a device
    shapes = [(devices * n, *shape) for n, *shape in zip(each, layout.texts, layout.lengths, strict=True)]
    chunk_ids = tuple(np.zeros(shape, np.int32) for shape in shapes)
    chunk_masks = tuple(np.zeros(shape, bool) for shape in shapes)
    first = np.cumsum([0, *(chunks * texts for chunks, texts, _ in shapes)])
    place, used = np.empty(len(ids), np.int32), np.zeros((len(shapes), devices), int)
    for number, (k, rows) in enumerate(split_by_length(mask.sum(axis=1), layout.lengths, layout.texts)):
        device = number % devices
        at = device * each[k] + used[k, device]
        chunk_ids[k][at, : len(rows)] = ids[rows, : layout.lengths[k]]
        chunk_masks[k][at, : len(rows)] = mask[rows, : layout.lengths[k]]
        place[rows] = first[k] + at * layout.texts[k] + np.arange(len(rows))
        used[k, device] += 1
    return {"ids": chunk_ids, "mask": chunk_masks, "place": place}


def read_layouts(file: Path | None, settings: dict[str, Any]) -> dict[str, Layout] | None:
    """The layouts of these settings in a file; None where there are none, or the file is damaged."""
    if file is None or not file.exists():
        return None
    try:
        entry = read_json(file, dict).get(fingerprint(settings))
        if entry is None:
            return None
        if entry["sha256"] != fingerprint([settings, entry["layouts"]]):
            raise ValueError("a layout was altered")
        return {name: Layout(*map(tuple, layout)) for name, layout in entry["layouts"].items()}
    except (ValueError, TypeError, KeyError) as error:
        log.warning("%s cannot be used, layouts are computed again: %s", file, error)
        return None


def write_layouts(file: Path | None, settings: dict[str, Any], layouts: dict[str, Layout]) -> None:
    """Add layouts to a file, without those of another plan; not at all where it may not be written."""
    if file is None:
        return
    try:
        kept = read_json(file, dict) if file.exists() else {}
        kept = {key: entry for key, entry in kept.items() if entry["settings"]["plan"] == settings["plan"]}
    except (ValueError, TypeError, KeyError):  # damaged
        kept = {}
    entry = {"settings": settings, "layouts": layouts, "sha256": fingerprint([settings, layouts])}
    try:
        write_json(file, kept | {fingerprint(settings): entry})
    except OSError as error:
        log.warning("layouts are not kept for the next start: %s", error)
