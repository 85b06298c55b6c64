"""Peak memory of a training step by the size of its batch: one JSON line a case, each in a process of its own.

    python benchmarks/memory.py [--shapes small] [--queries 128 512 2048] [--chunk 32] [--torch eager] [--reference DIR]
    python benchmarks/memory.py --shapes large --queries 1024 4096 16384 --chunk 128 --dtype bfloat16   # on a GPU

`program_gib` is what the compiler says that the step needs; nothing is run or allocated for it. With --lengths texts
are of many lengths, padded to so many as in a run. --attention and --remat may be those of another platform than the
one that compiles ("xla", "none": what an accelerator runs), which is then an estimate. With --run one step is run too,
as it always is for PyTorch: `peak_gib` is the allocator's peak on a GPU, and the growth of the process' peak resident
memory on a CPU. `ratio_to_smallest` compares with the fewest queries: with chunks it should stay near 1.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import emit, peak_bytes
from shapes import PACKAGES, SHAPES, Shape, arguments

GIB = 2**30


def main() -> None:
    """Start a process for each case; with --case, be such a process."""
    parser = arguments(__doc__, ["small"])
    parser.add_argument("--queries", nargs="+", type=int, default=[128, 512, 2048], help="sizes of a plan batch, B")
    parser.add_argument("--chunk", type=int, default=32, help="texts encoded at once; 0: all")
    parser.add_argument("--lengths", type=int, default=0, help="padded lengths of texts; 0: all texts are the longest")
    parser.add_argument("--remat", default="auto", help="of layers, in JAX, as model.remat in the config")
    parser.add_argument("--run", action="store_true", help="run a step in JAX too, and measure it")
    parser.add_argument("--case", nargs=3, metavar=("SHAPE", "MODEL", "B"), help="only this one, in this process")
    args = parser.parse_args()
    if args.case:
        name, model, queries = args.case
        print(json.dumps(measure(args, SHAPES[name]._replace(queries=int(queries)), model)))
        return
    suffixes = ["", *(f", PyTorch {form}" for form in args.torch), *([", the authors' code"] if args.reference else [])]
    models = [
        kind + suffix for suffix in suffixes for kind in args.models if (kind, suffix[2:5]) != ("isolated", "the")
    ]
    for name in args.shapes:
        for model in models:
            smallest: dict[str, float] = {}
            for queries in args.queries:
                line = {"benchmark": "memory", "shape": name, "model": model, "queries": queries}
                line |= in_process(name, model, queries)
                for key in ("program_gib", "peak_gib"):
                    if key in line:
                        line[f"{key}_ratio_to_smallest"] = round(line[key] / smallest.setdefault(key, line[key]), 3)
                settings = {key: getattr(args, key) for key in ("chunk", "lengths", "dtype", "remat", "attention")}
                emit(line | settings, *PACKAGES)


def in_process(name: str, model: str, queries: int) -> dict[str, Any]:
    """Run this script again with --case and the same options; an error is its last line."""
    command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--case", name, model, str(queries)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        return {"error": ran.stderr.strip().splitlines()[-1][:300]}
    return json.loads(ran.stdout.strip().splitlines()[-1])


def measure(args: Any, shape: Shape, model: str) -> dict[str, float]:
    """Memory of one step, in GiB."""
    kind, _, form = model.partition(", ")
    if form:
        import in_torch

        def run() -> None:
            authors = form.startswith("the authors")
            module = in_torch.reference(kind, shape, args.reference) if authors else in_torch.exported(kind, shape)
            in_torch.training_step(module, shape, kind, args.dtype, args.chunk, form.endswith("compiled"))()

        return {"peak_gib": growth(run, in_torch.peak_bytes)}
    from train_step import jax_step, lower_step

    from cde_jax.training.accounting import program_bytes

    options = {"attention": args.attention, "remat": args.remat}
    compiled = lower_step(kind, shape, args.dtype, args.chunk, args.lengths, **options).compile()
    found = {"program_gib": round(program_bytes(compiled) / GIB, 3)}
    if args.run:
        found["peak_gib"] = growth(lambda: jax_step(kind, shape, args.dtype, args.chunk, **options)[0](), jax_peak)
    return found


def jax_peak() -> int:
    """Peak memory of the device; of the process where the device does not say."""
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", peak_bytes())


def growth(run: Callable[[], Any], peak: Callable[[], int]) -> float:
    """GiB by which `run` raises the peak."""
    import jax

    jax.numpy.zeros(8).block_until_ready()  # starts the backend
    before = peak()
    run()
    return round((peak() - before) / GIB, 3)


if __name__ == "__main__":
    main()
