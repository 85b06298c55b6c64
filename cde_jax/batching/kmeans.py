"""Spherical k-means over two rows per pair, q⊕d and d⊕q, at half the work (paper, section 3.1).

A pair's two rows are stored as one, rotated: (s, t) = (q + d, q − d) / √2. The rotation keeps all inner products and
is its own inverse. Swapping q and d only changes the sign of t, so the cosines of the two rows with a centroid (u, v),
rotated too, are s·u + t·v and s·u − t·v: two products of width D instead of four. FAISS has no such form
(benchmarks/cluster.py compares them).

Blocks of a fixed number of rows are computed in parallel, each with one BLAS thread (the caller limits it): the result
is the same bits on any number of cores.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float, Int

from cde_jax.data.store import unit_rows

# Sizes of one step of `assign`: centroids, scores (three such arrays should fit a core's cache), pairs (least, most).
TILE, BLOCK_SCORES, BLOCK_PAIRS = 2048, 2**18, (128, 1024)
# Samples of the pairs grow by at most GROWTH. Restarts are compared on the first, where they cost little.
FIRST_PAIRS, PAIRS_PER_CLUSTER, GROWTH = 4096, 8, 4
# A restart begins with the best of several short runs, unless there are so many clusters that all give similar results.
STARTS, START_ITERATIONS = 4, 10
START_PAIRS = 1024  # that k-means++ chooses from, or PAIRS_PER_CLUSTER · k if those are more
SEQUENTIAL = 512  # initial centroids chosen one after another; the time for all would grow with their square
# Stops when this many iterations together raised the mean cosine by less than this share of it.
STALL_ITERATIONS, STALL_GAIN = 3, 3e-4
SPLIT = 0.05  # distance of the two halves of a split cluster from its centroid


def rotate(rows: Float[np.ndarray, "n E"]) -> Float[np.ndarray, "n E"]:
    """Rows a⊕b as (a + b)⊕(a − b) / √2, and back."""
    a, b = np.split(rows, 2, axis=1)
    return np.concatenate([a + b, a - b], axis=1) * np.float32(0.5**0.5)


def in_parallel(work: Callable[[Iterator[slice]], None], rows: int, size: int) -> None:
    """Calls `work` in one thread per core; together they take every block of `size` rows from one shared iterator."""
    blocks = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads, shared = min(cores, len(blocks)), iter(blocks)
    if threads <= 1:
        return work(shared)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: work(shared), range(threads)))


def assign(
    pairs: Float[np.ndarray, "n E"], centroids: Float[np.ndarray, "k E"]
) -> tuple[Int[np.ndarray, "2 n"], Float[np.ndarray, "2 n"]]:
    """The centroid nearest to each q⊕d (first) and d⊕q (second), and their inner product; all rotated.

    Of equal products the lower centroid.
    """
    labels, products = np.zeros((2, len(pairs)), np.int64), np.full((2, len(pairs)), -np.inf, np.float32)
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
                    best_in_tile = scores.argmax(axis=1)
                    best = scores[np.arange(len(scores)), best_in_tile]
                    better = best > products[side, block]
                    np.copyto(labels[side, block], best_in_tile + start, where=better)
                    np.copyto(products[side, block], best, where=better)

    in_parallel(work, len(pairs), size)
    return labels, products


def kmeans(
    pairs: Float[np.ndarray, "n E"], k: int, *, iterations: int, tries: int, random: np.random.Generator
) -> tuple[Float[np.ndarray, "k E"], int]:
    """k unit centroids of n pairs (unit rows, rotated), and the number of iterations over all pairs.

    Continues from the best of `tries` restarts on the first sample. `iterations` limits each run.
    """
    order, sizes = random.permutation(len(pairs)), sample_sizes(len(pairs), k)
    restarts = 1 if k == 1 else tries  # with one cluster every start ends at the same mean
    for size in sizes:
        sample = pairs if size == len(pairs) else pairs[np.sort(order[:size])]
        if size > sizes[0]:
            best = lloyd(sample, best[0], iterations, random)
        else:
            runs = [lloyd(sample, _start(sample, k, random), iterations, random) for _ in range(restarts)]
            best = max(runs, key=lambda run, sample=sample: _objective(sample, run[0]))  # the first of equals
    return best


def sample_sizes(n: int, k: int) -> list[int]:
    """Of the growing samples: up to n, in equal ratios of at most GROWTH."""
    first = min(n, max(FIRST_PAIRS, PAIRS_PER_CLUSTER * k))
    steps = int(np.ceil(np.log(n / first) / np.log(GROWTH)))
    return [round(first * (n / first) ** (step / max(steps, 1))) for step in range(steps)] + [n]


def _start(pairs: Float[np.ndarray, "n E"], k: int, random: np.random.Generator) -> Float[np.ndarray, "k E"]:
    """Initial centroids: the best of a few short runs from k-means++."""
    if k == 1 or PAIRS_PER_CLUSTER * k > FIRST_PAIRS:
        return plus_plus(pairs, k, random)
    starts = [lloyd(pairs, plus_plus(pairs, k, random), START_ITERATIONS, random)[0] for _ in range(STARTS)]
    return max(starts, key=lambda centroids: _objective(pairs, centroids))


def _objective(pairs: Float[np.ndarray, "n E"], centroids: Float[np.ndarray, "k E"]) -> float:
    """Mean cosine of the rows q⊕d with their centroids."""
    return float(assign(pairs, centroids)[1][0].mean(dtype=np.float64))


def lloyd(
    pairs: Float[np.ndarray, "n E"], centroids: Float[np.ndarray, "k E"], iterations: int, random: np.random.Generator
) -> tuple[Float[np.ndarray, "k E"], int]:
    """Lloyd's iterations until nothing changes or the gain stalls: the new centroids, and how many iterations."""
    k, labels, sums, history = len(centroids), None, np.zeros_like(centroids), []
    while len(history) < iterations:
        before, (labels, products) = labels, assign(pairs, centroids)
        history.append(float(products.mean(dtype=np.float64)))
        if before is not None and np.array_equal(before, labels):
            break
        sums += _change_of_sums(pairs, before, labels, k)
        counts = np.bincount(labels.ravel(), minlength=k)
        centroids = unit_rows(np.where(counts[:, None] > 0, sums, 0))
        _split_for_empty(pairs, centroids, labels, counts, random)
        gain = history[-1] - history[max(0, len(history) - 1 - STALL_ITERATIONS)]
        if len(history) > STALL_ITERATIONS and gain <= STALL_GAIN * abs(history[-1]):
            break
    return centroids, len(history)


