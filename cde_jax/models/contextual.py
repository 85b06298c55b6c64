"""The biencoder, and the two-stage contextual encoder (paper, section 4).

A biencoder reads a text alone. In the contextual encoder one of them, `M1`, embeds J context documents, once; the input
of `M2` is `[c_1 … c_J | s_1 … s_8 | t_1 … t_L]`: J context slots, a soft prompt, the text; it is pooled over the text.

Axis letters, used everywhere: `B` texts, `K` hard negatives per query, `N` documents in a batch = B(1+K),
`J` context documents, `L` tokens, `D` width, `S` steps in a plan, `G` plan batches per step; here also
`P` = slots and soft prompt together, `S` = P + L, `H` heads of `d` features.
"""

import dataclasses
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cde_jax.models.attention import KeyMask, Prefix
from cde_jax.models.encoder import EncoderConfig, Hidden, Ids, Mask, as_tokens, linear

# Vectors of the first stage: shared by all texts, or one set per text.
Context = Float[Array | np.ndarray, "J D"] | Float[Array | np.ndarray, "B J D"]
Slots = Float[Array | np.ndarray, "*B P D"]
NO_POSITION = -1  # of context slots and soft prompt


class ContextCache(NamedTuple):
    """A context as the second stage attends to it: computed once per corpus, or once per batch in training."""

    slots: Slots
    prefix: Prefix | None  # isolated attention: keys and values, [layers, *B, H, d, P] and [layers, *B, H, P, d]


@dataclasses.dataclass(frozen=True)
class BiencoderConfig:
    """An encoder, how its hidden states become one vector, and whether an MLP follows."""

    encoder: EncoderConfig
    pooling: Literal["mean", "cls"] = "mean"
    head: bool = False  # Linear, GELU, Linear after pooling: the first stage has it
    output_width: int | None = None  # of the head; None: the encoder's width
    residual: bool = False  # the head's input is added to its output, as in the output projection of a second stage
    matryoshka: tuple[int, ...] = ()  # first dimensions of the vectors that were trained to be vectors of their own
    vectors_per_text: ClassVar[int] = 1

    def __post_init__(self):
        if self.residual and not (self.head and self.output_width in (None, self.encoder.width)):
            message = f"a residual needs a head as wide as the encoder ({self.encoder.width})"
            raise ValueError(f"{message}, got head={self.head} and output_width={self.output_width}")

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
    total = jnp.einsum("bld,bl->bd", hidden.astype(jnp.float32), weights, precision=jax.lax.Precision.HIGHEST)
    return total / jnp.maximum(weights.sum(axis=1, keepdims=True), 1e-9)


@dataclasses.dataclass(frozen=True)
class ContextualConfig:
    """Shape of a contextual encoder."""

    first_stage: BiencoderConfig
    second_stage: EncoderConfig
    context_size: int  # J
    context_attention: Literal["joint", "isolated"] = "isolated"
    soft_prompt: int = 8  # learned tokens between the slots and the text; 0: none
    slot_bias: float | None = -5.0  # first value of the learned bias from text to slots; None: no such bias
    null_embedding: bool = True  # one learned vector that stands in for a missing context document
    matryoshka: tuple[int, ...] = ()  # first dimensions of the vectors that were trained to be vectors of their own

    def __post_init__(self):
        if self.context_size < 1:
            message = f"expected context_size J ≥ 1, got {self.context_size}"
            raise ValueError(f"{message}; use a Biencoder to train without context")
        first, second = self.first_stage.encoder.width, self.second_stage.width
        if first != second:
            message = "context vectors stand beside the second stage's tokens, so both stages need one width"
            raise ValueError(f"{message}; got {first} and {second}")

    @property
    def encoder(self) -> EncoderConfig:
        """The encoder of texts, as in a `BiencoderConfig`."""
        return self.second_stage

    @property
    def slots(self) -> int:
        """How many context slots a whole context fills."""
        return self.context_size * self.first_stage.vectors_per_text

    def build(self, *, rngs: nnx.Rngs) -> "ContextualEncoder":
        """The model of this config, with random parameters."""
        return ContextualEncoder(self, rngs=rngs)


