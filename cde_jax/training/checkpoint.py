"""Orbax save and restore: the state, and beside it what it belongs to (config, plan) and a digest of its bytes."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

_SCORE = "score"


class Checkpoints:
    """A folder with the two newest checkpoints and the best by score; each appears whole or not at all.

    A checkpoint's number is the count of steps done. `belongs` says which run it is part of, e.g.
    `{"config": fingerprint, "plan": fingerprint}`; `restore` refuses any other.
    """

    def __init__(self, directory: Path | str, belongs: dict[str, str]):
        self.directory = Path(directory).absolute()
        self.belongs = belongs
        keep = [
            policies.LatestN(2),
            policies.BestN(get_metric_fn=lambda m: m[_SCORE], n=1, keep_checkpoints_without_metrics=False),
        ]
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=True,  # what a killed run left half written
                best_fn=lambda m: m[_SCORE],
            ),
            item_names=("state", "about"),
        )

    def save(self, step: int, state: Any, score: float | None = None) -> None:
        """Write `state` as checkpoint `step` in the background; `score` (higher is better) ranks it.

        Raises OSError, here or in `wait` or `close`, when one could not be written, e.g. on a full disk.
        """
        about = {**self.belongs, "digest": _digest(state)}
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)),
                metrics=None if score is None else {_SCORE: float(score)},
                force=True,
            )

    def newest(self) -> int | None:
        """Step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Step of the checkpoint with the highest score; the newest where none has a score."""
        best = self._manager.best_step()
        return self.newest() if best is None else best

    def restore(self, step: int, like: Any) -> Any:
        """Read checkpoint `step` into arrays shaped and placed as in `like`.

        Raises ValueError when it belongs to another run, or its files are truncated or altered.
        """
        path = self.directory / str(step)
        advice = (
            f"Nothing was changed. Remove {path} to go on from the checkpoint before it, or choose another --workdir."
        )
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
            for name, expected in self.belongs.items():
                if about[name] != expected:
                    raise _Mismatch(
                        f"checkpoint {path} belongs to another {name}: expected fingerprint {expected}, got "
                        f"{about[name]}. Give the run its own --workdir, or restore the {name} it was made with."
                    )
            state = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))[
                "state"
            ]
        except _Mismatch:
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds for one cause: damaged files
            raise ValueError(f"checkpoint {path} cannot be read: {_reason(error)}. {advice}") from error
        if _digest(state) != about["digest"]:
            raise ValueError(
                f"checkpoint {path} was altered: expected sha256 {about['digest'][:16]}…, got "
                f"{_digest(state)[:16]}…. {advice}"
            )
        return state

    def wait(self) -> None:
        """Block until what was saved is on disk."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing and release the folder."""
        with self._writing():
            self._manager.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # as in `restore`: many kinds for one cause
            raise OSError(
                f"a checkpoint could not be written to {self.directory}: {_reason(error)}. Those already there are "
                f"untouched: free some space, or mend what is named, and the same command goes on from the newest."
            ) from error


class _Mismatch(ValueError):
    """A checkpoint of another run: not to be mistaken for a damaged one."""


def _reason(error: Exception) -> str:
    """The first line of a message; of a long one its beginning and end, where TensorStore names the cause."""
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return first if len(first) <= 300 else f"{first[:100]} … {first[-200:]}"


def _digest(state: Any) -> str:
    """sha256 over the paths and bytes of all arrays."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).reshape(-1))
    return digest.hexdigest()
