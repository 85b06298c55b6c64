"""How hard the batches of a plan are, by the surrogate's cosine, and how much of them is masked."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from cde_jax.batching.negatives import unit_rows

STATISTICS_STREAM = 23  # keeps this module's random numbers apart from those of the other users of the same seed
RANDOM_PAIRS = 4096  # drawn to estimate the similarity of a query and any document


class Difficulty:
    """Sums over the batches of each of G groups, from which the manifest's means are taken."""

    def __init__(self, groups: int):
        self._sums = np.zeros((groups, 2))  # of similarities: in-batch negatives, positives
        self._counts = np.zeros((groups, 2), np.int64)  # how many those are
        self._masked = np.zeros((groups, 2), np.int64)  # columns masked, columns that could be (all but positives)

    def add(self, group: int, scores: Float[np.ndarray, "B N"], keep: Bool[np.ndarray, "B N"]) -> None:
        """One batch of group number `group`: its cosines and its mask."""
        batch, columns = scores.shape
        negatives = keep[:, :batch].copy()
        np.fill_diagonal(negatives, False)
        self._sums[group] += scores[:, :batch].sum(where=negatives), np.trace(scores)
        self._counts[group] += np.count_nonzero(negatives), batch
        self._masked[group] += keep.size - np.count_nonzero(keep), batch * (columns - 1)

    def of_groups(self) -> list[dict[str, Any]]:
        """For each group "difficulty", mean cosine of a query with its in-batch negatives and its positive, and the
        "masked_share" of its negatives; None where there are none."""
        return [
            {"difficulty": _similarities(sums, counts), "masked_share": _mean(*masked.tolist())}
            for sums, counts, masked in zip(self._sums, self._counts, self._masked, strict=True)
        ]

    def overall(self) -> dict[str, float | None]:
        """The same over all groups, in one."""
        masked = _mean(*self._masked.sum(axis=0).tolist())
        return _similarities(self._sums.sum(axis=0), self._counts.sum(axis=0)) | {"masked_share": masked}


def _similarities(sums: Float[np.ndarray, "2"], counts: Int[np.ndarray, "2"]) -> dict[str, float | None]:
    names = ("in_batch_negative_similarity", "positive_similarity")
    return {name: _mean(*of) for name, *of in zip(names, sums.tolist(), counts.tolist(), strict=True)}


def random_similarity(
    queries: Float[np.ndarray, "n D"], documents: Float[np.ndarray, "m D"], seed: int
) -> float | None:
    """Mean cosine of a query with another pair's document, over all domains: what a random batch would show."""
    random = np.random.default_rng([seed, STATISTICS_STREAM])
    q, d = random.integers(len(queries), size=(2, RANDOM_PAIRS))
    q, d = q[q != d], d[q != d]
    scores = (unit_rows(queries[q]) * unit_rows(documents[d])).sum(axis=1)
    return _mean(float(scores.sum()), len(scores))


def _mean(total: float | int, count: int) -> float | None:
    return round(total / count, 6) if count else None


def size_histogram(assignments: Sequence[Int[np.ndarray, "_"]]) -> dict[str, int]:
    """Number of clusters by size, in powers of two: "16-31" → 4. assignments: of each group's rows, 0…k−1."""
    sizes = np.concatenate([np.bincount(assigned) for assigned in assignments])
    powers = np.bincount(np.log2(sizes).astype(np.int64))
    return {f"{2**p}-{2 ** (p + 1) - 1}": int(count) for p, count in enumerate(powers) if count}
