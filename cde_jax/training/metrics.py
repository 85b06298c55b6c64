"""Metrics of a run: checked, written to metrics.jsonl and TensorBoard, shown in a progress bar."""

import errno
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from cde_jax.config import Train
from cde_jax.training.accounting import utilisation
from cde_jax.training.step import Batch

log = logging.getLogger(__name__)


class Metrics:
    """metrics.jsonl; TensorBoard and a progress bar where their libraries are installed, else plain log lines."""

    def __init__(self, workdir: Path, start: int, steps: int, train: Train):
        self._workdir, self._file = workdir, workdir / "metrics.jsonl"
        self._start, self._steps, self._train = start, steps, train
        self._shapes: set[str] = set()
        self._exit = ExitStack()

    def __enter__(self):
        self._workdir.mkdir(parents=True, exist_ok=True)
        _drop_lines_after(self._file, self._start)
        self._to_tensorboard = _tensorboard(self._workdir / "tensorboard", self._start, self._exit)
        self._bar = _progress_bar(self._start, self._steps, self._exit)
        self._restart()
        return self

    def __exit__(self, *_):
        self._exit.close()

    def record(self, step: int, values: dict[str, Array], batch: Batch) -> None:
        """Wait for a step's metrics, check them, show them, and write them every few steps.

        Since the line before: pairs per second, model TFLOP/s of all devices and their utilisation (where the device's
        peak is known), and padding, the share of computed tokens that are none of a text. Of this run: compilations,
        which is the number of different shapes that batches had.
        """
        values = jax.device_get(values)
        _check_finite(step, values.pop("losses"), float(values["gradient_norm"]), np.asarray(batch["plan_batch"]))
        self._shapes.add(str(jax.tree.map(np.shape, batch)))
        self._pairs += math.prod(batch["keep"].shape[:2])
        for name in self._sums:
            self._sums[name] += float(values.pop(name))
        seconds = time.perf_counter() - self._clock
        rate, flops = self._pairs / seconds, self._sums["flops"]
        if self._bar:
            self._bar.set_postfix({name: float(values[name]) for name in ("loss", "accuracy")} | {"pairs/s": rate})
            self._bar.update()
        if step % self._train.log_every and step != self._steps:
            return
        line = {name: float(value) for name, value in values.items()}
        line |= {"pairs_per_second": rate, "tflops": flops / seconds / 1e12}
        devices = batch["keep"].devices()
        kind = next(iter(devices)).device_kind
        if (used := utilisation(flops, seconds, kind, len(devices), self._train.peak_tflops)) is not None:
            line["utilisation"] = used
        line["padding"] = 1 - self._sums["tokens"] / max(self._sums["computed_tokens"], 1)
        self.write(step, line | {"compilations": len(self._shapes)})
        self._restart()

    def _restart(self) -> None:
        self._clock, self._pairs = time.perf_counter(), 0
        self._sums = dict.fromkeys(("tokens", "computed_tokens", "flops"), 0.0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is not counted as training."""
        before = time.perf_counter()
        yield
        self._clock += time.perf_counter() - before

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of JSON, and the same to TensorBoard. Raises OSError, e.g. on a full disk, with whole lines left."""
        rounded = {name: v if isinstance(v, int) else float(f"{v:.6g}") for name, v in values.items()}
        try:
            _append_line(self._file, json.dumps({"step": step} | rounded))
            self._to_tensorboard(step, values)
        except OSError as error:
            raise OSError(
                f"metrics of step {step} could not be written to {self._workdir}: {error.strerror}. The checkpoints "
                "are untouched: free some space, and the same command goes on from the newest."
            ) from error
        if not self._bar:
            log.info("step %d  %s", step, "  ".join(f"{name} {value:.4g}" for name, value in values.items()))


def _tensorboard(folder: Path, start: int, exit: ExitStack) -> Callable[[int, dict[str, float]], None]:
    """A function that writes the values of a step to an event file; it does nothing without tensorboardX.

    It writes at once: the thread of tensorboardX's SummaryWriter ends on a full disk, and the next values wait for it.
    """
    try:
        from tensorboardX.event_file_writer import EventsWriter  # loads torch where there is one
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary
    except ImportError:
        return lambda step, values: None
    folder.mkdir(parents=True, exist_ok=True)
    writer = EventsWriter(str(folder / "events"))
    exit.enter_context(suppress(OSError))  # a full disk was an error before
    exit.callback(writer.close)
    if start:  # hides what an earlier process wrote of later steps
        writer.write_event(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(step: int, values: dict[str, float]) -> None:
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        writer.flush()

    return write


def _progress_bar(start: int, steps: int, exit: ExitStack) -> Any:
    """tqdm's bar, or None where it is not installed or nobody is watching."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    bar = tqdm(total=steps, initial=start, desc="training", unit="step", disable=None)
    exit.callback(bar.close)
    return None if bar.disable else bar


def _append_line(file: Path, line: str) -> None:
    """Append a whole line or, where that fails, nothing."""
    content = (line + "\n").encode()
    with open(file, "ab", buffering=0) as opened:
        size = opened.tell()
        try:
            if opened.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            opened.truncate(size)
            raise


def _drop_lines_after(file: Path, step: int) -> None:
    """Drop the lines of steps that will be run again, and a last line that a kill cut short."""
    kept, lines = [], file.read_bytes().splitlines() if file.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            if int(json.loads(line)["step"]) <= step:
                kept.append(line)
        except (ValueError, TypeError, KeyError):
            if number < len(lines) or not b'{"step":'.startswith(line[:8]):
                raise ValueError(
                    f"{file}:{number}: expected a line of metrics with its step, got {line[:60]!r}. It was not written "
                    "by training: move the file away, and the same command goes on"
                ) from None
    if len(kept) < len(lines):
        temporary = file.with_suffix(".tmp")
        temporary.write_bytes(b"".join(line + b"\n" for line in kept))
        temporary.replace(file)


def _check_finite(
    step: int, losses: Float[np.ndarray, " G"], gradient_norm: float, plan_batch: Int[np.ndarray, " G"]
) -> None:
    bad = plan_batch[~np.isfinite(losses)]
    if bad.size or not np.isfinite(gradient_norm):
        what = f"loss of plan batch {bad.tolist()}" if bad.size else f"gradient of plan batches {plan_batch.tolist()}"
        raise FloatingPointError(
            f"step {step}: the {what} is not finite (gradient norm {gradient_norm}). The last good checkpoint is left "
            f"as it was. Look at those batches' texts, lower train.learning_rate or raise train.temperature."
        )
