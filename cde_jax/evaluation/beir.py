"""Rankings of an embedder on retrieval sets, under each kind of context; the sets as token ids.

The source of the context decides what a contextual model's score means, so all kinds are measured: the corpus that is
searched (the paper's setting), the same with whitened vectors and with a lexical part under the corpus' statistics,
unrelated training documents, and null slots.
"""

import dataclasses
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from cde_jax.adapters.statistics import CorpusStatistics
from cde_jax.adapters.whitening import pseudo_queries
from cde_jax.data.files import fingerprint
from cde_jax.data.sources.beir import EvaluationSet
from cde_jax.data.store import Store, StoreWriter
from cde_jax.data.tokens import Tokenizer
from cde_jax.evaluation.metrics import Rankings, Run
from cde_jax.interop.modules import TextSettings
from cde_jax.retrieval.embedder import Context, Embedder, Texts
from cde_jax.retrieval.encode import Tokens
from cde_jax.retrieval.index import as_run, search

log = logging.getLogger(__name__)

SAME_CORPUS, RANDOM_DOCUMENTS, NO_CONTEXT = "same corpus", "random training documents", "none"
WHITENED, STATISTICS = "same corpus, whitened", "same corpus, statistics"
ALL_KINDS = SAME_CORPUS, WHITENED, STATISTICS, RANDOM_DOCUMENTS, NO_CONTEXT
KIND = "evaluation"  # of the store of a `TokenSet`


@dataclasses.dataclass(frozen=True)
class TokenSet(EvaluationSet):
    """An evaluation set whose texts are token ids, with prefix and special tokens: ranked without a tokenizer."""

    queries: dict[str, Integer[np.ndarray, "_"]]
    corpus: dict[str, Integer[np.ndarray, "_"]]
    pseudo_queries: Tokens  # of the corpus, by the seed given to `write_tokens`
    texts: EvaluationSet  # the set as texts, whose words the lexical part reads


def rank(
    embedder: Embedder,
    sets: Sequence[EvaluationSet],
    other_documents: list[str] | Tokens,
    seed: int,
    k: int = 10,
    kinds: Collection[str] = ALL_KINDS,
    candidates: Mapping[str, Run] | None = None,
) -> Rankings:
    """The k best documents of every query, by set and kind of context; needs no pytrec_eval.

    "same corpus" samples the context from the set's own corpus, "random training documents" from `other_documents`
    (left out if there are none), "none" is null slots (left out if the model has no null embedding). A biencoder reads
    no context and has only "none" of these. "same corpus, whitened" is the first of them with vectors whitened by
    documents and pseudo queries of the corpus; "same corpus, statistics" has a lexical part beside these vectors
    (`HybridVectors`; left out where scikit-learn is missing). `kinds` are those wanted. With `candidates`, {set: run},
    the documents of a query's run alone are ranked.
    """
    check_names(sets)
    if STATISTICS in kinds and not find_spec("sklearn"):
        log.warning("scikit-learn is not installed: %r is left out", STATISTICS)
        kinds = set(kinds) - {STATISTICS}
    other_context = None
    if embedder.contextual and len(other_documents) and RANDOM_DOCUMENTS in kinds:
        other_context = embedder.embed_context(other_documents, seed)  # one sample for all sets
    rankings: Rankings = {}
    for dataset in sets:
        encoded = vectors_by_kind(embedder, dataset, kinds, seed, other_context)
        rankings[dataset.name] = {
            kind: rank_by_vectors(dataset, *vectors, k)
            if candidates is None
            else rank_candidates(dataset, *vectors, k, candidates[dataset.name])
            for kind, *vectors in encoded
        }
    return rankings


def vectors_by_kind(
    embedder: Embedder, dataset: EvaluationSet, kinds: Collection[str], seed: int, other_context: Context | None = None
) -> Iterator[tuple[str, Float[np.ndarray, "q D"], Float[np.ndarray, "n D"]]]:
    """(kind, query vectors, document vectors) of the kinds of context that are wanted and possible.

    Queries and documents are encoded once for all kinds with the context of their own corpus.
    """
    own, adapted = SAME_CORPUS if embedder.contextual else NO_CONTEXT, {WHITENED, STATISTICS} & set(kinds)
    queries, corpus = list(dataset.queries.values()), list(dataset.corpus.values())
    in_tokens = isinstance(dataset, TokenSet)
    as_texts = dataset.texts if in_tokens else dataset
    query_texts, texts = list(as_texts.queries.values()), list(as_texts.corpus.values())
    if own in kinds or adapted:
        context = plain = pseudo = statistics = None
        if adapted:
            pseudo = dataset.pseudo_queries if in_tokens else pseudo_queries(texts, seed)
        if STATISTICS in kinds:
            statistics = CorpusStatistics.fit(texts)
        if embedder.contextual or adapted:
            context = embedder.embed_context(corpus, seed, pseudo, statistics, texts)
            plain = dataclasses.replace(context, whitening=None, hybrid=None)
        vectors = _encode(embedder, queries, corpus, plain)
        if own in kinds:
            yield own, *vectors
        if adapted:
            w, h = context.whitening, context.hybrid
            vectors = w.transform_queries(vectors[0]), w.transform_documents(vectors[1])
            if WHITENED in kinds:
                yield WHITENED, *vectors
            if STATISTICS in kinds:
                yield STATISTICS, h.transform_queries(vectors[0], query_texts), h.transform_documents(vectors[1], texts)
    if other_context is not None and RANDOM_DOCUMENTS in kinds:
        yield RANDOM_DOCUMENTS, *_encode(embedder, queries, corpus, other_context)
    if NO_CONTEXT in kinds and embedder.contextual and embedder.works_without_context:
        yield NO_CONTEXT, *_encode(embedder, queries, corpus, None)


