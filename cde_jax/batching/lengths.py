"""Texts of many lengths as chunks of a few static lengths, so that little is computed on padding.

The plan is known before training, and so is the length of each of its texts. The padded lengths are chosen to pad the
least. The texts of a plan batch, queries and documents together, are sorted by length and cut into chunks of about
equally many tokens; a chunk is padded to what its longest text needs. The number of chunks per length differs from
batch to batch: the arrays have room for the most that any batch needs, and the training step skips empty chunks. So
every step has the same shapes, and one program is compiled.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64

MULTIPLE = 8  # padded lengths are multiples of it
# The default size of a chunk: 1/32 of a plan batch's tokens, for on average half of the last chunk is empty. Fewer than
# 512 tokens do not keep even a CPU busy, but it is never more than a quarter of a plan batch.
CHUNKS_PER_BATCH, MIN_TOKENS, MIN_CHUNKS = 32, 512, 4


class Layout(NamedTuple):
    """The chunks that the arrays of a plan batch have room for: three tuples with one entry per padded length."""

    lengths: tuple[int, ...]  # tokens, ascending
    texts: tuple[int, ...]  # per chunk
    chunks: tuple[int, ...]


def choose_layout(batches: Callable[[], Iterable[Int[np.ndarray, " m"]]], lengths: int, tokens: int = 0) -> Layout:
    """The layout of at most `lengths` lengths that holds every plan batch.

    batches: gives the token counts of each plan batch's texts, of which there are some; called twice. tokens: per
    chunk; 0: chosen by the average plan batch.
    """
    counts, number, largest = np.zeros(1, np.int64), 0, 1
    for sizes in batches():
        of_batch = np.bincount(sizes, minlength=len(counts))
        of_batch[: len(counts)] += counts
        counts, number, largest = of_batch, number + 1, max(largest, len(sizes))
    chosen = choose_lengths(counts, lengths)
    average = int(counts @ np.arange(len(counts))) // max(number, 1)
    tokens = tokens or max(average // CHUNKS_PER_BATCH, min(average // MIN_CHUNKS, MIN_TOKENS))
    texts = tuple(min(max(1, tokens // length), largest) for length in chosen)
    chunks, fullest = np.zeros((2, len(chosen)), np.int64)  # of any batch; texts of any chunk
    for sizes in batches():
        used = np.zeros_like(chunks)
        for k, rows in split_by_length(sizes, chosen, texts):
            used[k] += 1
            fullest[k] = max(fullest[k], len(rows))
        chunks = np.maximum(chunks, used)
    needed = np.flatnonzero(chunks)
    return Layout(*(tuple(np.asarray(values)[needed].tolist()) for values in (chosen, fullest, chunks)))


def choose_lengths(counts: Int64[np.ndarray, " sizes"], most: int) -> tuple[int, ...]:
    """At most `most` padded lengths, ascending, with the fewest padded tokens for `counts[s]` texts of s tokens.

    Multiples of 8, or the longest text's own length. Exact, by dynamic programming over the lengths.
    """
    longest = max(1, int(np.flatnonzero(counts).max(initial=0)))
    candidates = np.array([*range(MULTIPLE, longest, MULTIPLE), longest])
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


def to_chunks(ids: Int32[np.ndarray, "m L"], mask: Bool[np.ndarray, "m L"], layout: Layout) -> dict[str, Any]:
    """A plan batch's m texts, padded on the right, as chunks.

    Returns "ids" (int32) and "mask" (bool), for each of the layout's lengths ℓ an array [chunks, texts, ℓ], and "place"
    int32 [m]: the row of each text when the chunks of all lengths are concatenated. Rows without a text are all False.
    """
    shapes = list(zip(layout.chunks, layout.texts, layout.lengths, strict=True))
    chunk_ids = tuple(np.zeros(shape, np.int32) for shape in shapes)
    chunk_masks = tuple(np.zeros(shape, bool) for shape in shapes)
    first = np.cumsum([0, *np.multiply(layout.chunks, layout.texts)])
    place, used = np.empty(len(ids), np.int32), [0] * len(shapes)
    for k, rows in split_by_length(mask.sum(axis=1), layout.lengths, layout.texts):
        _, texts, length = shapes[k]
        cut_ids, cut_mask = ids[rows, :length], mask[rows, :length]  # [rows, ≤ ℓ]
        chunk_ids[k][used[k], : len(rows), : cut_ids.shape[1]] = cut_ids
        chunk_masks[k][used[k], : len(rows), : cut_ids.shape[1]] = cut_mask
        place[rows] = first[k] + used[k] * texts + np.arange(len(rows))
        used[k] += 1
    return {"ids": chunk_ids, "mask": chunk_masks, "place": place}
