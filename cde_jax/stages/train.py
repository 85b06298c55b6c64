"""The training stage: plan batches → checkpoints/, metrics.jsonl, and training.json, which says what was chosen.

A run's model, loader and step are made from its configuration here. All of it runs where only JAX is installed.
"""

import dataclasses
import importlib.util
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from cde_jax.batching.loader import MIN_POSITIONS, Loader
from cde_jax.batching.plan import BatchPlan
from cde_jax.config import AUTO, Config, Model, Train, affected, flatten
from cde_jax.data.files import fingerprint, write_json
from cde_jax.data.store import Store
from cde_jax.data.tokens import Tokenizer
from cde_jax.evaluation import beir, validation
from cde_jax.interop.modules import TextSettings
from cde_jax.interop.read import load_encoder, open_encoder, weights_digest
from cde_jax.models.attention import select_kernel
from cde_jax.models.contextual import Biencoder, BiencoderConfig, ContextualConfig, ContextualEncoder
from cde_jax.models.encoder import EncoderConfig, select_remat
from cde_jax.retrieval.embedder import Embedder
from cde_jax.stages import workdir as work
from cde_jax.training import loop, sharding
from cde_jax.training.accounting import GIB, choose_chunk, device_limit, program_bytes
from cde_jax.training.checkpoint import Checkpoints
from cde_jax.training.processes import is_first, of_first, together
from cde_jax.training.step import TrainState, init_state, make_optimizer, make_train_step, stream

log = logging.getLogger(__name__)

CHUNKS = ("document_chunk", "context_chunk")
USEFUL_POSITIONS = 8192  # of a chunk that keeps an accelerator busy
# What the layers may compute again, least first. On a CPU keeping everything is slower than "dots" (models/encoder.py).
REMATS = {"cpu": ("dots", "full"), "other": ("none", "dots", "full")}
Encoder = Biencoder | ContextualEncoder


class Training(NamedTuple):
    """What trains: `step(state, batch, key) → (state, metrics)` on `mesh`, to be run `steps` times."""

    mesh: jax.sharding.Mesh
    graph: nnx.GraphDef
    state: TrainState
    step: Any
    steps: int


def train(config: Config, workdir: Path, prepared: work.Prepared) -> bool:
    """Train to the end, from the newest checkpoint if there is one; False if asked to stop before the end."""
    checkpoints = Checkpoints(workdir / work.CHECKPOINTS, run_identity(config, prepared.plan))
    try:
        steps, newest = check_steps(config.train, len(prepared.plan)), of_first(checkpoints.newest())
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
        name = getattr(model.init, stage) if stage in _initial_encoders(model) else ""
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
    with together():
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
        with together():
            if is_first():
                embedder = make_embedder(config, workdir, nnx.merge(graph, weights), prepared.tokenizer)
                size, cutoff = config.batching.batch_size, config.evaluate.cutoff
                measured = validation.validate(embedder, sets, config.seed, cutoff, size, temperature)
        return of_first(measured)

    key, evaluate = sharding.replicate(mesh, stream(config.seed, "dropout")), validate if sets else None
    if jax.process_count() > 1:  # compiled before they meet: what devices do together must not begin 30 s apart
        with together():
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
    model = _abstract(config, config.data.vocab_size)
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


def check_initial_encoders(config: Config, vocab_size: int | None = None) -> None:
    """Raises ValueError for encoders of `model.init` that are not there or of another shape than the config's model.

    vocab_size: of the tokenizer, where it is known.
    """
    m, d = config.model, config.data
    for stage, name in _initial_encoders(m).items():
        actual, *_ = open_encoder(name, m.init.layers or None)
        if vocab_size is None:  # a WordPiece of at most so many tokens is still to be trained
            vocab_size = min(actual.vocab_size, d.vocab_size) if d.tokenizer == "wordpiece" else None
        layers = m.layers if stage == "second_stage" else m.first_stage_layers or m.layers
        expected = encoder_config(m, vocab_size or actual.vocab_size, layers, "float32")
        different = [
            f"{field}: the config says {value!r}, the checkpoint {other!r}"
            for field, value in vars(expected).items()
            if field not in ("dtype", "remat", "attention") and value != (other := getattr(actual, field))
        ]
        if different:
            raise ValueError(
                f"model.init.{stage} {name!r} is of another shape than the config's model: {'; '.join(different)}. "
                "Set model.* to the checkpoint's shape"
            )


