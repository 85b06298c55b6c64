"""One bidirectional Transformer encoder that is NomicBERT or BERT by its config.

Parameters are float32 and stacked over layers, so that the layers are scanned and compile time does not grow
with depth. Compute runs in `EncoderConfig.dtype`; norms, rotary angles and softmax in float32.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped

from cde_jax.models.attention import Kernel, KeyMask, Prefix, attend

# What users give: token ids of any integer type, and masks of booleans or of 0 and 1, on any device or none.
Ids = Integer[Array | np.ndarray, "B L"]
Mask = Shaped[Array | np.ndarray, "B L"]

Hidden = Float[Array, "B S D"]
# Cosines and sines of the rotary angles, float32; h is 1, or H where heads differ.
Rotary = tuple[Float[Array, "... S h r"], Float[Array, "... S h r"]]
Rows = Float[Array, "N D"]  # the tokens of all texts, N = B·S

INIT = nnx.initializers.truncated_normal(0.02)  # BERT's (Devlin et al., 1810.04805, appendix A.2)


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape of an encoder, and how it is run (`dtype`, `attention`, `remat`)."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: Literal["swiglu", "gelu"] = "swiglu"
    positions: Literal["rotary", "learned"] = "rotary"
    max_positions: int = 2048
    rotary_base: float = 1000.0
    token_types: int = 2
    attention_bias: bool = False
    mlp_bias: tuple[bool, bool] = (False, False)  # (into, out of) the hidden layer
    norm_epsilon: float = 1e-12
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Kernel = "auto"  # see `attention.select_kernel`
    # What the backward pass computes again: nothing, each layer ("full"), or all of it but the products with weight
    # matrices and the attention outputs ("dots"). "auto": see `select_remat`.
    remat: Literal["auto", "none", "full", "dots"] = "none"

    def __post_init__(self):
        if self.width % self.heads:
            message = f"model width {self.width} cannot be split into {self.heads} heads"
            raise ValueError(f"{message}: choose a width that is a multiple of the number of heads")
        if self.positions == "rotary" and self.head_dim % 2:
            message = f"rotary positions turn pairs of features, but width {self.width} / {self.heads} heads"
            raise ValueError(f"{message} is an odd number of them: choose an even head size")

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.width // self.heads

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies its hidden layer by a gate."""
        return self.activation != "gelu"

    def build(self, *, rngs: nnx.Rngs) -> "Encoder":
        """The encoder of this config, with random parameters."""
        return Encoder(self, rngs=rngs)


def rotary(positions: Int[Array, "*batch S h"], dim: int, base: float) -> Rotary:
    """Rotary position embeddings (Su et al., arXiv 2104.09864) of `dim` features; −1, no position, is not rotated."""
    frequencies = 1.0 / base ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)  # [dim / 2]
    angles = jnp.maximum(positions, 0)[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def as_tokens(ids: Ids, mask: Mask) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
    """Ids as int32 and the mask as booleans, in JAX."""
    ids, mask = jnp.asarray(ids, jnp.int32), jnp.asarray(mask, bool)
    if ids.ndim != 2 or ids.shape != mask.shape:
        raise ValueError(f"expected ids and mask of one shape [texts, tokens], got {ids.shape} and {mask.shape}")
    return ids, mask


def linear(inputs: int, outputs: int, config: EncoderConfig, rngs: nnx.Rngs, *, bias: bool = True) -> nnx.Linear:
    """A dense layer of float32 parameters that computes in the config's dtype."""
    return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=INIT, dtype=jnp.dtype(config.dtype), rngs=rngs)


def norm(config: EncoderConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm in float32; the two-pass variance keeps ε = 1e-12 meaningful for tiny inputs."""
    return nnx.LayerNorm(
        config.width, epsilon=config.norm_epsilon, dtype=jnp.float32, use_fast_variance=False, rngs=rngs
    )


def select_remat(remat: str, platform: str | None = None) -> str:
    """What `EncoderConfig.remat` means on a platform (None: this process's): "none", "dots" or "full"."""
    if remat != "auto":
        return remat
    # Keeping activations costs a CPU more time than computing them (measured: 1.25 times as fast).
    return "dots" if (platform or jax.default_backend()) == "cpu" else "none"


def rematerialized(layer: Callable, remat: str) -> Callable:
    """`layer` of a scan, with what `remat` says computed again in the backward pass."""
    remat = select_remat(remat)
    if remat == "none":
        return layer
    policy, policies = None, jax.checkpoint_policies
    if remat == "dots":
        attention = policies.save_only_these_names("attention")
        policy = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, attention)
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)  # a scan needs no barrier


