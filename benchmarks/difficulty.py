"""Does difficulty rise as clusters get smaller (paper, section 5 and figure 3)? One JSON line a cluster size, a figure.

python benchmarks/difficulty.py --pairs DIR_OR_FILES [--workdir=runs/difficulty] [--figure=FILE.png]

DIR has jsonl files of pairs, one a domain (a `domain` inside is ignored: here a domain is a data set, as in the paper).
Pairs and LSA vectors are made once; then one plan per cluster size, everything else equal, beside a plan of random
batches. Difficulty is the plan report's: the mean surrogate cosine of a query and its batch's unmasked negatives.
"""

import argparse
import json
from pathlib import Path

from about import about

from cde_jax.batching import surrogate
from cde_jax.batching.build import build_plan
from cde_jax.config import Batching
from cde_jax.data.pairs import clean, write_pairs
from cde_jax.data.sources import jsonl
from cde_jax.data.store import Store
from cde_jax.data.tokens import Tokenizer

SIZES = [64 * 4**i for i in range(5)]  # 64 … 16384
PLAN = {
    "cluster_dimensions": 0,
    "cluster_rows": 2**20,
    "iterations": 100,
    "tries": 1,
    "packing": "tsp",
    "epochs": 1,
    "domain_weights": (),
    "hard_negatives": 0,
    "mine_first": 0,
    "mine_last": 0,
    "mine_margin": 0.0,
}


def main() -> None:
    """Prepare once, plan for every size, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", required=True)
    parser.add_argument("--workdir", type=Path, default=Path("runs/difficulty"))
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--margin", type=float, default=0.1)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    pairs, vectors = prepared(args.pairs, args.workdir)
    rows = []
    for size in [0, *args.sizes]:
        changes = {"batch_size": args.batch, "filter_margin": args.margin, "cluster_size": size or 1}
        settings = Batching(**(PLAN | changes), method="clustered" if size else "random")
        plan = build_plan(args.workdir / f"plan-{size}", pairs, vectors, settings, 0)
        groups = {
            group["name"]: group["difficulty"]["in_batch_negative_similarity"] for group in plan.manifest["groups"]
        }
        row = {
            "benchmark": "difficulty",
            "cluster_size": size or None,
            **plan.manifest["difficulty"],
            "domains": groups,
        }
        base = rows[0]["in_batch_negative_similarity"] if rows else row["in_batch_negative_similarity"]
        row["ratio_to_random"] = round(row["in_batch_negative_similarity"] / base, 3)
        row |= {"batch_size": args.batch, "margin": args.margin, "pairs": pairs.manifest["pairs"]}
        print(json.dumps(row | about("numpy", "faiss-cpu")), flush=True)
        rows.append(row)
    if args.figure:
        draw(rows, args.figure)


def prepared(paths: list[str], workdir: Path) -> tuple[Store, Store]:
    """Pairs and LSA vectors, made once."""
    if not (workdir / "vectors").exists():

        def read():
            for file in jsonl.find(paths):
                name = file.name.removesuffix(".gz").removesuffix(".jsonl")
                yield from (pair._replace(domain=name) for pair in jsonl.read_pairs(file))

        workdir.mkdir(parents=True, exist_ok=True)
        tokenizer = Tokenizer.train((text for pair in read() for text in pair[1:3]), 8192)
        pairs = write_pairs(
            workdir / "pairs",
            clean(read, {}, folder=workdir, unique_documents=False),
            tokenizer,
            query_prefix="",
            document_prefix="",
            query_length=64,
            document_length=64,
            source={"paths": [Path(path).name for path in paths]},
        )
        texts = [surrogate.Texts(pairs.ragged(name)) for name in ("query_text", "document_text")]
        lsa = surrogate.lsa(*texts, width=128, seed=0)
        surrogate.write_vectors(workdir / "vectors", pairs, lsa.encode, name="lsa", settings={"width": 128})
    return Store.open(workdir / "pairs"), Store.open(workdir / "vectors")


def draw(rows: list[dict], file: Path) -> None:
    """Difficulty and masked share against cluster size."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8, 5), layout="constrained")
    axes = drawn.subplots()
    sizes = [row["cluster_size"] for row in rows[1:]]
    for name in rows[0]["domains"]:
        axes.plot(sizes, [row["domains"].get(name) for row in rows[1:]], color="#bbbbbb", linewidth=1)
    for key, color, label in (
        ("in_batch_negative_similarity", "#c44e52", "in-batch negatives (grey: by domain)"),
        ("masked_share", "#8172b2", "share masked as false negatives"),
    ):
        axes.plot(sizes, [row[key] for row in rows[1:]], "o-", color=color, label=label)
        axes.axhline(rows[0][key], color=color, linestyle="--", linewidth=1)
    axes.set(xscale="log", xlabel="cluster size (dashed: random batches)", ylabel="mean surrogate cosine; share")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.legend()
    drawn.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
