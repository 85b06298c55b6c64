"""A plan of 1,000,000 pairs: seconds of clustering, packing and masking, and peak memory; one JSON line.

python benchmarks/plan.py [--pairs 1000000] [--width 768] [--hard-negatives 0] [--directory DIR]

Synthetic vectors of ten domains of unequal size (float16, in blocks, to a temporary folder in DIR): mixtures of topics
in 96 dimensions, turned into the width, with some noise. SVD to 128 dimensions, cluster and batch size 512, a greedy
tour, one epoch, ε = 0.1. `build_plan` runs once; its steps are timed where it hands them over ("packing" has the tours
and what is mined). Peak memory is ru_maxrss, which counts the pages of the mapped vectors too. The ratios are to half
an hour and 8 GiB.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from about import about

from cde_jax.batching import build
from cde_jax.config import Batching
from cde_jax.data.store import Store, StoreWriter

SHARES = np.array([30, 20, 14, 10, 8, 6, 5, 4, 2, 1]) / 100  # of the pairs, by domain
LATENT, TOPIC_SIZE, BLOCK = 96, 200, 20_000
SETTINGS = {
    "batch_size": 512,
    "method": "clustered",
    "cluster_size": 512,
    "cluster_dimensions": 128,
    "cluster_rows": 2**20,
    "iterations": 100,
    "tries": 3,
    "packing": "tsp",
    "epochs": 1,
    "domain_weights": (),
    "mine_last": 0,
    "mine_first": 0,
    "mine_margin": 0.05,
    "filter_margin": 0.1,
}
TARGET_SECONDS, TARGET_BYTES = 30 * 60, 8 * 2**30
SECONDS: Counter[str] = Counter()


def main() -> None:
    """Write the data in a process of its own (Linux hands a process the peak of its parent), plan, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--hard-negatives", type=int, default=0, help="mined from ranks 10 … 50, if any")
    parser.add_argument("--directory", type=Path, help="where the temporary folder goes")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        return write_data(args.write, args.pairs, args.width)
    settings = SETTINGS | {"hard_negatives": args.hard_negatives}
    if args.hard_negatives:
        settings |= {"mine_first": 10, "mine_last": 50}
    build.cluster_groups, build.plan_arrays = timed(build.cluster_groups), timed_arrays(build.plan_arrays)
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        command = [sys.executable, __file__, f"--write={folder}", f"--pairs={args.pairs}", f"--width={args.width}"]
        subprocess.run(command, check=True)
        pairs, vectors = (Store.open(Path(folder) / kind, kind=kind) for kind in ("pairs", "vectors"))
        start = time.perf_counter()
        plan = build.build_plan(Path(folder) / "plan", pairs, vectors, Batching(**settings), 0)
        SECONDS["all"] = time.perf_counter() - start
        difficulty, batches = plan.manifest["difficulty"], len(plan)
        clusters = sum(group["clusters"] for group in plan.manifest["groups"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {
        "benchmark": "plan",
        "pairs": args.pairs,
        "width": args.width,
        "hard_negatives": args.hard_negatives,
        "seconds": {name: round(value, 1) for name, value in SECONDS.items()},
        "ratio_to_30_minutes": round(SECONDS["all"] / TARGET_SECONDS, 3),
        "peak_bytes": peak,
        "ratio_to_8_GiB": round(peak / TARGET_BYTES, 3),
        "batches": batches,
        "clusters": clusters,
        **difficulty,
    }
    print(json.dumps(result | about("numpy", "faiss-cpu", "scikit-learn")), flush=True)


def timed(function):
    """The clustering, timed."""

    def run(*args):
        start = time.perf_counter()
        result = function(*args)
        SECONDS["clustering"] += time.perf_counter() - start
        return result

    return run


def timed_arrays(function):
    """The pieces of the plan, timed by what they are: the rows of an epoch, or a batch's hard negatives and mask."""
    steps = {"clusters": "packing", "rows": "packing", "groups": "packing"}

    def run(*args) -> Iterator[tuple[str, np.ndarray]]:
        pieces, start = function(*args), time.perf_counter()
        for name, array in pieces:
            SECONDS[steps.get(name, "masking")] += time.perf_counter() - start
            yield name, array
            start = time.perf_counter()

    return run


def write_data(folder: Path, pairs: int, width: int) -> None:
    """Stores of pairs, as far as a plan reads them, and of their vectors."""
    random = np.random.default_rng(0)
    sizes = np.diff(np.round(np.concatenate([[0], np.cumsum(SHARES)]) * pairs).astype(int))
    domain = random.permutation(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes))
    with StoreWriter(folder / "pairs", "pairs") as writer:
        writer.append("domain", domain)
        writer.append("query_key", random.permutation(pairs).astype(np.uint64))
        writer.append("document_key", random.permutation(pairs).astype(np.uint64))
        writer.append("negatives.offsets", np.zeros(pairs + 1, np.int64))
        writer.append("negatives.values", np.zeros(0, np.int64))
        names = [{"name": f"domain{i}", "pairs": int(size)} for i, size in enumerate(sizes)]
        written = writer.finish({"pairs": pairs, "domains": names})
    spectrum = 1 / np.sqrt(1 + np.arange(LATENT))
    turn = random.normal(size=(LATENT, width)).astype(np.float32) / np.float32(np.sqrt(LATENT))
    centers = [random.normal(size=LATENT) * spectrum for _ in sizes]
    topics = [
        c + random.normal(size=(max(1, s // TOPIC_SIZE), LATENT)) * spectrum
        for c, s in zip(centers, sizes, strict=True)
    ]
    with StoreWriter(folder / "vectors", "vectors") as writer:
        for start in range(0, pairs, BLOCK):
            of = domain[start : start + BLOCK]
            topic = np.stack([topics[d][int(random.integers(len(topics[d])))] for d in of])
            shared = topic + 0.7 * random.normal(size=topic.shape) * spectrum
            for name in ("queries", "documents"):
                rows = (shared + 0.4 * random.normal(size=topic.shape) * spectrum).astype(np.float32) @ turn
                rows += 0.02 * random.normal(size=rows.shape).astype(np.float32)
                writer.append(name, (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16))
        writer.finish({"pairs": written.fingerprint, "surrogate": "synthetic"})


if __name__ == "__main__":
    main()
