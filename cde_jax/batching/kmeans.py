"""The arithmetic of paired k-means: spherical k-means over two rows per pair, q⊕d and d⊕q, at half the work.

A pair's two rows are kept as one, turned: (s, t) = (q + d, q − d) / √2. The turn leaves all inner products as they are,
and its own inverse is the same turn. Swapping q and d only changes the sign of t, so the cosines of a pair's two rows
to a centroid (u, v), turned alike, are s·u + t·v and s·u − t·v: two products of width D instead of four.

Rows are worked on in blocks of a fixed size, several at a time, each by one thread of BLAS (the caller limits it): the
same bits on any number of cores. NumPy and not FAISS, which has no such form and whose wheel may pick old BLAS kernels
(benchmarks/cluster.py compares them); FAISS where there is a GPU.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

# Sizes of one step of `nearest`: centroids, scores (three such arrays should stay in a core's cache), pairs.
TILE, BLOCK_SCORES, BLOCK_PAIRS = 2048, 2**18, (128, 1024)
GPU_WORK = 10**11  # multiply-adds of one assignment from which a GPU does it, if there is one (a guess)
# k-means runs on growing samples of the pairs, each at most GROWTH times as large, from the clusters of the one before.
# Tries are compared on the first, where they cost little; on all pairs it then needs few iterations.
FIRST_PAIRS, PAIRS_PER_CLUSTER, GROWTH = 4096, 8, 4
# A try is worth its full run only from a good start, so several are compared in short runs, on a sample of that least
# size. More clusters than fit it come out alike from every start.
STARTS, START_ITERATIONS = 4, 10
START_PAIRS = 1024  # that k-means++ chooses from, or PAIRS_PER_CLUSTER if those are more
GREEDY = 512  # centroids of a start that are chosen one by one; the time for all would grow with their square
# Stops when this many iterations together raised the mean cosine by less than this share of it.
STALL_ITERATIONS, STALL_GAIN = 3, 3e-4
SPLIT = 0.05  # of a cluster for an empty one: how far the halves start from its centroid, towards and from a row


def turn(rows: Float[np.ndarray, "n E"]) -> Float[np.ndarray, "n E"]:
    """Rows a⊕b as (a + b)⊕(a − b) / √2, and back."""
    first, second = np.split(rows, 2, axis=1)
    return np.concatenate([first + second, first - second], axis=1) * np.float32(0.5**0.5)


def unit(rows: Float[np.ndarray, "n E"]) -> Float[np.ndarray, "n E"]:
    """Each row divided by its norm; a row of zeros stays zero."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def in_blocks(work: Callable[[Iterator[slice]], None], rows: int, size: int) -> None:
    """Calls `work` in one thread per core; between them they take every block of `size` rows from one iterator."""
    blocks = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = min(cores, len(blocks))
    shared = iter(blocks)
    if threads <= 1:
        return work(shared)
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, shared) for _ in range(threads)]:
            done.result()


