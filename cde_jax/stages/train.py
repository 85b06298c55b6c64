"""The training stage: plan batches → checkpoints/, metrics.jsonl, and training.json, which says what was chosen.

All of it runs where only JAX is installed.
"""

import importlib.util
import logging
import math
import os
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from cde_jax.config import AUTO, Config, Model, Train
from cde_jax.data.files import write_json
from cde_jax.evaluation import beir, validation
from cde_jax.interop.read import weights_digest
from cde_jax.models.attention import select_kernel
from cde_jax.models.encoder import select_remat
from cde_jax.stages import workdir as work
from cde_jax.stages.assemble import (
    Training,
    abstract_model,
    build_model,
    initial_encoders,
    initial_model,
    make_embedder,
    make_loader,
    make_training,
    run_identity,
)
from cde_jax.stages.placement import CHUNKS, choose_placement, placement
from cde_jax.training import loop, sharding
from cde_jax.training.accounting import GIB, device_limit
from cde_jax.training.checkpoint import Checkpoints
from cde_jax.training.processes import barrier, broadcast, is_first
from cde_jax.training.step import TrainState, stream

log = logging.getLogger(__name__)


def train(config: Config, workdir: Path, prepared: work.Prepared) -> bool:
    """Train to the end, from the newest checkpoint if there is one; False if asked to stop before the end."""
    checkpoints = Checkpoints(workdir / work.CHECKPOINTS, run_identity(config, prepared.plan))
    try:
        steps, newest = check_steps(config.train, len(prepared.plan)), broadcast(checkpoints.newest())
        if newest is not None and newest >= steps:
            log.info("all %d steps are done: training is skipped", steps)
            return True
        record = _record(config, workdir, checkpoints.identity, steps, newest or 0) | {"placement": placement(config)}
        config = choose_placement(config, workdir, prepared)
        # Parameters that a checkpoint is about to replace need no pretrained weights.
        model = (initial_model if newest is None else build_model)(config, prepared.vocab_size)
        training = make_training(config, model, steps)
        if newest is not None:
            training = training._replace(state=checkpoints.restore(newest, training.state))
            log.info("going on from checkpoint %d of %d", newest, steps)
        return _run(config, workdir, prepared, training, checkpoints, record)
    finally:
        checkpoints.wait()


def _record(config: Config, workdir: Path, identity: dict[str, str], steps: int, done: int) -> dict[str, Any]:
    """What training.json says of a run that has done so many steps: identity, what it started from, its schedules."""
    recorded = work.read_record(workdir / work.TRAINING, identity=dict) or {"identity": None}
    recorded = recorded if done and recorded["identity"] == identity else {}
    return {
        "identity": identity,
        "start": _started_from(config.model, done, recorded.get("start", {})),
        "history": schedule_history(config.train, steps, done, recorded.get("history", [])),
    }


def _started_from(model: Model, done: int, recorded: dict[str, Any]) -> dict[str, dict[str, str]]:
    """{stage: name and weights' digest of the pretrained encoder that a run started from}; one that is named as before
    is not read again. Raises ValueError for another one."""
    start = {}
    for stage in ("first_stage", "second_stage"):
        name = getattr(model.init, stage) if stage in initial_encoders(model) else ""
        before = recorded.get(stage, {"name": name})
        start[stage] = before
        if not done or name != before["name"]:
            start[stage] = {"name": name, "weights": weights_digest(name) if name else ""}
        if done and start[stage].get("weights") != before.get("weights"):
            raise ValueError(
                f"model.init.{stage} is {name!r}, and the run started from other weights, {before['name']!r}: give it "
                "that name, or the folder that these weights are in now; another --workdir starts a new run"
            )
    return start


