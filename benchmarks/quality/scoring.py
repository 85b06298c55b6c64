"""NDCG@10 of a model on evaluation sets of tokens, under every kind of context that it can read."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from cde_jax.adapters.whitening import SAMPLE_SIZE, whitening
from cde_jax.config import Config
from cde_jax.data.store import Ragged
from cde_jax.models.contextual import Biencoder, ContextualEncoder
from cde_jax.retrieval.encode import full_batch, padded, padded_lengths
from quality.arrays import TokenSet

SAME, OTHER, NONE = "same corpus", "other corpus", "none"
SAME_QUERIES, OTHER_QUERIES = "same, queries", "other, queries"
SAME_BEGINNINGS, OTHER_BEGINNINGS = "same, beginnings", "other, beginnings"
# Keep these draws apart from other random numbers of the same seed.
CONTEXT_STREAM, WHITENING_STREAM = 62, 64
CUTOFF = 10
SCORES_HELD = 1 << 24  # similarities in memory at once

Vectors = tuple[np.ndarray, np.ndarray, np.ndarray]  # unit vectors of queries, of documents, and of their beginnings
PerQuery = dict[str, dict[str, np.ndarray]]  # {set: {kind: NDCG@10 of each query, float64 [q]}}


def score(model: Biencoder | ContextualEncoder, sets: Sequence[TokenSet], config: Config, pad_id: int) -> PerQuery:
    """NDCG@10 of each query by set and kind of context; what never read a context has no "same" and "other corpus".

    "same corpus" samples context from the set's own documents, "other corpus" from those of the set half the list
    away, "none" is null slots. "same, queries" is "same corpus" (of these "none") with vectors whitened by the
    set's own queries and documents, "other, queries" by the other's; "same, beginnings" and "other, beginnings" have
    the beginnings of documents instead of queries.
    """
    graph, state = nnx.split(model)
    contextual = isinstance(model, ContextualEncoder)
    reads = contextual and config.train.sequence_dropout < 1  # at 1 it knows null slots only: a biencoder with a prefix
    found: PerQuery = {}
    encoded: dict[str, Vectors] = {}  # under the first kind of context
    for number, one in enumerate(sets):
        caches: dict[str, Any] = {NONE: _cache(graph, state, None, config, pad_id) if contextual else None}
        if reads:
            other = _other(sets, number)
            caches = {SAME: _cache(graph, state, one, config, pad_id)} | caches
            if other is not one:
                caches[OTHER] = _cache(graph, state, other, config, pad_id)
        found[one.name] = {}
        for kind in (kind for kind in (SAME, OTHER, NONE) if kind in caches):
            run = partial(_embed, graph, state, cache=caches[kind])
            queries = _encode(run, one.queries, config.data.query_length, pad_id)
            documents = _encode(run, one.documents, config.data.document_length, pad_id)
            found[one.name][kind] = _ndcg(one, queries, documents)
            if one.name not in encoded:
                encoded[one.name] = queries, documents, _encode(run, one.beginnings, config.data.query_length, pad_id)
    for number, one in enumerate(sets):
        other = _other(sets, number)
        by = {(SAME_BEGINNINGS, SAME_QUERIES): one}
        if other is not one:
            by[OTHER_BEGINNINGS, OTHER_QUERIES] = other
        for kinds, corpus in by.items():
            scores = _whitened(one, encoded[one.name], encoded[corpus.name], config.seed)
            found[one.name] |= dict(zip(kinds, scores, strict=True))
    return found


def _other(sets: Sequence[TokenSet], number: int) -> TokenSet:
    """The set half the list away; the same one where there is no other."""
    return sets[(number + max(1, len(sets) // 2)) % len(sets)]


def _whitened(one: TokenSet, vectors: Vectors, by: Vectors, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """NDCG@10 of each query, whitened by a corpus' documents and their beginnings, and by its documents and queries."""
    queries, documents, _ = vectors
    of_queries, of_documents, of_beginnings = by
    random = np.random.default_rng([seed, WHITENING_STREAM])
    sample = of_documents[random.permutation(len(of_documents))[:SAMPLE_SIZE]]

    def scores(stand_ins: np.ndarray) -> np.ndarray:
        if not len(stand_ins):
            return _ndcg(one, queries, documents)
        found = whitening(stand_ins, sample)
        return _ndcg(one, found.transform_queries(queries), found.transform_documents(documents))

    by_queries = np.zeros(len(queries))
    for half, rest in halves(len(queries), len(of_queries), seed):
        by_queries[half] = scores(of_queries[rest])[half]
    return scores(of_beginnings), by_queries


