"""Input validation for arrays, numbers and files that users pass."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from safetensors import SafetensorError, safe_open

from cde_jax.data.files import given_path
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


def read_tensors(
    path: str | Path, expected: str, advice: str = "save it again"
) -> tuple[dict[str, Shaped[np.ndarray, "..."]], dict[str, str]]:
    """Tensors and metadata of a safetensors file of the format `expected`; a ValueError for any other file."""
    path = given_path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of the format {expected!r}, there is none")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != expected:
                got = metadata.get("format")
                raise ValueError(f"{path}: expected the format {expected!r}, got {got!r}; {advice}")
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not safetensors, truncated or altered ({error}); {advice}") from None
