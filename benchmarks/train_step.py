"""Training speed of the three models, as ratios within one run: one JSON line a case.

    python benchmarks/train_step.py [--shapes small long] [--queries 256] [--torch eager compiled] [--reference DIR]
    python benchmarks/train_step.py --shapes large --dtype bfloat16 --chunk 256 --torch eager --peak 790   # on a GPU

The cases take turns, step by step, those of PyTorch in a process of their own: each library has its threads and memory
for itself, and sleeps while the other one runs. Each turn begins with a step that is not timed: in a process that slept
it takes longer (2.7 × was seen). A ratio is the median over rounds of the first case's seconds by the case's, for
PyTorch of our seconds for the same model by PyTorch's. `cores_used` is (user + system) / wall of the case's process.
`flops_ratio` is what the ratio would be if every model ran at the biencoder's FLOP/s: the biencoder's model FLOPs by
the case's, padding and recomputation not counted.
"""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from harness import emit, speed_ratio
from shapes import PACKAGES, SHAPES, Shape, Texts, arguments, build, config_of, random_batch

from cde_jax.batching.layout import choose_layout, count_lengths, to_chunks
from cde_jax.config import Train
from cde_jax.models.attention import select_kernel
from cde_jax.training import sharding
from cde_jax.training.accounting import GIB, program_bytes, step_flops, utilisation
from cde_jax.training.step import init_state, make_optimizer, make_train_step, stream


class Run(NamedTuple):
    """What a function returned (a training step: the loss), its seconds, and how many cores its process used."""

    result: Any
    seconds: float
    cores: float


