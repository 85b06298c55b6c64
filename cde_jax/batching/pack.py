"""Clusters into batches of equal size, within one group of domains (paper, section 3.1, "packing").

A domain of at least B pairs is a group. Smaller ones are merged into the group "(small domains)", which is left out if
it has fewer than B pairs itself. In each epoch the clusters of a group are put in a new order, random or a greedy tour
in which similar clusters follow each other; the rows of each cluster are shuffled, and the sequence is cut into
⌊rows / B⌋ batches. A group of weight w (1 by default) has ⌊w⌋ such arrangements in an epoch, and of one more a random
share of w − ⌊w⌋ of its batches, rounded: at least one batch unless w = 0.
"""

import difflib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int, Int64

from cde_jax.batching.negatives import THREADED_WORK, build_index, search_selected, threads
from cde_jax.config import parse_weight
from cde_jax.data.store import check_finite

SMALL_DOMAINS = "(small domains)"
EXACT_TOUR = 2**14  # centroids up to which a tour is exact
NEIGHBOURS = 16  # of each centroid in the graph of larger tours


class Group(NamedTuple):
    """Pairs that may share a batch: a domain, or the small domains together."""

    name: str
    domains: tuple[int, ...]  # indices of the domains it is made of
    rows: Int64[np.ndarray, " rows"]  # ascending
    weight: float = 1.0
    assignments: Int64[np.ndarray, " rows"] | None = None  # the cluster of each row, numbered without empty ones
    empty: int = 0  # clusters without pairs
    objective: float | None = None  # of the k-means
    centroids: Float[np.ndarray, "k D"] | None = None  # that a tour visits; None: the clusters come in random order

    @property
    def cluster_sizes(self) -> Int64[np.ndarray, " clusters"]:
        """Pairs in each cluster."""
        return np.zeros(0, np.int64) if self.assignments is None else np.bincount(self.assignments)


def domain_groups(
    domain: Int[np.ndarray, " n"], names: Sequence[str], batch_size: int
) -> tuple[list[Group], Group | None]:
    """The groups of n pairs by the index of their domain into `names`, and the small domains' if it is left out.

    Raises ValueError if no batch of `batch_size` pairs can be made.
    """
    order = np.argsort(domain, kind="stable").astype(np.int64)
    rows_of = np.split(order, np.cumsum(np.bincount(domain, minlength=len(names)))[:-1])
    groups = [Group(names[i], (i,), rows) for i, rows in enumerate(rows_of) if len(rows) >= batch_size]
    small, left_out = tuple(i for i, rows in enumerate(rows_of) if 0 < len(rows) < batch_size), None
    if small:
        left_out = Group(SMALL_DOMAINS, small, np.sort(np.concatenate([rows_of[i] for i in small])))
        if len(left_out.rows) >= batch_size:
            groups, left_out = [*groups, left_out], None
    if not groups:
        raise ValueError(
            f"expected at least one batch of {batch_size} pairs, got {len(domain)} pairs in {len(names)} domains and "
            "none can be made; use a smaller batch_size or more data"
        )
    return groups, left_out


def weighted(groups: Sequence[Group], texts: Sequence[str], names: Sequence[str]) -> list[Group]:
    """The groups with the weights of texts like "NAME=0.5" (`config.parse_weight`); names: of all domains.

    Raises ValueError for a name that is unknown or of a domain without a group of its own, and if no group is left.
    """
    weights, known = dict(map(parse_weight, texts)), [group.name for group in groups]
    for name in weights.keys() - set(known):
        if name in names:
            where = f"in {SMALL_DOMAINS!r}: give that a weight" if SMALL_DOMAINS in known else "left out in any case"
            raise ValueError(f"the domain {name!r} has fewer pairs than a batch and is {where}")
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"a weight is given for {name!r}, no domain of these pairs; the nearest is {near!r}")
    if not any(weights.get(name, 1) for name in known):
        raise ValueError("expected a domain with a weight above 0, but all are 0; nothing would be left to train on")
    return [group._replace(weight=weights.get(group.name, 1.0)) for group in groups]


def epoch_size(group: Group, batch_size: int) -> int:
    """The number of batches in an epoch of a group, which has at least `batch_size` rows."""
    batches = len(group.rows) // batch_size
    whole, share = divmod(group.weight, 1)
    return max(int(whole) * batches + math.floor(share * batches + 0.5), int(group.weight > 0))


def epoch_batches(group: Group, batch_size: int, random: np.random.Generator) -> Int64[np.ndarray, "batches B"]:
    """One epoch's batches of a clustered group: `epoch_size` of them, from as many arrangements as its weight needs.

    A row occurs at most ⌈weight⌉ times, never twice in a batch.
    """
    missing = epoch_size(group, batch_size)
    parts = [np.empty((0, batch_size), np.int64)]
    while missing:
        batches = arrange(group.rows, group.assignments, group.centroids, batch_size, random)
        if len(batches) > missing:
            batches = batches[np.sort(random.choice(len(batches), missing, replace=False))]
        parts.append(batches)
        missing -= len(batches)
    return np.concatenate(parts)


