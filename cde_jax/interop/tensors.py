"""Reading safetensors files tensor by tensor, without mapping them into memory.

The safetensors package maps the file, and the mapped pages then count beside the parameters; here each tensor is read
into the array that keeps it, so that loading needs little more than the model itself.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from cde_jax.data.files import read_json

_DTYPES = {
    "F32": np.float32,
    "F64": np.float64,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class Tensor(NamedTuple):
    """Where one tensor lies."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """The tensor as numpy array in its stored dtype."""
        array = np.fromfile(self.path, self.dtype, count=math.prod(self.shape), offset=self.offset)
        return array.reshape(self.shape)


def tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a model directory by name: `model.safetensors`, or the shards that its index names.

    A directory that has only a pickle is refused, with the way to convert it.
    """
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").is_file():
        return _header(directory / "model.safetensors")
    if index.is_file():
        files = sorted(set(read_json(index)["weight_map"].values()))
        return {name: tensor for file in files for name, tensor in _header(directory / file).items()}
    refuse_pickles(directory)
    raise ValueError(
        f"{directory}: expected model.safetensors, found {', '.join(sorted(os.listdir(directory))) or 'nothing'}"
    )


def refuse_pickles(path: Path) -> None:
    """A ValueError for a pickle, or a directory with one: loading it would run whatever code it holds."""
    files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    pickles = [file for file in files if file.suffix in PICKLES and file.name != "training_args.bin"]
    if pickles:
        raise ValueError(
            f"{pickles[0]} is a pickle, which can run code when it is loaded, and cde_jax reads safetensors only; "
            f"convert it once, where you trust it: `weights = torch.load('{pickles[0].name}', weights_only=True); "
            f"safetensors.torch.save_file({{k: v.clone().contiguous() for k, v in weights.items()}}, "
            f"'model.safetensors')`"
        )


def _header(path: Path) -> dict[str, Tensor]:
    def broken(what: str) -> ValueError:
        return ValueError(
            f"{path}: {what}; the file was truncated or altered: copy or download it again (the format is "
            f"safetensors: an 8-byte length, a JSON header, the tensors)"
        )

    if not path.is_file():
        raise ValueError(f"{path}: expected a safetensors file, there is none")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise broken(f"its header needs {length} bytes, the file has {size}")
        try:
            entries: Mapping = json.loads(file.read(length))
        except ValueError:
            raise broken("its header is not JSON") from None
    entries = {name: entry for name, entry in entries.items() if name != "__metadata__"}
    end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if end != size:
        raise broken(f"expected {end} bytes, got {size}")
    for name, entry in entries.items():
        first, last = entry["data_offsets"]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype and last - first != math.prod(entry["shape"]) * np.dtype(dtype).itemsize:
            raise broken(f"{name} {entry['shape']} cannot be {last - first} bytes long")
    unknown = sorted({entry["dtype"] for entry in entries.values()} - _DTYPES.keys())
    if unknown:
        raise ValueError(
            f"{path}: tensors of type {', '.join(unknown)}; cde_jax reads {', '.join(_DTYPES)}: "
            f"save the weights as float32 or bfloat16"
        )
    return {
        name: Tensor(
            path, 8 + length + entry["data_offsets"][0], np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
        )
        for name, entry in entries.items()
    }