def encode_set(
    embedder: Embedder, dataset: EvaluationSet, seed: int
) -> tuple[Float[np.ndarray, "q D"], Float[np.ndarray, "n D"]]:
    """Vectors of a set's queries and documents; a contextual model with context from the set's own corpus."""
    context = embedder.embed_context(list(dataset.corpus.values()), seed) if embedder.contextual else None
    return _encode(embedder, list(dataset.queries.values()), list(dataset.corpus.values()), context)


def rank_by_vectors(
    dataset: EvaluationSet, queries: Float[np.ndarray, "q D"], documents: Float[np.ndarray, "n D"], k: int
) -> Run:
    """The k documents of greatest inner product for each query."""
    return as_run(list(dataset.queries), list(dataset.corpus), search(queries, documents, k))


def rank_candidates(
    dataset: EvaluationSet,
    queries: Float[np.ndarray, "q D"],
    documents: Float[np.ndarray, "n D"],
    k: int,
    candidates: Run,
) -> Run:
    """The k best of each query's candidates, by inner product."""
    rows, run = {document: row for row, document in enumerate(dataset.corpus)}, {}
    for query, vector in zip(dataset.queries, queries, strict=True):
        names = list(candidates.get(query, ()))
        scores = documents[[rows[name] for name in names]] @ vector if names else np.zeros(0)
        run[query] = {names[i]: float(scores[i]) for i in np.argsort(-scores, kind="stable")[:k]}
    return run


def filled(embedder: Embedder, corpus: Sequence[str]) -> list[str]:
    """The corpus, repeated where weights without null embedding need more context documents than it has."""
    missing = 0 if embedder.works_without_context else embedder.context_size - len(corpus)
    if missing > 0:
        log.warning("%d texts for a context of %d: they are repeated", len(corpus), embedder.context_size)
    return list(islice(cycle(corpus), len(corpus) + max(missing, 0)))


def check_names(sets: Sequence[EvaluationSet]) -> None:
    """ValueError for two sets of one name: results are keyed by name."""
    names = [dataset.name for dataset in sets]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"evaluation sets need different names, these come more than once: {', '.join(repeated)}")


def _encode(
    embedder: Embedder, queries: Texts, corpus: Texts, context: Context | None
) -> tuple[Float[np.ndarray, "q D"], Float[np.ndarray, "n D"]]:
    return embedder.encode_queries(queries, context), embedder.encode_documents(corpus, context)


def write_tokens(
    dataset: EvaluationSet, directory: str | Path, tokenizer: Tokenizer, settings: TextSettings, seed: int
) -> Store:
    """Write the store that `read_tokens` reads: token ids, query and document ids, qrels.

    One of the same set, tokenizer, settings and seed is kept, any other is replaced.
    """
    s, corpus = settings, list(dataset.corpus.values())
    contents = "tokens and texts"  # of the store; another one is replaced
    identity = fingerprint([dataclasses.asdict(dataset), dataclasses.asdict(s), tokenizer.fingerprint, seed, contents])
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
        for name, of_texts in (("query", dataset.queries), ("document", dataset.corpus)):
            writer.append_ragged(f"{name}_ids", [np.frombuffer(i.encode(), np.uint8) for i in of_texts])
            values = [np.frombuffer(text.encode(), np.uint8) for text in of_texts.values()]
            writer.append_ragged(f"{name}_texts", values)
        writer.append("qrels", np.array(qrels, np.int64))  # [n, 3]: row of the query, row of the document, relevance
        described = {"name": dataset.name, "seed": seed, "tokenizer": tokenizer.fingerprint}
        return writer.finish({"fingerprint": identity} | described)


def read_tokens(directory: str | Path) -> TokenSet:
    """The set that `write_tokens` wrote; digests are verified."""
    store = Store.open(directory, kind=KIND)
    names = ("query_tokens", "document_tokens", "pseudo_query_tokens")
    queries, documents, pseudo = ([r.row(i) for i in range(r.count())] for r in map(store.ragged, names))
    names = ("query_ids", "document_ids", "query_texts", "document_texts")
    texts = ([r.text(i) for i in range(r.count())] for r in map(store.ragged, names))
    query_ids, document_ids, query_texts, document_texts = texts
    qrels: dict[str, dict[str, int]] = {query: {} for query in query_ids}
    for query, document, grade in store.array("qrels").tolist():
        qrels[query_ids[query]][document_ids[document]] = grade

    def by_id(of_queries: list[Any], of_documents: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return dict(zip(query_ids, of_queries, strict=True)), dict(zip(document_ids, of_documents, strict=True))

    name = store.manifest["name"]
    as_texts = EvaluationSet(name, *by_id(query_texts, document_texts), qrels)
    return TokenSet(name, *by_id(queries, documents), qrels, pseudo, as_texts)
