"""From pairs and surrogate vectors to a batch plan on disk.

Batches are written one by one, so memory does not grow with epochs. The same pairs, vectors, settings and seed give the
same bytes.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int, Int32, Int64, Shaped
from tqdm import tqdm

from cde_jax.batching import negatives, pack
from cde_jax.batching.cluster import Clusters, cluster_domains
from cde_jax.batching.plan import BatchPlan
from cde_jax.batching.surrogate import texts_fingerprint
from cde_jax.config import Batching
from cde_jax.data.files import fingerprint
from cde_jax.data.store import Store, StoreWriter, check_finite

log = logging.getLogger(__name__)

# Separate the random numbers of one seed: of the arrangement, of hard negatives, of the statistics.
EPOCH_STREAM, NEGATIVES_STREAM, STATISTICS_STREAM = 21, 22, 23
BAR_AFTER = 3.0  # seconds of work before a progress bar shows
MOST_SCORES = 2**32  # of queries and documents in a batch: 32 GiB of float64
MUCH_MASKED = 0.25  # share of masked negatives from which on there is a warning
RANDOM_PAIRS = 4096  # drawn to estimate the similarity of a query and any document


class Inputs(NamedTuple):
    """What a plan is made from."""

    vectors: negatives.Vectors  # arrange the pairs: clusters, tours
    filter_vectors: negatives.Vectors  # find false and hard negatives, and measure difficulty
    keys: negatives.TextKeys
    settings: Batching
    seed: int


def check_sizes(settings: Batching, domain_counts: Mapping[str, int]) -> int:
    """The number of batches of a plan, from the number of pairs by domain; ValueErrors of `plan_groups`."""
    domain = np.repeat(np.arange(len(domain_counts), dtype=np.int32), list(domain_counts.values()))
    groups, _ = plan_groups(domain, list(domain_counts), settings)
    return settings.epochs * sum(pack.epoch_size(group, settings.batch_size) for group in groups)


def plan_groups(
    domain: Int[np.ndarray, " n"], names: Sequence[str], settings: Batching
) -> tuple[list[pack.Group], pack.Group | None]:
    """The groups of n pairs, by the index of their domain, and the group that is left out.

    Raises ValueError for a batch, a cluster, ranks or hard negatives larger than the data, and weights of no domain.
    """
    n, batch, cluster, hard = len(domain), settings.batch_size, settings.cluster_size, settings.hard_negatives
    groups, left_out = pack.domain_groups(domain, names, batch)
    groups = pack.weighted(groups, settings.domain_weights, names)
    largest = max(len(group.rows) for group in groups)
    clustered, mined, rank = settings.method == "clustered", hard and settings.mine_last, settings.mine_first
    scores = batch * batch * (1 + hard)
    for wrong, message in (
        (clustered and cluster > n, f'cluster_size ≤ {n}, the number of pairs, got {cluster}; or method="random"'),
        (hard >= n, f"hard_negatives < {n}, the number of pairs, got {hard}"),
        (mined and rank >= largest, f"mine_first < {largest}, the pairs of the largest domain, got {rank}"),
        (scores > MOST_SCORES, f"≤ {MOST_SCORES:.1e} scores in a batch, B²(1 + hard_negatives), got {scores:.1e}"),
    ):
        if wrong:
            raise ValueError(f"expected {message}; change it in the config, or use more data")
    if clustered and cluster > largest:
        log.warning("every domain is one cluster: cluster_size is %d, the largest has %d pairs", cluster, largest)
    return groups, left_out


def build_plan(
    directory: str | Path,
    pairs: Store,
    vectors: Store,
    settings: Batching,
    seed: int,
    *,
    filter_vectors: Store | None = None,
) -> BatchPlan:
    """Writes the plan's folder and opens it; a kill leaves the old plan or none.

    vectors, filter_vectors (None: the same): stores of this kind, of these pairs' texts; see `Inputs`.

    Raises ValueError for vectors that are not finite or of other texts, settings that do not fit the data, and hard
    negatives that do not exist.
    """
    filter_vectors = filter_vectors or vectors
    names = [domain["name"] for domain in pairs.manifest["domains"]]
    groups, left_out = plan_groups(pairs.array("domain"), names, settings)
    _check_vectors(pairs, vectors, "vectors")
    if filter_vectors.fingerprint != vectors.fingerprint:
        _check_vectors(pairs, filter_vectors, "the filter's vectors")
    sides = [negatives.Vectors(*map(store.array, negatives.Vectors._fields)) for store in (vectors, filter_vectors)]
    keys = negatives.TextKeys(pairs.array("query_key"), pairs.array("document_key"), pairs.ragged("negatives"))
    inputs = Inputs(*sides, keys, settings, seed)
    _check_hard_negatives(groups, inputs)
    identity = {
        "pairs": pairs.fingerprint,
        "vectors": vectors.fingerprint,
        "filter_vectors": filter_vectors.fingerprint,
        "settings": settings.plan_settings(seed),
    }
    difficulty, content = np.zeros((len(groups), 2, 3)), hashlib.sha256()
    with StoreWriter(directory, "plan") as writer:  # opened first: a folder that cannot be written to is an error now
        groups = cluster_groups(groups, inputs)
        for name, array in plan_arrays(groups, inputs, difficulty):
            writer.append(name, array)
            content.update(np.ascontiguousarray(array))
        summary = {
            "fingerprint": fingerprint(identity | {"content": content.hexdigest()}),
            "surrogate": vectors.manifest.get("surrogate"),
            "filter_surrogate": filter_vectors.manifest.get("surrogate"),
        }
        writer.finish(summary | identity | _summary(groups, names, left_out, inputs, difficulty))
    plan = BatchPlan.load(directory)
    if (masked := plan.manifest["difficulty"]["masked_share"] or 0) >= MUCH_MASKED:
        log.warning("%.1f %% of the negatives are masked: equal texts, or too small a filter_margin", 100 * masked)
    return plan


def cluster_groups(groups: Sequence[pack.Group], inputs: Inputs) -> list[pack.Group]:
    """The groups with their clusters, one of weight 0 without; with method "random" a group is one cluster."""
    settings, rows = inputs.settings, [group.rows for group in groups if group.weight]
    if settings.method == "random":
        results = (Clusters(np.zeros(len(each), np.int64), np.zeros((1, 0), np.float32), None) for each in rows)
    else:
        results = cluster_domains(inputs.vectors, rows, settings, inputs.seed)
    clustered = list(groups)
    for number, group in enumerate(groups):
        if group.weight:
            assignments, centroids, objective = next(results)
            used, assignments = np.unique(assignments, return_inverse=True)
            group = group._replace(assignments=assignments, empty=len(centroids) - len(used), objective=objective)
            if settings.packing == "tsp":
                means = pack.document_centroids(inputs.vectors.documents, assignments, group.rows)
                group = group._replace(centroids=means)
            clustered[number] = group
    return clustered


def plan_arrays(
    groups: Sequence[pack.Group], inputs: Inputs, difficulty: Float64[np.ndarray, "groups 2 3"]
) -> Iterator[tuple[str, Shaped[np.ndarray, "..."]]]:
    """The arrays of `BatchPlan` in pieces with their names; the sums of `_finish_batch` are added to `difficulty`."""
    settings, seed, size = inputs.settings, inputs.seed, inputs.settings.batch_size
    clusters, first = np.full(len(inputs.vectors.queries), -1, np.int32), 0
    mined: dict[int, Int32[np.ndarray, "rows window"]] = {}
    for number, group in enumerate(groups):
        if group.weight:
            clusters[group.rows] = first + group.assignments
            first += len(group.cluster_sizes)
            mined[number] = negatives.mine_hard_negatives(
                inputs.filter_vectors, group.rows, inputs.keys, settings, seed
            )
    yield "clusters", clusters
    total, step = settings.epochs * sum(pack.epoch_size(group, size) for group in groups), 0
    with tqdm(total=total, desc="batches and masks", delay=BAR_AFTER, leave=False) as bar:
        for epoch in range(settings.epochs):
            random = np.random.default_rng([seed, EPOCH_STREAM, epoch])
            batches = [pack.epoch_batches(group, size, random) for group in groups]  # the same clusters arranged anew
            order = random.permutation(sum(map(len, batches)))
            numbers = np.repeat(np.arange(len(groups), dtype=np.int32), [len(part) for part in batches])[order]
            rows = np.concatenate(batches)[order]
            yield "rows", rows
            yield "groups", numbers
            # More threads gain little on small matrices, and cost much on a busy machine.
            with negatives.threads().limit(limits=1):
                for batch, number in zip(rows, numbers.tolist(), strict=True):
                    pool, random = groups[number].rows, np.random.default_rng([seed, NEGATIVES_STREAM, step])
                    candidates = mined[number][np.searchsorted(pool, batch)]  # [B, window]
                    hard, keep, sums = _finish_batch(batch, candidates, pool, inputs, random)
                    yield "hard_negatives", hard[None]
                    yield "keep_bits", np.packbits(keep, axis=-1)[None]
                    difficulty[number] += sums
                    step += 1
                    bar.update()


def _finish_batch(
    rows: Int64[np.ndarray, " B"],
    candidates: Int32[np.ndarray, "B window"],
    pool: Int64[np.ndarray, " pool"],
    inputs: Inputs,
    random: np.random.Generator,
) -> tuple[Int64[np.ndarray, "B K"], Bool[np.ndarray, "B N"], Float64[np.ndarray, "2 3"]]:
    """Hard negatives and the mask of a batch; sums and numbers of what `_means` names."""
    settings, keys = inputs.settings, inputs.keys
    hard, given = negatives.choose_hard_negatives(rows, settings.hard_negatives, candidates, pool, keys, random)
    columns = np.concatenate([rows, hard.ravel()])  # [N]
    queries, documents = inputs.filter_vectors
    scores = negatives.cosine(queries[rows], documents[columns])  # [B, N]
    keep = negatives.false_negative_mask(scores, rows, columns, keys, settings.filter_margin, given)
    batch = len(rows)
    kept = keep[:, :batch] & ~np.eye(batch, dtype=bool)
    sums = scores[:, :batch].sum(where=kept), np.trace(scores), np.count_nonzero(~keep)
    return hard, keep, np.array([sums, (np.count_nonzero(kept), batch, batch * (len(columns) - 1))], np.float64)


def _means(sums: Float64[np.ndarray, "2 3"]) -> dict[str, float | None]:
    """Mean cosine of a query with its in-batch negatives and with its positive; masked share of all negatives."""
    names = ("in_batch_negative_similarity", "positive_similarity", "masked_share")
    means = (round(total / number, 6) if number else None for total, number in sums.T.tolist())
    return dict(zip(names, means, strict=True))


def _summary(
    groups: Sequence[pack.Group],
    names: Sequence[str],
    left_out: pack.Group | None,
    inputs: Inputs,
    difficulty: Float64[np.ndarray, "groups 2 3"],
) -> dict[str, Any]:
    """For a reader of the manifest: what an epoch is made of, what it leaves out, and how hard the batches are.

    "median_cluster_size": half of the pairs are in a cluster of at most that size. It exceeds `cluster_size` where
    clusters are empty: their centroids are the nearest of rows d⊕q only.
    """
    batch_size = inputs.settings.batch_size
    batches = [pack.epoch_size(group, batch_size) for group in groups]
    sizes = np.concatenate([group.cluster_sizes for group in groups])
    powers = np.bincount(np.log2(sizes).astype(np.int64))  # clusters of 2^p … 2^(p+1) − 1 pairs
    return {
        "batches": sum(batches) * inputs.settings.epochs,
        "batches_per_epoch": sum(batches),
        "groups": [
            {
                "name": group.name,
                "domains": [names[i] for i in group.domains],
                "rows": len(group.rows),
                "clusters": len(group.cluster_sizes),
                "empty_clusters": group.empty,
                "median_cluster_size": _median_size(group.cluster_sizes),
                "weight": group.weight,
                "batches": number,
                "left_out": max(0, len(group.rows) - number * batch_size),
                "objective": None if group.objective is None else round(group.objective, 6),
                "difficulty": (means := _means(sums)),
                "masked_share": means.pop("masked_share"),
            }
            for group, number, sums in zip(groups, batches, difficulty, strict=True)
        ],
        "dropped": {
            "domains": [names[i] for i in left_out.domains] if left_out else [],
            "rows": len(left_out.rows) if left_out else 0,
        },
        "cluster_sizes": {f"{2**p}-{2 ** (p + 1) - 1}": int(n) for p, n in enumerate(powers) if n},
        "empty_clusters": sum(group.empty for group in groups),
        "median_cluster_size": _median_size(sizes),
        "difficulty": _means(difficulty.sum(axis=0)) | {"random_pair_similarity": _random_similarity(inputs)},
    }


def _median_size(sizes: Int64[np.ndarray, " clusters"]) -> float | None:
    """Of the cluster of a pair."""
    return float(np.median(np.repeat(sizes, sizes))) if len(sizes) else None


def _random_similarity(inputs: Inputs) -> float | None:
    """Mean cosine of a query with another pair's document, over all domains: what random batches would have."""
    random = np.random.default_rng([inputs.seed, STATISTICS_STREAM])
    queries, documents = inputs.filter_vectors
    q, d = random.integers(len(queries), size=(2, RANDOM_PAIRS))
    sides = queries[q[q != d]], documents[d[q != d]]
    cosines = np.prod([negatives.rounded_unit_rows(side) for side in sides], axis=0).sum(axis=1)
    return round(float(cosines.mean()), 6) if len(cosines) else None


