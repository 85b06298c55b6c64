"""What to do with vectors that one has, by number of labelled queries: one JSON line a case, NDCG@10 in points.

    python benchmarks/chain.py --model all-MiniLM-L6-v2 --evaluation SETS --vectors VECTORS [--labels 10 50 200]

    python benchmarks/chain.py --draw LINES.jsonl FIGURE.svg

VECTORS is written by benchmarks/vectors.py; SETS need 2 × the largest number of labels in queries. Half of a set's
queries are scored, labels come from the other half. Steps of the chain: `frozen`; `whitened` by the corpus and its
pseudo queries; `statistics` beside them (HybridVectors, each query its own weight); and, after a fit of the whitened
vectors on labelled queries, `whitened, adder` and `whitened, adder, statistics`. Mean over sets and seeds, with a
paired 95 % interval of the gain over `frozen`; `identity` says how often the guard of `Adapter.fit` kept the vectors.
"""

import argparse
import json
from pathlib import Path

import evaluation_sets
import numpy as np
from harness import emit
from jaxtyping import Float

from cde_jax import Adapter, CorpusStatistics, HybridVectors, Whitening
from cde_jax.adapters.whitening import SAMPLE_SIZE
from cde_jax.config import AdapterSettings
from cde_jax.data.sources.beir import EvaluationSet
from cde_jax.evaluation.compare import bootstrap
from cde_jax.evaluation.metrics import ndcg_per_query
from cde_jax.retrieval.embedder import Embedder
from cde_jax.retrieval.index import as_run, search

Vectors = Float[np.ndarray, "n D"]


def main() -> None:
    """Score the chain on every set, seed and number of labels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="for its token embeddings: a directory or a hub name")
    parser.add_argument("--evaluation", nargs="+", help="BEIR folders, or folders of such")
    parser.add_argument("--vectors", type=Path, help="directory written by benchmarks/vectors.py")
    parser.add_argument("--draw", nargs=2, type=Path, help="draw lines of a run before, instead of a run")
    parser.add_argument("--labels", nargs="+", type=int, default=[10, 50, 200], help="numbers of labelled queries")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    if args.draw:
        draw(*args.draw)
        return
    embedder = Embedder.from_pretrained(args.model, progress=False)
    sets = [
        dataset for dataset in evaluation_sets.read(args.evaluation) if len(dataset.queries) >= 2 * max(args.labels)
    ]
    results: dict[str, dict[str, list[np.ndarray]]] = {}  # {case: {set: [per query of a seed]}}
    kept: dict[str, list[bool]] = {}
    for dataset in sets:
        chain = Chain(dataset, dict(np.load(args.vectors / f"{dataset.name}.npz")), embedder)
        for seed in args.seeds:
            rows = np.random.default_rng(seed).permutation(len(dataset.queries))
            test, labelled = rows[: len(rows) // 2], rows[len(rows) // 2 :]
            cases = chain.unlabelled(test)
            for count in args.labels:
                for name, (scores, identity) in chain.labelled(test, labelled[:count], seed).items():
                    cases[f"{name}, {count} labels"] = scores
                    kept.setdefault(f"{name}, {count} labels", []).append(identity)
            for name, scores in cases.items():
                results.setdefault(name, {}).setdefault(dataset.name, []).append(scores)
    for name, by_set in results.items():
        differences = [np.stack(by_set[s.name]) - np.stack(results["frozen"][s.name]) for s in sets]
        gain, low, high = bootstrap(differences)
        means = {key: round(float(np.mean(scores)), 2) for key, scores in by_set.items()}
        line = {"benchmark": "chain", "case": name, "mean": round(float(np.mean(list(means.values()))), 2)}
        line |= {"gain": round(gain, 2), "interval": [round(low, 2), round(high, 2)], "sets": means}
        if name in kept:
            line["identity"] = f"{sum(kept[name])} of {len(kept[name])}"
        emit(line | {"form": AdapterSettings().form, "seeds": len(args.seeds)}, "jax")


def draw(lines: Path, figure: Path) -> None:
    """NDCG@10 against the number of labelled queries, a curve a chain; chains without labels are level."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    means = {line["case"]: line["mean"] for line in map(json.loads, lines.read_text().splitlines())}
    rcParams["svg.hashsalt"] = "cde_jax"  # the same bytes for the same numbers
    labels = sorted({int(name.split()[-2]) for name in means if name.endswith("labels")})
    drawn = Figure(figsize=(6, 3.6), layout="constrained")
    axes, places = drawn.subplots(), range(len(labels) + 1)
    for name, without in (("frozen", None), ("whitened", "whitened"), ("whitened, adder", "whitened")):
        values = [means.get(f"{name}, {n} labels", means.get(without or name)) for n in labels]
        axes.plot(places, [means[without or name], *values], "o-" if "adder" in name else "--", label=name)
    for name, title in (("statistics", "whitened, statistics"), ("whitened, adder, statistics",) * 2):
        values = [means.get(f"{name}, {n} labels", means["statistics"]) for n in labels]
        axes.plot(places, [means["statistics"], *values], "o-" if "adder" in name else "--", label=title)
    axes.set_xticks(places, ["0", *map(str, labels)])
    axes.set(xlabel="labelled queries", ylabel="NDCG@10, mean of sets", title="Vectors that you have already")
    axes.legend(fontsize="small")
    drawn.savefig(figure, metadata={"Date": None})


