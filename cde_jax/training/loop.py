"""The loop: batches → step → metrics → checkpoints → evaluation. All I/O of training is here."""

import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cde_jax.training.accounting import utilisation
from cde_jax.training.checkpoint import Checkpoints
from cde_jax.training.step import TrainState

log = logging.getLogger(__name__)

WARM = 3  # steps before a trace: the first compiles


class Cadence(NamedTuple):
    """How often things happen, in steps; 0 is never (but the last step is always saved and evaluated)."""

    log: int
    checkpoint: int
    evaluate: int


class Outcome(NamedTuple):
    """How a run ended: its state, and whether all its steps are done."""

    state: TrainState
    finished: bool


def run(
    train_step: Callable[[TrainState, Any, jax.Array], tuple[TrainState, dict]],
    state: TrainState,
    batches: Callable[[int, int], Iterator[dict[str, Any]]],
    key: jax.Array,
    *,
    steps: int,
    cadence: Cadence,
    checkpoints: Checkpoints,
    workdir: Path,
    evaluate: Callable[[TrainState], float] | None = None,
    peak_tflops: float = 0.0,
    profile_steps: int = 0,
) -> Outcome:
    """Train from `state.step` to `steps`, or until SIGINT/SIGTERM, which ends after the current step.

    `batches(start, stop)` yields device batches in step order with their `plan_batch` numbers; `evaluate` gives the
    score by which the best checkpoint is kept. `peak_tflops` of a device: see `accounting.utilisation`. The first
    `profile_steps` steps after the program is warm are traced into profile/. Raises FloatingPointError at a non-finite
    loss or gradient, with the last good checkpoint left as it is.
    """
    start = int(state.step)
    saved = start if checkpoints.newest() == start else -1
    with (
        _Metrics(workdir, start, steps, cadence.log, peak_tflops) as metrics,
        _tracing(workdir / "profile", profile_steps) as trace,
        _stop_requested() as stop,
    ):
        waiting = None  # the step before: read only while the next one runs, so that the device never idles
        for done, batch in enumerate(batches(start, steps), start + 1):
            trace(done - start, state)
            state, values = train_step(state, {k: v for k, v in batch.items() if k != "plan_batch"}, key)
            if waiting is not None:
                metrics.record(*waiting)
            waiting = (done, values, batch)
            due = _due(done, steps, cadence)
            if due or stop():
                metrics.record(*waiting)
                waiting = None
                score = None
                if evaluate is not None and "evaluate" in due:
                    score = evaluate(state)
                    metrics.write(done, {"score": score})
                checkpoints.save(done, state, score)
                saved = done
            if stop() and done < steps:
                log.warning("stopped after step %d of %d, as asked; the same command goes on from there", done, steps)
                break
        if saved < 0 and int(state.step) == 0:
            checkpoints.save(0, state)
        checkpoints.wait()
    return Outcome(state, int(state.step) >= steps)


def _due(done: int, steps: int, cadence: Cadence) -> set[str]:
    """What happens after step `done`; an evaluation is always saved, for it may be the best."""
    due = {name for name in ("checkpoint", "evaluate") if getattr(cadence, name) and done % getattr(cadence, name) == 0}
    return due | ({"checkpoint", "evaluate"} if done == steps else set())


@contextmanager
def _tracing(folder: Path, steps: int) -> Iterator[Callable[[int, TrainState], None]]:
    """A function to be called before each step, counted from 1: it starts and ends the profiler's trace."""
    running = False

    def end() -> None:
        nonlocal running
        jax.profiler.stop_trace()
        running = False
        log.info("%s holds the profiler's trace: open it with TensorBoard or xprof", folder)

    def before(step: int, state: TrainState) -> None:
        nonlocal running
        if not steps or step not in (WARM + 1, WARM + 1 + steps):
            return
        jax.block_until_ready(state.step)  # only whole steps are seen
        if running:
            end()
        else:
            jax.profiler.start_trace(folder)
            running = True

    try:
        yield before
    finally:
        if running:  # the run was shorter
            end()


@contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a flag; a second one acts at once."""
    asked = []

    def handle(number, frame):
        asked.append(number)
        signal.signal(number, before[number])

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread (a notebook's worker): signals stay with their owner
        before = {}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Metrics:
    """metrics.jsonl, TensorBoard and the progress bar."""

    def __init__(self, workdir: Path, start: int, steps: int, every: int, peak_tflops: float):
        from tensorboardX import SummaryWriter  # loads torch where there is one: not for reading this module

        self._file = workdir / "metrics.jsonl"
        self._start, self._steps, self._every, self._peak = start, steps, max(every, 1), peak_tflops
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1 if start else None)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  accuracy {task.fields[accuracy]:.3f}"),
            TextColumn("{task.fields[rate]:.0f} pairs/s"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )

    def __enter__(self):
        _forget_after(self._file, self._start)
        nothing = {"loss": math.nan, "accuracy": math.nan, "rate": 0.0}
        self._task = self._bar.add_task("training", total=self._steps, completed=self._start, **nothing)
        self._bar.start()
        self._shapes: set[Any] = set()
        self._start_counting()
        return self

    def __exit__(self, *_):
        self._bar.stop()
        self._board.close()

    def record(self, step: int, values: dict[str, jax.Array], batch: dict[str, Any]) -> None:
        """Wait for a step's metrics, check them, show them, and write them every few steps.

        Since the line before: pairs per second, model TFLOP/s of all devices and their utilisation (where the device's
        peak is known), and padding, the share of computed tokens that are none of a text. Of this run: compilations,
        which is the number of different shapes that batches had.
        """
        values = jax.device_get(values)
        losses = values.pop("losses")
        _check_finite(step, losses, float(values["gradient_norm"]), np.asarray(batch["plan_batch"]))
        self._shapes.add(str(jax.tree.map(np.shape, batch)))
        self._pairs += math.prod(batch["keep"].shape[:2])
        self._tokens += int(values.pop("tokens"))
        self._computed_tokens += int(values.pop("computed_tokens"))
        self._flops += float(values.pop("flops"))
        seconds = time.perf_counter() - self._clock
        rate = self._pairs / seconds
        self._bar.update(self._task, completed=step, loss=values["loss"], accuracy=values["accuracy"], rate=rate)
        if step % self._every == 0 or step == self._steps:
            work = {
                "pairs_per_second": rate,
                "tflops": self._flops / seconds / 1e12,
                **self._utilisation(batch, seconds),
                "padding": 1 - self._tokens / max(self._computed_tokens, 1),
                "compilations": len(self._shapes),
            }
            self.write(step, {name: float(value) for name, value in values.items()} | work)
            self._start_counting()

    def _utilisation(self, batch: dict[str, Any], seconds: float) -> dict[str, float]:
        devices = batch["keep"].devices()
        used = utilisation(self._flops, seconds, next(iter(devices)).device_kind, len(devices), self._peak)
        return {} if used is None else {"utilisation": used}

    def _start_counting(self) -> None:
        self._clock = time.perf_counter()
        self._pairs = self._tokens = self._computed_tokens = 0
        self._flops = 0.0

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of JSON, and the same to TensorBoard."""
        rounded = {name: v if isinstance(v, int) else float(f"{v:.6g}") for name, v in values.items()}
        with self._file.open("a") as file:
            file.write(json.dumps({"step": step} | rounded) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if not self._bar.console.is_terminal:
            log.info("step %d  %s", step, "  ".join(f"{name} {value:.4g}" for name, value in values.items()))


def _forget_after(file: Path, step: int) -> None:
    """Drop the lines of steps that will be run again, and a line that a kill cut short."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except json.JSONDecodeError:
            continue
    temporary = file.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    temporary.replace(file)


def _check_finite(step: int, losses: np.ndarray, gradient_norm: float, plan_batch: np.ndarray) -> None:
    bad = plan_batch[~np.isfinite(losses)]
    if bad.size or not np.isfinite(gradient_norm):
        what = f"loss of plan batch {bad.tolist()}" if bad.size else f"gradient of plan batches {plan_batch.tolist()}"
        raise FloatingPointError(
            f"step {step}: the {what} is not finite (gradient norm {gradient_norm}). The last good checkpoint is left "
            f"as it was. Look at those batches' texts, lower train.learning_rate or raise train.temperature."
        )
