"""From pairs and surrogate vectors to a batch plan on disk.

Batches are written one by one, so memory does not grow with epochs or hard negatives; what is held for the pairs is a
few numbers each. The same pairs, vectors, settings and seed give the same bytes.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from cde_jax.batching.batches import Filter, Part, cluster_groups, plan_arrays
from cde_jax.batching.difficulty import Difficulty, random_similarity, size_histogram
from cde_jax.batching.groups import Group, domain_groups
from cde_jax.batching.pack import parse_weights
from cde_jax.batching.plan import BatchPlan
from cde_jax.config import Batching
from cde_jax.data.store import Store, StoreWriter, fingerprint

BLOCK = 8192  # rows looked at at once by the checks


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

    pairs, vectors, filter_vectors: stores of those kinds, the vectors of these pairs. `vectors` place pairs (clusters,
    tours); `filter_vectors` (None: the same) find false negatives and mined hard negatives, and measure difficulty.

    Raises ValueError for vectors that are not finite or of other pairs, data too small for a batch or a cluster, and
    hard negatives that cannot be had.
    """
    filter_vectors = vectors if filter_vectors is None else filter_vectors
    names = [domain["name"] for domain in pairs.manifest["domains"]]
    groups, left_out = domain_groups(pairs.array("domain"), names, settings.batch_size)
    weights = parse_weights(settings.domain_weights, groups, names)
    _check_cluster_size(settings, len(pairs.array("query_key")))
    _check_vectors(pairs, vectors, "vectors")
    if filter_vectors.fingerprint != vectors.fingerprint:
        _check_vectors(pairs, filter_vectors, "the filter's vectors")
    judge = Filter.of(pairs, filter_vectors)
    used = [group for group, weight in zip(groups, weights, strict=True) if weight]
    _check_hard_negatives(used, judge, settings.hard_negatives)
    identity = {
        "pairs": pairs.fingerprint,
        "vectors": vectors.fingerprint,
        "filter_vectors": filter_vectors.fingerprint,
        "settings": settings.plan_settings(seed),
    }
    surrogates = {
        "surrogate": vectors.manifest.get("surrogate"),
        "filter_surrogate": filter_vectors.manifest.get("surrogate"),
    }
    difficulty, content, scratch = Difficulty(len(groups)), hashlib.sha256(), Path(directory).absolute().parent
    with StoreWriter(directory, "plan") as writer:  # opened now: a place that cannot be written to is found at once
        parts = cluster_groups(groups, weights, vectors, settings, seed)
        for name, array in plan_arrays(parts, vectors, judge, settings, seed, difficulty, scratch):
            writer.append(name, array)
            content.update(np.ascontiguousarray(array))
        whole = {"fingerprint": fingerprint(identity | {"content": content.hexdigest()})}
        writer.finish(
            whole | identity | surrogates | _summary(parts, left_out, names, judge, difficulty, settings, seed)
        )
    return BatchPlan.load(directory)


def _summary(
    parts: list[Part],
    left_out: Group | None,
    names: list[str],
    judge: Filter,
    difficulty: Difficulty,
    settings: Batching,
    seed: int,
) -> dict[str, Any]:
    """For a reader of the manifest: what an epoch is made of, what it leaves out, and how hard the batches are."""
    groups = [
        {
            "name": part.group.name,
            "domains": [names[i] for i in part.group.domains],
            "rows": len(part.group.rows),
            "clusters": part.clusters,
            "weight": part.weight,
            "batches": part.batches,
            "left_out": max(0, len(part.group.rows) - part.batches * settings.batch_size),
            "objective": None if part.objective is None else round(part.objective, 6),
        }
        for part in parts
    ]
    per_epoch = sum(part.batches for part in parts)
    in_random = random_similarity(judge.queries, judge.documents[: len(judge.queries)], seed)
    return {
        "batches": per_epoch * settings.epochs,
        "batches_per_epoch": per_epoch,
        "groups": [group | hard for group, hard in zip(groups, difficulty.of_groups(), strict=True)],
        "dropped": {
            "domains": [names[i] for i in left_out.domains] if left_out else [],
            "rows": len(left_out.rows) if left_out else 0,
        },
        "cluster_sizes": size_histogram([part.assignments for part in parts]),
        "difficulty": difficulty.overall() | {"random_pair_similarity": in_random},
    }


def _check_cluster_size(settings: Batching, pairs: int) -> None:
    if settings.method == "clustered" and settings.cluster_size > pairs:
        raise ValueError(
            f"expected cluster_size ≤ {pairs}, the number of pairs, got {settings.cluster_size}; use smaller "
            'clusters, or method="random" for one cluster a domain'
        )


def _check_vectors(pairs: Store, vectors: Store, what: str) -> None:
    if vectors.manifest.get("pairs") != pairs.fingerprint:
        raise ValueError(
            f"{what} belong to other pairs: expected fingerprint {pairs.fingerprint}, they have "
            f"{vectors.manifest.get('pairs')}; encode these pairs again with --rebuild"
        )
    for name, keys in (("queries", "query_key"), ("documents", "document_key")):
        expected, got = len(pairs.array(keys)), len(vectors.array(name))
        if got != expected:
            raise ValueError(f"expected {what} of {expected} {name}, got {got}; encode again with --rebuild")
    widths = [vectors.array(name).shape[1] for name in ("queries", "documents")]
    if widths[0] != widths[1]:
        raise ValueError(
            f"expected {what} of one width, got queries of {widths[0]} and documents of {widths[1]}; encode again "
            "with --rebuild"
        )
    for name in ("queries", "documents"):
        array = vectors.array(name)
        for start in range(0, len(array), BLOCK):
            broken = np.flatnonzero(~np.isfinite(array[start : start + BLOCK]).all(axis=1))
            if len(broken):
                raise ValueError(
                    f"expected finite numbers, but {what} of the {name} have NaN or infinity (first: number "
                    f"{start + broken[0]}); look at the surrogate and encode again with --rebuild"
                )


def _check_hard_negatives(groups: list[Group], judge: Filter, count: int) -> None:
    """Raises ValueError if a pair can have no `count` hard negatives; few pairs have to be looked at for that."""
    if count == 0:
        return
    random = np.random.default_rng(0)  # what is drawn is thrown away
    for group in groups:
        texts = len(np.unique(judge.document_keys[group.rows]))
        keys = judge.query_keys[group.rows]
        answers = np.searchsorted(judge.known.queries, keys, "right") - np.searchsorted(judge.known.queries, keys)
        doubtful = group.rows[answers >= texts]  # the others' positives are not all the texts of the group
        for start in range(0, len(doubtful), BLOCK):
            rows = doubtful[start : start + BLOCK]
            judge.hard_negatives(rows, count, np.empty((len(rows), 0), np.int64), group.rows, random)
