"""How long a fit of an `Adapter` takes, and its peak memory: one JSON line a size.

    python benchmarks/fit_time.py [QUERIES DOCUMENTS [WIDTH]] …

Unit vectors are drawn so that a linear map is to be learned: a query is a map of its relevant document's vector, with
noise. It is learned to the end, so that no fold stops early. Each size runs in a process of its own.
"""

import argparse
import subprocess
import sys
import time

import numpy as np
from harness import emit, peak_bytes

from cde_jax import Adapter

SIZES = ("1000,100000,384", "10000,1000000,384")
BLOCK = 50_000


def main() -> None:
    """Each size in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=SIZES, help="QUERIES,DOCUMENTS,WIDTH")
    parser.add_argument("--sides", default="query", choices=("query", "both"))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for size in args.sizes:
        if args.one:
            measure(*map(int, size.split(",")), args.sides)
        else:
            subprocess.run([sys.executable, __file__, size, "--sides", args.sides, "--one"], check=True)


def measure(queries: int, documents: int, width: int, sides: str) -> None:
    """Fit once and print the line."""
    random = np.random.default_rng(0)
    corpus = np.empty((documents, width), np.float32)
    for start in range(0, documents, BLOCK):
        rows = random.standard_normal((min(BLOCK, documents - start), width), np.float32)
        corpus[start : start + BLOCK] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    relevant = random.choice(documents, queries, replace=False)
    shift = random.standard_normal((width, width), np.float32) * 2 / width**0.5
    noise = random.standard_normal((queries, width), np.float32) * 3.5 / width**0.5
    vectors = corpus[relevant] + corpus[relevant] @ shift + noise
    before, start = peak_bytes(), time.perf_counter()
    adapter = Adapter.fit(vectors, corpus, np.stack([np.arange(queries), relevant], axis=1), sides=sides)
    line = {"benchmark": "fit_time", "queries": queries, "documents": documents, "width": width, "sides": sides}
    line |= {"seconds": round(time.perf_counter() - start, 1), "peak_gib": round(peak_bytes() / 2**30, 2)}
    line |= {"peak_gib_before": round(before / 2**30, 2)}
    report = {name: adapter.report[name] for name in ("folds", "steps", "refresh", "identity")}
    emit(line | report | {"curve": list(adapter.report["curve"].values())}, "jax", "numpy")


if __name__ == "__main__":
    main()
