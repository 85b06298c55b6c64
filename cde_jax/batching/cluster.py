"""Paired k-means within each domain: pairs that are similar become candidates for one batch (paper, section 3.1).

A pair is clustered by its query and its document together. Each pair gives two rows, q⊕d and d⊕q, so that "the query
of one is near the document of the other" counts as near. The arithmetic is in `kmeans.py`.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from cde_jax.batching.kmeans import assign, in_parallel, kmeans, rotate
from cde_jax.batching.neighbours import threads
from cde_jax.config import Batching
from cde_jax.data.vectors import check_finite, unit_rows

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


class _Domain(NamedTuple):
    """The vectors of one domain's pairs, read when asked for."""

    queries: Float[np.ndarray, "all D"]
    documents: Float[np.ndarray, "more D"]
    rows: Int[np.ndarray, " n"]
    projection: Float[np.ndarray, "D P"] | None = None

    def read(self, chosen: slice | Int[np.ndarray, " m"]) -> Float[np.ndarray, "m E"]:
        """The chosen pairs' rows q⊕d, projected, normalised and rotated, for `kmeans`."""
        rows = self.rows[chosen]
        width = (self.queries if self.projection is None else self.projection).shape[1]
        rotated = np.empty((len(rows), 2 * width), np.float32)

        def work(blocks: Iterator[slice]) -> None:
            for block in blocks:
                halves = [vectors[rows[block]].astype(np.float32) for vectors in (self.queries, self.documents)]
                if self.projection is not None:
                    halves = [unit_rows(half @ self.projection) for half in halves]
                rotated[block] = rotate(unit_rows(np.concatenate(halves, axis=1)))

        in_parallel(work, len(rows), BLOCK)
        return rotated


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

    Takes float16 or float32 vectors of any norm (a longer query weighs more in its pair, as in the reference); computes
    in float32, on all 2n rows, `iterations` times or until the objective stops rising. Starts are k-means++ and are
    compared on a sample where there are many pairs. The same arguments give the same bits on any number of CPU cores.

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
    return _cluster(_Domain(queries, documents, np.arange(n)), k, settings, _random(seed))


def cluster_domains(
    queries: Float[np.ndarray, "n D"],
    documents: Float[np.ndarray, "m D"],
    groups: Sequence[Int[np.ndarray, "_"]],
    settings: Batching,
    seed: int,
) -> list[Clusters]:
    """Clusters each group of pairs (a domain) separately, into k = ⌈pairs / cluster_size⌉ clusters.

    queries, documents: all vectors, finite, memory-mapped or not (m ≥ n: extra negatives are not clustered). The i-th
    result is that of groups[i]; its assignments follow that group's pairs.

    cluster_dimensions: wider vectors are reduced to so many by an uncentred SVD of the domain's queries and documents
    together, then to unit norm (the reference: of the queries alone). Centroids and objective are then those of the
    reduced vectors. cluster_rows: a larger domain is trained on a seeded sample of so many pairs, or of
    PAIRS_PER_CLUSTER · k if those are more, and then all its pairs are assigned in blocks. Memory: about
    12 · cluster_rows · D bytes for training, and some 20 bytes for each pair of the domain.
    """
    results = []
    for number, rows in enumerate(groups):
        random, domain = _random(seed, number), _Domain(queries, documents, rows)
        if 0 < settings.cluster_dimensions < queries.shape[1]:
            domain = domain._replace(projection=_projection(domain, settings.cluster_dimensions, random))
        results.append(_cluster(domain, -(-len(rows) // settings.cluster_size), settings, random))
    return results


def _projection(domain: _Domain, dimensions: int, random: np.random.Generator) -> Float[np.ndarray, "D P"]:
    """The first right singular vectors of the domain's vectors, uncentred, computed from a sample's X'X."""
    rows = domain.rows[_sample(len(domain.rows), SVD_PAIRS, random)]
    products = np.zeros((domain.queries.shape[1],) * 2)  # [D, D]
    with threads().limit(limits=1):
        for vectors in (domain.queries, domain.documents):
            for start in range(0, len(rows), BLOCK):
                block = vectors[rows[start : start + BLOCK]].astype(np.float32)
                products += block.T @ block
        directions = np.linalg.eigh(products)[1]  # columns by rising singular value
    return directions[:, : -dimensions - 1 : -1].astype(np.float32)


def _cluster(domain: _Domain, k: int, settings: Batching, random: np.random.Generator) -> Clusters:
    start, n = time.perf_counter(), len(domain.rows)
    size = max(settings.cluster_rows, PAIRS_PER_CLUSTER * k)
    with threads().limit(limits=1):  # of BLAS: `in_parallel` uses the other cores
        trained = domain.read(_sample(n, size, random))
        centroids, used = kmeans(trained, k, iterations=settings.iterations, tries=settings.tries, random=random)
        assignments, total = np.empty(n, np.int64), 0.0
        for first in range(0, n, ASSIGNED):
            block = slice(first, min(first + ASSIGNED, n))
            labels, cosines = assign(trained[block] if len(trained) == n else domain.read(block), centroids)
            assignments[block] = labels[0]
            total += float(cosines[0].sum(dtype=np.float64))
    clusters = Clusters(assignments, rotate(centroids), total / n)
    log.log(
        logging.INFO if n >= LARGE else logging.DEBUG,
        "%d pairs, %d clusters: %d iterations on %d pairs, objective %.4f, %.1f s",
        *(n, k, used, len(trained), clusters.objective, time.perf_counter() - start),
    )
    return clusters


def _sample(n: int, size: int, random: np.random.Generator) -> Int[np.ndarray, " m"]:
    """`size` of 0…n−1 in ascending order, or all of them."""
    return np.arange(n) if n <= size else np.sort(random.choice(n, size, replace=False, shuffle=False))


def _random(*entropy: int) -> np.random.Generator:
    return np.random.default_rng([entropy[0], CLUSTER_STREAM, *entropy[1:]])
