"""Peak memory of a training step by the size of its batch: one JSON line per case, each in a process of its own.

    python benchmarks/memory.py [--shapes small] [--queries 128 512 2048] [--chunk 32] [--torch eager] [--reference DIR]
    python benchmarks/memory.py --shapes large --queries 1024 4096 16384 --chunk 128 --dtype bfloat16   # on a GPU

Ours is what the compiler says that the program needs (`training.memory.program_bytes`), and with --run also what one
step really took, as for PyTorch: on a GPU the allocator's peak, on a CPU the growth of the process' peak resident
memory from before the batch was made. `ratio_to_smallest` is to the same case with the fewest queries: with chunks it
should stay near 1. `--chunk -1` finds the largest chunk that fits `--gib` (0: the device's memory).
"""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases import SHAPES, Shape, arguments, emit


def main() -> None:
    """A process for each case, or with --one that case."""
    parser = arguments(__doc__, ["small"])
    parser.add_argument("--queries", nargs="+", type=int, default=[128, 512, 2048], help="sizes of a plan batch, B")
    parser.add_argument("--chunk", type=int, default=32, help="texts encoded at once; 0: all; -1: as many as fit")
    parser.add_argument("--remat", default="auto", choices=["auto", "none", "full", "dots"], help="of layers, in JAX")
    parser.add_argument("--gib", type=float, default=0.0, help="memory that --chunk -1 may use")
    parser.add_argument("--run", action="store_true", help="run a step of ours too, and measure it")
    parser.add_argument("--one", nargs=3, metavar=("SHAPE", "CASE", "B"), help="only this, in this process")
    args = parser.parse_args()
    if args.one:
        name, case, queries = args.one
        print(json.dumps(measure(args, SHAPES[name]._replace(queries=int(queries)), case)))
        return
    forms = ["", *(f", PyTorch {form}" for form in args.torch), *([", the authors' code"] if args.reference else [])]
    for name in args.shapes:
        for case in (kind + form for form in forms for kind in args.models):
            if case == "isolated, the authors' code":
                continue
            smallest: dict[str, float] = {}
            for queries in args.queries:
                found = in_process(name, case, queries)
                line = {"benchmark": "memory", "shape": name, "model": case, "queries": queries, **found}
                for key in ("program_gib", "peak_gib"):
                    if key in found:
                        line[f"{key}_ratio_to_smallest"] = round(found[key] / smallest.setdefault(key, found[key]), 3)
                emit(line | {key: getattr(args, key) for key in ("dtype", "remat", "attention")})


def in_process(name: str, case: str, queries: int) -> dict[str, Any]:
    """This script with --one and the same options."""
    command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--one", name, case, str(queries)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        return {"error": ran.stderr.strip().splitlines()[-1][:300]}
    return json.loads(ran.stdout.strip().splitlines()[-1])


def measure(args: Any, shape: Shape, case: str) -> dict[str, Any]:
    """Memory of one step, in GiB."""
    kind, _, form = case.partition(", ")
    return in_torch(args, shape, kind, form) if form else in_jax(args, shape, kind)


def in_jax(args: Any, shape: Shape, kind: str) -> dict[str, Any]:
    """Of our step, from shapes alone unless it is run."""
    import jax
    from train_step import lower_step, ready_step

    from cde_jax.training.memory import AUTO, device_limit, largest_chunk, program_bytes

    encoder = {"attention": args.attention, "remat": args.remat}
    needs = lambda chunk: program_bytes(lower_step(kind, shape, args.dtype, chunk, **encoder).compile())  # noqa: E731
    chunk = args.chunk
    if chunk == AUTO:
        limit = device_limit(jax.devices()[0], args.gib)
        chunk = largest_chunk(needs, limit, max(shape.queries, shape.context))
    found = {"chunk": chunk, "program_gib": gib(needs(chunk))}
    if args.run:
        found["peak_gib"] = growth(lambda: ready_step(kind, shape, args.dtype, chunk, **encoder)())
    return found


def in_torch(args: Any, shape: Shape, kind: str, form: str) -> dict[str, Any]:
    """Of PyTorch's step, run once."""
    import in_torch as them
    from train_step import random_batch

    def run() -> None:
        made = them.reference_of(kind, shape, args.reference) if "authors" in form else them.module_of(kind, shape)
        batch = {name: pair for name, pair in random_batch(shape).items() if name != "context" or kind != "biencoder"}
        them.training_step(made, batch, args.dtype, args.chunk, form.endswith("compiled"))()

    if them.DEVICE == "cuda":
        run()
        return {"chunk": args.chunk, "peak_gib": gib(them.torch.cuda.max_memory_allocated())}
    return {"chunk": args.chunk, "peak_gib": growth(run)}


def growth(run: Callable[[], Any]) -> float:
    """GiB by which `run` raised the peak: of the device where it says, else of this process' resident memory."""
    import jax

    def peak() -> int:
        device = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if device is None else device

    jax.numpy.zeros(8).block_until_ready()
    before = peak()
    run()
    return gib(peak() - before)


def gib(count: float) -> float:
    """Bytes in GiB."""
    return round(count / 2**30, 3)


if __name__ == "__main__":
    main()
