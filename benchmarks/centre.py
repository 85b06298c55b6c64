"""What centring is worth to an encoder as it is, without training: one JSON line per case, NDCG@10 in points.

    python benchmarks/centre.py --model all-MiniLM-L6-v2 --evaluation SETS [--shares 0.5 0.75 1] [--documents 400]

Each set is embedded once, then centred (`cde_jax.retrieval.centre`):
  own         queries by the mean of the set's queries (each half by the other half), documents by that of 512;
  beginnings  queries by the mean of the first plain words of 512 documents, documents as above;
  documents   both by the documents' mean, which needs no queries;
  generic     both by the mean of the other sets' own centres: what needs no context at all.
`other` is the gain from the centres of the set half the list away, `better` on how many sets its own are better.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from about import about
from quality.evaluation import cut, read_all
from quality.scoring import centred_by

from cde_jax.data.sources.beir import EvaluationSet
from cde_jax.retrieval.centre import beginnings, centre, centred
from cde_jax.retrieval.embedder import Embedder
from cde_jax.retrieval.evaluate import ndcg
from cde_jax.retrieval.index import as_run, search

Vectors = tuple[np.ndarray, np.ndarray, np.ndarray]  # of queries, documents, beginnings of documents
Centring = Callable[[list[Vectors], int, int, float], tuple[np.ndarray, np.ndarray]]


def main() -> None:
    """Embed all sets, then score each centring and share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a biencoder: a directory, or its hub name")
    parser.add_argument("--evaluation", nargs="+", required=True, help="BEIR folders, or folders of such; two or more")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.75, 1.0])
    parser.add_argument("--queries", type=int, default=0, help="at most so many of a set; 0: all")
    parser.add_argument("--documents", type=int, default=0, help="at most so many of a set; 0: all")
    args = parser.parse_args()
    embedder = Embedder.from_pretrained(args.model, progress=False)
    sets = [cut(one, args.queries, args.documents, seed=0) for one in read_all(args.evaluation)]
    vectors = [embed(embedder, one) for one in sets]
    before = np.array(
        [score(one, (queries, documents)) for one, (queries, documents, _) in zip(sets, vectors, strict=True)]
    )
    emit({"centres": "none", "mean": round(before.mean(), 2), "sets": named(sets, before)})
    kinds = {"own": own, "beginnings": of_beginnings, "documents": of_documents, "generic": generic}
    for name, centring in kinds.items():
        for share in args.shares:
            emit({"centres": name, "share": share} | gains(sets, vectors, before, centring, share))


def embed(embedder: Embedder, one: EvaluationSet) -> Vectors:
    """Unit vectors of the set."""
    corpus = list(one.corpus.values())
    of_queries, of_beginnings = (embedder.encode_queries(x) for x in (list(one.queries.values()), beginnings(corpus)))
    return of_queries, embedder.encode_documents(corpus), of_beginnings


def gains(
    sets: list[EvaluationSet], vectors: list[Vectors], before: np.ndarray, centring: Centring, share: float
) -> dict[str, Any]:
    """What each set gains from its own centres, and from another's."""
    half = len(sets) // 2
    same, other = (
        np.array([score(one, centring(vectors, i, (i + step) % len(sets), share)) for i, one in enumerate(sets)])
        - before
        for step in (0, half)
    )
    return {
        "gain": round(same.mean(), 2),
        "other": round(other.mean(), 2),
        "better": int((same > other).sum()),
        "sets": named(sets, same),
    }


def own(vectors: list[Vectors], one: int, of: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """By the mean of queries and the mean of documents of the set `of`."""
    return centred_by(vectors[one][:2], vectors[of][:2], 0, share)


def of_beginnings(vectors: list[Vectors], one: int, of: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """By the mean of beginnings and the mean of documents of the set `of`."""
    return centred(vectors[one][0], centre(vectors[of][2]), share), own(vectors, one, of, share)[1]


def of_documents(vectors: list[Vectors], one: int, of: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Both by the mean of the documents of the set `of`."""
    mean = centre(vectors[of][1])
    return centred(vectors[one][0], mean, share), centred(vectors[one][1], mean, share)


def generic(vectors: list[Vectors], one: int, of: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """By the mean centres of the sets that are neither."""
    rest = [x for i, x in enumerate(vectors) if i not in (one, of)]
    means = (np.mean([centre(x[part]) for x in rest], axis=0) for part in (0, 1))
    queries, documents = (centred(x, mean, share) for x, mean in zip(vectors[one][:2], means, strict=True))
    return queries, documents


def score(one: EvaluationSet, vectors: tuple[np.ndarray, np.ndarray]) -> float:
    """NDCG@10 by cosine, in points."""
    return 100 * ndcg(as_run(list(one.queries), list(one.corpus), search(*vectors, 10)), one.qrels)


def named(sets: list[EvaluationSet], values: np.ndarray) -> dict[str, float]:
    """By set, rounded."""
    return {one.name: round(float(value), 2) for one, value in zip(sets, values, strict=True)}


def emit(line: dict[str, Any]) -> None:
    """One JSON line."""
    print(json.dumps({"benchmark": "centre"} | line | about("jax")), flush=True)


if __name__ == "__main__":
    main()
