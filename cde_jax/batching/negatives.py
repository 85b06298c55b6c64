"""Which documents of a batch count as negatives: false-negative masks (paper, equation 4) and hard negatives.

A batch of B pairs with K hard negatives each has N = B(1+K) document columns: first the B positives (document i is
query i's positive), then the hard negatives query by query (query 0's K, query 1's K, …). Texts are compared by their
keys (`data.pairs.text_key`); the positives of a query are the documents of all pairs whose query has the same text.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt64

from cde_jax.data.store import Ragged

REDRAWS = 100  # of a filler that may not be used; by then only a group of nearly equal texts has none
UNIT = 2.0**26  # steps of a coordinate in 0…1; a product of two fills float64's 53 bits, so cosines are exact
BLOCK = 512  # documents compared at a time: what is in hand fits a processor's cache


class Positives(NamedTuple):
    """The different (query text, document text) of all pairs, by key: sorted by query, then by document."""

    queries: UInt64[np.ndarray, " p"]
    documents: UInt64[np.ndarray, " p"]


def positives(query_keys: UInt64[np.ndarray, " n"], document_keys: UInt64[np.ndarray, " m"]) -> Positives:
    """The positives of every query text; documents from number n on are no pair's positive. Takes 16 bytes a pair."""
    document_keys = document_keys[: len(query_keys)]
    order = np.lexsort((document_keys, query_keys))
    queries, documents = query_keys[order], document_keys[order]
    again = np.zeros(len(order), bool)
    again[1:] = (queries[1:] == queries[:-1]) & (documents[1:] == documents[:-1])
    return Positives(queries[~again], documents[~again])


def is_positive(
    query_keys: UInt64[np.ndarray, " B"], document_keys: UInt64[np.ndarray, "rows N"], known: Positives
) -> Bool[np.ndarray, "B N"]:
    """Whether document [i, j] has the text of a positive of query i; document_keys has B rows, or one for all."""
    start, end = (np.searchsorted(known.queries, query_keys, side) for side in ("left", "right"))
    last = len(known.queries) - 1
    found = (document_keys == known.documents[np.minimum(start, last)][:, None]) & (start < end)[:, None]
    several = np.flatnonzero(end - start > 1)
    if len(several):  # a binary search in each one's documents, all at once
        wanted = np.broadcast_to(document_keys, found.shape)[several]
        low, high = (np.repeat(at[several, None], found.shape[1], axis=1) for at in (start, end))
        while (low < high).any():
            middle = (low + high) // 2
            below = known.documents[np.minimum(middle, last)] < wanted
            open_ = low < high
            low, high = np.where(open_ & below, middle + 1, low), np.where(open_ & ~below, middle, high)
        found[several] = (known.documents[np.minimum(low, last)] == wanted) & (low < end[several, None])
    return found


def false_negative_mask(
    scores: Float[np.ndarray, "B N"],
    query_keys: UInt64[np.ndarray, " B"],
    document_keys: UInt64[np.ndarray, " N"],
    known: Positives,
    *,
    margin: float | None,
    exempt: Bool[np.ndarray, "B K"] | None = None,
) -> Bool[np.ndarray, "B N"]:
    """True where a column counts as a negative of the row's query, or is its positive.

    Equation 4: S(q, d) = {d′ : f(q, d′) ≥ f(q, d) + ε} is removed, with f = `scores`, as `cosine` gives them, and
    ε = `margin`; `None` removes nothing by f. A column is always removed where its text is that of a positive of the
    row's query, this pair's or another's (`known`). Column i of row i, the positive, is always True.

    `exempt`: hard negatives that equation 4 does not remove from their own query's row, as in the reference: someone
    said that they are negatives, and they are near on purpose. Equal texts are removed there too.
    """
    batch = len(query_keys)
    keep = ~is_positive(query_keys, document_keys[None, :], known)
    if margin is not None:
        near = scores >= np.diagonal(scores)[:, None] + margin
        if exempt is not None and exempt.size:
            column = batch + np.arange(exempt.size).reshape(exempt.shape)  # [B, K]
            row = np.broadcast_to(np.arange(batch)[:, None], exempt.shape)
            near[row[exempt], column[exempt]] = False
        keep &= ~near
    np.fill_diagonal(keep, True)
    return keep


def cosine(queries: Float[np.ndarray, "B D"], documents: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "B N"]:
    """Cosine of every query with every document, float64; a zero vector has cosine 0 with all.

    Exact for the rows of `unit_rows`, in whatever order they are summed: equal vectors get equal scores wherever they
    stand in the batch, and no processor or number of threads changes a bit.
    """
    units, scores = unit_rows(queries), np.empty((len(queries), len(documents)))
    for start in range(0, len(documents), BLOCK):
        block = slice(start, start + BLOCK)
        np.matmul(units, unit_rows(documents[block]).T, out=scores[:, block])
    return scores


