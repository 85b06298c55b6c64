"""The batches of a plan one after another: clusters of each group, their arrangement in every epoch, hard negatives
and masks. A generator, so that memory does not grow with the number of batches.
"""

import tempfile
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int32, Int64, UInt64
from threadpoolctl import ThreadpoolController
from tqdm import tqdm

from cde_jax.batching.cluster import cluster_domains
from cde_jax.batching.difficulty import Difficulty
from cde_jax.batching.groups import Group
from cde_jax.batching.mine import mine_hard_negatives
from cde_jax.batching.negatives import Positives, choose_hard_negatives, cosine, false_negative_mask, positives
from cde_jax.batching.pack import document_centroids, epoch_batches, epoch_size
from cde_jax.config import Batching
from cde_jax.data.files import explain_os_errors, write_all
from cde_jax.data.store import Ragged, Store

# Keep the random numbers of one seed apart: of the arrangement and of the hard negatives.
EPOCH_STREAM, NEGATIVES_STREAM = 21, 22
BAR_AFTER = 3.0  # seconds of work before a progress bar shows


class Part(NamedTuple):
    """A group of the plan with its clusters. One of weight 0 has no batches, and is not clustered."""

    group: Group
    weight: float
    batches: int  # in an epoch
    assignments: Int64[np.ndarray, " rows"]  # the cluster of each row, 0…k−1, none of them empty
    objective: float | None  # of the k-means

    @property
    def clusters(self) -> int:
        """k, the number of clusters."""
        return int(self.assignments.max(initial=-1)) + 1


class Filter(NamedTuple):
    """What decides which documents are negatives of a query: f's vectors, equal texts, and the data's own negatives."""

    queries: Float[np.ndarray, "n D"]
    documents: Float[np.ndarray, "m D"]
    query_keys: UInt64[np.ndarray, " n"]
    document_keys: UInt64[np.ndarray, " m"]
    known: Positives
    listed: Ragged

    @classmethod
    def of(cls, pairs: Store, vectors: Store) -> "Filter":
        """The filter of a pairs store and the vectors of its texts."""
        keys = pairs.array("query_key"), pairs.array("document_key")
        known, listed = positives(*keys), pairs.ragged("negatives")
        return cls(vectors.array("queries"), vectors.array("documents"), *keys, known, listed)

    def hard_negatives(
        self,
        rows: Int64[np.ndarray, " B"],
        count: int,
        mined: Int64[np.ndarray, "B window"],
        pool: Int64[np.ndarray, " pool"],
        random: np.random.Generator,
    ) -> tuple[Int64[np.ndarray, "B K"], Bool[np.ndarray, "B K"]]:
        """`choose_hard_negatives` among this filter's texts."""
        return choose_hard_negatives(
            rows, count, listed=self.listed, mined=mined, pool=pool, query_keys=self.query_keys,
            document_keys=self.document_keys, known=self.known, random=random,
        )  # fmt: skip


def cluster_groups(
    groups: Sequence[Group], weights: Sequence[float], vectors: Store, settings: Batching, seed: int
) -> list[Part]:
    """The groups with their clusters; with method "random" a group is one cluster."""
    clustered = iter(())
    if settings.method == "clustered":
        clustered = iter(
            cluster_domains(
                vectors.array("queries"),
                vectors.array("documents"),
                [group.rows for group, weight in zip(groups, weights, strict=True) if weight],
                dimensions=settings.cluster_dimensions,
                rows=settings.cluster_rows,
                cluster_size=settings.cluster_size,
                iterations=settings.iterations,
                tries=settings.tries,
                seed=seed,
            )
        )
    parts = []
    for group, weight in zip(groups, weights, strict=True):
        assignments, objective = np.zeros(len(group.rows) if weight else 0, np.int64), None
        if weight and settings.method == "clustered":
            found = next(clustered)
            assignments, objective = np.unique(found.assignments, return_inverse=True)[1], found.objective
        batches = epoch_size(len(group.rows), settings.batch_size, weight)
        parts.append(Part(group, weight, batches, assignments.astype(np.int64), objective))
    return parts


