"""Does a short contextual fine-tuning of all-MiniLM-L6-v2 keep or raise its NDCG@10 on held-out packages?

python benchmarks/from_minilm.py --model=DIR [--workdir=runs/minilm] [--seeds 0 1 2] [--variant isolated]

One JSON line a row: MiniLM itself at its own lengths and at those trained with, then each seed, then mean and spread.
A seed whose evaluation.json is there is not trained again.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path

from about import about

from cde_jax import stages
from cde_jax.config import from_config_dict
from cde_jax.data.files import read_json
from cde_jax.data.tokens import Tokenizer
from cde_jax.interop.read import TextSettings, load_pretrained
from cde_jax.prepare import evaluation_sets
from cde_jax.retrieval import evaluate as measure
from cde_jax.retrieval.embedder import Embedder


def main() -> None:
    """Evaluate the start, train the seeds, print the table's rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="all-MiniLM-L6-v2: a directory, or its hub name")
    parser.add_argument("--workdir", type=Path, default=Path("runs/minilm"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variant", default="isolated")
    parser.add_argument("--steps", type=int, default=0, help="0: as the config says")
    args = parser.parse_args()

    results = []
    for seed in args.seeds:
        config = configuration(args, seed)
        workdir = args.workdir / f"{args.variant}-{seed}"
        if not (workdir / "evaluation.json").exists():
            first = args.workdir / f"{args.variant}-{args.seeds[0]}"
            if workdir != first and not workdir.exists():  # the same texts and tokens; the plan is the seed's own
                shutil.copytree(first / "store", workdir / "store", ignore=shutil.ignore_patterns("vectors", "lsa"))
            for text in stages.run(config, workdir):
                print(text, flush=True)
        if seed == args.seeds[0]:
            for row in start(args, from_config_dict(config), workdir):
                emit(row)
        results.append(read_json(workdir / "evaluation.json")["mean"])
        emit({"row": f"{args.variant}, seed {seed}", "mean": results[-1]})
    for kind in results[0]:
        values = [result[kind] for result in results]
        spread = statistics.stdev(values) if len(values) > 1 else None
        emit(
            {"row": f"{args.variant}, {len(values)} seeds", "kind": kind, "mean": statistics.mean(values), "sd": spread}
        )


def configuration(args: argparse.Namespace, seed: int):
    """configs/minilm.py with this start and seed."""

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from configs import minilm

    config = minilm.get_config(args.variant)
    config.seed = seed
    config.data.tokenizer = config.model.init.first_stage = args.model
    config.model.init.second_stage = args.model
    if args.steps:
        config.train.steps = args.steps
    return config


def start(args: argparse.Namespace, config, workdir: Path):
    """MiniLM itself, at its own lengths and at ours."""
    found = load_pretrained(args.model)
    tokenizer = Tokenizer.load(found.directory)
    ours = TextSettings("", "", config.data.query_length, config.data.document_length)
    for name, settings in (("its own lengths", found.settings), ("our lengths", ours)):
        embedder = Embedder(found.model, tokenizer, settings, found.directory, progress=False)
        scores = measure.evaluate_embedder(embedder, evaluation_sets(config, workdir), [], config.seed)
        yield {"row": f"MiniLM, {name}", "mean": measure.means(scores), "sets": scores}


def emit(row: dict) -> None:
    """One JSON line."""
    print(json.dumps({"benchmark": "from_minilm"} | row | about("jax")), flush=True)


if __name__ == "__main__":
    main()
