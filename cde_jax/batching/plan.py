"""The static batch plan: every batch of every epoch, decided before training and written down (paper, section 3.1).

A plan is a folder: `rows`, `hard_negatives`, `keep_bits` and `groups` as arrays, and a `manifest.json` that a person
can read: which pairs, surrogate and settings it belongs to, what was merged or left out, and how hard its batches are.
The same pairs, vectors, settings and seed give the same bytes.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8

from cde_jax.batching.cluster import cluster_domains
from cde_jax.batching.negatives import NO_QUERY, choose_hard_negatives, cosine, mask_scores, unit_rows
from cde_jax.batching.pack import PACKINGS, Group, arrange, document_centroids, domain_groups, order_clusters
from cde_jax.data.store import Store, StoreWriter, fingerprint

METHODS = ("random", "clustered")
# Keep the random numbers of one seed apart: of the arrangement, the hard negatives and the statistics.
EPOCH_STREAM, NEGATIVES_STREAM, STATISTICS_STREAM = 21, 22, 23
RANDOM_PAIRS = 4096  # drawn to estimate the similarity of a query and any document
STORE_KEYS = ("kind", "format", "arrays", "manifest_sha256")  # the store's own part of a manifest


@dataclass(frozen=True)
class BatchPlan:
    """S batches of B pairs with K hard negatives each, so of N = B(1+K) documents.

    The documents of batch s are those of the pairs `rows[s]`, then `hard_negatives[s]` query by query.
    """

    rows: Int64[np.ndarray, "S B"]  # pairs
    hard_negatives: Int64[np.ndarray, "S B K"]  # documents
    keep_bits: UInt8[np.ndarray, "S B bytes"]  # `keep`, eight columns to a byte
    groups: Int32[np.ndarray, " S"]  # which of manifest["groups"] the batch was made of
    manifest: dict[str, Any]

    def __len__(self) -> int:
        """S, the number of batches over all epochs."""
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """Digest of everything the plan holds and belongs to."""
        return self.manifest["fingerprint"]

    def keep(self, step: SupportsIndex) -> Bool[np.ndarray, "B N"]:
        """False where a document of batch `step` (0…S−1) must not count as a negative; the positive always counts."""
        if not 0 <= step < len(self):
            raise ValueError(f"expected a plan batch in 0…{len(self) - 1}, got {step}")
        _, batch, hard = self.hard_negatives.shape
        return np.unpackbits(self.keep_bits[step], axis=-1, count=batch * (1 + hard)).view(bool)

    def documents(self, step: SupportsIndex) -> Int64[np.ndarray, " N"]:
        """The documents of batch `step` in the order of the columns of `keep`."""
        return np.concatenate([self.rows[step], self.hard_negatives[step].ravel()])

    def verify(self, pairs_fingerprint: str, settings: dict[str, Any], vectors_fingerprint: str | None = None) -> None:
        """Raises ValueError if the plan belongs to other pairs, settings (those of `build_plan`) or vectors."""
        theirs = {"pairs": pairs_fingerprint, "settings": fingerprint(settings)}
        ours = {"pairs": self.manifest["pairs"], "settings": fingerprint(self.manifest["settings"])}
        if vectors_fingerprint is not None:
            theirs["vectors"], ours["vectors"] = vectors_fingerprint, self.manifest["vectors"]
        for part, expected in theirs.items():
            if ours[part] == expected:
                continue
            detail = _differences(self.manifest["settings"], settings) if part == "settings" else ""
            raise ValueError(
                f"the batch plan belongs to other {part}: expected fingerprint {expected}, the plan has {ours[part]}"
                f"{detail}; give it the {part} it was built from, or build it again with --rebuild"
            )

    def save(self, directory: str | Path) -> None:
        """Writes the plan's folder; a kill leaves the old plan or the new one."""
        with StoreWriter(directory, "plan") as writer:
            for name in ("rows", "hard_negatives", "keep_bits", "groups"):
                writer.append(name, getattr(self, name))
            writer.finish(self.manifest)

    @classmethod
    def load(cls, directory: str | Path) -> "BatchPlan":
        """Opens a plan, memory-mapped. A missing, truncated or altered file is a ValueError that names it."""
        store = Store.open(directory, kind="plan")
        arrays = {name: store.array(name) for name in ("rows", "hard_negatives", "keep_bits", "groups")}
        return cls(**arrays, manifest={k: v for k, v in store.manifest.items() if k not in STORE_KEYS})


