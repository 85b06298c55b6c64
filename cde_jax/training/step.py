"""One training step: `train_step(state, batch, key) → (state, metrics)`, pure and jitted once.

A batch is a dict of arrays with the axis G (plan batches of the step) first, as `batching.loader` makes it:
  "texts": the B queries and then the N documents of each plan batch, in chunks of c texts at a few padded lengths ℓ:
    "ids" int32 and "mask" bool, one array [G, chunks, c, ℓ] per ℓ, and "place" int32 [G, B + N], the row of each text.
    `chunks` is a multiple of the number of devices that share a plan batch;
  "context": the same of the J context documents, "place" [G, J]; a biencoder does without;
  "keep": bool [G, B, N], False where a document is no negative of a query.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from cde_jax.config import TEMPERATURES, Train
from cde_jax.models.contextual import Biencoder, ContextualEncoder
from cde_jax.training import sharding
from cde_jax.training.accounting import recomputes_chunks, step_counts
from cde_jax.training.losses import matryoshka_info_nce

_STREAMS = ("params", "context", "dropout", "data")

Batch = dict[str, Any]


def stream(seed: int, name: str) -> Key[Array, ""]:
    """The key of a named random stream; every random number of a run comes from one seed."""
    return jax.random.fold_in(jax.random.key(seed), _STREAMS.index(name))


class TrainState(NamedTuple):
    """What a run carries from step to step."""

    step: Int[Array, ""]  # steps done
    params: nnx.State  # float32
    optimizer: Any
    log_temperature: Float[Array, ""] | None = None  # where `train.learn_temperature`
    average: nnx.State | None = None  # of the parameters over the steps, where `train.ema_decay` > 0

    @property
    def weights(self) -> nnx.State:
        """The parameters that are evaluated and exported: the average, where there is one."""
        return self.params if self.average is None else self.average

    def temperature(self, train: Train) -> float:
        """τ now."""
        return train.temperature if self.log_temperature is None else math.exp(self.log_temperature)


def init_state(
    model: nnx.Module, optimizer: optax.GradientTransformation, train: Train | None = None
) -> tuple[nnx.GraphDef, TrainState]:
    """Split a model into its graph and the state at step 0; `train` None: the defaults."""
    train = train or Train()
    graph, params = nnx.split(model, nnx.Param)
    log_temperature = jnp.log(jnp.float32(train.temperature)) if train.learn_temperature else None
    average = jax.tree.map(jnp.copy, params) if train.ema_decay else None  # no shared arrays: a step donates its state
    optimizer_state = optimizer.init(_with_temperature(params, log_temperature))
    return graph, TrainState(jnp.zeros((), jnp.int32), params, optimizer_state, log_temperature, average)


def _with_temperature(params: nnx.State, log_temperature: Float[Array, ""] | None) -> nnx.State:
    """What the optimiser updates."""
    if log_temperature is None:
        return params
    return nnx.merge_state(params, nnx.State({"log_temperature": log_temperature}))


# Of each optimiser: its function, and its names of (β₁, β₂, ε). Muon orthogonalises matrices, its betas are those of
# Adam for everything else; an RMS of 0.2 makes its updates as large as Adam's (Liu et al., arXiv 2502.16982).
_OPTIMIZERS = {
    "adamw": (optax.adamw, ("b1", "b2", "eps")),
    "nadamw": (optax.nadamw, ("b1", "b2", "eps")),
    "lamb": (optax.lamb, ("b1", "b2", "eps")),
    "lion": (optax.lion, ("b1", "b2")),
    "adafactor": (optax.adafactor, ()),
    "muon": (partial(optax.contrib.muon, consistent_rms=0.2), ("adam_b1", "adam_b2", "eps")),
}


def make_optimizer(train: Train, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Gradient clipping by global norm, then `train.optimizer`, by default AdamW; and its schedule of learning rates.

    The rate warms up linearly and falls to zero, by default linearly (paper, appendix). Weight decay, decoupled and
    times the rate, applies to matrices only: norms, biases, the null embedding, the slot bias and the temperature have
    none. The updates of the first stage are scaled by `first_stage_rate`. `steps` is the length of the run; a longer
    warm-up is cut to it.
    """
    warmup, peak = min(train.warmup_steps, steps), train.learning_rate
    warm, falling = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1)), max(steps - warmup, 1)
    fall = {
        "linear": optax.linear_schedule(peak, 0.0, falling),
        "cosine": optax.cosine_decay_schedule(peak, falling),
    }
    schedule = optax.join_schedules([warm, fall[train.schedule]], [warmup])
    matrices = partial(nnx.map_state, lambda path, _: path[-1] in ("kernel", "embedding"))
    first_stage = partial(nnx.map_state, lambda path, _: path[0] == "first_stage")
    function, names = _OPTIMIZERS[train.optimizer]
    chosen = dict(zip(names[:2], train.betas, strict=False))  # no betas: optax's own
    if train.epsilon is not None:
        chosen[names[2]] = train.epsilon
    parts = [optax.clip_by_global_norm(train.clip_norm)]
    if train.optimizer in ("adafactor", "muon"):  # whose own weight decay is not that of AdamW
        if train.optimizer == "muon":
            chosen["muon_weight_dimension_numbers"] = _muon_matrices
        decay = optax.add_decayed_weights(lambda step: -train.weight_decay * schedule(step), matrices)
        parts += [function(schedule, **chosen), decay]
    else:
        parts.append(function(schedule, **chosen, weight_decay=train.weight_decay, mask=matrices))
    if train.first_stage_rate != 1:
        parts.append(optax.masked(optax.scale(train.first_stage_rate), first_stage))
    return optax.chain(*parts), schedule


