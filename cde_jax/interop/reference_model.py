"""The numerical behaviour of the reference's two programs, as subclasses of our models, for its published weights.

"shipped" is the file that ships with cde-small-v1 (line numbers: cde/hf_model.py of commit 9d776b0):

- a rotated token turns by the index of the *head* (lines 1190, 1193), so token order is lost; "shipped-sequence" is
  the same file with rotary along the sequence;
- token type 0 is added twice to text and once to slots and soft prompt (lines 2921, 792);
- the output projection has no residual (line 2948); exactly J context documents are needed (line 2598).

"training" is the authors' training code, which runs the text unpadded: padding has no position, and hidden states of
zeros. In both, positions count from the first slot on, and tokens before `rotary_start` are not rotated.
"""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cde_jax.models.attention import KeyMask, Prefix
from cde_jax.models.contextual import (
    NO_POSITION,
    Biencoder,
    BiencoderConfig,
    Context,
    ContextCache,
    ContextualConfig,
    ContextualEncoder,
    Slots,
    mean_pool,
)
from cde_jax.models.encoder import Block, Encoder, EncoderConfig, Hidden, Ids, Mask, Rotary, as_tokens, rotary

ModelConfig = BiencoderConfig | ContextualConfig
Config = EncoderConfig | ModelConfig
Numerics = Literal["shipped", "shipped-sequence", "training"]
_GATES = {"swiglu": jax.nn.silu, "geglu": partial(jax.nn.gelu, approximate=False), "glu": jax.nn.sigmoid}


