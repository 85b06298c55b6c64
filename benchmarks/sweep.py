"""Run variants of a config with several seeds: each (variant, seed) is a work directory of its own.

    python benchmarks/sweep.py --sweep=table1 --workdir=runs/table1 --seeds 0 1 2 --steps 300 \
        --pairs FILES --evaluation SETS --start=DIR [--queries 150 --documents 800] [--set train.learning_rate=1e-4 …]
    python benchmarks/compare.py runs/table1

The sweep is a module of configs/sweeps/. The same command continues where it was stopped: a stage whose artefact is
there is skipped. To train on another machine, where only jax, flax, optax, numpy, safetensors and jaxtyping are
installed: call this with --stage=prepare, carry WORKDIR and the checkout there (with tar or rsync -H: files that work
directories share are hard links), call it with --stage=train and then --stage=rank, which leaves rankings; carry it
back, and call it with --stage=evaluate. After the first call --workdir (relative to the checkout, and the same on both
machines) and --stage are enough.

A run's seed is the config's: every seed has a batch plan of its own, and so other batches.
"""

import argparse
import importlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import evaluation_sets  # noqa: E402
from harness import emit  # noqa: E402

from cde_jax.config import affected, flatten, from_config_dict, with_changes  # noqa: E402
from cde_jax.data.files import read_json, write_json  # noqa: E402
from cde_jax.data.sources import beir  # noqa: E402
from cde_jax.data.sources.beir import EvaluationSet  # noqa: E402
from cde_jax.stages import run as stages  # noqa: E402
from cde_jax.stages.workdir import CHECKPOINTS, EVALUATION, METRICS, PLAN, STORE, TRAINING  # noqa: E402
from cde_jax.training.checkpoint import Checkpoints  # noqa: E402

