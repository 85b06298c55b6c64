"""The greedy tour on a graph of neighbours: seconds, memory, and length against the exact tour. One JSON line.

    python benchmarks/tour.py --points 10000 [--vectors FILE.npy] [--lists]
    python benchmarks/tour.py --points 1000000

Points are heaps of heaps on the unit sphere with coordinates of falling variance, as reduced text vectors have, or a
random choice of the rows of FILE. Up to EXACT points the exact tour is made beside it. Above, SAMPLED of the steps
are compared with the nearest point that was unvisited then, found among all: how many went there, and how much longer
the steps are. `ratio_to_random` is the length by that of a random order. `--lists` uses inverted lists for few points
too, where a search of all would be as fast.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
from about import about

from cde_jax.batching import neighbours
from cde_jax.batching.tour import NEIGHBOURS, greedy_tour

EXACT = 20_000
SAMPLED = 300
BLOCK = 65_536


def heaps_of_heaps(points: int, width: int, seed: int) -> np.ndarray:
    """Unit vectors, float32: points around 1 centre for 200 of them, which lie around 100 centres."""
    random = np.random.default_rng(seed)
    spread = 1 / np.sqrt(np.arange(1, width + 1, dtype=np.float32))
    noise = lambda rows: random.standard_normal((rows, width), np.float32) * spread  # noqa: E731
    outer = noise(100)
    inner = max(1, points // 200)
    inner = outer[random.integers(100, size=inner)] + 0.7 * noise(inner)
    made = np.empty((points, width), np.float32)
    for start in range(0, points, BLOCK):
        block = made[start : start + BLOCK]
        block[:] = inner[random.integers(len(inner), size=len(block))] + 0.7 * noise(len(block))
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    return made


def tour_length(points: np.ndarray, order: np.ndarray) -> float:
    """Sum of the Euclidean lengths of all steps."""
    pieces = (points[order[start : start + BLOCK + 1]].astype(np.float64) for start in range(0, len(order) - 1, BLOCK))
    return sum(float(np.linalg.norm(np.diff(piece, axis=0), axis=1).sum()) for piece in pieces)


def sampled_steps(points: np.ndarray, order: np.ndarray) -> dict[str, float]:
    """How some of the steps compare with the nearest point unvisited at that moment."""
    steps = np.sort(np.random.default_rng(1).choice(len(order) - 1, min(SAMPLED, len(order) - 1), replace=False))
    made, best = [], []
    for step in steps.tolist():
        here = points[order[step]].astype(np.float64)
        left = order[step + 1 :]
        rough = np.concatenate(
            [((points[left[s : s + BLOCK]] - points[order[step]]) ** 2).sum(axis=1) for s in range(0, len(left), BLOCK)]
        )
        nearest = np.argpartition(rough, min(8, len(rough) - 1))[:8]
        best.append(float(np.linalg.norm(points[left[nearest]] - here, axis=1).min()))
        made.append(float(np.linalg.norm(points[left[0]] - here)))
    made, best = np.array(made), np.array(best)
    return {
        "sampled_steps": len(steps),
        "sampled_share_nearest": round(float((made <= best * (1 + 1e-6)).mean()), 4),
        "sampled_length_ratio": round(float(made.sum() / best.sum()), 4),
    }


def timed_tour(points: np.ndarray, count: int) -> tuple[np.ndarray, float, float]:
    """A tour from point 0; seconds by the clock and of all cores."""
    wall, cpu = time.perf_counter(), time.process_time()
    order = greedy_tour(points, 0, neighbours=count)
    return order, round(time.perf_counter() - wall, 2), round(time.process_time() - cpu, 2)


def main() -> None:
    """Measure one case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--neighbours", type=int, default=NEIGHBOURS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vectors", type=Path)
    parser.add_argument("--lists", action="store_true")
    arguments = parser.parse_args()
    if arguments.vectors:
        points = np.load(arguments.vectors, mmap_mode="r")
        chosen = np.random.default_rng(arguments.seed).permutation(len(points))[: arguments.points]
        points = np.asarray(points[np.sort(chosen)], np.float32)
    else:
        points = heaps_of_heaps(arguments.points, arguments.width, arguments.seed)
    if arguments.lists:
        neighbours.EXACT_POINTS = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    order, seconds, cpu_seconds = timed_tour(points, arguments.neighbours)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert np.array_equal(np.sort(order), np.arange(len(points)))
    length = tour_length(points, order)
    result = {
        "benchmark": "tour",
        "data": arguments.vectors.name if arguments.vectors else "heaps of heaps",
        "points": len(points),
        "width": points.shape[1],
        "neighbours": arguments.neighbours,
        "lists": len(points) > neighbours.EXACT_POINTS,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_gib": round(peak / 2**20, 2),
        "peak_growth_gib": round((peak - before) / 2**20, 2),
        "ratio_to_random": round(length / tour_length(points, np.random.default_rng(1).permutation(len(points))), 4),
    }
    if len(points) <= EXACT:
        exact, exact_seconds, _ = timed_tour(points, len(points))
        result |= {
            "exact_seconds": exact_seconds,
            "ratio_to_exact": round(length / tour_length(points, exact), 5),
            "same_tour": bool(np.array_equal(order, exact)),
        }
    else:
        result |= sampled_steps(points, order)
    print(json.dumps(result | about("faiss-cpu", "numpy")))


if __name__ == "__main__":
    main()