@dataclasses.dataclass(frozen=True)
class ReferenceEncoderConfig(EncoderConfig):
    """NomicBERT with every option of its config that the reference's programs run."""

    activation: Literal["swiglu", "geglu", "glu", "gelu"] = "swiglu"
    numerics: Literal["shipped", "training"] | None = None  # None: as transformers' own nomic_bert
    rotary_fraction: float = 1.0  # the part of each head that is rotated
    rotary_interleaved: bool = False  # GPT-J's feature order
    prenorm: bool = False  # pre-norm blocks, which return the last MLP output without its residual

    def __post_init__(self):
        super().__post_init__()
        if self.positions == "rotary" and self.rotary_dim % 2:
            raise ValueError(f"rotary_emb_fraction {self.rotary_fraction} of {self.head_dim} features is an odd number")

    @property
    def rotary_dim(self) -> int:
        """Features of a head that are rotated."""
        return int(self.head_dim * self.rotary_fraction)

    def build(self, *, rngs: nnx.Rngs) -> "ReferenceEncoder":
        """The encoder of this config, with random parameters."""
        return ReferenceEncoder(self, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class ReferenceBiencoderConfig(BiencoderConfig):
    """A first stage that pools a context document into several slots."""

    tokens_per_document: int = 1

    @property
    def vectors_per_text(self) -> int:
        """How many vectors a text becomes."""
        return self.tokens_per_document

    def build(self, *, rngs: nnx.Rngs) -> "ReferenceBiencoder":
        """The biencoder of this config, with random parameters."""
        return ReferenceBiencoder(self, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class ReferenceContextualConfig(ContextualConfig):
    """A contextual encoder as one of the reference's programs runs it: always with joint attention."""

    numerics: Numerics = dataclasses.field(kw_only=True)
    rotary_start: int = 0  # index in slots and text from which on tokens are rotated
    tie_token_embeddings: bool = False  # both stages share one table of word embeddings
    pool_slots: bool = False  # training: slots and soft prompt are pooled with the text
    pool_after_token: int | None = None  # training: text up to the first of this token (a colon) is not pooled

    def __post_init__(self):
        super().__post_init__()
        if self.context_attention != "joint":
            raise ValueError(f"the reference's models have joint attention, got {self.context_attention}")

    def build(self, *, rngs: nnx.Rngs) -> "ReferenceContextualEncoder":
        """The model of this config, with random parameters."""
        return ReferenceContextualEncoder(self, rngs=rngs)


def simplified(config: Config) -> Config:
    """The config of our own class, where nothing of the reference's is switched on."""
    own_class = {ReferenceEncoderConfig: EncoderConfig, ReferenceBiencoderConfig: BiencoderConfig}.get(type(config))
    if own_class is None or getattr(config, "activation", None) in ("geglu", "glu"):
        return config
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(own_class)}
    return own_class(**fields) if type(config)(**fields) == config else config


class ReferenceBlock(Block):
    """A layer with the gates and rotary forms of NomicBERT's config."""

    def gate(self, x: Float[Array, "N F"]) -> Float[Array, "N F"]:
        """Activation of a gated MLP's gate."""
        return _GATES[self.config.activation](x)

    def rotate(self, x: Float[Array, "*batch S H d"], angles: Rotary) -> Float[Array, "*batch S H d"]:
        """Rotate the first `rotary_dim` features of each head, as halves or as interleaved pairs."""
        rotated, rest = jnp.split(x, [self.config.rotary_dim], axis=-1)
        if self.config.rotary_interleaved:
            halves = jnp.concatenate([rotated[..., ::2], rotated[..., 1::2]], axis=-1)
            pairs = jnp.stack(jnp.split(super().rotate(halves, angles), 2, axis=-1), axis=-1)  # [..., H, r / 2, 2]
            return jnp.concatenate([pairs.reshape(rotated.shape), rest], axis=-1)
        return jnp.concatenate([super().rotate(rotated, angles), rest], axis=-1)


class ReferenceEncoder(Encoder):
    """An encoder that runs as one of the reference's programs."""

    block = ReferenceBlock

    def positions(self, mask: Bool[Array, "B L"]) -> Int[Array, "B L"]:
        """Index of each token in its text; the training code counts real tokens only."""
        if self.config.numerics != "training":
            return super().positions(mask)
        return jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0).astype(jnp.int32)

    def angles(self, positions: Int[Array, "*B S"]) -> Rotary | None:
        """Rotary angles for positions (−1: not rotated); the shipped file turns by the index of the head."""
        c, positions = self.config, positions[..., None]  # [*B, S, 1]
        if c.numerics == "shipped":
            positions = jnp.where(positions < 0, NO_POSITION, jnp.arange(c.heads))  # [*B, S, H]
        return rotary(positions, c.rotary_dim, c.rotary_base) if c.positions == "rotary" else None

    def run(self, x: Hidden, mask: KeyMask, angles: Rotary | None, **options: Any) -> tuple[Hidden, Prefix | None]:
        """As `Encoder.run`; the training code gives zeros at padding."""
        if not self.config.prenorm:
            hidden, keys_values = super().run(x, mask, angles, **options)
        elif any(options.get(name) is not None for name in ("prefix", "bias", "return_keys_values")):
            raise ValueError("pre-norm encoders only give their last hidden states: isolated attention needs post-norm")
        else:
            hidden, keys_values = self._run_prenorm(x, mask, angles), None
        return jnp.where(mask[..., None], hidden, 0) if self.config.numerics == "training" else hidden, keys_values

    def _run_prenorm(self, x: Hidden, mask: KeyMask, angles: Rotary | None) -> Hidden:
        """Pre-norm layers as NomicBERT writes them: the residual runs beside the hidden states."""
        graph, blocks = nnx.split(self.blocks)

        def layer(carry: tuple, params: nnx.State) -> tuple[tuple, None]:
            (x, residual), block = carry, nnx.merge(graph, params)
            residual = residual + x
            x, _ = block.attention(block.norm1(residual).astype(x.dtype), mask, angles)
            residual = residual + x
            return (block.mlp(block.norm2(residual).astype(x.dtype)), residual), None

        rows = self.norm(x).astype(self.config.dtype).reshape(-1, x.shape[-1])  # [B, S, D] → [N, D]
        (rows, _), _ = jax.lax.scan(layer, (rows, jnp.zeros_like(rows)), blocks)
        return rows.reshape(x.shape)