def halves(count: int, others: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each half of `count` queries with the other half of `others`: a query has no part in its own whitening."""
    ours, theirs = (np.array_split(np.random.default_rng(seed).permutation(n), 2) for n in (count, others))
    return list(zip(ours, theirs[::-1], strict=True))


def _ndcg(one: TokenSet, queries: np.ndarray, documents: np.ndarray) -> Float[np.ndarray, " q"]:
    return ndcg(queries, documents, one.judged, one.relevant, one.grades)


def ndcg(
    queries: Float[np.ndarray, "q D"],
    documents: Float[np.ndarray, "n D"],
    judged: Int[np.ndarray, " j"],
    relevant: Int[np.ndarray, " j"],
    grades: Int[np.ndarray, " j"],
    k: int = CUTOFF,
) -> Float[np.ndarray, " q"]:
    """NDCG@k of each query by inner product, float64: gains are grades, ties rank the greatest document number first.

    Both as trec_eval has it where document numbers are in the order of ids. Query `judged[i]` has document
    `relevant[i]` with `grades[i]`; grades below 1 gain nothing, and a query without any above has 0.
    """
    k = min(k, len(documents))
    discounts = 1 / np.log2(np.arange(2, k + 2))
    order = np.argsort(judged, kind="stable")
    bounds = np.searchsorted(judged[order], np.arange(len(queries) + 1))
    scores = np.zeros(len(queries))
    block = max(1, SCORES_HELD // len(documents))
    for first in range(0, len(queries), block):
        for row, similar in enumerate(queries[first : first + block] @ documents.T, first):
            mine = order[bounds[row] : bounds[row + 1]]
            gains = dict(zip(relevant[mine].tolist(), np.maximum(grades[mine], 0).tolist(), strict=True))
            best = np.sort(np.fromiter(gains.values(), float, len(gains)))[::-1][:k]
            ideal = best @ discounts[: len(best)]
            if ideal:
                ranked = np.array([gains.get(document, 0) for document in _ranked(similar, k).tolist()])
                scores[row] = ranked @ discounts / ideal
    return scores


def means(found: PerQuery) -> dict[str, dict[str, float]]:
    """The mean over queries by set and kind, rounded."""
    return {name: {kind: round(float(v.mean()), 5) for kind, v in kinds.items()} for name, kinds in found.items()}


def _ranked(scores: Float[np.ndarray, " n"], k: int) -> Int[np.ndarray, " k"]:
    """The k best, best first; of equal ones the greatest number first."""
    threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
    candidates = np.flatnonzero(scores >= threshold)[::-1]
    return candidates[np.argsort(-scores[candidates], kind="stable")[:k]]


def _cache(graph: Any, state: Any, corpus: TokenSet | None, config: Config, pad_id: int) -> Any:
    """What the second stage reads of a sample of the corpus; null slots without one."""
    size, vectors, present = config.model.context_size, None, None
    if corpus is not None:
        rows = _sample(corpus.documents, size, config.seed, CONTEXT_STREAM)
        run = partial(_first_stage, graph, state)
        drawn = _encode(run, corpus.documents, config.data.document_length, pad_id, rows)
        vectors = np.zeros((size, drawn.shape[1]), np.float32)
        vectors[: len(drawn)] = drawn
        present = np.arange(size) < len(drawn)
    return _prepare(graph, state, vectors, present)


def _sample(documents: Ragged, size: int, seed: int, stream: int) -> Int[np.ndarray, " m"]:
    """Rows drawn without replacement, no more than there are."""
    count = documents.count()
    return np.random.default_rng([seed, stream]).choice(count, min(size, count), replace=False)


def _encode(
    run: Any, texts: Ragged, longest: int, pad_id: int, rows: Int[np.ndarray, " m"] | None = None
) -> Float[np.ndarray, "m D"]:
    """The vectors of the rows (None: all), in their order; one compiled shape for each padded length."""
    rows = np.arange(texts.count()) if rows is None else rows
    running = [(places, run(ids, mask)) for places, ids, mask in _batches(texts, rows, longest, pad_id)]
    width = running[0][1].shape[1]
    vectors = np.empty((len(rows), width), np.float32)
    for places, result in running:
        vectors[places] = np.asarray(result)[: len(places)]
    if not np.isfinite(vectors).all():
        raise FloatingPointError("the model gave NaN or infinity: lower the learning rate")
    return vectors


def _batches(texts: Ragged, rows: Int[np.ndarray, " m"], longest: int, pad_id: int) -> Iterator[tuple]:
    """(places among `rows`, ids, mask) of full batches, each of one padded length; a length's last is filled up."""
    sizes = np.minimum(texts.offsets[rows + 1] - texts.offsets[rows], longest)
    lengths = padded_lengths(longest)
    bucket = np.searchsorted(lengths, sizes)
    for number in np.unique(bucket):
        length, places = lengths[number], np.flatnonzero(bucket == number)
        size = full_batch(length, slots=0)
        for start in range(0, len(places), size):
            some = places[start : start + size]
            yield some, *padded([texts.row(row)[:longest] for row in rows[some].tolist()], size, length, pad_id)


@partial(jax.jit, static_argnames="graph")
def _first_stage(graph, state, ids, mask):
    return nnx.merge(graph, state).embed_context(ids, mask)


@partial(jax.jit, static_argnames="graph")
def _prepare(graph, state, vectors, present):
    model = nnx.merge(graph, state)
    return model.prepare_context(vectors, present)


@partial(jax.jit, static_argnames="graph")
def _embed(graph, state, ids, mask, cache):
    """Unit vectors in float32."""
    vectors = nnx.merge(graph, state).embed(ids, mask, cache).astype(jnp.float32)
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
