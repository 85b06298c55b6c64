"""What whitening is worth to an encoder as it is, without training: one JSON line per case, NDCG@10 in points.

    python benchmarks/whiten.py --model all-MiniLM-L6-v2 --evaluation SETS [--strengths 0 8 16 32] [--documents 400]

Each set is embedded once, then whitened (`cde_jax.adapters.whitening`) by 512 of its documents and
  queries     the set's queries, each half by the other half;
  beginnings  the first plain words of those documents: what a corpus alone gives;
  documents   the documents in place of queries: one centre for both.
Strength 0 is centring alone. `other` is the gain from whitening by the set half the list away, `better` on how many
sets its own is better.
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from about import about
from quality.evaluation import cut, read_all
from quality.scoring import halves

from cde_jax.adapters.whitening import SIZE, STRENGTH, beginnings, whitening
from cde_jax.data.sources.beir import EvaluationSet
from cde_jax.evaluation.beir import ndcg
from cde_jax.retrieval.embedder import Embedder
from cde_jax.retrieval.index import as_run, search

KINDS = ("queries", "beginnings", "documents")
Vectors = tuple[np.ndarray, np.ndarray, np.ndarray]  # of queries, documents, beginnings of documents


def main() -> None:
    """Embed all sets, then score each kind and strength."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a biencoder: a directory, or its hub name")
    parser.add_argument("--evaluation", nargs="+", required=True, help="BEIR folders, or folders of such; two or more")
    parser.add_argument("--strengths", nargs="+", type=float, default=[0.0, STRENGTH / 2, STRENGTH, STRENGTH * 2])
    parser.add_argument("--queries", type=int, default=0, help="at most so many of a set; 0: all")
    parser.add_argument("--documents", type=int, default=0, help="at most so many of a set; 0: all")
    args = parser.parse_args()
    embedder = Embedder.from_pretrained(args.model, progress=False)
    sets = [cut(one, args.queries, args.documents, seed=0) for one in read_all(args.evaluation)]
    vectors = [embed(embedder, one) for one in sets]
    before = np.array([
        100 * ndcg(ranked(one, *x[:2], np.arange(len(x[0]))), one.qrels) for one, x in zip(sets, vectors, strict=True)
    ])  # fmt: skip
    emit({"by": "nothing", "mean": round(before.mean(), 2), "sets": named(sets, before)})
    for kind in KINDS:
        for strength in args.strengths:
            emit({"by": kind, "strength": strength} | gains(sets, vectors, before, kind, strength))


def embed(embedder: Embedder, one: EvaluationSet) -> Vectors:
    """Unit vectors of the set."""
    corpus = list(one.corpus.values())
    of_queries, of_beginnings = (embedder.encode_queries(x) for x in (list(one.queries.values()), beginnings(corpus)))
    return of_queries, embedder.encode_documents(corpus), of_beginnings


def gains(
    sets: list[EvaluationSet], vectors: list[Vectors], before: np.ndarray, kind: str, strength: float
) -> dict[str, Any]:
    """What each set gains by its own texts, and by another's."""
    same, other = (
        np.array([whitened(one, vectors[i], vectors[(i + step) % len(sets)], kind, strength)
                  for i, one in enumerate(sets)]) - before
        for step in (0, len(sets) // 2)
    )  # fmt: skip
    return {
        "gain": round(same.mean(), 2),
        "other": round(other.mean(), 2),
        "better": int((same > other).sum()),
        "sets": named(sets, same),
    }


def whitened(one: EvaluationSet, vectors: Vectors, by: Vectors, kind: str, strength: float) -> float:
    """NDCG@10 in points of a set whitened by the texts of a corpus."""
    sample = by[1][np.random.default_rng(0).permutation(len(by[1]))[:SIZE]]
    run: dict[str, dict[str, float]] = {}
    for rows, stand_ins in parts(vectors, by, sample, kind):
        found = whitening(stand_ins, sample, strength)
        run |= ranked(one, found.of_queries(vectors[0]), found.of_documents(vectors[1]), rows)
    return 100 * ndcg(run, one.qrels)


def parts(vectors: Vectors, by: Vectors, sample: np.ndarray, kind: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows of queries, what they are whitened by)."""
    if kind == "queries":
        for half, rest in halves(len(vectors[0]), len(by[0]), seed=0):
            yield half, by[0][rest]
    else:
        yield np.arange(len(vectors[0])), by[2] if kind == "beginnings" else sample


def ranked(
    one: EvaluationSet, queries: np.ndarray, documents: np.ndarray, rows: np.ndarray
) -> dict[str, dict[str, float]]:
    """The ten best documents of some of the queries, by cosine."""
    names = np.array(list(one.queries))[rows].tolist()
    return as_run(names, list(one.corpus), search(queries[rows], documents, 10))


def named(sets: list[EvaluationSet], values: np.ndarray) -> dict[str, float]:
    """By set, rounded."""
    return {one.name: round(float(value), 2) for one, value in zip(sets, values, strict=True)}


def emit(line: dict[str, Any]) -> None:
    """One JSON line."""
    print(json.dumps({"benchmark": "whiten"} | line | about("jax")), flush=True)


if __name__ == "__main__":
    main()