def nearest(
    pairs: Float[np.ndarray, "n E"], centroids: Float[np.ndarray, "k E"]
) -> tuple[Int[np.ndarray, "2 n"], Float[np.ndarray, "2 n"]]:
    """The nearest centroid of each q⊕d (first) and d⊕q (second), and its inner product; all turned. Ties: the lower."""
    labels, products = np.zeros((2, len(pairs)), np.int64), np.full((2, len(pairs)), -np.inf, np.float32)
    index = _gpu_index(pairs.shape[1]) if pairs.size * len(centroids) > GPU_WORK else None
    if index is not None:
        nearest_faiss(index, pairs, centroids, labels, products)
        return labels, products
    width = pairs.shape[1] // 2
    tiles = [
        (start, *(np.ascontiguousarray(half.T) for half in np.split(centroids[start : start + TILE], 2, axis=1)))
        for start in range(0, len(centroids), TILE)
    ]
    size = int(np.clip(BLOCK_SCORES // min(len(centroids), TILE), *BLOCK_PAIRS))

    def work(blocks: Iterator[slice]) -> None:
        scratch = np.empty(3 * size * min(len(centroids), TILE), np.float32)
        for block in blocks:
            rows = pairs[block]
            for start, u, v in tiles:
                shape = (3, len(rows), u.shape[1])
                plus, minus, both = scratch[: np.prod(shape)].reshape(shape)
                np.matmul(rows[:, :width], u, out=both)
                np.matmul(rows[:, width:], v, out=minus)
                np.add(both, minus, out=plus)
                np.subtract(both, minus, out=minus)
                for side, scores in enumerate((plus, minus)):
                    _keep_best(scores, start, labels[side, block], products[side, block])

    in_blocks(work, len(pairs), size)
    return labels, products


def _keep_best(
    scores: Float[np.ndarray, "m tile"], start: int, labels: Int[np.ndarray, " m"], products: Float[np.ndarray, " m"]
) -> None:
    found = scores.argmax(axis=1)
    best = scores[np.arange(len(scores)), found]
    better = best > products
    np.copyto(labels, found + start, where=better)
    np.copyto(products, best, where=better)


@functools.cache
def _gpu_index(width: int) -> Any | None:
    """A FAISS index of inner products over all GPUs, or None without one."""
    import faiss

    if not getattr(faiss, "get_num_gpus", int)():  # int() is 0, for builds that do not know the word
        return None
    return faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(width))


def nearest_faiss(
    index: Any,
    pairs: Float[np.ndarray, "n E"],
    centroids: Float[np.ndarray, "k E"],
    labels: Int[np.ndarray, "2 n"],
    products: Float[np.ndarray, "2 n"],
    size: int = 2**16,
) -> None:
    """`nearest` by a FAISS index of inner products, into `labels` and `products`, so many pairs at a time."""
    index.reset()
    index.add(centroids)
    width = pairs.shape[1] // 2
    signs = np.repeat(np.array([1, -1], np.float32), width)
    for start in range(0, len(pairs), size):
        block = slice(start, start + size)
        for side, rows in enumerate((pairs[block], pairs[block] * signs)):
            found, where = index.search(np.ascontiguousarray(rows), 1)
            labels[side, block], products[side, block] = where[:, 0], found[:, 0]


def kmeans(
    pairs: Float[np.ndarray, "n E"], k: int, *, iterations: int, tries: int, random: np.random.Generator
) -> tuple[Float[np.ndarray, "k E"], int]:
    """Unit centroids of n pairs (unit rows; all turned), and how many iterations over all pairs it took.

    Goes on from the best of `tries` on the first sample. `iterations` is the limit on each sample.
    """
    order, sizes = random.permutation(len(pairs)), _sizes(len(pairs), k)
    if k == 1:
        tries = 1  # every start ends at the same mean
    for size in sizes:
        sample = pairs if size == len(pairs) else pairs[np.sort(order[:size])]
        if size > sizes[0]:
            best = lloyd(sample, best[0], iterations, random)
            continue
        found = [lloyd(sample, _start(sample, k, random), iterations, random) for _ in range(tries)]
        best = found[_best(sample, [centroids for centroids, _ in found])]
    return best


def _sizes(n: int, k: int) -> list[int]:
    """Of the samples: up to n in equal ratios of at most GROWTH."""
    first = min(n, max(FIRST_PAIRS, PAIRS_PER_CLUSTER * k))
    steps = int(np.ceil(np.log(n / first) / np.log(GROWTH)))
    return [round(first * (n / first) ** (step / max(steps, 1))) for step in range(steps)] + [n]


def _start(pairs: Float[np.ndarray, "n E"], k: int, random: np.random.Generator) -> Float[np.ndarray, "k E"]:
    """The best of a few short runs from k-means++."""
    if k == 1 or PAIRS_PER_CLUSTER * k > FIRST_PAIRS:
        return plus_plus(pairs, k, random)
    found = [lloyd(pairs, plus_plus(pairs, k, random), START_ITERATIONS, random)[0] for _ in range(STARTS)]
    return found[_best(pairs, found)]


def _best(pairs: Float[np.ndarray, "n E"], found: Sequence[Float[np.ndarray, "k E"]]) -> int:
    """Which centroids have the largest mean cosine of the rows q⊕d; the first of equals."""
    return int(np.argmax([nearest(pairs, centroids)[1][0].mean(dtype=np.float64) for centroids in found]))


def lloyd(
    pairs: Float[np.ndarray, "n E"], centroids: Float[np.ndarray, "k E"], iterations: int, random: np.random.Generator
) -> tuple[Float[np.ndarray, "k E"], int]:
    """Lloyd's iterations from these centroids, to the last that changes something: new ones, and how many it took."""
    k, labels, sums, history = len(centroids), None, np.zeros_like(centroids), []
    while len(history) < iterations:
        before, (labels, products) = labels, nearest(pairs, centroids)
        history.append(float(products.mean(dtype=np.float64)))
        if before is not None and np.array_equal(before, labels):
            break
        sums += _moved(pairs, before, labels, k)
        counts = np.bincount(labels.ravel(), minlength=k)
        centroids = unit(np.where(counts[:, None] > 0, sums, 0))
        _split_for_empty(pairs, centroids, labels, counts, random)
        gain = history[-1] - history[max(0, len(history) - 1 - STALL_ITERATIONS)]
        if len(history) > STALL_ITERATIONS and gain <= STALL_GAIN * abs(history[-1]):
            break
    return centroids, len(history)


def _moved(
    pairs: Float[np.ndarray, "n E"], before: Int[np.ndarray, "2 n"] | None, labels: Int[np.ndarray, "2 n"], k: int
) -> Float[np.ndarray, "k E"]:
    """What the sums of the clusters' rows change by, from the rows that changed cluster only."""
    signs, columns, clusters = [], [], []
    for side, sign in enumerate((1, -1)):
        moved = np.arange(len(pairs)) if before is None else np.flatnonzero(before[side] != labels[side])
        for assigned, weight in ((labels, 1), (before, -1)):
            if assigned is None:
                continue
            # Halves s and t are rows 2i and 2i + 1 of the pairs seen as [2n, D], and so with the centroids.
            for half, half_sign in enumerate((1, sign)):
                signs.append(np.full(len(moved), weight * half_sign, np.float32))
                columns.append(2 * moved + half)
                clusters.append(2 * assigned[side][moved] + half)
    entries = (np.concatenate(signs), (np.concatenate(clusters), np.concatenate(columns)))
    change = sparse.csr_matrix(entries, shape=(2 * k, 2 * len(pairs))) @ pairs.reshape(2 * len(pairs), -1)
    return change.reshape(k, -1)


def _split_for_empty(
    pairs: Float[np.ndarray, "n E"],
    centroids: Float[np.ndarray, "k E"],
    labels: Int[np.ndarray, "2 n"],
    counts: Int[np.ndarray, " k"],
    random: np.random.Generator,
) -> None:
    """Gives each empty cluster one half of a large one, in place: the halves lie to both sides of its centroid."""
    empty = np.flatnonzero(counts == 0)
    larger = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts > 1)]
    for new, large in zip(empty, larger, strict=False):
        row = random.choice(np.flatnonzero(labels.ravel() == large))
        towards = rows_of(pairs, row[None])[0]
        away = towards - (towards @ centroids[large]) * centroids[large]
        centroids[[large, new]] = unit(np.stack([centroids[large] + SPLIT * away, centroids[large] - SPLIT * away]))


