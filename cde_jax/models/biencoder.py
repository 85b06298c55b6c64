"""The plain biencoder: text to vector, without context. With a head it is the first stage of a contextual encoder."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from cde_jax.models.encoder import Encoder, EncoderConfig, Ids, Mask, as_tokens, linear
from cde_jax.models.pooling import mean_pool, pool_pieces


@dataclasses.dataclass(frozen=True)
class BiencoderConfig:
    """An encoder, how its hidden states become one vector, and whether an MLP follows."""

    encoder: EncoderConfig
    pooling: Literal["mean", "cls"] = "mean"
    head: bool = False  # Linear, GELU, Linear after pooling: the first stage has it
    output_width: int | None = None  # of the head; None: the encoder's width
    residual: bool = False  # the head is added to what it reads, like the output projection of a second stage
    tokens_per_document: int = 1  # the reference can pool a context document into several slots

    def __post_init__(self):
        if self.residual and not (self.head and self.output_width in (None, self.encoder.width)):
            raise ValueError(
                f"a residual needs a head as wide as the encoder ({self.encoder.width}), got head={self.head} and "
                f"output_width={self.output_width}"
            )


class Biencoder(nnx.Module):
    """Text to vector, without context; with `head` it is the first stage of a contextual encoder."""

    def __init__(self, config: BiencoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config.encoder, rngs=rngs)
        if config.head:
            c = config.encoder
            self.head_in = linear(c.width, c.width, c, rngs)
            self.head_out = linear(c.width, config.output_width or c.width, c, rngs)

    def embed(self, ids: Ids, mask: Mask, context: None = None) -> Float[Array, "BT D"]:
        """Vectors of texts (T of each with `tokens_per_document`), float32, not normalised.

        `context` must be None: a biencoder reads none.
        """
        if context is not None:
            raise ValueError("a biencoder reads no context: call embed(ids, mask), or load a contextual encoder")
        ids, mask = as_tokens(ids, mask)
        vectors = self.pool(self.encoder(ids, mask), mask)
        if self.config.head:
            hidden = jax.nn.gelu(self.head_in(vectors), approximate=False)
            projected = self.head_out(hidden).astype(jnp.float32)
            vectors = vectors + projected if self.config.residual else projected
        return vectors if vectors.ndim == 2 else vectors.reshape(-1, vectors.shape[-1])

    def pool(self, hidden: Float[Array, "B L D"], mask: Bool[Array, "B L"]) -> Float[Array, "B *T D"]:
        """Mean over real tokens (or the first token) in float32; T vectors where several are asked for."""
        c = self.config
        if c.pooling == "cls":
            return hidden[:, 0].astype(jnp.float32)
        if c.tokens_per_document == 1:
            return mean_pool(hidden, mask)
        return pool_pieces(hidden, mask, c.tokens_per_document)
