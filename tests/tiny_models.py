"""Tiny encoders with weights far larger than the initial ones, so that attention is not uniform and context counts."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cde_jax.models.contextual import Biencoder, BiencoderConfig, ContextualConfig, ContextualEncoder
from cde_jax.models.encoder import EncoderConfig

VOCABULARY, WIDTH, J = 50, 16, 5


def encoder_config(**changes) -> EncoderConfig:
    shape = {"vocab_size": VOCABULARY, "width": WIDTH, "layers": 2, "heads": 2, "mlp_width": 24}
    return EncoderConfig(**(shape | changes))


def fill(make, seed: int = 0, spread: float = 0.2):
    """The module that `make` builds, each parameter drawn from a normal distribution (norm scales around 1)."""
    graph, state = nnx.split(nnx.eval_shape(make))
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        mean = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(random.normal(mean, spread, leaf.shape), jnp.float32)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))


def biencoder(seed: int = 0, **changes) -> Biencoder:
    config = BiencoderConfig(encoder_config(**changes))
    return fill(lambda: Biencoder(config, rngs=nnx.Rngs(0)), seed)


def contextual_config(attention: str, *, encoder: dict | None = None, **changes) -> ContextualConfig:
    shape = encoder_config(**(encoder or {}))
    rest = {"context_size": J, "soft_prompt": 2} | changes
    return ContextualConfig(BiencoderConfig(shape, head=True), shape, context_attention=attention, **rest)


def contextual(attention: str, *, seed: int = 0, spread: float = 0.2, **changes) -> ContextualEncoder:
    config = contextual_config(attention, **changes)
    return fill(lambda: ContextualEncoder(config, rngs=nnx.Rngs(0)), seed, spread)


def tokens(count: int, length: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Ids and mask of texts of mixed lengths (the first is full); padding holds ids too, which must not count."""
    random = np.random.default_rng([seed, count, length])
    ids = random.integers(1, VOCABULARY, (count, length)).astype(np.int32)
    sizes = random.integers(1, length + 1, count)
    sizes[:1] = length
    return jnp.asarray(ids), jnp.asarray(np.arange(length) < sizes[:, None])
