"""What a corpus' centre is worth to an encoder that was never trained for it: one JSON line per case, NDCG@10.

    python benchmarks/centre.py --model all-MiniLM-L6-v2 --evaluation SETS [--shares 0.5 0.75 1] [--sizes 32 512]

Each set is embedded once. From every unit vector a share of the mean unit vector of some of its documents ("same
corpus"), or of the documents of the set half the list away ("other corpus"), is taken. `gain` is the mean over sets, in
points, `better` on how many of them the same corpus beats the other; both over the seeds that draw the documents.
"""

import argparse
import json
from typing import Any

import numpy as np
from about import about
from quality.evaluation import cut, read_all

from cde_jax.data.sources.beir import EvaluationSet
from cde_jax.retrieval.embedder import Embedder
from cde_jax.retrieval.evaluate import ndcg
from cde_jax.retrieval.index import as_run, search


def main() -> None:
    """Embed all sets, then score each share and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a biencoder: a directory, or its hub name")
    parser.add_argument("--evaluation", nargs="+", required=True, help="BEIR folders, or folders of such")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.75, 1.0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[32, 512], help="documents that the centre is of")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--documents", type=int, default=0, help="at most so many of a set; 0: all")
    args = parser.parse_args()
    embedder = Embedder.from_pretrained(args.model)
    sets = [cut(one, 0, args.documents, seed=0) for one in read_all(args.evaluation)]
    vectors = [(embedder.encode_queries(list(one.queries.values())),
                embedder.encode_documents(list(one.corpus.values()))) for one in sets]  # fmt: skip
    before = np.array([score(one, *mine, None) for one, mine in zip(sets, vectors, strict=True)])
    emit({"share": 0.0, "mean": round(100 * before.mean(), 2), "sets": named(sets, 100 * before)})
    for size in args.sizes:
        for share in args.shares:
            emit(case(sets, vectors, before, share, size, args.seeds))


def case(sets: list[EvaluationSet], vectors: list, before: np.ndarray, share: float, size: int, seeds: list) -> dict:
    """Both kinds' gains over no centre."""
    gains = {"same corpus": [], "other corpus": []}
    for seed in seeds:
        centres = [share * centre(documents, size, seed) for _, documents in vectors]
        half = len(sets) // 2
        for kind, used in (("same corpus", centres), ("other corpus", centres[half:] + centres[:half])):
            after = [score(*parts) for parts in zip(sets, *zip(*vectors, strict=True), used, strict=True)]
            gains[kind].append(100 * (np.array(after) - before))
    same, other = (np.array(rows) for rows in gains.values())
    return {
        "share": share,
        "size": size,
        "seeds": len(seeds),
        "gain": {kind: round(float(np.mean(rows)), 2) for kind, rows in gains.items()},
        "better": (same > other).sum(axis=1).tolist(),
        "sets": named(sets, same.mean(axis=0)),
    }


def centre(documents: np.ndarray, size: int, seed: int) -> np.ndarray:
    """The mean of some unit vectors, drawn without replacement."""
    drawn = np.random.default_rng(seed).choice(len(documents), min(size, len(documents)), replace=False)
    return documents[drawn].mean(axis=0)


def score(one: EvaluationSet, queries: np.ndarray, documents: np.ndarray, taken: np.ndarray | None) -> float:
    """NDCG@10 by cosine, of vectors less `taken`."""
    if taken is not None:
        queries, documents = (x - taken for x in (queries, documents))
        queries, documents = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, documents))
    return ndcg(as_run(list(one.queries), list(one.corpus), search(queries, documents, 10)), one.qrels)


def named(sets: list[EvaluationSet], values: np.ndarray) -> dict[str, float]:
    """By set, rounded."""
    return {one.name: round(float(value), 2) for one, value in zip(sets, values, strict=True)}


def emit(line: dict[str, Any]) -> None:
    """One JSON line."""
    print(json.dumps({"benchmark": "centre"} | line | about("jax")), flush=True)


if __name__ == "__main__":
    main()
