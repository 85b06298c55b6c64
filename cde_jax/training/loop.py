"""The loop: batches → step → metrics → checkpoints → evaluation."""

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array, Key

from cde_jax.config import Train
from cde_jax.training.checkpoint import Checkpoints
from cde_jax.training.metrics import Metrics
from cde_jax.training.step import Batch, TrainState

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
    evaluate: Callable[[TrainState], float] | None = None,
) -> TrainState:
    """Train from `state.step` to `steps`, or until SIGINT/SIGTERM, which ends after the current step; the last state.

    `batches(start, stop)` yields device batches in step order with their `plan_batch` numbers; `evaluate` gives the
    score by which the best checkpoint is kept. `train` says how often things happen; the last step is always saved and
    evaluated. Raises FloatingPointError at a non-finite loss or gradient, and OSError where metrics or a checkpoint
    cannot be written; the last good checkpoint stays as it is.
    """
    start = int(state.step)
    with Metrics(workdir, start, steps, train) as metrics, ExitStack() as trace, _stop_requested() as stop:
        pending = None  # the step before: its metrics are fetched while the next one runs, so that no device idles
        for done, batch in enumerate(batches(start, steps), start + 1):
            _trace(trace, workdir / "profile", done - start, train.profile_steps, state)
            state, values = train_step(state, {k: v for k, v in batch.items() if k != "plan_batch"}, key)
            if pending is not None:
                metrics.record(*pending)
            pending = (done, values, batch)
            due = _due(done, steps, train)
            if due or stop():
                metrics.record(*pending)
                pending = None
                with metrics.paused():
                    score = None
                    if evaluate is not None and "evaluate" in due:
                        score = evaluate(state)
                        metrics.write(done, {"score": score})
                    checkpoints.save(done, state, score)
            if stop() and done < steps:
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
    if steps and step in (WARM + 1, WARM + 1 + steps):
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
