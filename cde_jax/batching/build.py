"""From pairs and surrogate vectors to a batch plan on disk.

Batches are written one by one, so memory does not grow with epochs. The same pairs, vectors, settings and seed give the
same bytes, whoever runs the tasks (`tasks.py`).
"""

import hashlib
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int, Shaped
from tqdm import tqdm

from cde_jax.batching import negatives, pack, tasks
from cde_jax.batching.plan import BatchPlan, decompressed
from cde_jax.batching.summary import summarize
from cde_jax.batching.tasks import Inputs
from cde_jax.batching.vectors import texts_fingerprint
from cde_jax.config import Batching
from cde_jax.data import shards
from cde_jax.data.files import fingerprint
from cde_jax.data.store import Ragged, Store, StoreWriter, check_finite

log = logging.getLogger(__name__)

EPOCH_STREAM = 21  # separates the random numbers of the arrangement from others of the same seed
BAR_AFTER = 3.0  # seconds of work before a progress bar shows
MOST_SCORES = 2**32  # of queries and documents in a batch: 32 GiB of float64
MUCH_MASKED = 0.25  # share of masked negatives from which on there is a warning
SCORES = 2**24  # of the batches that a task masks, about


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
    map_tasks: shards.MapTasks = map,
) -> BatchPlan:
    """Writes the plan's folder and opens it; a kill leaves the old plan or none.

    vectors, filter_vectors (None: the same): stores of this kind, of these pairs' texts; see `Inputs`.
    map_tasks: clusters of a group, mined documents of a group and masks of some batches are tasks. With another one
    than `map` they are shards in a folder beside the plan until it is whole: the same call goes on after a kill.

    Raises ValueError for vectors that are not finite or of other texts, settings that do not fit the data, and hard
    negatives that do not exist.
    """
    filter_vectors = filter_vectors or vectors
    names = [domain["name"] for domain in pairs.manifest["domains"]]
    groups, left_out = plan_groups(pairs.array("domain"), names, settings)
    inputs = _inputs(groups, pairs, vectors, filter_vectors, settings, seed)
    _check_hard_negatives(groups, inputs)
    identity = {
        "pairs": pairs.fingerprint,
        "vectors": vectors.fingerprint,
        "filter_vectors": filter_vectors.fingerprint,
        "settings": settings.plan_settings(seed),
    }
    tally, content = np.zeros((len(groups), 2, 3)), hashlib.sha256()
    mask_bytes = settings.batch_size * -(-settings.batch_size * (1 + settings.hard_negatives) // 8)
    folder = Path(directory).absolute().with_name(f".{Path(directory).name}.shards")
    with StoreWriter(directory, "plan") as writer:  # opened first: a folder that cannot be written to is an error now
        source = inputs
        if map_tasks is not map:
            source = tasks.share(
                folder, inputs, [store.directory for store in (pairs, vectors, filter_vectors)], identity
            )
        groups = cluster_groups(groups, inputs, source, map_tasks)
        for name, array in plan_arrays(groups, source, settings, seed, len(pairs.array("domain")), tally, map_tasks):
            if name == "masks":
                writer.append_ragged(name, [array], np.uint8)
                array = decompressed(array, mask_bytes)  # of masks the bits count, not their form on disk
            else:
                writer.append(name, array)
            content.update(np.ascontiguousarray(array))
        summary = {
            "fingerprint": fingerprint(identity | {"content": content.hexdigest()}),
            "surrogate": vectors.manifest.get("surrogate"),
            "filter_surrogate": filter_vectors.manifest.get("surrogate"),
        }
        writer.finish(summary | identity | summarize(groups, names, left_out, inputs, tally))
    shutil.rmtree(folder, ignore_errors=True)
    plan = BatchPlan.load(directory)
    if (masked := plan.manifest["difficulty"]["masked_share"] or 0) >= MUCH_MASKED:
        log.warning("%.1f %% of the negatives are masked: equal texts, or too small a filter_margin", 100 * masked)
    return plan


def cluster_groups(
    groups: Sequence[pack.Group], inputs: Inputs, source: tasks.Source, map_tasks: shards.MapTasks
) -> list[pack.Group]:
    """The groups with their clusters, one of weight 0 without; with method "random" a group is one cluster."""
    chosen = sorted((i for i, group in enumerate(groups) if group.weight), key=lambda i: -len(groups[i].rows))
    clustered = list(groups)
    made = map_tasks(tasks.cluster, [(source, i) for i in chosen])  # the largest first: they take the longest
    for i, part in zip(chosen, made, strict=True):
        arrays = shards.read(part)
        used, assignments = np.unique(arrays["assignments"], return_inverse=True)
        objective = float(arrays["objective"][0]) if inputs.settings.method == "clustered" else None
        group = groups[i]._replace(assignments=assignments, empty=int(arrays["clusters"][0]) - len(used))
        if inputs.settings.packing == "tsp":
            means = pack.document_centroids(inputs.vectors.documents, assignments, group.rows)
            group = group._replace(centroids=means)
        clustered[i] = group._replace(objective=objective)
    return clustered


def plan_arrays(
    groups: Sequence[pack.Group],
    source: tasks.Source,
    settings: Batching,
    seed: int,
    pairs: int,
    difficulty: Float64[np.ndarray, "groups 2 3"],
    map_tasks: shards.MapTasks,
) -> Iterator[tuple[str, Shaped[np.ndarray, "..."]]]:
    """The arrays of `BatchPlan` in pieces with their names; the sums of the batches are added to `difficulty`."""
    size, clusters, first = settings.batch_size, np.full(pairs, -1, np.int32), 0
    for group in groups:
        if group.weight:
            clusters[group.rows] = first + group.assignments
            first += len(group.cluster_sizes)
    yield "clusters", clusters
    chosen = [i for i, group in enumerate(groups) if group.weight]
    mined = dict(zip(chosen, map_tasks(tasks.mine, [(source, i) for i in chosen]), strict=True))
    total, step = settings.epochs * sum(pack.epoch_size(group, size) for group in groups), 0
    several = max(1, SCORES // (size * size * (1 + settings.hard_negatives)))  # batches of a task
    with tqdm(total=total, desc="batches and masks", delay=BAR_AFTER, leave=False) as bar:
        for epoch in range(settings.epochs):
            random = np.random.default_rng([seed, EPOCH_STREAM, epoch])
            batches = [pack.epoch_batches(group, size, random) for group in groups]  # the same clusters arranged anew
            order = random.permutation(sum(map(len, batches)))
            numbers = np.repeat(np.arange(len(groups), dtype=np.int32), [len(part) for part in batches])[order]
            rows = np.concatenate(batches)[order]
            yield "rows", rows
            yield "groups", numbers
            starts = range(0, len(rows), several)
            parts = [slice(start, start + several) for start in starts]
            todo = [
                tasks.Batches(
                    source,
                    step + part.start,
                    rows[part],
                    numbers[part],
                    {i: mined[i] for i in set(numbers[part].tolist())},
                )
                for part in parts
            ]
            for part, made in zip(parts, map_tasks(tasks.finish_batches, todo), strict=True):
                arrays = shards.read(made)
                masks = Ragged(arrays["masks"], arrays["offsets"])
                for i, number in enumerate(numbers[part].tolist()):
                    yield "hard_negatives", arrays["hard_negatives"][i : i + 1]
                    yield "masks", masks.row(i)
                    difficulty[number] += arrays["sums"][i]
                    bar.update()
            step += len(rows)


def _inputs(
    groups: Sequence[pack.Group], pairs: Store, vectors: Store, filter_vectors: Store, settings: Batching, seed: int
) -> Inputs:
    _check_vectors(pairs, vectors, "vectors")
    if filter_vectors.fingerprint != vectors.fingerprint:
        _check_vectors(pairs, filter_vectors, "the filter's vectors")
    sides = [negatives.Vectors(*map(store.array, negatives.Vectors._fields)) for store in (vectors, filter_vectors)]
    keys = negatives.TextKeys(pairs.array("query_key"), pairs.array("document_key"), pairs.ragged("negatives"))
    rows = [group.rows if group.weight else np.empty(0, np.int64) for group in groups]
    return Inputs(*sides, keys, settings, seed, rows)


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