def main() -> None:
    """Time each model at each shape."""
    parser = arguments(__doc__, ["small"])
    parser.add_argument("--queries", type=int, help="B of a plan batch, instead of the shape's")
    parser.add_argument("--chunk", type=int, default=0, help="texts encoded at once; 0: all")
    parser.add_argument("--remat", default="auto", help="of layers, in JAX, as model.remat in the config")
    args = parser.parse_args()
    for name in args.shapes:
        shape = SHAPES[name]._replace(queries=args.queries or SHAPES[name].queries)
        compiled = {
            kind: jax_step(kind, shape, args.dtype, args.chunk, attention=args.attention, remat=args.remat)
            for kind in args.models
        }
        with torch_process() as process:
            steps = {kind: partial(run_once, step) for kind, (step, _) in compiled.items()}
            steps |= torch_steps(process, args.models, args.torch, shape, args.dtype, args.chunk, args.reference)
            runs = take_turns(steps, args.rounds, args.dtype)
        seconds = {case: [run.seconds for run in of_case] for case, of_case in runs.items()}
        for case in steps:
            kind, _, form = case.partition(", ")
            flops, typical = flops_of(kind, shape), statistics.median(seconds[case])
            used = utilisation(flops, typical, jax.devices()[0].device_kind, peak=args.peak)
            line = {"benchmark": "train_step", "shape": name, "queries": shape.queries, "model": case}
            compared = {kind: seconds[kind], case: seconds[case]} if form else seconds
            line |= {"pairs_per_second": round(shape.queries / typical, 2), **speed_ratio(compared, case)}
            line |= {
                "cores_used": round(statistics.median(run.cores for run in runs[case]), 2),
                "flops_ratio": round(flops_of("biencoder", shape) / flops, 3),
                "tflops": round(flops / typical / 1e12, 3),
                "utilisation": None if used is None else round(used, 4),
            }
            if case in compiled:
                line["program_gib"] = round(compiled[case][1] / GIB, 3)
                line["kernel"] = select_kernel(args.attention, args.dtype, shape.width // shape.heads)
            emit(
                line | {key: getattr(args, key) for key in ("rounds", "dtype", "chunk", "remat", "attention")},
                *PACKAGES,
            )


def run_once(function: Callable[[], Any]) -> Run:
    """Run a function of this process."""
    start, used = time.perf_counter(), time.process_time()
    result = function()
    seconds = time.perf_counter() - start
    return Run(result, seconds, (time.process_time() - used) / seconds)


def take_turns(steps: dict[str, Callable[[], Run]], rounds: int, dtype: str) -> dict[str, list[Run]]:
    """Runs of each case, round by round, after a first round that compiles and compares the losses."""
    check_same_loss({case: step().result for case, step in steps.items()}, dtype)
    return timed_runs(steps, rounds)


def timed_runs(steps: dict[str, Callable[[], Run]], rounds: int) -> dict[str, list[Run]]:
    """Runs of each case, round by round, each after one that is not timed."""
    runs: dict[str, list[Run]] = {case: [] for case in steps}
    for _ in range(rounds):
        for case, step in steps.items():
            step()
            runs[case].append(step())
    return runs


def check_same_loss(losses: dict[str, float], dtype: str) -> None:
    """Exit unless the exported PyTorch module, which has the same weights and texts, has the same first loss."""
    for case, loss in losses.items():
        kind, _, form = case.partition(", ")
        if form.startswith("PyTorch") and abs(loss - losses[kind]) > (1e-3 if dtype == "float32" else 0.1):
            raise SystemExit(f"{case}: expected the first loss of JAX, {losses[kind]}, got {loss}: not the same work")


def torch_process() -> ProcessPoolExecutor:
    """A process for PyTorch, which starts with the first call."""
    return ProcessPoolExecutor(1, get_context("spawn"))


def torch_steps(
    process: ProcessPoolExecutor,
    kinds: list[str],
    forms: list[str],
    shape: Shape,
    dtype: str,
    chunk: int = 0,
    reference: str | None = None,
) -> dict[str, Callable[[], Run]]:
    """Training steps of the exported PyTorch module and of the authors' code, as asked for, in `process`."""
    steps = {}
    for kind in kinds:
        given = (kind, shape, dtype, chunk)
        steps |= {f"{kind}, PyTorch {form}": (*given, form == "compiled", None) for form in forms}
        if reference and kind != "isolated":
            steps[f"{kind}, the authors' code"] = (*given, False, reference)
    return {case: lambda step=step: process.submit(run_torch, *step).result() for case, step in steps.items()}


def run_torch(*step: Any) -> Run:
    """A step of PyTorch, in its process; the arguments of `torch_step`."""
    return run_once(torch_step(*step))


@cache
def torch_step(
    kind: str, shape: Shape, dtype: str, chunk: int, compiled: bool, reference: str | None
) -> Callable[[], float]:
    """The step of a model in PyTorch, made by the first call."""
    import in_torch

    module = in_torch.reference(kind, shape, reference) if reference else in_torch.exported(kind, shape)
    return in_torch.training_step(module, shape, kind, dtype, chunk, compiled)


def make_step(kind: str, shape: Shape, dtype: str, chunk: int, **encoder: Any) -> tuple[Any, Any, Callable]:
    """A mesh of one device, the state of a model on it, and its training step."""
    train = Train(learning_rate=1e-4, warmup_steps=10, sequence_dropout=0.0, document_chunk=chunk)
    mesh = sharding.make_mesh((1, 1))
    optimizer, schedule = make_optimizer(train, steps=1000)
    graph, state = init_state(build(config_of(kind, shape, dtype, **encoder)), optimizer)
    return mesh, sharding.replicate(mesh, state), make_train_step(graph, optimizer, schedule, train, mesh)


def jax_step(kind: str, shape: Shape, dtype: str, chunk: int, **encoder: Any) -> tuple[Callable[[], float], int]:
    """A compiled training step on random tokens that returns the loss, and the bytes of memory that it needs."""
    mesh, state, train_step = make_step(kind, shape, dtype, chunk, **encoder)
    key = sharding.replicate(mesh, stream(0, "dropout"))
    batch = sharding.shard_batch(mesh, step_batch(shape, chunk))
    compiled = train_step.lower(state, batch, key).compile()

    def run() -> float:
        nonlocal state
        state, metrics = compiled(state, batch, key)
        return float(jax.block_until_ready(metrics)["loss"])

    return run, program_bytes(compiled)


def lower_step(kind: str, shape: Shape, dtype: str, chunk: int, lengths: int = 0, **encoder: Any) -> jax.stages.Lowered:
    """The same step, traced from shapes alone; lengths: how many padded ones, as the loader chooses them."""
    train, config = Train(document_chunk=chunk), config_of(kind, shape, dtype, **encoder)
    optimizer, schedule = make_optimizer(train, steps=10_000)
    graph, params = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))), nnx.Param)
    state = jax.eval_shape(lambda params: init_state(nnx.merge(graph, params), optimizer)[1], params)
    slots = shape.context + config.soft_prompt if kind == "joint" else 0
    batch = loader_batch(shape, chunk, lengths, slots) if lengths else step_batch(shape, chunk)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    step = make_train_step(graph, optimizer, schedule, train, sharding.make_mesh((1, 1)))
    return step.lower(state, batch, jax.eval_shape(lambda: stream(0, "dropout")))


