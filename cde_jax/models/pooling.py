"""Hidden states of a text to one vector, or to several."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def mean_pool(hidden: Float[Array, "B L D"], mask: Bool[Array, "B L"]) -> Float[Array, "B D"]:
    """Mean of the hidden states where `mask` is True, in float32; zeros for a text without tokens."""
    weights = mask.astype(jnp.float32)
    total = jnp.einsum("bld,bl->bd", hidden.astype(jnp.float32), weights)
    return total / jnp.maximum(weights.sum(axis=1, keepdims=True), 1e-9)


def pool_pieces(hidden: Float[Array, "B L D"], mask: Bool[Array, "B L"], pieces: int) -> Float[Array, "B T D"]:
    """The reference's pooling into T vectors: T equal stretches of the padded text.

    A stretch without a real token takes the plain mean of all hidden states, padding included: that is a quirk of
    the reference which its weights were trained with.
    """
    short = -hidden.shape[1] % pieces
    hidden = jnp.pad(hidden.astype(jnp.float32), ((0, 0), (0, short), (0, 0)))
    weights = jnp.pad(mask.astype(jnp.float32), ((0, 0), (0, short)))
    everything = hidden.mean(axis=1, keepdims=True)  # [B, 1, D]
    hidden = hidden.reshape(hidden.shape[0], pieces, -1, hidden.shape[-1])  # [B, T, L/T, D]
    weights = weights.reshape(weights.shape[0], pieces, -1)  # [B, T, L/T]
    count = weights.sum(axis=-1)[..., None]
    pooled = jnp.einsum("btld,btl->btd", hidden, weights) / jnp.maximum(count, 1e-9)
    return jnp.where(count > 0, pooled, everything)
