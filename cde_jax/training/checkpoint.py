"""Checkpoints: the two newest and the best, each written whole or not at all; a run resumes from them byte-equal.

A checkpoint is a folder named by the count of steps done: `params`, their `average` if there is one, `rest` (step,
optimiser and a learned temperature) and metadata (identity of the run, score, a digest of each part). Orbax writes it
in the background; where Orbax is not installed (a bare accelerator image) the parts are safetensors files. What is
there decides how it is read, so a run may move.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from cde_jax.training.processes import is_first
from cde_jax.training.sharding import on_host, put
from cde_jax.training.step import TrainState


class Checkpoints:
    """A folder of checkpoints of the run with this `identity`, e.g. {"config": fingerprint, "plan": fingerprint}.

    Where several processes hold the arrays, all of them call `save`, `wait` and `restore`; the first one alone removes.
    Those of another run are refused with a ValueError, as are files that are truncated or altered.
    """

    def __init__(self, directory: Path | str, identity: dict[str, str]):
        self.directory = Path(directory).absolute()
        self.identity = identity
        self._finish_writing: Callable[[], None] | None = None  # of the last save, until it is waited for

    def steps(self) -> list[int]:
        """Steps of all checkpoints, ascending."""
        return sorted(int(path.name) for path in self.directory.glob("*") if path.name.isdecimal())

    def newest(self) -> int | None:
        """Step of the newest checkpoint, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Step of the checkpoint with the highest score; the newest where none has a score."""
        scores = [(self._metadata(step)["score"], step) for step in self.steps()]
        return max((pair for pair in scores if pair[0] is not None), default=(None, self.newest()))[1]

    def save(self, step: int, state: TrainState, score: float | None = None) -> None:
        """Write checkpoint `step`, with Orbax in the background; `score` (higher is better) ranks it.

        Raises OSError, here or in `wait`, when one could not be written, e.g. on a full disk.
        """
        parts, folder = _parts(state), self.directory / str(step)
        metadata = {"identity": self.identity, "score": None if score is None else float(score)}
        metadata["digests"] = {name: _digest(part) for name, part in parts.items()}
        self.wait()
        with self._writing():
            if is_first():
                self.directory.mkdir(parents=True, exist_ok=True)
                for unfinished in self.directory.glob("[0-9]*tmp*"):  # left by a killed run
                    shutil.rmtree(unfinished)
            try:
                self._finish_writing = _write_orbax(folder, parts, metadata)
            except ImportError:
                self._finish_writing = _write_files(folder, parts, metadata)

    def wait(self) -> None:
        """Block until what was saved is on disk, then remove what is neither new nor best."""
        finish, self._finish_writing = self._finish_writing, None
        if finish is None:
            return
        with self._writing():
            finish()
            if not is_first():
                return
            with suppress(ValueError):  # of a damaged one: nothing is removed
                for step in set(self.steps()[:-2]) - {self.best()}:
                    shutil.rmtree(self.directory / str(step))

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Checkpoint `step` as arrays shaped and placed as in `like`."""
        parts = self._read(step, _parts(like))
        return TrainState(params=parts["params"], average=parts.get("average"), **parts["rest"])

    def restore_weights(self, step: int, like: nnx.State) -> nnx.State:
        """Only the weights of checkpoint `step` (`TrainState.weights`), whatever devices it was written from.

        `like` may be abstract (`nnx.split(nnx.eval_shape(make_model), nnx.Param)[1]`): they are put on one device.
        """
        name = "average" if "average" in self._metadata(step)["digests"] else "params"
        return self._read(step, {name: like})[name]

    def _metadata(self, step: int) -> dict[str, Any]:
        path = self.directory / str(step)
        with _reading(path):
            metadata = json.loads((path / "metadata" / "metadata").read_text())
            return {name: metadata[name] for name in ("identity", "score", "digests")}

    def _read(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """The parts of a checkpoint that `like` names, verified."""
        path, metadata = self.directory / str(step), self._metadata(step)
        for name, expected in self.identity.items():
            if (got := metadata["identity"].get(name)) is None:
                raise ValueError(
                    f"checkpoint {path} was written by another version of cde_jax, which tied it to "
                    f"{', '.join(metadata['identity'])}: go on with that version, or start over with --rebuild, which "
                    "moves the checkpoints aside"
                )
            if got != expected:
                raise ValueError(
                    f"checkpoint {path} belongs to another {name}: expected fingerprint {expected}, got {got}. Give "
                    f"the run its own --workdir, or restore the {name} it was made with."
                )
        with _reading(path):
            read = _read_files if any(path.glob("*.safetensors")) else _read_orbax
            parts = read(path, jax.tree.map(_placed, like))
            for name, part in parts.items():
                if (got := _digest(part)) != (expected := metadata["digests"][name]):
                    raise ValueError(f"{name} was altered: expected sha256 {expected[:16]}…, got {got[:16]}…")
        return parts

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds for one cause
            raise OSError(
                f"a checkpoint could not be written to {self.directory}: {_reason(error)}. Those already there are "
                f"untouched: free some space, or mend what is named, and the same command goes on from the newest."
            ) from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ValueError(f"checkpoint {path} was written by Orbax: install orbax-checkpoint to read it") from error
    except Exception as error:  # as in `_writing`: damaged files
        raise ValueError(
            f"checkpoint {path} cannot be read: {_reason(error)}. Nothing was changed. Remove {path} to go on from "
            f"the checkpoint before it, or choose another --workdir."
        ) from error


def _reason(error: Exception) -> str:
    """The first line of a message, of a long one its end, where TensorStore names the cause."""
    return (str(error) or type(error).__name__).splitlines()[0][-300:]


def _parts(state: TrainState) -> dict[str, Any]:
    parts = {"params": state.params, "rest": {"step": state.step, "optimizer": state.optimizer}}
    if state.log_temperature is not None:
        parts["rest"]["log_temperature"] = state.log_temperature
    return parts if state.average is None else parts | {"average": state.average}


def _write_orbax(folder: Path, parts: dict[str, Any], metadata: dict[str, Any]) -> Callable[[], None]:
    """Start writing; the function that waits until it is done."""
    import orbax.checkpoint as ocp

    writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
    items = {name: ocp.args.StandardSave(part) for name, part in parts.items()}
    writer.save(folder, args=ocp.args.Composite(metadata=ocp.args.JsonSave(metadata), **items), force=True)
    return writer.close


def _read_orbax(folder: Path, like: dict[str, Any]) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    items = {name: ocp.args.StandardRestore(part) for name, part in like.items()}
    processes = ocp.options.MultiprocessingOptions()
    if all(leaf.sharding.is_fully_addressable for leaf in jax.tree.leaves(like)):  # read by this process alone
        index = jax.process_index()
        processes = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
    handlers = {name: ocp.StandardCheckpointHandler(multiprocessing_options=processes) for name in like}
    handler = ocp.CompositeCheckpointHandler(**handlers)
    with ocp.Checkpointer(handler, multiprocessing_options=processes) as reader:
        return dict(reader.restore(folder, args=ocp.args.Composite(**items)).items())


def _write_files(folder: Path, parts: dict[str, Any], metadata: dict[str, Any]) -> Callable[[], None]:
    """Write under a temporary name, and rename when it is on disk; nothing is left to wait for."""
    temporary = folder.with_name(f"{folder.name}.tmp")
    arrays = {
        name: {key: np.asarray(on_host(leaf), order="C") for key, leaf in _named(part)} for name, part in parts.items()
    }
    if not is_first():
        return lambda: None
    (temporary / "metadata").mkdir(parents=True)
    for name, tensors in arrays.items():
        save_file(tensors, temporary / f"{name}.safetensors")
    (temporary / "metadata" / "metadata").write_text(json.dumps(metadata))
    for path in filter(Path.is_file, temporary.rglob("*")):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    temporary.rename(folder)
    return lambda: None


def _read_files(folder: Path, like: dict[str, Any]) -> dict[str, Any]:
    parts = {}
    for name, part in like.items():
        tensors = load_file(folder / f"{name}.safetensors")
        leaves = [put(tensors[key], leaf.sharding) for key, leaf in _named(part)]
        parts[name] = jax.tree.unflatten(jax.tree.structure(part), leaves)
    return parts


def _named(tree: Any) -> list[tuple[str, Any]]:
    """All leaves with their paths as text."""
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, type and place of an array; the first device where it has none."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _digest(tree: Any) -> str:
    """sha256 over the paths and bytes of all arrays."""
    digest = hashlib.sha256()
    for key, leaf in _named(tree):
        digest.update(key.encode())
        digest.update(np.ascontiguousarray(on_host(leaf)).view(np.uint8).reshape(-1))
    return digest.hexdigest()
