"""Where the time of a training step goes, by kind of operation: one JSON line a kind, from a trace on a CPU.

    taskset -c 1 python benchmarks/profile_step.py [--shapes small] [--models biencoder] [--queries 16]

Pin it to one core: the times of a program's threads are added up. For GPUs: `train.profile_steps`.
"""

import collections
import re
import tempfile
from pathlib import Path

import jax
from harness import emit
from shapes import PACKAGES, SHAPES, arguments
from train_step import make_step, step_batch

from cde_jax.training import sharding
from cde_jax.training.step import stream


def main() -> None:
    """Trace one step of each model at each shape."""
    parser = arguments(__doc__, ["small"])
    parser.add_argument("--queries", type=int, help="B of a plan batch, instead of the shape's")
    args = parser.parse_args()
    for name in args.shapes:
        shape = SHAPES[name]._replace(queries=args.queries or SHAPES[name].queries)
        for kind in args.models:
            mesh, state, train_step = make_step(kind, shape, args.dtype, 0, attention=args.attention, remat="auto")
            given = sharding.shard_batch(mesh, step_batch(shape, 0)), sharding.replicate(mesh, stream(0, "dropout"))
            step = train_step.lower(state, *given).compile()
            state = jax.block_until_ready(step(state, *given))[0]
            with tempfile.TemporaryDirectory() as folder:
                with jax.profiler.trace(folder):
                    jax.block_until_ready(step(state, *given))
                seconds = seconds_by_kind(next(Path(folder).rglob("*.xplane.pb")), step.as_text())
            for operations, took in seconds.most_common():
                line = {"benchmark": "profile_step", "shape": name, "queries": shape.queries, "model": kind}
                share = round(took / seconds.total(), 3)
                emit(line | {"what": operations, "seconds": round(took, 3), "share": share}, *PACKAGES)


def seconds_by_kind(trace: Path, program: str) -> collections.Counter:
    """Seconds of the operations of a compiled program, without those that they contain (loops, calls)."""
    seconds = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            events = [(e.start_ns, -e.end_ns, e.name) for e in line.events if "hlo_op" in dict(e.stats)]
            running: list[tuple[float, str]] = []  # end and kind of the operations that the current one is in
            for start, end, name in sorted(events):
                while running and running[-1][0] <= start:
                    running.pop()
                kind, took = kind_of(name, program), (-end - start) / 1e9
                if running:
                    seconds[running[-1][1]] -= took
                seconds[kind] += took
                running.append((-end, kind))
    return seconds


def kind_of(name: str, program: str) -> str:
    """What an operation of the program is."""
    if name.startswith("dot"):
        instruction = re.search(rf"%{re.escape(name)} = (.*)", program)
        batched = instruction and "batch_dims" in instruction[1]
        return "products of attention" if batched else "products with weights"
    copies = re.match("copy|transpose|concatenate|.*dynamic-(update-)?slice", name)
    return "copies" if copies else "elementwise, reductions"


if __name__ == "__main__":
    main()
