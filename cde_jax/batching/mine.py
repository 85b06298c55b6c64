"""Hard negatives mined from the surrogate's neighbours: documents near a query, but not as near as its own.

The very nearest are often answers that nobody marked. So a window of ranks is taken and, of it, what is less like the
query than its own document by a margin (NV-Retriever, arXiv 2407.15831, "TopK-MarginPos").
"""

import numpy as np
from jaxtyping import Float, Int64, UInt64

from cde_jax.batching.negatives import Positives, is_positive, positives
from cde_jax.batching.neighbours import nearest

SKIPPED = 32  # most documents of a query that are searched beyond the last rank because its positives have none
BLOCK = 8192  # queries looked at at once


def mine_hard_negatives(
    queries: Float[np.ndarray, "n D"],
    documents: Float[np.ndarray, "m D"],
    rows: Int64[np.ndarray, " rows"],
    *,
    query_keys: UInt64[np.ndarray, " n"] | None = None,
    document_keys: UInt64[np.ndarray, " m"] | None = None,
    first: int,
    last: int,
    margin: float,
    seed: int,
) -> Int64[np.ndarray, "rows window"]:
    """For each pair of a group the documents d′ of ranks `first`…`last` with f(q, d′) ≤ f(q, d) − `margin`.

    queries, documents: vectors of any float type, memory-mapped or not; f is their cosine. rows: the pairs of the
    group; only their documents are ranked, 1 the nearest. The pair's own document has no rank. With the keys of all
    texts, nor has any document of the group whose text answers the same query text or equals such an answer.

    Returns document numbers by rank, −1 where the document is too near or no more are found. The ranks are exact in
    groups of up to `neighbours.EXACT_POINTS` pairs, else nearly so; and equal f may come in any order. Takes memory for
    one index and 12 bytes for each pair and rank. Raises ValueError for a window or margin outside its range, keys of
    one side only, and vectors of two widths or not finite.
    """
    if not 1 <= first <= last:
        raise ValueError(f"expected ranks 1 ≤ first ≤ last, 1 the nearest document; got {first} and {last}")
    if not -2 <= margin <= 2:
        raise ValueError(f"expected a margin in −2…2 (a difference of cosines), got {margin}")
    if (query_keys is None) != (document_keys is None):
        raise ValueError("expected the keys of both queries and documents, or of neither; got those of one side")
    mined = np.full((len(rows), last - first + 1), -1)
    if not len(rows):
        return mined
    own = np.arange(1, len(rows) + 1, dtype=np.uint64)  # without keys each text is another one
    query_keys = own if query_keys is None else query_keys[rows]
    document_keys = own if document_keys is None else document_keys[rows]
    known = positives(query_keys, document_keys)
    count = min(len(rows), last + min(SKIPPED, _most_answers(known, document_keys)))
    ids, scores = nearest(queries, documents, count, seed=seed, cosine=True, rows=rows)
    for start in range(0, len(rows), BLOCK):
        part = slice(start, start + BLOCK)
        found, f = ids[part], scores[part]
        ranked = (found >= 0) & ~is_positive(query_keys[part], document_keys[found], known)
        rank = np.cumsum(ranked, axis=1)
        limit = _pair_cosine(queries[rows[part]], documents[rows[part]]) - margin
        chosen = ranked & (rank >= first) & (rank <= last) & (f <= limit[:, None])
        at, column = np.nonzero(chosen)
        mined[start + at, rank[at, column] - first] = rows[found[at, column]]
    return mined


def _most_answers(known: Positives, document_keys: UInt64[np.ndarray, " rows"]) -> int:
    """The greatest number of documents that answer one query text, or equal an answer."""
    texts, times = np.unique(document_keys, return_counts=True)
    _, query = np.unique(known.queries, return_inverse=True)
    return int(np.bincount(query, times[np.searchsorted(texts, known.documents)]).max())


def _pair_cosine(queries: Float[np.ndarray, "b D"], documents: Float[np.ndarray, "b D"]) -> Float[np.ndarray, " b"]:
    queries, documents = queries.astype(np.float32), documents.astype(np.float32)
    dot, q, d = (np.einsum("bd,bd->b", x, y) for x, y in ((queries, documents), (queries,) * 2, (documents,) * 2))
    return dot / np.where(q * d > 0, np.sqrt(q * d), 1)
