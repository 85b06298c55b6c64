"""Paired k-means against the plain FAISS recipe, and the time and memory of clustering a large domain. JSON lines.

    python benchmarks/cluster.py [--vectors FILE.npz] [--pairs 100000] [--cluster-size 512]
    python benchmarks/cluster.py --dimensions 128 --pairs 1000000 [--rows 1048576]

The first: `faiss.Kmeans` on all rows q⊕d and d⊕q, 100 iterations, 3 tries, spherical, and then `paired_kmeans` with the
same limits and three seeds. A line each: seconds (by the clock, and of the processor), the mean cosine of each pair to
its centroid (one function for both), and ours against FAISS. The kernels that each BLAS chose are named: a FAISS wheel
may not know a new processor, and is several times slower then; OPENBLAS_CORETYPE=SkylakeX makes both take the same.

The second: `cluster_domains` alone on one domain whose vectors are on disk, reduced by SVD, with its peak memory
(ru_maxrss, which counts pages of the mapped files too). The ratios are to half an hour and 8 GiB.

Vectors are float16, 768 wide: `queries` and `documents` of FILE.npz, or synthetic ones (topics of unequal sizes in a
tree; a pair shares its topic and its text, and adds noise of its own).
"""

import argparse
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from about import about
from threadpoolctl import threadpool_info

from cde_jax.batching.cluster import cluster_domains, paired_kmeans

WIDTH, TOPIC_PAIRS, FIELDS, BLOCK = 768, 50, 40, 10_000
LIMITS = {"iterations": 100, "tries": 3}
TARGET_SECONDS, TARGET_BYTES = 30 * 60, 8 * 2**30