def plan_arrays(
    parts: Sequence[Part],
    vectors: Store,
    judge: Filter,
    settings: Batching,
    seed: int,
    difficulty: Difficulty,
    scratch: Path,
) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of `BatchPlan` in pieces with their names; each batch is added to `difficulty` as it is made.

    scratch: a folder for what is mined, in files without a name.
    """
    yield "clusters", _global_clusters(parts, len(judge.queries))
    centroids = [_centroids(part, vectors, settings) for part in parts]
    mined = [_mine(part, judge, settings, seed, scratch) for part in parts]
    per_epoch, threads = sum(part.batches for part in parts), ThreadpoolController()
    with tqdm(total=settings.epochs * per_epoch, desc="batches and masks", delay=BAR_AFTER, leave=False) as bar:
        for epoch in range(settings.epochs):
            rows, numbers = _arrange(parts, centroids, epoch, settings, seed)
            yield "rows", rows
            yield "groups", numbers
            # One thread: for matrices of this size more give little, and cost much on a busy machine.
            with threads.limit(limits=1):
                for step, batch, number in zip(count(epoch * per_epoch), rows, numbers.tolist(), strict=False):
                    pool = parts[number].group.rows
                    candidates = mined[number][np.searchsorted(pool, batch)]
                    random = np.random.default_rng([seed, NEGATIVES_STREAM, step])
                    hard, given = judge.hard_negatives(batch, settings.hard_negatives, candidates, pool, random)
                    columns = np.concatenate([batch, hard.ravel()])
                    scores = cosine(judge.queries[batch], judge.documents[columns])
                    keys = judge.query_keys[batch], judge.document_keys[columns]
                    keep = false_negative_mask(scores, *keys, judge.known, margin=settings.filter_margin, exempt=given)
                    difficulty.add(number, scores, keep)
                    yield "hard_negatives", hard[None]
                    yield "keep_bits", np.packbits(keep, axis=-1)[None]
                    bar.update()


def _global_clusters(parts: Sequence[Part], n: int) -> Int32[np.ndarray, " n"]:
    clusters, first = np.full(n, -1, np.int32), 0
    for part in parts:
        if part.clusters:
            clusters[part.group.rows] = first + part.assignments
            first += part.clusters
    return clusters


def _centroids(part: Part, vectors: Store, settings: Batching) -> Float[np.ndarray, "k D"] | None:
    if settings.packing != "tsp" or not part.batches:
        return None
    return document_centroids(vectors.array("documents"), part.assignments, part.group.rows)


def _mine(part: Part, judge: Filter, settings: Batching, seed: int, scratch: Path) -> Int64[np.ndarray, "rows window"]:
    """Mined candidates of each row of the group, −1 for none; no columns where nothing is to be mined."""
    rows, (first, last) = part.group.rows, (settings.mine_first, settings.mine_last)
    if not (settings.hard_negatives and last and part.batches):
        return np.empty((len(rows), 0), np.int64)
    mined = mine_hard_negatives(
        judge.queries,
        judge.documents,
        rows,
        query_keys=judge.query_keys,
        document_keys=judge.document_keys,
        first=first,
        last=last,
        margin=settings.mine_margin,
        seed=seed,
    )
    # The file has no name: a kill frees it.
    with explain_os_errors(scratch), tempfile.TemporaryFile(dir=scratch, buffering=0) as file:
        write_all(file, mined.reshape(-1).view(np.uint8))
        return np.memmap(file, mined.dtype, "r", shape=mined.shape).view(np.ndarray)


def _arrange(
    parts: Sequence[Part], centroids: Sequence[np.ndarray | None], epoch: int, settings: Batching, seed: int
) -> tuple[Int64[np.ndarray, "S B"], Int32[np.ndarray, " S"]]:
    """The rows of an epoch's batches and the number of their group, mixed: the same clusters arranged anew."""
    random = np.random.default_rng([seed, EPOCH_STREAM, epoch])
    batches = [
        epoch_batches(part.group.rows, part.assignments, points, settings.batch_size, part.weight, random)
        for part, points in zip(parts, centroids, strict=True)
        if part.batches
    ]
    numbers = np.repeat(np.arange(len(parts), dtype=np.int32), [part.batches for part in parts])
    mixed = random.permutation(len(numbers))
    return np.concatenate(batches)[mixed], numbers[mixed]
