"""Where a step runs and in what pieces: chunks and recomputation, chosen by the memory of the compiled step."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from cde_jax.batching.layout import MIN_POSITIONS
from cde_jax.config import AUTO, Config, affected, flatten
from cde_jax.data.files import fingerprint
from cde_jax.stages import workdir as work
from cde_jax.stages.assemble import USEFUL_POSITIONS, abstract_model, make_loader, run_identity, run_slots
from cde_jax.training import sharding
from cde_jax.training.accounting import choose_chunk, device_limit, program_bytes
from cde_jax.training.processes import broadcast
from cde_jax.training.step import init_state, make_optimizer, make_train_step, stream

CHUNKS = ("document_chunk", "context_chunk")
# What the layers may compute again, least first. On a CPU keeping everything is slower than "dots" (models/encoder.py).
REMATS = {"cpu": ("dots", "full"), "other": ("none", "dots", "full")}


def placement(config: Config) -> dict[str, Any]:
    """The settings of where a step runs and in what pieces, and the devices that they are for."""
    effect, device = affected(), jax.local_devices()[0]
    settings = {name: value for name, value in flatten(config.as_dict()).items() if effect[name] == "placement"}
    return settings | {"devices": f"{jax.device_count()} x {device.platform} {device.device_kind}"}


def choose_placement(config: Config, workdir: Path, prepared: work.Prepared) -> Config:
    """`config` with a number for each chunk size of −1 and, where model.remat is "auto", what is computed again.

    By the memory that the compiler says the step needs (`choose_chunk`): the least recomputation with which chunks of
    `USEFUL_POSITIONS` fit, then the largest chunk. It is tried with texts of one length, which compile faster, and
    halved if the step of all lengths should need more. A run that goes on in the same place takes what it took before,
    to compute the same. Raises ValueError where nothing fits, and where nobody says how much memory there is.
    """
    auto = [name for name in CHUNKS if getattr(config.train, name) == AUTO]
    if not auto:
        return config

    def chosen(remat: str, chunks: dict[str, int], **train: Any) -> Config:
        model, train = dataclasses.replace(config.model, remat=remat), chunks | train
        return dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, **train))

    recorded = work.read_record(workdir / work.TRAINING, identity=dict) or {"identity": None}
    same_place = fingerprint(recorded.get("placement")) == fingerprint(placement(config))
    if recorded["identity"] == run_identity(config, prepared.plan) and same_place:
        return chosen(recorded["remat"], recorded["chunks"])
    limit = broadcast(device_limit(jax.local_devices()[0], config.train.memory_gib))  # so that all choose the same
    lengths_of_texts = make_loader(chosen("auto", dict.fromkeys(auto, 1)), prepared.plan, prepared.pairs).lengths

    def needs(remat: str, chunk: int, lengths: int = 1) -> int:
        candidate = chosen(remat, dict.fromkeys(auto, chunk), text_lengths=lengths)
        loader = make_loader(candidate, prepared.plan, prepared.pairs)
        loader.lengths = lengths_of_texts  # the plan is gone through once
        batch = loader.batch(0)
        del batch["plan_batch"]
        return program_bytes(lower_step(candidate, prepared.vocab_size, batch).compile())

    cpu = jax.default_backend() == "cpu"
    _, queries, hard = prepared.plan.hard_negatives.shape
    texts = queries * (2 + hard)  # all queries and documents of a plan batch
    positions = MIN_POSITIONS if cpu else USEFUL_POSITIONS
    useful = min(texts, -(-positions // (config.data.document_length + run_slots(config.model))))
    remats = REMATS["cpu" if cpu else "other"] if config.model.remat == "auto" else (config.model.remat,)
    remat, chunk = choose_chunk(needs, limit, remats, useful, texts)
    while chunk > 1 and needs(remat, chunk, config.train.text_lengths) > limit:
        chunk //= 2
    return chosen(remat, dict.fromkeys(auto, chunk))


def lower_step(
    config: Config, vocab_size: int, batch: dict[str, Any], devices: Sequence[jax.Device] | None = None
) -> jax.stages.Lowered:
    """The training step, traced with the shapes of `batch` as the loader gives it; nothing is put on a device."""
    t, mesh = config.train, sharding.make_mesh(config.train.mesh, devices)
    optimizer, schedule = make_optimizer(t, steps=t.warmup_steps + 1)
    graph, params = nnx.split(abstract_model(config, vocab_size), nnx.Param)
    state = jax.eval_shape(lambda params: init_state(nnx.merge(graph, params), optimizer, t)[1], params)
    step = make_train_step(graph, optimizer, schedule, t, mesh)
    batch = sharding.batch_shapes(mesh, batch, t.batches_per_step)
    return step.lower(sharding.state_shapes(mesh, state), batch, jax.eval_shape(lambda: stream(0, "dropout")))
