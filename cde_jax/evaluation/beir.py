"""Rankings of an embedder on retrieval sets, under each kind of context; the sets as token ids.

The source of the context decides what a contextual model's score means, so all kinds are measured: the corpus that is
searched (the paper's setting), the same with whitened vectors, unrelated training documents, and null slots.
"""

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from jaxtyping import Float, Integer

from cde_jax.adapters.whitening import pseudo_queries
from cde_jax.data.files import fingerprint
from cde_jax.data.sources.beir import EvaluationSet
from cde_jax.data.store import Store, StoreWriter
from cde_jax.data.tokens import Tokenizer
from cde_jax.evaluation.metrics import Rankings, Run, ndcg
from cde_jax.interop.modules import TextSettings
from cde_jax.retrieval.embedder import Context, Embedder
from cde_jax.retrieval.encode import Tokens
from cde_jax.retrieval.index import as_run, search

SAME_CORPUS, RANDOM_DOCUMENTS, NO_CONTEXT = "same corpus", "random training documents", "none"
WHITENED = "same corpus, whitened"
KIND = "evaluation"  # of the store of a `TokenSet`


@dataclasses.dataclass(frozen=True)
class TokenSet(EvaluationSet):
    """An evaluation set whose texts are token ids, with prefix and special tokens: ranked without a tokenizer."""

    queries: dict[str, Integer[np.ndarray, "_"]]
    corpus: dict[str, Integer[np.ndarray, "_"]]
    pseudo_queries: Tokens  # of the corpus, by the seed given to `write_tokens`


def rank(
    embedder: Embedder, sets: Sequence[EvaluationSet], other_documents: list[str] | Tokens, seed: int, k: int = 10
) -> Rankings:
    """The k best documents of every query, by set and kind of context; needs no pytrec_eval.

    "same corpus" samples the context from the set's own corpus, "random training documents" from `other_documents`
    (left out if there are none), "none" is null slots (left out if the model has no null embedding). A biencoder reads
    no context and has only "none" of these. "same corpus, whitened" is the first of them with vectors whitened by
    documents and pseudo queries of the corpus.
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
        contexts = {SAME_CORPUS: dataclasses.replace(context, whitening=None)} if embedder.contextual else {}
        if other_context is not None:
            contexts[RANDOM_DOCUMENTS] = other_context
        if embedder.works_without_context:
            contexts[NO_CONTEXT] = None
        runs = rankings[dataset.name] = {}
        for kind, of_kind in contexts.items():
            queries, documents = _encode(embedder, dataset, of_kind)
            runs[kind] = rank_by_vectors(dataset, queries, documents, k)
            if WHITENED not in runs:  # of the first kind only
                vectors = context.whitening.transform_queries(queries), context.whitening.transform_documents(documents)
                runs[WHITENED] = rank_by_vectors(dataset, *vectors, k)
    return rankings


def score(embedder: Embedder, dataset: EvaluationSet, seed: int, k: int = 10) -> float:
    """Mean NDCG@k of one set; a contextual model with context from the set's own corpus."""
    context = embedder.embed_context(list(dataset.corpus.values()), seed) if embedder.contextual else None
    return ndcg(rank_by_vectors(dataset, *_encode(embedder, dataset, context), k), dataset.qrels, k)


def rank_by_vectors(
    dataset: EvaluationSet, queries: Float[np.ndarray, "q D"], documents: Float[np.ndarray, "n D"], k: int
) -> Run:
    """The k documents of greatest inner product for each query."""
    return as_run(list(dataset.queries), list(dataset.corpus), search(queries, documents, k))


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


def write_tokens(
    dataset: EvaluationSet, directory: str | Path, tokenizer: Tokenizer, settings: TextSettings, seed: int
) -> Store:
    """Write the store that `read_tokens` reads: token ids, query and document ids, qrels.

    One of the same set, tokenizer, settings and seed is kept, any other is replaced.
    """
    s, corpus = settings, list(dataset.corpus.values())
    identity = fingerprint([dataclasses.asdict(dataset), dataclasses.asdict(s), tokenizer.fingerprint, seed])
    with suppress(ValueError):  # no store there, or a damaged one
        if (store := Store.open(directory, kind=KIND)).fingerprint == identity:
            return store
    texts = {
        "query": (dataset.queries.values(), s.query_prefix, s.query_length),
        "document": (corpus, s.document_prefix, s.document_length),
        "pseudo_query": (pseudo_queries(corpus, seed), s.query_prefix, s.query_length),
    }
    rows = {name: number for number, name in enumerate(dataset.corpus)}
    qrels = [
        (number, rows[document], grade)
        for number, query in enumerate(dataset.queries)
        for document, grade in dataset.qrels[query].items()
    ]
    with StoreWriter(directory, KIND) as writer:
        for name, (values, prefix, length) in texts.items():
            writer.append_ragged(f"{name}_tokens", tokenizer.encode([prefix + text for text in values], length))
        for name, ids in (("query", dataset.queries), ("document", dataset.corpus)):
            writer.append_ragged(f"{name}_ids", [np.frombuffer(i.encode(), np.uint8) for i in ids])
        writer.append("qrels", np.array(qrels, np.int64))  # [n, 3]: row of the query, row of the document, relevance
        described = {"name": dataset.name, "seed": seed, "tokenizer": tokenizer.fingerprint}
        return writer.finish({"fingerprint": identity} | described)


def read_tokens(directory: str | Path) -> TokenSet:
    """The set that `write_tokens` wrote; digests are verified."""
    store = Store.open(directory, kind=KIND)
    names = ("query_tokens", "document_tokens", "pseudo_query_tokens")
    queries, documents, pseudo = ([r.row(i) for i in range(r.count())] for r in map(store.ragged, names))
    ids = ([r.text(i) for i in range(r.count())] for r in map(store.ragged, ("query_ids", "document_ids")))
    query_ids, document_ids = ids
    qrels: dict[str, dict[str, int]] = {query: {} for query in query_ids}
    for query, document, grade in store.array("qrels").tolist():
        qrels[query_ids[query]][document_ids[document]] = grade
    queries, corpus = dict(zip(query_ids, queries, strict=True)), dict(zip(document_ids, documents, strict=True))
    return TokenSet(store.manifest["name"], queries, corpus, qrels, pseudo)
