"""Paired k-means within each domain: pairs that are similar become candidates for one batch (paper, section 3.1).

A pair is clustered by its query and its document together. Each pair gives two rows, q⊕d and d⊕q, so that "the query
of one is near the document of the other" counts as near. The arithmetic is in `kmeans.py`.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int

from cde_jax.batching.kmeans import assign, in_parallel, kmeans, rotate
from cde_jax.batching.neighbours import threads
from cde_jax.config import Batching
from cde_jax.data.store import check_finite, unit_rows

log = logging.getLogger(__name__)

CLUSTER_STREAM = 11  # separates this module's random numbers from others of the same seed
SVD_PAIRS = 2**16  # of a domain that its projection is fitted on, at most
PAIRS_PER_CLUSTER = 32  # in the sample that a large domain is trained on, at least
BLOCK = 4096  # pairs read and rotated at a time
ASSIGNED = 2**16  # pairs in memory at a time, of a domain that is not in memory as a whole
LARGE = 100_000  # pairs of a domain whose clustering is logged at level INFO


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
    read = partial(_read_rows, queries, documents, None)
    return _cluster(read, np.arange(n), k, settings, _random(seed))


def cluster_domains(
    queries: Float[np.ndarray, "n D"],
    documents: Float[np.ndarray, "m D"],
    groups: Sequence[Int[np.ndarray, "_"]],
    settings: Batching,
    seed: int,
) -> list[Clusters]:
    """Clusters each group of pairs (a domain) separately, into k = ⌈pairs / cluster_size⌉ clusters.

    queries, documents: all vectors, finite, memory-mapped or not. The assignments of the i-th result follow groups[i].
    Wider vectors than `cluster_dimensions` are reduced by an uncentred SVD of the domain's queries and documents (the
    reference: of the queries), then to unit norm. A domain of more than `cluster_rows` pairs is trained on a sample of
    so many, at least PAIRS_PER_CLUSTER · k. Memory: about 12 · cluster_rows · D bytes, and 20 for each pair.
    """
    results = []
    for number, rows in enumerate(groups):
        random, projection = _random(seed, number), None
        if 0 < settings.cluster_dimensions < queries.shape[1]:
            projection = _projection(queries, documents, rows, settings.cluster_dimensions, random)
        read = partial(_read_rows, queries, documents, projection)
        results.append(_cluster(read, rows, -(-len(rows) // settings.cluster_size), settings, random))
    return results


def _read_rows(
    queries: Float[np.ndarray, "n D"],
    documents: Float[np.ndarray, "m D"],
    projection: Float[np.ndarray, "D P"] | None,
    rows: Int[np.ndarray, " r"],
) -> Float32[np.ndarray, "r E"]:
    """The pairs' rows q⊕d, projected, normalised and rotated, for `kmeans`."""
    width = (queries if projection is None else projection).shape[1]
    rotated = np.empty((len(rows), 2 * width), np.float32)

    def work(blocks: Iterator[slice]) -> None:
        for block in blocks:
            halves = [vectors[rows[block]].astype(np.float32) for vectors in (queries, documents)]
            if projection is not None:
                halves = [unit_rows(half @ projection) for half in halves]
            rotated[block] = rotate(unit_rows(np.concatenate(halves, axis=1)))

    in_parallel(work, len(rows), BLOCK)
    return rotated


def _projection(
    queries: Float[np.ndarray, "n D"],
    documents: Float[np.ndarray, "m D"],
    rows: Int[np.ndarray, " r"],
    dimensions: int,
    random: np.random.Generator,
) -> Float32[np.ndarray, "D P"]:
    """The first right singular vectors of the domain's vectors, uncentred, computed from a sample's X'X."""
    rows = _sample(rows, SVD_PAIRS, random)
    products = np.zeros((queries.shape[1],) * 2)  # [D, D]
    with threads().limit(limits=1):
        for vectors in (queries, documents):
            for start in range(0, len(rows), BLOCK):
                block = vectors[rows[start : start + BLOCK]].astype(np.float32)
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
    with threads().limit(limits=1):  # of BLAS: `in_parallel` uses the other cores
        trained = read(_sample(rows, max(settings.cluster_rows, PAIRS_PER_CLUSTER * k), random))
        centroids, used = kmeans(trained, k, iterations=settings.iterations, tries=settings.tries, random=random)
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


def _random(*entropy: int) -> np.random.Generator:
    return np.random.default_rng([entropy[0], CLUSTER_STREAM, *entropy[1:]])