def _check_vectors(pairs: Store, vectors: Store, name: str) -> None:
    """Raises ValueError for vectors of other texts, of another shape, or that are not finite."""
    again = "encode these pairs again with --rebuild"
    if (got := vectors.manifest.get("texts")) != (expected := texts_fingerprint(pairs)):
        raise ValueError(f"{name} are of other texts: expected fingerprint {expected}, they have {got}; {again}")
    widths = [vectors.array(side).shape[1] for side in ("queries", "documents")]
    if widths[0] != widths[1]:
        raise ValueError(f"expected {name} of one width, got queries of {widths[0]}, documents of {widths[1]}; {again}")
    for side, key in (("queries", "query_key"), ("documents", "document_key")):
        if (got := len(vectors.array(side))) != (expected := len(pairs.array(key))):
            raise ValueError(f"expected {name} of {expected} {side}, got {got}; {again}")
        check_finite(f"{name} of the {side}", vectors.array(side))


def _check_hard_negatives(groups: Sequence[pack.Group], inputs: Inputs) -> None:
    """Raises ValueError if a pair can have no hard negative; only pairs with many positives are looked at."""
    keys, hard = inputs.keys, inputs.settings.hard_negatives
    for group in [group for group in groups if hard and group.weight]:
        texts = len(np.unique(keys.documents[group.rows]))
        rows = group.rows[keys.positive_texts(group.rows) >= texts]  # their positives may be all texts of the group
        unmined, random = np.empty((len(rows), 0), np.int32), np.random.default_rng(0)
        negatives.choose_hard_negatives(rows, hard, unmined, group.rows, keys, random)
