"""Rankings and NDCG@k of an embedder on retrieval sets, under each kind of context.

The source of the context decides what a contextual model's score means, so all kinds are measured: the corpus that is
searched (the paper's setting), the same with whitened vectors, unrelated training documents, and null slots.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Integer

from cde_jax.adapters.whitening import pseudo_queries
from cde_jax.data.sources.beir import EvaluationSet
from cde_jax.evaluation.metrics import Rankings, Run, Scores, ndcg, score_rankings
from cde_jax.evaluation.tokens import TokenSet
from cde_jax.retrieval.embedder import Context, Embedder
from cde_jax.retrieval.index import as_run, search

SAME_CORPUS, RANDOM_DOCUMENTS, NO_CONTEXT = "same corpus", "random training documents", "none"
WHITENED = "same corpus, whitened"

Documents = Sequence[str] | Sequence[Integer[np.ndarray, "_"]]


def evaluate_embedder(
    embedder: Embedder, sets: Sequence[EvaluationSet], other_documents: Documents, seed: int, k: int = 10
) -> Scores:
    """NDCG@k of every set under every kind of context that the model can take (see `rank`)."""
    rankings = rank(embedder, sets, other_documents, seed, k)
    return score_rankings(rankings, {dataset.name: dataset.qrels for dataset in sets}, k)


def rank(
    embedder: Embedder, sets: Sequence[EvaluationSet], other_documents: Documents, seed: int, k: int = 10
) -> Rankings:
    """The k best documents of every query, by set and kind of context; needs no pytrec_eval.

    "same corpus" samples the context from the set's own corpus, "random training documents" from
    `other_documents` (left out if there are none), "none" is null slots (left out if the model has no null
    embedding). A biencoder reads no context and has only "none" of these. "same corpus, whitened" is the
    first of them with vectors whitened by documents and pseudo queries of the corpus.
    """
    check_names(sets)
    other_context = None
    if embedder.contextual and len(other_documents):
        other_context = embedder.embed_context(other_documents, seed)  # one sample for all sets
    rankings: Rankings = {}
    for dataset in sets:
        corpus = list(dataset.corpus.values())
        pseudo = dataset.pseudo_queries if isinstance(dataset, TokenSet) else pseudo_queries(corpus, seed)
        context = embedder.embed_context(corpus, seed, queries=pseudo)
        contexts: dict[str, Context | None] = {}
        if embedder.contextual:
            contexts[SAME_CORPUS] = dataclasses.replace(context, whitening=None)
        if other_context is not None:
            contexts[RANDOM_DOCUMENTS] = other_context
        if embedder.works_without_context:
            contexts[NO_CONTEXT] = None
        runs = rankings[dataset.name] = {}
        for kind, of_kind in contexts.items():
            queries, documents = _encode(embedder, dataset, of_kind)
            runs[kind] = _run(dataset, queries, documents, k)
            if WHITENED not in runs:  # of the first kind only
                w = context.whitening
                runs[WHITENED] = _run(dataset, w.transform_queries(queries), w.transform_documents(documents), k)
    return rankings


def score(embedder: Embedder, dataset: EvaluationSet, seed: int, k: int = 10) -> float:
    """Mean NDCG@k of one set; a contextual model with context from the set's own corpus."""
    context = embedder.embed_context(list(dataset.corpus.values()), seed) if embedder.contextual else None
    return ndcg(_run(dataset, *_encode(embedder, dataset, context), k), dataset.qrels, k)


def check_names(sets: Sequence[EvaluationSet]) -> None:
    """ValueError for two sets of one name: results are keyed by name."""
    names = [dataset.name for dataset in sets]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"evaluation sets need different names, these come more than once: {', '.join(repeated)}")


def _encode(
    embedder: Embedder, dataset: EvaluationSet, context: Context | None
) -> tuple[Float[np.ndarray, "q D"], Float[np.ndarray, "n D"]]:
    queries = embedder.encode_queries(dataset.queries.values(), context)
    return queries, embedder.encode_documents(dataset.corpus.values(), context)


def _run(dataset: EvaluationSet, queries: Float[np.ndarray, "q D"], documents: Float[np.ndarray, "n D"], k: int) -> Run:
    return as_run(list(dataset.queries), list(dataset.corpus), search(queries, documents, k))
