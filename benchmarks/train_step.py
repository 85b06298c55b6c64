"""Training speed of the three models, as ratios in one run: one JSON line per case.

    python benchmarks/train_step.py [--shapes small long] [--queries 256] [--torch eager compiled] [--reference DIR]
    python benchmarks/train_step.py --shapes large --dtype bfloat16 --chunk 256 --torch eager --peak 790   # on a GPU

The models take turns, step by step, so that a machine that slows down slows all of them. A ratio is the median over
rounds of the biencoder's seconds by the case's, within one round. `flops_ratio` is what the ratio would be if every
model ran at the biencoder's FLOP/s: the biencoder's model FLOPs by the case's, padding and recomputation not counted.
"""

import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from cases import KINDS, SHAPES, Shape, arguments, build, config_of, emit, random_tokens, ratio, take_turns

from cde_jax.training import sharding
from cde_jax.training.accounting import step_flops, utilisation
from cde_jax.training.step import StepConfig, init_state, make_optimizer, make_train_step, stream


def main() -> None:
    """Time each model at each shape."""
    parser = arguments(__doc__, ["small"])
    parser.add_argument("--queries", type=int, help="B of a plan batch, instead of the shape's")
    parser.add_argument("--chunk", type=int, default=0, help="texts encoded at once; 0: all")
    parser.add_argument("--remat", default="auto", choices=["auto", "none", "full", "dots"], help="of layers, in JAX")
    args = parser.parse_args()
    for name in args.shapes:
        shape = SHAPES[name]._replace(queries=args.queries or SHAPES[name].queries)
        cases: dict[str, Callable[[], Any]] = {
            kind: ready_step(kind, shape, args.dtype, args.chunk, attention=args.attention, remat=args.remat)
            for kind in args.models
        }
        cases |= torch_steps(args, shape)
        check_same_work({case: run() for case, run in cases.items()}, args.dtype)  # compiled now, and memory in place
        seconds = take_turns(cases, args.rounds)
        for case in cases:
            flops = flops_of(next(kind for kind in KINDS if kind in case), shape)
            fastest = statistics.median(seconds[case])
            used = utilisation(flops, fastest, jax.devices()[0].device_kind, peak=args.peak)
            line = {
                "benchmark": "train_step",
                "shape": name,
                "queries": shape.queries,
                "model": case,
                "pairs_per_second": round(shape.queries / fastest, 2),
                **ratio(seconds, case),
                "flops_ratio": round(flops_of("biencoder", shape) / flops, 3),
                "tflops": round(flops / fastest / 1e12, 3),
                "utilisation": None if used is None else round(used, 4),
            }
            settings = ("rounds", "dtype", "chunk", "remat", "attention")
            emit(line | {key: getattr(args, key) for key in settings})


def check_same_work(losses: dict[str, float], dtype: str) -> None:
    """Our PyTorch module has the same weights and texts, so the first loss must be the same."""
    for case, loss in losses.items():
        kind, _, form = case.partition(", ")
        if form.startswith("PyTorch") and abs(loss - losses[kind]) > (1e-3 if dtype == "float32" else 0.1):
            raise SystemExit(f"{case}: the first loss is {loss}, in JAX it is {losses[kind]}: not the same work")


def torch_steps(args: Any, shape: Shape) -> dict[str, Callable[[], Any]]:
    """Steps of our PyTorch module and of the authors' code, where they are asked for."""
    if not args.torch and not args.reference:
        return {}
    import in_torch

    texts = random_batch(shape)
    cases = {}
    for kind in args.models:
        batch = {name: pair for name, pair in texts.items() if name != "context" or kind != "biencoder"}
        for form in args.torch:
            step = in_torch.training_step(
                in_torch.module_of(kind, shape), batch, args.dtype, args.chunk, form == "compiled"
            )
            cases[f"{kind}, PyTorch {form}"] = step
        if args.reference and kind != "isolated":
            module = in_torch.reference_of(kind, shape, args.reference)
            cases[f"{kind}, the authors' code"] = in_torch.training_step(module, batch, args.dtype, args.chunk, False)
    return cases


def make_step(shape_of: Any, chunk: int) -> tuple[Any, Any, Callable]:
    """The state of a model on one device, and its training step."""
    optimizer, schedule = make_optimizer(
        learning_rate=1e-4, warmup_steps=10, steps=1000, weight_decay=0.01, clip_norm=1.0
    )
    graph, state = init_state(build(shape_of), optimizer)
    mesh = sharding.make_mesh(1)
    config = StepConfig(sequence_dropout=0.0, query_chunk=chunk, document_chunk=chunk, context_chunk=chunk)
    return mesh, sharding.replicate(mesh, state), make_train_step(graph, optimizer, schedule, config, mesh)


def ready_step(kind: str, shape: Shape, dtype: str, chunk: int, **encoder: Any) -> Callable[[], float]:
    """A training step on random tokens, compiled at its first call; gives the loss."""
    mesh, state, train_step = make_step(config_of(kind, shape, dtype, **encoder), chunk)
    key = sharding.replicate(mesh, stream(0, "dropout"))
    batch = sharding.shard_batch(mesh, step_batch(shape))

    def run() -> float:
        nonlocal state
        state, metrics = train_step(state, batch, key)
        return float(jax.block_until_ready(metrics)["loss"])

    return run


def lower_step(kind: str, shape: Shape, dtype: str, chunk: int, **encoder: Any) -> jax.stages.Lowered:
    """The same step, from shapes alone."""
    _, state, train_step = make_step(config_of(kind, shape, dtype, **encoder), chunk)
    return train_step.lower(state, step_batch(shape), stream(0, "dropout"))


def step_batch(shape: Shape) -> dict[str, np.ndarray]:
    """One plan batch in the loader's form, G = 1."""
    batch = {"keep": np.ones((1, shape.queries, shape.queries), bool)}
    for name, (ids, mask) in random_batch(shape).items():
        batch |= {f"{name}_ids": ids[None], f"{name}_mask": mask[None]}
    return batch


def random_batch(shape: Shape) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Full-length random tokens of one plan batch, without hard negatives."""
    return {
        "query": random_tokens(shape.queries, shape.query_length, shape.vocabulary),
        "document": random_tokens(shape.queries, shape.document_length, shape.vocabulary),
        "context": random_tokens(shape.context, shape.document_length, shape.vocabulary),
    }


def flops_of(kind: str, shape: Shape) -> float:
    """Model FLOPs of a step."""
    texts = np.repeat([shape.query_length, shape.document_length], shape.queries)[None]
    context = np.full((1, shape.context), shape.document_length)
    return step_flops(config_of(kind, shape, "float32"), texts, context, scores=shape.queries**2)


if __name__ == "__main__":
    main()