def arrange(
    rows: Int64[np.ndarray, " n"],
    assignments: Int[np.ndarray, " n"],
    centroids: Float[np.ndarray, "k D"] | None,
    batch_size: int,
    random: np.random.Generator,
) -> Int64[np.ndarray, "batches B"]:
    """⌊n / B⌋ batches of one group: clusters in a random order or that of a tour from a random start, rows shuffled.

    The remainder that is left out is a run of rows at a random batch boundary, because a tour reaches the same outliers
    last every time.
    """
    k = int(assignments.max()) + 1
    order = random.permutation(k) if centroids is None else greedy_tour(centroids, int(random.integers(k)))
    position = np.argsort(order)  # of each cluster
    sequence = rows[np.lexsort((random.random(len(rows)), position[assignments]))]
    batches, remainder = divmod(len(rows), batch_size)
    gap = int(random.integers(batches + 1)) * batch_size
    return np.delete(sequence, slice(gap, gap + remainder)).reshape(batches, batch_size)


def document_centroids(
    documents: Float[np.ndarray, "n D"], assignments: Int[np.ndarray, " rows"], rows: Int64[np.ndarray, " rows"]
) -> Float64[np.ndarray, "k D"]:
    """The mean of each cluster's document vectors, which tours visit, as in the reference: batches contrast documents.

    assignments: the cluster 0…k−1 of each of `rows`, none empty. One cluster is read at a time.
    """
    by_cluster = rows[np.argsort(assignments, kind="stable")]
    members = np.split(by_cluster, np.cumsum(np.bincount(assignments))[:-1])
    return np.stack([documents[cluster].mean(axis=0, dtype=np.float64) for cluster in members])


def greedy_tour(centroids: Float[np.ndarray, "k D"], start: int) -> Int64[np.ndarray, " k"]:
    """From `start`, always to the nearest centroid not visited yet (Euclidean distance), ties to the lowest index.

    Exact for up to EXACT_TOUR centroids: O(k² D) time and O(k D) memory. With more, the search is restricted to a
    centroid's NEIGHBOURS nearest ones while one of those is left: the length is within 1 % of the exact tour's
    (benchmarks/results). Raises ValueError for a start outside 0…k−1 or a centroid that is not finite.
    """
    k = len(centroids)
    if not 0 <= start < k:
        raise ValueError(f"expected a start in 0…{k - 1} for {k} centroids, got {start}")
    check_finite("centroids", centroids)
    return (_exact_tour if k <= EXACT_TOUR else _graph_tour)(centroids, start)


def _exact_tour(centroids: Float[np.ndarray, "k D"], start: int) -> Int64[np.ndarray, " k"]:
    """The tour by exact differences in float64 (an expanded square rounds equal distances differently).

    They are computed only for those points that could be the nearest by a float32 estimate and its largest error.
    """
    points = centroids.astype(np.float64)
    k, width = points.shape
    rough = points - points.mean(axis=0)
    rough /= np.sqrt(np.einsum("kd,kd->k", rough, rough).max()) or 1.0
    rough = rough.astype(np.float32)  # within the unit ball
    squares = np.einsum("kd,kd->k", rough, rough)
    # Error of |b|² − 2ab: two sums of `width` products, each rounded by 2⁻²⁴ of at most 1, and of the coordinates.
    # Twice, for the point that is the nearest and for the one that seems to be.
    slack = np.float32(2 * 4 * (width + 8) * 2.0**-24)
    order = np.empty(k, np.int64)
    order[0] = here = start
    index = np.arange(k)  # of the points still held; visited ones are dropped once they are half of them
    with threads().limit(limits=1):  # a product with one vector is limited by memory bandwidth, not by cores
        for step in range(1, k):
            squares[here] = np.inf
            current, current_rough = points[here], rough[here]
            if 2 * (k - step) < len(index):
                held = np.isfinite(squares)
                points, rough, squares, index = points[held], rough[held], squares[held], index[held]
            estimate = squares - 2 * (rough @ current_rough)
            near = np.flatnonzero(estimate <= estimate.min() + slack)
            difference = points[near] - current
            here = int(near[np.einsum("kd,kd->k", difference, difference).argmin()])  # the first of equals
            order[step] = index[here]
    return order


def _graph_tour(centroids: Float[np.ndarray, "k D"], start: int) -> Int64[np.ndarray, " k"]:
    """The tour over a graph of nearest neighbours, with a search among all unvisited points where it ends."""
    points = np.ascontiguousarray(centroids, np.float32)
    k, width = points.shape
    with threads().limit(limits=None if k**2 * width > THREADED_WORK else 1):
        index = build_index(points.__getitem__, k, width, (0, 0), cosine=False)
        graph = index.search(points, 1 + NEIGHBOURS)[1]  # one more: most points find themselves
    unvisited = bytearray(b"\xff") * (k // 8 + 1)  # one bit per point; the search sees its changes
    order = np.empty(k, np.int64)
    order[0] = here = start
    with threads().limit(limits=1):
        for step in range(1, k):
            unvisited[here >> 3] &= ~(1 << (here & 7))
            near = (i for i in graph[here].tolist() if i >= 0 and unvisited[i >> 3] >> (i & 7) & 1)
            there = next(near, -1)
            here = there if there >= 0 else search_selected(index, points[here], unvisited)
            order[step] = here
    return order
