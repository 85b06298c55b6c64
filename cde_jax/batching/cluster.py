"""Paired k-means within a domain: pairs that lie near each other become candidates for one batch (paper, section 3.1).

A pair is clustered by its query and its document together. Each pair gives two rows, q⊕d and d⊕q, so that "the query
of one is near the document of the other" counts as near. The arithmetic is in `kmeans.py`; here, vectors become rows,
of domains larger than memory too.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from threadpoolctl import threadpool_limits

from cde_jax.batching.kmeans import in_blocks, kmeans, nearest, turn, unit

log = logging.getLogger(__name__)

CLUSTER_STREAM = 11  # keeps this module's random numbers apart from those of the other users of the same seed
SVD_PAIRS = 2**16  # of a domain that its projection is fitted on, at most
PAIRS_PER_CLUSTER = 32  # in the sample that a large domain is trained on, at least
BLOCK = 4096  # pairs read, checked and turned at a time
ASSIGNED = 2**16  # pairs in memory at a time, of a domain that is not in memory as a whole
LARGE = 100_000  # pairs of a domain whose line of the log is shown to everybody


class Clusters(NamedTuple):
    """One clustering of n pairs; a cluster may be empty (its centroid won only rows of the form d⊕q)."""

    assignments: Int[np.ndarray, " n"]  # int64, the cluster of each pair
    centroids: Float[np.ndarray, "k E"]  # float32, unit rows of width E = 2D, D that of the vectors as clustered
    objective: float  # mean cosine of each normalised q⊕d row to its centroid, by the vectors as clustered


class _Pairs(NamedTuple):
    """The pairs of one domain, read when asked for."""

    queries: Float[np.ndarray, "all D"]
    documents: Float[np.ndarray, "more D"]
    rows: Int[np.ndarray, " n"]
    projection: Float[np.ndarray, "D P"] | None = None

    def read(self, chosen: slice | Int[np.ndarray, " m"]) -> Float[np.ndarray, "m E"]:
        """Their rows q⊕d, projected, normalised and turned, for `kmeans`."""
        rows = self.rows[chosen]
        width = (self.queries if self.projection is None else self.projection).shape[1]
        turned = np.empty((len(rows), 2 * width), np.float32)

        def work(blocks: Iterator[slice]) -> None:
            for block in blocks:
                halves = [vectors[rows[block]].astype(np.float32) for vectors in (self.queries, self.documents)]
                if self.projection is not None:
                    halves = [unit(half @ self.projection) for half in halves]
                turned[block] = turn(unit(np.concatenate(halves, axis=1)))

        in_blocks(work, len(rows), BLOCK)
        return turned

    def check(self) -> None:
        """Raises ValueError for vectors that are not finite."""
        finite = np.ones(len(self.rows), bool)

        def work(blocks: Iterator[slice]) -> None:
            for block in blocks:
                for vectors in (self.queries, self.documents):
                    finite[block] &= np.isfinite(vectors[self.rows[block]]).all(axis=1)

        in_blocks(work, len(finite), BLOCK)
        if not finite.all():
            raise ValueError(
                f"expected finite vectors, but {np.count_nonzero(~finite)} of {len(finite)} pairs have NaN or infinity "
                f"(first: pair {self.rows[finite.argmin()]}); compute the surrogate's vectors again"
            )


def paired_kmeans(
    queries: Float[np.ndarray, "n D"],
    documents: Float[np.ndarray, "m W"],
    k: int,
    *,
    iterations: int,
    tries: int,
    seed: int,
) -> Clusters:
    """Spherical k-means of n pairs into k clusters, from the best of `tries` starts by the returned objective.

    Takes float16 or float32 vectors of any norm (a longer query weighs more in its pair, as in the reference); computes
    in float32. Trains on all 2n rows, with up to `iterations`: it stops when the objective stops moving (`kmeans.py`
    says when). Tries are compared on a sample where there are many pairs. Each starts from k-means++ instead of random
    rows, which in two of twelve runs of the reference's own small case ended 5 % below its best. The same arguments
    give the same bits on any number of cores (a GPU rounds otherwise).

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
    _check(iterations=iterations, tries=tries)
    pairs = _Pairs(queries, documents, np.arange(n))
    pairs.check()
    return _cluster(pairs, k, rows=n, iterations=iterations, tries=tries, random=_random(seed))


