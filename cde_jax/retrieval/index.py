"""Exact inner-product search in blocks, on the first device of the process."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cde_jax.adapters.inputs import check_integer, check_vectors

QUERY_BLOCK = 1024
DOCUMENT_BLOCK = 65_536  # rows: with QUERY_BLOCK, 256 MiB of float32 scores at a time


class Hits(NamedTuple):
    """The best documents of each query, best first; equal scores are in the order of the documents."""

    scores: Float[np.ndarray, "n k"]  # float32
    indices: Int[np.ndarray, "n k"]  # int64, rows of the documents


def search(queries: Float[np.ndarray, "n D"], documents: Float[np.ndarray, "m E"], k: int) -> Hits:
    """The k documents of greatest inner product for each query, exactly, computed in float32 (E = D).

    Memory is bounded by the block sizes, so `documents` may be a memory map of any float dtype. With k > m all m
    documents are returned. Raises ValueError for k < 1, arrays that are not float matrices of one width, and NaN.
    """
    k = check_integer("k, the number of documents to return for each query", k, 1)
    queries = check_vectors("queries", queries)
    check_vectors("documents", documents, queries.shape[1], slice(0))
    blocks = [queries[i : i + QUERY_BLOCK] for i in range(0, len(queries), QUERY_BLOCK)] or [queries]
    blocks = [jnp.asarray(block, jnp.float32) for block in blocks]
    best = [(np.zeros((len(block), 0), np.float32), np.zeros((len(block), 0), np.int32)) for block in blocks]
    for first in range(0, len(documents), DOCUMENT_BLOCK):
        rows = check_vectors("documents", documents, rows=slice(first, first + DOCUMENT_BLOCK))
        rows = jnp.asarray(rows, jnp.float32)
        best = [_merge(block, rows, first, *so_far, k=k) for block, so_far in zip(blocks, best, strict=True)]
    scores, indices = (np.concatenate(arrays) for arrays in zip(*best, strict=True))
    return Hits(scores, indices.astype(np.int64))


@partial(jax.jit, static_argnames="k")
def _merge(
    queries: Float[Array, "n D"],
    documents: Float[Array, "m D"],
    first: Int[Array, ""] | int,
    scores: Float[Array, "n h"],
    indices: Int[Array, "n h"],
    k: int,
) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
    """The best k of the `h` so far and of a block of documents, whose first row is `first`; ties keep their order."""
    block = jnp.matmul(queries, documents.T, precision=jax.lax.Precision.HIGHEST)  # [n, m]
    block, rows = jax.lax.top_k(block, min(k, documents.shape[0]))
    scores, indices = jnp.concatenate([scores, block], axis=1), jnp.concatenate([indices, first + rows], axis=1)
    scores, order = jax.lax.top_k(scores, min(k, scores.shape[1]))
    return scores, jnp.take_along_axis(indices, order, axis=1)


def as_run(query_ids: Sequence[str], document_ids: Sequence[str], hits: Hits) -> dict[str, dict[str, float]]:
    """Hits in the form of `pytrec_eval`: {query id: {document id: score}}."""
    if len(query_ids) != len(hits.indices):
        raise ValueError(f"hits of {len(hits.indices)} queries need as many query ids, got {len(query_ids)}")
    return {
        query: {document_ids[i]: float(score) for i, score in zip(indices, scores, strict=True)}
        for query, indices, scores in zip(query_ids, hits.indices, hits.scores, strict=True)
    }