def unit_rows(vectors: Float[np.ndarray, "m D"]) -> Float[np.ndarray, "m D"]:
    """Each row divided by its norm, float64, coordinates rounded to 1/`UNIT`; a row of zeros stays zero.

    The rounding moves a cosine by about 1e-8, much less than float16 vectors do.
    """
    rows = vectors.astype(np.float64)
    norms = np.sqrt(np.einsum("md,md->m", rows, rows))
    rows *= (UNIT / np.where(norms > 0, norms, 1))[:, None]
    np.rint(rows, out=rows)
    rows /= UNIT
    return rows


def choose_hard_negatives(
    rows: Int64[np.ndarray, " B"],
    count: int,
    *,
    listed: Ragged,
    mined: Int64[np.ndarray, "B window"],
    pool: Int64[np.ndarray, " pool"],
    query_keys: UInt64[np.ndarray, " n"],
    document_keys: UInt64[np.ndarray, " m"],
    known: Positives,
    random: np.random.Generator,
) -> tuple[Int64[np.ndarray, "B K"], Bool[np.ndarray, "B K"]]:
    """K = `count` hard negatives for each pair of a batch, as document numbers, and which of them the data gave.

    rows: the batch's pairs. They come from `listed`, the data's own, ragged over all pairs; where those are fewer than
    K, from `mined`, candidates of each row (−1: none); then from the documents of `pool`, the pairs of the same group.
    Each time a random choice if there are more than places. Never one with the text of a positive of the row's query;
    no text twice in a row while the pool has others.

    Raises ValueError if the pool has no document that may be used.
    """
    chosen = np.full((len(rows), count), -1, np.int64)
    given = np.zeros(chosen.shape, bool)
    if count == 0:
        return chosen, given
    _place_candidates(chosen, given, rows, listed, mined, query_keys, document_keys, known, random)
    missing = np.argwhere(chosen < 0)  # [missing, 2]: row in the batch, place
    keys = np.where(chosen < 0, 0, document_keys[chosen])
    for draw in range(2 * REDRAWS):
        if not len(missing):
            return chosen, given
        at, place = missing.T
        chosen[at, place] = pool[random.integers(len(pool), size=len(missing))]
        keys[at, place] = document_keys[chosen[at, place]]
        wrong = is_positive(query_keys[rows[at]], keys[at, place][:, None], known)[:, 0]
        if draw < REDRAWS:  # the second half lets a text come twice: there are too few different ones
            wrong |= (keys[at] == keys[at, place][:, None]).sum(axis=1) > 1
        missing = missing[wrong]
    for at, place in missing:  # nearly everything is a positive: look at all of the pool
        usable = pool[~is_positive(query_keys[rows[at : at + 1]], document_keys[None, pool], known)[0]]
        if not len(usable):
            raise ValueError(
                f"expected a document that can be a negative of pair {rows[at]}, but all {len(pool)} of its domain "
                "have the text of a positive of its query; use hard_negatives=0 or more data"
            )
        chosen[at, place] = usable[random.integers(len(usable))]
    return chosen, given


def _place_candidates(
    chosen: Int64[np.ndarray, "B K"],
    given: Bool[np.ndarray, "B K"],
    rows: Int64[np.ndarray, " B"],
    listed: Ragged,
    mined: Int64[np.ndarray, "B window"],
    query_keys: UInt64[np.ndarray, " n"],
    document_keys: UInt64[np.ndarray, " m"],
    known: Positives,
    random: np.random.Generator,
) -> None:
    """Fills `chosen` from the left: the data's own negatives in random order, then mined ones, each text once."""
    starts, ends = listed.offsets[rows], listed.offsets[rows + 1]
    sizes = ends - starts
    own_at = np.repeat(np.arange(len(rows)), sizes)  # the row of the batch that each listed negative belongs to
    own = listed.values[np.repeat(ends - np.cumsum(sizes), sizes) + np.arange(len(own_at))]
    mined_at, column = np.nonzero(mined >= 0)
    at = np.concatenate([own_at, mined_at])
    document = np.concatenate([own, mined[mined_at, column]])
    from_mining = np.arange(len(at)) >= len(own)
    key = document_keys[document]
    wrong = is_positive(query_keys[rows[at]], key[:, None], known)[:, 0]
    order = np.lexsort((random.random(len(at)), from_mining, at))
    order = order[~wrong[order]]
    by_text = order[np.lexsort((key[order], at[order]))]  # stable: of equal texts the first in `order` stays first
    again = np.zeros(len(at), bool)
    again[by_text[1:]] = (key[by_text[1:]] == key[by_text[:-1]]) & (at[by_text[1:]] == at[by_text[:-1]])
    order = order[~again[order]]
    at = at[order]
    rank = np.arange(len(at)) - np.searchsorted(at, at)  # place among the candidates of the same row
    first = rank < chosen.shape[1]
    chosen[at[first], rank[first]] = document[order][first]
    given[at[first], rank[first]] = ~from_mining[order][first]
