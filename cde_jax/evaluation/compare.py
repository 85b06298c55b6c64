"""Paired comparison of two systems on the same queries, with bootstrap confidence intervals."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from cde_jax.evaluation.metrics import Scores

BOOTSTRAP_STREAM = 64  # random stream id
SAMPLES = 2000


class Comparison(NamedTuple):
    """How much better a system is than a baseline."""

    difference: float  # mean over sets of the mean paired difference of queries, with a 95 % confidence interval
    low: float
    high: float
    wins: int  # sets on which the system is better
    sets: int


def compare(
    system: Sequence[Scores], baseline: Sequence[Scores], kind: str, baseline_kind: str | None = None
) -> Comparison:
    """Compare a kind of context of one system with one of another; scores of one run per seed, in the same order.

    Raises ValueError where seeds, cutoff, sets or queries differ, and for a kind that is not there.
    """
    if not system or len(system) != len(baseline):
        raise ValueError(f"expected scores of as many seeds, one or more, got {len(system)} and {len(baseline)}")
    if len(cutoffs := {scores.k for scores in (*system, *baseline)}) > 1:
        raise ValueError(f"expected scores of one cutoff, got NDCG at {sorted(cutoffs)}")
    names, runs = list(system[0].per_query), list(zip(system, baseline, strict=True))
    differences = [np.stack([_paired(a, b, name, kind, baseline_kind or kind) for a, b in runs]) for name in names]
    wins = sum(bool(rows.mean() > 0) for rows in differences)
    return Comparison(*bootstrap(differences), wins, len(names))


def bootstrap(differences: Sequence[Float[np.ndarray, "s _"]]) -> tuple[float, float, float]:
    """Mean over sets of each set's mean, and its 95 % percentile interval.

    differences: of each set, by seed and query. Queries are resampled within sets, seeds for all sets together.
    """
    random = np.random.default_rng([BOOTSTRAP_STREAM])
    seeds = len(differences[0])
    seed_weights = random.multinomial(seeds, np.full(seeds, 1 / seeds), SAMPLES) / seeds  # [SAMPLES, s]
    total = np.zeros(SAMPLES)
    for rows in differences:
        count = rows.shape[1]
        query_weights = random.multinomial(count, np.full(count, 1 / count), SAMPLES) / count  # [SAMPLES, q]
        total += np.einsum("ms,ms->m", seed_weights, query_weights @ rows.T)
    low, high = np.percentile(total / len(differences), [2.5, 97.5])
    return float(np.mean([rows.mean() for rows in differences])), float(low), float(high)


def _paired(a: Scores, b: Scores, name: str, kind: str, baseline_kind: str) -> Float[np.ndarray, " q"]:
    """Differences of one set's queries."""
    first, second = a.per_query.get(name, {}).get(kind), b.per_query.get(name, {}).get(baseline_kind)
    if not first or not second or first.keys() != second.keys() or a.per_query.keys() != b.per_query.keys():
        raise ValueError(
            f"expected both systems to have the same sets and queries and the kinds {kind!r} and {baseline_kind!r}, "
            f"they differ on the set {name!r}: evaluate both on the same sets"
        )
    return np.array([first[query] - second[query] for query in first])
