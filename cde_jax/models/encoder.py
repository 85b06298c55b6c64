"""One bidirectional Transformer encoder that is NomicBERT, BERT and what follows, by its config.

Parameters are float32 and live stacked over layers, so that the layers are scanned and compile time does not grow
with depth. Compute runs in `EncoderConfig.dtype`; norms, rotary angles and softmax in float32.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped

from cde_jax.models.attention import Kernel, Prefix, attend
from cde_jax.models.rotary import Rotary, rotary, rotate

# What users give: token ids of any integer type, and masks of booleans or of 0 and 1, on any device or none.
Ids = Integer[Array | np.ndarray, "B L"]
Mask = Shaped[Array | np.ndarray, "B L"]

INIT = nnx.initializers.truncated_normal(0.02)  # BERT's (Devlin et al., 1810.04805, appendix A.2)


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape and habits of an encoder. The last block of fields exists to run weights of other people."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: Literal["swiglu", "geglu", "glu", "gelu"] = "swiglu"
    positions: Literal["rotary", "learned"] = "rotary"
    max_positions: int = 2048
    rotary_base: float = 1000.0
    token_types: int = 2
    attention_bias: bool = False
    mlp_bias: tuple[bool, bool] = (False, False)  # (into, out of) the hidden layer
    norm_epsilon: float = 1e-12
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Kernel = "auto"  # what runs it: see `attention.pick`
    # What the backward pass computes again: nothing ("none", False), each layer ("full", True), or all of it but the
    # products with weight matrices and what attention read ("dots"). "auto": "dots" on CPU, where keeping activations
    # costs more time than computing them (measured: 1.25 times as fast), else nothing.
    remat: bool | Literal["auto", "none", "full", "dots"] = False

    rotary_fraction: float = 1.0  # NomicBERT configs may turn only part of each head
    rotary_interleaved: bool = False  # GPT-J's feature order
    rotary_axis: Literal["sequence", "heads"] = "sequence"  # the shipped cde file turns by head index
    positions_skip_padding: bool = False  # the reference's training code unpads: only real tokens count
    zero_padding: bool = False  # … and returns zeros at padding
    prenorm: bool = False  # the reference's pre-norm blocks return the last MLP output without its residual

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(
                f"model width {self.width} cannot be split into {self.heads} heads: choose a width that is a "
                f"multiple of the number of heads"
            )
        if self.positions == "rotary" and int(self.head_dim * self.rotary_fraction) % 2:
            raise ValueError(
                f"rotary positions turn pairs of features, but width {self.width} / {self.heads} heads × fraction "
                f"{self.rotary_fraction} is an odd number of them: choose an even head size"
            )

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.width // self.heads

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies its hidden layer by a gate."""
        return self.activation != "gelu"


_GATES: dict[str, Callable] = {
    "swiglu": jax.nn.silu,
    "geglu": partial(jax.nn.gelu, approximate=False),
    "glu": jax.nn.sigmoid,
}


def as_tokens(ids: Ids, mask: Mask) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
    """Ids as int32 and the mask as booleans, in JAX."""
    return jnp.asarray(ids, jnp.int32), jnp.asarray(mask, bool)


def linear(inputs: int, outputs: int, config: EncoderConfig, rngs: nnx.Rngs, *, bias: bool = True) -> nnx.Linear:
    """A dense layer with float32 parameters that computes in the config's dtype."""
    return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=INIT, dtype=jnp.dtype(config.dtype), rngs=rngs)


