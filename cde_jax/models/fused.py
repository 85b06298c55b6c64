"""Attention as fused kernels, through `jax.nn.dot_product_attention`: logits are never in memory.

cuDNN's kernel knows the lengths of texts and one additive bias, of every text, token and key. What ours needs beyond
that is put in its inputs: the bias of slots in spare features of queries and keys, a shared prefix as a second call.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cde_jax.models.attention import Prefix

SPARE = 8  # features added to a head for the bias: cuDNN wants a multiple of 8


def fused(
    queries: Float[Array, "B T H d"],
    keys: Float[Array, "B S H d"],
    values: Float[Array, "B S H d"],
    mask: Bool[Array, "B S"],
    prefix: Prefix | None = None,
    bias: Float[Array, " H"] | None = None,
    slots: int = 0,
    implementation: str = "cudnn",
) -> Float[Array, "B T H d"]:
    """As `attention.attend`. A text whose mask has holes, or does not start with its first key, reads NaN.

    `implementation` "xla" computes the same by plain products, on any platform: it is what tests run.
    """
    count = mask.sum(axis=1, dtype=jnp.int32)
    padding_last = (mask == (jnp.arange(mask.shape[1]) < count[:, None])).all(axis=1)
    lengths = jnp.maximum(count, 1)  # a softmax over no key may be anything
    if prefix is None:
        read = _joined(queries, keys, values, lengths, bias, slots, implementation)
    elif prefix.keys.ndim == 4:
        read = _with_prefix(queries, keys, values, lengths, prefix, bias, implementation)
    else:
        read = _shared_prefix(queries, keys, values, lengths, prefix, bias, implementation)
    # Lengths would quietly say something else than such a mask.
    return jnp.where(padding_last[:, None, None, None], read, jnp.nan)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _shared_prefix(queries, keys, values, lengths, prefix, bias, implementation) -> Float[Array, "B T H d"]:
    """Where nothing is differentiated: two calls, the prefix as the keys of one long text, read in place.

    Their outputs are weighed by their log-sum-exps. JAX gives these in the inputs' type: float16 has three more bits
    than bfloat16. They have no gradient, so with one the keys are joined.
    """
    attention = partial(jax.nn.dot_product_attention, implementation=implementation, return_residual=True)
    dtype = queries.dtype
    finer = jnp.float16 if implementation == "cudnn" else jnp.float32
    queries, keys, values, *prefix = (x.astype(finer) for x in (queries, keys, values, *prefix))
    of_text, sum_text = attention(queries, keys, values, key_value_seq_lengths=lengths)
    long = queries.reshape(1, -1, *queries.shape[2:])  # [1, B·T, H, d]
    of_slots, sum_slots = attention(long, *(x[None] for x in prefix))
    of_slots, sum_slots = of_slots.reshape(queries.shape), sum_slots.reshape(queries.shape[:3])
    apart = sum_slots.astype(jnp.float32) - sum_text.astype(jnp.float32) + (0.0 if bias is None else bias)  # [B, T, H]
    share = jax.nn.sigmoid(apart)[..., None]
    return (share * of_slots + (1 - share) * of_text).astype(dtype)


def _shared_forward(queries, keys, values, lengths, prefix, bias, implementation):
    def joined(queries, keys, values, prefix, bias):
        own = Prefix(*(jnp.broadcast_to(x, (len(queries), *x.shape)) for x in prefix))
        return _with_prefix(queries, keys, values, lengths, own, bias, implementation)

    return jax.vjp(joined, queries, keys, values, prefix, bias)


def _shared_backward(implementation, pull, gradient):
    queries, keys, values, prefix, bias = pull(gradient)
    return queries, keys, values, None, prefix, bias


_shared_prefix.defvjp(_shared_forward, _shared_backward)


def _with_prefix(queries, keys, values, lengths, prefix, bias, implementation) -> Float[Array, "B T H d"]:
    """A prefix of each text's own, joined to its keys."""
    slots = prefix.keys.shape[1]
    keys, values = (
        jnp.concatenate([p.astype(x.dtype), x], axis=1) for p, x in zip(prefix, (keys, values), strict=True)
    )
    return _joined(queries, keys, values, lengths + slots, bias, slots, implementation, first=0)


def _joined(queries, keys, values, lengths, bias, slots, implementation, first=None) -> Float[Array, "B T H d"]:
    """One call; `bias` is on the logits from the queries from `first` on (None: `slots`) to the first `slots` keys."""
    width = queries.shape[-1]
    if bias is not None and slots:
        first = slots if first is None else first
        queries, keys, values = _carry_bias(queries, keys, values, bias, slots, first)
    read = jax.nn.dot_product_attention(
        queries,
        keys,
        values,
        scale=width**-0.5,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return read[..., :width]


def _carry_bias(queries, keys, values, bias, slots: int, first: int) -> tuple[Array, Array, Array]:
    """Spare features whose product is the bias, so that its gradient comes with that of the keys.

    In two parts, the bias as the compute type rounds it and what was left out: exact to 16 bits in bfloat16.
    """
    dtype, width = queries.dtype, queries.shape[-1]
    wanted = bias.astype(jnp.float32) * width**0.5  # the kernel scales it back
    rounded = wanted.astype(dtype)
    parts = jnp.stack([rounded, (wanted - rounded.astype(jnp.float32)).astype(dtype)], axis=-1)  # [H, 2]
    of_keys = jnp.where((jnp.arange(keys.shape[1]) < slots)[:, None, None], parts, 0)  # [S, H, 2]
    of_queries = (jnp.arange(queries.shape[1]) >= first).astype(dtype)[:, None, None] * jnp.ones_like(parts)
    return _widen(queries, of_queries), _widen(keys, of_keys), _widen(values, jnp.zeros_like(of_keys))


def _widen(x: Float[Array, "B S H d"], extra: Float[Array, "S H e"]) -> Float[Array, "B S H w"]:
    extra = jnp.pad(extra, ((0, 0), (0, 0), (0, SPARE - extra.shape[-1])))
    return jnp.concatenate([x, jnp.broadcast_to(extra, (len(x), *extra.shape))], axis=-1)
