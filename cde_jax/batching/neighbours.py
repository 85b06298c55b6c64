"""Nearest-neighbour search with FAISS: exact for up to EXACT_POINTS points, by inverted lists for more.

More points are divided into LISTS·√n inverted lists by k-means, and a query is compared with the points of the PROBED
lists nearest to it: distances are exact (float32), a neighbour in another list is missed. The same arguments give the
same results on any number of cores. FAISS is imported when it is first needed.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int64

from cde_jax.data.store import check_finite, unit_rows

NEIGHBOUR_STREAM = 14  # separates this module's random numbers from others of the same seed
EXACT_POINTS = 2**15
LISTS, PROBED = 4, 16
# Of the k-means of the lists: rows per centroid, iterations. Compared with 64 and 10 it misses one in 500 of 16
# neighbours and takes a fifth of the time.
LIST_ROWS, LIST_ITERATIONS = 32, 4
INDEX_BYTES = 2**31  # of float32 in one index; more points are searched one index after another
READ_BYTES = 2**24  # of float32 read and searched at a time
THREADED_WORK = 10**9  # multiply-adds below which threads cost more time than they save


def load_faiss() -> Any:
    """The FAISS module. ImportError with what to install where there is none."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            f"FAISS cannot be imported ({error}), which preparing data needs: pip install 'cde_jax[cpu]', or "
            "'cde_jax[cuda]' on NVIDIA GPUs"
        ) from error
    return faiss


@functools.cache
def threads() -> Any:
    """What limits the threads of NumPy and FAISS. Cached: finding the libraries takes longer than a small tour."""
    from threadpoolctl import ThreadpoolController

    with suppress(ImportError):  # it only knows libraries that are loaded
        load_faiss()
    return ThreadpoolController()


def nearest_documents(
    queries: Float[np.ndarray, "n D"],
    documents: Float[np.ndarray, "m D"],
    rows: Int64[np.ndarray, " rows"],
    count: int,
    seed: int,
) -> tuple[Int64[np.ndarray, "rows count"], Float32[np.ndarray, "rows count"]]:
    """For each query of `rows` the `count` documents of `rows` of greatest cosine, best first, and their cosines.

    Documents are indices into `rows`, −1 with cosine −∞ where fewer were found; equal cosines by index. Vectors may be
    memory-mapped; memory: INDEX_BYTES, and 12 bytes per row and place. ValueError for vectors that are not finite.
    """
    n, width = len(rows), documents.shape[1]
    best_ids, best = np.full((n, count), -1), np.full((n, count), -np.inf, np.float32)
    for first, end in _pieces(n, INDEX_BYTES, width):
        with threads().limit(limits=None if (end - first) * n * width > THREADED_WORK else 1):
            read = functools.partial(_read_unit, documents, rows[first:end])
            index = build_index(read, end - first, width, (seed, first), cosine=True)
            for start, stop in _pieces(n, READ_BYTES, width):
                scores, ids = index.search(_read_unit(queries, rows[start:stop]), count)  # [block, count]
                scores[ids < 0] = -np.inf
                ids[ids >= 0] += first
                ids = np.concatenate([best_ids[start:stop], ids], axis=1)
                scores = np.concatenate([best[start:stop], scores], axis=1)
                order = np.lexsort((ids, -scores), axis=1)[:, :count]
                best_ids[start:stop] = np.take_along_axis(ids, order, axis=1)
                best[start:stop] = np.take_along_axis(scores, order, axis=1)
    return best_ids, best


def build_index(
    read: Callable[[Any], Float32[np.ndarray, "_ D"]], n: int, width: int, seed: tuple[int, ...], *, cosine: bool
) -> Any:
    """A FAISS index of the n points that `read` gives by index, by inner product (`cosine`) or Euclidean distance."""
    faiss = load_faiss()
    metric = faiss.METRIC_INNER_PRODUCT if cosine else faiss.METRIC_L2
    index = faiss.IndexFlat(width, metric)
    if n > EXACT_POINTS:
        lists = round(LISTS * n**0.5)
        random = np.random.default_rng([seed[0], NEIGHBOUR_STREAM, *seed[1:]])
        sample = np.sort(random.choice(n, min(n, LIST_ROWS * lists), replace=False))
        kmeans = faiss.Kmeans(
            width,
            lists,
            niter=LIST_ITERATIONS,
            seed=int(random.integers(2**31)),
            spherical=cosine,
            min_points_per_centroid=1,  # FAISS would print a warning
            max_points_per_centroid=LIST_ROWS,
        )
        kmeans.train(read(sample))
        index.add(kmeans.centroids)
        index = faiss.IndexIVFFlat(index, width, lists, metric)
        index.nprobe = PROBED
    for start, stop in _pieces(n, READ_BYTES, width):
        index.add(read(slice(start, stop)))
    return index


def search_selected(index: Any, point: Float32[np.ndarray, " D"], selected: bytearray) -> int:
    """The point of `index` nearest to `point` among those whose bit is set in `selected`; there must be one."""
    faiss = load_faiss()
    bits = np.frombuffer(selected, np.uint8)
    selector = faiss.IDSelectorBitmap(bits.size, faiss.swig_ptr(bits))
    if not isinstance(index, faiss.IndexIVF):
        return int(index.search(point[None], 1, params=faiss.SearchParameters(sel=selector))[1][0, 0])
    nearest, probed = -1, PROBED
    while nearest < 0:  # none is selected in the lists searched: search more lists
        assert probed < 4 * index.nlist, "no point is selected"
        parameters = faiss.SearchParametersIVF(sel=selector, nprobe=min(probed, index.nlist))
        nearest, probed = int(index.search(point[None], 1, params=parameters)[1][0, 0]), 4 * probed
    return nearest


def _pieces(rows: int, size: int, width: int) -> Iterator[tuple[int, int]]:
    """Start and end of pieces of at most `size` bytes of float32 vectors."""
    step = max(1, size // (4 * width))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _read_unit(
    vectors: Float[np.ndarray, "n D"],
    rows: Int64[np.ndarray, " rows"],
    chosen: slice | Int64[np.ndarray, " m"] = slice(None),
) -> Float32[np.ndarray, "m D"]:
    """The chosen of `rows` of the vectors as contiguous float32 unit rows; ValueError if they are not finite."""
    block = np.array(vectors[rows[chosen]], np.float32, order="C")
    check_finite("vectors", block, rows[chosen])
    return unit_rows(block, np.sqrt(np.einsum("md,md->m", block, block)))
