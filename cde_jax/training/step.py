"""One training step: `train_step(state, batch, key) → (state, metrics)`, pure and jitted once."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from cde_jax.models.contextual import Biencoder, ContextualEncoder, map_chunks
from cde_jax.training import sharding
from cde_jax.training.accounting import step_flops
from cde_jax.training.losses import info_nce

_STREAMS = ("params", "context", "dropout", "data")


def stream(seed: int, name: str) -> jax.Array:
    """The key of a named random stream; every random number of a run comes from one seed."""
    return jax.random.fold_in(jax.random.key(seed), _STREAMS.index(name))


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What a step does besides the model: the loss, and how the batch is cut into chunks (0: not at all)."""

    temperature: float = 0.02
    sequence_dropout: float = 0.005
    share_negatives: bool = False
    query_chunk: int = 0
    document_chunk: int = 0
    context_chunk: int = 0
    first_stage_rate: float = 1.0  # 0: frozen, so nothing is computed for its gradient


class TrainState(NamedTuple):
    """All that a run carries from step to step."""

    step: Array  # int32 []: steps done
    params: nnx.State  # float32
    optimizer: Any


def make_optimizer(
    *,
    learning_rate: float,
    warmup_steps: int,
    steps: int,
    weight_decay: float,
    clip_norm: float,
    first_stage_rate: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW with linear warm-up and linear decay to zero (paper, appendix), and gradient clipping by global norm.

    Weight decay touches matrices only: norms, biases, the null embedding and the slot bias are left alone. The first
    stage learns at `first_stage_rate` of the learning rate.
    """
    warmup_steps = min(warmup_steps, steps)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(learning_rate / max(warmup_steps, 1), learning_rate, max(warmup_steps - 1, 1)),
            optax.linear_schedule(learning_rate, 0.0, max(steps - warmup_steps, 1)),
        ],
        [warmup_steps],
    )
    parts = [
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=_matrices),
    ]
    if first_stage_rate != 1:
        parts.append(optax.masked(optax.scale(first_stage_rate), _of_first_stage))
    return optax.chain(*parts), schedule


def _matrices(params: nnx.State) -> nnx.State:
    names = ("kernel", "embedding")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(getattr(entry, "key", None) in names for entry in path), params
    )


def _of_first_stage(params: nnx.State) -> nnx.State:
    return jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[0], "key", None) == "first_stage", params)


def init_state(model: nnx.Module, optimizer: optax.GradientTransformation) -> tuple[nnx.GraphDef, TrainState]:
    """Split a model into its graph and the state at step 0."""
    graph, params = nnx.split(model, nnx.Param)
    return graph, TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def embed_plan_batch(
    model: Biencoder | ContextualEncoder, batch: dict[str, Any], key: jax.Array, config: StepConfig
) -> tuple[Float[Array, "B D"], Float[Array, "N D"]]:
    """Vectors of one plan batch's queries and documents, which all read one context.

    The batch is plain, with arrays for queries, documents and context, which are cut as `config` says; or its texts
    are in chunks already ("texts", "context"). Both are the loader's.

    A context document is null where there is none, or by sequence dropout. One draw serves the whole plan batch, so
    that the slots' keys and values are computed once; the reference draws per text, at a rate (0.005) where both
    only make sure that the null embedding is trained.
    """
    context = None
    if isinstance(model, ContextualEncoder):
        context = model.prepare_context(*_context_vectors(model, batch, key, config))
    encode = partial(model.embed, context=context)
    if "texts" in batch:
        vectors, _ = map_ready_chunks(encode, **batch["texts"])
        count = batch["keep"].shape[0]
        return vectors[:count], vectors[count:]
    queries = map_chunks(encode, batch["query_ids"], batch["query_mask"], config.query_chunk)
    documents = map_chunks(encode, batch["document_ids"], batch["document_mask"], config.document_chunk)
    return queries, documents


def _context_vectors(
    model: ContextualEncoder, batch: dict[str, Any], key: jax.Array, config: StepConfig
) -> tuple[Float[Array, "J D"], Bool[Array, " J"] | None]:
    """The first stage's vectors of a plan batch's context documents, and which of them are not null slots."""
    if config.first_stage_rate:
        embed = model.embed_context
    else:  # no gradient reaches its parameters, so none is computed
        graph, params = nnx.split(model.first_stage)
        embed = nnx.merge(graph, jax.lax.stop_gradient(params)).embed
    if "context" in batch:
        vectors, present = map_ready_chunks(embed, **batch["context"])
    else:
        ids, mask = batch["context_ids"], batch["context_mask"]
        vectors, present = map_chunks(embed, ids, mask, config.context_chunk), mask.any(axis=1)
    if model.config.null_embedding:
        return vectors, present & ~jax.random.bernoulli(key, config.sequence_dropout, present.shape)
    return vectors, None


def map_ready_chunks(
    function: Callable[[Int[Array, "c L"], Bool[Array, "c L"]], Float[Array, "c D"]],
    ids: Sequence[Int[Array, "_ _ _"]],
    mask: Sequence[Bool[Array, "_ _ _"]],
    place: Int[Array, " m"],
) -> tuple[Float[Array, "m D"], Bool[Array, " m"]]:
    """`function(ids, mask)` over chunks of several lengths, each recomputed in the backward pass, empty ones skipped.

    ids, mask: [chunks, c, L] of each length L. Returns the vectors of the m texts, found at `place` among the rows of
    all chunks, and whether each has any token.
    """

    def one(chunk):
        shape = jax.eval_shape(function, *chunk)
        return jax.lax.cond(chunk[1].any(), function, lambda *_: jnp.zeros(shape.shape, shape.dtype), *chunk)

    vectors = [jax.lax.map(jax.checkpoint(one), chunks) for chunks in zip(ids, mask, strict=True)]
    filled = [x.any(axis=2).reshape(-1) for x in mask]
    vectors = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in vectors])
    return vectors[place], jnp.concatenate(filled)[place]


def count_tokens(batch: dict[str, Any], config: StepConfig) -> dict[str, Int[Array, ""]]:
    """How many tokens a step's texts have, and how many it computes with the padding: int32 scalars."""
    tokens, computed = 0, 0
    for name in ("texts", "context"):
        for mask in batch.get(name, {}).get("mask", ()):  # [G, chunks, c, L]
            tokens += mask.sum(dtype=jnp.int32)
            computed += mask.any(axis=(2, 3)).sum(dtype=jnp.int32) * math.prod(mask.shape[2:])
    for name in ("query", "document", "context"):
        if f"{name}_mask" in batch:
            mask = batch[f"{name}_mask"]  # [G, rows, L]
            batches, rows, length = mask.shape
            chunk = min(getattr(config, f"{name}_chunk"), rows) or 1
            tokens += mask.sum(dtype=jnp.int32)
            computed += batches * (rows + -rows % chunk) * length
    return {"tokens": jnp.asarray(tokens, jnp.int32), "computed_tokens": jnp.asarray(computed, jnp.int32)}


def count_flops(model: Biencoder | ContextualEncoder, batch: dict[str, Any], config: StepConfig) -> Float[Array, ""]:
    """Model FLOPs of a step (`accounting.step_flops`): they follow the texts' own lengths, so they differ by batch."""
    batches, queries, documents = batch["keep"].shape
    first_stage = getattr(model.config, "first_stage", None)
    context = text_sizes(batch, "context") if first_stage else None
    scores = batches * queries * documents * (batches if config.share_negatives else 1)
    frozen = config.first_stage_rate == 0
    flops = step_flops(model.config, text_sizes(batch, "texts"), context, scores=scores, first_stage_frozen=frozen)
    return jnp.asarray(flops, jnp.float32)


def text_sizes(batch: dict[str, Any], name: str) -> Int[Array, "G m"]:
    """Tokens of each of "texts" (queries, then documents) or "context", however the batch holds them; 0: none."""
    if name in batch:
        sizes = [x.sum(axis=3, dtype=jnp.int32).reshape(x.shape[0], -1) for x in batch[name]["mask"]]
        return jnp.take_along_axis(jnp.concatenate(sizes, axis=1), batch[name]["place"], axis=1)
    parts = ("query", "document") if name == "texts" else (name,)
    return jnp.concatenate([batch[f"{part}_mask"].sum(axis=2, dtype=jnp.int32) for part in parts], axis=1)


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: StepConfig,
    mesh: Mesh,
) -> Callable[[TrainState, dict[str, Any], jax.Array], tuple[TrainState, dict[str, Array]]]:
    """Build the step for `[G, …]` batches (`batching.loader`) on a mesh; `key` is the run's dropout stream.

    The state is donated. Metrics are float32 scalars, `losses`, one per plan batch [G], the int32 scalars of
    `count_tokens`, and `flops`.
    """
    device_loss = partial(_device_loss, graph=graph, config=config)

    def device_gradients(params, keys, batch):
        (_, metrics), gradients = jax.value_and_grad(device_loss, has_aux=True)(params, keys, batch)
        losses = sharding.gather_over_devices(metrics.pop("losses"))
        return *sharding.mean_over_devices((gradients, metrics)), losses

    gradients_of = sharding.on_each_device(mesh, device_gradients, split=2)

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: dict[str, Any], key: jax.Array):
        keys = jax.random.split(jax.random.fold_in(key, state.step), batch["keep"].shape[0])
        gradients, metrics, losses = gradients_of(state.params, keys, batch)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= count_tokens(batch, config) | {
            "flops": count_flops(nnx.merge(graph, params), batch, config),
            "loss": losses.mean(),
            "losses": losses,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return TrainState(state.step + 1, params, optimizer_state), metrics

    return train_step


def _device_loss(params, keys, batch, *, graph, config: StepConfig):
    """Mean loss of the plan batches on this device, with metrics."""
    model = nnx.merge(graph, params)
    queries, documents = jax.lax.map(lambda xs: embed_plan_batch(model, *xs, config), (batch, keys))
    keep = batch["keep"]
    if config.share_negatives:
        documents, keep = _share(documents, keep)
    losses, metrics = jax.vmap(partial(info_nce, temperature=config.temperature))(queries, documents, keep)
    return losses.mean(), jax.tree.map(jnp.mean, metrics) | {"losses": losses}


def _share(documents: Float[Array, "g N D"], keep) -> tuple[Float[Array, "g GN D"], Array]:
    """Every plan batch's columns become its own N documents, then those of all other plan batches of the step.

    The plan knows no false negatives across plan batches: all those columns count.
    """
    own, count, width = documents.shape
    everything = sharding.gather_over_devices(documents).reshape(-1, width)  # [G·N, D]
    starts = (sharding.first_row(own) + jnp.arange(own)) * count
    shared = jax.vmap(lambda start: jnp.roll(everything, -start, axis=0))(starts)
    others = jnp.ones((*keep.shape[:2], everything.shape[0] - count), bool)
    return shared, jnp.concatenate([keep, others], axis=-1)
