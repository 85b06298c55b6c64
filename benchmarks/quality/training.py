"""One run: a variant and a seed from its start to its last step, going on where a killed one stopped.

The model, the loss and the step are the project's own (`cde_jax.stages.assemble`); here is only the loop around them,
without what a bare image lacks.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from cde_jax.batching.plan import BatchPlan
from cde_jax.config import Config
from cde_jax.data.files import write_file
from cde_jax.models.contextual import Biencoder, ContextualEncoder
from cde_jax.stages.assemble import CHUNKS, Training, build_model, compute_dtype, fit_chunks, make_loader, make_training
from cde_jax.training import sharding
from cde_jax.training.step import TrainState, stream
from quality.arrays import Lab

Model = Biencoder | ContextualEncoder


class Trained(NamedTuple):
    """What a run leaves: the model, the loss of each step, and how long its steps took."""

    model: Model
    losses: np.ndarray  # float32 [steps]
    seconds: float
    pairs_per_second: float | None  # of the steps after the first of this process, which compiles


def train(
    config: Config,
    lab: Lab,
    plan: BatchPlan,
    start: Path | None,
    file: Path,
    identity: str,
    *,
    save_every: int,
    say: Callable[[str], None],
) -> Trained:
    """Train to the end from `file`, where a run of the same `identity` left its state, or from the beginning.

    A seed has a stretch of the plan's batches of its own: seed 0 begins with the first, seed 1 where seed 0 ends, and
    so on. `start`: safetensors of a pretrained encoder for both stages, or None. The state is written to `file` every
    `save_every` steps (0: at the end only) and at the end. Raises ValueError for a state that is damaged or of another
    run, and FloatingPointError for a loss that is not finite.
    """
    model = build_model(config, lab.about["vocab_size"], compute_dtype(config))
    if start is not None:
        put_start(model, start)
    config = fit_chunks(config, model, plan, lab.pairs)
    training = make_training(config, model, config.train.steps or len(plan) // config.train.batches_per_step)
    loader = make_loader(config, plan, lab.pairs)
    del model
    state, losses, seconds = training.state, np.zeros(0, np.float32), 0.0
    if file.exists():
        state, losses, seconds = restore(file, training.state, identity)
        say(f"going on from step {int(state.step)} of {training.steps}")
    key = sharding.replicate(training.mesh, stream(config.seed, "dropout"))
    first, began, timed, storing, done = int(state.step), time.monotonic(), 0.0, 0.0, list(losses)
    # From pretrained weights without dropout, the batches are all that a seed can change.
    stretch = config.seed * training.steps
    batches = _batches(training, lambda step: loader.batch(stretch + step), first)
    for number, batch in enumerate(batches, first + 1):
        state, metrics = training.step(state, batch, key)
        done.append(metrics["loss"])
        if number == first + 1 or number % 50 == 0 or number == training.steps:
            done = _checked(done)  # reading waits for the device: now and then only
            timed = timed or time.monotonic()
            say(f"step {number} of {training.steps}, loss {done[-1]:.4f}")
        if number == training.steps or (save_every and number % save_every == 0):
            done, before = _checked(done), time.monotonic()
            store(file, state, np.array(done, np.float32), seconds + before - began, identity)
            storing += time.monotonic() - before
    now = time.monotonic()
    pairs = (training.steps - first - 1) * config.train.batches_per_step * plan.rows.shape[1]
    rate = pairs / (now - timed - storing) if timed and pairs > 0 else None
    return Trained(nnx.merge(training.graph, state.params), np.array(_checked(done), np.float32),
                   seconds + now - began, rate)  # fmt: skip


def put_start(model: Model, file: Path) -> None:
    """Put pretrained weights into the encoders of both stages. Raises ValueError where shapes or names differ."""
    tensors = load_file(file)
    stages = {"model": model.encoder}
    if getattr(model, "first_stage", None) is not None:
        stages["first stage"] = model.first_stage.encoder
    for name, encoder in stages.items():
        flat = nnx.to_flat_state(nnx.state(encoder, nnx.Param))
        ours = {".".join(map(str, path)): leaf.shape for path, leaf in flat}
        theirs = {path: tensor.shape for path, tensor in tensors.items()}
        different = [
            f"{path}: expected {ours.get(path)}, the start has {theirs.get(path)}"
            for path in sorted(ours.keys() | theirs.keys())
            if ours.get(path) != theirs.get(path)
        ]
        if different:
            raise ValueError(
                f"the pretrained weights are not those of the {name}'s encoder ({'; '.join(different[:4])}): set "
                "model.* to their shape, or train from random weights with --no-start"
            )
        weights = (jax.numpy.asarray(tensors[".".join(map(str, path))], leaf.dtype) for path, leaf in flat)
        filled = [(path, leaf.replace(array)) for (path, leaf), array in zip(flat, weights, strict=True)]
        nnx.update(encoder, nnx.from_flat_state(filled))


def store(file: Path, state: TrainState, losses: np.ndarray, seconds: float, identity: str) -> None:
    """Write the state by the order of its leaves; a kill leaves the old file or the new one."""
    tensors = {f"{i:05d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(jax.device_get(state)))}
    write_file(file, save(tensors | {"losses": losses}, {"run": identity, "seconds": repr(seconds)}))


def restore(file: Path, like: TrainState, identity: str) -> tuple[TrainState, np.ndarray, float]:
    """What `store` wrote, placed as `like` is: state, losses, seconds."""
    try:
        with safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata()
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no dict)
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged ({error}); remove it, and the run starts from its beginning") from None
    if metadata["run"] != identity:
        raise ValueError(
            f"{file}: expected the state of run {identity[:16]}…, it is of {metadata['run'][:16]}…: another "
            "configuration, plan or start; choose another --out, or remove it"
        )
    losses = tensors.pop("losses")
    leaves, structure = jax.tree.flatten(like)
    arrays = [jax.device_put(tensors[f"{i:05d}"], leaf.sharding) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, arrays), losses, float(metadata["seconds"])


@contextmanager
def explained_memory(config: Config) -> Iterator[None]:
    """Turn the device's "out of memory" into a MemoryError that says which chunk size to try next."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(advice(config)) from error


