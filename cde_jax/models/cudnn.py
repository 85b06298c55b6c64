"""Attention by cuDNN's fused kernel, over texts and over context slots in a call each, merged by log-sum-exp.

A softmax over both sets of keys is the mean of the softmaxes over each, weighted by their sums of exponentials. Given
the merged output and log-sum-exp, the kernel's backward pass over one set gives its share of the whole gradient, as in
ring attention (Liu et al., arXiv 2310.01889). So keys are not concatenated, slots that all texts share are not copied
for each, and a bias on the slots is a number added to their log-sum-exp, in float32, not a tensor of logits.

What the kernel needs: bfloat16; heads of at most 128 features, a multiple of 8; padding at the end of texts, as
lengths. Numbers of texts, queries and keys are free.

The calls are those of JAX's module for cuDNN, which is private, and the same in JAX 0.10.2 to 0.11.1. The public
`jax.nn.dot_product_attention` gives the log-sum-exp in bfloat16, ignores its cotangent, and cannot be compiled where
arrays of a program are on meshes of different axes, as batch and state of a training step are.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Array, Float, Int, Shaped

from cde_jax.models.attention import Bias, Keys, Queries

Lengths = Int[Array, " B"]
SlotKeys = Float[Array, "P H d"] | Float[Array, "B P H d"]
LogSums = Float[Array, "B T H"]


@jax.custom_vjp
def attend_parts(
    queries: Queries,
    keys: Keys,
    values: Keys,
    lengths: Lengths,
    slot_keys: SlotKeys | None = None,
    slot_values: SlotKeys | None = None,
    bias: Bias | None = None,
) -> Queries:
    """Softmax attention over the first `lengths` keys of each text and over all slots, whose logits get `bias` added.

    The gradient of the slots has their dtype; float32 ones are rounded to the dtype of `queries` for the kernel.
    """
    return _forward(queries, keys, values, lengths, slot_keys, slot_values, bias)[0]


def _forward(*given):
    queries, keys, values, lengths, slot_keys, slot_values, bias = given
    output, total = part(queries, keys, values, lengths)
    if slot_keys is None:
        return output, (given, output, total, None)
    own, own_total = output.astype(jnp.float32), total
    slots, slot_total = part(_rows(queries, slot_keys), *_cast(queries.dtype, slot_keys, slot_values), None)
    slots, slot_total = slots.reshape(queries.shape), slot_total.reshape(total.shape)
    slot_total += 0.0 if bias is None else bias
    total = jnp.logaddexp(own_total, slot_total)
    weight = jnp.exp(slot_total - total)[..., None]  # of the slots, [B, T, H, 1]
    output = (own + weight * (slots - own)).astype(queries.dtype)
    return output, (given, output, total, None if bias is None else (slots, weight))


def _backward(residuals, cotangent):
    (queries, keys, values, lengths, slot_keys, slot_values, bias), output, total, of_bias = residuals
    of_queries, *of_text = part_backward(queries, keys, values, lengths, output, total, cotangent)
    if slot_keys is None:
        return of_queries, *of_text, None, None, None, None
    rows = [_rows(x, slot_keys) for x in (queries, output, total - (0.0 if bias is None else bias), cotangent)]
    more, *of_slots = part_backward(rows[0], *_cast(queries.dtype, slot_keys, slot_values), None, *rows[1:])
    of_queries = (of_queries.astype(jnp.float32) + more.reshape(queries.shape)).astype(queries.dtype)
    of_slots = [x.reshape(slot_keys.shape).astype(slot_keys.dtype) for x in of_slots]
    if bias is not None:
        slots, weight = of_bias
        pull = cotangent.astype(jnp.float32) * (slots.astype(jnp.float32) - output)
        of_bias = (weight * pull).sum(axis=(0, 1, 3)).astype(bias.dtype)
    return of_queries, *of_text, None, *of_slots, of_bias


attend_parts.defvjp(_forward, _backward)


def _rows(x: Shaped[Array, "B T *rest"], slot_keys: SlotKeys) -> Shaped[Array, "b t *rest"]:
    """To slots of their own texts stay apart; to shared slots the tokens of all texts are the queries of one."""
    return x if slot_keys.ndim == 4 else x.reshape(1, -1, *x.shape[2:])


def _cast(dtype: jnp.dtype, *slots: SlotKeys) -> list[Float[Array, "b P H d"]]:
    return [x.astype(dtype).reshape(-1, *x.shape[-3:]) for x in slots]


def _primitive(name: str, abstract: Callable, lowering: Callable) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, lowering, platform="cuda")
    return primitive


_forward_p = _primitive(
    "cudnn_attention_forward",
    fused._dot_product_attention_fwd_abstract,
    fused._dot_product_attention_fwd_cuda_lowering,
)
_backward_p = _primitive(
    "cudnn_attention_backward",
    fused._dot_product_attention_bwd_abstract,
    fused._dot_product_attention_bwd_cuda_lowering,
)


def part(queries: Queries, keys: Keys, values: Keys, lengths: Lengths | None) -> tuple[Queries, LogSums]:
    """Attention to the first `lengths` keys (None: to all), and the log of the sum of its exponentials, in float32."""
    settings, (none, *lengths) = _settings(queries, lengths)
    layout, version = fused.AttentionLayout.BTNH.value, fused.check_cudnn_version()
    fused.check_is_flash_attention(queries, keys, values, layout, version, has_bias=False, is_training=True)
    output, total = _forward_p.bind(queries, keys, values, none, *lengths, *4 * [none], is_training=True, **settings)
    return output, total.transpose(0, 2, 1)  # [B, H, T] → [B, T, H]


def part_backward(
    queries: Queries,
    keys: Keys,
    values: Keys,
    lengths: Lengths | None,
    output: Queries,
    total: LogSums,
    cotangent: Queries,
) -> tuple[Queries, Keys, Keys]:
    """Gradients of queries, keys and values, where `output` and `total` are of all keys, these and others."""
    settings, (none, *lengths) = _settings(queries, lengths)
    results = total.transpose(0, 2, 1), output, cotangent
    return tuple(_backward_p.bind(queries, keys, values, none, *lengths, *4 * [none], *results, **settings))


def _settings(queries: Queries, lengths: Lengths | None) -> tuple[dict[str, Any], tuple[jax.Array, ...]]:
    """Parameters of the calls (no dropout, bias, window), what stands for no array, lengths of queries and of keys."""
    none = jnp.zeros(0, queries.dtype)
    queried = none if lengths is None else jnp.full(lengths.shape, queries.shape[1], jnp.int32)
    return {
        "scale": queries.shape[-1] ** -0.5,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": fused.MaskType.NO_MASK if lengths is None else fused.MaskType.PADDING,
        "layout": fused.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }, (none, queried, none if lengths is None else lengths)
