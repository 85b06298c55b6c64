"""Rotary position embeddings (Su et al., arXiv 2104.09864), in the forms that imported weights need."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
