"""The parts of a run from its configuration: model, loader, step. They run where only JAX is installed."""

import dataclasses
from typing import Any, NamedTuple

import jax
from flax import nnx

from cde_jax.batching.loader import Loader
from cde_jax.batching.plan import BatchPlan
from cde_jax.config import AUTO, Config, Model
from cde_jax.data.store import Store
from cde_jax.models.contextual import Biencoder, BiencoderConfig, ContextualConfig, ContextualEncoder
from cde_jax.models.encoder import EncoderConfig
from cde_jax.training import sharding
from cde_jax.training.memory import device_limit, largest_chunk, program_bytes
from cde_jax.training.step import StepConfig, TrainState, init_state, make_optimizer, make_train_step, stream

CHUNKS = ("query_chunk", "document_chunk", "context_chunk")


class Training(NamedTuple):
    """What trains: `step(state, batch, key) → (state, metrics)` on `mesh`, to be run `steps` times."""

    mesh: jax.sharding.Mesh
    graph: nnx.GraphDef
    state: TrainState
    step: Any
    steps: int


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
        habits = {"positions": "learned", "activation": "gelu", "attention_bias": True, "mlp_bias": (True, True)}
        return EncoderConfig(**shape, **habits)
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
    kind = Biencoder if isinstance(shape, BiencoderConfig) else ContextualEncoder
    return nnx.jit(lambda key: kind(shape, rngs=nnx.Rngs(params=key)))(stream(config.seed, "params"))


def compute_dtype(config: Config) -> str:
    """`model.dtype`, "auto" by the platform: float32 on CPU, bfloat16 on accelerators."""
    if config.model.dtype == "auto":
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return config.model.dtype


def make_loader(config: Config, plan: BatchPlan, pairs: Store) -> Loader:
    """The loader of a run's batches; chunks must be numbers (`fit_chunks`)."""
    t, contextual = config.train, config.model.kind == "contextual"
    return Loader(
        plan,
        pairs,
        batches_per_step=t.batches_per_step,
        context_size=config.model.context_size if contextual else 0,
        context_source=config.batching.context_source,
        query_length=config.data.query_length,
        document_length=config.data.document_length,
        seed=config.seed,
        text_lengths=t.text_lengths,
        chunk_tokens=t.document_chunk * config.data.document_length or _chunk_tokens(),
        context_chunk_tokens=t.context_chunk * config.data.document_length or _chunk_tokens(),
    )


def make_training(config: Config, model: Biencoder | ContextualEncoder, plan: BatchPlan) -> Training:
    """The step of a run and its state at step 0. Raises ValueError where the plan is too short, or devices too few."""
    t, mesh = config.train, sharding.make_mesh(config.train.devices)
    sharding.check_divides(mesh, t.batches_per_step)
    steps = t.steps or len(plan) // t.batches_per_step
    if steps < 1:
        raise ValueError(
            f"the plan has {len(plan)} batches, fewer than the {t.batches_per_step} of one step: lower "
            f"train.batches_per_step or batching.batch_size, raise batching.epochs, or give more data"
        )
    optimizer, schedule = make_optimizer(
        learning_rate=t.learning_rate,
        warmup_steps=t.warmup_steps,
        steps=steps,
        weight_decay=t.weight_decay,
        clip_norm=t.clip_norm,
        first_stage_rate=t.first_stage_rate,
    )
    graph, state = init_state(model, optimizer)
    of_step = {field.name: getattr(t, field.name) for field in dataclasses.fields(StepConfig)}
    step = make_train_step(graph, optimizer, schedule, StepConfig(**of_step), mesh)
    return Training(mesh, graph, sharding.replicate(mesh, state), step, steps)


def fit_chunks(config: Config, model: Biencoder | ContextualEncoder, plan: BatchPlan, pairs: Store) -> Config:
    """`config` with a number for each chunk size of −1: the largest whose step fits the device's memory.

    All of them become one number of texts. Compiles the step for ever smaller chunks until one fits. Raises
    ValueError where not even single texts fit, and where nobody says how much memory there is.
    """
    found = [name for name in CHUNKS if getattr(config.train, name) == AUTO]
    if not found:
        return config
    limit = device_limit(jax.devices()[0], config.train.memory_gib)

    def with_chunks(texts: int) -> Config:
        return dataclasses.replace(config, train=dataclasses.replace(config.train, **dict.fromkeys(found, texts)))

    def needs(texts: int) -> int:
        tried = with_chunks(texts)
        training = make_training(tried, model, plan)
        batch = make_loader(tried, plan, pairs).batch(0)
        del batch["plan_batch"]
        batch = sharding.shard_batch(training.mesh, batch)
        key = sharding.replicate(training.mesh, stream(0, "dropout"))
        return program_bytes(training.step.lower(training.state, batch, key).compile())

    _, queries, hard = plan.hard_negatives.shape
    together = config.train.text_lengths > 1  # queries and documents in the same chunks
    return with_chunks(largest_chunk(needs, limit, queries * (1 + hard + together)))


def _chunk_tokens() -> int:
    """Tokens of a chunk where the config gives none: what keeps an accelerator busy; on a CPU the loader's choice."""
    return 0 if jax.default_backend() == "cpu" else 8192
