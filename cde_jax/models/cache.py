"""What the second stage reads of a context, and whether it is that of this model."""

from typing import NamedTuple

from jaxtyping import Array, Float

from cde_jax.models.attention import Prefix
from cde_jax.models.encoder import EncoderConfig


class ContextCache(NamedTuple):
    """The context as the second stage reads it; computed once per corpus, or once per batch in training."""

    slots: Float[Array, "*B P D"]
    prefix: Prefix | None  # isolated: keys and values, [layers, *B, P, H, d]


def check_cache(cache: ContextCache, encoder: EncoderConfig, *, isolated: bool) -> None:
    """ValueError for the cache of another model: one with another second stage or attention.

    Shapes tell most other models; a `retrieval.Context` carries a fingerprint of the weights, and tells all.
    """
    e, of_isolated = encoder, cache.prefix is not None
    if of_isolated != isolated:
        kinds = {True: "isolated", False: "joint"}
        raise ValueError(
            f"this context cache is of a model with {kinds[of_isolated]} attention, this one's is "
            f"{kinds[isolated]}: call prepare_context of this model"
        )
    got, expected = cache.slots.shape[-1:], (e.width,)
    if of_isolated:
        layers, *_, heads, head_dim = cache.prefix.keys.shape
        got, expected = (*got, layers, heads, head_dim), (e.width, e.layers, e.heads, e.head_dim)
    if got != expected:
        raise ValueError(
            f"this context cache is of another model: expected a width (and layers, heads, features of a head) of "
            f"{expected}, got {got}; call prepare_context of this model"
        )
