"""What adapters learned from labelled queries gain on frozen vectors: one JSON line a variant, NDCG in points.

    python benchmarks/adder.py --evaluation SETS --vectors VECTORS --variants softmax linear --seeds 0 1 2
    python benchmarks/adder.py --evaluation SETS --vectors VECTORS --variants linear --labels 10 50 200 500

VECTORS: see benchmarks/vectors.py. Each query is held out once (`--folds`), and scored at the step that is best for the
queries of the other folds. `gain` is against the vectors as they are, with a paired 95 % interval over queries within
sets and seeds; `shipped` is the gain if sets without a clear gain get the identity, as `Adapter.fit` does. With
`--labels`, an adapter is fitted on so many queries and scored on all others, without the check (`gain`) and with it.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import evaluation_sets
import numpy as np
from harness import emit

from cde_jax.adapters.adder import as_grades
from cde_jax.adapters.adder_step import STREAM, initial_tables
from cde_jax.adapters.adder_training import CUTOFFS, Fitting, gains, held_out, ndcg
from cde_jax.adapters.whitening import SAMPLE_SIZE, whitening
from cde_jax.config import AdapterSettings
from cde_jax.data.sources.beir import EvaluationSet
from cde_jax.evaluation.compare import bootstrap
from cde_jax.retrieval.index import search

_SOFTMAX = {"form": "softmax"}
VARIANTS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "linear": {},
    "softmax": _SOFTMAX,
    "low rank": {"form": "low_rank"},
    "mlp": {"form": "mlp", "hidden": 384},
    "linear, both sides": {"sides": "both"},
    "softmax, both sides": _SOFTMAX | {"sides": "both"},
    "linear, in-batch": {"negatives": "batch"},
    "linear, mixed": {"negatives": "both"},
    "linear, one hardest": {"hardest": 1},
    "linear, margin": {"loss": "margin"},
    "softmax, in-batch": _SOFTMAX | {"negatives": "batch"},
    "softmax, margin": _SOFTMAX | {"loss": "margin"},
    **{f"softmax, h = {h}": _SOFTMAX | {"hidden": h} for h in (16, 32, 128)},
}


def main() -> None:
    """Run each variant on all sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluation", nargs="+", help="BEIR folders, or folders of such")
    parser.add_argument("--vectors", type=Path, help="directory of NAME.npz")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help="names, or 'NAME:key=value,…'")
    parser.add_argument("--whiten", choices=("no", "corpus", "queries"), default="no", help="first, by pseudo queries")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--labels", nargs="*", type=int, default=[], help="numbers of training queries")
    parser.add_argument("--sets", nargs="*", help="names; by default all")
    args = parser.parse_args()
    data = {dataset.name: load(dataset, args) for dataset in evaluation_sets.read(args.evaluation)}
    data = {name: arrays for name, arrays in data.items() if not args.sets or name in args.sets}
    for variant in args.variants:
        name, _, changes = variant.partition(":")
        settings = VARIANTS[name] | {
            k: json.loads(v) for k, v in (pair.split("=") for pair in changes.split(",") if pair)
        }
        for labels in args.labels or [0]:
            run(variant, labels, data, settings, args)


