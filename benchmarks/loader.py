"""Reading an epoch of 1,000,000 pairs: pairs per second and memory of `Loader.iterate`, one JSON line per case.

python benchmarks/loader.py [--pairs 1000000] [--batch 512] [--cases threads=4 workers=2] [--text-lengths 8]

A synthetic store of texts of 48 … 80 tokens, cut to 64, and a plan of one epoch are written to a temporary folder. The
first case is a plain loop over `Loader.batch(step)`; the ratio of the others is to it, in the same process.
Memory is anonymous memory (RssAnon, and RssShmem where processes hand over batches) of the process and its workers at
10 %, 50 % and 100 % of the epoch: resident memory would count the page cache of the mapped files too.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from about import about

from cde_jax.batching.loader import Loader
from cde_jax.batching.plan import BatchPlan
from cde_jax.data.store import Store, StoreWriter

LENGTH, VOCABULARY, BLOCK = 64, 30522, 20_000
FRACTIONS = (0.1, 0.5, 1.0)


def main() -> None:
    """Write the data, then read one epoch in each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=512, help="pairs of a plan batch")
    parser.add_argument("--context", type=int, default=64, help="context documents of a plan batch")
    parser.add_argument("--text-lengths", type=int, default=1, help="more than 1: texts in chunks of similar length")
    parser.add_argument("--prefetch", type=int, default=8)
    parser.add_argument("--cases", nargs="+", default=["threads=1", "threads=2", "threads=4", "workers=1", "workers=2"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        loader = open_loader(Path(folder), args.pairs, args.batch, args.context, args.text_lengths)
        plain = None
        for case in ["plain", *args.cases]:
            speed, memory = read_epoch(batches(loader, case, args.prefetch), len(loader.plan), args.batch)
            plain = plain or speed
            line = {
                "benchmark": "loader",
                "case": case,
                "pairs": args.pairs,
                "tokens": LENGTH,
                "batch": args.batch,
                "text_lengths": args.text_lengths,
                "prefetch": args.prefetch,
                "pairs_per_second": round(speed),
                "ratio_to_plain": round(speed / plain, 2),
                "anonymous_mib_at": memory,
            }
            print(json.dumps(line | about("grain", "numpy")), flush=True)


def batches(loader: Loader, case: str, prefetch: int) -> Iterator[dict[str, np.ndarray]]:
    """One epoch, "plain", or by "threads=…" or "workers=…"."""
    steps = len(loader.plan)
    if case == "plain":
        return (loader.batch(step) for step in range(steps))
    how, count = case.split("=")
    return loader.iterate(0, steps, **({"threads": 0, "workers": 0} | {how: int(count)}), prefetch=prefetch)


def read_epoch(batches: Iterator, steps: int, batch: int) -> tuple[float, dict[str, float]]:
    """Pairs per second after the first batch (all is started and laid out then), and memory in MiB."""
    marks = {int(steps * fraction): f"{fraction:.0%}" for fraction in FRACTIONS}
    memory, start, end = {}, 0.0, 0.0
    for step, arrays in enumerate(batches, 1):
        end = time.perf_counter()
        start = start or end
        if step in marks:
            memory[marks[step]] = anonymous_memory()
        assert arrays["keep"].shape == (1, batch, batch)
    return (steps - 1) * batch / (end - start), memory


def anonymous_memory() -> float:
    """MiB of this process and its workers that no file backs."""
    total = 0
    for pid in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(("RssAnon:", "RssShmem:")):
                total += int(line.split()[1])
    return round(total / 1024, 1)


def open_loader(folder: Path, pairs: int, batch: int, context: int, text_lengths: int) -> Loader:
    """A loader over a store and a plan written to `folder`, both mapped to memory."""
    store = write_pairs(folder / "pairs", pairs)
    write_plan(folder / "plan", store, batch)
    return Loader(
        BatchPlan.load(folder / "plan"),
        store,
        batches_per_step=1,
        context_size=context,
        context_source="batch",
        query_length=LENGTH,
        document_length=LENGTH,
        seed=0,
        text_lengths=text_lengths,
    )


def write_pairs(directory: Path, pairs: int) -> Store:
    """Random tokens, in blocks."""
    random = np.random.default_rng(0)
    with StoreWriter(directory, "pairs") as writer:
        for done in range(0, pairs, BLOCK):
            count = min(BLOCK, pairs - done)
            for name in ("query_tokens", "document_tokens"):
                lengths = random.integers(48, 81, count)
                tokens = random.integers(1, VOCABULARY, int(lengths.sum()), dtype=np.uint16)
                writer.append_ragged(name, np.split(tokens, np.cumsum(lengths)[:-1]))
            writer.append("domain", np.zeros(count, np.int32))
        return writer.finish({"pairs": pairs, "documents": pairs, "domains": [{"name": "one", "pairs": pairs}]})


def write_plan(directory: Path, pairs: Store, batch: int) -> None:
    """One epoch at random, a twentieth of the negatives masked."""
    random = np.random.default_rng(1)
    n = pairs.manifest["pairs"]
    rows = random.permutation(n)[: n // batch * batch].reshape(-1, batch)
    with StoreWriter(directory, "plan") as writer:
        for block in np.array_split(rows, max(1, len(rows) // 64)):
            keep = (random.random((len(block), batch, batch)) > 0.05) | np.eye(batch, dtype=bool)
            writer.append("rows", block)
            writer.append("hard_negatives", np.zeros((len(block), batch, 0), np.int64))
            writer.append("keep_bits", np.packbits(keep, axis=-1))
            writer.append("groups", np.zeros(len(block), np.int32))
        writer.append("clusters", np.zeros(n, np.int32))
        writer.finish({"pairs": pairs.fingerprint, "settings": {}, "batches": len(rows)})


if __name__ == "__main__":
    main()