class Chain:
    """The vectors of a set at each step of the chain."""

    def __init__(self, dataset: EvaluationSet, arrays: dict[str, Vectors], embedder: Embedder):
        self.dataset, self.texts, self.corpus = dataset, list(dataset.queries.values()), list(dataset.corpus.values())
        self.ids = {name: row for row, name in enumerate(dataset.corpus)}
        queries, documents = arrays["queries"], arrays["documents"]
        sample = documents[np.random.default_rng(0).permutation(len(documents))[:SAMPLE_SIZE]]
        fitted = Whitening.fit(arrays["pseudo_queries"], sample)
        self.frozen = queries, documents
        self.white = fitted.transform_queries(queries), fitted.transform_documents(documents)
        statistics, pseudo = CorpusStatistics.fit(self.corpus), fitted.transform_queries(arrays["pseudo_queries"])
        self.hybrid = HybridVectors.fit(
            statistics, self.white[1], self.corpus, pseudo, term_vectors=embedder.term_vectors
        )
        self.hybrid_documents = self.hybrid.transform_documents(self.white[1], self.corpus)

    def unlabelled(self, test: np.ndarray) -> dict[str, Float[np.ndarray, " t"]]:
        """What needs no labels: scores by case."""
        return {
            "frozen": self.score(test, self.frozen[0][test], self.frozen[1]),
            "whitened": self.score(test, self.white[0][test], self.white[1]),
            "statistics": self.score_hybrid(test, self.white[0][test]),
        }

    def labelled(
        self, test: np.ndarray, rows: np.ndarray, seed: int
    ) -> dict[str, tuple[Float[np.ndarray, " t"], bool]]:
        """Scores, and whether the adapter is the identity, by case."""
        names = list(self.dataset.queries)
        relevant = [self.dataset.qrels[names[row]] for row in rows]
        grades = {i: {self.ids[d]: g for d, g in each.items() if g > 0} for i, each in enumerate(relevant)}
        adapter = Adapter.fit(self.white[0][rows], self.white[1], grades, seed=seed)
        adapted, identity = adapter.transform_queries(self.white[0][test]), adapter.report["identity"]
        return {
            "whitened, adder": (self.score(test, adapted, self.white[1]), identity),
            "whitened, adder, statistics": (self.score_hybrid(test, adapted), identity),
        }

    def score_hybrid(self, rows: np.ndarray, queries: Vectors) -> Float[np.ndarray, " t"]:
        """NDCG@10 with the lexical part beside dense vectors of queries."""
        texts = [self.texts[row] for row in rows]
        return self.score(rows, self.hybrid.transform_queries(queries, texts), self.hybrid_documents)

    def score(self, rows: np.ndarray, queries: Vectors, documents: Vectors) -> Float[np.ndarray, " t"]:
        """NDCG@10 of some queries in points; each has a relevant document."""
        names = np.array(list(self.dataset.queries))[rows].tolist()
        run = as_run(names, list(self.dataset.corpus), search(queries, documents, 10))
        return 100 * np.array(list(ndcg_per_query(run, {name: self.dataset.qrels[name] for name in names}).values()))


if __name__ == "__main__":
    main()
