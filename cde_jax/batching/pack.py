"""Clusters into equal batches, within one domain (paper, section 3.1: "packing").

The rule, stated once. In each epoch the clusters of a group of domains (`groups`) are put in a new order, the rows
inside a cluster are shuffled, and the sequence is cut into ⌊rows / B⌋ batches. The remainder (rows mod B) is left out
of that epoch: it is taken out as one run at a random batch boundary, because always taking the end would leave out the
same outliers every time (a greedy tour visits them last). Batches of all groups are then shuffled.

So a large cluster is split into batches, at random, and small ones are merged: with whatever follows at random, or
with the near ones, which follow each other in a tour ("tsp"): the two ways of the paper.

Proportions. A group of weight w (1 unless said otherwise) has ⌊w⌋ such arrangements in an epoch, and of one more a
random share of w − ⌊w⌋ of its batches, to the nearest whole number. A weight above 0 gives one batch at least; a weight
of 0 leaves the group out.
"""

import difflib
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Int64

from cde_jax.batching.groups import SMALL_DOMAINS, Group
from cde_jax.batching.tour import greedy_tour

PACKINGS = ("random", "tsp")
CENTROID_ROWS = 65_536  # document vectors in memory at once, or a whole cluster if that is more


def parse_weights(texts: Sequence[str], groups: Sequence[Group], names: Sequence[str]) -> list[float]:
    """The weight of each group, from texts like "NAME=0.5"; 1 for a group that no text names.

    groups: as `domain_groups` made them; names: those of all domains. Raises ValueError for a text of another form, a
    weight below 0 or not finite, a name given twice, unknown or of a domain without a group of its own, and weights
    that leave nothing.
    """
    weights = {group.name: 1.0 for group in groups}
    given = set()
    for text in texts:
        name, equals, number = text.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not (equals and name and math.isfinite(weight) and weight >= 0):
            raise ValueError(f'expected a domain weight of the form "NAME=0.5", 0 or more; got {text!r}')
        if name in given:
            raise ValueError(f"expected one weight for a domain, but {name!r} has two; keep one of them")
        if name not in weights:
            raise ValueError(_no_such_group(name, list(weights), names))
        given.add(name)
        weights[name] = weight
    if not any(weights.values()):
        raise ValueError("expected a domain with a weight above 0, but all are 0; nothing would be left to train on")
    return [weights[group.name] for group in groups]


def _no_such_group(name: str, known: Sequence[str], names: Sequence[str]) -> str:
    if name in names:
        where = f"in {SMALL_DOMAINS!r}: give that a weight" if SMALL_DOMAINS in known else "left out in any case"
        return f"the domain {name!r} has fewer pairs than a batch and is {where}"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"a weight is given for {name!r}, which is no domain of these pairs; the nearest is {near[0]!r}"


def epoch_size(rows: int, batch_size: int, weight: float) -> int:
    """How many batches an epoch has of a group with so many rows (at least `batch_size`) and this weight."""
    batches = rows // batch_size
    whole, share = divmod(weight, 1)
    return max(int(whole) * batches + math.floor(share * batches + 0.5), int(weight > 0))


def epoch_batches(
    rows: Int64[np.ndarray, " n"],
    assignments: Int[np.ndarray, " n"],
    centroids: Float[np.ndarray, "k D"] | None,
    batch_size: int,
    weight: float,
    random: np.random.Generator,
) -> Int64[np.ndarray, "batches B"]:
    """One epoch's batches of one group: `epoch_size` of them, from as many arrangements as its weight asks for.

    assignments: the cluster 0…k−1 of each of the group's rows; centroids: of the tour, or None for a random order.
    A row comes at most ⌈weight⌉ times, and never twice in a batch.
    """
    wanted = epoch_size(len(rows), batch_size, weight)
    k = int(assignments.max()) + 1
    parts = [np.empty((0, batch_size), np.int64)]
    while wanted:
        batches = arrange(rows, assignments, order_clusters(centroids, k, random), batch_size, random)
        if len(batches) > wanted:
            batches = batches[np.sort(random.choice(len(batches), wanted, replace=False))]
        parts.append(batches)
        wanted -= len(batches)
    return np.concatenate(parts)


def document_centroids(
    documents: Float[np.ndarray, "n D"],
    assignments: Int[np.ndarray, " rows"],
    rows: Int64[np.ndarray, " rows"] | None = None,
) -> Float[np.ndarray, "k D"]:
    """Plain mean of each cluster's document vectors, float64; every cluster 0…k−1 must have rows.

    assignments: the cluster of each document, or of each one of `rows`; the documents, which may be memory-mapped, are
    read CENTROID_ROWS at a time. Tours run over these means and not over the k-means centroids, as in the reference: a
    batch meets its documents.
    """
    sizes = np.bincount(assignments)
    by_cluster = np.argsort(assignments, kind="stable")
    means = np.empty((len(sizes), documents.shape[1]))
    ends = np.cumsum(sizes)
    first = 0
    while first < len(sizes):
        start = ends[first] - sizes[first]
        last = max(first + 1, int(np.searchsorted(ends, start + CENTROID_ROWS, side="right")))  # at least one cluster
        chosen = by_cluster[start : ends[last - 1]]
        together = documents[chosen if rows is None else rows[chosen]]
        inside = ends[first:last] - sizes[first:last] - start
        means[first:last] = np.add.reduceat(together, inside, axis=0, dtype=np.float64)
        first = last
    return means / sizes[:, None]


def order_clusters(
    centroids: Float[np.ndarray, "k D"] | None, k: int, random: np.random.Generator
) -> Int64[np.ndarray, " k"]:
    """One epoch's order of k clusters: random, or with centroids a greedy tour from a random start."""
    if centroids is None:
        return random.permutation(k).astype(np.int64)
    return greedy_tour(centroids, int(random.integers(k)))


def arrange(
    rows: Int64[np.ndarray, " n"],
    assignments: Int[np.ndarray, " n"],
    order: Int64[np.ndarray, " k"],
    batch_size: int,
    random: np.random.Generator,
) -> Int64[np.ndarray, "batches B"]:
    """One epoch's batches of one group: its rows by the place of their cluster in `order`, shuffled inside a cluster.

    `order` names every cluster with rows. The remainder is left out as the module's docstring says.
    """
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    sequence = rows[np.lexsort((random.random(len(rows)), place[assignments]))]
    batches, remainder = divmod(len(rows), batch_size)
    gap = int(random.integers(batches + 1)) * batch_size
    kept = np.concatenate([sequence[:gap], sequence[gap + remainder :]])
    return kept.reshape(batches, batch_size)
