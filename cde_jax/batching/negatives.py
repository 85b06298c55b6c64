"""Which documents of a batch count as negatives: false-negative masks (paper, equation 4) and hard negatives.

A batch of B pairs with K hard negatives each has N = B(1+K) document columns: first the B positives (document i is
query i's positive), then the hard negatives query by query (query 0's K, query 1's K, …). f is the surrogate's cosine.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int32, Int64, UInt64

from cde_jax.batching.neighbours import nearest_documents
from cde_jax.data.store import Ragged

REDRAWS = 100  # of a random hard negative that may not be used; after that nearly all texts of the group are equal
UNIT = 2.0**26  # steps of a coordinate in 0…1; a product of two fits float64's 53 bits, so cosines are exact
BLOCK = 512  # documents compared at a time: they fit a processor's cache
MINED_BLOCK = 8192  # queries whose mined documents are selected at a time
MOST_SKIPPED = 32  # documents searched beyond the last rank, because a query's positives have no rank


class TextKeys(NamedTuple):
    """What the data says about n pairs and m ≥ n documents: which texts are equal, positives, hard negatives.

    Equal texts have equal keys. The positives of a query are the documents of all pairs whose query has the same text.
    """

    queries: UInt64[np.ndarray, " n"]
    documents: UInt64[np.ndarray, " m"]
    positive_queries: UInt64[np.ndarray, " p"]  # the different (query, positive), sorted by query, then by document
    positive_documents: UInt64[np.ndarray, " p"]
    listed: Ragged | None  # the data's own hard negatives of each pair, as document numbers

    @classmethod
    def of(
        cls, queries: UInt64[np.ndarray, " n"], documents: UInt64[np.ndarray, " m"], listed: Ragged | None = None
    ) -> "TextKeys":
        """From the texts' keys; documents from number n on are no pair's positive."""
        order = np.lexsort((documents[: len(queries)], queries))
        positives = np.stack([queries[order], documents[order]])  # [2, n]
        different = np.ones(len(order), bool)
        different[1:] = (positives[:, 1:] != positives[:, :-1]).any(axis=0)
        return cls(queries, documents, *positives[:, different], listed)

    def positive_range(self, rows: Int[np.ndarray, " B"]) -> tuple[Int64[np.ndarray, " B"], Int64[np.ndarray, " B"]]:
        """Start and end of the positives of each pair's query."""
        return tuple(np.searchsorted(self.positive_queries, self.queries[rows], side) for side in ("left", "right"))

    def is_positive(self, rows: Int[np.ndarray, " B"], documents: Int[np.ndarray, "rows N"]) -> Bool[np.ndarray, "B N"]:
        """Whether document [i, j] has the text of a positive of pair i's query; documents: B rows, or one for all."""
        (start, end), wanted = self.positive_range(rows), self.documents[documents]
        last = len(self.positive_queries) - 1
        result = (wanted == self.positive_documents[np.minimum(start, last)][:, None]) & (start < end)[:, None]
        several = np.flatnonzero(end - start > 1)
        if len(several):  # a binary search among each one's positives, all at once
            wanted = np.broadcast_to(wanted, result.shape)[several]
            low, high = (np.repeat(bound[several, None], result.shape[1], axis=1) for bound in (start, end))
            while (low < high).any():
                middle = (low + high) // 2
                below, searching = self.positive_documents[np.minimum(middle, last)] < wanted, low < high
                low, high = np.where(searching & below, middle + 1, low), np.where(searching & ~below, middle, high)
            result[several] = (self.positive_documents[np.minimum(low, last)] == wanted) & (low < end[several, None])
        return result

    def most_positives(self) -> int:
        """The largest number of documents that have the text of one query's positives."""
        texts, times = np.unique(self.documents, return_counts=True)
        _, query = np.unique(self.positive_queries, return_inverse=True)
        return int(np.bincount(query, times[np.searchsorted(texts, self.positive_documents)]).max())


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
    batch = len(rows)
    keep = ~keys.is_positive(rows, documents[None, :])
    if margin is not None:
        near = scores >= np.diagonal(scores)[:, None] + margin
        if exempt is not None and exempt.size:
            column = batch + np.arange(exempt.size).reshape(exempt.shape)  # [B, K]
            row = np.broadcast_to(np.arange(batch)[:, None], exempt.shape)  # [B, K]
            near[row[exempt], column[exempt]] = False
        keep &= ~near
    np.fill_diagonal(keep, True)
    return keep


