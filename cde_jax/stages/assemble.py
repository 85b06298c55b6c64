"""The parts of a run from its configuration: model, loader, step. They run where only JAX is installed."""

import dataclasses
import logging
import math
import os
from typing import Any, NamedTuple

import jax
from flax import nnx

from cde_jax.batching.loader import Loader
from cde_jax.batching.plan import BatchPlan
from cde_jax.config import AUTO, Config, Model
from cde_jax.data.store import Store
from cde_jax.models.attention import select_kernel
from cde_jax.models.contextual import Biencoder, BiencoderConfig, ContextualConfig, ContextualEncoder
from cde_jax.models.encoder import EncoderConfig
from cde_jax.training import sharding
from cde_jax.training.accounting import GIB, device_limit, largest_chunk, program_bytes
from cde_jax.training.checkpoint import Checkpoints
from cde_jax.training.step import TrainState, init_state, make_optimizer, make_train_step, stream

log = logging.getLogger(__name__)

CHUNKS = ("document_chunk", "context_chunk")
TRAINING_BYTES = 16  # of a parameter: its value, its gradient and Adam's two moments, in float32


class Training(NamedTuple):
    """What trains: `step(state, batch, key) → (state, metrics)` on `mesh`, to be run `steps` times."""

    mesh: jax.sharding.Mesh
    graph: nnx.GraphDef
    state: TrainState
    step: Any
    steps: int


def check_runtime(config: Config) -> None:
    """Raise ValueError for what this machine cannot train, before anything is written: devices, kernel, model size."""
    t = config.train
    sharding.make_mesh(t.devices, t.batches_per_step)
    shape = model_config(config.model, config.data.vocab_size, compute_dtype(config))
    encoder = shape.encoder if isinstance(shape, BiencoderConfig) else shape.second_stage
    select_kernel(encoder.attention, encoder.dtype, encoder.head_dim)
    parameters = sum(
        math.prod(x.shape) for x in jax.tree.leaves(nnx.state(nnx.eval_shape(lambda: shape.build(rngs=nnx.Rngs(0)))))
    )
    device, host = jax.local_devices()[0], os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = (device.memory_stats() or {}).get("bytes_limit", host)
    if TRAINING_BYTES * parameters > memory:
        raise ValueError(
            f"the model has {parameters:,} parameters: to train it takes at least {TRAINING_BYTES} bytes each, "
            f"{TRAINING_BYTES * parameters / GIB:.1f} GiB, and there are {memory / GIB:.1f}; make model.* smaller"
        )
    if t.evaluate_every and not config.evaluate.development:
        log.warning("train.evaluate_every has no effect: evaluate.development names no evaluation set")


def encoder_config(model: Model, vocab_size: int, layers: int, dtype: str) -> EncoderConfig:
    """The encoder that `model` describes; `vocab_size` is used where the config leaves it to the tokenizer."""
    shape = {
        "vocab_size": model.vocab_size or vocab_size,
        "width": model.width,
        "layers": layers,
        "heads": model.heads,
        "mlp_width": model.mlp_width,
        "max_positions": model.max_positions,
        "dtype": dtype,
        "attention": model.attention,
        "remat": model.remat,
    }
    if model.backbone == "bert":
        shape |= {"positions": "learned", "activation": "gelu", "attention_bias": True, "mlp_bias": (True, True)}
    return EncoderConfig(**shape)


def model_config(model: Model, vocab_size: int, dtype: str) -> BiencoderConfig | ContextualConfig:
    """What `models.contextual` builds: a biencoder, or both stages of a contextual encoder."""
    second = encoder_config(model, vocab_size, model.layers, dtype)
    if model.kind == "biencoder":
        return BiencoderConfig(second, head=model.head, residual=model.head)
    first = encoder_config(model, vocab_size, model.first_stage_layers or model.layers, dtype)
    return ContextualConfig(
        first_stage=BiencoderConfig(first, head=True),
        second_stage=second,
        context_size=model.context_size,
        context_attention=model.context_attention,
        soft_prompt=model.soft_prompt,
        slot_bias=model.slot_bias,
    )


