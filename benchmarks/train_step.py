"""Training speed of the three models, as ratios in one run: one JSON line per case.

python benchmarks/train_step.py [--shapes demo small] [--rounds 7] [--dtype float32]

The models take turns, step by step, so that a machine that slows down slows all of them; a ratio is the median over
rounds of the biencoder's seconds by the case's, within one round.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time

import jax
import numpy as np
from flax import nnx

from cde_jax.models.contextual import Biencoder, BiencoderConfig, ContextualConfig, ContextualEncoder
from cde_jax.models.encoder import EncoderConfig
from cde_jax.training import sharding
from cde_jax.training.step import StepConfig, init_state, make_optimizer, make_train_step, stream

# layers, width, heads, MLP width, vocabulary, B queries, tokens of a query and of a document, J context documents
SHAPES = {
    "demo": (4, 128, 4, 256, 8192, 128, 16, 48, 32),
    "small": (6, 384, 6, 1536, 30528, 64, 64, 64, 64),
    "small-768": (6, 768, 12, 3072, 30528, 64, 64, 64, 64),
    "long": (6, 384, 6, 1536, 30528, 64, 128, 128, 512),
}
MODELS = ("biencoder", "isolated", "joint")


def main() -> None:
    """Time each model at each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["demo", "small"], choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--chunk", type=int, default=0, help="texts encoded at once; 0: all")
    args = parser.parse_args()
    for shape in args.shapes:
        steps = {model: ready_step(model, SHAPES[shape], args.dtype, args.chunk) for model in MODELS}
        seconds = {model: [] for model in MODELS}
        for _ in range(args.rounds):
            for model, step in steps.items():
                start = time.perf_counter()
                step()
                seconds[model].append(time.perf_counter() - start)
        queries = SHAPES[shape][5]
        for model in MODELS:
            ratios = [b / s for b, s in zip(seconds["biencoder"], seconds[model], strict=True)]
            line = {
                "benchmark": "train_step",
                "shape": shape,
                "model": model,
                "pairs_per_second": round(queries / statistics.median(seconds[model]), 1),
                "ratio_to_biencoder": round(statistics.median(ratios), 3),
                "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
                "rounds": args.rounds,
                "dtype": args.dtype,
                "chunk": args.chunk,
            }
            print(json.dumps(line | about()), flush=True)


def ready_step(model: str, shape: tuple, dtype: str, chunk: int):
    """A function that runs one compiled training step on random tokens and waits for it."""
    layers, width, heads, mlp_width, vocabulary, b, query_length, document_length, j = shape
    encoder = EncoderConfig(vocabulary, width, layers, heads, mlp_width, dtype=dtype)
    rngs = nnx.Rngs(0)
    if model == "biencoder":
        module = Biencoder(BiencoderConfig(encoder), rngs=rngs)
    else:
        first = BiencoderConfig(encoder, head=True)
        module = ContextualEncoder(ContextualConfig(first, encoder, j, context_attention=model), rngs=rngs)
    optimizer, schedule = make_optimizer(
        learning_rate=1e-4, warmup_steps=10, steps=1000, weight_decay=0.01, clip_norm=1.0
    )
    graph, state = init_state(module, optimizer)
    mesh = sharding.make_mesh(1)
    config = StepConfig(query_chunk=chunk, document_chunk=chunk, context_chunk=chunk)
    train_step = make_train_step(graph, optimizer, schedule, config, mesh)
    state = sharding.replicate(mesh, state)
    batch = sharding.shard_batch(mesh, random_batch(b, query_length, document_length, j, vocabulary))
    key = sharding.replicate(mesh, stream(0, "dropout"))

    def run() -> None:
        nonlocal state
        state, metrics = train_step(state, batch, key)
        jax.block_until_ready(metrics)

    run()
    return run


def random_batch(b: int, query_length: int, document_length: int, j: int, vocabulary: int) -> dict[str, np.ndarray]:
    """Full-length random tokens in the loader's form, G = 1, no hard negatives."""
    random = np.random.default_rng(0)

    def texts(name, count, length):
        ids = random.integers(0, vocabulary, (1, count, length), dtype=np.int32)
        return {f"{name}_ids": ids, f"{name}_mask": np.ones(ids.shape, bool)}

    return {
        **texts("query", b, query_length),
        **texts("document", b, document_length),
        **texts("context", j, document_length),
        "keep": np.ones((1, b, b), bool),
    }


def about() -> dict[str, str]:
    """Hardware, versions and commit of a result."""
    device = jax.devices()[0]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    hardware = f"{device.platform} {device.device_kind}, {platform.processor() or platform.machine()}"
    return {"hardware": hardware, "cores": str(os.cpu_count()), "jax": jax.__version__, "commit": commit}


if __name__ == "__main__":
    main()