def cosine(queries: Float[np.ndarray, "B D"], documents: Float[np.ndarray, "N D"]) -> Float64[np.ndarray, "B N"]:
    """Cosine of every query with every document, exact for `rounded_unit_rows`: the order of summation has no effect.

    Equal vectors get equal scores at any place in the batch, and no processor or number of threads changes a bit.
    """
    units, scores = rounded_unit_rows(queries), np.empty((len(queries), len(documents)))
    for start in range(0, len(documents), BLOCK):
        block = slice(start, start + BLOCK)
        np.matmul(units, rounded_unit_rows(documents[block]).T, out=scores[:, block])
    return scores


def rounded_unit_rows(vectors: Float[np.ndarray, "m D"]) -> Float64[np.ndarray, "m D"]:
    """Each row divided by its norm, coordinates rounded to 1/`UNIT`; a row of zeros stays zero.

    The rounding changes a cosine by about 1e-8, much less than float16 vectors do.
    """
    rows = vectors.astype(np.float64)
    norms = np.sqrt(np.einsum("md,md->m", rows, rows))
    rows *= (UNIT / np.where(norms > 0, norms, 1))[:, None]
    np.rint(rows, out=rows)
    rows /= UNIT
    return rows


def mine_hard_negatives(
    queries: Float[np.ndarray, "n D"],
    documents: Float[np.ndarray, "m D"],
    rows: Int64[np.ndarray, " rows"],
    keys: TextKeys,
    first: int,
    last: int,
    margin: float,
    seed: int,
) -> Int32[np.ndarray, "rows window"]:
    """For each pair of a group the documents d′ of ranks `first`…`last` with f(q, d′) ≤ f(q, d) − `margin`.

    Documents near the query, but not as near as its own: the very nearest are often positives that nobody marked
    (NV-Retriever, arXiv 2407.15831, "TopK-MarginPos"). rows: the pairs of the group; only their documents are ranked, 1
    the nearest, without those that have the text of a positive of the query. Returns document numbers by rank, −1 where
    the document is too near or no more are found. Ranks are exact where `nearest_documents` is.
    """
    mined = np.full((len(rows), last - first + 1), -1, np.int32)
    group = TextKeys.of(keys.queries[rows], keys.documents[rows])
    count = min(len(rows), last + min(MOST_SKIPPED, group.most_positives()))
    ids, scores = nearest_documents(queries, documents, rows, count, seed)
    for start in range(0, len(rows), MINED_BLOCK):
        block = np.arange(start, min(start + MINED_BLOCK, len(rows)))
        near, f = ids[block], scores[block]  # [block, count]
        ranked = (near >= 0) & ~group.is_positive(block, near)
        rank = np.cumsum(ranked, axis=1)
        q, d = (vectors[rows[block]].astype(np.float32) for vectors in (queries, documents))
        dot, qq, dd = (np.einsum("bd,bd->b", a, b) for a, b in ((q, d), (q, q), (d, d)))
        limit = dot / np.where(qq * dd > 0, np.sqrt(qq * dd), 1) - margin
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
    texts = np.where(chosen < 0, 0, keys.documents[chosen])
    for draw in range(2 * REDRAWS):
        if not len(missing):
            return chosen, given
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
    starts, ends = keys.listed.offsets[rows], keys.listed.offsets[rows + 1]
    sizes = ends - starts
    listed_at = np.repeat(np.arange(len(rows)), sizes)  # the row of the batch of each listed negative
    listed = keys.listed.values[np.repeat(ends - np.cumsum(sizes), sizes) + np.arange(len(listed_at))]
    mined_at, column = np.nonzero(mined >= 0)
    at = np.concatenate([listed_at, mined_at])
    document = np.concatenate([listed, mined[mined_at, column]])
    is_mined = np.arange(len(at)) >= len(listed)
    order = np.lexsort((random.random(len(at)), is_mined, at))
    order = order[~keys.is_positive(rows[at], document[:, None])[order, 0]]
    text = keys.documents[document]
    by_text = order[np.lexsort((text[order], at[order]))]  # stable: of equal texts the first in `order` stays first
    again = np.zeros(len(at), bool)
    again[by_text[1:]] = (text[by_text[1:]] == text[by_text[:-1]]) & (at[by_text[1:]] == at[by_text[:-1]])
    order = order[~again[order]]
    at = at[order]
    rank = np.arange(len(at)) - np.searchsorted(at, at)  # among the candidates of the same row
    first = rank < count
    chosen[at[first], rank[first]] = document[order][first]
    given[at[first], rank[first]] = ~is_mined[order][first]
    return chosen, given