def norm(config: EncoderConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm in float32; the two-pass variance keeps ε = 1e-12 meaningful for tiny inputs."""
    return nnx.LayerNorm(
        config.width, epsilon=config.norm_epsilon, dtype=jnp.float32, use_fast_variance=False, rngs=rngs
    )


def pick_remat(remat: bool | str) -> str:
    """What `EncoderConfig.remat` means on this platform: "none", "dots" or "full"."""
    if remat == "auto":
        return "dots" if jax.default_backend() == "cpu" else "none"
    return {True: "full", False: "none"}.get(remat, remat)


def _recomputed(layer: Callable, remat: bool | str) -> Callable:
    """`layer` of a scan, with what `EncoderConfig.remat` says computed again in the backward pass."""
    remat = pick_remat(remat)
    if remat == "none":
        return layer
    policy, policies = None, jax.checkpoint_policies
    if remat == "dots":
        kept = policies.save_only_these_names("attention")
        policy = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, kept)
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)  # within a scan nothing is to be kept apart


class Block(nnx.Module):
    """Attention and MLP with post-norm residuals (pre-norm by config), over the tokens of all texts as rows [N, D].

    N = B·S; `mask` [B, S] says which rows are a text. With texts on an axis of their own, XLA would transpose the
    activations for each weight's gradient (on CPU a biencoder's step took 1.3 times as long, benchmarks/results).
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

    def attention(self, x, mask, angles: Rotary | None, **context) -> tuple[Array, Prefix]:
        """Attention output [N, D] and the keys and values [B, S, H, d] that it used."""
        c = self.config
        qkv = self.qkv(x).reshape(*mask.shape, 3, c.heads, c.head_dim)  # [B, S, 3, H, d]
        q, k, v = qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]
        if angles is not None:
            q, k = (rotate(y, angles, interleaved=c.rotary_interleaved) for y in (q, k))
        read = attend(q, k, v, mask, kernel=c.attention, **context)
        read = checkpoint_name(read.reshape(x.shape), "attention")
        return self.out(read), Prefix(k, v)

    def mlp(self, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
        """(Gated) two-layer perceptron."""
        hidden = self.mlp_in(x)
        if self.config.gated:
            value, gate = jnp.split(hidden, 2, axis=-1)
            return self.mlp_out(value * _GATES[self.config.activation](gate))
        return self.mlp_out(jax.nn.gelu(hidden, approximate=False))

    def __call__(self, x, mask, angles: Rotary | None, **context) -> tuple[Array, Prefix]:
        """One layer: [N, D] → [N, D], with the layer's keys and values."""
        dtype = x.dtype
        read, keys_values = self.attention(x, mask, angles, **context)
        x = self.norm1(x + read).astype(dtype)
        return self.norm2(x + self.mlp(x)).astype(dtype), keys_values

    def prenorm(self, x, residual, mask, angles: Rotary | None) -> tuple[Array, Array]:
        """One pre-norm layer as NomicBERT writes it: the residual runs beside the hidden states."""
        residual = residual + x
        x, _ = self.attention(self.norm1(residual).astype(x.dtype), mask, angles)
        residual = residual + x
        return self.mlp(self.norm2(residual).astype(x.dtype)), residual


class Encoder(nnx.Module):
    """Token ids to hidden states; callers that add context slots use `embed_tokens` and `run`."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        c = config
        self.config = c
        dtype = jnp.dtype(c.dtype)
        self.word = nnx.Embed(c.vocab_size, c.width, embedding_init=INIT, dtype=dtype, rngs=rngs)
        if c.positions == "learned":
            self.position = nnx.Embed(c.max_positions, c.width, embedding_init=INIT, dtype=dtype, rngs=rngs)
        if c.token_types:
            self.token_type = nnx.Embed(c.token_types, c.width, embedding_init=INIT, dtype=dtype, rngs=rngs)
        self.norm = norm(c, rngs)

        @nnx.split_rngs(splits=c.layers)
        @nnx.vmap
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(c, rngs=rngs)

        self.blocks = stacked(rngs)

    def positions(self, mask: Bool[Array, "B L"]) -> Int[Array, "B L"]:
        """Index of each token in its text, from 0; padding counts unless `positions_skip_padding`."""
        if self.config.positions_skip_padding:
            return jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0).astype(jnp.int32)
        return jnp.broadcast_to(jnp.arange(mask.shape[-1], dtype=jnp.int32), mask.shape)

    def embed_tokens(
        self,
        ids: Int[Array, "B L"],
        mask: Bool[Array, "B L"],
        *,
        type_ids: Int[Array, "B L"] | None = None,
        times_token_type: int = 1,
    ) -> Float[Array, "B L D"]:
        """Word, learned position and token type embeddings, before the embedding norm.

        Raises ValueError for texts longer than the table of learned positions; rotary positions have no end.
        """
        if self.config.positions == "learned" and ids.shape[1] > self.config.max_positions:
            raise ValueError(
                f"texts of {ids.shape[1]} tokens need as many learned positions, the model has "
                f"{self.config.max_positions}: cut the texts"
            )
        x = self.word(ids)
        if self.config.token_types:
            types = jnp.zeros_like(ids) if type_ids is None else type_ids
            x += times_token_type * self.token_type(types)
        if self.config.positions == "learned":
            x += self.position(self.positions(mask))
        return x

    def angles(self, positions: Int[Array, "*B S"]) -> Rotary | None:
        """Rotary angles for positions (−1: not turned); None where positions are learned."""
        c = self.config
        if c.positions != "rotary":
            return None
        return rotary(
            positions,
            head_dim=c.head_dim,
            heads=c.heads,
            base=c.rotary_base,
            fraction=c.rotary_fraction,
            axis=c.rotary_axis,
        )

    def run(
        self,
        x: Float[Array, "B S D"],
        mask: Bool[Array, "B S"],
        angles: Rotary | None,
        *,
        prefix: Prefix | None = None,
        bias: Float[Array, "layers H"] | None = None,
        slots: int = 0,
        collect: Literal["nothing", "hidden", "keys_values"] = "nothing",
    ) -> tuple[Float[Array, "B S D"], Array | Prefix | None]:
        """The embedding norm and all layers over embeddings [B, S, D].

        `prefix` (stacked over layers), `bias` and `slots` go to `attention.attend`, layer by layer.
        Returns the hidden states and, stacked over layers, what `collect` names.
        """
        c = self.config
        x = self.norm(x).astype(c.dtype).reshape(-1, c.width)
        if c.prenorm:
            return self._run_prenorm(x, mask, angles, collect)
        graph, blocks = nnx.split(self.blocks)

        def layer(x, scanned):
            params, prefix_i, bias_i = scanned
            block = nnx.merge(graph, params)
            x, keys_values = block(x, mask, angles, prefix=prefix_i, bias=bias_i, slots=slots)
            kept = {"nothing": None, "hidden": x.reshape(*mask.shape, -1), "keys_values": keys_values}[collect]
            return x, kept

        x, kept = jax.lax.scan(_recomputed(layer, c.remat), x, (blocks, prefix, bias))
        return self._texts(x, mask), kept

    def _run_prenorm(self, x, mask, angles, collect):
        if collect != "nothing":
            raise ValueError("a pre-norm encoder only gives its last hidden states; it has no context form")
        graph, blocks = nnx.split(self.blocks)

        def layer(carry, params):
            return nnx.merge(graph, params).prenorm(*carry, mask, angles), None

        (x, _), _ = jax.lax.scan(layer, (x, jnp.zeros_like(x)), blocks)
        return self._texts(x, mask), None

    def _texts(self, x, mask):
        """[N, D] as [B, S, D]."""
        x = x.reshape(*mask.shape, -1)
        return jnp.where(mask[..., None], x, 0) if self.config.zero_padding else x

    def __call__(
        self,
        ids: Ids,
        mask: Mask,
        *,
        type_ids: Ids | None = None,
    ) -> Float[Array, "B L D"]:
        """Hidden states of the last layer, [B, L, D], in the compute dtype."""
        ids, mask = as_tokens(ids, mask)
        type_ids = None if type_ids is None else jnp.asarray(type_ids, jnp.int32)
        x = self.embed_tokens(ids, mask, type_ids=type_ids)
        return self.run(x, mask, self.angles(self.positions(mask)))[0]
