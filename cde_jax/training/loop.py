"""The loop: batches → step → metrics → checkpoints → evaluation."""

import json
import logging
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from cde_jax.config import Train
from cde_jax.training.accounting import utilisation
from cde_jax.training.checkpoint import Checkpoints
from cde_jax.training.processes import barrier, is_first
from cde_jax.training.step import Batch, TrainState
from cde_jax.training.tracking import wandb_writer

log = logging.getLogger(__name__)

WARM = 3  # steps before a trace: the first compiles


def run(
    train_step: Callable[[TrainState, Any, Key[Array, ""]], tuple[TrainState, dict]],
    state: TrainState,
    batches: Callable[[int, int], Iterator[Batch]],
    key: Key[Array, ""],
    *,
    steps: int,
    train: Train,
    checkpoints: Checkpoints,
    workdir: Path,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    any_process: Callable[[bool], Any] = bool,
) -> TrainState:
    """Train from `state.step` to `steps`, or until SIGINT/SIGTERM, which ends after the current step; the last state.

    Of several processes, `any_process` tells all at the same step that one was asked to stop, and they do after the
    next one at the latest.

    `batches(start, stop)` yields device batches in step order with their `plan_batch` numbers; `evaluate` gives values
    to be written, "score" among them if the best checkpoint is to be kept. `train` says how often things happen; the
    last step is always saved and evaluated. Raises FloatingPointError at a non-finite loss or gradient, and OSError
    where metrics or a checkpoint cannot be written; the last good checkpoint stays as it is.
    """
    start = int(state.step)
    with ExitStack() as exit, ExitStack() as trace, _stop_requested() as stop:
        with barrier():  # the first process loads TensorBoard's libraries, and may fail
            metrics = Metrics(workdir, start, steps, train, exit)
        pending = None  # the step before: its metrics are fetched while the next one runs, so that no device idles
        for done, batch in enumerate(batches(start, steps), start + 1):
            _trace(trace, workdir / "profile", done - start, train.profile_steps, state)
            asked = any_process(stop())  # known when the step before is done
            with metrics.compilation(batch):
                state, values = train_step(state, {k: v for k, v in batch.items() if k != "plan_batch"}, key)
            if pending is not None:
                metrics.record(*pending)
            pending = (done, values, batch)
            due = _due(done, steps, train)
            stopping = bool(asked)
            if due or stopping:
                metrics.record(*pending)
                pending = None
                with metrics.not_training():
                    measured = evaluate(state) if evaluate is not None and "evaluate" in due else {}
                    if measured:
                        metrics.write(done, measured)
                    checkpoints.save(done, state, measured.get("score"))
            if stopping and done < steps:
                log.warning("stopped after step %d of %d, as asked; the same command goes on from there", done, steps)
                break
        checkpoints.wait()
    return state


def _due(done: int, steps: int, train: Train) -> set[str]:
    """What happens after step `done`; an evaluation is always saved, for it may be the best."""
    every = {"checkpoint": train.checkpoint_every, "evaluate": train.evaluate_every}
    return {name for name, count in every.items() if done == steps or (count and done % count == 0)}


def _trace(trace: ExitStack, folder: Path, step: int, steps: int, state: TrainState) -> None:
    """Called before each step, counted from 1: profile `steps` steps after the first ones, while `trace` is open."""
    if steps and step in (WARM + 1, WARM + 1 + steps) and is_first():
        jax.block_until_ready(state.step)  # whole steps only
        if step == WARM + 1:
            trace.callback(log.info, "%s holds the profiler's trace: open it with TensorBoard or xprof", folder)
            trace.enter_context(jax.profiler.trace(folder))
        else:
            trace.close()


@contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a flag; a second one acts at once."""
    received = []

    def handle(number, frame):
        received.append(number)
        signal.signal(number, before[number])

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread (a notebook's worker): signals stay with their owner
        before = {}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Metrics:
    """metrics.jsonl; TensorBoard and a progress bar where their libraries are installed, else plain log lines.

    Weights & Biases where `train.wandb` names a project. Every process checks the numbers; the first one writes.
    """

    def __init__(self, workdir: Path, start: int, steps: int, train: Train, exit: ExitStack):
        self._file, self._steps, self._train = workdir / "metrics.jsonl", steps, train
        self._shapes: set[str] = set()
        self._compile_seconds, self._bar = 0.0, None
        if is_first():
            workdir.mkdir(parents=True, exist_ok=True)
            _drop_lines_after(self._file, start)
            self._writers = [_tensorboard(workdir / "tensorboard", start, exit)]
            if train.wandb:
                self._writers.append(wandb_writer(train.wandb, workdir, start, exit))
            self._bar = _progress_bar(start, steps, exit)
        self._restart()

    @contextmanager
    def not_training(self) -> Iterator[None]:
        """Leave the time of a block out of the speed."""
        began = time.perf_counter()
        yield
        self._clock += time.perf_counter() - began

    @contextmanager
    def compilation(self, batch: Batch) -> Iterator[None]:
        """Around a step's call: where shapes of the batch are new, it traces and compiles, which is no training."""
        shapes, began = str(jax.tree.map(np.shape, batch)), self._clock
        if shapes in self._shapes:
            yield
            return
        self._shapes.add(shapes)
        with self.not_training():
            yield
        self._compile_seconds += self._clock - began

    def record(self, step: int, values: dict[str, Array], batch: Batch) -> None:
        """Wait for a step's metrics, check them, show them, and write them every few steps.

        Since the line before, without evaluation, checkpoints and compilation: pairs per second, model TFLOP/s of all
        devices and their utilisation (where the device's peak is known); and padding, the share of computed tokens that
        are none of a text. Of this process: compilations, the number of different shapes that batches had, and
        compile_seconds, how long these took.
        """
        values = jax.device_get(values)
        _check_finite(step, values.pop("losses"), float(values["gradient_norm"]), np.asarray(batch["plan_batch"]))
        self._sums["pairs"] += math.prod(batch["keep"].shape[:2])
        for name in ("tokens", "computed_tokens", "flops"):
            self._sums[name] += float(values.pop(name))
        seconds = time.perf_counter() - self._clock
        rate, flops = self._sums["pairs"] / seconds, self._sums["flops"]
        line = {name: float(value) for name, value in values.items()}
        if self._bar:
            self._bar.set_postfix({name: line[name] for name in ("loss", "accuracy")} | {"pairs/s": rate})
            self._bar.update()
        if step % self._train.log_every and step != self._steps:
            return
        line |= {"pairs_per_second": rate, "tflops": flops / seconds / 1e12}
        devices = batch["keep"].devices()
        kind = next(iter(devices)).device_kind
        if (used := utilisation(flops, seconds, kind, len(devices), self._train.peak_tflops)) is not None:
            line["utilisation"] = used
        line["padding"] = 1 - self._sums["tokens"] / max(self._sums["computed_tokens"], 1)
        self.write(step, line | {"compilations": len(self._shapes), "compile_seconds": self._compile_seconds})
        self._restart()

    def _restart(self) -> None:
        self._clock, self._sums = time.perf_counter(), Counter()

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of JSON, and the same elsewhere. Raises OSError, e.g. on a full disk, with whole lines left."""
        if not is_first():
            return
        rounded = {name: v if isinstance(v, int) else float(f"{v:.6g}") for name, v in values.items()}
        try:
            _append(self._file, json.dumps({"step": step} | rounded) + "\n")
            for write in self._writers:
                write(step, values)
        except OSError as error:
            raise OSError(
                f"metrics of step {step} could not be written to {self._file.parent}: {error.strerror}. The "
                "checkpoints are untouched: free some space, and the same command goes on from the newest."
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
    if start:  # hides what an earlier process wrote of later steps
        writer.write_event(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(step: int, values: dict[str, float]) -> None:
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        writer.flush()

    @exit.callback
    def close() -> None:
        with suppress(OSError):  # a full disk was an error before
            writer.close()

    return write


def _progress_bar(start: int, steps: int, exit: ExitStack) -> Any:
    """tqdm's bar, or None where it is not installed or nobody is watching."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    bar = exit.enter_context(tqdm(total=steps, initial=start, desc="training", unit="step", disable=None))
    return None if bar.disable else bar


def _append(file: Path, line: str) -> None:
    """Append a whole line or, where that fails, nothing."""
    with open(file, "ab", buffering=0) as opened:
        size, content = opened.tell(), line.encode()
        try:
            while content:  # a write may take a part of it
                content = content[opened.write(content) :]
        except OSError:
            opened.truncate(size)
            raise


def _drop_lines_after(file: Path, step: int) -> None:
    """Drop the lines of steps that will be run again, and a last line that a kill cut short."""
    content, kept = file.read_bytes() if file.exists() else b"", b""
    for number, line in enumerate(lines := content.splitlines(), 1):
        try:
            if int(json.loads(line)["step"]) <= step:
                kept += line + b"\n"
        except (ValueError, TypeError, KeyError):
            if number < len(lines) or not b'{"step":'.startswith(line[:8]):
                raise ValueError(
                    f"{file}:{number}: expected a line of metrics with its step, got {line[:60]!r}. It was not written "
                    "by training: move the file away, and the same command goes on"
                ) from None
    if kept != content:
        temporary = file.with_suffix(".tmp")
        temporary.write_bytes(kept)
        temporary.replace(file)


def _check_finite(
    step: int, losses: Float[np.ndarray, " G"], gradient_norm: float, plan_batch: Int[np.ndarray, " G"]
) -> None:
    bad = plan_batch[~np.isfinite(losses)]
    if bad.size or not np.isfinite(gradient_norm):
        what = f"loss of plan batch {bad.tolist()}" if bad.size else f"gradient of plan batches {plan_batch.tolist()}"
        raise FloatingPointError(
            f"step {step}: the {what} is not finite (gradient norm {gradient_norm}). The last good checkpoint is left "
            f"as it was: go on from it with a lower --config.train.learning_rate, or without these plan batches by "
            f'--config.train.skip_batches="{tuple((bad if bad.size else plan_batch).tolist())}".'
        )
