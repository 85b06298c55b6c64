"""Which documents of a batch count as negatives: false-negative masks (paper, equation 4) and hard negatives.

A batch of B pairs with K hard negatives each has N = B(1+K) document columns: first the B positives (document i is
query i's positive), then the hard negatives query by query (query 0's K, query 1's K, …). f is the surrogate's cosine.

Nearest neighbours are searched with FAISS: exactly among up to EXACT_POINTS points; more are divided by k-means into
LISTS·√n inverted lists, and a query is compared with the points of the PROBED lists nearest to it, so that a neighbour
in another list is missed. The same arguments give the same results on any number of cores.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int, Int32, Int64, Integer

from cde_jax.config import Batching
from cde_jax.data.store import Ragged, check_finite, unit_rows

REDRAWS = 100  # of a random hard negative that may not be used; after that nearly all texts of the group are equal
UNIT = 2.0**26  # steps of a coordinate in 0…1; a product of two fits float64's 53 bits, so cosines are exact
MINED_BLOCK = 8192  # queries whose mined documents are selected at a time
MOST_SKIPPED = 32  # documents searched beyond the last rank, because a query's positives have no rank

NEIGHBOUR_STREAM = 14  # separates the random numbers of the search from others of the same seed
EXACT_POINTS = 2**15
LISTS, PROBED = 4, 16
# Of the k-means of the lists: rows per centroid, iterations. Compared with 64 and 10 it misses one in 500 of 16
# neighbours and takes a fifth of the time.
LIST_ROWS, LIST_ITERATIONS = 32, 4
INDEX_BYTES = 2**31  # of float32 in one index; more points are searched one index after another
READ_BYTES = 2**24  # of float32 read and searched at a time
THREADED_WORK = 10**9  # multiply-adds below which threads cost more time than they save


class Vectors(NamedTuple):
    """The surrogate's vectors of n queries and m ≥ n documents: of any float dtype, memory-mapped or not."""

    queries: Float[np.ndarray, "n D"]
    documents: Float[np.ndarray, "m D"]


