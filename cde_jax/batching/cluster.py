"""Paired k-means within a domain: pairs that lie near each other become candidates for one batch (paper, section 3.1).

A pair is clustered by its query and its document together. Each pair gives two rows, q⊕d and d⊕q, so that "the query
of one is near the document of the other" counts as near. Runs on FAISS; the only user of FAISS in the path to a plan.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import faiss
import numpy as np
from jaxtyping import Float, Int
from sklearn.cluster import kmeans_plusplus
from threadpoolctl import threadpool_limits

log = logging.getLogger(__name__)

CLUSTER_STREAM = 11  # keeps this module's random numbers apart from those of the other users of the same seed
# A try is worth its full run only from a good start, so several are compared in short runs on a sample first.
STARTS = 4
START_ITERATIONS = 10
START_ROWS = 16_384  # in the sample, or this many per centroid if that is more:
START_ROWS_PER_CENTROID = 8
# Multiply-adds of one assignment of all rows. Below this, threads cost more than they give (several times more on a
# busy machine), and one thread rounds the same on any number of cores.
THREADED_WORK = 10**9


class Clusters(NamedTuple):
    """One clustering of n pairs; a cluster may be empty (its centroid won only rows of the form d⊕q)."""

    assignments: Int[np.ndarray, " n"]  # int64, the cluster of each pair
    centroids: Float[np.ndarray, "k E"]  # float32, unit rows of width E = 2D
    objective: float  # mean cosine of each normalised q⊕d row to its centroid


def paired_rows(queries: Float[np.ndarray, "n D"], documents: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n E"]:
    """The rows q⊕d, float32 [n, 2D], each divided by its norm; a row of zeros stays zero.

    Raises ValueError for vectors that are not finite or of two shapes.
    """
    if queries.shape != documents.shape:
        raise ValueError(
            f"expected one query and one document vector of the same width per pair, got {list(queries.shape)} and "
            f"{list(documents.shape)}; encode both with one surrogate"
        )
    rows = np.concatenate([queries, documents], axis=1).astype(np.float32)
    broken = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(broken):
        raise ValueError(
            f"expected finite vectors, but {len(broken)} of {len(rows)} pairs have NaN or infinity (first: pair "
            f"{broken[0]}); compute the surrogate's vectors again"
        )
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def paired_kmeans(
    queries: Float[np.ndarray, "n D"],
    documents: Float[np.ndarray, "n D"],
    k: int,
    *,
    iterations: int,
    tries: int,
    seed: int,
) -> Clusters:
    """Spherical k-means of n pairs into k clusters; the best of `tries` starts by the returned objective.

    Takes float16 or float32 vectors of any norm (a longer query weighs more in its pair, as in the reference); computes
    in float32. Trains on all 2n rows: FAISS by default would silently take a sample of 256 per centroid. Each try
    starts from k-means++ instead of FAISS's random rows, which in two of twelve runs of the reference's own small case
    ended 5 % below its best. The same arguments give the same bits; above THREADED_WORK only on the same number of
    cores, since a matrix product's rounding depends on it.

    Raises ValueError for vectors that are not finite or of two shapes, k outside 1…n, iterations < 1 or tries < 1.
    """
    n = len(queries)
    if not 1 <= k <= n:
        raise ValueError(f"expected 1 ≤ k ≤ {n} clusters for {n} pairs, got k = {k}; use fewer clusters")
    if iterations < 1 or tries < 1:
        raise ValueError(f"expected iterations ≥ 1 and tries ≥ 1, got {iterations} and {tries}")
    forward = paired_rows(queries, documents)
    width = queries.shape[1]
    rows = np.concatenate([forward, np.roll(forward, width, axis=1)])  # [2n, 2D]: q⊕d, then d⊕q
    best = None
    with threadpool_limits(None if rows.size * k > THREADED_WORK else 1):
        for attempt in range(1 if k == 1 else tries):  # with one cluster every start ends at the same mean
            centroids = _spherical_kmeans(rows, k, iterations, [seed, CLUSTER_STREAM, attempt])
            found = _assign(forward, centroids)
            if best is None or found.objective > best.objective:
                best = found
    return best


def _spherical_kmeans(
    rows: Float[np.ndarray, "m E"], k: int, iterations: int, entropy: Sequence[int]
) -> Float[np.ndarray, "k E"]:
    if k == 1:
        centroid = rows.mean(axis=0, keepdims=True, dtype=np.float64)
        return (centroid / max(np.linalg.norm(centroid), 1e-12)).astype(np.float32)
    random = np.random.default_rng(entropy)
    sample = rows
    sample_size = max(START_ROWS, START_ROWS_PER_CENTROID * k)
    if len(rows) > sample_size:
        sample = rows[np.sort(random.choice(len(rows), sample_size, replace=False))]
    starts = []
    for _ in range(STARTS):
        start, _ = kmeans_plusplus(sample, k, random_state=int(random.integers(2**31)))
        centroids = _faiss_kmeans(sample, start, START_ITERATIONS, int(random.integers(2**31)))
        starts.append(_assign(sample, centroids))
    best = max(starts, key=lambda found: found.objective)  # the first of equals
    return _faiss_kmeans(rows, best.centroids, iterations, int(random.integers(2**31)))


def _faiss_kmeans(
    rows: Float[np.ndarray, "m E"], start: Float[np.ndarray, "k E"], iterations: int, seed: int
) -> Float[np.ndarray, "k E"]:
    kmeans = faiss.Kmeans(
        rows.shape[1],
        len(start),
        niter=iterations,
        nredo=1,
        spherical=True,
        seed=seed,
        min_points_per_centroid=1,  # fewer are fine here, and FAISS would write a warning to the terminal
        max_points_per_centroid=-(-len(rows) // len(start)),  # all rows; FAISS reads it only in the constructor
    )
    kmeans.train(rows, init_centroids=np.ascontiguousarray(start, dtype=np.float32))
    return kmeans.centroids


def _assign(forward: Float[np.ndarray, "n E"], centroids: Float[np.ndarray, "k E"]) -> Clusters:
    index = faiss.IndexFlatIP(centroids.shape[1])
    index.add(centroids)
    similarity, nearest = index.search(forward, 1)
    objective = float(similarity.mean(dtype=np.float64))
    return Clusters(nearest[:, 0].astype(np.int64), centroids, objective)


def cluster_domains(
    queries: Float[np.ndarray, "n D"],
    documents: Float[np.ndarray, "m D"],
    groups: Sequence[Int[np.ndarray, "_"]],
    *,
    cluster_size: int,
    iterations: int,
    tries: int,
    seed: int,
) -> list[Clusters]:
    """Clusters each group of rows (a domain) apart, into k = ⌈rows / cluster_size⌉ clusters: that size on average.

    queries, documents: all vectors, memory-mapped or not (m ≥ n: extra negatives are not clustered); only one group's
    rows are in memory at a time. The i-th result belongs to groups[i]; its assignments follow that group's rows.
    """
    if cluster_size < 1:
        raise ValueError(f"expected cluster_size ≥ 1, got {cluster_size}")
    found = []
    for number, rows in enumerate(groups):
        k = -(-len(rows) // cluster_size)
        group_seed = int(np.random.SeedSequence([seed, CLUSTER_STREAM, number]).generate_state(1)[0])
        clusters = paired_kmeans(
            np.asarray(queries[rows]),
            np.asarray(documents[rows]),
            k,
            iterations=iterations,
            tries=tries,
            seed=group_seed,
        )
        log.debug("group %d: %d rows, %d clusters, objective %.4f", number, len(rows), k, clusters.objective)
        found.append(clusters)
    return found