def build_plan(
    pairs: Store,
    vectors: Store,
    *,
    batch_size: int,
    method: str,
    cluster_size: int,
    iterations: int,
    tries: int,
    packing: str,
    epochs: int,
    hard_negatives: int,
    margin: float | None,
    seed: int,
) -> BatchPlan:
    """Clusters the pairs within their domains, packs the clusters into batches and decides what is a negative.

    pairs, vectors: stores of those kinds, `vectors` of these pairs. method: "clustered", or "random" (each domain is
    one cluster). packing: the order of the clusters, "random" or "tsp". margin: ε of equation 4, or None to mask equal
    texts only. Every row comes at most once an epoch; `pack` states which are left out.

    Raises ValueError for settings outside their range, vectors of other pairs, or data too small for one batch.
    """
    settings = {
        "batch_size": batch_size,
        "method": method,
        "cluster_size": cluster_size,
        "iterations": iterations,
        "tries": tries,
        "packing": packing,
        "epochs": epochs,
        "hard_negatives": hard_negatives,
        "margin": margin,
        "seed": seed,
    }
    _check(pairs, vectors, settings)
    names = [domain["name"] for domain in pairs.manifest["domains"]]
    groups, left_out = domain_groups(pairs.array("domain"), names, batch_size)
    assignments = _assign(groups, vectors, settings)
    rows, group_of = _arrange_epochs(groups, assignments, vectors, settings)
    chosen, keep_bits, difficulty = _decide_negatives(pairs, vectors, rows, group_of, groups, settings)
    content = hashlib.sha256()
    for array in (rows, chosen, keep_bits, group_of):
        content.update(np.ascontiguousarray(array))
    identity = {"pairs": pairs.fingerprint, "vectors": vectors.fingerprint, "settings": settings}
    manifest = {
        "fingerprint": fingerprint(identity | {"content": content.hexdigest()}),
        **identity,
        "surrogate": vectors.manifest.get("surrogate"),
        "batches": len(rows),
        "batches_per_epoch": len(rows) // epochs,
        "groups": _counts(groups, assignments, names, batch_size),
        "dropped": {
            "domains": [names[i] for i in left_out.domains] if left_out else [],
            "rows": len(left_out.rows) if left_out else 0,
        },
        "cluster_sizes": _histogram(assignments),
        "difficulty": difficulty,
    }
    return BatchPlan(rows, chosen, keep_bits, group_of, manifest)


def _check(pairs: Store, vectors: Store, settings: dict[str, Any]) -> None:
    for name in ("batch_size", "cluster_size", "iterations", "tries", "epochs", "hard_negatives", "seed"):
        smallest = 0 if name in ("hard_negatives", "seed") else 1
        if settings[name] < smallest:
            raise ValueError(f"expected {name} ≥ {smallest}, got {settings[name]}; change it in the config")
    for name, known in (("method", METHODS), ("packing", PACKINGS)):
        if settings[name] not in known:
            raise ValueError(f"expected {name} to be one of {', '.join(known)}; got {settings[name]!r}")
    if settings["batch_size"] * (1 + settings["hard_negatives"]) < 2:
        raise ValueError("expected at least two documents in a batch, got batch_size=1 without hard negatives")
    margin = settings["margin"]
    if margin is not None and not (math.isfinite(margin) and -2 <= margin <= 2):
        raise ValueError(f"expected a margin in −2…2 (a difference of cosines) or None, got {margin}")
    if vectors.manifest.get("pairs") != pairs.fingerprint:
        raise ValueError(
            f"the vectors belong to other pairs: expected fingerprint {pairs.fingerprint}, they have "
            f"{vectors.manifest.get('pairs')}; encode these pairs again with --rebuild"
        )
    for array, keys in (("queries", "query_key"), ("documents", "document_key")):
        expected, got = len(pairs.array(keys)), len(vectors.array(array))
        if got != expected:
            raise ValueError(f"expected vectors of {expected} {array}, got {got}; encode again with --rebuild")
    widths = [vectors.array(array).shape[1] for array in ("queries", "documents")]
    if widths[0] != widths[1]:
        raise ValueError(
            f"expected vectors of one width, got queries of {widths[0]} and documents of {widths[1]}; encode again "
            "with --rebuild"
        )


def _assign(groups: list[Group], vectors: Store, settings: dict[str, Any]) -> list[Int64[np.ndarray, "_"]]:
    """The cluster of each row of each group, numbered 0…k−1 without the empty ones."""
    if settings["method"] == "random":
        return [np.zeros(len(group.rows), np.int64) for group in groups]
    clusters = cluster_domains(
        vectors.array("queries"),
        vectors.array("documents"),
        [group.rows for group in groups],
        **{name: settings[name] for name in ("cluster_size", "iterations", "tries", "seed")},
    )
    return [np.unique(found.assignments, return_inverse=True)[1].astype(np.int64) for found in clusters]


def _arrange_epochs(
    groups: list[Group], assignments: list[np.ndarray], vectors: Store, settings: dict[str, Any]
) -> tuple[Int64[np.ndarray, "S B"], Int32[np.ndarray, " S"]]:
    """The rows of every batch and the number of its group: a new arrangement of the same clusters each epoch."""
    centroids = [None] * len(groups)
    if settings["packing"] == "tsp":
        documents = vectors.array("documents")
        centroids = [document_centroids(documents[g.rows], a) for g, a in zip(groups, assignments, strict=True)]
    rows, group_of = [], []
    for epoch in range(settings["epochs"]):
        random = np.random.default_rng([settings["seed"], EPOCH_STREAM, epoch])
        batches = []
        for group, assigned, points in zip(groups, assignments, centroids, strict=True):
            order = order_clusters(points, int(assigned.max()) + 1, random)
            batches.append(arrange(group.rows, assigned, order, settings["batch_size"], random))
        numbers = np.repeat(np.arange(len(groups), dtype=np.int32), [len(b) for b in batches])
        shuffled = random.permutation(len(numbers))
        rows.append(np.concatenate(batches)[shuffled])
        group_of.append(numbers[shuffled])
    return np.concatenate(rows), np.concatenate(group_of)