def build_model(config: Config, vocab_size: int, dtype: str) -> Biencoder | ContextualEncoder:
    """The model with random parameters from the run's seed; jitted, so that a large one is made in seconds."""
    shape = model_config(config.model, vocab_size, dtype)
    return nnx.jit(lambda key: shape.build(rngs=nnx.Rngs(params=key)))(stream(config.seed, "params"))


def restore_model(
    config: Config, vocab_size: int, checkpoints: Checkpoints, step: int
) -> Biencoder | ContextualEncoder:
    """The model of a checkpoint: only its parameters are read, on any number of devices."""
    shape = model_config(config.model, vocab_size, compute_dtype(config))
    graph, params = nnx.split(nnx.eval_shape(lambda: shape.build(rngs=nnx.Rngs(0))), nnx.Param)
    return nnx.merge(graph, checkpoints.restore_weights(step, params))


def compute_dtype(config: Config, platform: str | None = None) -> str:
    """`model.dtype`; "auto" is float32 on CPU and bfloat16 on other platforms (None: this process's)."""
    auto = "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"
    return auto if config.model.dtype == "auto" else config.model.dtype


def make_loader(config: Config, plan: BatchPlan, pairs: Store, platform: str | None = None) -> Loader:
    """The loader of a run's batches; chunk sizes of −1 must have been replaced (`fit_chunks`)."""
    t, d = config.train, config.data
    # What keeps an accelerator busy; on a CPU the loader chooses.
    default = 0 if (platform or jax.default_backend()) == "cpu" else 8192
    return Loader(
        plan,
        pairs,
        batches_per_step=t.batches_per_step,
        context_size=config.model.context_size if config.model.kind == "contextual" else 0,
        context_source=config.batching.context_source,
        seed=config.seed,
        text_lengths=t.text_lengths,
        chunk_tokens=t.document_chunk * d.document_length or default,
        context_chunk_tokens=t.context_chunk * d.document_length or default,
    )


def make_training(config: Config, model: Biencoder | ContextualEncoder, steps: int) -> Training:
    """The step of a run of `steps` steps and its state at step 0. Raises ValueError where devices are too few."""
    t = config.train
    mesh = sharding.make_mesh(t.devices, t.batches_per_step)
    optimizer, schedule = make_optimizer(t, steps)
    graph, state = init_state(model, optimizer)
    step = make_train_step(graph, optimizer, schedule, t, mesh)
    return Training(mesh, graph, sharding.replicate(mesh, state), step, steps)


def fit_chunks(config: Config, model: Biencoder | ContextualEncoder, plan: BatchPlan, pairs: Store) -> Config:
    """`config` with a number for each chunk size of −1: the largest whose step fits the device's memory.

    All of them become one number of texts. Compiles the step for ever smaller chunks until one fits. Raises
    ValueError where not even single texts fit, and where nobody says how much memory there is.
    """
    auto = [name for name in CHUNKS if getattr(config.train, name) == AUTO]
    if not auto:
        return config
    limit = device_limit(jax.devices()[0], config.train.memory_gib)

    def with_chunks(texts: int) -> Config:
        return dataclasses.replace(config, train=dataclasses.replace(config.train, **dict.fromkeys(auto, texts)))

    def needs(texts: int) -> int:
        candidate = with_chunks(texts)
        training = make_training(candidate, model, steps=1)
        batch = make_loader(candidate, plan, pairs).batch(0)
        del batch["plan_batch"]
        batch = sharding.shard_batch(training.mesh, batch)
        key = sharding.replicate(training.mesh, stream(0, "dropout"))
        return program_bytes(training.step.lower(training.state, batch, key).compile())

    _, queries, hard = plan.hard_negatives.shape
    return with_chunks(largest_chunk(needs, limit, queries * (2 + hard)))  # all queries and documents of a plan batch