SWEEP = "sweep.json"  # {"runs": {VARIANT-SEED: {"variant", "seed", "changes", "config"}}}, the baseline first
START, SETS = "start", "evaluation"  # in WORKDIR: the pretrained encoder, the evaluation sets
Run = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Define the runs, or read them from sweep.json, and run the stage of each."""
    args = parse(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("cde_jax").setLevel(logging.INFO)
    try:
        runs = define(args) if args.sweep else read_json(args.workdir / SWEEP)["runs"]
        for name, run in runs.items():
            if any(fnmatch(run["variant"], pattern) for pattern in args.variants) and (
                args.seeds is None or run["seed"] in args.seeds
            ):
                run_one(args, name, runs)
                if interrupted(args.workdir / name):
                    sys.exit(f"stopped in {name}: the same command continues there")
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--sweep", default="", help="a module of configs/sweeps/; not needed after the first call")
    parser.add_argument("--variants", nargs="+", default=["*"], help="names or patterns; all if not given")
    parser.add_argument("--seeds", nargs="+", type=int, help="0 1 2 if not given")
    parser.add_argument("--stage", default="all", choices=("all", *stages.STAGES))
    parser.add_argument("--steps", type=int, default=0, help="of each training; 0: as the config says")
    parser.add_argument("--start", default="", help="pretrained encoder, a directory or hub name: its tokenizer too")
    parser.add_argument("--pairs", nargs="*", default=[], help="data.paths")
    parser.add_argument("--evaluation", nargs="*", default=[], help="BEIR folders, or folders of such")
    parser.add_argument("--queries", type=int, default=0, help="at most so many of each set; 0: all")
    parser.add_argument("--documents", type=int, default=0, help="at most so many of each set; 0: all")
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE", help="changes for all variants")
    return parser.parse_args(arguments)


def define(args: argparse.Namespace) -> dict[str, Run]:
    """The runs of the sweep, written to sweep.json beside those that are there; all configs are checked first."""
    sweep = load_sweep(args.sweep)
    base = importlib.import_module(f"configs.{sweep.BASE}").get_config().to_dict()
    sets = evaluation_sets.read(args.evaluation, args.queries, args.documents) if args.evaluation else []
    changes = dict(sweep.CHANGES) | common_changes(args, sets)
    file = args.workdir / SWEEP
    runs = read_json(file)["runs"] if file.exists() else {}
    for seed in args.seeds or (0, 1, 2):
        for variant, own in sweep.VARIANTS.items():
            config = from_config_dict(with_changes(base, changes | dict(own) | settings(args.set) | {"seed": seed}))
            run = {"variant": variant, "seed": seed, "changes": dict(own), "config": config.as_dict()}
            if any(fnmatch(variant, pattern) for pattern in args.variants):
                runs[f"{variant}-{seed}"] = run
    if not runs:
        raise ValueError(f"no variant matches {args.variants}: the sweep has {', '.join(sweep.VARIANTS)}")
    write_inputs(args, sets)
    write_json(file, {"runs": runs})
    return read_json(file)["runs"]


def load_sweep(name: str) -> Any:
    """The module configs/sweeps/NAME.py. Raises ValueError with the names that there are."""
    known = sorted(path.stem for path in (ROOT / "configs/sweeps").glob("*.py") if path.stem != "base")
    if name not in known:
        raise ValueError(f"unknown sweep {name!r}: known are {', '.join(known)}")
    return importlib.import_module(f"configs.sweeps.{name}")


def common_changes(args: argparse.Namespace, sets: Sequence[EvaluationSet]) -> dict[str, Any]:
    """What --steps, --start, --pairs and --evaluation change; `write_inputs` writes what they name in WORKDIR."""
    changes: dict[str, Any] = {}
    if args.steps:
        changes |= {"train.steps": args.steps, "train.warmup_steps": args.steps // 10}
    if args.start:
        start = str(args.workdir / START) if Path(args.start).is_dir() else args.start
        changes |= dict.fromkeys(("data.tokenizer", "model.init.first_stage", "model.init.second_stage"), start)
    if args.pairs:
        changes["data.paths"] = tuple(args.pairs)
    if sets:
        changes["data.evaluation"] = tuple(str(args.workdir / SETS / dataset.name) for dataset in sets)
    return changes


def write_inputs(args: argparse.Namespace, sets: Sequence[EvaluationSet]) -> None:
    """The evaluation sets, cut down, and the pretrained encoder: carried along with the work directories."""
    for dataset in sets:
        beir.write(dataset, args.workdir / SETS / dataset.name)
    if args.start and Path(args.start).is_dir() and not (args.workdir / START).exists():
        shutil.copytree(args.start, args.workdir / START)


def settings(changes: Sequence[str]) -> dict[str, Any]:
    """["train.learning_rate=1e-4", …] as {name: value}; values are JSON, or else text."""
    found = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--set {change!r}: expected SECTION.KEY=VALUE, e.g. train.learning_rate=1e-4")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def run_one(args: argparse.Namespace, name: str, runs: Mapping[str, Run]) -> None:
    """Run the stage of one work directory, and print a JSON line."""
    workdir, start = args.workdir / name, time.monotonic()
    config = with_changes(runs[name]["config"], settings(args.set))
    rebuild = (
        args.stage in ("all", "prepare") and not (workdir / CHECKPOINTS).exists()
    )  # keeps the shared parts that fit
    if rebuild and not workdir.exists():
        share(args.workdir, name, runs)
    for text in stages.run(config, workdir, args.stage, rebuild=rebuild):
        print(f"{name}\n{text}", file=sys.stderr, flush=True)
    line = {"benchmark": "sweep", "stage": args.stage} | {k: runs[name][k] for k in ("variant", "seed", "changes")}
    emit(line | {"seconds": round(time.monotonic() - start, 1), **results(workdir)}, "jax", "flax", "numpy")


def share(folder: Path, name: str, runs: Mapping[str, Run]) -> None:
    """Give a new work directory the store and plan (hard links) of the prepared one whose settings differ least."""
    weights = {"pairs": 1e6, "vectors": 1e3, "plan": 1}
    wanted = flatten(runs[name]["config"])

    def distance(other: str) -> float:
        found = flatten(runs[other]["config"])
        different = [key for key in wanted if wanted[key] != found.get(key)]
        return sum(1e3 if key == "seed" else weights.get(affected()[key], 0) for key in different)

    if prepared := [other for other in runs if (folder / other / PLAN / "manifest.json").exists()]:
        nearest, unfinished = folder / min(prepared, key=distance), folder / f".{name}.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        for part in (STORE, PLAN):
            shutil.copytree(nearest / part, unfinished / part, copy_function=link)
        unfinished.rename(folder / name)


def link(source: str, target: str) -> None:
    """A hard link, or a copy where the file system has none; the files of store and plan are never written again."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def results(workdir: Path) -> dict[str, Any]:
    """What a work directory holds: difficulty of the plan, state of the training, mean scores."""
    found: dict[str, Any] = {}
    if (file := workdir / PLAN / "manifest.json").exists():
        found["difficulty"] = read_json(file)["difficulty"]
    if (file := workdir / METRICS).exists():
        last = [line for line in map(json.loads, file.read_text().splitlines()) if "loss" in line][-1:]
        found |= {key: line[key] for line in last for key in ("step", "loss", "pairs_per_second") if key in line}
    if (file := workdir / EVALUATION).exists():
        found["mean"] = read_json(file)["mean"]
    return found


def interrupted(workdir: Path) -> bool:
    """Whether a training was asked to stop before its end."""
    file = workdir / TRAINING
    return file.exists() and (Checkpoints(workdir / CHECKPOINTS, {}).newest() or 0) < read_json(file)["steps"]


if __name__ == "__main__":
    main()
