"""`Embedder` beside sentence-transformers on the same weights, tokenisation included: a JSON line a case.

    python benchmarks/embedder.py --model DIR_OR_NAME [--documents 2000] [--queries 200] [--starts 5]

Queries of a few words one at a time (milliseconds, median and 99th percentile), and documents of 5 to 300 words, in
turns. `ratio` is the time of sentence-transformers over ours, `difference` the largest between the vectors. Texts
are words drawn from this project's documentation.

With --starts the start-up comes first: seconds of processor and of wall clock from the start of a process to its first
vector, processes in turns; "kept programs" reads what an earlier process compiled (JAX_COMPILATION_CACHE_DIR).
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import emit

from cde_jax.retrieval.embedder import Embedder

DOCUMENTATION = Path(__file__).resolve().parents[1] / "docs"
OURS = "from cde_jax import Embedder; Embedder.from_pretrained({!r}, progress=False).encode_queries(['a query'])"
THEIRS = "from sentence_transformers import SentenceTransformer as S; S({!r}, device='cpu').encode(['a query'])"
PACKAGES = ("jax", "numpy", "torch", "sentence-transformers")


def main() -> None:
    """Time both cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="that both libraries load")
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3, help="of all documents")
    parser.add_argument("--starts", type=int, default=0, help="processes of each library, until the first vector")
    args = parser.parse_args()
    if args.starts:
        start_up(args.model, args.starts)
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


def start_up(model: str, starts: int) -> None:
    """Time fresh processes; the first one of each case, which may compile or read files from disk, is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        kept = {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        none = {"JAX_COMPILATION_CACHE_DIR": ""}
        cases = {"ours": (OURS, none), "ours, kept programs": (OURS, kept), "theirs": (THEIRS, none)}
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
        for _ in range(starts + 1):
            for name, (code, changes) in cases.items():
                before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
                command = [sys.executable, "-c", code.format(model)]
                subprocess.run(command, check=True, env=os.environ | changes, stderr=subprocess.DEVNULL)
                wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
                cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                taken[name].append((cpu, wall))
    for name, seconds in taken.items():
        cpu, wall = (round(float(x), 2) for x in np.median(seconds[1:], axis=0))
        line = {"benchmark": "embedder", "case": "start-up", "library": name, "starts": starts}
        emit(line | {"cpu_seconds": cpu, "wall_seconds": wall}, *PACKAGES)


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
