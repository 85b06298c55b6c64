"""A greedy tour through points: always on to the nearest one not visited yet."""

import numpy as np
from jaxtyping import Float, Int64

from cde_jax.batching.neighbours import Unvisited, threads

EXACT_TOUR = 2**14  # points up to which the tour is exact unless told otherwise
NEIGHBOURS = 16  # of each point in the graph of larger tours
BLOCK = 65_536  # rows looked at at once


def greedy_tour(
    centroids: Float[np.ndarray, "k D"], start: int, *, neighbours: int | None = None
) -> Int64[np.ndarray, " k"]:
    """From `start`, always on to the nearest centroid not visited yet (Euclidean), ties to the lowest index.

    Exact for up to EXACT_TOUR centroids, or with `neighbours` ≥ k − 1: O(k² D) time and O(k D) memory. With more, it
    goes to the nearest unvisited one of its `neighbours` (NEIGHBOURS by default) nearest, and where none of them is
    left, it searches all: within 1 % of the exact length wherever benchmarks/tour.py has compared them. The same
    arguments give the same tour.

    Raises ValueError for a start outside 0…k−1, neighbours < 1, or a centroid that is not finite.
    """
    k = len(centroids)
    if not 0 <= start < k:
        raise ValueError(f"expected a start in 0…{k - 1} for {k} centroids, got {start}")
    if neighbours is not None and neighbours < 1:
        raise ValueError(f"expected at least one neighbour of each centroid, got neighbours = {neighbours}")
    if not all(np.isfinite(centroids[at : at + BLOCK]).all() for at in range(0, k, BLOCK)):
        raise ValueError("expected finite centroids, got NaN or infinity; compute the clusters again")
    if k <= EXACT_TOUR if neighbours is None else k - 1 <= neighbours:
        return _exact_tour(centroids, start)
    return _graph_tour(centroids, start, NEIGHBOURS if neighbours is None else neighbours)


def _exact_tour(centroids: Float[np.ndarray, "k D"], start: int) -> Int64[np.ndarray, " k"]:
    """The tour by exact differences in float64 (an expanded square rounds equal distances apart).

    They are computed only for those points that could be the nearest by a float32 estimate and its greatest error.
    """
    points = centroids.astype(np.float64)
    k, width = points.shape
    middle = points - points.mean(axis=0)
    scale = np.sqrt(np.einsum("kd,kd->k", middle, middle).max()) or 1.0
    rough = (middle / scale).astype(np.float32)  # in the unit ball
    squares = np.einsum("kd,kd->k", rough, rough)
    # Of |b|² − 2ab: two sums of `width` products, each rounded by 2⁻²⁴ of at most 1, and of the coordinates. Twice,
    # for the one that is the nearest and for the one that seems to be.
    slack = np.float32(2 * 4 * (width + 8) * 2.0**-24)
    order = np.empty(k, np.int64)
    order[0] = here = start
    index = np.arange(k)  # of the points still held; visited ones are dropped once they are half of them
    with threads().limit(limits=1):  # a product with one vector waits for memory, not for cores
        for step in range(1, k):
            squares[here] = np.inf
            current, current_rough = points[here], rough[here]
            if 2 * (k - step) < len(index):
                held = np.isfinite(squares)
                points, rough, squares, index = points[held], rough[held], squares[held], index[held]
            estimate = squares - 2 * (rough @ current_rough)
            near = np.flatnonzero(estimate <= estimate.min() + slack)
            difference = points[near] - current
            here = int(near[np.einsum("kd,kd->k", difference, difference).argmin()])  # the first of equals
            order[step] = index[here]
    return order


def _graph_tour(centroids: Float[np.ndarray, "k D"], start: int, neighbours: int) -> Int64[np.ndarray, " k"]:
    points = np.ascontiguousarray(centroids, np.float32)
    unvisited = Unvisited(points, seed=0)
    graph = unvisited.graph(1 + neighbours)  # one more, because most find themselves
    is_open = bytearray(b"\1") * len(points)
    order = np.empty(len(points), np.int64)
    order[0] = here = start
    with threads().limit(limits=1):
        for step in range(1, len(points)):
            is_open[here] = False
            unvisited.visit(here)
            for there in graph[here].tolist():
                if there >= 0 and is_open[there]:
                    here = there
                    break
            else:
                here = unvisited.nearest(here)
            order[step] = here
    return order
