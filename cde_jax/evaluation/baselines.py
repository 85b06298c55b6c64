"""Baselines: BM25, and any function from texts to vectors (LSA)."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float

from cde_jax.batching.surrogate import lsa, sentence_transformer
from cde_jax.data.files import fingerprint, read_json, write_json
from cde_jax.data.sources.beir import EvaluationSet
from cde_jax.data.store import unit_rows
from cde_jax.evaluation.beir import check_names, rank_by_vectors
from cde_jax.evaluation.metrics import Run, Scores, score_rankings

BM25 = "BM25"
LSA_WIDTH = 256
Encode = Callable[[Sequence[str]], Float[np.ndarray, "n D"]]


def evaluate_baselines(
    sets: Sequence[EvaluationSet], encoders: Mapping[str, Encode] | None = None, k: int = 10
) -> Scores:
    """NDCG@k of BM25 and of each of `encoders`, {name: texts → vectors}, on every set."""
    check_names(sets)
    rankers = {BM25: bm25} | {name: partial(rank_vectors, encode=encode) for name, encode in (encoders or {}).items()}
    rankings = {dataset.name: {name: run(dataset, k=k) for name, run in rankers.items()} for dataset in sets}
    return score_rankings(rankings, sets, k)


def bm25(dataset: EvaluationSet, k: int = 10) -> Run:
    """The k best documents by BM25 (bm25s, Lucene's form, k1 = 1.2, b = 0.75; English stop words, no stemming).

    The stop words are scikit-learn's 318: the 33 of bm25s make a weaker baseline on most sets. A document without any
    word of the query is left out.
    """
    import bm25s  # starts a JAX backend when imported, which reading this module must not do
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it prints debug messages
    stop_words = sorted(ENGLISH_STOP_WORDS)

    def words(texts):
        return bm25s.tokenize(list(texts), stopwords=stop_words, return_ids=False, show_progress=False)

    documents = words(dataset.corpus.values())
    if not any(documents):  # bm25s cannot index a corpus without a single word
        return {}
    model = bm25s.BM25(k1=1.2, b=0.75, method="lucene")
    model.index(documents, show_progress=False)
    ids = list(dataset.corpus)
    run = {}
    for query, tokens in zip(dataset.queries, words(dataset.queries.values()), strict=True):
        scores = model.get_scores(tokens) if tokens else np.zeros(len(ids))
        best = np.argsort(-scores, kind="stable")[:k]
        run[query] = {ids[i]: float(scores[i]) for i in best if scores[i] > 0}
    return run


def rank_vectors(dataset: EvaluationSet, encode: Encode, k: int = 10) -> Run:
    """The k best documents by cosine of `encode`'s vectors; a vector of zeros scores 0 against all."""
    sides = [encode(list(texts.values())) for texts in (dataset.queries, dataset.corpus)]
    queries, documents = (unit_rows(np.asarray(vectors, np.float32)) for vectors in sides)
    return rank_by_vectors(dataset, queries, documents, k)


def candidates(dataset: EvaluationSet, first_model: str, count: int, file: Path) -> Run:
    """The `count` best documents of each query by a first model, for others to rank again; kept in `file`.

    first_model: "bm25", "lsa" fitted on the set, or a sentence-transformers name or folder. Raises ValueError for a
    model that cannot be had.
    """
    identity = fingerprint([first_model, count, dataset.queries, dataset.corpus])
    if file.is_file() and (kept := read_json(file, keys=("fingerprint", "run")))["fingerprint"] == identity:
        return kept["run"]
    if first_model == "bm25":
        run = bm25(dataset, count)
    elif first_model == "lsa":
        texts = list(dataset.queries.values()), list(dataset.corpus.values())
        run = rank_vectors(dataset, lsa(*texts, width=LSA_WIDTH, seed=0).encode, count)
    else:
        encoders = sentence_transformer(f"sentence-transformers:{first_model}")
        sides = zip(encoders, (dataset.queries, dataset.corpus), strict=True)
        run = rank_by_vectors(dataset, *(encode(list(texts.values())) for encode, texts in sides), count)
    write_json(file, {"first_model": first_model, "count": count, "fingerprint": identity, "run": run})
    return run


def truncated(dataset: EvaluationSet, run: Run) -> EvaluationSet:
    """The set with the documents of `run` alone; qrels of others stay, and count as not found."""
    found = {document for documents in run.values() for document in documents}
    corpus = {name: text for name, text in dataset.corpus.items() if name in found}
    return dataclasses.replace(dataset, corpus=corpus)
