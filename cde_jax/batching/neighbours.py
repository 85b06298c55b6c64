"""Nearest neighbours on FAISS: exactly among few points, by inverted lists among many.

More than EXACT_POINTS points are sorted into LISTS·√n lists around the centroids of a k-means, and a query compares
itself with the points of the PROBED lists nearest to it. Distances are exact (float32); a neighbour in another list is
missed. The same arguments give the same answers, on any number of cores.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import faiss
import numpy as np
from jaxtyping import Float, Int32, Int64
from threadpoolctl import ThreadpoolController

NEIGHBOUR_STREAM = 14  # keeps this module's random numbers apart from those of the other users of the same seed
EXACT_POINTS = 2**15
LISTS, PROBED = 4, 16
# Of the k-means of the lists: rows per centroid, iterations. Against 64 and 10 it loses one in 500 of 16 neighbours and
# takes a fifth of the time.
LIST_ROWS, LIST_ITERATIONS = 32, 4
POINT_BYTES = 2**31  # of float32 in one index; more points are searched one index after another
READ_BYTES = 2**24  # of float32 read and searched at once
# Multiply-adds. Below this, threads cost more than they give (several times more on a busy machine).
THREADED_WORK = 10**9


class Neighbours(NamedTuple):
    """The nearest points of each query, best first, equal ones by number."""

    ids: Int64[np.ndarray, "m count"]  # places among the points; −1 where fewer were found
    scores: Float[np.ndarray, "m count"]  # float32: cosine, or squared distance; −∞ or ∞ where fewer were found


def nearest(
    queries: Float[np.ndarray, "m D"],
    points: Float[np.ndarray, "n E"],
    count: int,
    *,
    seed: int,
    cosine: bool = False,
    rows: Int64[np.ndarray, " rows"] | None = None,
) -> Neighbours:
    """The `count` points nearest to each query: of the smallest Euclidean distance, or the greatest cosine (E = D).

    queries, points: of any float type, memory-mapped or not. rows: only these of both; ids are then places in `rows`.
    A zero vector has cosine 0 with all. Takes memory for POINT_BYTES of points and 12 bytes for each query and place.

    Raises ValueError for count < 1, two widths, and vectors that are not finite.
    """
    if count < 1:
        raise ValueError(f"expected at least one neighbour for each query, got count = {count}")
    if queries.shape[1] != points.shape[1]:
        raise ValueError(
            f"expected queries and points of one width, got {queries.shape[1]} and {points.shape[1]}; encode both with "
            "one model"
        )
    m, n = (len(queries), len(points)) if rows is None else (len(rows), len(rows))
    worst = -np.inf if cosine else np.inf
    best = Neighbours(np.full((m, count), -1), np.full((m, count), worst, np.float32))
    width = points.shape[1]
    for start, end in _pieces(n, POINT_BYTES, width):
        with threads().limit(limits=None if (end - start) * m * width > THREADED_WORK else 1):
            index = _index(points, rows, start, end, seed, cosine)
            for at, to in _pieces(m, READ_BYTES, width):
                scores, ids = index.search(_read(queries, rows, slice(at, to), cosine), min(count, end - start))
                scores[ids < 0] = worst
                ids[ids >= 0] += start
                _merge(best, slice(at, to), ids, scores, cosine)
    return best


class Unvisited:
    """Points among which a walk looks for the nearest one where it has not been yet (Euclidean distance)."""

    def __init__(self, points: Float[np.ndarray, "k D"], seed: int):
        """Sorts the points, float32 and finite, into an index; they must not change afterwards."""
        self.points = points
        self.limits = None if len(points) ** 2 * points.shape[1] > THREADED_WORK else 1
        with threads().limit(limits=self.limits):
            self.index = _index(points, None, 0, len(points), seed, cosine=False)
        self.bits = bytearray(b"\xff") * (len(points) // 8 + 1)
        shared = np.frombuffer(self.bits, np.uint8)  # FAISS reads what `visit` writes
        self.selector = faiss.IDSelectorBitmap(shared.size, faiss.swig_ptr(shared))

    def graph(self, count: int) -> Int32[np.ndarray, "k count"]:
        """The `count` points nearest to each, visited or not and mostly itself first; −1 where fewer were found."""
        k, width = self.points.shape
        graph = np.empty((k, count), np.int32)
        with threads().limit(limits=self.limits):
            for start, end in _pieces(k, READ_BYTES, width):
                graph[start:end] = self.index.search(self.points[start:end], count)[1]
        return graph

    def visit(self, point: int) -> None:
        """From now on `nearest` passes over this point."""
        self.bits[point >> 3] &= ~(1 << (point & 7))

    def nearest(self, point: int) -> int:
        """The unvisited point nearest to this one; there must be one."""
        here = self.points[point : point + 1]
        if not isinstance(self.index, faiss.IndexIVF):
            return int(self.index.search(here, 1, params=faiss.SearchParameters(sel=self.selector))[1][0, 0])
        found, probed = -1, PROBED
        while found < 0:  # nothing is left in the lists around: look further
            assert probed < 4 * self.index.nlist, "every point was visited"
            within = faiss.SearchParametersIVF(sel=self.selector, nprobe=min(probed, self.index.nlist))
            found, probed = int(self.index.search(here, 1, params=within)[1][0, 0]), 4 * probed
        return found


@functools.cache
def threads() -> ThreadpoolController:
    """What limits the threads of NumPy and FAISS; kept, because to find them takes longer than a small tour."""
    return ThreadpoolController()


def _pieces(rows: int, size: int, width: int) -> Iterator[tuple[int, int]]:
    """Start and end of pieces of at most `size` bytes of float32 vectors."""
    step = max(1, size // (4 * width))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _read(
    vectors: Float[np.ndarray, "n D"], rows: Int64[np.ndarray, " rows"] | None, part: slice, unit: bool
) -> Float[np.ndarray, "part D"]:
    """Some of the vectors as contiguous float32, each divided by its norm if `unit`."""
    read = np.array(vectors[part] if rows is None else vectors[rows[part]], np.float32, order="C")
    broken = np.flatnonzero(~np.isfinite(read).all(axis=1))
    if len(broken):
        row = part.start + broken[0] if rows is None else rows[part.start + broken[0]]
        raise ValueError(
            f"expected finite vectors, got NaN or infinity in {len(broken)} of those read together (first: row {row}); "
            "compute the vectors again"
        )
    if unit:
        norms = np.sqrt(np.einsum("md,md->m", read, read))
        read /= np.where(norms > 0, norms, 1)[:, None]
    return read


def _index(
    points: Float[np.ndarray, "n D"],
    rows: Int64[np.ndarray, " rows"] | None,
    start: int,
    end: int,
    seed: int,
    cosine: bool,
) -> faiss.Index:
    """An index of the points (of `rows`) from `start` to `end`."""
    n, width = end - start, points.shape[1]
    metric = faiss.METRIC_INNER_PRODUCT if cosine else faiss.METRIC_L2
    index = faiss.IndexFlat(width, metric)
    if n > EXACT_POINTS:
        lists = round(LISTS * n**0.5)
        random = np.random.default_rng([seed, NEIGHBOUR_STREAM, start])
        sample = start + np.sort(random.choice(n, min(n, LIST_ROWS * lists), replace=False))
        kmeans = faiss.Kmeans(
            width,
            lists,
            niter=LIST_ITERATIONS,
            seed=int(random.integers(2**31)),
            spherical=cosine,
            min_points_per_centroid=1,  # FAISS would write a warning to the terminal
            max_points_per_centroid=LIST_ROWS,
        )
        kmeans.train(_read(points, sample if rows is None else rows[sample], slice(0, len(sample)), cosine))
        index.add(kmeans.centroids)
        index = faiss.IndexIVFFlat(index, width, lists, metric)
        index.nprobe = PROBED
    for at, to in _pieces(n, READ_BYTES, width):
        index.add(_read(points, rows, slice(start + at, start + to), cosine))
    return index


def _merge(
    best: Neighbours,
    part: slice,
    ids: Int64[np.ndarray, "part found"],
    scores: Float[np.ndarray, "part found"],
    cosine: bool,
) -> None:
    """Keeps the best of what was found so far and now."""
    count = best.ids.shape[1]
    ids = np.concatenate([best.ids[part], ids], axis=1)
    scores = np.concatenate([best.scores[part], scores], axis=1)
    order = np.lexsort((ids, -scores if cosine else scores), axis=1)[:, :count]
    best.ids[part] = np.take_along_axis(ids, order, axis=1)
    best.scores[part] = np.take_along_axis(scores, order, axis=1)
