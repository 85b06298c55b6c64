"""Rows of vectors: normalisation, and the check that they are finite. For every package."""

import numpy as np
from jaxtyping import Float, Int

_BLOCK = 8192  # rows checked at a time: a memory map is never in memory as a whole


def unit_rows(rows: Float[np.ndarray, "n D"], norms: Float[np.ndarray, " n"] | None = None) -> Float[np.ndarray, "n D"]:
    """Each row divided by its Euclidean norm, in its own dtype; a row of zeros stays zero.

    norms: of the rows, where the caller has them already.
    """
    norms = np.linalg.norm(rows, axis=1) if norms is None else norms
    return rows / np.where(norms > 0, norms, 1)[:, None]


def check_finite(
    name: str,
    vectors: Float[np.ndarray, "n D"],
    numbers: Int[np.ndarray, " n"] | range | None = None,
    advice: str = "look at the text or the model that this row came from",
) -> None:
    """Raises ValueError if rows of `vectors`, memory-mapped or not, have NaN or infinity: how many, and the first one.

    name: what the rows are, e.g. "documents". numbers: what the user knows each row by; None: its index.
    """
    bad = [
        start + np.flatnonzero(~np.isfinite(vectors[start : start + _BLOCK]).all(axis=1))
        for start in range(0, len(vectors), _BLOCK)
    ]
    rows = np.concatenate([np.zeros(0, np.int64), *bad])
    if len(rows):
        first = rows[0] if numbers is None else numbers[rows[0]]
        raise ValueError(
            f"{name}: expected finite vectors, got NaN or infinity in {len(rows)} of {len(vectors)} rows (first: row "
            f"{first}); {advice}"
        )
