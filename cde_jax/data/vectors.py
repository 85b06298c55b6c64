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


def check_finite(vectors: Float[np.ndarray, "n D"], name: str, numbers: Int[np.ndarray, " n"] | None = None) -> None:
    """Raises ValueError if rows of `vectors`, memory-mapped or not, have NaN or infinity: how many, and the first one.

    name: what the rows are, e.g. "documents". numbers: what the user knows each row by; None: its index.
    """
    broken = [
        start + np.flatnonzero(~np.isfinite(vectors[start : start + _BLOCK]).all(axis=1))
        for start in range(0, len(vectors), _BLOCK)
    ]
    rows = np.concatenate([np.zeros(0, np.int64), *broken])
    if len(rows):
        first = rows[0] if numbers is None else numbers[rows[0]]
        raise ValueError(
            f"expected finite vectors, but {len(rows)} of the {len(vectors)} {name} have NaN or infinity (first: row "
            f"{first}); look at the model and at the text of that row, then encode again"
        )