def _decide_negatives(
    pairs: Store,
    vectors: Store,
    rows: Int64[np.ndarray, "S B"],
    group_of: Int32[np.ndarray, " S"],
    groups: list[Group],
    settings: dict[str, Any],
) -> tuple[Int64[np.ndarray, "S B K"], UInt8[np.ndarray, "S B bytes"], dict[str, Any]]:
    """Hard negatives and packed masks of every batch, and how hard the batches are by the surrogate's cosine."""
    query_keys, document_keys = pairs.array("query_key"), pairs.array("document_key")
    # The query of which a document is the positive; the extra negatives (n and above) have none.
    own_query_keys = np.full(len(document_keys), NO_QUERY)
    own_query_keys[: len(query_keys)] = query_keys
    queries, documents, listed = vectors.array("queries"), vectors.array("documents"), pairs.ragged("negatives")
    (steps, batch), hard, margin = rows.shape, settings["hard_negatives"], settings["margin"]
    chosen = np.empty((steps, batch, hard), np.int64)
    keep_bits = np.empty((steps, batch, -(-batch * (1 + hard) // 8)), np.uint8)
    negative, positive = 0.0, 0.0  # sums of similarities
    negatives, masked = 0, 0  # how many
    for step in range(steps):
        random = np.random.default_rng([settings["seed"], NEGATIVES_STREAM, step])
        pool = groups[group_of[step]].rows
        chosen[step], given = choose_hard_negatives(
            rows[step], listed, hard, pool=pool, query_keys=query_keys, document_keys=document_keys, random=random
        )
        columns = np.concatenate([rows[step], chosen[step].ravel()])
        scores = cosine(queries[rows[step]], documents[columns])
        keys = query_keys[rows[step]], document_keys[columns], own_query_keys[columns]
        keep = mask_scores(scores, *keys, margin=margin, exempt=given)
        keep_bits[step] = np.packbits(keep, axis=-1)
        in_batch = keep[:, :batch] & ~np.eye(batch, dtype=bool)
        negative += float(scores[:, :batch][in_batch].sum(dtype=np.float64))
        negatives += int(in_batch.sum())
        positive += float(np.diagonal(scores).sum(dtype=np.float64))
        masked += int((~keep).sum())
    difficulty = {
        "in_batch_negative_similarity": _ratio(negative, negatives),
        "positive_similarity": _ratio(positive, rows.size),
        "random_pair_similarity": _random_similarity(queries, documents[: len(queries)], settings["seed"]),
        "masked_share": _ratio(masked, rows.size * (batch * (1 + hard) - 1)),
    }
    return chosen, keep_bits, difficulty


def _random_similarity(queries: np.ndarray, documents: np.ndarray, seed: int) -> float | None:
    """Mean cosine of a query with another pair's document, over all domains: what a random batch would show."""
    random = np.random.default_rng([seed, STATISTICS_STREAM])
    q, d = random.integers(len(queries), size=(2, RANDOM_PAIRS))
    q, d = q[q != d], d[q != d]
    scores = (unit_rows(queries[q]) * unit_rows(documents[d])).sum(axis=1)
    return _ratio(float(scores.sum()), len(scores))


def _ratio(total: float | int, count: int) -> float | None:
    return round(total / count, 6) if count else None


def _counts(
    groups: list[Group], assignments: list[np.ndarray], names: list[str], batch_size: int
) -> list[dict[str, Any]]:
    """Per epoch, for a reader: what each group is made of and how many of its rows are left out."""
    return [
        {
            "name": group.name,
            "domains": [names[i] for i in group.domains],
            "rows": len(group.rows),
            "clusters": int(assigned.max()) + 1,
            "batches": len(group.rows) // batch_size,
            "left_out": len(group.rows) % batch_size,
        }
        for group, assigned in zip(groups, assignments, strict=True)
    ]


def _histogram(assignments: list[np.ndarray]) -> dict[str, int]:
    """Number of clusters by size, in powers of two: "16-31" → 4."""
    sizes = np.concatenate([np.bincount(assigned) for assigned in assignments])
    powers = np.bincount(np.log2(sizes).astype(np.int64))
    return {f"{2**p}-{2 ** (p + 1) - 1}": int(count) for p, count in enumerate(powers) if count}


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    missing = object()
    keys = [key for key in {**ours, **theirs} if ours.get(key, missing) != theirs.get(key, missing)]
    return " (" + ", ".join(f"{key}: expected {theirs.get(key)!r}, got {ours.get(key)!r}" for key in keys) + ")"
