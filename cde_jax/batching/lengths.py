"""Texts of many lengths as chunks of a few static lengths, so that little is computed on padding.

The plan is known before training, and so is the length of each of its texts. They run at a few padded lengths, chosen
to pad the least. The texts of a plan batch, queries and documents together, are sorted by length and cut into chunks of
about equally many tokens: a chunk is as long as its longest text needs. How many chunks there are of each length
differs from batch to batch; the arrays have room for the most, and the step skips the empty ones. So all steps have
the same shapes, one program is compiled, and each batch pays for its own lengths.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64

MULTIPLE = 8  # of which padded lengths are
# Left to itself, a chunk has one in 32 of a plan batch's tokens: the last one is half empty on average. Fewer than 512
# would not keep even a CPU busy; where a plan batch has few tokens itself, a quarter of them is enough.
SHARE, FEWEST_TOKENS, FEWEST_CHUNKS = 32, 512, 4


class Layout(NamedTuple):
    """The chunks that the arrays of a plan batch have room for, by padded length."""

    lengths: tuple[int, ...]  # ascending
    texts: tuple[int, ...]  # of one chunk of each length
    chunks: tuple[int, ...]  # of each length


def choose_layout(batches: Callable[[], Iterable[Int[np.ndarray, " m"]]], lengths: int, tokens: int = 0) -> Layout:
    """The layout of at most `lengths` lengths that holds every plan batch.

    batches: gives the token counts of each plan batch's texts, of which there are some; called twice. tokens: of a
    chunk, or 0 to leave it to this function.
    """
    counts, number, largest = np.zeros(1, np.int64), 0, 1
    for sizes in batches():
        largest = max(largest, len(sizes))
        found = np.bincount(sizes)
        counts = np.pad(counts, (0, max(0, len(found) - len(counts))))
        counts[: len(found)] += found
        number += 1
    chosen = choose_lengths(counts, lengths)
    average = int(counts @ np.arange(len(counts))) // max(number, 1)
    tokens = tokens or max(average // SHARE, min(average // FEWEST_CHUNKS, FEWEST_TOKENS))
    texts = tuple(min(max(1, tokens // length), largest) for length in chosen)
    most = np.zeros(len(chosen), np.int64)
    for sizes in batches():
        most = np.maximum(most, np.bincount([k for k, _ in cut(sizes, chosen, texts)], minlength=len(chosen)))
    needed = np.flatnonzero(most)
    return Layout(*(tuple(np.asarray(values)[needed].tolist()) for values in (chosen, texts, most)))


def choose_lengths(counts: Int64[np.ndarray, " sizes"], most: int) -> tuple[int, ...]:
    """At most `most` padded lengths, ascending, with the fewest padded tokens for `counts[s]` texts of s tokens.

    Multiples of 8, or the longest text's own length. Found exactly, by dynamic programming over the lengths.
    """
    longest = max(1, int(np.flatnonzero(counts).max(initial=0)))
    candidates = np.array([*range(MULTIPLE, longest, MULTIPLE), longest])
    shorter = np.cumsum(np.pad(counts, (0, 1)))[candidates]  # texts that fit each candidate
    cost = shorter * candidates  # of all texts up to candidate j, at one length
    came_from: list[np.ndarray] = []
    for _ in range(most - 1):
        # One length more: the texts above candidate i run at candidate j.
        step = cost[:, None] + (shorter[None, :] - shorter[:, None]) * candidates[None, :]  # [i, j]
        came_from.append(step.argmin(axis=0))
        cost = step.min(axis=0)
    chosen = {at := len(candidates) - 1}
    for before in reversed(came_from):
        chosen.add(at := int(before[at]))
    return tuple(candidates[sorted(chosen)].tolist())


def cut(
    sizes: Int[np.ndarray, " m"], lengths: tuple[int, ...], texts: tuple[int, ...]
) -> Iterator[tuple[int, Int64[np.ndarray, " rows"]]]:
    """The chunks of a plan batch: which of `lengths`, and the numbers of its texts, the longest first.

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


def chunked(ids: Int32[np.ndarray, "G m L"], mask: Bool[np.ndarray, "G m L"], layout: Layout) -> dict[str, Any]:
    """Each of G plan batches' m texts, padded on the right, as chunks.

    Returns "ids" and "mask", for each of the layout's lengths ℓ an array [G, chunks, texts, ℓ], and "place" int32
    [G, m]: where each text is when the chunks of all lengths stand one after the other. Rows without a text are all
    False.
    """
    rows_held = [chunks * texts for chunks, texts in zip(layout.chunks, layout.texts, strict=True)]
    first = np.cumsum([0, *rows_held])
    shapes = [(len(ids), rows, length) for rows, length in zip(rows_held, layout.lengths, strict=True)]
    parts = {name: [np.zeros(shape, kind) for shape in shapes] for name, kind in (("ids", np.int32), ("mask", bool))}
    place = np.empty(mask.shape[:2], np.int32)
    for g, sizes in enumerate(mask.sum(axis=2)):
        used = np.zeros(len(rows_held), np.int64)
        for k, rows in cut(sizes, layout.lengths, layout.texts):
            at = used[k] + np.arange(len(rows))
            used[k] += layout.texts[k]
            place[g, rows] = first[k] + at
            width = min(layout.lengths[k], ids.shape[2])
            parts["ids"][k][g, at, :width] = ids[g, rows, :width]
            parts["mask"][k][g, at, :width] = mask[g, rows, :width]
    held = {
        name: tuple(x.reshape(len(ids), n, t, L) for x, L, t, n in zip(arrays, *layout, strict=True))
        for name, arrays in parts.items()
    }
    return held | {"place": place}
