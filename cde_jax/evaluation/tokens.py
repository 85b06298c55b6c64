"""Evaluation sets as token ids, to be ranked on a machine without texts and tokenizer."""

from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from cde_jax.adapters.whitening import pseudo_queries
from cde_jax.data.files import fingerprint
from cde_jax.data.sources.beir import EvaluationSet
from cde_jax.data.store import Store, StoreWriter
from cde_jax.data.tokens import Tokenizer
from cde_jax.interop.modules import TextSettings

KIND = "evaluation"  # of the store


@dataclass(frozen=True)
class TokenSet(EvaluationSet):
    """An evaluation set whose texts are token ids, with prefix and special tokens."""

    queries: dict[str, Integer[np.ndarray, "_"]]
    corpus: dict[str, Integer[np.ndarray, "_"]]
    pseudo_queries: list[Integer[np.ndarray, "_"]]  # of the corpus, by the seed given to `write_tokens`


def write_tokens(
    dataset: EvaluationSet, directory: str | Path, tokenizer: Tokenizer, settings: TextSettings, seed: int
) -> Store:
    """Write the store that `read_tokens` reads: token ids, query and document ids, qrels.

    One of the same set, tokenizer, settings and seed is kept, any other is replaced.
    """
    identity = fingerprint([asdict(dataset), asdict(settings), tokenizer.fingerprint, seed])
    with suppress(ValueError):  # no store there, or a damaged one
        if (store := Store.open(directory, kind=KIND)).fingerprint == identity:
            return store
    s, corpus = settings, list(dataset.corpus.values())
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
