"""Input validation for arrays and numbers that users pass."""

from typing import Any

import numpy as np
from jaxtyping import Float

from cde_jax.data.store import check_finite


def check_vectors(
    name: str, vectors: Any, width: int | None = None, rows: slice = slice(None)
) -> Float[np.ndarray, "n D"]:
    """The `rows` of vectors [n, D] of any float dtype.

    Raises ValueError for another dtype or shape, for a width other than `width`, and for NaN or infinity in `rows`.
    """
    try:
        array = vectors if isinstance(vectors, np.ndarray) else np.asarray(vectors)
    except ValueError:  # rows of different lengths
        array = np.array(None)
    if array.ndim != 2 or not array.dtype.name.startswith(("float", "bfloat")):
        raise ValueError(
            f"{name}: expected a float array of shape [n, width], got {array.dtype} {list(array.shape)}; give one row "
            "a text, for example np.stack(vectors).astype(np.float32)"
        )
    if width is not None and array.shape[1] != width:
        raise ValueError(f"{name}: expected vectors of width {width}, got {array.shape[1]}; encode all with one model")
    check_finite(name, array[rows], range(len(array))[rows])
    return array[rows]


def check_integer(name: str, value: Any, low: int) -> int:
    """`value` as an int; a ValueError for another type or one below `low`."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer) or value < low:
        raise ValueError(f"{name}: expected an integer of {low} or more, got {value!r}")
    return int(value)