def _change_of_sums(
    pairs: Float[np.ndarray, "n E"], before: Int[np.ndarray, "2 n"] | None, labels: Int[np.ndarray, "2 n"], k: int
) -> Float[np.ndarray, "k E"]:
    """The change of each cluster's sum of rows, computed from the rows that changed cluster only."""
    from scipy import sparse

    signs, columns, clusters = [], [], []
    for side, sign in enumerate((1, -1)):
        moved = np.arange(len(pairs)) if before is None else np.flatnonzero(before[side] != labels[side])
        for assigned, weight in ((labels, 1), (before, -1)):
            if assigned is None:
                continue
            # Halves s and t are rows 2i and 2i + 1 of the pairs as [2n, D], and so are those of the centroids.
            for half, half_sign in enumerate((1, sign)):
                signs.append(np.full(len(moved), weight * half_sign, np.float32))
                columns.append(2 * moved + half)
                clusters.append(2 * assigned[side][moved] + half)
    entries = (np.concatenate(signs), (np.concatenate(clusters), np.concatenate(columns)))
    change = sparse.csr_matrix(entries, shape=(2 * k, 2 * len(pairs))) @ pairs.reshape(2 * len(pairs), -1)  # [2k, D]
    return change.reshape(k, -1)


def _split_for_empty(
    pairs: Float[np.ndarray, "n E"],
    centroids: Float[np.ndarray, "k E"],
    labels: Int[np.ndarray, "2 n"],
    counts: Int[np.ndarray, " k"],
    random: np.random.Generator,
) -> None:
    """Gives each empty cluster one half of a large one, in place: the two halves are on either side of its centroid."""
    empty = np.flatnonzero(counts == 0)
    larger = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts > 1)]
    for new, large in zip(empty, larger, strict=False):
        row = random.choice(np.flatnonzero(labels.ravel() == large))
        direction = select_rows(pairs, row[None])[0]
        step = SPLIT * (direction - (direction @ centroids[large]) * centroids[large])
        centroids[[large, new]] = unit_rows(np.stack([centroids[large] + step, centroids[large] - step]))


def select_rows(pairs: Float[np.ndarray, "n E"], numbers: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m E"]:
    """Rows by number, rotated: 0…n−1 are the pairs' q⊕d, n…2n−1 their d⊕q."""
    rows = pairs[numbers % len(pairs)]
    rows[numbers >= len(pairs), pairs.shape[1] // 2 :] *= -1
    return rows


def plus_plus(pairs: Float[np.ndarray, "n E"], k: int, random: np.random.Generator) -> Float[np.ndarray, "k E"]:
    """k rows by greedy k-means++: of a few drawn by squared distance, each time the one that reduces it the most.

    Rows beyond SEQUENTIAL are drawn at once, by their distance to those.
    """
    size = max(START_PAIRS, PAIRS_PER_CLUSTER * k)
    if len(pairs) > size:
        pairs = pairs[np.sort(random.choice(len(pairs), size, replace=False))]
    width = pairs.shape[1] // 2
    distances = np.ones((2 * len(pairs), 1), np.float32)  # half the squared distance of a row to the nearest chosen one
    chosen = np.empty((k, pairs.shape[1]), np.float32)
    for step in range(min(k, SEQUENTIAL)):
        cumulative = np.cumsum(distances, dtype=np.float64)
        draws = random.random(2 + int(np.log(k)) if step else 1) * cumulative[-1]
        drawn = np.minimum(np.searchsorted(cumulative, draws, side="right"), len(cumulative) - 1)
        rows = select_rows(pairs, drawn)  # [draws, E]
        both, minus = pairs[:, :width] @ rows[:, :width].T, pairs[:, width:] @ rows[:, width:].T
        reduced = np.clip(1 - np.concatenate([both + minus, both - minus]), 0, distances)  # [2n, draws]
        best = reduced.sum(axis=0, dtype=np.float64).argmin()
        chosen[step], distances = rows[best], reduced[:, best : best + 1]
    if k > SEQUENTIAL:
        # Weighted draws without replacement: the largest values of log(uniform) / weight.
        keys = np.log(1 - random.random(len(distances))) / np.maximum(distances[:, 0], 1e-12)
        chosen[SEQUENTIAL:] = select_rows(pairs, np.argsort(-keys, kind="stable")[: k - SEQUENTIAL])
    return chosen
