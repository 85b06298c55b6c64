"""What texts of similar length in common chunks save: padding, compilations and training speed by number of lengths.

python benchmarks/lengths.py WORKDIR [--lengths 1 4 8 12] [--steps 5] [--layers 2 --width 256]

WORKDIR is a prepared work directory (`--stage=prepare`); its config gives the lengths that texts are cut to, the plan
batch and the context. Padding is that of the whole plan: the share of computed tokens that are none of a text. Speed is
that of a training step of the model named here, the cases taking turns step by step; a ratio is the median over steps
of the first case's seconds by the case's, in the same process. The case of one length is recomputed in chunks of 16
texts in the backward pass, as the others are in theirs.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from about import about
from flax import nnx

from cde_jax.batching.loader import Loader
from cde_jax.batching.plan import BatchPlan
from cde_jax.config import Config, from_config_dict
from cde_jax.data.files import read_json
from cde_jax.data.store import Store
from cde_jax.models.contextual import BiencoderConfig, ContextualConfig, ContextualEncoder
from cde_jax.models.encoder import EncoderConfig
from cde_jax.training import sharding
from cde_jax.training.step import StepConfig, count_tokens, init_state, make_optimizer, make_train_step, stream


def main() -> None:
    """One line for each number of lengths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 4, 8, 12])
    parser.add_argument("--chunk-tokens", type=int, default=0, help="of a chunk; 0: as the loader chooses")
    parser.add_argument("--steps", type=int, default=5, help="timed steps; 0: padding only")
    for name, value in (("layers", 2), ("width", 256), ("heads", 4), ("mlp-width", 512)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    config = from_config_dict(read_json(args.workdir / "config.json")["config"])
    loaders = {count: open_loader(config, args.workdir, count, args.chunk_tokens) for count in args.lengths}
    cases = {count: Case(args, config, loader) for count, loader in loaders.items()} if args.steps else {}
    places = np.random.default_rng(0).choice(len(loaders[args.lengths[0]].plan), args.steps, replace=False)
    for place in places.tolist():
        for case in cases.values():
            case.step(place)
    for count, loader in loaders.items():
        layout = loader.layouts.get("texts")
        line = {
            "benchmark": "lengths",
            "source": [config.data.source, *config.data.paths],
            "cut_to": [config.data.query_length, config.data.document_length],
            "batch": config.batching.batch_size,
            "context": config.model.context_size,
            "text_lengths": count,
            "padding": round(padding(loader), 4),
            "lengths": layout and list(layout.lengths),
            "chunk_tokens": layout and layout.lengths[-1] * layout.texts[-1],
        }
        if args.steps:
            first, case = cases[args.lengths[0]], cases[count]
            ratios = [a / b for a, b in zip(first.seconds, case.seconds, strict=True)]
            line |= {
                "pairs_per_second": round(config.batching.batch_size / statistics.median(case.seconds), 1),
                "ratio": round(statistics.median(ratios), 2),
                "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
                "compilations": case.train_step._cache_size(),
                "seconds_to_compile": round(case.compiling, 1),
                "model": [args.layers, args.width, args.heads, args.mlp_width],
            }
        print(json.dumps(line | about("jax")), flush=True)


def open_loader(config: Config, workdir: Path, text_lengths: int, chunk_tokens: int) -> Loader:
    """One plan batch a step."""
    return Loader(
        BatchPlan.load(workdir / "plan"),
        Store.open(workdir / "store/pairs", kind="pairs"),
        batches_per_step=1,
        context_size=config.model.context_size,
        context_source=config.batching.context_source,
        query_length=config.data.query_length,
        document_length=config.data.document_length,
        seed=config.seed,
        text_lengths=text_lengths,
        chunk_tokens=chunk_tokens,
    )


def padding(loader: Loader) -> float:
    """Share of all computed tokens of the plan that are none of a text."""
    tokens = computed = 0
    for step in range(len(loader.plan)):
        counts = count_tokens(loader.batch(step), StepConfig())
        tokens, computed = tokens + int(counts["tokens"]), computed + int(counts["computed_tokens"])
    return 1 - tokens / computed


class Case:
    """A compiled training step, fed by one loader; `seconds` of each timed step."""

    def __init__(self, args: argparse.Namespace, config: Config, loader: Loader):
        encoder = EncoderConfig(config.data.vocab_size, args.width, args.layers, args.heads, args.mlp_width)
        shape = ContextualConfig(BiencoderConfig(encoder, head=True), encoder, config.model.context_size)
        optimizer, schedule = make_optimizer(
            learning_rate=1e-4, warmup_steps=10, steps=1000, weight_decay=0.01, clip_norm=1.0
        )
        graph, state = init_state(ContextualEncoder(shape, rngs=nnx.Rngs(0)), optimizer)
        self.mesh = sharding.make_mesh(1)
        self.state = sharding.replicate(self.mesh, state)
        # On CPU that is faster than to keep all activations.
        chunks = {f"{name}_chunk": 16 for name in ("query", "document", "context")}
        self.train_step = make_train_step(graph, optimizer, schedule, StepConfig(**chunks), self.mesh)
        self.key = sharding.replicate(self.mesh, stream(0, "dropout"))
        self.loader, self.seconds = loader, []
        self.step(0)
        self.compiling = self.seconds.pop()

    def step(self, place: int) -> None:
        """Train on one plan batch, and note how long it takes."""
        batch = sharding.shard_batch(self.mesh, self.loader.batch(place))
        batch.pop("plan_batch")
        start = time.perf_counter()
        self.state, metrics = self.train_step(self.state, batch, self.key)
        jax.block_until_ready(metrics)
        self.seconds.append(time.perf_counter() - start)


if __name__ == "__main__":
    main()