def _muon_matrices(params: nnx.State) -> nnx.State:
    """The kernels [*layers, in, out], each layer a matrix by itself; all other parameters are left to Adam."""
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return nnx.map_state(lambda path, _: matrix if path[-1] == "kernel" else None, params)


def embed_plan_batches(
    model: Biencoder | ContextualEncoder,
    batch: Batch,
    keys: Key[Array, " g"],
    train: Train,
    gather: Callable[[Any], Any] = lambda rows: rows,
) -> tuple[Float[Array, "g B D"], Float[Array, "g N D"]]:
    """Vectors of the queries and documents of g plan batches, each with its own context.

    Where several devices share a plan batch, `batch` holds a device's part of the chunks, and `gather` concatenates
    what all of them encoded along the chunks' axis: outside of the loops over chunks and plan batches.

    A missing context document is null, and so is one dropped by sequence dropout. One draw serves the whole plan batch,
    so that the slots' keys and values are computed once; the reference draws per text, at the same rate (0.005).
    Context dropout makes all of them null.
    """
    texts, contexts, recompute = batch["texts"], None, recomputes_chunks(model.config, batch, train)
    if isinstance(model, ContextualEncoder):
        embed = model.embed_context
        if not train.first_stage_rate:  # frozen: no gradient is computed
            graph, params = nnx.split(model.first_stage)
            embed = nnx.merge(graph, jax.lax.stop_gradient(params)).embed
        held = batch["context"]
        vectors = jax.lax.map(lambda chunks: encode_chunks(embed, *chunks, recompute), (held["ids"], held["mask"]))
        present = tuple(mask.any(axis=-1) for mask in held["mask"])
        contexts = tuple(_at(gather(rows), held["place"]) for rows in (vectors, present))

    def encode_texts(plan_batch):
        ids, mask, key, contexts = plan_batch
        context = None
        if contexts is not None:
            vectors, present = contexts
            present &= ~jax.random.bernoulli(key, train.sequence_dropout, present.shape)
            if train.context_dropout:
                present &= ~jax.random.bernoulli(jax.random.fold_in(key, 1), train.context_dropout)
            context = model.prepare_context(vectors, present if model.config.null_embedding else None)
            # Every chunk adds to the gradient of its keys and values: sums in bfloat16 would lose bits with each.
            context = jax.tree.map(lambda x: x.astype(jnp.float32), context)
        return encode_chunks(partial(model.embed, context=context), ids, mask, recompute)

    rows = jax.lax.map(encode_texts, (texts["ids"], texts["mask"], keys, contexts))
    vectors = _at(gather(rows), texts["place"])
    queries = batch["keep"].shape[1]
    return vectors[:, :queries], vectors[:, queries:]


def encode_chunks(
    encode: Callable[[Int[Array, "c L"], Bool[Array, "c L"]], Float[Array, "c D"]],
    ids: Sequence[Int[Array, "_ _ _"]],
    mask: Sequence[Bool[Array, "_ _ _"]],
    recompute: bool,
) -> tuple[Float[Array, "chunks _ D"], ...]:
    """Vectors of the texts in chunks: of one array [chunks, c, ℓ] of ids and mask per length ℓ, one [chunks, c, D].

    With `recompute` each chunk is computed again in the backward pass, so only its inputs and vectors are kept and
    activation memory does not grow with their number: what GradCache (Gao et al., arXiv 2101.06983) does, as a JAX
    transformation. Chunks without a token are skipped.
    """

    def chunk_vectors(chunk):
        vectors = jax.eval_shape(encode, *chunk)
        return jax.lax.cond(chunk[1].any(), encode, lambda *_: jnp.zeros(vectors.shape, vectors.dtype), *chunk)

    if recompute:
        chunk_vectors = jax.checkpoint(chunk_vectors)
    return tuple(jax.lax.map(chunk_vectors, chunks) for chunks in zip(ids, mask, strict=True))


