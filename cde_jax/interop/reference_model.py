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
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cde_jax.models.attention import Prefix
from cde_jax.models.biencoder import Biencoder, BiencoderConfig, mean_pool
from cde_jax.models.contextual import NO_POSITION, Context, ContextCache, ContextualConfig, ContextualEncoder
from cde_jax.models.encoder import Block, Encoder, EncoderConfig, Ids, Mask, Rotary, as_tokens, rotary

Numerics = Literal["shipped", "shipped-sequence", "training"]


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


class ReferenceBlock(Block):
    """A layer with the gates, rotary forms and pre-norm residuals of NomicBERT's config."""

    def gate(self, x: Float[Array, "N F"]) -> Float[Array, "N F"]:
        """Activation of a gated MLP's gate."""
        if self.config.activation == "geglu":
            return jax.nn.gelu(x, approximate=False)
        return jax.nn.silu(x) if self.config.activation == "swiglu" else jax.nn.sigmoid(x)

    def rotate(self, x: Float[Array, "*batch S H d"], angles: Rotary) -> Float[Array, "*batch S H d"]:
        """Rotate the first `rotary_dim` features of each head, as halves or as interleaved pairs."""
        c = self.config
        rotated, rest = jnp.split(x, [c.rotary_dim], axis=-1)
        if not c.rotary_interleaved:
            return jnp.concatenate([super().rotate(rotated, angles), rest], axis=-1)
        halves = jnp.concatenate([rotated[..., ::2], rotated[..., 1::2]], axis=-1)
        pairs = jnp.stack(jnp.split(super().rotate(halves, angles), 2, axis=-1), axis=-1)  # [..., H, r / 2, 2]
        return jnp.concatenate([pairs.reshape(rotated.shape), rest], axis=-1)

    def prenorm(
        self, x: Float[Array, "N D"], residual: Float[Array, "N D"], mask: Bool[Array, "B S"], angles: Rotary | None
    ) -> tuple[Float[Array, "N D"], Float[Array, "N D"]]:
        """One pre-norm layer as NomicBERT writes it: the residual runs beside the hidden states."""
        residual = residual + x
        x, _ = self.attention(self.norm1(residual).astype(x.dtype), mask, angles)
        residual = residual + x
        return self.mlp(self.norm2(residual).astype(x.dtype)), residual


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
        c = self.config
        if c.positions != "rotary":
            return None
        positions = positions[..., None]  # [*B, S, 1]
        if c.numerics == "shipped":
            positions = jnp.where(positions < 0, NO_POSITION, jnp.arange(c.heads))  # [*B, S, H]
        return rotary(positions, c.rotary_dim, c.rotary_base)

    def run(
        self, x: Float[Array, "B S D"], mask: Bool[Array, "B S"], angles: Rotary | None, **options: Any
    ) -> tuple[Float[Array, "B S D"], Prefix | None]:
        """As `Encoder.run`; the training code gives zeros at padding."""
        if not self.config.prenorm:
            hidden, keys_values = super().run(x, mask, angles, **options)
        elif any(options.get(name) is not None for name in ("prefix", "bias", "return_keys_values")):
            raise ValueError("pre-norm encoders only give their last hidden states: isolated attention needs post-norm")
        else:
            hidden, keys_values = self._run_prenorm(x, mask, angles), None
        return jnp.where(mask[..., None], hidden, 0) if self.config.numerics == "training" else hidden, keys_values

    def _run_prenorm(
        self, x: Float[Array, "B S D"], mask: Bool[Array, "B S"], angles: Rotary | None
    ) -> Float[Array, "B S D"]:
        graph, blocks = nnx.split(self.blocks)

        def layer(carry: tuple, params: nnx.State) -> tuple[tuple, None]:
            return nnx.merge(graph, params).prenorm(*carry, mask, angles), None

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
        c, training = self.config, self.config.numerics == "training"
        if context is not None:
            if context.shape[-2] < c.slots and not training:
                raise ValueError(
                    f"this model was published for exactly {c.slots} context vectors, got {context.shape[-2]}: embed "
                    f"more documents of the corpus, repeat some, or pass None for null slots"
                )
            context = context[..., : c.slots, :]
            present = None if present is None else present[..., : c.slots]
        cache = super().prepare_context(context, present)
        return cache if training else cache._replace(slots=cache.slots + self._token_type())

    def embed_text(self, ids: Int[Array, "B L"], mask: Bool[Array, "B L"]) -> Float[Array, "B L D"]:
        """Token embeddings; the shipped file adds token type 0 twice."""
        text = super().embed_text(ids, mask)
        return text if self.config.numerics == "training" else text + self._token_type().astype(text.dtype)

    def _token_type(self) -> Float[Array, " D"] | Float[Array, ""]:
        if not self.config.second_stage.token_types:
            return jnp.zeros(())
        return self.encoder.token_type(jnp.zeros((), jnp.int32)).astype(jnp.float32)

    def joint_sequence(
        self,
        text: Float[Array, "B L D"],
        mask: Bool[Array, "B L"],
        slots: Float[Array | np.ndarray, "P D"] | Float[Array | np.ndarray, "B P D"],
    ) -> tuple[Float[Array, "B S D"], Bool[Array, "B S"], Int[Array, "B S"]]:
        """As `ContextualEncoder.joint_sequence`, with positions that count from the first slot on."""
        x, seen, _ = super().joint_sequence(text, mask, slots)
        count = slots.shape[-2]
        slot_positions = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (len(text), count))
        positions = jnp.concatenate([slot_positions, count + self.encoder.positions(mask)], axis=1)
        return x, seen, jnp.where(positions < self.config.rotary_start, NO_POSITION, positions)

    def pool(
        self, hidden: Float[Array, "B S D"], ids: Int[Array, "B L"], mask: Bool[Array, "B L"]
    ) -> Float[Array, "B D"]:
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


Config = EncoderConfig | BiencoderConfig | ContextualConfig


def simplified(config: Config) -> Config:
    """The config of our own class, where nothing of the reference's is switched on."""
    own_class = {ReferenceEncoderConfig: EncoderConfig, ReferenceBiencoderConfig: BiencoderConfig}.get(type(config))
    if own_class is None or getattr(config, "activation", None) in ("geglu", "glu"):
        return config
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(own_class)}
    return own_class(**fields) if type(config)(**fields) == config else config