class TextKeys:
    """What the data says about n pairs and m ≥ n documents: which texts are equal, positives, hard negatives.

    The positives of a query are the documents of all pairs whose query has the same text.
    """

    def __init__(
        self, queries: Integer[np.ndarray, " n"], documents: Integer[np.ndarray, " m"], listed: Ragged | None = None
    ):
        """Equal texts have equal keys. listed: the data's own hard negatives of each pair, as document numbers."""
        self.listed = listed
        self.queries = np.unique(queries, return_inverse=True)[1]  # [n], the texts numbered from 0
        self.documents = np.unique(documents, return_inverse=True)[1]  # [m]
        self.count = int(self.documents.max(initial=0)) + 1  # different documents
        self.positives = np.unique(self.queries * self.count + self.documents[: len(queries)])  # (query, document)

    @classmethod
    def numbered(
        cls,
        queries: Int[np.ndarray, " n"],
        documents: Int[np.ndarray, " m"],
        positives: Int[np.ndarray, " p"],
        listed: Ragged,
    ) -> "TextKeys":
        """From the arrays of these names that another one has."""
        self = cls.__new__(cls)
        self.queries, self.documents, self.positives, self.listed = queries, documents, positives, listed
        self.count = int(documents.max(initial=0)) + 1
        return self

    def is_positive(self, rows: Int[np.ndarray, " B"], documents: Int[np.ndarray, "rows N"]) -> Bool[np.ndarray, "B N"]:
        """Whether document [i, j] has the text of a positive of pair i's query; documents: B rows, or one for all."""
        if len(documents) == 1 < len(rows):  # few of the B·N are positives: those are looked up, not all
            return self._positives_among(rows, documents[0])
        wanted = self.queries[rows][:, None] * self.count + self.documents[documents]  # [B, N]
        place = np.searchsorted(self.positives, wanted)
        return self.positives[np.minimum(place, len(self.positives) - 1)] == wanted

    def _positives_among(
        self, rows: Int[np.ndarray, " B"], documents: Int[np.ndarray, " N"]
    ) -> Bool[np.ndarray, "B N"]:
        positive = np.zeros((len(rows), len(documents)), bool)
        queries, texts = self.queries[rows], self.documents[documents]
        order = np.argsort(texts, kind="stable")
        row, index = _ranges(np.searchsorted(self.positives, [queries * self.count, (queries + 1) * self.count]))
        texts_of = self.positives[index] % self.count
        at, place = _ranges(np.stack([np.searchsorted(texts, texts_of, s, sorter=order) for s in ("left", "right")]))
        positive[row[at], order[place]] = True
        return positive

    def positive_texts(self, rows: Int[np.ndarray, " B"]) -> Int64[np.ndarray, " B"]:
        """The number of different texts among the positives of each pair's query."""
        return np.bincount(self.positives // self.count)[self.queries[rows]]

    def most_positives(self) -> int:
        """The largest number of documents that have the text of one query's positives."""
        query, text = np.divmod(self.positives, self.count)
        return int(np.bincount(query, np.bincount(self.documents)[text]).max())


def _ranges(ends: Int64[np.ndarray, "2 n"]) -> tuple[Int64[np.ndarray, " total"], Int64[np.ndarray, " total"]]:
    """The numbers start…stop − 1 of n ranges, one range after another, and before them the range of each."""
    sizes = ends[1] - ends[0]
    of = np.repeat(np.arange(len(sizes)), sizes)
    return of, np.arange(len(of)) + (ends[0] - np.cumsum(sizes) + sizes)[of]


def false_negative_mask(
    scores: Float[np.ndarray, "B N"],
    rows: Int64[np.ndarray, " B"],
    documents: Int64[np.ndarray, " N"],
    keys: TextKeys,
    margin: float | None,
    exempt: Bool[np.ndarray, "B K"] | None = None,
) -> Bool[np.ndarray, "B N"]:
    """True where a column counts as a negative of the row's query, and for its positive, column i of row i.

    Equation 4: S(q, d) = {d′ : f(q, d′) ≥ f(q, d) + ε} is removed, with f = `scores` and ε = `margin`; None removes
    nothing by f. A column with the text of a positive of the row's query, of this pair or another, is always removed.
    exempt: hard negatives that equation 4 does not remove from their own query's row, as in the reference: the data
    says that they are negatives, and they are near on purpose.
    """
    keep = ~keys.is_positive(rows, documents[None, :])
    if margin is not None:
        near = scores >= np.diagonal(scores)[:, None] + margin
        if exempt is not None:
            query, place = np.nonzero(exempt)
            near[query, len(rows) + query * exempt.shape[1] + place] = False
        keep &= ~near
    np.fill_diagonal(keep, True)
    return keep


def cosine(queries: Float[np.ndarray, "B D"], documents: Float[np.ndarray, "N D"]) -> Float64[np.ndarray, "B N"]:
    """Cosine of every query with every document, exact for `rounded_unit_rows`: the order of summation has no effect.

    Equal vectors get equal scores at any place in the batch, and no processor or number of threads changes a bit.
    """
    return rounded_unit_rows(queries) @ rounded_unit_rows(documents).T


def rounded_unit_rows(vectors: Float[np.ndarray, "m D"]) -> Float64[np.ndarray, "m D"]:
    """Each row divided by its norm, coordinates rounded to 1/`UNIT`; a row of zeros stays zero.

    The rounding changes a cosine by about 1e-8, much less than float16 vectors do.
    """
    rows = vectors.astype(np.float64)
    norms = np.sqrt(np.einsum("md,md->m", rows, rows))
    rows *= (UNIT / np.where(norms > 0, norms, 1))[:, None]
    return np.rint(rows, out=rows) / UNIT


def mine_hard_negatives(
    vectors: Vectors, rows: Int64[np.ndarray, " rows"], keys: TextKeys, settings: Batching, seed: int
) -> Int32[np.ndarray, "rows window"]:
    """For each pair of a group the documents d′ of ranks `mine_first`…`mine_last` with f(q, d′) ≤ f(q, d) − margin.

    Documents near the query, but not as near as its own: the very nearest are often positives that nobody marked
    (NV-Retriever, arXiv 2407.15831, "TopK-MarginPos"). Only the documents of `rows`, the group, are ranked, 1 the
    nearest, without those that have the text of a positive of the query. Returns document numbers by rank, −1 where the
    document is too near or no more are found; no columns where nothing is to be mined.
    """
    first, last = settings.mine_first, min(settings.mine_last, len(rows))
    if not (settings.hard_negatives and 0 < first <= last):
        return np.empty((len(rows), 0), np.int32)
    mined = np.full((len(rows), last - first + 1), -1, np.int32)
    group = TextKeys(keys.queries[rows], keys.documents[rows])
    count = min(len(rows), last + min(MOST_SKIPPED, group.most_positives()))
    ids, scores = nearest_documents(vectors, rows, count, seed)
    for start in range(0, len(rows), MINED_BLOCK):
        block = np.arange(start, min(start + MINED_BLOCK, len(rows)))
        near, f = ids[block], scores[block]  # [block, count]
        ranked = (near >= 0) & ~group.is_positive(block, near)
        rank = np.cumsum(ranked, axis=1)
        q, d = (side[rows[block]].astype(np.float32) for side in vectors)
        dot, qq, dd = (np.einsum("bd,bd->b", a, b) for a, b in ((q, d), (q, q), (d, d)))
        limit = dot / np.where(qq * dd > 0, np.sqrt(qq * dd), 1) - settings.mine_margin
        at, column = np.nonzero(ranked & (rank >= first) & (rank <= last) & (f <= limit[:, None]))
        mined[start + at, rank[at, column] - first] = rows[near[at, column]]
    return mined


def choose_hard_negatives(
    rows: Int64[np.ndarray, " B"],
    count: int,
    mined: Int[np.ndarray, "B window"],
    pool: Int64[np.ndarray, " pool"],
    keys: TextKeys,
    random: np.random.Generator,
) -> tuple[Int64[np.ndarray, "B K"], Bool[np.ndarray, "B K"]]:
    """K = `count` hard negatives for each pair of a batch, as document numbers, and which of them the data lists.

    First the data's own (`keys.listed`), then `mined`, candidates of each row (−1: none), then documents of `pool`, the
    pairs of the same group; each time a random choice if there are more than needed. Never one with the text of a
    positive of the row's query; no text twice in a row while the pool has others. Raises ValueError if it has none.
    """
    chosen, given = _choose_candidates(rows, count, mined, keys, random)
    missing = np.argwhere(chosen < 0)  # [missing, 2]: row in the batch, place
    texts = np.where(chosen < 0, -1, keys.documents[chosen])
    for draw in range(2 * REDRAWS):
        if not len(missing):
            break
        at, place = missing.T
        chosen[at, place] = pool[random.integers(len(pool), size=len(missing))]
        texts[at, place] = keys.documents[chosen[at, place]]
        wrong = keys.is_positive(rows[at], chosen[at, place][:, None])[:, 0]
        if draw < REDRAWS:  # the second half lets a text come twice: there are too few different ones
            wrong |= (texts[at] == texts[at, place][:, None]).sum(axis=1) > 1
        missing = missing[wrong]
    for at, place in missing:  # nearly everything is a positive: look at all of the pool
        usable = pool[~keys.is_positive(rows[at : at + 1], pool[None])[0]]
        if not len(usable):
            raise ValueError(
                f"expected a document that can be a negative of pair {rows[at]}, but all {len(pool)} of its domain "
                "have the text of a positive of its query; use hard_negatives=0 or more data"
            )
        chosen[at, place] = usable[random.integers(len(usable))]
    return chosen, given


def _choose_candidates(
    rows: Int64[np.ndarray, " B"],
    count: int,
    mined: Int[np.ndarray, "B window"],
    keys: TextKeys,
    random: np.random.Generator,
) -> tuple[Int64[np.ndarray, "B K"], Bool[np.ndarray, "B K"]]:
    """The data's own negatives in random order, then mined ones, each text once; −1 where there are no more."""
    chosen, given = np.full((len(rows), count), -1, np.int64), np.zeros((len(rows), count), bool)
    listed = [keys.listed.row(row) for row in rows.tolist()]
    mined_at, column = np.nonzero(mined >= 0)
    at = np.concatenate([np.repeat(np.arange(len(rows)), [len(own) for own in listed]), mined_at])  # row in the batch
    document = np.concatenate([*listed, mined[mined_at, column]])
    is_mined = np.arange(len(at)) >= len(at) - len(mined_at)
    order = np.lexsort((random.random(len(at)), is_mined, at))
    order = order[~keys.is_positive(rows[at], document[:, None])[order, 0]]
    _, first = np.unique(at[order] * keys.count + keys.documents[document[order]], return_index=True)  # of equal texts
    order = order[np.sort(first)]
    at = at[order]
    rank = np.arange(len(at)) - np.searchsorted(at, at)  # among the candidates of the same row
    at, rank, order = at[rank < count], rank[rank < count], order[rank < count]
    chosen[at, rank], given[at, rank] = document[order], ~is_mined[order]
    return chosen, given


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
    vectors: Vectors, rows: Int64[np.ndarray, " rows"], count: int, seed: int
) -> tuple[Int64[np.ndarray, "rows count"], Float32[np.ndarray, "rows count"]]:
    """For each query of `rows` the `count` documents of `rows` of greatest cosine, best first, and their cosines.

    Documents are indices into `rows`, −1 with cosine −∞ where fewer were found; equal cosines by index. Memory:
    INDEX_BYTES, and 12 bytes per row and place. ValueError for vectors that are not finite.
    """
    n, width = len(rows), vectors.documents.shape[1]
    best_ids, best = np.full((n, count), -1), np.full((n, count), -np.inf, np.float32)
    for piece in _pieces(n, INDEX_BYTES, width):
        points = rows[piece]
        with threads().limit(limits=None if len(points) * n * width > THREADED_WORK else 1):
            read = functools.partial(_read_unit, vectors.documents, points)
            index = build_index(read, len(points), width, (seed, piece.start), cosine=True)
            for block in _pieces(n, READ_BYTES, width):
                scores, ids = index.search(_read_unit(vectors.queries, rows, block), count)  # [block, count]
                scores[ids < 0] = -np.inf
                ids[ids >= 0] += piece.start
                ids, scores = np.hstack([best_ids[block], ids]), np.hstack([best[block], scores])
                order = np.lexsort((ids, -scores), axis=1)[:, :count]
                best_ids[block] = np.take_along_axis(ids, order, axis=1)
                best[block] = np.take_along_axis(scores, order, axis=1)
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
        # At least one point per centroid: else FAISS prints a warning.
        limits = {"min_points_per_centroid": 1, "max_points_per_centroid": LIST_ROWS, "niter": LIST_ITERATIONS}
        kmeans = faiss.Kmeans(width, lists, seed=int(random.integers(2**31)), spherical=cosine, **limits)
        kmeans.train(read(sample))
        index.add(kmeans.centroids)
        index = faiss.IndexIVFFlat(index, width, lists, metric)
        index.nprobe = PROBED
    for piece in _pieces(n, READ_BYTES, width):
        index.add(read(piece))
    return index