def cluster_domains(
    queries: Float[np.ndarray, "n D"],
    documents: Float[np.ndarray, "m W"],
    groups: Sequence[Int[np.ndarray, "_"]],
    *,
    cluster_size: int,
    iterations: int,
    tries: int,
    seed: int,
    dimensions: int = 0,
    rows: int = 2**20,
) -> list[Clusters]:
    """Clusters each group of pairs (a domain) apart, into k = ⌈pairs / cluster_size⌉ clusters: that size on average.

    queries, documents: all vectors, memory-mapped or not (m ≥ n: extra negatives are not clustered). The i-th result
    belongs to groups[i]; its assignments follow that group's pairs.

    dimensions: wider vectors are reduced to so many, then to unit norm, by an uncentred SVD of the domain's queries and
    documents together (the reference: of the queries alone). One projection a domain: a domain's own directions fit in
    fewer dimensions than everybody's, and no step compares clusters of two domains by these vectors. Centroids and
    objective are then those of the reduced vectors, so objectives of different `dimensions` do not compare. 0: as is.

    rows: a larger domain is trained on a seeded sample of so many pairs, or of PAIRS_PER_CLUSTER · k if those are more;
    then all its pairs are assigned in blocks. Memory: about 12 · rows · D bytes for training (or `dimensions` for D),
    and some 20 bytes a pair of the domain.

    Raises ValueError for settings outside their range, vectors that are not finite or of two widths, fewer documents
    than queries, or a cluster size larger than all the pairs.
    """
    _check(cluster_size=cluster_size, iterations=iterations, tries=tries, rows=rows)
    if dimensions < 0:
        raise ValueError(f"expected dimensions ≥ 0, got {dimensions}; 0 clusters the vectors as they are")
    if queries.shape[1] != documents.shape[1] or len(queries) > len(documents):
        raise ValueError(
            f"expected query and document vectors of one width, and a document for each query, got "
            f"{list(queries.shape)} and {list(documents.shape)}; encode both with one surrogate"
        )
    empty = [number for number, group in enumerate(groups) if not len(group)]
    if empty:
        raise ValueError(f"expected pairs in each domain, but domain {empty[0]} has none; leave it out")
    largest = max(map(len, groups), default=0)
    if cluster_size > len(queries):
        raise ValueError(f"expected cluster_size ≤ {len(queries)}, the number of pairs, got {cluster_size}")
    if cluster_size > largest:
        log.warning("every domain is one cluster: cluster_size is %d, the largest has %d pairs", cluster_size, largest)
    domains = [_Pairs(queries, documents, group) for group in groups]
    for pairs in domains:
        pairs.check()
    found = []
    for number, pairs in enumerate(domains):
        random = _random(seed, number)
        if 0 < dimensions < queries.shape[1]:
            pairs = pairs._replace(projection=_projection(pairs, dimensions, random))
        k = -(-len(pairs.rows) // cluster_size)
        found.append(_cluster(pairs, k, rows=rows, iterations=iterations, tries=tries, random=random))
    return found


def _projection(pairs: _Pairs, dimensions: int, random: np.random.Generator) -> Float[np.ndarray, "D P"]:
    """The first right singular vectors of the domain's vectors, uncentred, from the sums of products of a sample."""
    rows = pairs.rows[_sample(len(pairs.rows), SVD_PAIRS, random)]
    products = np.zeros((pairs.queries.shape[1],) * 2)
    with threadpool_limits(1, user_api="blas"):
        for vectors in (pairs.queries, pairs.documents):
            for start in range(0, len(rows), BLOCK):
                block = vectors[rows[start : start + BLOCK]].astype(np.float32)
                products += block.T @ block
        directions = np.linalg.eigh(products)[1]  # by growing singular value
    return directions[:, : -dimensions - 1 : -1].astype(np.float32)


def _cluster(pairs: _Pairs, k: int, *, rows: int, iterations: int, tries: int, random: np.random.Generator) -> Clusters:
    start, n = time.perf_counter(), len(pairs.rows)
    rows = max(rows, PAIRS_PER_CLUSTER * k)
    # One thread of BLAS: `in_blocks` has the others.
    with threadpool_limits(1, user_api="blas"):
        trained = pairs.read(_sample(n, rows, random))
        centroids, used = kmeans(trained, k, iterations=iterations, tries=tries, random=random)
        assignments, total = np.empty(n, np.int64), 0.0
        for first in range(0, n, ASSIGNED):
            block = slice(first, min(first + ASSIGNED, n))
            labels, cosines = nearest(trained[block] if len(trained) == n else pairs.read(block), centroids)
            assignments[block] = labels[0]
            total += float(cosines[0].sum(dtype=np.float64))
    clusters = Clusters(assignments, turn(centroids), total / n)
    log.log(
        logging.INFO if n >= LARGE else logging.DEBUG,
        "%d pairs, %d clusters: %d iterations on %d pairs, objective %.4f, %.1f s",
        *(n, k, used, len(trained), clusters.objective, time.perf_counter() - start),
    )
    return clusters


def _sample(n: int, size: int, random: np.random.Generator) -> Int[np.ndarray, " m"]:
    """`size` of 0…n−1 in their order, or all of them."""
    return np.arange(n) if n <= size else np.sort(random.choice(n, size, replace=False, shuffle=False))


def _random(*entropy: int) -> np.random.Generator:
    return np.random.default_rng([entropy[0], CLUSTER_STREAM, *entropy[1:]])


def _check(**settings: int) -> None:
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"expected {name} ≥ 1, got {value}")
