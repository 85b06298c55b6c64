"""Which documents of a batch count as negatives: false-negative masks (paper, equation 4) and hard negatives.

A batch of B pairs with K hard negatives each has N = B(1+K) document columns: first the B positives (document i is
query i's positive), then the hard negatives query by query (query 0's K, query 1's K, …).
"""

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt64

from cde_jax.data.store import Ragged

NO_QUERY = np.uint64(0)  # the key of "this document has no query of its own"
REDRAWS = 100  # of a filler that may not be used; by then only a group of nearly equal texts has none


def false_negative_mask(
    queries: Float[np.ndarray, "B D"],
    documents: Float[np.ndarray, "N D"],
    query_keys: UInt64[np.ndarray, " B"],
    document_keys: UInt64[np.ndarray, " N"],
    own_query_keys: UInt64[np.ndarray, " N"],
    *,
    margin: float | None,
    exempt: Bool[np.ndarray, "B K"] | None = None,
) -> Bool[np.ndarray, "B N"]:
    """True where a column counts as a negative of the row's query, or is its positive.

    Equation 4: S(q, d) = {d′ : f(q, d′) ≥ f(q, d) + ε} is removed, with f the cosine of the surrogate's vectors and
    ε = `margin`; `None` removes nothing by f. A column is always removed where its text equals the positive's
    (`document_keys`), or where it is the document of a pair whose query text equals this query's (`own_query_keys`,
    NO_QUERY for documents without one). Column i of row i, the positive, is always True.

    `exempt`: hard negatives that equation 4 does not remove from their own query's row, as in the reference: someone
    said that they are negatives, and they are near on purpose. Equal texts are removed there too.
    """
    scores = None if margin is None else cosine(queries, documents)
    return mask_scores(scores, query_keys, document_keys, own_query_keys, margin=margin, exempt=exempt)


def mask_scores(
    scores: Float[np.ndarray, "B N"] | None,
    query_keys: UInt64[np.ndarray, " B"],
    document_keys: UInt64[np.ndarray, " N"],
    own_query_keys: UInt64[np.ndarray, " N"],
    *,
    margin: float | None,
    exempt: Bool[np.ndarray, "B K"] | None = None,
) -> Bool[np.ndarray, "B N"]:
    """`false_negative_mask` from f itself, float32, for those who have it; `None` will do where `margin` is `None`."""
    batch = len(query_keys)
    same_text = document_keys[None, :] == document_keys[:batch, None]  # [B, N]
    same_query = (own_query_keys[None, :] == query_keys[:, None]) & (own_query_keys != NO_QUERY)
    keep = ~(same_text | same_query)
    if margin is not None:
        false_negative = scores >= np.diagonal(scores)[:, None] + np.float32(margin)
        if exempt is not None and exempt.size:
            column = batch + np.arange(exempt.size).reshape(exempt.shape)  # [B, K]
            row = np.broadcast_to(np.arange(batch)[:, None], exempt.shape)
            false_negative[row[exempt], column[exempt]] = False
        keep &= ~false_negative
    np.fill_diagonal(keep, True)
    return keep


def cosine(queries: Float[np.ndarray, "B D"], documents: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "B N"]:
    """Cosine of every query with every document, float32; a zero vector has cosine 0 with all.

    Summed in float64 and then rounded, so that equal vectors get equal scores wherever they stand in the batch.
    """
    return (unit_rows(queries) @ unit_rows(documents).T).astype(np.float32)


def unit_rows(vectors: Float[np.ndarray, "m D"]) -> Float[np.ndarray, "m D"]:
    """Each row divided by its norm, float64; a row of zeros stays zero."""
    vectors = vectors.astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def choose_hard_negatives(
    rows: Int64[np.ndarray, " B"],
    negatives: Ragged,
    count: int,
    *,
    pool: Int64[np.ndarray, " pool"],
    query_keys: UInt64[np.ndarray, " n"],
    document_keys: UInt64[np.ndarray, " documents"],
    random: np.random.Generator,
) -> tuple[Int64[np.ndarray, "B K"], Bool[np.ndarray, "B K"]]:
    """K = `count` hard negatives for each pair of a batch, as document indices, and which of them the data gave.

    rows: the batch's pairs; negatives: the data's own, ragged over all pairs. A pair with more than K gets a random
    choice of them; one with fewer keeps all and is filled up with documents of other pairs of `pool` (the pairs of the
    same group). Never one whose text equals the positive's; a filler's pair never has an equal query either.

    Raises ValueError if the pool has no document that may be used.
    """
    chosen = np.full((len(rows), count), -1, np.int64)
    if count == 0:
        return chosen, np.zeros(chosen.shape, bool)
    _place_given(chosen, rows, negatives, document_keys, random)
    given = chosen >= 0
    missing = np.argwhere(~given)  # [missing, 2]: row in the batch, place
    for _ in range(REDRAWS):
        if not len(missing):
            return chosen, given
        at, place = missing.T
        chosen[at, place] = pool[random.integers(len(pool), size=len(missing))]
        twice = (chosen[at] == chosen[at, place][:, None]).sum(axis=1) > 1
        missing = missing[twice | ~_allowed(rows[at], chosen[at, place], query_keys, document_keys)]
    for at, place in missing:  # too few different documents: the first that may be used, though it comes twice
        usable = pool[_allowed(np.full(len(pool), rows[at]), pool, query_keys, document_keys)]
        if not len(usable):
            raise ValueError(
                f"expected a document that can be a negative of pair {rows[at]}, but all {len(pool)} of its domain "
                "have its positive's text or its query; use hard_negatives=0 or more data"
            )
        chosen[at, place] = usable[0]
    return chosen, given


def _allowed(
    pairs: Int64[np.ndarray, " m"],
    documents: Int64[np.ndarray, " m"],
    query_keys: UInt64[np.ndarray, " n"],
    document_keys: UInt64[np.ndarray, " documents"],
) -> Bool[np.ndarray, " m"]:
    same_text = document_keys[documents] == document_keys[pairs]
    return ~same_text & (query_keys[documents] != query_keys[pairs])


def _place_given(
    chosen: Int64[np.ndarray, "B K"],
    rows: Int64[np.ndarray, " B"],
    negatives: Ragged,
    document_keys: UInt64[np.ndarray, " documents"],
    random: np.random.Generator,
) -> None:
    """Fills `chosen` from the left with at most K of the data's own negatives of each row, in random order."""
    starts, ends = negatives.offsets[rows], negatives.offsets[rows + 1]
    sizes = ends - starts
    at = np.repeat(np.arange(len(rows)), sizes)  # which row of the batch each listed negative belongs to
    listed = negatives.values[np.repeat(ends - np.cumsum(sizes), sizes) + np.arange(len(at))]
    usable = document_keys[listed] != document_keys[rows[at]]
    at, listed = at[usable], listed[usable]
    shuffled = np.lexsort((random.random(len(at)), at))
    at, listed = at[shuffled], listed[shuffled]
    rank = np.arange(len(at)) - np.searchsorted(at, at)  # place among the negatives of the same row
    first = rank < chosen.shape[1]
    chosen[at[first], rank[first]] = listed[first]
