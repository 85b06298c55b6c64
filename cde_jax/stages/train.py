"""The training stage: plan batches → checkpoints/, metrics.jsonl, and training.json, which says what was chosen."""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from cde_jax.batching.loader import Loader
from cde_jax.config import Config
from cde_jax.data.files import read_json, write_json
from cde_jax.evaluation import beir
from cde_jax.interop.read import load_encoder
from cde_jax.models.attention import select_kernel
from cde_jax.models.contextual import Biencoder, ContextualEncoder
from cde_jax.models.encoder import Encoder, select_remat
from cde_jax.stages.assemble import CHUNKS, Training, build_model, compute_dtype, fit_chunks, make_loader, make_training
from cde_jax.stages.evaluate import CHECKPOINTS, make_embedder, run_identity
from cde_jax.stages.prepare import Prepared, evaluation_sets
from cde_jax.training import loop, sharding
from cde_jax.training.checkpoint import Checkpoints
from cde_jax.training.step import TrainState, stream

log = logging.getLogger(__name__)

TRAINING = "training.json"


def train(config: Config, workdir: Path, prepared: Prepared) -> bool:
    """Train to the end, from the newest checkpoint if there is one; False if asked to stop before the end."""
    identity = run_identity(config, prepared.plan)
    checkpoints = Checkpoints(workdir / CHECKPOINTS, identity)
    try:
        steps, newest = config.train.steps or len(prepared.plan) // config.train.batches_per_step, checkpoints.newest()
        if newest is not None and newest >= steps:
            log.info("all %d steps are done: training is skipped", steps)
            return True
        # Parameters that a checkpoint is about to replace need no pretrained weights.
        model = (initial_model if newest is None else _random_model)(config, prepared.tokenizer.vocab_size)
        config = _with_chunks(config, workdir, identity, model, prepared)
        training = make_training(config, model, prepared.plan)
        if newest is not None:
            training = training._replace(state=checkpoints.restore(newest, training.state))
            log.info("going on from checkpoint %d of %d", newest, steps)
        return _run(config, workdir, prepared, training, checkpoints)
    finally:
        checkpoints.close()


def initial_model(config: Config, vocab_size: int) -> Biencoder | ContextualEncoder:
    """Random parameters, then the pretrained encoders that `model.init` names."""
    model, init = _random_model(config, vocab_size), config.model.init
    _start_from(model.encoder, init.second_stage, init.layers, "second_stage")
    if isinstance(model, ContextualEncoder):
        _start_from(model.first_stage.encoder, init.first_stage, init.layers, "first_stage")
    return model


def _random_model(config: Config, vocab_size: int) -> Biencoder | ContextualEncoder:
    return build_model(config, vocab_size, compute_dtype(config))


def _start_from(encoder: Encoder, name: str, layers: int, stage: str) -> None:
    if not name:
        return
    pretrained = load_encoder(name, layers or None)
    different = [
        f"{field}: the config says {value!r}, the checkpoint {other!r}"
        for field, value in vars(encoder.config).items()
        if field not in ("dtype", "remat", "attention") and value != (other := getattr(pretrained.config, field))
    ]
    if different:
        raise ValueError(
            f"model.init.{stage} {name!r} is of another shape than the config's model: " + "; ".join(different) + ". "
            "Set model.* to the checkpoint's shape"
        )
    nnx.update(encoder, nnx.state(pretrained, nnx.Param))


def _with_chunks(config: Config, workdir: Path, identity: dict[str, str], model, prepared: Prepared) -> Config:
    """`config` with numbers for chunk sizes of −1: those of training.json, so that a resumed run computes the same."""
    file = workdir / TRAINING
    if file.exists() and (before := read_json(file))["belongs"] == identity:
        return dataclasses.replace(config, train=dataclasses.replace(config.train, **before["chunks"]))
    return fit_chunks(config, model, prepared.plan, prepared.pairs)


def _run(config: Config, workdir: Path, prepared: Prepared, training: Training, checkpoints: Checkpoints) -> bool:
    """Run the loop; whether it got to the last step."""
    mesh, graph, state, step, steps = training
    t, b = config.train, config.batching
    loader = make_loader(config, prepared.plan, prepared.pairs)
    chosen = _description(config, training, checkpoints.belongs, loader)
    write_json(workdir / TRAINING, chosen)
    log.info("%s", ", ".join(f"{name} {value}" for name, value in chosen.items() if name != "belongs"))

    def batches(start: int, stop: int) -> Iterator[dict[str, Any]]:
        loaded = loader.iterate(start, stop, threads=b.threads, workers=b.workers, prefetch=b.prefetch)
        with closing(loaded):
            yield from sharding.shard_ahead(mesh, loaded)

    name = config.evaluate.development
    development = evaluation_sets(config, workdir, [name])[0] if name else None

    def score(state: TrainState) -> float:
        embedder = make_embedder(config, workdir, nnx.merge(graph, state.params), prepared.tokenizer)
        return beir.score(embedder, development, config.seed, config.evaluate.cutoff)

    return loop.run(
        step,
        state,
        batches,
        sharding.replicate(mesh, stream(config.seed, "dropout")),
        steps=steps,
        cadence=loop.Cadence(t.log_every, t.checkpoint_every, t.evaluate_every),
        checkpoints=checkpoints,
        workdir=workdir,
        evaluate=score if development else None,
        peak_tflops=t.peak_tflops,
        profile_steps=t.profile_steps,
    ).finished


def _description(config: Config, training: Training, identity: dict[str, str], loader: Loader) -> dict[str, Any]:
    """The content of training.json: what was chosen where the config leaves it open."""
    encoder, device = nnx.merge(training.graph, training.state.params).encoder.config, jax.devices()[0]
    return {
        "belongs": identity,
        "steps": training.steps,
        "devices": f"{training.mesh.size} x {device.platform} {device.device_kind}",
        "dtype": encoder.dtype,
        "attention": select_kernel(encoder.attention, encoder.dtype, encoder.head_dim),
        "remat": select_remat(encoder.remat),
        "chunks": {name: getattr(config.train, name) for name in CHUNKS},
        "layouts": {name: layout._asdict() for name, layout in loader.layouts.items()},
    }