def advice(config: Config) -> str:
    """What to do when the device's memory is full."""
    now = config.train.document_chunk
    if now == 1:
        what = "even single texts do not fit: use shorter texts, fewer context documents or a smaller model"
    else:
        smaller = now // 2 if now > 1 else max(1, config.batching.batch_size // 4)
        what = "try --set " + " ".join(f"train.{name}={smaller}" for name in CHUNKS)
    return f"out of memory on the device with train.document_chunk={now}: {what}"


def _batches(training: Training, batch: Callable[[int], dict[str, Any]], first: int) -> Iterator[dict[str, Any]]:
    """The batches from step `first` on, on the device; the next one is read while a step runs."""

    def read(step: int) -> dict[str, Any]:
        arrays = {name: value for name, value in batch(step).items() if name != "plan_batch"}
        return sharding.shard_batch(training.mesh, arrays)

    with ThreadPoolExecutor(1) as ahead:
        waiting = ahead.submit(read, first) if first < training.steps else None
        for step in range(first, training.steps):
            ready = waiting.result()
            if step + 1 < training.steps:
                waiting = ahead.submit(read, step + 1)
            yield ready


def _checked(losses: list[Any]) -> list[float]:
    """The losses as numbers; a FloatingPointError names the first that is not finite."""
    numbers = [float(loss) for loss in losses]
    broken = np.flatnonzero(~np.isfinite(numbers))
    if len(broken):
        raise FloatingPointError(f"the loss of step {broken[0] + 1} is {numbers[broken[0]]}: lower the learning rate")
    return numbers
