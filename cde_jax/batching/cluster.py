"""Paired spherical k-means within each domain: similar pairs become candidates for one batch (paper, section 3.1).

A pair is clustered by its query and its document together, as two rows, q⊕d and d⊕q, so that "the query of one is near
the document of the other" counts as near. The two are stored as one, rotated: (s, t) = (q + d, q − d) / √2. The
rotation keeps all inner products and is its own inverse. Swapping q and d only changes the sign of t, so the cosines of
the two rows with a centroid (u, v), rotated too, are s·u + t·v and s·u − t·v: two products of width D instead of four.
FAISS has no such form (benchmarks/cluster.py compares them).

Blocks of a fixed number of rows are computed in parallel, each with one BLAS thread: the result is the same bits on any
number of cores.
"""

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int

from cde_jax.batching.negatives import Vectors, threads
from cde_jax.config import Batching
from cde_jax.data.store import check_finite, unit_rows

log = logging.getLogger(__name__)

CLUSTER_STREAM = 11  # separates this module's random numbers from others of the same seed
SVD_PAIRS = 2**16  # of a domain that its projection is fitted on, at most
TRAINED_PER_CLUSTER = 32  # pairs in the sample that a large domain is trained on, at least
BLOCK = 4096  # pairs read and rotated at a time
ASSIGNED = 2**16  # pairs in memory at a time, of a domain that is not in memory as a whole
LARGE = 100_000  # pairs of a domain whose clustering is logged at level INFO

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
THREADED = 2 * 10**8  # multiply-adds below which starting threads costs more than they save
SPLIT = 0.05  # distance of the two halves of a split cluster from its centroid

Run = tuple[Float[np.ndarray, "k E"], int]  # unit centroids, rotated, and how many iterations gave them


class Clusters(NamedTuple):
    """A clustering of n pairs. A cluster is empty if its centroid is the nearest of rows d⊕q only."""

    assignments: Int[np.ndarray, " n"]  # int64, the cluster of each pair, that of its row q⊕d
    centroids: Float[np.ndarray, "k E"]  # float32, unit rows of width E = 2D, D that of the vectors as clustered
    objective: float  # mean cosine of each normalised q⊕d row to its centroid


def paired_kmeans(
    queries: Float[np.ndarray, "n D"],
    documents: Float[np.ndarray, "m W"],
    k: int,
    *,
    iterations: int,
    tries: int,
    seed: int,
) -> Clusters:
    """Spherical k-means of n pairs into k clusters: the best of `tries` starts by the returned objective.

    Takes vectors of any norm (a longer query weighs more in its pair, as in the reference); computes in float32, on all
    2n rows, `iterations` times or until the objective stops rising. Starts are k-means++ and are compared on a sample
    where there are many pairs. The same arguments give the same bits on any number of cores.

    Raises ValueError for vectors that are not finite or of two shapes, k outside 1…n, iterations < 1 or tries < 1.
    """
    n = len(queries)
    if queries.shape != documents.shape:
        raise ValueError(
            f"expected one query and one document vector of the same width per pair, got {list(queries.shape)} and "
            f"{list(documents.shape)}; encode both with one surrogate"
        )
    if not 1 <= k <= n:
        raise ValueError(f"expected 1 ≤ k ≤ {n} clusters for {n} pairs, got k = {k}; use fewer clusters")
    settings = Batching(iterations=iterations, tries=tries, cluster_rows=n)
    check_finite("queries", queries)
    check_finite("documents", documents)
    read = partial(_read_rows, Vectors(queries, documents), None)
    return _cluster(read, np.arange(n), k, settings, np.random.default_rng([seed, CLUSTER_STREAM]))