def _at(rows: Sequence[Shaped[Array, "g _ _ *rest"]], place: Int[Array, "g m"]) -> Shaped[Array, "g m *rest"]:
    """What the chunks of all lengths hold of each text: [g, chunks, c, *rest] per length, and the rows' numbers."""
    rows = jnp.concatenate([x.reshape(len(x), -1, *x.shape[3:]) for x in rows], axis=1)  # [g, Σ chunks·c, *rest]
    return jax.vmap(lambda rows, place: rows[place])(rows, place)


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    train: Train,
    mesh: Mesh,
) -> Callable[[TrainState, Batch, Key[Array, ""]], tuple[TrainState, dict[str, Array]]]:
    """Build the step on a mesh; `key` is the run's dropout stream.

    The state is donated, and stays sharded as `sharding.state_shardings` says. Metrics are float32 scalars, `losses`,
    one per plan batch [G], and what `step_counts` counts.
    """

    def loss(trained: tuple[nnx.State, Any], keys: Key[Array, " g"], batch: Batch):
        """Mean loss of the g plan batches of a device, with metrics; `trained`: parameters, and log τ or None."""
        params, log_temperature = trained
        model, keep = nnx.merge(graph, params), batch["keep"]
        temperature = train.temperature if log_temperature is None else jnp.exp(log_temperature)
        queries, documents = embed_plan_batches(model, batch, keys, train, sharding.gather_members)
        if train.share_negatives:
            documents, keep = _all_documents(documents, keep)
        contrast = partial(matryoshka_info_nce, temperature=temperature, dimensions=train.matryoshka)
        losses, metrics = jax.vmap(contrast)(queries, documents, keep)
        return losses.mean(), {"losses": losses} | jax.tree.map(jnp.mean, metrics)

    def gradients_of(trained: tuple[nnx.State, Any], keys: Key[Array, " g"], batch: Batch):
        gradients, metrics = jax.grad(loss, has_aux=True)(trained, keys, batch)
        return gradients, metrics | {"losses": sharding.gather_groups(metrics["losses"])}

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: Batch, key: Key[Array, ""]):
        keys = jax.random.split(jax.random.fold_in(key, state.step), batch["keep"].shape[0])
        trained = state.params, state.log_temperature
        gradients, metrics = sharding.mean_gradient(mesh, gradients_of, trained, keys, batch)
        gradients, trained = _with_temperature(*gradients), _with_temperature(*trained)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, trained)
        trained = optax.apply_updates(trained, updates)
        if state.log_temperature is not None:
            metrics["temperature"] = jnp.exp(state.log_temperature)
        metrics |= step_counts(nnx.merge(graph, state.params).config, batch, train) | {
            "loss": metrics["losses"].mean(),
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        state = _next_state(state, trained, optimizer_state, train.ema_decay)
        return sharding.keep_sharding(mesh, state), sharding.copied(mesh, metrics)

    return train_step


def _next_state(state: TrainState, trained: nnx.State, optimizer_state: Any, ema_decay: float) -> TrainState:
    """The state after an update: the temperature within its range, the average one step further.

    The average's decay grows to `ema_decay` as min(decay, (1 + step) / (10 + step)), so that it forgets the first
    parameters (TensorFlow's ExponentialMovingAverage with `num_updates`).
    """
    params, temperature, average = trained, None, None
    if state.log_temperature is not None:
        params, temperature = nnx.split_state(trained, nnx.Param, ...)
        temperature = jnp.clip(temperature["log_temperature"], *map(math.log, TEMPERATURES))
    if state.average is not None:
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        average = optax.incremental_update(params, state.average, 1 - decay)
    return TrainState(state.step + 1, params, optimizer_state, temperature, average)


def _all_documents(
    documents: Float[Array, "g N D"], keep: Bool[Array, "g B N"]
) -> tuple[Float[Array, "g GN D"], Bool[Array, "g B GN"]]:
    """The columns of each plan batch: its own N documents, then those of all other plan batches of the step.

    The plan has no false negatives across plan batches: all those columns count.
    """
    batches, count, width = documents.shape
    gathered = sharding.gather_groups(documents).reshape(-1, width)  # [G·N, D]
    starts = (sharding.first_row(batches) + jnp.arange(batches)) * count
    columns = jax.vmap(lambda start: jnp.roll(gathered, -start, axis=0))(starts)
    others = jnp.ones((*keep.shape[:2], gathered.shape[0] - count), bool)
    return columns, jnp.concatenate([keep, others], axis=-1)