class ReferenceBiencoder(Biencoder):
    """A first stage that pools a text into T vectors."""

    def embed(self, ids: Ids, mask: Mask, context: None = None) -> Float[Array, "BT D"]:
        """Vectors of texts, T for each, float32, not normalised: the means of T equal stretches of the padded text.

        A stretch without a real token becomes the mean of all hidden states, padding included, as in the reference.
        """
        ids, mask = as_tokens(ids, mask)
        pieces, hidden = self.config.tokens_per_document, self.encoder(ids, mask).astype(jnp.float32)
        short = -hidden.shape[1] % pieces
        hidden = jnp.pad(hidden, ((0, 0), (0, short), (0, 0)))
        mean = jnp.repeat(hidden.mean(axis=1), pieces, axis=0)  # [B·T, D]
        hidden = hidden.reshape(len(mean), -1, hidden.shape[-1])  # [B·T, L/T, D]
        mask = jnp.pad(mask, ((0, 0), (0, short))).reshape(len(mean), -1)  # [B·T, L/T]
        return self.output(jnp.where(mask.any(axis=1, keepdims=True), mean_pool(hidden, mask), mean))


class ReferenceContextualEncoder(ContextualEncoder):
    """A contextual encoder that runs as one of the reference's programs."""

    def __init__(self, config: ReferenceContextualConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        if config.tie_token_embeddings:
            self.encoder.word = self.first_stage.encoder.word

    def prepare_context(
        self, context: Context | None, present: Bool[Array | np.ndarray, "*B J"] | None = None
    ) -> ContextCache:
        """As `ContextualEncoder.prepare_context`, of the first J documents; the shipped file needs as many."""
        slots = self.config.slots
        if context is not None:
            if context.shape[-2] < slots and self.config.numerics != "training":
                raise ValueError(
                    f"this model was published for exactly {slots} context vectors, got {context.shape[-2]}: embed "
                    f"more documents of the corpus, repeat some, or pass None for null slots"
                )
            context = context[..., :slots, :]
            present = None if present is None else present[..., :slots]
        return super().prepare_context(context, present)

    def joint_sequence(
        self, text: Float[Array, "B L D"], mask: Bool[Array, "B L"], slots: Slots
    ) -> tuple[Hidden, KeyMask, Int[Array, "B S"]]:
        """As `ContextualEncoder.joint_sequence`, with positions that count from the first slot on.

        The shipped file adds token type 0 to the whole sequence, to the text for the second time.
        """
        x, seen, positions = super().joint_sequence(text, mask, slots)
        if self.config.numerics != "training" and self.config.second_stage.token_types:
            x += self.encoder.token_type(jnp.zeros((), jnp.int32))
        index, count = jnp.arange(x.shape[1], dtype=jnp.int32), slots.shape[-2]
        positions = jnp.where(index < count, index, count + positions)
        return x, seen, jnp.where(positions < self.config.rotary_start, NO_POSITION, positions)

    def pool(self, hidden: Hidden, ids: Int[Array, "B L"], mask: Bool[Array, "B L"]) -> Float[Array, "B D"]:
        """Mean over the text, or what follows its instruction, and over the slots with `pool_slots`."""
        token, index = self.config.pool_after_token, jnp.arange(ids.shape[1])
        if token is not None:  # texts without the token after their first one are pooled whole
            end = jnp.argmax((ids == token) & mask & (index > 0), axis=1)[:, None]  # [B, 1]
            mask &= (index > end) | (end == 0)
        slots = jnp.full((len(mask), hidden.shape[1] - mask.shape[1]), self.config.pool_slots)
        return mean_pool(hidden, jnp.concatenate([slots, mask], axis=1))

    def output(self, vectors: Float[Array, "B D"]) -> Float[Array, "B D"]:
        """The output projection; the shipped file's has no residual."""
        return super().output(vectors) if self.config.numerics == "training" else self.projection(vectors)
