"""Exact inner-product search on FAISS; the only user of FAISS in retrieval."""

from collections.abc import Sequence
from typing import NamedTuple

import faiss
import numpy as np
from jaxtyping import Float, Int

QUERY_BLOCK = 4096
DOCUMENT_BLOCK = 262_144  # rows indexed at a time: 0.75 GiB of float32 at width 768


class Hits(NamedTuple):
    """The best documents of each query, best first; equal scores stand in the order of the documents."""

    scores: Float[np.ndarray, "n k"]  # float32
    indices: Int[np.ndarray, "n k"]  # int64, rows of the documents


def search(queries: Float[np.ndarray, "n D"], documents: Float[np.ndarray, "m E"], k: int) -> Hits:
    """The k documents of greatest inner product for each query, exactly (E = D).

    Works through blocks of queries and documents, so memory stays flat and `documents` may be a memory map of any
    float dtype. With k > m all m documents come back: Hits of [n, min(k, m)].

    Raises ValueError for k < 1, vectors of different widths, and vectors that are not finite.
    """
    if k < 1:
        raise ValueError(f"k is the number of documents to return for each query, at least 1; got {k}")
    if queries.shape[1] != documents.shape[1]:
        raise ValueError(
            f"queries have width {queries.shape[1]} and documents {documents.shape[1]}: encode both with one model"
        )
    parts = [
        _search_block(_finite("queries", queries, start, QUERY_BLOCK), documents, k)
        for start in range(0, len(queries), QUERY_BLOCK)
    ]
    if not parts:
        width = min(k, len(documents))
        return Hits(np.zeros((0, width), np.float32), np.zeros((0, width), np.int64))
    return Hits(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def as_run(query_ids: Sequence[str], document_ids: Sequence[str], hits: Hits) -> dict[str, dict[str, float]]:
    """Hits in the form of `pytrec_eval`: {query id: {document id: score}}."""
    if len(query_ids) != len(hits.indices):
        raise ValueError(f"hits of {len(hits.indices)} queries need as many query ids, got {len(query_ids)}")
    return {
        query: {document_ids[i]: float(score) for i, score in zip(indices, scores, strict=True)}
        for query, indices, scores in zip(query_ids, hits.indices, hits.scores, strict=True)
    }


def _search_block(queries: np.ndarray, documents: np.ndarray, k: int) -> Hits:
    """Search all documents for one block of queries, keeping the best k so far."""
    best = Hits(np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64))
    for start in range(0, len(documents), DOCUMENT_BLOCK):
        block = _finite("documents", documents, start, DOCUMENT_BLOCK)
        index = faiss.IndexFlatIP(block.shape[1])
        index.add(block)
        scores, indices = index.search(queries, min(k, len(block)))
        scores = np.concatenate([best.scores, scores], axis=1)
        indices = np.concatenate([best.indices, indices + start], axis=1)
        order = np.lexsort((indices, -scores), axis=1)[:, :k]
        best = Hits(np.take_along_axis(scores, order, axis=1), np.take_along_axis(indices, order, axis=1))
    return best


def _finite(name: str, vectors: np.ndarray, start: int, size: int) -> np.ndarray:
    """One block as contiguous float32; FAISS would rank NaN without a word."""
    block = np.ascontiguousarray(vectors[start : start + size], np.float32)
    broken = np.flatnonzero(~np.isfinite(block).all(axis=1))
    if len(broken):
        raise ValueError(
            f"expected finite vectors, but {len(broken)} of the {name} have NaN or infinity (first: row "
            f"{start + broken[0]}); look at the model or text that this row came from"
        )
    return block
