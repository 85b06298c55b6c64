"""Which context documents moved a query's ranking, and a test whether the answer is better than chance.

The margin of a document over another for a query is q̂ · (d̂ − d̂′), all three vectors under the same context. Its
gradient with respect to the context vectors is one vector–Jacobian product through `prepare_context` and `embed`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cde_jax.evaluation.compare import bootstrap
from cde_jax.retrieval.embedder import Context, Embedder, sample_rows
from cde_jax.retrieval.encode import padded

STREAM = 72  # random stream id
DRAWS = 8  # random sets of documents that are deleted beside those of largest effect
LITTLE = 0.02  # of the size of the margins: what moves them by less hardly matters

Triple = tuple[str, str, str | None]  # a query, a document, another document


class Deletion(NamedTuple):
    """How far margins fall where context documents are deleted: those of largest effect, or random ones."""

    counts: list[int]  # deleted documents
    attributed: Float[np.ndarray, "n C"]  # of each query and count
    random: Float[np.ndarray, "n C"]  # mean over `DRAWS` sets of documents
    none: float  # change of the margins without context documents, relative to the margins (root mean squares)
    same: float  # … with the mean of the context in place of each: what there is to attribute to single documents
    gain: tuple[float, float, float]  # attributed − random, mean over queries and counts, with its 95 % interval

    @property
    def verdict(self) -> str:
        """Whether there is anything to attribute, and whether the attribution finds it."""
        moved = f"margins change by {self.none:.2%} without context documents, {self.same:.2%} with their mean for each"
        if self.same < LITTLE:
            return f"which documents fill the slots hardly matters to this model ({moved}): attributions say nothing"
        gain, low, high = self.gain
        better = "better than chance" if low > 0 else "not better than chance"
        return f"attribution is {better} ({moved}; gain over random deletion {gain:.4f}, {low:.4f} to {high:.4f})"


def context_rows(embedder: Embedder, context: Context) -> Int[np.ndarray, " m"]:
    """The rows of the corpus that `embed_context` made a context from, in the order of `effects`."""
    return sample_rows(context.corpus_size, embedder.context_size, [context.seed])


def effects(
    embedder: Embedder, context: Context, query: str, document: str, other: str | None = None
) -> Float[np.ndarray, " m"]:
    """How much each context document raises the margin of `document` over `other`; without `other`, its score.

    To first order, compared with the mean c̄ of the context: ∂margin/∂c · (c − c̄), so that effects sum to 0. (From the
    null embedding the way is too long: (c − c₀) predicted no single deletion, rank correlation 0.06 against 0.76.)
    Where slots hardly matter this is noise; `deletion_test` tells.

    Raises ValueError for a biencoder, an adapter, and a context with whitening or a lexical part.
    """
    slots, m = _slots(embedder, context)[0], len(context.vectors)
    gradient = _gradient(*nnx.split(embedder.model), *_tokens(embedder, query, document, other), slots)
    by_slot = (np.asarray(gradient)[:m] * (context.vectors - context.vectors.mean(axis=0))).sum(axis=1)
    return by_slot.reshape(-1, embedder.config.first_stage.vectors_per_text).sum(axis=1)


def deletion_test(embedder: Embedder, context: Context, triples: Sequence[Triple], seed: int = 0) -> Deletion:
    """Delete 1, 2, 4 … context documents of largest effect, and as many random ones; triples as in `effects`.

    A deleted document leaves a null slot, as a missing one does; for weights without, the mean of the context.
    """
    vectors, null = _slots(embedder, context)
    if not triples:
        raise ValueError("expected queries, each with a relevant document and another one, got none")
    random, pieces = np.random.default_rng([seed, STREAM]), embedder.config.first_stage.vectors_per_text
    m = len(context.vectors) // pieces
    counts = [1 << power for power in range(m.bit_length()) if 1 << power < m] or [1]
    by_chance = [random.permutation(m) < count for count in counts for _ in range(DRAWS)]
    model, margins, mean = nnx.split(embedder.model), [], context.vectors.mean(axis=0)
    average = np.where(np.arange(len(vectors))[:, None] < len(context.vectors), mean, vectors)
    for triple in triples:
        rank = np.argsort(np.argsort(-effects(embedder, context, *triple)))
        deleted = np.stack([rank < 0, rank < m, *(rank < count for count in counts), *by_chance])
        deleted = np.repeat(deleted, pieces, axis=1)
        deleted = np.pad(deleted, ((0, 0), (0, len(vectors) - deleted.shape[1])))
        contexts = np.where(deleted[..., None], null, vectors)
        margins.append(_margins(*model, *_tokens(embedder, *triple), np.stack([average, *contexts])))
    same, whole, none, *_ = margins = np.asarray(margins, np.float64).T  # [3 + C + C · DRAWS, n]
    falls = (whole - margins[3:]).T  # [n, C + C · DRAWS]
    attributed = falls[:, : len(counts)]
    chance = falls[:, len(counts) :].reshape(len(triples), len(counts), DRAWS).mean(axis=2)
    size = max(np.square(whole).mean(), 1e-12)
    changes = [float(np.sqrt(np.square(whole - other).mean() / size)) for other in (none, same)]
    return Deletion(counts, attributed, chance, *changes, bootstrap([(attributed - chance).mean(axis=1)[None]]))


def _slots(embedder: Embedder, context: Context) -> tuple[Float[np.ndarray, "P D"], Float[np.ndarray, " D"]]:
    """The context as the embedder pads it, and what a deleted document leaves."""
    if not embedder.contextual:
        raise ValueError("a biencoder reads no context: attribution needs a contextual model")
    if any(part is not None for part in (context.whitening, context.hybrid, embedder.adapter)):
        raise ValueError("attribution reads plain vectors: no adapter, the context without queries and statistics")
    null = np.asarray(embedder.model.null[...]) if embedder.works_without_context else context.vectors.mean(axis=0)
    missing = max(0, embedder.config.slots - len(context.vectors))
    return np.concatenate([context.vectors, np.tile(null, (missing, 1))]), null


def _tokens(
    embedder: Embedder, query: str, document: str, other: str | None
) -> tuple[Int[np.ndarray, "t L"], Bool[np.ndarray, "t L"]]:
    """Ids and mask of the query and one or two documents."""
    s, encode = embedder.settings, embedder.tokenizer.encode
    rows = encode([s.query_prefix + query], s.query_length)
    rows += encode([s.document_prefix + text for text in (document, other) if text is not None], s.document_length)
    return padded(rows, len(rows), max(s.query_length, s.document_length), embedder.tokenizer.pad_id)


def _margin(graph: Any, state: Any, ids: Array, mask: Array, vectors: Float[Array, "P D"]) -> Float[Array, ""]:
    model = nnx.merge(graph, state)
    texts = model.embed(ids, mask, model.prepare_context(vectors))  # [t, D]
    query, document, *other = texts / jnp.linalg.norm(texts, axis=-1, keepdims=True)
    return query @ (document - other[0] if other else document)


_gradient = jax.jit(jax.grad(_margin, argnums=4), static_argnums=0)


@partial(jax.jit, static_argnums=0)
def _margins(graph: Any, state: Any, ids: Array, mask: Array, contexts: Float[Array, "M P D"]) -> Float[Array, " M"]:
    return jax.lax.map(partial(_margin, graph, state, ids, mask), contexts)
