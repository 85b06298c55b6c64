"""A batch plan of 1,000,000 pairs: seconds, of them clustering, and peak memory; one JSON line.

    python benchmarks/plan.py [--pairs 1000000] [--width 768] [--hard-negatives 0] [--directory DIR]

Synthetic vectors (`synthetic.py`) in ten domains of unequal size, in a temporary folder in DIR. SVD to 128
dimensions, clusters and batches of 512, a greedy tour, one epoch, ε = 0.1. Peak memory counts the pages of the mapped
vectors too. The ratios are to half an hour and 8 GiB.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import synthetic
from harness import emit, peak_bytes

from cde_jax.batching import build
from cde_jax.batching.vectors import texts_fingerprint
from cde_jax.config import Batching
from cde_jax.data.store import Store, StoreWriter

SHARES = np.array([30, 20, 14, 10, 8, 6, 5, 4, 2, 1]) / 100  # of the pairs, by domain
SETTINGS = {"batch_size": 512, "cluster_size": 512, "cluster_dimensions": 128, "epochs": 1, "filter_margin": 0.1}
TARGET_SECONDS, TARGET_BYTES, BLOCK = 30 * 60, 8 * 2**30, 20_000


def main() -> None:
    """Write the stores, plan, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=synthetic.WIDTH)
    parser.add_argument("--hard-negatives", type=int, default=0, help="mined from ranks 10 … 50, if any")
    parser.add_argument("--directory", type=Path, help="where the temporary folder goes")
    args = parser.parse_args()
    settings = SETTINGS | {"hard_negatives": args.hard_negatives}
    if args.hard_negatives:
        settings |= {"mine_first": 10, "mine_last": 50}
    seconds: dict[str, float] = {}
    cluster_groups = build.cluster_groups

    def timed(*arguments):
        start = time.perf_counter()
        result = cluster_groups(*arguments)
        seconds["clustering"] = round(time.perf_counter() - start, 1)
        return result

    build.cluster_groups = timed
    with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        folder = Path(scratch)
        pairs, vectors = write_stores(folder, args.pairs, args.width)
        start = time.perf_counter()
        plan = build.build_plan(folder / "plan", pairs, vectors, Batching(**settings), seed=0)
        seconds["all"] = round(time.perf_counter() - start, 1)
        line = {"benchmark": "plan", "pairs": args.pairs, "width": args.width, "hard_negatives": args.hard_negatives}
        line |= {"seconds": seconds, "ratio_to_30_minutes": round(seconds["all"] / TARGET_SECONDS, 3)}
        line |= {"peak_bytes": peak_bytes(), "ratio_to_8_GiB": round(peak_bytes() / TARGET_BYTES, 3)}
        line |= {"batches": len(plan), "clusters": sum(group["clusters"] for group in plan.manifest["groups"])}
        emit(line | plan.manifest["difficulty"], "numpy", "faiss-cpu", "scikit-learn")


def write_stores(folder: Path, pairs: int, width: int) -> tuple[Store, Store]:
    """A store of pairs, with what a plan reads of one, and a store of their vectors."""
    random = np.random.default_rng(0)
    sizes = np.diff(np.round(np.concatenate([[0], np.cumsum(SHARES)]) * pairs).astype(int))
    with StoreWriter(folder / "pairs", "pairs") as writer:
        writer.append("domain", random.permutation(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)))
        for side in ("query", "document"):
            writer.append(f"{side}_key", random.permutation(pairs).astype(np.uint64))
        writer.append("negatives.offsets", np.zeros(pairs + 1, np.int64))
        writer.append("negatives.values", np.zeros(0, np.int64))
        names = [{"name": f"domain{i}", "pairs": int(size)} for i, size in enumerate(sizes)]
        written = writer.finish({"pairs": pairs, "domains": names})
    with StoreWriter(folder / "vectors", "vectors") as writer:
        for name, array in zip(("queries", "documents"), synthetic.vectors(folder, pairs, width), strict=True):
            for start in range(0, pairs, BLOCK):
                writer.append(name, array[start : start + BLOCK])
        vectors = writer.finish({"texts": texts_fingerprint(written), "surrogate": "synthetic"})
    return written, vectors


if __name__ == "__main__":
    main()
