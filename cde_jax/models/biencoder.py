"""The plain biencoder: text to vector, without context. With a head it is the first stage of a contextual encoder."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from cde_jax.models.encoder import EncoderConfig, Ids, Mask, as_tokens, linear


@dataclasses.dataclass(frozen=True)
class BiencoderConfig:
    """An encoder, how its hidden states become one vector, and whether an MLP follows."""

    encoder: EncoderConfig
    pooling: Literal["mean", "cls"] = "mean"
    head: bool = False  # Linear, GELU, Linear after pooling: the first stage has it
    output_width: int | None = None  # of the head; None: the encoder's width
    residual: bool = False  # the head's input is added to its output, as in the output projection of a second stage

    def __post_init__(self):
        if self.residual and not (self.head and self.output_width in (None, self.encoder.width)):
            raise ValueError(
                f"a residual needs a head as wide as the encoder ({self.encoder.width}), got head={self.head} and "
                f"output_width={self.output_width}"
            )

    @property
    def vectors_per_text(self) -> int:
        """How many vectors a text becomes."""
        return 1

    def build(self, *, rngs: nnx.Rngs) -> "Biencoder":
        """The biencoder of this config, with random parameters."""
        return Biencoder(self, rngs=rngs)


class Biencoder(nnx.Module):
    """Text to vector, without context; with `head` it is the first stage of a contextual encoder."""

    def __init__(self, config: BiencoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = config.encoder.build(rngs=rngs)
        if config.head:
            c = config.encoder
            self.head_in = linear(c.width, c.width, c, rngs)
            self.head_out = linear(c.width, config.output_width or c.width, c, rngs)

    def embed(self, ids: Ids, mask: Mask, context: None = None) -> Float[Array, "B D"]:
        """Vectors of texts, float32, not normalised; `context` must be None."""
        if context is not None:
            raise ValueError("a biencoder reads no context: call embed(ids, mask), or load a contextual encoder")
        ids, mask = as_tokens(ids, mask)
        return self.output(self.pool(self.encoder(ids, mask), mask))

    def pool(self, hidden: Float[Array, "B L D"], mask: Bool[Array, "B L"]) -> Float[Array, "B D"]:
        """Mean over real tokens, or the first token, in float32."""
        return mean_pool(hidden, mask) if self.config.pooling == "mean" else hidden[:, 0].astype(jnp.float32)

    def output(self, vectors: Float[Array, "B D"]) -> Float[Array, "B E"]:
        """The head, where there is one."""
        if not self.config.head:
            return vectors
        hidden = jax.nn.gelu(self.head_in(vectors), approximate=False)
        projected = self.head_out(hidden).astype(jnp.float32)
        return vectors + projected if self.config.residual else projected


def mean_pool(hidden: Float[Array, "B L D"], mask: Bool[Array, "B L"]) -> Float[Array, "B D"]:
    """Mean of the hidden states where `mask` is True, in float32; zeros for a text without tokens."""
    weights = mask.astype(jnp.float32)
    total = jnp.einsum("bld,bl->bd", hidden.astype(jnp.float32), weights)
    return total / jnp.maximum(weights.sum(axis=1, keepdims=True), 1e-9)
