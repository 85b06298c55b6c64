"""Train variants from an array file under the same budget, and say what each gains.

python benchmarks/quality/train.py lab.zip --out DIR [--variants table1 …] [--seeds 0 1 2] [--steps 300]
    [--set key=value …] [--no-start] [--save-every 250] [--summary]

Needs only jax, flax, optax, numpy, safetensors and jaxtyping. One JSON line a (variant, seed) goes to
DIR/results.jsonl, NDCG@10 of each query to DIR/VARIANT-SEED.npz; the same command goes on where it was stopped and
trains nothing twice. Then the summary, which `--summary` gives alone. Variants, groups, how to add one: variants.py.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import jax  # noqa: E402
from harness import machine as about  # noqa: E402

from cde_jax.batching.plan import BatchPlan  # noqa: E402
from cde_jax.config import Config, affected, flatten, from_config_dict  # noqa: E402
from cde_jax.data.files import fingerprint  # noqa: E402
from cde_jax.stages.assemble import CHUNKS  # noqa: E402
from quality import arrays, results, scoring, summary, training  # noqa: E402
from quality import variants as grid  # noqa: E402
from quality.settings import override, parse  # noqa: E402

SEEDS = [0, 1, 2]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
# Settings that change memory and not results, so that what ran out of it can go on in the same directory.
MEMORY = {*(f"train.{name}" for name in CHUNKS), "train.memory_gib", "model.remat"}
# Of a plan's settings, the configuration's key; the others have the same name. A plan's seed is its own.


def main(arguments: list[str] | None = None) -> None:
    """Check everything, train what is missing, print the summary."""
    args = _arguments(arguments)
    try:
        run(args)
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        sys.exit(f"error: {error}")


def run(args: argparse.Namespace) -> None:
    """As `main`, with errors raised."""
    if args.summary:
        print(summarised(args))
        return
    chosen = grid.expand(args.variants or ["table1"])
    lab = arrays.unpack(args.file, args.out / "arrays")
    configs = {name: configuration(lab, variant, args) for name, variant in chosen.items()}
    plans = {name: checked_plan(lab, variant, configs[name]) for name, variant in chosen.items()}
    starts = {name: None if args.no_start or not variant["start"] else lab.start for name, variant in chosen.items()}
    missing = [name for name in chosen if chosen[name]["start"] and not args.no_start and lab.start is None]
    if missing:
        raise ValueError(
            f"{', '.join(missing[:3])} start from pretrained weights, and the array file has none: make it with "
            "prepare.py --start, or train from random weights with --no-start"
        )
    said = {"arrays": lab.fingerprint, "steps": args.steps, "no_start": args.no_start}
    results.claim(args.out, said | {name: value for name, value in parse(args.set).items() if name not in MEMORY})
    done = results.read(args.out)
    todo = []
    for seed in args.seeds or SEEDS:
        for name in chosen:
            config = with_seed(configs[name], seed)
            identity = run_identity(lab, config, plans[name], starts[name])
            if not results.finished(done, name, seed, identity, args.out):
                todo.append((name, config, plans[name], starts[name], identity))
    for parts in todo:
        results.append(args.out, one(args, lab, *parts))
    args.variants, args.seeds = list(chosen), args.seeds or SEEDS
    print(summarised(args))


def summarised(args: argparse.Namespace) -> str:
    """The summary of what is there: of the variants and seeds named, or of all."""
    lab, done = arrays.unpack(args.file, args.out / "arrays"), results.read(args.out)
    names = list(grid.expand(args.variants)) if args.variants else [line["variant"] for line in done]
    seeds = args.seeds or sorted({line["seed"] for line in done})
    return summary.write(args.out, done, list(dict.fromkeys(names)), seeds, lab.sets)


def one(
    args: argparse.Namespace,
    lab: arrays.Lab,
    name: str,
    config: Config,
    plan: BatchPlan,
    start: Path | None,
    identity: str,
) -> dict[str, Any]:
    """Train and evaluate a variant with a seed; returns its line."""
    run_name = f"{name}-{config.seed}"
    state = args.out / f"{run_name}.safetensors"

    def say(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {run_name}: {text}", file=sys.stderr, flush=True)

    with training.explained_memory(config):
        trained = training.train(config, lab, plan, start, state, identity, save_every=args.save_every, say=say)
        began = time.monotonic()
        found = scoring.score(trained.model, lab.sets, config, lab.about["pad_id"])
    results.save_queries(args.out, name, config.seed, found)
    by_set, losses = scoring.means(found), trained.losses
    kinds = list(next(iter(by_set.values())))
    line = {
        "benchmark": "quality",
        "variant": name,
        "seed": config.seed,
        "steps": len(losses),
        "mean": {k: round(sum(row[k] for row in by_set.values()) / len(by_set), 5) for k in kinds},
        "ndcg@10": by_set,
        "loss": {"first": float(losses[0]), "last 20": float(losses[-20:].mean())},
        "pairs_per_second": trained.pairs_per_second and round(trained.pairs_per_second, 1),
        "seconds": {"training": round(trained.seconds, 1), "evaluation": round(time.monotonic() - began, 1)},
        "changes": dict(grid.VARIANTS[name]),
        "set": parse(args.set),
        "arrays": lab.fingerprint,
        "plan": plan.fingerprint,
        "run": identity,
        "file": state.name,
    }
    say(f"mean NDCG@10 {line['mean']}")
    return line | machine()


def configuration(lab: arrays.Lab, variant: grid.Variant, args: argparse.Namespace) -> Config:
    """The file's configuration with the plan's settings, the budget, the variant's changes and those of --set."""
    if variant["plan"] not in lab.about["plans"]:
        lab.plan(variant["plan"])  # says which there are
    changes = {key: value for key, value in variant.items() if key not in ("plan", "start")}
    budget = {"train.steps": args.steps, "train.warmup_steps": args.steps // 10}
    of_plan = lab.about["plans"][variant["plan"]]["overrides"]
    return from_config_dict(override(lab.config, of_plan, budget, changes, parse(args.set)))


def with_seed(config: Config, seed: int) -> Config:
    """The configuration with another seed of parameters, context draws and dropout."""
    return from_config_dict(config.as_dict() | {"seed": seed})


def checked_plan(lab: arrays.Lab, variant: grid.Variant, config: Config) -> BatchPlan:
    """The variant's plan. Raises ValueError where --set or the variant changes a setting that made the plan."""
    plan = lab.plan(variant["plan"])
    ours = flatten(config.as_dict())
    for key, theirs in plan.manifest["settings"].items():
        name = f"batching.{key}"
        if name in ours and fingerprint(ours[name]) != fingerprint(theirs):
            raise ValueError(
                f"the plan {variant['plan']!r} was made with {name} = {theirs!r}, not {ours[name]!r}: choose a variant "
                "of another plan, or make one with prepare.py --plans"
            )
    return plan


def run_identity(lab: arrays.Lab, config: Config, plan: BatchPlan, start: Path | None) -> str:
    """The digest of everything that decides what a run computes."""
    settings = {
        key: value
        for key, value in flatten(config.as_dict()).items()
        if affected().get(key) != "nothing" and key not in MEMORY
    }
    return fingerprint([lab.fingerprint, settings, plan.fingerprint, start is not None])


def machine() -> dict[str, str]:
    """Hardware, versions and commit; the commit is empty where there is no git."""
    found = {"device": jax.devices()[0].device_kind, "devices": str(jax.device_count())}
    with contextlib.suppress(FileNotFoundError):
        return found | about(*PACKAGES)
    return found | {"jax": jax.__version__, "commit": ""}


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the array file of prepare.py")
    parser.add_argument("--out", type=Path, required=True, help="where results go, and are looked for")
    parser.add_argument(
        "--variants", nargs="+", help=f"table1 if not said; variants or groups: {', '.join(grid.GROUPS)}"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="0 1 2 if not said")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--no-start", action="store_true", help="every variant from random weights")
    parser.add_argument("--save-every", type=int, default=250, help="steps; 0: at the end only")
    parser.add_argument("--summary", action="store_true", help="of what is there; nothing is trained")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