def load(dataset: EvaluationSet, args: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """Queries with relevant documents, documents, grades by row, and NDCG of the vectors as they are."""
    vectors = np.load(args.vectors / f"{dataset.name}.npz")
    queries, documents = vectors["queries"], vectors["documents"]
    rows = {document: row for row, document in enumerate(dataset.corpus)}
    qrels = [{rows[document]: grade for document, grade in dataset.qrels[query].items()} for query in dataset.queries]
    grades = as_grades(dict(enumerate(qrels)), len(queries), len(documents))
    queries, grades = queries[list(grades)], dict(enumerate(grades.values()))
    raw = ndcg(search(queries, documents, CUTOFFS[-1]).indices, list(grades.values()))
    if args.whiten != "no":
        sample = documents[np.random.default_rng(0).permutation(len(documents))[:SAMPLE_SIZE]]
        fitted = whitening(vectors["pseudo_queries"] if args.whiten == "corpus" else queries, sample)
        queries, documents = fitted.transform_queries(queries), fitted.transform_documents(documents)
    return queries, documents, grades, raw


def run(variant: str, labels: int, data: dict[str, Any], settings: dict[str, Any], args: argparse.Namespace) -> None:
    """One line: means over sets, gain by cutoff, each set's gain and interval."""
    start, differences, before, shipped, by_set = time.perf_counter(), [], [], [], {}
    for name, (queries, documents, grades, raw) in data.items():
        if labels and len(grades) < labels + 100:
            continue
        rows, kept = [], []
        for seed in args.seeds:
            chosen = AdapterSettings(seed=seed, validation=1 / args.folds, folds=args.folds, **settings)
            if variant == "frozen":
                scores = ndcg(search(queries, documents, CUTOFFS[-1]).indices, list(grades.values()))
                rows.append(scores - raw)
                kept.append(rows[-1])
            elif labels:
                tested, own, scores, kept_here = few_labels(queries, documents, grades, chosen, labels)
                rows.append(scores - raw[tested])
                kept.append(rows[-1] if kept_here else own - raw[tested])
            else:
                curves, folds = Fitting(queries, documents, grades, chosen).cross_validate()
                order = np.random.default_rng([seed, STREAM]).permutation(len(grades))
                scores, own = np.empty_like(raw), np.empty_like(raw)
                scores[order], own[order] = held_out(curves, folds), curves[0]
                rows.append(scores - raw)
                kept.append(rows[-1] if gains(own, scores)["10"]["low"] > 0 else own - raw)
        rows, kept = 100 * np.stack(rows), 100 * np.stack(kept)  # [seeds, queries, cutoffs]
        by_set[name] = [round(x, 2) for x in (100 * raw[:, -1].mean(), *bootstrap([rows[:, :, -1]]))]
        differences.append(rows)
        before.append(100 * raw.mean(axis=0))
        shipped.append(kept[:, :, -1])
    line = {
        "benchmark": "adder",
        "variant": variant,
        "whitened": args.whiten,
        "labels": labels,
        "seeds": len(args.seeds),
    }
    line["frozen"] = dict(zip(CUTOFFS, np.mean(before, axis=0).round(2).tolist(), strict=True))
    line["gain"] = {k: rounded([rows[:, :, i] for rows in differences]) for i, k in enumerate(CUTOFFS)}
    line |= {"shipped": rounded(shipped), "sets": by_set, "vectors": args.vectors.name, "folds": args.folds}
    emit(line | {"seconds": round(time.perf_counter() - start)}, "jax")


def few_labels(queries: Any, documents: Any, grades: Any, settings: AdapterSettings, labels: int) -> tuple[Any, ...]:
    """Rows of the other queries, their NDCG as they are and adapted, and whether `Adapter.fit` would adapt."""
    rows = np.random.default_rng([settings.seed, labels]).permutation(len(grades))
    known, others = rows[:labels], rows[labels : labels + 1000]
    fitting = Fitting(queries[known], documents, dict(enumerate(grades[row] for row in known)), settings)
    curves, folds = fitting.cross_validate()
    steps = int(curves[:, :, -1].mean(axis=1).argmax()) * fitting.every
    if steps:
        fitting.train(np.arange(labels), None, steps)
    scores = []
    for tables in (initial_tables(settings, queries.shape[1]), fitting.trees["tables"] if steps else None):
        found = None if tables is None else fitting.corpus.hardest(
            tables, queries[others], np.full((len(others), 1), -1), CUTOFFS[-1], settings.form
        )  # fmt: skip
        scores.append(scores[0] if found is None else ndcg(found, [grades[row] for row in others]))
    return others, *scores, bool(steps and gains(curves[0], held_out(curves, folds))["10"]["low"] > 0)


def rounded(rows: list[Any]) -> list[float]:
    """Mean over sets and its interval."""
    return [round(x, 2) for x in bootstrap(rows)]


if __name__ == "__main__":
    main()