def search_selected(index: Any, point: Float32[np.ndarray, " D"], selected: bytearray) -> int:
    """The point of `index` nearest to `point` among those whose bit is set in `selected`; there must be one."""
    faiss = load_faiss()
    bits = np.frombuffer(selected, np.uint8)
    selector = faiss.IDSelectorBitmap(bits.size, faiss.swig_ptr(bits))
    if not isinstance(index, faiss.IndexIVF):
        return int(index.search(point[None], 1, params=faiss.SearchParameters(sel=selector))[1][0, 0])
    probed = PROBED
    while True:
        parameters = faiss.SearchParametersIVF(sel=selector, nprobe=min(probed, index.nlist))
        nearest = int(index.search(point[None], 1, params=parameters)[1][0, 0])
        if nearest >= 0:
            return nearest
        assert probed < index.nlist, "no point is selected"
        probed *= 4  # none is selected in the lists searched


def _pieces(rows: int, size: int, width: int) -> Iterator[slice]:
    """Slices of at most `size` bytes of float32 vectors."""
    step = max(1, size // (4 * width))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _read_unit(
    vectors: Float[np.ndarray, "n D"], rows: Int64[np.ndarray, " rows"], chosen: slice | Int64[np.ndarray, " m"]
) -> Float32[np.ndarray, "m D"]:
    """The chosen of `rows` of the vectors as contiguous float32 unit rows; ValueError if they are not finite."""
    block = np.array(vectors[rows[chosen]], np.float32, order="C")
    check_finite("vectors", block, rows[chosen])
    return unit_rows(block, np.sqrt(np.einsum("md,md->m", block, block)))
