"""Hours and bytes of preparing 235 M pairs of 29 domains, computed from rates: one Markdown table.

    python benchmarks/prepare.py [--measure pairs.jsonl.gz] [--batch 512]

With `--measure`, the rates of one CPU core are measured (CPU seconds, so a busy machine matters little) on that file
and on random vectors, and printed as JSON; else `RATES`, which were measured so, are taken. Rates of GPUs and disks are
assumptions (`ASSUMED`). A machine has 8 GPUs, 64 cores used; what one process does alone is not divided.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from cde_jax.batching import cluster, tasks
from cde_jax.batching.negatives import TextKeys, Vectors, threads
from cde_jax.batching.plan import compressed, decompressed
from cde_jax.config import Batching
from cde_jax.data import parts
from cde_jax.data.pairs import InputLog, Rules
from cde_jax.data.sources import jsonl
from cde_jax.data.store import Ragged, Store, unit_rows
from cde_jax.data.tokens import Tokenizer

# CPU seconds of one core, by `--measure` on the largest shared file (AMD EPYC): a pair; an entry of a mask; a
# multiply-add of k-means; a byte that is copied and hashed.
RATES = {
    "read": 4.26e-05,
    "duplicates": 1.87e-07,
    "assemble": 9.5e-06,
    "tokenize": 0.000151,
    "bytes of a pair's shards": 183.0,
    "bytes of a pair": 1120.0,
    "mask entry": 4.77e-08,
    "mask byte read": 1.22e-09,
    "bytes of a mask's entry": 0.0213,
    "multiply-add": 3.41e-11,
}
ASSUMED = {"texts/s of a GPU (110 M parameters, bfloat16)": 3000, "machine's disk, bytes/s": 2e9}
PAIRS, DOMAINS, LARGEST, WIDTH, SURROGATES = 235_000_000, 29, 0.25, 768, 2
BATCH, EPOCHS, CLUSTER, DIMENSIONS, MASKED = 512, 3, 512, 128, 0.01
CORES, GPUS, ITERATIONS = 64, 8, 20


def measure(path: Path) -> dict[str, float]:
    """CPU seconds of one core for each unit of work."""
    found, random = {}, np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch, threads().limit(limits=1):
        folder, clock = Path(scratch), time.process_time
        start = clock()
        read = parts.read_parts(folder, jsonl.parts(path, InputLog()), "", map)
        part = Store.open(read[0], verify=False)
        n = len(part.array("query_key"))
        found["read"] = (clock() - start) / n
        start = clock()
        parts.first_occurrences(read)
        found["duplicates"] = (clock() - start) / n
        tokenizer = Tokenizer.train(list(parts.Texts(read))[:20_000], 8192)
        tokenizer.save(folder / "tokenizer")
        rules = Rules(tokenizer, ("", ""), {}, (64, 256))
        spent: dict[str, float] = {"tokenize": 0.0}

        def timed(function, todo):
            for task in todo:
                start = clock()
                made = function(task)
                spent["tokenize"] += clock() - start
                yield made

        start = clock()
        options = {"source": {}, "counts": {}, "inputs": InputLog(), "map_tasks": timed}
        pairs = parts.write_parts(folder / "pairs", folder, read, folder / "tokenizer", rules, **options)
        found["assemble"] = (clock() - start - spent["tokenize"]) / n
        found["tokenize"] = spent["tokenize"] / n
        found["bytes of a pair's shards"] = sum(f.stat().st_size for f in read[0].iterdir()) / n
        found["bytes of a pair"] = sum(entry["bytes"] for entry in pairs.manifest["arrays"].values()) / n
    vectors = Vectors(*(random.normal(size=(4096, WIDTH)).astype(np.float16) for _ in range(2)))
    keys = TextKeys(*(np.arange(4096, dtype=np.uint64),) * 2, Ragged(np.zeros(0, np.int64), np.zeros(4097, np.int64)))
    settings = Batching(batch_size=BATCH, filter_margin=0.08)  # masks about MASKED of random vectors
    inputs = tasks.Inputs(vectors, vectors, keys, settings, 0, [np.arange(4096)])
    batch = np.arange(4096).reshape(-1, BATCH)
    todo = tasks.Batches(
        inputs, 0, batch, np.zeros(len(batch), np.int32), {0: {"mined": np.empty((4096, 0), np.int32)}}
    )
    with threads().limit(limits=1):
        start = time.process_time()
        tasks.finish_batches(todo)
        found["mask entry"] = (time.process_time() - start) / (batch.size * BATCH)
        keep = random.random((BATCH, BATCH)) >= MASKED
        mask = compressed(keep)
        start = time.process_time()
        for _ in range(100):
            decompressed(mask, BATCH * BATCH // 8)
        found["mask byte read"] = (time.process_time() - start) / (100 * BATCH * BATCH / 8)
        found["bytes of a mask's entry"] = len(mask) / (BATCH * BATCH / 8) / 8
        rows = unit_rows(random.normal(size=(2048, 2 * DIMENSIONS)).astype(np.float32))
        start = time.process_time()
        cluster.assign(rows, rows)
        found["multiply-add"] = (time.process_time() - start) / (2048 * 2048 * 2 * DIMENSIONS)
    return found


def table(rates: dict[str, float], machines: int, batch: int) -> list[tuple[str, float, float]]:
    """Rows (work, hours, bytes)."""
    cores, gpus = machines * CORES, machines * GPUS
    texts_per_second, disk = ASSUMED.values()
    largest = PAIRS * LARGEST
    k, trained = largest / CLUSTER, max(2**20, 32 * largest / CLUSTER)
    operations = (trained * ITERATIONS + largest) * k * 2 * DIMENSIONS  # the largest domain, which one machine clusters
    others = PAIRS / largest * operations * LARGEST  # smaller domains have fewer clusters too
    clusters = max(operations / CORES, (operations + others) / cores) * rates["multiply-add"]
    entries = PAIRS * EPOCHS * batch
    vectors = 2 * PAIRS * WIDTH * 2 * SURROGATES
    rows = [
        ("read, clean, compress", PAIRS * rates["read"] / cores, PAIRS * rates["bytes of a pair's shards"]),
        ("find duplicates (one process)", PAIRS * rates["duplicates"], 0),
        ("tokenize", PAIRS * rates["tokenize"] / cores, 0),
        ("put pairs together (one process)", PAIRS * rates["assemble"], PAIRS * rates["bytes of a pair"]),
        ("vectors of two surrogates", 2 * PAIRS * SURROGATES / texts_per_second / gpus, vectors),
        ("put vectors together (one process)", vectors / disk, vectors),
        ("clusters", clusters, 8 * PAIRS),
        ("masks", entries * rates["mask entry"] / cores, entries * rates["bytes of a mask's entry"]),
        ("put the plan together (one process)", entries / 8 * rates["mask byte read"] + entries / 8 / disk, 0),
    ]
    return [(name, seconds / 3600, size) for name, seconds, size in rows]


def main() -> None:
    """Print the rates, if they are measured, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path, help="pairs as JSON lines")
    parser.add_argument("--batch", type=int, default=BATCH, help="B of the plan")
    args = parser.parse_args()
    rates = measure(args.measure) if args.measure else RATES
    if args.measure:
        print(json.dumps({name: float(f"{value:.3g}") for name, value in rates.items()}, indent=1))
    one, many = table(rates, 1, args.batch), table(rates, 16, args.batch)
    print("| work | 1 machine, hours | 16 machines, hours | GB |\n|---|---|---|---|")
    for (name, hours, size), (_, shared, _) in zip(one, many, strict=True):
        print(f"| {name} | {hours:.2f} | {shared:.2f} | {size / 1e9:,.0f} |")
    print(f"| **sum** | **{sum(r[1] for r in one):.1f}** | **{sum(r[1] for r in many):.1f}** | |")


if __name__ == "__main__":
    main()
