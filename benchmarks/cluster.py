"""Paired k-means against `faiss.Kmeans` on the same rows: seconds and objective, one JSON line a method.

    python benchmarks/cluster.py [--vectors FILE.npz] [--pairs 100000] [--cluster-size 512]

FAISS clusters all rows q⊕d and d⊕q, spherical, at most 100 iterations: with 3 tries on all rows ("faiss"), and with
1 and 3 tries on the sample of 256 rows a centroid that it takes by default ("faiss, sampled, …"). "paired_kmeans" has
the same limits and three seeds. The objective is the mean cosine of each pair to its nearest centroid, by one function
for all. `blas` names the kernels that each BLAS chose: a FAISS wheel may not know a new processor, and is several
times slower then; OPENBLAS_CORETYPE=SkylakeX makes both take the same.

Vectors are float16: `queries` and `documents` [n, D] of FILE.npz, or synthetic ones.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import synthetic
from harness import emit
from jaxtyping import Float
from threadpoolctl import threadpool_info

from cde_jax.batching.cluster import paired_kmeans

ITERATIONS, TRIES, BLOCK = 100, 3, 10_000
SAMPLE = 256  # rows a centroid: FAISS's default
Vectors = Float[np.ndarray, "n D"]


def main() -> None:
    """Run every method once, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, help="an .npz file with queries and documents [n, D]")
    parser.add_argument("--pairs", type=int, default=100_000, help="of synthetic vectors")
    parser.add_argument("--cluster-size", type=int, default=512)
    parser.add_argument("--methods", nargs="*", default=["faiss", "faiss, sampled", "paired_kmeans"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.vectors:
            stored = np.load(args.vectors)
            queries, documents = stored["queries"], stored["documents"]
        else:
            queries, documents = map(np.array, synthetic.vectors(Path(folder), args.pairs))
    k = -(-len(queries) // args.cluster_size)
    kernels = {
        Path(library["filepath"]).name.split("-")[0]: library["architecture"]
        for library in threadpool_info()
        if "architecture" in library
    }
    first: dict[str, float] = {}
    for name, run in methods(queries, documents, k).items():
        if not name.startswith(tuple(args.methods)):
            continue
        start, cpu = time.perf_counter(), time.process_time()
        centroids = run()
        measured = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        measured["objective"] = objective(queries, documents, centroids)
        first = first or measured
        line = {"benchmark": "cluster", "vectors": args.vectors.stem if args.vectors else "synthetic"}
        line |= {"pairs": len(queries), "width": queries.shape[1], "clusters": k, "method": name}
        line |= {key: round(value, 5) for key, value in measured.items()}
        line["speed_ratio_to_first"] = round(first["seconds"] / measured["seconds"], 3)
        line["objective_ratio_to_first"] = round(measured["objective"] / first["objective"], 4)
        emit(line | {"blas": kernels}, "numpy", "faiss-cpu")


def methods(queries: Vectors, documents: Vectors, k: int) -> dict[str, Callable[[], Float[np.ndarray, "k 2D"]]]:
    """{name: a function that returns centroids}."""
    faiss_on = partial(faiss_centroids, queries, documents, k)
    rows = 2 * len(queries)
    found = {"faiss": partial(faiss_on, TRIES, rows)}
    found |= {f"faiss, sampled, tries {tries}": partial(faiss_on, tries, SAMPLE) for tries in (1, TRIES)}
    settings = {"iterations": ITERATIONS, "tries": TRIES}
    return found | {
        f"paired_kmeans, seed {seed}": lambda seed=seed: (
            paired_kmeans(queries, documents, k, **settings, seed=seed).centroids
        )
        for seed in range(3)
    }


def faiss_centroids(
    queries: Vectors, documents: Vectors, k: int, tries: int, rows_per_centroid: int
) -> Float[np.ndarray, "k 2D"]:
    """Centroids by `faiss.Kmeans`, which trains on at most `rows_per_centroid` · k rows."""
    pair = np.concatenate([queries, documents], axis=1).astype(np.float32)
    swapped = np.concatenate([documents, queries], axis=1).astype(np.float32)
    rows = np.concatenate([pair, swapped])  # [2n, 2D]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    options = {"niter": ITERATIONS, "nredo": tries, "spherical": True, "seed": 42}
    kmeans = faiss.Kmeans(rows.shape[1], k, max_points_per_centroid=rows_per_centroid, **options)
    kmeans.train(rows)
    return kmeans.centroids


def objective(queries: Vectors, documents: Vectors, centroids: Float[np.ndarray, "k 2D"]) -> float:
    """Mean cosine of each pair to its nearest centroid."""
    total = 0.0
    for start in range(0, len(queries), BLOCK):
        block = slice(start, start + BLOCK)
        rows = np.concatenate([queries[block], documents[block]], axis=1).astype(np.float32)
        cosines = rows @ centroids.T / np.linalg.norm(rows, axis=1, keepdims=True)
        total += cosines.max(axis=1).sum(dtype=np.float64)
    return total / len(queries)


if __name__ == "__main__":
    main()