def schedule_history(train: Train, steps: int, done: int, recorded: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The settings that may change while a run goes on, each time with the step (from 1) from which they hold."""
    now, kept = train.affecting("schedule") | {"steps": steps}, [x for x in recorded if x["from_step"] <= done]
    before = {name: value for name, value in kept[-1].items() if name != "from_step"} if kept else {}
    if different := work.differences(now, before):
        if kept:
            log.warning("from step %d on: %s", done + 1, ", ".join(different.values()))
        kept.append({"from_step": done + 1} | now)
    return kept


def _run(
    config: Config,
    workdir: Path,
    prepared: work.Prepared,
    training: Training,
    checkpoints: Checkpoints,
    record: dict[str, Any],
) -> bool:
    """Run the loop; whether it got to the last step."""
    mesh, graph, state, step, steps = training
    encoder, device = nnx.merge(graph, state.params).encoder.config, jax.local_devices()[0]
    loader = make_loader(config, prepared.plan, prepared.pairs, layouts_file=workdir / work.LAYOUTS)
    with barrier():
        if is_first():
            loader.layouts  # noqa: B018  (computed by one process, which keeps them in a file)
    chosen = {
        "steps": steps,
        "devices": f"{mesh.size} x {device.platform} {device.device_kind}",
        "dtype": encoder.dtype,
        "attention": select_kernel(encoder.attention, encoder.dtype, encoder.head_dim),
        "remat": select_remat(encoder.remat),
        "chunks": {name: getattr(config.train, name) for name in CHUNKS},
        "layouts": {name: layout._asdict() for name, layout in loader.layouts.items()},
    }
    if is_first():
        write_json(workdir / work.TRAINING, record | chosen)
    log.info("%s", ", ".join(f"{name} {value}" for name, value in chosen.items()))

    def batches(start: int, stop: int) -> Iterator[dict[str, Any]]:
        loaded = loader.iterate(start, stop, threads=config.batching.threads, prefetch=config.batching.prefetch)
        with closing(loaded):
            yield from sharding.prefetch_to_device(mesh, loaded, config.train.batches_per_step)

    sets = [beir.read_tokens(workdir / work.TOKENS / name) for name in config.evaluate.development]
    if sets and not validation.can_score():
        log.warning("pytrec_eval is not installed: development sets get no score, the newest checkpoint counts as best")

    def validate(state: TrainState) -> dict[str, float]:
        weights, temperature, measured = state.weights, state.temperature(config.train), {}
        if jax.process_count() > 1:
            weights = jax.tree.map(sharding.on_host, weights)
        with barrier():
            if is_first():
                embedder = make_embedder(config, workdir, nnx.merge(graph, weights), prepared.tokenizer)
                size, cutoff = config.batching.batch_size, config.evaluate.cutoff
                measured = validation.validate(embedder, sets, config.seed, cutoff, size, temperature)
        return broadcast(measured)

    key, evaluate = sharding.replicate(mesh, stream(config.seed, "dropout")), validate if sets else None
    if jax.process_count() > 1:  # compiled before they meet in the loop: CPUs wait 30 s for the first collective
        batch = {name: part for name, part in loader.batch(0).items() if name != "plan_batch"}
        step = step.lower(state, sharding.batch_shapes(mesh, batch, config.train.batches_per_step), key).compile()
    options = {"steps": steps, "train": config.train, "checkpoints": checkpoints, "workdir": workdir}
    options |= {"evaluate": evaluate, "any_process": partial(sharding.any_process, mesh)}
    return int(loop.run(step, state, batches, key, **options).step) >= steps


def check_runtime(config: Config) -> None:
    """Raise ValueError for what this machine cannot train, before anything is written: devices, kernel, model size."""
    t = config.train
    fsdp = sharding.make_mesh(t.mesh).devices.shape[1]
    if AUTO in (t.document_chunk, t.context_chunk):
        device_limit(jax.local_devices()[0], t.memory_gib)
    model = abstract_model(config, config.data.vocab_size)
    encoder = model.encoder.config
    select_kernel(encoder.attention, encoder.dtype, encoder.head_dim)
    each = training_bytes(fsdp, averaged=t.ema_decay > 0)
    needed = each * (parameters := sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model))))
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", host)
    if needed > memory:
        raise ValueError(
            f"the model has {parameters:,} parameters: to train it takes at least {each:g} bytes each, "
            f"{needed / GIB:.1f} GiB of a device, and there are {memory / GIB:.1f}; split them over more devices by "
            "train.mesh, or make model.* smaller"
        )
    if t.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("train.wandb needs Weights & Biases: pip install 'cde_jax[wandb]', or leave it empty")
    if t.evaluate_every and not config.evaluate.development:
        log.warning("train.evaluate_every has no effect: evaluate.development names no evaluation set")


def training_bytes(fsdp: int, *, averaged: bool) -> float:
    """Of a parameter on each device, in float32: its value, its gradient, Adam's two moments and its average, if any.

    `fsdp` devices split all but the gradient, and gather a copy of the values.
    """
    return 4 + (12 + 4 * averaged) / fsdp + 4 * (fsdp > 1)


def check_steps(train: Train, batches: int) -> int:
    """The steps of a run. Raises ValueError for a plan too short for one, or for the warm-up."""
    once = batches // train.batches_per_step
    steps, warmup = train.steps or once, train.warmup_steps
    problem = f"the plan has {batches} batches, fewer than the {train.batches_per_step} of one step"
    if steps >= 1:
        problem = f"`train.warmup_steps` {warmup} must be fewer than the {steps} steps of the plan's {batches} batches"
    if warmup >= steps:
        raise ValueError(f"{problem}: lower it or batching.batch_size, raise batching.epochs, or give more data")
    if steps > once:
        log.warning("train.steps %d are more than the %d of the plan, which is repeated", steps, once)
    return steps