class ContextualEncoder(nnx.Module):
    """`embed_context` and `prepare_context` once, then `embed` for every query and document."""

    def __init__(self, config: ContextualConfig, *, rngs: nnx.Rngs):
        c, second = config, config.second_stage
        self.config = c
        self.first_stage = c.first_stage.build(rngs=rngs)
        self.encoder = second.build(rngs=rngs)
        if c.soft_prompt:
            self.prompt_in = linear(second.width, second.width, second, rngs)
            self.prompt_out = linear(second.width, second.width * c.soft_prompt, second, rngs)
        self.project_in = linear(second.width, second.width, second, rngs)
        self.project_out = linear(second.width, second.width, second, rngs)
        if c.null_embedding:
            self.null = nnx.Param(0.01 * jax.random.normal(rngs.params(), (second.width,)))
        if c.slot_bias is not None:
            self.slot_bias = nnx.Param(jnp.full((second.layers, second.heads), c.slot_bias, jnp.float32))

    def embed_context(self, ids: Ids, mask: Mask) -> Float[Array, "J D"]:
        """First stage: vectors of context documents, float32."""
        return self.first_stage.embed(ids, mask)

    def prepare_context(
        self, context: Context | None, present: Bool[Array | np.ndarray, "*B J"] | None = None
    ) -> ContextCache:
        """What `embed` needs of a context: slots with the soft prompt and, if isolated, their keys and values.

        `context` is [J, D], shared by all texts, or [B, J, D], one per text; None is a context of null slots. The
        null embedding takes the place of documents that are not `present` (missing ones, sequence dropout).
        """
        c, width = self.config, self.config.second_stage.width
        if context is None:
            context, present = jnp.zeros((c.slots, width)), jnp.zeros(c.slots, bool)
        if context.ndim not in (2, 3) or context.shape[-1] != width:
            raise ValueError(f"expected a context [J, {width}] or [texts, J, {width}], got {list(context.shape)}")
        if present is not None:
            if not c.null_embedding:
                raise ValueError("these weights have no null embedding: give the model a context of the corpus")
            context = jnp.where(present[..., None], context, self.null[...])
        slots = jnp.asarray(context, jnp.float32)
        if c.soft_prompt:
            prompt = self.prompt_out(jax.nn.relu(self.prompt_in(jnp.ones(width)))).astype(jnp.float32)
            prompt = jnp.broadcast_to(prompt.reshape(-1, width), (*slots.shape[:-2], c.soft_prompt, width))
            slots = jnp.concatenate([slots, prompt], axis=-2)  # [*B, P, D]
        if not slots.shape[-2]:
            raise ValueError("expected at least one context document, got none: pass None for null slots")
        if c.context_attention == "joint":
            return ContextCache(slots, None)
        x = slots if slots.ndim == 3 else slots[None]  # [B or 1, P, D]
        mask, angles = jnp.ones(x.shape[:2], bool), self.encoder.angles(jnp.full(x.shape[1], NO_POSITION, jnp.int32))
        _, prefix = self.encoder.run(x, mask, angles, return_keys_values=True)
        return ContextCache(slots, prefix if slots.ndim == 3 else Prefix(*(y[:, 0] for y in prefix)))

    def embed(self, ids: Ids, mask: Mask, context: Context | ContextCache | None = None) -> Float[Array, "B D"]:
        """Second stage: vectors of texts in their context, float32, not normalised.

        `context` as in `prepare_context`, or its result; None is a context of null slots.
        """
        ids, mask = as_tokens(ids, mask)
        cache = context if isinstance(context, ContextCache) else self.prepare_context(context)
        check_cache(cache, self.config)
        return self.output(self.pool(self.hidden(ids, mask, cache), ids, mask))

    def hidden(self, ids: Int[Array, "B L"], mask: Bool[Array, "B L"], cache: ContextCache) -> Hidden:
        """Last hidden states: of the text (isolated, S = L), or of slots and text (joint, S = P + L)."""
        text = self.encoder.embed_tokens(ids, mask)
        bias = None if self.config.slot_bias is None else self.slot_bias[...]  # [layers, H]
        if cache.prefix is not None:
            angles = self.encoder.angles(self.encoder.positions(mask))
            return self.encoder.run(text, mask, angles, prefix=cache.prefix, bias=bias)[0]
        x, mask, positions = self.joint_sequence(text, mask, cache.slots)
        return self.encoder.run(x, mask, self.encoder.angles(positions), bias=bias, slots=cache.slots.shape[-2])[0]

    def joint_sequence(
        self, text: Float[Array, "B L D"], mask: Bool[Array, "B L"], slots: Slots
    ) -> tuple[Hidden, KeyMask, Int[Array, "B S"]]:
        """Embeddings, mask and positions of slots and text as one sequence, S = P + L."""
        batch, count = mask.shape[0], slots.shape[-2]
        slots = jnp.broadcast_to(slots, (batch, *slots.shape[-2:])).astype(text.dtype)
        slot_positions = jnp.full((batch, count), NO_POSITION, jnp.int32)
        return (
            jnp.concatenate([slots, text], axis=1),
            jnp.concatenate([jnp.ones((batch, count), bool), mask], axis=1),
            jnp.concatenate([slot_positions, self.encoder.positions(mask)], axis=1),
        )

    def pool(self, hidden: Hidden, ids: Int[Array, "B L"], mask: Bool[Array, "B L"]) -> Float[Array, "B D"]:
        """Mean over the tokens of the text, in float32."""
        return mean_pool(hidden[:, hidden.shape[1] - mask.shape[1] :], mask)

    def output(self, vectors: Float[Array, "B D"]) -> Float[Array, "B D"]:
        """The output projection, with a residual."""
        return vectors + self.projection(vectors)

    def projection(self, vectors: Float[Array, "B D"]) -> Float[Array, "B D"]:
        """Linear, ReLU, Linear, in the compute dtype; the result is float32."""
        return self.project_out(jax.nn.relu(self.project_in(vectors))).astype(jnp.float32)


def check_cache(cache: ContextCache, config: ContextualConfig) -> None:
    """ValueError for the cache of another model, as far as shapes tell (`retrieval.Context` has a fingerprint)."""
    e, isolated = config.second_stage, config.context_attention == "isolated"
    expected = (config.context_attention, e.width, *((e.layers, e.heads, e.head_dim) if isolated else ()))
    got = ("joint", cache.slots.shape[-1])
    if cache.prefix is not None:
        layers, *_, heads, head_dim, _ = cache.prefix.keys.shape
        got = ("isolated", got[1], layers, heads, head_dim)
    if got != expected:
        shapes = f"expected attention, width (layers, heads, features of a head) {expected}, got {got}"
        raise ValueError(f"this context cache is of another model: {shapes}; call prepare_context of this model")
