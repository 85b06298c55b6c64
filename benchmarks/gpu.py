"""What one GPU does, in one run of at most ten minutes: the other benchmarks, case by case, as JSON lines and a figure.

    python benchmarks/gpu.py [--out gpu.jsonl] [--minutes 10] [--queries 512 4096 16384] [--peak 790]

Every kernel against float32; a training step of each model at the paper's size (pairs/s, utilisation, memory) for
several batch sizes, with the exported PyTorch module beside it for the first; encoding, also by sentence-transformers.
A case is a process, so that one that fails does not end the others; it is killed at the end of the time, and what is
left is skipped. It needs what training needs (jax, flax, optax, numpy, safetensors, jaxtyping); without torch,
transformers or sentence-transformers those comparisons are skipped, without matplotlib the figure.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shapes import KINDS, SHAPES

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Run the cases one after the other; exit 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), help="lines; the figure stands beside it, .svg")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all cases together")
    parser.add_argument("--shape", default="large", choices=SHAPES)
    parser.add_argument(
        "--queries", nargs="+", type=int, default=[512, 4096, 16384], help="B, the first one with PyTorch"
    )
    parser.add_argument("--texts", type=int, default=4096, help="whole texts that are encoded")
    parser.add_argument("--chunk", type=int, default=32, help="texts encoded at once in training; joint: half as many")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--peak", type=float, default=0.0, help="TFLOP/s of the device; 0: from its data sheet")
    args = parser.parse_args()
    end, lines = time.monotonic() + 60 * args.minutes, []
    with args.out.open("w") as file, tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)  # kernels that XLA timed once are known to all cases
        for name, command, packages in cases(args):
            missing = [package for package in packages if find_spec(package) is None]
            if missing:
                results = [{"case": name, "skipped": f"{', '.join(missing)} not installed"}]
            else:
                results = run(name, command, end - time.monotonic())
            for line in results:
                lines.append(line)
                print(json.dumps(line), flush=True)
                file.write(json.dumps(line) + "\n")
                file.flush()
    if find_spec("matplotlib"):
        draw(lines, args.out.with_suffix(".svg"))
    if failed := [line["case"] for line in lines if "error_message" in line or line.get("ok") is False]:
        raise SystemExit(f"these cases failed: {', '.join(failed)}")


def cases(args: argparse.Namespace) -> Iterator[tuple[str, list[str], list[str]]]:
    """Name, command and optional packages of each case, those that tell most first."""
    model = ["--shapes", args.shape, "--dtype", args.dtype]
    measured, torch = [*model, "--peak", str(args.peak)], ["torch", "transformers"]

    def train(kind: str, queries: int, rounds: int, name: str = "", *options: str) -> tuple[str, list[str]]:
        size = ["--queries", str(queries), "--chunk", str(args.chunk // 2 if kind == "joint" else args.chunk)]
        command = ["train_step.py", *measured, "--models", kind, *size, "--remat=none", f"--rounds={rounds}", *options]
        return f"training, {kind}, B = {queries}{name}", command

    first, *more = args.queries
    yield "kernels", ["kernels.py", "--shapes", args.shape, "--models", "isolated", "joint"], []
    for kind in KINDS:
        yield *train(kind, first, 5), []
    for kind in KINDS:
        yield *train(kind, first, 3, ", PyTorch eager beside it", "--torch", "eager"), torch
    beside = ["--torch", "eager"] if all(map(find_spec, torch)) else []
    yield "encoding", ["encode.py", *measured, "--rounds=5", *beside], []
    whole = ["encode.py", *model, "--models", "--sentence-transformers", f"--texts={args.texts}", "--rounds=3"]
    yield "whole texts, sentence-transformers beside it", whole, [*torch, "sentence_transformers"]
    for kind in KINDS[:2]:
        yield *train(kind, first, 3, ", kernel xla", "--attention=xla"), []
    for queries in more:
        for kind in KINDS:
            yield *train(kind, queries, 1), []


def run(name: str, command: list[str], seconds: float) -> list[dict[str, Any]]:
    """The lines of a case, which may take so many seconds; a failure or the end of the time as the last one."""
    if seconds <= 0:
        return [{"case": name, "skipped": "no time left"}]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        try:
            ran = subprocess.run(
                [sys.executable, str(HERE / command[0]), *command[1:]],
                stdout=subprocess.PIPE, stderr=errors, timeout=seconds, env=environment,
            )  # fmt: skip
            output, failed = ran.stdout, ran.returncode
        except subprocess.TimeoutExpired as stopped:
            output, failed = stopped.stdout or b"", None
        errors.seek(0)
        messages = errors.read().strip().splitlines()
    lines = [{"case": name} | json.loads(line) for line in output.decode().splitlines() if line.startswith("{")]
    if failed:
        lines.append({"case": name, "error_message": " | ".join(messages[-3:])[-1000:] or f"exit status {failed}"})
    elif failed is None:
        lines.append({"case": name, "skipped": "stopped at the end of the time"})
    return [line | {"case_seconds": round(time.monotonic() - start, 1)} for line in lines]


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Pairs/s, utilisation and memory of training by the size of the batch."""
    from matplotlib.figure import Figure

    trained = [line for line in lines if line.get("benchmark") == "train_step" and line["attention"] == "auto"]
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    panels = {"pairs_per_second": "pairs/s", "utilisation": "model FLOPs utilisation", "program_gib": "memory, GiB"}
    for axes, (key, label) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for model in dict.fromkeys(line["model"] for line in trained):
            points = {line["queries"]: line[key] for line in trained if line["model"] == model and line.get(key)}
            if points:
                axes.plot(points.keys(), points.values(), "o-", label=model)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="B, pairs in a batch", ylabel=label, ylim=(0, None))
    axes = figure.axes[0]
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
