"""`Embedder` beside sentence-transformers on the same weights, tokenisation included: a JSON line a case.

    python benchmarks/embedder.py --model DIR_OR_NAME [--documents 2000] [--queries 200]

Queries of a few words one at a time (milliseconds, median and 99th percentile), and documents of 5 to 300 words, in
turns. `ratio` is the time of sentence-transformers over ours, `difference` the largest between the vectors. Texts
are words drawn from this project's documentation.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import emit

from cde_jax.retrieval.embedder import Embedder

DOCUMENTATION = Path(__file__).resolve().parents[1] / "docs"
PACKAGES = ("jax", "numpy", "torch", "sentence-transformers")


def main() -> None:
    """Time both cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="that both libraries load")
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3, help="of all documents")
    args = parser.parse_args()
    from sentence_transformers import SentenceTransformer

    ours, theirs = Embedder.from_pretrained(args.model, progress=False), SentenceTransformer(args.model, device="cpu")
    settings = {"normalize_embeddings": True, "show_progress_bar": False}
    random = np.random.default_rng(0)
    sizes = np.clip(random.lognormal(np.log(7), 0.5, args.queries), 2, 30)
    queries = texts(sizes, random)
    documents = texts(np.clip(random.lognormal(np.log(60), 0.8, args.documents), 5, 300), random)
    both = {"ours": ours.encode_queries, "theirs": partial(theirs.encode, **settings)}
    report("queries, one at a time", both, [[query] for query in queries])
    report("documents", both | {"ours": ours.encode_documents}, [documents] * args.rounds)


def texts(sizes: np.ndarray, random: np.random.Generator) -> list[str]:
    """Texts of so many words each."""
    words = [word for file in sorted(DOCUMENTATION.glob("*.md")) for word in file.read_text().split() if word.isalpha()]
    return [" ".join(random.choice(words, int(size))) for size in sizes]


def report(case: str, encode: dict[str, Callable[[list[str]], Any]], calls: list[list[str]]) -> None:
    """Both libraries take turns, call by call, after one round that is not timed."""
    first = [{name: function(call) for name, function in encode.items()} for call in calls]
    seconds: dict[str, list[float]] = {name: [] for name in encode}
    for call in calls:
        for name, function in encode.items():
            start = time.perf_counter()
            function(call)
            seconds[name].append(time.perf_counter() - start)
    line = {"benchmark": "embedder", "case": case, "texts": len(calls[0]), "calls": len(calls)}
    for name, taken in seconds.items():
        line[f"{name}_ms"] = [round(1e3 * float(x), 2) for x in np.percentile(taken, [50, 99])]
    line["ratio"] = round(float(np.median(np.divide(seconds["theirs"], seconds["ours"]))), 3)
    line["difference"] = float(max(np.abs(pair["ours"] - pair["theirs"]).max() for pair in first))
    emit(line, *PACKAGES)


if __name__ == "__main__":
    main()
