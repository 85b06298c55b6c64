"""How hard the batches of a plan are and what it leaves out, for its manifest."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from cde_jax.batching import negatives, pack
from cde_jax.batching.tasks import Inputs

STATISTICS_STREAM = 23  # separates this module's random numbers from others of the same seed
RANDOM_PAIRS = 4096  # drawn to estimate the similarity of a query and any document


def summarize(
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


def _means(sums: Float64[np.ndarray, "2 3"]) -> dict[str, float | None]:
    """Mean cosine of a query with its in-batch negatives and with its positive; masked share of all negatives."""
    names = ("in_batch_negative_similarity", "positive_similarity", "masked_share")
    means = (round(total / number, 6) if number else None for total, number in sums.T.tolist())
    return dict(zip(names, means, strict=True))


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