def _initial_encoders(model: Model) -> dict[str, str]:
    """{stage: the pretrained encoder it starts from}."""
    stages = ("second_stage", "first_stage") if model.kind == "contextual" else ("second_stage",)
    return {stage: name for stage in stages if (name := getattr(model.init, stage))}


def run_identity(config: Config, plan: BatchPlan) -> dict[str, str]:
    """What a checkpoint is tied to: the plan, and the settings that decide the numbers and may not change."""
    effect = affected()
    settings = {name: value for name, value in flatten(config.as_dict()).items() if effect[name] == "training"}
    return {"plan": plan.fingerprint, "settings": fingerprint(settings)}


def encoder_config(model: Model, vocab_size: int, layers: int, dtype: str) -> EncoderConfig:
    """The encoder that `model` describes; `vocab_size` is used where the config leaves it to the tokenizer."""
    same = ("width", "heads", "mlp_width", "max_positions", "attention", "remat")
    shape = {"vocab_size": model.vocab_size or vocab_size, "layers": layers, "dtype": dtype}
    shape |= {name: getattr(model, name) for name in same}
    if model.backbone == "bert":
        shape |= {"positions": "learned", "activation": "gelu", "attention_bias": True, "mlp_bias": (True, True)}
    return EncoderConfig(**shape)


def model_config(model: Model, vocab_size: int, dtype: str) -> BiencoderConfig | ContextualConfig:
    """What `models.contextual` builds: a biencoder, or both stages of a contextual encoder."""
    second = encoder_config(model, vocab_size, model.layers, dtype)
    if model.kind == "biencoder":
        return BiencoderConfig(second, head=model.head, residual=model.head)
    first = encoder_config(model, vocab_size, model.first_stage_layers or model.layers, dtype)
    same = ("context_size", "context_attention", "soft_prompt", "slot_bias")
    return ContextualConfig(BiencoderConfig(first, head=True), second, **{name: getattr(model, name) for name in same})


def compute_dtype(config: Config, platform: str | None = None) -> str:
    """`model.dtype`; "auto" is float32 on CPU and bfloat16 on other platforms (None: this process's)."""
    auto = "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"
    return auto if config.model.dtype == "auto" else config.model.dtype


def build_model(config: Config, vocab_size: int) -> Encoder:
    """The model with random parameters from the run's seed; jitted, so that a large one is made in seconds."""
    shape = _shape(config, vocab_size)
    return nnx.jit(lambda key: shape.build(rngs=nnx.Rngs(params=key)))(stream(config.seed, "params"))


def initial_model(config: Config, vocab_size: int) -> Encoder:
    """Random parameters, then the pretrained encoders that `model.init` names."""
    check_initial_encoders(config, vocab_size)
    model = build_model(config, vocab_size)
    for stage, name in _initial_encoders(config.model).items():
        encoder = model.encoder if stage == "second_stage" else model.first_stage.encoder
        nnx.update(encoder, nnx.state(load_encoder(name, config.model.init.layers or None), nnx.Param))
    return model


def restore_model(config: Config, vocab_size: int, checkpoints: Checkpoints, step: int) -> Encoder:
    """The model of a checkpoint: only its parameters are read, on any number of devices."""
    graph, params = nnx.split(_abstract(config, vocab_size), nnx.Param)
    return nnx.merge(graph, checkpoints.restore_weights(step, params))


