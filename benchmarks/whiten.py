"""What whitening gains for a trained or pretrained model: one JSON line a case, NDCG@10 in points.

    python benchmarks/whiten.py --model all-MiniLM-L6-v2 --evaluation SETS [--strengths 0 8 16 32] [--documents 400]

Each set is embedded once, then whitened (`cde_jax.adapters.whitening`) by 512 of its documents and
  queries     the set's queries, each half by the other half;
  beginnings  the first plain words of those documents: pseudo queries, from the corpus alone;
  documents   the documents in place of queries: one mean for both.
Strength 0 only centres. `other` is the gain from whitening by the set half the list away, `better` on how many sets
the own corpus is better.
"""

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import evaluation_sets
import numpy as np
from harness import emit
from jaxtyping import Float, Int

from cde_jax.adapters.whitening import SAMPLE_SIZE, STRENGTH, pseudo_queries, whitening
from cde_jax.data.sources.beir import EvaluationSet
from cde_jax.evaluation.metrics import ndcg
from cde_jax.retrieval.embedder import Embedder
from cde_jax.retrieval.index import as_run, search

KINDS = ("queries", "beginnings", "documents")


class Vectors(NamedTuple):
    """Unit vectors of a set."""

    queries: Float[np.ndarray, "q D"]
    documents: Float[np.ndarray, "n D"]
    pseudo_queries: Float[np.ndarray, "p D"]


def main() -> None:
    """Embed all sets, then score each kind and strength."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory (the export of a run), or a hub name")
    parser.add_argument("--evaluation", nargs="+", required=True, help="BEIR folders, or folders of such; two or more")
    parser.add_argument("--strengths", nargs="+", type=float, default=[0.0, STRENGTH / 2, STRENGTH, STRENGTH * 2])
    parser.add_argument("--queries", type=int, default=0, help="at most so many of a set; 0: all")
    parser.add_argument("--documents", type=int, default=0, help="at most so many of a set; 0: all")
    args = parser.parse_args()
    embedder = Embedder.from_pretrained(args.model, progress=False)
    sets = evaluation_sets.read(args.evaluation, args.queries, args.documents)
    vectors = [embed(embedder, dataset) for dataset in sets]
    before = np.array([
        100 * ndcg(ranked(dataset, x.queries, x.documents, np.arange(len(x.queries))), dataset.qrels)
        for dataset, x in zip(sets, vectors, strict=True)
    ])  # fmt: skip
    line = {"benchmark": "whiten"}
    emit(line | {"by": "nothing", "mean": round(before.mean(), 2), "sets": by_name(sets, before)}, "jax")
    for kind in KINDS:
        for strength in args.strengths:
            own, other = (
                np.array([
                    whitened_ndcg(dataset, vectors[i], vectors[(i + shift) % len(sets)], kind, strength)
                    for i, dataset in enumerate(sets)
                ]) - before
                for shift in (0, len(sets) // 2)
            )  # fmt: skip
            gains = {"gain": round(own.mean(), 2), "other": round(other.mean(), 2), "better": int((own > other).sum())}
            emit(line | {"by": kind, "strength": strength, **gains, "sets": by_name(sets, own)}, "jax")


def embed(embedder: Embedder, dataset: EvaluationSet) -> Vectors:
    """The vectors of a set; a contextual model reads a sample of the set's corpus."""
    corpus = list(dataset.corpus.values())
    context = embedder.embed_context(corpus, seed=0) if embedder.contextual else None
    texts = (list(dataset.queries.values()), pseudo_queries(corpus))
    queries, pseudo = (embedder.encode_queries(some, context) for some in texts)
    return Vectors(queries, embedder.encode_documents(corpus, context), pseudo)


def whitened_ndcg(dataset: EvaluationSet, vectors: Vectors, corpus: Vectors, kind: str, strength: float) -> float:
    """NDCG@10, in points, of a set whitened by the texts of a corpus."""
    sample = corpus.documents[np.random.default_rng(0).permutation(len(corpus.documents))[:SAMPLE_SIZE]]
    run: dict[str, dict[str, float]] = {}
    for rows, queries in parts(vectors, corpus, sample, kind):
        own, documents = vectors.queries, vectors.documents
        if len(queries):  # a set of one query has none to whiten it by
            fitted = whitening(queries, sample, strength)
            own, documents = fitted.transform_queries(own), fitted.transform_documents(documents)
        run |= ranked(dataset, own, documents, rows)
    return 100 * ndcg(run, dataset.qrels)


def parts(
    vectors: Vectors, corpus: Vectors, sample: Float[np.ndarray, "m D"], kind: str
) -> Iterator[tuple[Int[np.ndarray, " r"], Float[np.ndarray, "p D"]]]:
    """(rows of queries, the vectors in place of queries that whiten them)."""
    if kind != "queries":
        yield np.arange(len(vectors.queries)), corpus.pseudo_queries if kind == "beginnings" else sample
        return
    half, others = (np.array_split(np.random.default_rng(0).permutation(len(x.queries)), 2) for x in (vectors, corpus))
    for rows, rest in zip(half, others[::-1], strict=True):  # no query has a part in its own whitening
        yield rows, corpus.queries[rest]


def ranked(
    dataset: EvaluationSet,
    queries: Float[np.ndarray, "q D"],
    documents: Float[np.ndarray, "n D"],
    rows: Int[np.ndarray, " r"],
) -> dict[str, dict[str, float]]:
    """The ten best documents of some of the queries, by cosine."""
    names = np.array(list(dataset.queries))[rows].tolist()
    return as_run(names, list(dataset.corpus), search(queries[rows], documents, 10))


def by_name(sets: list[EvaluationSet], values: Float[np.ndarray, " s"]) -> dict[str, float]:
    """{set: value}, rounded."""
    return {dataset.name: round(float(value), 2) for dataset, value in zip(sets, values, strict=True)}


if __name__ == "__main__":
    main()
