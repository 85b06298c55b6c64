"""The training stage: plan batches → checkpoints/, metrics.jsonl, and training.json, which says what was chosen."""

import dataclasses
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from cde_jax.batching.loader import Loader
from cde_jax.config import Config
from cde_jax.data.files import write_json
from cde_jax.evaluation import beir
from cde_jax.models.attention import select_kernel
from cde_jax.models.contextual import Biencoder, ContextualEncoder
from cde_jax.models.encoder import select_remat
from cde_jax.stages.assemble import CHUNKS, Training, build_model, compute_dtype, fit_chunks, make_loader, make_training
from cde_jax.stages.check import check_initial_encoders, check_steps
from cde_jax.stages.evaluate import make_embedder, run_identity
from cde_jax.stages.workdir import CHECKPOINTS, TOKENS, TRAINING, Prepared, read_record
from cde_jax.training import loop, sharding
from cde_jax.training.checkpoint import Checkpoints
from cde_jax.training.step import TrainState, stream

log = logging.getLogger(__name__)


def train(config: Config, workdir: Path, prepared: Prepared) -> bool:
    """Train to the end, from the newest checkpoint if there is one; False if asked to stop before the end."""
    identity = run_identity(config, prepared.plan)
    checkpoints = Checkpoints(workdir / CHECKPOINTS, identity)
    try:
        steps, newest = check_steps(config.train, len(prepared.plan)), checkpoints.newest()
        if newest is not None and newest >= steps:
            log.info("all %d steps are done: training is skipped", steps)
            return True
        # Parameters that a checkpoint is about to replace need no pretrained weights.
        model = (initial_model if newest is None else _random_model)(config, prepared.vocab_size)
        config = with_chunks(config, workdir, identity, model, prepared)
        training = make_training(config, model, steps)
        if newest is not None:
            training = training._replace(state=checkpoints.restore(newest, training.state))
            log.info("going on from checkpoint %d of %d", newest, steps)
        return _run(config, workdir, prepared, training, checkpoints)
    finally:
        checkpoints.wait()


def initial_model(config: Config, vocab_size: int) -> Biencoder | ContextualEncoder:
    """Random parameters, then the pretrained encoders that `model.init` names."""
    check_initial_encoders(config, vocab_size)
    model, init = _random_model(config, vocab_size), config.model.init
    encoders = {model.encoder: init.second_stage}
    if isinstance(model, ContextualEncoder):
        encoders[model.first_stage.encoder] = init.first_stage
    for encoder, name in encoders.items():
        if name:
            from cde_jax.interop.read import load_encoder

            nnx.update(encoder, nnx.state(load_encoder(name, init.layers or None), nnx.Param))
    return model


def _random_model(config: Config, vocab_size: int) -> Biencoder | ContextualEncoder:
    return build_model(config, vocab_size, compute_dtype(config))


def with_chunks(config: Config, workdir: Path, identity: dict[str, str], model, prepared: Prepared) -> Config:
    """`config` with numbers for chunk sizes of −1: those of training.json, so that a resumed run computes the same."""
    before = read_record(workdir / TRAINING, identity=dict, chunks=dict)
    if before and before["identity"] == identity and before["chunks"].keys() == set(CHUNKS):
        return dataclasses.replace(config, train=dataclasses.replace(config.train, **before["chunks"]))
    return fit_chunks(config, model, prepared.plan, prepared.pairs)


def _run(config: Config, workdir: Path, prepared: Prepared, training: Training, checkpoints: Checkpoints) -> bool:
    """Run the loop; whether it got to the last step."""
    mesh, graph, state, step, steps = training
    loader = make_loader(config, prepared.plan, prepared.pairs)
    chosen = _description(config, training, checkpoints.identity, loader)
    write_json(workdir / TRAINING, chosen)
    log.info("%s", ", ".join(f"{name} {value}" for name, value in chosen.items() if name != "identity"))

    def batches(start: int, stop: int) -> Iterator[dict[str, Any]]:
        loaded = loader.iterate(start, stop, threads=config.batching.threads, prefetch=config.batching.prefetch)
        with closing(loaded):
            yield from sharding.prefetch_to_device(mesh, loaded)

    name = config.evaluate.development
    if name and importlib.util.find_spec("pytrec_eval") is None:
        log.warning("pytrec_eval is not installed: %s is not scored, the newest checkpoint counts as best", name)
        name = ""
    development = beir.read_tokens(workdir / TOKENS / name) if name else None

    def score(state: TrainState) -> float:
        embedder = make_embedder(config, workdir, nnx.merge(graph, state.params), prepared.tokenizer)
        return beir.score(embedder, development, config.seed, config.evaluate.cutoff)

    state = loop.run(
        step,
        state,
        batches,
        sharding.replicate(mesh, stream(config.seed, "dropout")),
        steps=steps,
        train=config.train,
        checkpoints=checkpoints,
        workdir=workdir,
        evaluate=score if development else None,
    )
    return int(state.step) >= steps


def _description(config: Config, training: Training, identity: dict[str, str], loader: Loader) -> dict[str, Any]:
    """The content of training.json: what was chosen where the config leaves it open."""
    encoder, device = nnx.merge(training.graph, training.state.params).encoder.config, jax.devices()[0]
    return {
        "identity": identity,
        "steps": training.steps,
        "devices": f"{training.mesh.size} x {device.platform} {device.device_kind}",
        "dtype": encoder.dtype,
        "attention": select_kernel(encoder.attention, encoder.dtype, encoder.head_dim),
        "remat": select_remat(encoder.remat),
        "chunks": {name: getattr(config.train, name) for name in CHUNKS},
        "layouts": {name: layout._asdict() for name, layout in loader.layouts.items()},
    }