def _shape(config: Config, vocab_size: int) -> BiencoderConfig | ContextualConfig:
    shape = model_config(config.model, vocab_size, compute_dtype(config))
    return dataclasses.replace(shape, matryoshka=config.train.matryoshka)


def _abstract(config: Config, vocab_size: int) -> Encoder:
    shape = _shape(config, vocab_size)
    return nnx.eval_shape(lambda: shape.build(rngs=nnx.Rngs(0)))


def make_embedder(config: Config, workdir: Path, model: Encoder, tokenizer: Tokenizer | None) -> Embedder:
    """The model with the run's tokenizer and text settings."""
    return Embedder(model, tokenizer, text_settings(config), workdir / work.TOKENIZER)


def text_settings(config: Config) -> TextSettings:
    """Prefixes and lengths of a run's texts."""
    d = config.data
    return TextSettings(d.query_prefix, d.document_prefix, d.query_length, d.document_length)


def run_slots(model: Model) -> int:
    """Slots and soft prompt that run through the layers with every text: all of them in joint attention, else none."""
    joint = model.kind == "contextual" and model.context_attention == "joint"
    return model.context_size + model.soft_prompt if joint else 0


def make_loader(
    config: Config, plan: BatchPlan, pairs: Store, platform: str | None = None, layouts_file: Path | None = None
) -> Loader:
    """The loader of a run's batches; chunk sizes of −1 must have been replaced (`choose_placement`)."""
    t, d, m = config.train, config.data, config.model
    slots = run_slots(m)
    # On a CPU the loader chooses.
    default = 0 if (platform or jax.default_backend()) == "cpu" else USEFUL_POSITIONS
    mesh = sharding.make_mesh(t.mesh)
    return Loader(
        plan,
        pairs,
        batches_per_step=t.batches_per_step,
        context_size=m.context_size if m.kind == "contextual" else 0,
        context_source=config.batching.context_source,
        skip=t.skip_batches,
        seed=config.seed,
        text_lengths=t.text_lengths,
        chunk_positions=t.document_chunk * (d.document_length + slots) or default,
        context_chunk_positions=t.context_chunk * d.document_length or default,
        slots=slots,
        layouts_file=layouts_file,
        devices_per_plan_batch=sharding.devices_per_plan_batch(mesh, t.batches_per_step),
        share=sharding.plan_batches(mesh, t.batches_per_step),
    )


def make_training(config: Config, model: Encoder, steps: int) -> Training:
    """The step of a run of `steps` steps and its state at step 0. Raises ValueError where devices are too few."""
    t = config.train
    mesh = sharding.make_mesh(t.mesh)
    optimizer, schedule = make_optimizer(t, steps)
    graph, state = init_state(model, optimizer, t)
    step = make_train_step(graph, optimizer, schedule, t, mesh)
    return Training(mesh, graph, sharding.shard_state(mesh, state), step, steps)


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
    limit = device_limit(jax.local_devices()[0], config.train.memory_gib)
    lengths_of_texts = make_loader(chosen("auto", dict.fromkeys(auto, 1)), prepared.plan, prepared.pairs).lengths

    def needs(remat: str, chunk: int, lengths: int = 1) -> int:
        candidate = chosen(remat, dict.fromkeys(auto, chunk), text_lengths=lengths)
        loader = make_loader(candidate, prepared.plan, prepared.pairs, layouts_file=workdir / work.LAYOUTS)
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
    graph, params = nnx.split(_abstract(config, vocab_size), nnx.Param)
    state = jax.eval_shape(lambda params: init_state(nnx.merge(graph, params), optimizer)[1], params)
    step = make_train_step(graph, optimizer, schedule, t, mesh)
    batch = sharding.batch_shapes(mesh, batch, t.batches_per_step)
    return step.lower(sharding.state_shapes(mesh, state), batch, jax.eval_shape(lambda: stream(0, "dropout")))
