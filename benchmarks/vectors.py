"""Embed evaluation sets once, for the benchmarks of adapters: one npz file a set.

    python benchmarks/vectors.py --model DIR_OR_NAME --evaluation SETS --out DIR [--length 128]

NAME.npz holds float32 unit vectors `queries` [q, D], `documents` [n, D] and `pseudo_queries` [p, D], in the order of
the set. A file that is there is kept.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import evaluation_sets
import numpy as np
from harness import emit

from cde_jax.adapters.whitening import pseudo_queries
from cde_jax.retrieval.embedder import Embedder


def main() -> None:
    """Embed and write every set that has no file yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory (the export of a run), or a hub name")
    parser.add_argument("--evaluation", nargs="+", required=True, help="BEIR folders, or folders of such")
    parser.add_argument("--out", type=Path, required=True, help="directory of the npz files")
    parser.add_argument("--queries", type=int, default=0, help="at most so many of a set; 0: all")
    parser.add_argument("--documents", type=int, default=0, help="at most so many of a set; 0: all")
    parser.add_argument("--length", type=int, help="tokens of a text at most; by default the model's own")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    embedder = Embedder.from_pretrained(args.model, progress=False)
    if args.length:
        lengths = {"query_length": args.length, "document_length": args.length}
        embedder.settings = dataclasses.replace(embedder.settings, **lengths)
    for dataset in evaluation_sets.read(args.evaluation, args.queries, args.documents):
        file = args.out / f"{dataset.name}.npz"
        if file.exists():
            continue
        start, corpus = time.perf_counter(), list(dataset.corpus.values())
        context = embedder.embed_context(corpus, seed=0) if embedder.contextual else None
        arrays = {
            "queries": embedder.encode_queries(list(dataset.queries.values()), context),
            "documents": embedder.encode_documents(corpus, context),
            "pseudo_queries": embedder.encode_queries(pseudo_queries(corpus), context),
        }
        with open(file.with_suffix(".tmp"), "wb") as temporary:
            np.savez(temporary, **arrays)
        file.with_suffix(".tmp").rename(file)
        emit({"benchmark": "vectors", "set": dataset.name, "seconds": round(time.perf_counter() - start, 1)}, "jax")


if __name__ == "__main__":
    main()
