"""Is quality sold for speed? Variants of one config on the same plan, tokens and steps, several seeds each.

python benchmarks/variants.py [--config=demo] [--start=DIR] [--variants biencoder joint isolated] [--seeds 0 1 2]
    [--steps=300] [--workdir=runs/variants] [--evaluation DIR …] [--set model.layers=4 …]

One JSON line a run: NDCG@10 of every held-out set by kind of context. Then one line a variant and kind: mean and spread
over the seeds, and the mean difference to the first variant, paired by seed and set, with its standard error. With
`--start`, a pretrained encoder (a directory, or its hub name), every encoder starts from it (`--config=minilm` has the
shape of all-MiniLM-L6-v2), and it is measured as it is, at its own lengths and at the config's. A run whose
evaluation.json is there is not trained again; a seed's store and plan are made once and shared by its variants.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from about import about
from quality.settings import override, parse

from cde_jax.config import from_config_dict
from cde_jax.data.files import read_json
from cde_jax.data.tokens import Tokenizer
from cde_jax.evaluation import beir as measure
from cde_jax.interop.read import TextSettings, load_pretrained
from cde_jax.retrieval.embedder import Embedder
from cde_jax.stages import run as stages
from cde_jax.stages.prepare import evaluation_sets

KINDS = ("same corpus", "random training documents", "none", "same corpus, whitened")


def main() -> None:
    """Train what is missing, print every run, then the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="demo")
    parser.add_argument("--start", default="", help="pretrained encoder that both stages and the biencoder start from")
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
            config = configuration(args, variant, seed)
            start = time.monotonic()
            if not (workdir / "evaluation.json").exists():
                share(args.workdir / f"{args.variants[0]}-{seed}", workdir)
                for text in stages.run(config, workdir):
                    print(text, file=sys.stderr, flush=True)
            scores[variant, seed] = read_json(workdir / "evaluation.json")["sets"]
            seconds = round(time.monotonic() - start, 1)
            emit(args, {"variant": variant, "seed": seed, "ndcg": scores[variant, seed], "seconds": seconds})
    if args.start:
        for row in as_it_is(args, workdir, config):
            emit(args, row)
    for variant in args.variants:
        for kind in kinds(scores[variant, args.seeds[0]]):
            emit(args, summary(scores, args.variants[0], variant, kind, args.seeds))


def configuration(args: argparse.Namespace, variant: str, seed: int) -> dict:
    """The named config with this variant, seed, start and number of steps, and the changes of --set."""
    config = __import__(f"configs.{args.config}", fromlist=["get_config"]).get_config(variant)
    changes: dict = {"seed": seed, "data.evaluation": (*config.data.evaluation, *args.evaluation)}
    if args.start:
        changes |= dict.fromkeys(("data.tokenizer", "model.init.first_stage", "model.init.second_stage"), args.start)
    if args.steps:
        changes["train.steps"] = args.steps
    return override(config.to_dict(), changes, parse(args.set))


def as_it_is(args: argparse.Namespace, workdir: Path, changed: dict) -> Iterator[dict]:
    """The pretrained encoder without training, at its own lengths and at the config's."""
    config, found = from_config_dict(changed), load_pretrained(args.start)
    tokenizer, sets = Tokenizer.load(found.directory), evaluation_sets(config, workdir)
    ours = TextSettings("", "", config.data.query_length, config.data.document_length)
    for name, settings in (("its own lengths", found.settings), ("the config's lengths", ours)):
        embedder = Embedder(found.model, tokenizer, settings, found.directory, progress=False)
        scores = measure.evaluate_embedder(embedder, sets, [], config.seed)
        yield {"variant": f"as it is, {name}", "ndcg": scores, "mean": measure.means(scores)}


def emit(args: argparse.Namespace, row: dict) -> None:
    """One JSON line."""
    said = {"benchmark": "variants", "config": args.config, "set": args.set, "steps": args.steps}
    print(json.dumps(said | row | about("jax", "flax")), flush=True)


def share(first: Path, workdir: Path) -> None:
    """Take over what the first variant of this seed prepared: the plan does not depend on the model."""
    if workdir == first or workdir.exists():
        return
    for part in ("store", "plan"):
        shutil.copytree(first / part, workdir / part)


def kinds(scores: dict) -> list[str]:
    """Kinds of context that every set was measured with; baselines are left out."""
    common = set.intersection(*(set(by_kind) for by_kind in scores.values()))
    return [kind for kind in KINDS if kind in common]


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
