"""What a run is made of, by its configuration: the model, the loader of its batches, the step that trains.

All of it runs where only JAX is installed.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from cde_jax.batching.loader import Loader
from cde_jax.batching.plan import BatchPlan
from cde_jax.config import Config, Model, affected, flatten
from cde_jax.data.files import fingerprint
from cde_jax.data.store import Store
from cde_jax.data.tokens import Tokenizer
from cde_jax.interop.modules import TextSettings
from cde_jax.interop.read import load_encoder, open_encoder
from cde_jax.models.contextual import Biencoder, BiencoderConfig, ContextualConfig, ContextualEncoder
from cde_jax.models.encoder import EncoderConfig
from cde_jax.retrieval.embedder import Embedder
from cde_jax.stages import workdir as work
from cde_jax.training import sharding
from cde_jax.training.checkpoint import Checkpoints
from cde_jax.training.step import TrainState, init_state, make_optimizer, make_train_step, stream

USEFUL_POSITIONS = 8192  # of a chunk that keeps an accelerator busy
Encoder = Biencoder | ContextualEncoder


class Training(NamedTuple):
    """What trains: `step(state, batch, key) → (state, metrics)` on `mesh`, to be run `steps` times."""

    mesh: jax.sharding.Mesh
    graph: nnx.GraphDef
    state: TrainState
    step: Any
    steps: int


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


def check_initial_encoders(config: Config, vocab_size: int | None = None) -> None:
    """Raises ValueError for encoders of `model.init` that are not there or of another shape than the config's model.

    vocab_size: of the tokenizer, where it is known.
    """
    m, d = config.model, config.data
    for stage, name in initial_encoders(m).items():
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


def initial_encoders(model: Model) -> dict[str, str]:
    """{stage: the pretrained encoder it starts from}."""
    stages = ("second_stage", "first_stage") if model.kind == "contextual" else ("second_stage",)
    return {stage: name for stage in stages if (name := getattr(model.init, stage))}


def build_model(config: Config, vocab_size: int) -> Encoder:
    """The model with random parameters from the run's seed; jitted, so that a large one is made in seconds."""
    shape = _shape(config, vocab_size)
    return nnx.jit(lambda key: shape.build(rngs=nnx.Rngs(params=key)))(stream(config.seed, "params"))


def initial_model(config: Config, vocab_size: int) -> Encoder:
    """Random parameters, then the pretrained encoders that `model.init` names."""
    check_initial_encoders(config, vocab_size)
    model = build_model(config, vocab_size)
    for stage, name in initial_encoders(config.model).items():
        encoder = model.encoder if stage == "second_stage" else model.first_stage.encoder
        nnx.update(encoder, nnx.state(load_encoder(name, config.model.init.layers or None), nnx.Param))
    return model


def restore_model(config: Config, vocab_size: int, checkpoints: Checkpoints, step: int) -> Encoder:
    """The model of a checkpoint: only its parameters are read, on any number of devices."""
    graph, params = nnx.split(abstract_model(config, vocab_size), nnx.Param)
    return nnx.merge(graph, checkpoints.restore_weights(step, params))


def abstract_model(config: Config, vocab_size: int) -> Encoder:
    """The model's shapes alone."""
    shape = _shape(config, vocab_size)
    return nnx.eval_shape(lambda: shape.build(rngs=nnx.Rngs(0)))


def _shape(config: Config, vocab_size: int) -> BiencoderConfig | ContextualConfig:
    shape = model_config(config.model, vocab_size, compute_dtype(config))
    return dataclasses.replace(shape, matryoshka=config.train.matryoshka)


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
    graph, params = nnx.split(model, nnx.Param)
    # Split first: the optimiser's state, twice as large, is then made where it stays.
    params = sharding.shard_state(mesh, params)
    state = sharding.make_state(mesh, lambda params: init_state(nnx.merge(graph, params), optimizer, t)[1], params)
    step = make_train_step(graph, optimizer, schedule, t, mesh)
    return Training(mesh, graph, state, step, steps)
