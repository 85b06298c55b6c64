"""Model shapes, options and random inputs of the speed and memory benchmarks."""

import argparse
import os
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from cde_jax.models.contextual import Biencoder, BiencoderConfig, ContextualConfig, ContextualEncoder
from cde_jax.models.encoder import EncoderConfig

PACKAGES = ("jax", "flax", "numpy", "torch", "transformers")
KINDS = ("biencoder", "isolated", "joint")
Texts = tuple[Int[np.ndarray, "n L"], Bool[np.ndarray, "n L"]]  # ids and mask


class Shape(NamedTuple):
    """A model and its batches: B queries and documents, J context documents, tokens of each text."""

    layers: int
    width: int
    heads: int
    mlp_width: int
    vocabulary: int
    queries: int
    query_length: int
    document_length: int
    context: int


SHAPES = {
    "tiny": Shape(2, 32, 2, 64, 100, 4, 8, 16, 4),  # only to try the scripts
    "demo": Shape(4, 128, 4, 256, 8192, 128, 16, 48, 32),
    "small": Shape(6, 384, 6, 1536, 30528, 64, 64, 64, 64),
    "small-768": Shape(6, 768, 12, 3072, 30528, 64, 64, 64, 64),
    "long": Shape(6, 384, 6, 1536, 30528, 64, 128, 128, 512),
    "long-768": Shape(6, 768, 12, 3072, 30528, 64, 128, 128, 512),
    "large": Shape(12, 768, 12, 3072, 30528, 1024, 512, 512, 512),
}


def arguments(description: str, shapes: list[str]) -> argparse.ArgumentParser:
    """The options of all these benchmarks. JAX leaves a GPU's memory to PyTorch and to other processes."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=shapes, choices=SHAPES)
    parser.add_argument("--models", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--attention", default="auto", help="attention kernel, as model.attention in the config")
    parser.add_argument("--torch", nargs="*", default=[], choices=["eager", "compiled"], help="the exported module too")
    parser.add_argument("--reference", metavar="DIR", help="a checkout of the authors' code, to be timed too")
    parser.add_argument("--peak", type=float, default=0.0, help="TFLOP/s of the device; 0: from its data sheet")
    return parser


def config_of(kind: str, shape: Shape, dtype: str, **encoder: Any) -> BiencoderConfig | ContextualConfig:
    """A plain biencoder, or both stages with isolated or joint attention; `encoder`: more fields of EncoderConfig."""
    stage = EncoderConfig(
        shape.vocabulary, shape.width, shape.layers, shape.heads, shape.mlp_width, dtype=dtype, **encoder
    )
    if kind == "biencoder":
        return BiencoderConfig(stage)
    return ContextualConfig(BiencoderConfig(stage, head=True), stage, shape.context, context_attention=kind)


def build(config: BiencoderConfig | ContextualConfig) -> Biencoder | ContextualEncoder:
    """The model with random weights."""
    kind = Biencoder if isinstance(config, BiencoderConfig) else ContextualEncoder
    return nnx.jit(lambda: kind(config, rngs=nnx.Rngs(0)))()


def random_texts(count: int, length: int, vocabulary: int) -> Texts:
    """Ids and mask of texts of `length` random tokens."""
    ids = np.random.default_rng([count, length]).integers(0, vocabulary, (count, length), dtype=np.int32)
    return ids, np.ones(ids.shape, bool)


def random_batch(shape: Shape) -> dict[str, Texts]:
    """Queries, documents and context documents of one plan batch, without hard negatives."""
    return {
        "query": random_texts(shape.queries, shape.query_length, shape.vocabulary),
        "document": random_texts(shape.queries, shape.document_length, shape.vocabulary),
        "context": random_texts(shape.context, shape.document_length, shape.vocabulary),
    }


def context_vectors(shape: Shape) -> Float[np.ndarray, "J D"]:
    """Random vectors in place of the first stage's output."""
    return np.random.default_rng(0).normal(0, 1, (shape.context, shape.width)).astype(np.float32)