class Block(nnx.Module):
    """Attention and MLP with post-norm residuals, over the tokens of all texts as rows; `mask` tells which are text.

    With texts on an axis of their own, XLA would transpose the activations for each weight's gradient (on CPU a
    biencoder's step took 1.3 times as long, benchmarks/results).
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        c, (bias_in, bias_out) = config, config.mlp_bias
        self.config = c
        self.qkv = linear(c.width, 3 * c.width, c, rngs, bias=c.attention_bias)
        self.out = linear(c.width, c.width, c, rngs, bias=c.attention_bias)
        self.norm1 = norm(c, rngs)
        self.mlp_in = linear(c.width, (1 + c.gated) * c.mlp_width, c, rngs, bias=bias_in)
        self.mlp_out = linear(c.mlp_width, c.width, c, rngs, bias=bias_out)
        self.norm2 = norm(c, rngs)

    def __call__(self, x: Rows, mask: KeyMask, angles: Rotary | None, **context: Any) -> tuple[Rows, Prefix]:
        """One layer, and its keys and values as a prefix; `context` goes to `attention.attend`."""
        output, keys_values = self.attention(x, mask, angles, **context)
        x = self.norm1(x + output).astype(x.dtype)
        return self.norm2(x + self.mlp(x)).astype(x.dtype), keys_values

    def attention(self, x: Rows, mask: KeyMask, angles: Rotary | None, **context: Any) -> tuple[Rows, Prefix]:
        """Attention output, and the keys and values that it used as a prefix of other texts."""
        c = self.config
        qkv = self.qkv(x).reshape(*mask.shape, 3, c.heads, c.head_dim)  # [B, S, 3, H, d]
        q, k, v = qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]  # [B, S, H, d]
        if angles is not None:
            q, k = self.rotate(q, angles), self.rotate(k, angles)
        output = attend(q, k, v, mask, kernel=c.attention, **context)
        output = checkpoint_name(output.reshape(x.shape), "attention")  # [B, S, H, d] → [N, D]
        return self.out(output), Prefix.of_slots(k, v)

    def rotate(self, x: Float[Array, "*batch S H d"], angles: Rotary) -> Float[Array, "*batch S H d"]:
        """Rotate feature i of each head with feature i + d/2 (GPT-NeoX's order), in float32."""
        (a, b), (cos, sin) = jnp.split(x.astype(jnp.float32), 2, axis=-1), angles
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)

    def mlp(self, x: Rows) -> Rows:
        """(Gated) two-layer perceptron."""
        hidden = self.mlp_in(x)
        if not self.config.gated:
            return self.mlp_out(jax.nn.gelu(hidden, approximate=False))
        value, gate = jnp.split(hidden, 2, axis=-1)
        return self.mlp_out(value * self.gate(gate))

    def gate(self, x: Float[Array, "N F"]) -> Float[Array, "N F"]:
        """Activation of a gated MLP's gate."""
        return jax.nn.silu(x)


class Encoder(nnx.Module):
    """Token ids to hidden states; callers that add context slots use `embed_tokens` and `run`."""

    block = Block

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = c = config
        table = partial(nnx.Embed, features=c.width, embedding_init=INIT, dtype=jnp.dtype(c.dtype), rngs=rngs)
        self.word = table(c.vocab_size)
        if c.positions == "learned":
            self.position = table(c.max_positions)
        if c.token_types:
            self.token_type = table(c.token_types)
        self.norm = norm(c, rngs)

        @nnx.split_rngs(splits=c.layers)
        @nnx.vmap
        def stacked(rngs: nnx.Rngs) -> Block:
            return self.block(c, rngs=rngs)

        self.blocks = stacked(rngs)

    def __call__(self, ids: Ids, mask: Mask, *, type_ids: Ids | None = None) -> Float[Array, "B L D"]:
        """Hidden states of the last layer, in the compute dtype."""
        ids, mask = as_tokens(ids, mask)
        return self.run(self.embed_tokens(ids, mask, type_ids), mask, self.angles(self.positions(mask)))[0]

    def positions(self, mask: Bool[Array, "B L"]) -> Int[Array, "B L"]:
        """Index of each token in its text, from 0."""
        return jnp.broadcast_to(jnp.arange(mask.shape[-1], dtype=jnp.int32), mask.shape)

    def angles(self, positions: Int[Array, "*B S"]) -> Rotary | None:
        """Rotary angles for positions (−1: not rotated); None where positions are learned."""
        c = self.config
        return rotary(positions[..., None], c.head_dim, c.rotary_base) if c.positions == "rotary" else None

    def embed_tokens(
        self, ids: Int[Array, "B L"], mask: Bool[Array, "B L"], type_ids: Ids | None = None
    ) -> Float[Array, "B L D"]:
        """Word, learned position and token type embeddings, before the embedding norm.

        Raises ValueError for texts longer than the table of learned positions; rotary positions have no end.
        """
        c = self.config
        if c.positions == "learned" and ids.shape[1] > c.max_positions:
            needed = f"texts of {ids.shape[1]} tokens need as many learned positions"
            raise ValueError(f"{needed}, the model has {c.max_positions}: cut the texts")
        x = self.word(ids)
        if c.token_types:
            x += self.token_type(jnp.zeros_like(ids) if type_ids is None else type_ids)
        if c.positions == "learned":
            x += self.position(self.positions(mask))
        return x

    def run(
        self,
        x: Hidden,
        mask: KeyMask,
        angles: Rotary | None,
        *,
        prefix: Prefix | None = None,
        bias: Float[Array, "layers H"] | None = None,
        slots: int = 0,
        return_keys_values: bool = False,
    ) -> tuple[Hidden, Prefix | None]:
        """The embedding norm and all layers over embeddings: hidden states and, if asked for, keys and values.

        `prefix` and `bias` are stacked over layers, as are the keys and values returned ([layers, B, H, d, S] and
        [layers, B, H, S, d]); they and `slots` go to `attention.attend`, layer by layer.
        """
        graph, blocks = nnx.split(self.blocks)

        def layer(x: Rows, scanned: tuple) -> tuple[Rows, Prefix | None]:
            params, prefix, bias = scanned
            x, keys_values = nnx.merge(graph, params)(x, mask, angles, prefix=prefix, bias=bias, slots=slots)
            return x, keys_values if return_keys_values else None

        rows = self.norm(x).astype(self.config.dtype).reshape(-1, x.shape[-1])  # [B, S, D] → [N, D]
        rows, keys_values = jax.lax.scan(rematerialized(layer, self.config.remat), rows, (blocks, prefix, bias))
        return rows.reshape(x.shape), keys_values