def rows_of(pairs: Float[np.ndarray, "n E"], rows: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m E"]:
    """Rows 0…2n−1, turned: those of the pairs as q⊕d, then as d⊕q."""
    found = pairs[rows % len(pairs)]
    found[rows >= len(pairs), pairs.shape[1] // 2 :] *= -1
    return found


def plus_plus(pairs: Float[np.ndarray, "n E"], k: int, random: np.random.Generator) -> Float[np.ndarray, "k E"]:
    """k rows by greedy k-means++: of a few drawn by squared distance, each time the one that leaves the least of it.

    From GREEDY on, all that are missing are drawn at once.
    """
    size = max(START_PAIRS, PAIRS_PER_CLUSTER * k)
    if len(pairs) > size:
        pairs = pairs[np.sort(random.choice(len(pairs), size, replace=False))]
    width = pairs.shape[1] // 2
    distances = np.ones((2 * len(pairs), 1), np.float32)  # half the squared distance of a row to the nearest chosen
    chosen = np.empty((k, pairs.shape[1]), np.float32)
    for step in range(min(k, GREEDY)):
        cumulative = np.cumsum(distances, dtype=np.float64)
        draws = random.random(2 + int(np.log(k)) if step else 1) * cumulative[-1]
        rows = rows_of(pairs, np.minimum(np.searchsorted(cumulative, draws, side="right"), len(cumulative) - 1))
        both, minus = pairs[:, :width] @ rows[:, :width].T, pairs[:, width:] @ rows[:, width:].T
        left = np.clip(1 - np.concatenate([both + minus, both - minus]), 0, distances)
        best = left.sum(axis=0, dtype=np.float64).argmin()
        chosen[step], distances = rows[best], left[:, best : best + 1]
    if k > GREEDY:
        # The largest of log(uniform) / weight: draws without putting back, by weight.
        keys = np.log(1 - random.random(len(distances))) / np.maximum(distances[:, 0], 1e-12)
        chosen[GREEDY:] = rows_of(pairs, np.argsort(-keys, kind="stable")[: k - GREEDY])
    return chosen
