"""What building a plan is divided into: clusters of a group, mined documents of a group, masks of some batches.

Tasks run in this process, with the plan's inputs in memory, or in others, which open them from a folder and leave their
results there (`data/shards.py`).
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

from cde_jax.batching import negatives
from cde_jax.batching.cluster import Clusters, cluster_domain
from cde_jax.batching.plan import compressed
from cde_jax.config import Batching
from cde_jax.data import shards
from cde_jax.data.files import fingerprint
from cde_jax.data.store import Store, StoreWriter

NEGATIVES_STREAM = 22  # separates the random numbers of hard negatives from others of the same seed


class Inputs(NamedTuple):
    """What a plan is made from."""

    vectors: negatives.Vectors  # arrange the pairs: clusters, tours
    filter_vectors: negatives.Vectors  # find false and hard negatives, and measure difficulty
    keys: negatives.TextKeys
    settings: Batching
    seed: int
    groups: Sequence[Int64[np.ndarray, "_"]]  # the pairs of each group, none of a group of weight 0


class Folder(NamedTuple):
    """A folder with the inputs as `share` wrote them, and with the shards of all tasks."""

    path: Path
    digest: str  # of what the plan is made from


Source = Inputs | Folder


class Batches(NamedTuple):
    """Some consecutive batches: their first step, pairs, groups, and what `mine` gave for these groups."""

    source: Source
    step: int
    rows: Int64[np.ndarray, "batches B"]
    numbers: Int32[np.ndarray, " batches"]
    mined: Mapping[int, Any]


def share(path: Path, inputs: Inputs, stores: Sequence[Path], identity: dict[str, Any]) -> Folder:
    """Write for other processes what they do not find in the stores of pairs, vectors and filter vectors."""
    digest, keys = fingerprint({"plan": identity}), inputs.keys
    if not shards.is_whole(path / "inputs", "shard", digest):
        with StoreWriter(path / "inputs", "shard") as writer:
            writer.append_ragged("groups", inputs.groups, np.int64)
            for name in ("queries", "documents", "positives"):
                writer.append(name, getattr(keys, name))
            plan = {"stores": [str(Path(store).absolute()) for store in stores], "settings": identity["settings"]}
            writer.finish({"fingerprint": digest} | plan)
    return Folder(path, digest)


@functools.lru_cache(maxsize=1)
def _open(folder: Folder) -> Inputs:
    shared = Store.open(folder.path / "inputs", kind="shard", verify=False)
    pairs, *vectors = (Store.open(store, verify=False) for store in shared.manifest["stores"])
    sides = [negatives.Vectors(*map(store.array, negatives.Vectors._fields)) for store in vectors]
    numbered = (shared.array(name) for name in ("queries", "documents", "positives"))
    keys = negatives.TextKeys.numbered(*numbered, pairs.ragged("negatives"))
    settings = dict(shared.manifest["settings"])
    seed, weights = settings.pop("seed"), tuple(settings.pop("domain_weights"))
    groups = shared.ragged("groups")
    rows = [groups.row(i) for i in range(groups.count())]
    return Inputs(*sides, keys, Batching(**settings, domain_weights=weights), seed, rows)


def _made(source: Source, name: str, compute: Any, *arguments: Any) -> shards.Arrays | Path:
    if isinstance(source, Inputs):
        return compute(source, *arguments)
    digest = fingerprint({"plan": source.digest, "part": name})
    return shards.make(source.path / name, digest, lambda: compute(_open(source), *arguments))


def cluster(task: tuple[Source, int]) -> shards.Arrays | Path:
    """The clusters of one group: assignments int64 [rows], the number of clusters [1], the objective float64 [1]."""
    return _made(task[0], f"clusters-{task[1]}", _cluster, task[1])


def _cluster(inputs: Inputs, group: int) -> shards.Arrays:
    rows = inputs.groups[group]
    clusters = Clusters(np.zeros(len(rows), np.int64), np.zeros((1, 0), np.float32), np.nan)
    if inputs.settings.method == "clustered":
        number = sum(len(each) > 0 for each in inputs.groups[:group])
        clusters = cluster_domain(inputs.vectors, rows, number, inputs.settings, inputs.seed)
    arrays = {"clusters": np.array([len(clusters.centroids)]), "objective": np.array([clusters.objective], np.float64)}
    return arrays | {"assignments": clusters.assignments}


def mine(task: tuple[Source, int]) -> shards.Arrays | Path:
    """The mined documents of one group: "mined", int32 [rows, window] (`negatives.mine_hard_negatives`)."""
    return _made(task[0], f"mined-{task[1]}", _mine, task[1])


def _mine(inputs: Inputs, group: int) -> shards.Arrays:
    rows = inputs.groups[group]
    mined = negatives.mine_hard_negatives(inputs.filter_vectors, rows, inputs.keys, inputs.settings, inputs.seed)
    return {"mined": mined}


def finish_batches(task: Batches) -> shards.Arrays | Path:
    """Hard negatives int64 [batches, B, K], masks as `BatchPlan` has them, and the sums of `_finish_batch`."""
    return _made(task.source, f"batches-{task.step}", _finish_batches, task)


def _finish_batches(inputs: Inputs, task: Batches) -> shards.Arrays:
    mined = {number: shards.read(part)["mined"] for number, part in task.mined.items()}
    hard, masks, sums = [], [], []
    # More threads gain little on small matrices, and cost much on a busy machine.
    with negatives.threads().limit(limits=1):
        for step, (batch, number) in enumerate(zip(task.rows, task.numbers.tolist(), strict=True), task.step):
            pool, random = inputs.groups[number], np.random.default_rng([inputs.seed, NEGATIVES_STREAM, step])
            candidates = mined[number][np.searchsorted(pool, batch)]  # [B, window]
            chosen, keep, each = _finish_batch(batch, candidates, pool, inputs, random)
            hard.append(chosen)
            masks.append(compressed(keep))
            sums.append(each)
    offsets = np.cumsum([0, *map(len, masks)], dtype=np.int64)
    arrays = {"hard_negatives": np.stack(hard), "sums": np.stack(sums)}
    return arrays | {"masks": np.concatenate(masks), "offsets": offsets}


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