def loader_batch(shape: Shape, chunk: int, lengths: int, slots: int) -> dict[str, Any]:
    """One plan batch of texts of many lengths, log-normal around 14 and 150 tokens, without tokens: for its shapes.

    A chunk has as many positions as `chunk` texts of the longest length; `slots` are run with every text.
    """
    random, longest = np.random.default_rng(0), shape.document_length
    sizes = np.concatenate(
        [random.lognormal(np.log(14), 0.5, shape.queries), random.lognormal(np.log(150), 0.8, shape.queries)]
    )
    sizes = np.clip(sizes, 3, longest).astype(int)
    sizes[-1] = longest

    def in_layout(sizes: np.ndarray, lengths: int, slots: int) -> dict[str, Any]:
        layout = choose_layout(count_lengths([sizes]), lengths, chunk * (longest + slots), slots)
        mask = np.arange(longest) < sizes[:, None]
        return jax.tree.map(lambda x: x[None], to_chunks(np.zeros(mask.shape, np.int32), mask, layout))

    return {
        "texts": in_layout(sizes, lengths, slots),
        "context": in_layout(sizes[-shape.context :], -(-lengths // 2), 0),
        "keep": np.ones((1, shape.queries, shape.queries), bool),
    }


def step_batch(shape: Shape, chunk: int) -> dict[str, Any]:
    """One plan batch as the loader gives it, G = 1; `chunk` texts at a time, 0: all of one length."""
    texts = random_batch(shape)
    return {
        "texts": in_chunks([texts["query"], texts["document"]], chunk),
        "context": in_chunks([texts["context"]], chunk),
        "keep": np.ones((1, shape.queries, shape.queries), bool),
    }


def in_chunks(texts: list[Texts], chunk: int) -> dict[str, Any]:
    """Texts of several lengths as chunks, [G, chunks, texts, L] of each length."""
    chunks: dict[str, list] = {"ids": [], "mask": [], "place": []}
    first = 0
    for ids, mask in texts:
        size = min(chunk or len(ids), len(ids))
        chunks["place"].append(first + np.arange(len(ids), dtype=np.int32))
        for name, x in (("ids", ids), ("mask", mask)):
            padded = np.pad(x, ((0, -len(x) % size), (0, 0)))
            chunks[name].append(padded.reshape(1, -1, size, x.shape[1]))
        first += len(padded)
    place = np.concatenate(chunks["place"])[None]  # [G, B + N]
    return {"ids": tuple(chunks["ids"]), "mask": tuple(chunks["mask"]), "place": place}


def flops_of(kind: str, shape: Shape) -> float:
    """Model FLOPs of a step."""
    texts = np.repeat([shape.query_length, shape.document_length], shape.queries)[None]  # [1, 2B]
    context = np.full((1, shape.context), shape.document_length)
    return step_flops(config_of(kind, shape, "float32"), texts, context, scores=shape.queries**2)


if __name__ == "__main__":
    main()