def main() -> None:
    """Run the one comparison or the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, help="an .npz file with queries and documents [n, D]")
    parser.add_argument("--pairs", type=int, default=100_000, help="synthetic")
    parser.add_argument("--cluster-size", type=int, default=512)
    parser.add_argument("--dimensions", type=int, default=0, help="of an SVD; our own time and memory then")
    parser.add_argument("--rows", type=int, default=2**20, help="pairs to train on, with --dimensions")
    parser.add_argument("--directory", type=Path, help="where the vectors go for a while, with --dimensions")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.write:
        write(args.write, args.pairs)
    elif args.dimensions:
        large(args)
    else:
        compare(args)


def write(folder: Path, pairs: int) -> None:
    """Synthetic vectors as `queries.npy` and `documents.npy`, in blocks."""
    random = np.random.default_rng(0)
    spectrum = np.arange(1, WIDTH + 1) ** -0.5  # a few directions say most, as in real vectors
    topics = pairs // TOPIC_PAIRS
    centers = random.normal(size=(FIELDS, WIDTH))[random.integers(FIELDS, size=topics)]
    centers = centers + 0.8 * random.normal(size=centers.shape)
    sizes = random.pareto(1.2, topics) + 0.2
    topic = random.choice(topics, pairs, p=sizes / sizes.sum())
    shift = 0.3 * random.normal(size=(2, WIDTH))  # queries are not documents
    files = [
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, (pairs, WIDTH))
        for name in ("queries", "documents")
    ]
    for start in range(0, pairs, BLOCK):
        some = topic[start : start + BLOCK]
        text = centers[some] + 0.7 * random.normal(size=(len(some), WIDTH))
        for file, own in zip(files, shift, strict=True):
            vectors = (text + own + 0.7 * random.normal(size=text.shape)) * spectrum
            file[start : start + BLOCK] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def compare(args: argparse.Namespace) -> None:
    """FAISS, then ours."""
    with tempfile.TemporaryDirectory() as folder:
        if args.vectors:
            stored = np.load(args.vectors)
            queries, documents = stored["queries"], stored["documents"]
        else:
            write(Path(folder), args.pairs)
            queries, documents = (np.load(Path(folder) / f"{name}.npy") for name in ("queries", "documents"))
    k = -(-len(queries) // args.cluster_size)
    case = {
        "benchmark": "cluster",
        "vectors": args.vectors.stem if args.vectors else "synthetic",
        "pairs": len(queries),
        "width": queries.shape[1],
        "clusters": k,
    }
    (centroids, iterations), theirs = timed(plain_faiss, queries, documents, k)
    reached = objective(queries, documents, centroids)
    report(case, method="faiss", **theirs, objective=reached, iterations=iterations)
    for seed in range(3):
        found, ours = timed(paired_kmeans, queries, documents, k, **LIMITS, seed=seed)
        here = objective(queries, documents, found.centroids)
        ratios = {"speedup": theirs["seconds"] / ours["seconds"], "objective_ratio": here / reached}
        ratios["cpu_speedup"] = theirs["cpu_seconds"] / ours["cpu_seconds"]
        report(case, method="ours", seed=seed, **ours, objective=here, **ratios)


def timed(work: Callable, *args, **settings) -> tuple[Any, dict[str, float]]:
    """What it returns, its time, and that of all its threads on the processor, which a busy machine changes less."""
    start, cpu = time.perf_counter(), time.process_time()
    result = work(*args, **settings)
    return result, {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}


def plain_faiss(queries: np.ndarray, documents: np.ndarray, k: int) -> tuple[np.ndarray, int]:
    """Centroids by the recipe, and the iterations of all tries (FAISS stops a try whose objective stays equal)."""
    pair = np.concatenate([queries, documents], axis=1).astype(np.float32)
    swapped = np.concatenate([documents, queries], axis=1).astype(np.float32)
    rows = np.concatenate([pair, swapped])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    kmeans = faiss.Kmeans(
        rows.shape[1],
        k,
        niter=LIMITS["iterations"],
        nredo=LIMITS["tries"],
        spherical=True,
        max_points_per_centroid=len(rows),
        seed=42,
    )
    kmeans.train(rows)
    return kmeans.centroids, len(kmeans.obj)


def objective(queries: np.ndarray, documents: np.ndarray, centroids: np.ndarray) -> float:
    """Mean cosine of each pair to its nearest centroid."""
    total = 0.0
    for start in range(0, len(queries), BLOCK):
        block = slice(start, start + BLOCK)
        rows = np.concatenate([queries[block], documents[block]], axis=1).astype(np.float32)
        cosines = rows @ centroids.T / np.linalg.norm(rows, axis=1, keepdims=True)
        total += cosines.max(axis=1).sum(dtype=np.float64)
    return total / len(queries)


def large(args: argparse.Namespace) -> None:
    """Ours on one domain; the data are written by a process of their own (Linux hands a process its parent's peak)."""
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        subprocess.run([sys.executable, __file__, f"--write={folder}", f"--pairs={args.pairs}"], check=True)
        files = [np.load(Path(folder) / f"{name}.npy", mmap_mode="r") for name in ("queries", "documents")]
        settings = {"cluster_size": args.cluster_size, "dimensions": args.dimensions, "rows": args.rows}
        (found,), time_taken = timed(cluster_domains, *files, [np.arange(args.pairs)], **settings, **LIMITS, seed=0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report(
        {"benchmark": "cluster_domains", "pairs": args.pairs, "width": WIDTH, **settings},
        clusters=len(found.centroids),
        **time_taken,
        peak_gib=peak / 2**30,
        objective=found.objective,
        share_of_half_an_hour=time_taken["seconds"] / TARGET_SECONDS,
        share_of_8_gib=peak / TARGET_BYTES,
    )


def report(case: dict, **measured: float | str) -> None:
    """One JSON line."""
    rounded = {name: round(value, 5) if isinstance(value, float) else value for name, value in measured.items()}
    kernels = {
        Path(i["filepath"]).name.split("-")[0]: i["architecture"] for i in threadpool_info() if "architecture" in i
    }
    print(json.dumps(case | rounded | about("numpy", "faiss-cpu") | {"blas": kernels}), flush=True)


if __name__ == "__main__":
    main()
