"""Self-attention of texts that also read context slots.

Two patterns (ARCHITECTURE.md, "The model"):

- *joint*: slots and text are one sequence, everything attends to everything (paper, section 4);
- *isolated*: slots attend only among themselves, text attends to slots and text. The slots' keys and values
  are then a function of the context alone, so they come in here as a `prefix` that all texts of a batch share.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Prefix(NamedTuple):
    """Keys and values of the context slots in one layer (or, stacked on axis 0, in all of them)."""

    keys: Float[Array, "*batch P H d"]
    values: Float[Array, "*batch P H d"]


class Rotary(NamedTuple):
    """Cosines and sines of the rotary angles; the axis before the last is 1, or H where heads differ."""

    cos: Float[Array, "*batch S h r"]
    sin: Float[Array, "*batch S h r"]


def rotary(
    positions: Int[Array, "*batch S"],
    *,
    head_dim: int,
    heads: int,
    base: float,
    fraction: float = 1.0,
    axis: str = "sequence",
) -> Rotary:
    """Angles of rotary position embeddings (Su et al., arXiv 2104.09864) in float32.

    A position of −1 means "no position": that token is not rotated. With `axis="heads"` a rotated token turns by
    the index of the *head*, which is what the file shipped with cde-small-v1 does (its token order is then lost).
    """
    dim = int(head_dim * fraction)
    frequencies = 1.0 / base ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    if axis == "heads":
        steps = jnp.where(positions[..., None] < 0, 0, jnp.arange(heads))  # [..., S, H]
    else:
        steps = jnp.maximum(positions, 0)[..., None]  # [..., S, 1]
    angles = steps[..., None].astype(jnp.float32) * frequencies
    return Rotary(jnp.cos(angles), jnp.sin(angles))


def rotate(
    x: Float[Array, "*batch S H d"], angles: Rotary, *, interleaved: bool = False
) -> Float[Array, "*batch S H d"]:
    """Turn the first 2r features of each head; halves layout (GPT-NeoX), or interleaved pairs (GPT-J)."""
    cos, sin = angles
    turned, rest = jnp.split(x.astype(jnp.float32), [2 * cos.shape[-1]], axis=-1)
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turned.shape)
    else:
        a, b = jnp.split(turned, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([turned, rest], axis=-1).astype(x.dtype)


def attend(
    queries: Float[Array, "B T H d"],
    keys: Float[Array, "B S H d"],
    values: Float[Array, "B S H d"],
    mask: Bool[Array, "B S"],
    *,
    prefix: Prefix | None = None,
    bias: Float[Array, " H"] | None = None,
    slots: int = 0,
) -> Float[Array, "B T H d"]:
    """Softmax attention in float32 over `prefix` (if any) and the keys whose `mask` is True.

    Args:
      prefix: keys and values shared by the batch, [P, H, d], or one set a text, [B, P, H, d]. Read in place:
        never repeated B times in memory.
      bias: added to the logits from text to slots: to all of `prefix`, or, in a joint sequence, from the tokens
        after the first `slots` to the first `slots`.
    """
    queries = queries * queries.shape[-1] ** -0.5
    logits = jnp.einsum("bthd,bshd->bhts", queries, keys, preferred_element_type=jnp.float32)
    if slots and bias is not None:
        rows = jnp.arange(queries.shape[1]) >= slots
        columns = jnp.arange(keys.shape[1]) < slots
        logits += jnp.where(rows[:, None] & columns, bias[:, None, None], 0.0)
    logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
    if prefix is None:
        weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
        return jnp.einsum("bhts,bshd->bthd", weights, values)
    return _attend_with_prefix(queries, logits, values, prefix, bias)


def _attend_with_prefix(queries, logits, values, prefix: Prefix, bias) -> Float[Array, "B T H d"]:
    """Softmax over two sets of keys without joining them.

    A shared prefix is one matrix product per head over all texts' tokens; joining its logits to the text's would copy
    both and cost six times as much on CPU (measured at B=128, T=48, P=40).
    """
    p = "p" if prefix.keys.ndim == 3 else "bp"
    of_prefix = jnp.einsum(f"bthd,{p}hd->hbtp", queries, prefix.keys, preferred_element_type=jnp.float32)
    if bias is not None:
        of_prefix += bias[:, None, None, None]
    of_text = logits.transpose(1, 0, 2, 3)  # [H, B, T, S]
    highest = jnp.maximum(of_prefix.max(axis=-1), of_text.max(axis=-1))
    highest = jax.lax.stop_gradient(highest)[..., None]
    of_prefix, of_text = jnp.exp(of_prefix - highest), jnp.exp(of_text - highest)
    total = of_prefix.sum(axis=-1) + of_text.sum(axis=-1)  # [H, B, T]
    read = jnp.einsum(f"hbtp,{p}hd->hbtd", of_prefix.astype(values.dtype), prefix.values)
    read += jnp.einsum("hbts,bshd->hbtd", of_text.astype(values.dtype), values)
    return (read / total[..., None].astype(values.dtype)).transpose(1, 2, 0, 3)
