"""Checkpoints: the two newest and the best, each written whole or not at all; a run resumes from them byte-equal.

A checkpoint is a folder named by the count of steps done: `params`, `rest` (step and optimiser) and metadata (identity
of the run, score, a digest of each part). Orbax writes it in the background; where Orbax is not installed (a bare
accelerator image) the parts are safetensors files. What is there decides how it is read, so a run may move.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from cde_jax.training.step import TrainState


class Checkpoints:
    """A folder of checkpoints of the run with this `identity`, e.g. {"config": fingerprint, "plan": fingerprint}.

    Those of another run are refused with a ValueError, as are files that are truncated or altered.
    """

    def __init__(self, directory: Path | str, identity: dict[str, str]):
        self.directory = Path(directory).absolute()
        self.identity = identity
        self._orbax: Any = None  # started by the first save
        self._saving = False

    def steps(self) -> list[int]:
        """Steps of all checkpoints, ascending."""
        names = os.listdir(self.directory) if self.directory.is_dir() else []
        return sorted(int(name) for name in names if name.isdecimal())

    def newest(self) -> int | None:
        """Step of the newest checkpoint, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Step of the checkpoint with the highest score; the newest where none has a score."""
        scores = [(self._metadata(step)["score"], step) for step in self.steps()]
        return max((pair for pair in scores if pair[0] is not None), default=(None, self.newest()))[1]

    def save(self, step: int, state: TrainState, score: float | None = None) -> None:
        """Write checkpoint `step`, with Orbax in the background; `score` (higher is better) ranks it.

        Raises OSError, here or in `wait` or `close`, when one could not be written, e.g. on a full disk.
        """
        parts = {"params": state.params, "rest": {"step": state.step, "optimizer": state.optimizer}}
        metadata = {"identity": self.identity, "score": None if score is None else float(score)}
        metadata["digests"] = {name: _digest(part) for name, part in parts.items()}
        self.wait()
        with self._writing():
            if not self._saving:
                self._start()
            if self._orbax is None:
                _write_files(self.directory / str(step), parts, metadata)
                return
            import orbax.checkpoint as ocp

            items = {name: ocp.args.StandardSave(part) for name, part in parts.items()}
            items["metadata"] = ocp.args.JsonSave(metadata)
            self._orbax.save(self.directory / str(step), args=ocp.args.Composite(**items), force=True)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Checkpoint `step` as arrays shaped and placed as in `like`."""
        rest = {"step": like.step, "optimizer": like.optimizer}
        state = self._read(step, {"params": like.params, "rest": rest})
        return TrainState(params=state["params"], **state["rest"])

    def restore_weights(self, step: int, like: nnx.State) -> nnx.State:
        """Only the parameters of checkpoint `step`, whatever devices it was written from.

        `like` may be abstract (`nnx.split(nnx.eval_shape(make_model), nnx.Param)[1]`): they are put on one device.
        """
        return self._read(step, {"params": like})["params"]

    def wait(self) -> None:
        """Block until what was saved is on disk, then remove what is neither new nor best."""
        if not self._saving:
            return
        with self._writing():
            if self._orbax is not None:
                self._orbax.wait_until_finished()
            with suppress(ValueError):  # of a damaged one: nothing is removed
                for step in set(self.steps()[:-2]) - {self.best()}:
                    shutil.rmtree(self.directory / str(step))

    def close(self) -> None:
        """Finish writing."""
        self.wait()
        if self._orbax is not None:
            self._orbax.close()
        self._orbax, self._saving = None, False

    def _start(self) -> None:
        """Remove what a killed run left unfinished, and start Orbax if it is installed."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in self.directory.glob("[0-9]*tmp*"):
            shutil.rmtree(path)
        with suppress(ImportError):
            import orbax.checkpoint as ocp

            self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._saving = True

    def _metadata(self, step: int) -> dict[str, Any]:
        path = self.directory / str(step)
        with _reading(path):
            metadata = json.loads((path / "metadata" / "metadata").read_text())
            return {name: metadata[name] for name in ("identity", "score", "digests")}

    def _read(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """The parts of a checkpoint that `like` names, verified."""
        path, metadata = self.directory / str(step), self._metadata(step)
        for name, expected in self.identity.items():
            if (got := metadata["identity"].get(name)) != expected:
                raise ValueError(
                    f"checkpoint {path} belongs to another {name}: expected fingerprint {expected}, got {got}. Give "
                    f"the run its own --workdir, or restore the {name} it was made with."
                )
        with _reading(path):
            like = jax.tree.map(_placed, like)
            parts = (_read_files if any(path.glob("*.safetensors")) else _read_orbax)(path, like)
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


def _write_files(folder: Path, parts: dict[str, Any], metadata: dict[str, Any]) -> None:
    """A checkpoint without Orbax: under a temporary name, renamed when it is on disk."""
    temporary = folder.with_name(f"{folder.name}.tmp")
    (temporary / "metadata").mkdir(parents=True)
    for name, part in parts.items():
        tensors = {key: np.asarray(leaf, order="C") for key, leaf in _named(part)}
        save_file(tensors, temporary / f"{name}.safetensors")
    (temporary / "metadata" / "metadata").write_text(json.dumps(metadata))
    for path in filter(Path.is_file, temporary.rglob("*")):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    temporary.rename(folder)


def _read_files(folder: Path, like: dict[str, Any]) -> dict[str, Any]:
    """Parts of a checkpoint without Orbax, placed as in `like`."""
    parts = {}
    for name, part in like.items():
        tensors = load_file(folder / f"{name}.safetensors")
        leaves = [jax.device_put(tensors[key], leaf.sharding) for key, leaf in _named(part)]
        parts[name] = jax.tree.unflatten(jax.tree.structure(part), leaves)
    return parts


def _read_orbax(folder: Path, like: dict[str, Any]) -> dict[str, Any]:
    """Parts of a checkpoint that Orbax wrote, placed as in `like`."""
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        items = {name: ocp.args.StandardRestore(part) for name, part in like.items()}
        return dict(reader.restore(folder, args=ocp.args.Composite(**items)).items())


def _named(tree: Any) -> list[tuple[str, Any]]:
    """All arrays with their paths as text."""
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, type and place of an array; the first device where it has none."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _digest(tree: Any) -> str:
    """sha256 over the paths and bytes of all arrays."""
    digest = hashlib.sha256()
    for name, leaf in _named(tree):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).reshape(-1))
    return digest.hexdigest()