def cluster_domain(
    vectors: Vectors, rows: Int[np.ndarray, " r"], number: int, settings: Batching, seed: int
) -> Clusters:
    """Clusters `rows`, the pairs of one domain, into k = ⌈pairs / cluster_size⌉ clusters.

    vectors: of all pairs, finite. number: of the domain, for its random numbers. Wider vectors than
    `cluster_dimensions` are reduced by an uncentred SVD of the domain's queries and documents (the reference: of the
    queries), then to unit norm. A domain of more than `cluster_rows` pairs is trained on a sample of so many, at least
    TRAINED_PER_CLUSTER · k. Memory: about 12 · cluster_rows · D bytes, and 20 for each pair.
    """
    random, projection = np.random.default_rng([seed, CLUSTER_STREAM, number]), None
    if 0 < settings.cluster_dimensions < vectors.queries.shape[1]:
        projection = _projection(vectors, rows, settings.cluster_dimensions, random)
    read = partial(_read_rows, vectors, projection)
    return _cluster(read, rows, -(-len(rows) // settings.cluster_size), settings, random)


def _read_rows(
    vectors: Vectors, projection: Float[np.ndarray, "D P"] | None, rows: Int[np.ndarray, " r"]
) -> Float32[np.ndarray, "r E"]:
    """The pairs' rows q⊕d, projected, normalised and rotated."""
    width = (vectors.queries if projection is None else projection).shape[1]
    rotated = np.empty((len(rows), 2 * width), np.float32)

    def work(block: slice) -> None:
        halves = [side[rows[block]].astype(np.float32) for side in vectors]
        if projection is not None:
            halves = [unit_rows(half @ projection) for half in halves]
        rotated[block] = rotate(unit_rows(np.concatenate(halves, axis=1)))

    _in_parallel(work, len(rows), BLOCK, len(rows) * width * (width if projection is not None else 1))
    return rotated


def _projection(
    vectors: Vectors, rows: Int[np.ndarray, " r"], dimensions: int, random: np.random.Generator
) -> Float32[np.ndarray, "D P"]:
    """The first right singular vectors of the domain's vectors, uncentred, computed from a sample's X'X."""
    rows = _sample(rows, SVD_PAIRS, random)
    products = np.zeros((vectors.queries.shape[1],) * 2)  # [D, D]
    with threads().limit(limits=1):
        for side in vectors:
            for start in range(0, len(rows), BLOCK):
                block = side[rows[start : start + BLOCK]].astype(np.float32)
                products += block.T @ block
        directions = np.linalg.eigh(products)[1]  # columns by rising singular value
    return directions[:, : -dimensions - 1 : -1].astype(np.float32)


def _cluster(
    read: Callable[[Int[np.ndarray, " r"]], Float32[np.ndarray, "r E"]],
    rows: Int[np.ndarray, " n"],
    k: int,
    settings: Batching,
    random: np.random.Generator,
) -> Clusters:
    start, n = time.perf_counter(), len(rows)
    with threads().limit(limits=1):  # of BLAS: `_in_parallel` uses the other cores
        trained = read(_sample(rows, max(settings.cluster_rows, TRAINED_PER_CLUSTER * k), random))
        centroids, used = kmeans(trained, k, settings.iterations, settings.tries, random)
        assignments, total = np.empty(n, np.int64), 0.0
        for first in range(0, n, ASSIGNED):
            block = slice(first, first + ASSIGNED)
            labels, cosines = assign(trained[block] if len(trained) == n else read(rows[block]), centroids)
            assignments[block] = labels[0]
            total += float(cosines[0].sum(dtype=np.float64))
    seconds, level = time.perf_counter() - start, logging.INFO if n >= LARGE else logging.DEBUG
    message = "%d pairs, %d clusters: %d iterations on %d pairs, objective %.4f, %.1f s"
    log.log(level, message, n, k, used, len(trained), total / n, seconds)
    return Clusters(assignments, rotate(centroids), total / n)


def _sample(rows: Int[np.ndarray, " n"], size: int, random: np.random.Generator) -> Int[np.ndarray, " m"]:
    """`size` of the rows in their order, or all of them."""
    return rows if len(rows) <= size else rows[np.sort(random.choice(len(rows), size, replace=False, shuffle=False))]


def _in_parallel(work: Callable[[slice], None], rows: int, size: int, operations: int) -> None:
    """Calls `work` with every block of `size` rows, in one thread per core where `operations` are worth it."""
    blocks = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if min(cores, len(blocks)) <= 1 or operations < THREADED:
        list(map(work, blocks))
        return
    with ThreadPoolExecutor(min(cores, len(blocks))) as pool:
        list(pool.map(work, blocks))


def rotate(rows: Float[np.ndarray, "n E"]) -> Float[np.ndarray, "n E"]:
    """Rows a⊕b as (a + b)⊕(a − b) / √2, and back."""
    a, b = np.split(rows, 2, axis=1)
    return np.concatenate([a + b, a - b], axis=1) * np.float32(0.5**0.5)


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

    def work(block: slice) -> None:
        rows = pairs[block]
        for start, u, v in tiles:
            plus, minus, both = np.empty((3, len(rows), u.shape[1]), np.float32)
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

    _in_parallel(work, len(pairs), size, pairs.size * len(centroids))
    return labels, products


def kmeans(pairs: Float[np.ndarray, "n E"], k: int, iterations: int, tries: int, random: np.random.Generator) -> Run:
    """k centroids of n pairs (unit rows, rotated), and the number of iterations over all pairs.

    Continues from the best of `tries` restarts on the first sample. `iterations` limits each run.
    """
    order, (first, *larger) = random.permutation(len(pairs)), sample_sizes(len(pairs), k)

    def sample(size: int) -> Float[np.ndarray, "m E"]:
        return pairs if size == len(pairs) else pairs[np.sort(order[:size])]

    rows = sample(first)
    restarts = 1 if k == 1 else tries  # with one cluster every start ends at the same mean
    best = _best(rows, [lloyd(rows, _start(rows, k, random), iterations, random) for _ in range(restarts)])
    for size in larger:
        best = lloyd(sample(size), best[0], iterations, random)
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
    return _best(pairs, [lloyd(pairs, plus_plus(pairs, k, random), START_ITERATIONS, random) for _ in range(STARTS)])[0]


def _best(pairs: Float[np.ndarray, "n E"], runs: list[Run]) -> Run:
    """The run of the greatest mean cosine of the rows q⊕d with their centroids, the first of equals."""
    return max(runs, key=lambda run: float(assign(pairs, run[0])[1][0].mean(dtype=np.float64)))


def lloyd(
    pairs: Float[np.ndarray, "n E"], centroids: Float[np.ndarray, "k E"], iterations: int, random: np.random.Generator
) -> Run:
    """Lloyd's iterations until nothing changes or the gain stalls."""
    k, labels, sums, history = len(centroids), np.full((2, len(pairs)), -1), np.zeros_like(centroids), []
    while len(history) < iterations:
        before, (labels, products) = labels, assign(pairs, centroids)
        history.append(float(products.mean(dtype=np.float64)))
        if np.array_equal(before, labels):
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
    pairs: Float[np.ndarray, "n E"], before: Int[np.ndarray, "2 n"], labels: Int[np.ndarray, "2 n"], k: int
) -> Float[np.ndarray, "k E"]:
    """The change of each cluster's sum of rows, computed from the rows that changed cluster only; −1: from none."""
    from scipy import sparse

    moved = np.flatnonzero(before != labels)  # numbers of rows as in `select_rows`
    side, pair = np.divmod(moved, len(pairs))
    # Halves s and t are rows 2i and 2i + 1 of the pairs as [2n, D], and so are those of the centroids.
    half = np.arange(2)[:, None]
    clusters = 2 * np.stack([labels.ravel()[moved], before.ravel()[moved]])[:, None] + half  # [to or from, half, moved]
    signs = np.array([1, -1])[:, None, None] * (1 - 2 * side * half)  # of d⊕q, half t is subtracted
    columns, used = np.broadcast_to(2 * pair + half, clusters.shape), clusters >= 0
    entries = (signs[used].astype(np.float32), (clusters[used], columns[used]))
    change = sparse.csr_matrix(entries, shape=(2 * k, 2 * len(pairs)))  # [2k, 2n]
    return (change @ pairs.reshape(2 * len(pairs), -1)).reshape(k, -1)


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
