"""What the speed and memory benchmarks share: shapes, models in JAX and in PyTorch, and taking turns."""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from about import about
from flax import nnx

from cde_jax.models.contextual import Biencoder, BiencoderConfig, ContextualConfig, ContextualEncoder
from cde_jax.models.encoder import EncoderConfig


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
    "tiny": Shape(2, 32, 2, 64, 100, 4, 8, 16, 4),  # that the scripts run at all
    "demo": Shape(4, 128, 4, 256, 8192, 128, 16, 48, 32),
    "small": Shape(6, 384, 6, 1536, 30528, 64, 64, 64, 64),
    "small-768": Shape(6, 768, 12, 3072, 30528, 64, 64, 64, 64),
    "long": Shape(6, 384, 6, 1536, 30528, 64, 128, 128, 512),
    "long-768": Shape(6, 768, 12, 3072, 30528, 64, 128, 128, 512),
    "large": Shape(12, 768, 12, 3072, 30528, 1024, 512, 512, 512),
}
KINDS = ("biencoder", "isolated", "joint")


def arguments(description: str, shapes: list[str]) -> argparse.ArgumentParser:
    """The options that all these benchmarks have. JAX leaves a GPU's memory to PyTorch and to other processes."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=shapes, choices=SHAPES)
    parser.add_argument("--models", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--attention", default="auto", help="kernel: auto, xla, blocks or cudnn")
    parser.add_argument("--torch", nargs="*", default=[], choices=["eager", "compiled"], help="our PyTorch module too")
    parser.add_argument("--reference", metavar="DIR", help="a checkout of the authors' code, to be run too")
    parser.add_argument("--peak", type=float, default=0.0, help="TFLOP/s of the device; 0: its maker's number")
    return parser


def config_of(kind: str, shape: Shape, dtype: str, **encoder: Any) -> BiencoderConfig | ContextualConfig:
    """The model of a shape: a plain biencoder, or both stages with isolated or joint attention."""
    one = EncoderConfig(
        shape.vocabulary, shape.width, shape.layers, shape.heads, shape.mlp_width, dtype=dtype, **encoder
    )
    if kind == "biencoder":
        return BiencoderConfig(one)
    return ContextualConfig(BiencoderConfig(one, head=True), one, shape.context, context_attention=kind)


def build(config: BiencoderConfig | ContextualConfig) -> Biencoder | ContextualEncoder:
    """With random weights."""
    kind = Biencoder if isinstance(config, BiencoderConfig) else ContextualEncoder
    return nnx.jit(lambda: kind(config, rngs=nnx.Rngs(0)))()


def random_tokens(count: int, length: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of full-length random texts."""
    ids = np.random.default_rng([count, length]).integers(0, vocabulary, (count, length), dtype=np.int32)
    return ids, np.ones(ids.shape, bool)


def take_turns(cases: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each case, round by round: a machine that slows down slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], case: str) -> dict[str, Any]:
    """How many times as fast as the first case a case is: the median over rounds, and the range."""
    base = next(iter(seconds))
    ratios = [b / s for b, s in zip(seconds[base], seconds[case], strict=True)]
    spread = [round(min(ratios), 3), round(max(ratios), 3)]
    return {f"ratio_to_{base}": round(statistics.median(ratios), 3), "ratio_range": spread}


def emit(line: dict[str, Any]) -> None:
    """One line of JSON, with the device, its machine, versions and commit."""
    device = {"device": f"{jax.default_backend()} {jax.devices()[0].device_kind}"}
    print(json.dumps(line | device | about("jax", "flax", "numpy", "torch", "transformers")), flush=True)
