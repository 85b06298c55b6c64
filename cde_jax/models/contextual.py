"""The two-stage contextual encoder (paper, section 4).

`M1` embeds J context documents, once; `M2` reads `[c_1 … c_J | s_1 … s_8 | t_1 … t_L]`: J context slots, a soft
prompt, the text, and pools the text.

Axis letters, used everywhere: `B` texts, `K` hard negatives per query, `N` documents in a batch = B(1+K),
`J` context documents, `L` tokens, `D` width, `S` steps in a plan, `G` plan batches per step; here also
`P` = slots and soft prompt together, `H` heads of `d` features.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped

from cde_jax.models.attention import Prefix
from cde_jax.models.biencoder import Biencoder, BiencoderConfig
from cde_jax.models.cache import ContextCache, check_cache
from cde_jax.models.encoder import Encoder, EncoderConfig, Ids, Mask, as_tokens, linear
from cde_jax.models.pooling import mean_pool

# Vectors of the first stage: shared by all texts, or one set a text.
Context = Float[Array | np.ndarray, "J D"] | Float[Array | np.ndarray, "B J D"]


@dataclasses.dataclass(frozen=True)
class ContextualConfig:
    """Shape and habits of a contextual encoder. The last block of fields exists for imported weights."""

    first_stage: BiencoderConfig
    second_stage: EncoderConfig
    context_size: int  # J
    context_attention: Literal["joint", "isolated"] = "isolated"
    soft_prompt: int = 8  # learned tokens between the slots and the text; 0: none
    slot_bias: float | None = -5.0  # first value of the learned bias from text to slots; None: no such bias
    null_embedding: bool = True  # one learned vector that stands in for a missing context document
    tie_token_embeddings: bool = False  # both stages share one table of word embeddings

    residual_output: bool = True  # p + projection(p); the shipped cde file drops the p
    text_token_types: int = 1  # how often token type 0 is added to text; the shipped file adds it twice
    slot_token_types: int = 0  # … and to slots and soft prompt; the shipped file adds it once
    absolute_positions: bool = False  # the reference counts positions from the first slot on, not from the text
    rotary_start: int = 0  # … and turns only tokens from this index on
    pool_slots: bool = False  # the training code can pool slots and soft prompt with the text
    pool_after_token: int | None = None  # … and leave out the text up to the first of this token (a colon)
    fixed_context: Literal["no", "at most", "exactly"] = "no"  # the reference reads the first J documents only

    def __post_init__(self):
        if self.context_size < 1:
            raise ValueError(
                f"a contextual model reads context documents: expected context_size J ≥ 1, got {self.context_size}; "
                f"use a Biencoder to train without context"
            )
        if self.first_stage.encoder.width != self.second_stage.width:
            raise ValueError(
                f"context vectors of the first stage stand beside the second stage's tokens, so both need one "
                f"width; got {self.first_stage.encoder.width} and {self.second_stage.width}"
            )
        if self.context_attention == "isolated" and (self.absolute_positions or self.pool_slots):
            raise ValueError("absolute positions and pooled slots belong to imported joint models, not to isolated")

    @property
    def slots(self) -> int:
        """How many context slots a whole context fills."""
        return self.context_size * self.first_stage.tokens_per_document


class ContextualEncoder(nnx.Module):
    """`embed_context` once, `prepare_context` once, `embed` for every query and document."""

    def __init__(self, config: ContextualConfig, *, rngs: nnx.Rngs):
        c, second = config, config.second_stage
        self.config = c
        self.first_stage = Biencoder(c.first_stage, rngs=rngs)
        self.encoder = Encoder(second, rngs=rngs)
        if c.tie_token_embeddings:
            self.encoder.word = self.first_stage.encoder.word
        if c.soft_prompt:
            self.prompt_in = linear(second.width, second.width, second, rngs)
            self.prompt_out = linear(second.width, second.width * c.soft_prompt, second, rngs)
        self.project_in = linear(second.width, second.width, second, rngs)
        self.project_out = linear(second.width, second.width, second, rngs)
        if c.null_embedding:
            self.null = nnx.Param(0.01 * jax.random.normal(rngs.params(), (second.width,)))
        if c.slot_bias is not None:
            self.slot_bias = nnx.Param(jnp.full((second.layers, second.heads), c.slot_bias, jnp.float32))

    def embed_context(
        self, ids: Integer[Array | np.ndarray, "J L"], mask: Shaped[Array | np.ndarray, "J L"]
    ) -> Float[Array, "JT D"]:
        """First stage: one float32 vector per context document (T of them for imported multi-token models)."""
        return self.first_stage.embed(ids, mask)

    def with_null(self, context: Float[Array, "*B J D"], present: Bool[Array, "*B J"]) -> Float[Array, "*B J D"]:
        """Put the null embedding where no document is present (missing context, sequence dropout)."""
        return jnp.where(present[..., None], context, self._null())

    def prepare_context(self, context: Context | None) -> ContextCache:
        """What `embed` needs of a context: slots with the soft prompt and, if isolated, their keys and values.

        `context` is [J, D], shared by all texts, or [B, J, D], one a text; None is a context of null slots.
        """
        slots = self._slots(context)
        if self.config.context_attention == "joint":
            return ContextCache(slots, None)
        x = slots if slots.ndim == 3 else slots[None]
        mask = jnp.ones(x.shape[:2], bool)
        positions = jnp.full(x.shape[1], -1, jnp.int32)
        _, prefix = self.encoder.run(x, mask, self.encoder.angles(positions), collect="keys_values")
        if slots.ndim == 2:
            prefix = Prefix(*(y[:, 0] for y in prefix))
        return ContextCache(slots, prefix)

    def embed(
        self,
        ids: Ids,
        mask: Mask,
        context: Context | ContextCache | None = None,
    ) -> Float[Array, "B D"]:
        """Second stage: vectors of texts that have read their context, float32, not normalised.

        `context` as in `prepare_context`, or what it made; None is a context of null slots.
        """
        c, (ids, mask) = self.config, as_tokens(ids, mask)
        if isinstance(context, ContextCache):
            check_cache(context, c.second_stage, isolated=c.context_attention == "isolated")
        else:
            context = self.prepare_context(context)
        return self.output(*self.hidden(ids, mask, context))

    def hidden(
        self, ids: Int[Array, "B L"], mask: Bool[Array, "B L"], cache: ContextCache
    ) -> tuple[Float[Array, "B S D"], Bool[Array, "B S"]]:
        """Last hidden states and which of them are pooled: S = L text tokens, or P + L with `pool_slots`."""
        c, count = self.config, cache.slots.shape[-2]
        text = self.encoder.embed_tokens(ids, mask, times_token_type=c.text_token_types)
        pooled = mask & self._after_instruction(ids, mask)
        bias = self.slot_bias[...] if c.slot_bias is not None else None
        if cache.prefix is not None:
            angles = self.encoder.angles(self.encoder.positions(mask))
            return self.encoder.run(text, mask, angles, prefix=cache.prefix, bias=bias)[0], pooled

        x, seen, positions = self.joint_sequence(text, mask, cache.slots)
        x, _ = self.encoder.run(x, seen, self.encoder.angles(positions), bias=bias, slots=count)
        if c.pool_slots:
            return x, seen.at[:, count:].set(pooled)
        return x[:, count:], pooled

    def joint_sequence(self, text, mask, slots) -> tuple[Array, Array, Array]:
        """Embeddings [B, P + L, D], mask and positions of slots and text as one sequence."""
        c, batch = self.config, mask.shape[0]
        count = slots.shape[-2]
        slots = jnp.broadcast_to(slots, (batch, *slots.shape[-2:])).astype(text.dtype)
        seen = jnp.concatenate([jnp.ones((batch, count), bool), mask], axis=1)
        of_text = self.encoder.positions(mask)
        if c.absolute_positions:
            of_slots = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (batch, count))
            positions = jnp.concatenate([of_slots, count + of_text], axis=1)
            positions = jnp.where(positions < c.rotary_start, -1, positions)
        else:
            positions = jnp.concatenate([jnp.full((batch, count), -1, jnp.int32), of_text], axis=1)
        return jnp.concatenate([slots, text], axis=1), seen, positions

    def output(self, hidden: Float[Array, "B S D"], pooled: Bool[Array, "B S"]) -> Float[Array, "B D"]:
        """Mean over the tokens, then the output projection."""
        vectors = mean_pool(hidden, pooled)
        projected = self.project_out(jax.nn.relu(self.project_in(vectors))).astype(jnp.float32)
        return vectors + projected if self.config.residual_output else projected

    def _slots(self, context):
        """Context slots and soft prompt, [*B, P, D], before the embedding norm."""
        c, width = self.config, self.config.second_stage.width
        if context is None:
            context = jnp.broadcast_to(self._null(), (c.slots, width))
        slots = self._fixed(context).astype(jnp.float32)
        if c.soft_prompt:
            prompt = self.prompt_out(jax.nn.relu(self.prompt_in(jnp.ones(width)))).astype(jnp.float32)
            prompt = prompt.reshape(c.soft_prompt, width)
            prompt = jnp.broadcast_to(prompt, (*slots.shape[:-2], *prompt.shape))
            slots = jnp.concatenate([slots, prompt], axis=-2)
        if c.slot_token_types:
            slots += c.slot_token_types * self.encoder.token_type(jnp.zeros((), jnp.int32)).astype(jnp.float32)
        if not slots.shape[-2]:
            raise ValueError("expected at least one context document, got none: pass None for null slots")
        return slots

    def _fixed(self, context):
        """The reference's rule for the number of slots; our own models read any number."""
        c = self.config
        if c.fixed_context == "no":
            return context
        if c.fixed_context == "exactly" and context.shape[-2] < c.slots:
            raise ValueError(
                f"this model was published for exactly {c.slots} context vectors, got {context.shape[-2]}: embed more "
                f"documents of the corpus, repeat some, or pass None for null slots"
            )
        return context[..., : c.slots, :]

    def _null(self):
        if not self.config.null_embedding:
            raise ValueError("these weights have no null embedding: give the model a context of the corpus")
        return self.null[...]

    def _after_instruction(self, ids, mask):
        """True after the first `pool_after_token` at a position > 0; everywhere in texts without one."""
        token = self.config.pool_after_token
        if token is None:
            return jnp.ones_like(mask)
        index = jnp.arange(ids.shape[1])
        ends = jnp.argmax((ids == token) & mask & (index > 0), axis=1)[:, None]
        return (index > ends) | (ends == 0)


def map_chunks(
    function: Callable[[Int[Array, "c L"], Bool[Array, "c L"]], Float[Array, "c D"]],
    ids: Int[Array, "B L"],
    mask: Bool[Array, "B L"],
    chunk: int,
) -> Float[Array, "B D"]:
    """`function(ids, mask)` over chunks of `chunk` texts, each recomputed in the backward pass.

    Only a chunk's inputs and vectors are kept, so activation memory does not grow with B; gradients are those of
    the whole batch. It does what GradCache (Gao et al., arXiv 2101.06983) does, as a JAX transformation. `chunk` 0
    runs the batch as a whole and keeps its activations.
    """
    texts = ids.shape[0]
    if not chunk:
        return function(ids, mask)
    chunk = min(chunk, texts)
    short = -texts % chunk
    ids, mask = (jnp.pad(x, ((0, short), (0, 0))).reshape(-1, chunk, x.shape[1]) for x in (ids, mask))
    vectors = jax.lax.map(jax.checkpoint(lambda xs: function(*xs)), (ids, mask))  # [chunks, c, D]
    return vectors.reshape(-1, vectors.shape[-1])[:texts]
