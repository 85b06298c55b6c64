"""Synthetic surrogate vectors for the benchmarks of clustering and plans: `queries.npy`, `documents.npy`.

    python benchmarks/synthetic.py FOLDER PAIRS [WIDTH]     (float16, unit norm)

Topics of unequal sizes lie around a few fields; a pair shares its topic and its text, and each side adds noise of its
own. Directions fall in variance, as those of real vectors do. Written in blocks by a process of its own, so that
it does not count in the peak memory of the benchmark.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
from jaxtyping import Float16

WIDTH, TOPIC_PAIRS, FIELDS, BLOCK = 768, 50, 40, 10_000


def vectors(folder: Path, pairs: int, width: int = WIDTH) -> list[Float16[np.ndarray, "n D"]]:
    """Write them with a process of its own; returns queries and documents, mapped to memory."""
    subprocess.run([sys.executable, __file__, str(folder), str(pairs), str(width)], check=True)
    return [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("queries", "documents")]


def write(folder: Path, pairs: int, width: int) -> None:
    """Write both files."""
    random = np.random.default_rng(0)
    spectrum = np.arange(1, width + 1) ** -0.5
    topics = max(1, pairs // TOPIC_PAIRS)
    centers = random.normal(size=(FIELDS, width))[random.integers(FIELDS, size=topics)]
    centers = centers + 0.8 * random.normal(size=centers.shape)
    sizes = random.pareto(1.2, topics) + 0.2
    topic = random.choice(topics, pairs, p=sizes / sizes.sum())
    shift = 0.3 * random.normal(size=(2, width))  # queries differ from documents
    files = [
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, (pairs, width))
        for name in ("queries", "documents")
    ]
    for start in range(0, pairs, BLOCK):
        some = topic[start : start + BLOCK]
        text = centers[some] + 0.7 * random.normal(size=(len(some), width))
        for file, own in zip(files, shift, strict=True):
            rows = (text + own + 0.7 * random.normal(size=text.shape)) * spectrum
            file[start : start + BLOCK] = rows / np.linalg.norm(rows, axis=1, keepdims=True)


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
