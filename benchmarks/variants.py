"""Is quality sold for speed? Variants of one config on the same plan, tokens and steps, several seeds each.

python benchmarks/variants.py [--config=demo] [--variants biencoder joint isolated] [--seeds 0 1 2] [--steps=300]
    [--workdir=runs/variants] [--evaluation DIR …] [--set model.layers=4 …]

One JSON line a run: NDCG@10 of every held-out set by kind of context. Then one line a variant: mean and spread over the
seeds, and the mean difference to the first variant, paired by seed and set, with its standard error. A run whose
evaluation.json is there is not trained again; a seed's store and plan are made once and shared by its variants.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

from about import about

from cde_jax import stages
from cde_jax.data.files import read_json


def main() -> None:
    """Train what is missing, print every run, then the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="demo")
    parser.add_argument("--variants", nargs="+", default=["biencoder", "joint", "isolated"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300, help="0: as the config says")
    parser.add_argument("--workdir", type=Path, default=Path("runs/variants"))
    parser.add_argument("--evaluation", nargs="*", default=[], help="more evaluation sets, folders in BEIR form")
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE", help="changes of the config")
    args = parser.parse_args()
    scores: dict[tuple[str, int], dict] = {}
    for seed in args.seeds:
        for variant in args.variants:
            workdir = args.workdir / f"{variant}-{seed}"
            start = time.monotonic()
            if not (workdir / "evaluation.json").exists():
                share(args.workdir / f"{args.variants[0]}-{seed}", workdir)
                for text in stages.run(configuration(args, variant, seed), workdir):
                    print(text, file=sys.stderr, flush=True)
            scores[variant, seed] = read_json(workdir / "evaluation.json")["sets"]
            seconds = round(time.monotonic() - start, 1)
            row = {"benchmark": "variants", "config": args.config, "set": args.set, "steps": args.steps}
            row |= {"variant": variant, "seed": seed, "ndcg": scores[variant, seed], "seconds": seconds}
            print(json.dumps(row | about("jax", "flax")), flush=True)
    for variant in args.variants:
        for kind in kinds(scores[variant, args.seeds[0]]):
            print(json.dumps(summary(scores, args.variants[0], variant, kind, args.seeds)), flush=True)


def configuration(args: argparse.Namespace, variant: str, seed: int):
    """The named config with this variant, seed and number of steps."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    config = __import__(f"configs.{args.config}", fromlist=["get_config"]).get_config(variant)
    config.seed = seed
    config.train.steps = args.steps or config.train.steps
    config.data.evaluation = (*config.data.evaluation, *args.evaluation)
    for change in args.set:
        name, _, value = change.partition("=")
        section, key = name.split(".")
        config[section][key] = type(config[section][key])(json.loads(value))
    return config


def share(first: Path, workdir: Path) -> None:
    """Take over what the first variant of this seed prepared: the plan does not depend on the model."""
    if workdir == first or workdir.exists():
        return
    for part in ("store", "plan"):
        shutil.copytree(first / part, workdir / part)


def kinds(scores: dict) -> list[str]:
    """Kinds of context that every set was measured with; baselines are left out."""
    common = set.intersection(*(set(by_kind) for by_kind in scores.values()))
    return [kind for kind in ("same corpus", "random training documents", "none") if kind in common]


def summary(scores: dict, first: str, variant: str, kind: str, seeds: list[int]) -> dict:
    """Mean and spread over seeds of the mean over sets; the paired difference to the first variant's best kind."""
    sets = scores[variant, seeds[0]]
    base = kinds(scores[first, seeds[0]])[0]
    means = [statistics.mean(by_kind[kind] for by_kind in scores[variant, seed].values()) for seed in seeds]
    differences = [scores[variant, s][name][kind] - scores[first, s][name][base] for s in seeds for name in sets]
    several = len(differences) > 1
    return {
        "benchmark": "variants, summary",
        "variant": variant,
        "context": kind,
        "mean": round(statistics.mean(means), 4),
        "sd over seeds": round(statistics.stdev(means), 4) if len(means) > 1 else None,
        "difference to": first,
        "difference": round(statistics.mean(differences), 4),
        "standard error": round(statistics.stdev(differences) / len(differences) ** 0.5, 4) if several else None,
    }


if __name__ == "__main__":
    main()
