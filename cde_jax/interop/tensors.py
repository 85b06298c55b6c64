"""The tensors of a model directory, by the safetensors library.

Directories are untrusted: a file that they name outside of themselves is not read.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 - so that NumPy knows bfloat16
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from cde_jax.data.files import read_json

DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class Tensor(NamedTuple):
    """Where one tensor is stored."""

    path: Path
    name: str
    shape: tuple[int, ...]

    def load(self) -> Shaped[np.ndarray, "..."]:
        """The tensor in its stored dtype. The file is mapped for this tensor only, so mapped pages do not add up."""
        with safe_open(self.path, framework="numpy") as file:
            return file.get_tensor(self.name)


def tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a model directory by name: `model.safetensors`, or the shards that its index names.

    A directory that has only a pickle is refused, with the way to convert it.
    """
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").is_file():
        return _tensors_of(directory / "model.safetensors")
    if not index.is_file():
        refuse_pickles(directory)
        files = ", ".join(sorted(os.listdir(directory))) if directory.is_dir() else ""
        raise ValueError(f"{directory}: expected model.safetensors, got {files or 'nothing'}")
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: expected an object weight_map (tensor → file), got {type(weight_map).__name__}")
    weight_map = {name: path_inside(directory, file, index) for name, file in weight_map.items()}
    shards = {path: _tensors_of(path) for path in sorted(set(weight_map.values()))}
    if missing := [f"{name} in {path}" for name, path in weight_map.items() if name not in shards[path]]:
        raise ValueError(f"{index}: {len(missing)} tensors are not in the files it names, first {missing[0]}")
    return {name: shards[path][name] for name, path in weight_map.items()}


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


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; anything else is a ValueError that names the file."""
    try:
        content = read_json(path)
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply to be read as JSON") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def path_inside(directory: Path, name: Any, source: Path) -> Path:
    """`directory / name`; a ValueError if `source` names a path outside the directory, also by a symbolic link.

    The files of a snapshot in the hub's cache are links into its folder `blobs`.
    """
    roots = [directory.resolve()]
    if directory.resolve().parent.name == "snapshots":
        roots.append(directory.resolve().parents[1] / "blobs")
    if not isinstance(name, str) or "\0" in name:
        raise ValueError(f"{source}: expected the name of a file or folder, got {name!r}")
    path = (directory / name).resolve()
    named_outside = Path(name).is_absolute() or ".." in Path(name).parts
    if named_outside or not any(path.is_relative_to(root) for root in roots):
        raise ValueError(f"{source}: names {name!r}, which is outside the directory {directory}; it was not read")
    return directory / name


def _tensors_of(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            entries = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        if not path.is_file():
            raise ValueError(f"{path}: expected a safetensors file, there is none") from None
        raise ValueError(
            f"{path}: not readable as safetensors ({error}): truncated or altered; copy or download it again"
        ) from None
    if unknown := sorted({dtype for _, dtype in entries.values()} - set(DTYPES)):
        raise ValueError(
            f"{path}: tensors of type {', '.join(unknown)}; cde_jax reads {', '.join(DTYPES)}: save the weights as "
            f"float32 or bfloat16"
        )
    return {name: Tensor(path, name, shape) for name, (shape, _) in entries.items()}
