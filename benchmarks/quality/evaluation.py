"""Evaluation sets as stores of tokens: what the first command makes of BEIR folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from cde_jax.adapters.whitening import pseudo_queries
from cde_jax.config import Config
from cde_jax.data.sources import beir
from cde_jax.data.sources.beir import EvaluationSet
from cde_jax.data.store import Ragged, StoreWriter
from cde_jax.data.tokens import Tokenizer

CUT_STREAM = 61  # keeps these draws apart from other random numbers of the same seed


class Rates(NamedTuple):
    """How many of `count` documents have each token."""

    count: int
    documents: np.ndarray  # int64 [V]


def read_all(paths: Sequence[str | Path]) -> list[EvaluationSet]:
    """The sets in the folders, or in their subfolders by name. Raises ValueError where there is nothing to measure.

    A set whose qrels have no relevant document, two sets of one name, and a folder without sets are such.
    """
    sets = []
    for path in map(Path, paths):
        folders = [path] if _is_set(path) else sorted(folder for folder in path.glob("*") if _is_set(folder))
        if not folders:
            raise ValueError(f"{path}: expected an evaluation set (corpus.jsonl, queries.jsonl, qrels.tsv) or a folder "
                             "of some; correct --evaluation")  # fmt: skip
        sets += [_relevant(beir.read(folder), folder) for folder in folders]
    names = [one.name for one in sets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"evaluation sets need different names, these come more than once: {', '.join(twice)}")
    return sets


def cut(one: EvaluationSet, queries: int, documents: int, seed: int) -> EvaluationSet:
    """At most so many queries with a relevant document, and documents: all judged relevant ones, then any; 0: all.

    The queries are drawn by chance, and what fills the corpus up; a query's irrelevant judgements stay if their
    document does.
    """
    random = np.random.default_rng([seed, CUT_STREAM, *one.name.encode()])
    judged = [query for query in one.queries if any(grade > 0 for grade in one.qrels[query].values())]
    if queries and len(judged) > queries:
        judged = [judged[i] for i in np.sort(random.choice(len(judged), queries, replace=False))]
    needed = {document for query in judged for document, grade in one.qrels[query].items() if grade > 0}
    others = [document for document in one.corpus if document not in needed]
    if documents and len(needed) + len(others) > documents:
        room = max(0, documents - len(needed))
        others = [others[i] for i in random.choice(len(others), room, replace=False)]
    kept = needed.union(others)
    return EvaluationSet(
        one.name,
        {query: one.queries[query] for query in judged},
        {document: text for document, text in one.corpus.items() if document in kept},
        {query: {d: grade for d, grade in one.qrels[query].items() if d in kept} for query in judged},
    )


def write(one: EvaluationSet, folder: Path, tokenizer: Tokenizer, config: Config, training: Rates) -> dict[str, Any]:
    """Write the set as a store of kind "evaluation"; returns what lab.json says of it.

    Documents are in the order of their ids' bytes: trec_eval ranks equal scores by id, greatest first.
    """
    d = config.data
    corpus = sorted(one.corpus, key=str.encode)
    place = {document: number for number, document in enumerate(corpus)}
    judgements = [
        (number, place[document], grade)
        for number, query in enumerate(one.queries)
        for document, grade in one.qrels[query].items()
    ]
    judged, relevant, grades = (np.array(column, np.int32) for column in zip(*judgements, strict=True))
    small = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    queries = tokenizer.encode([d.query_prefix + text for text in one.queries.values()], d.query_length)
    documents = tokenizer.encode([d.document_prefix + one.corpus[name] for name in corpus], d.document_length)
    stand_ins = pseudo_queries([one.corpus[name] for name in corpus], config.seed)
    stand_ins = tokenizer.encode([d.query_prefix + text for text in stand_ins], d.query_length)
    with StoreWriter(folder, "evaluation") as writer:
        writer.append_ragged("query_tokens", queries, small)
        writer.append_ragged("document_tokens", documents, small)
        writer.append_ragged("beginning_tokens", stand_ins, small)
        for name, array in (("judged", judged), ("relevant", relevant), ("grades", grades)):
            writer.append(name, array)
        store = writer.finish({"name": one.name})
    rates = document_rates(store.ragged("document_tokens"), tokenizer.vocab_size)
    return {
        "fingerprint": store.fingerprint,
        "queries": len(queries),
        "documents": len(documents),
        "judgements": len(judgements),
        "idf_shift": round(idf_shift(training, rates), 4),
    }


def document_rates(documents: Ragged, vocab_size: int) -> Rates:
    """In how many documents each token stands."""
    counts = np.zeros(vocab_size, np.int64)
    for i in range(documents.count()):
        counts[np.unique(documents.row(i))] += 1
    return Rates(documents.count(), counts)


def idf_shift(training: Rates, corpus: Rates) -> float:
    """How far the corpus is from the training data: mean |IDF there − IDF here| over its documents' distinct tokens.

    IDF is log((n + 1) / (documents + 1/2)), so this is the mean size of the log ratio of document rates, in nats
    (after the paper's figure 8).
    """
    there, here = (_idf(rates) for rates in (training, corpus))
    return float(np.average(np.abs(there - here), weights=corpus.documents))


def _idf(rates: Rates) -> Float[np.ndarray, " V"]:
    return np.log((rates.count + 1) / (rates.documents + 0.5))


def _is_set(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("corpus.jsonl", "corpus.jsonl.gz"))


def _relevant(one: EvaluationSet, folder: Path) -> EvaluationSet:
    if not any(grade > 0 for grades in one.qrels.values() for grade in grades.values()):
        raise ValueError(
            f"{folder}: none of the {len(one.qrels)} queries in its qrels has a relevant document (score above 0), so "
            "there is nothing to measure: look at the qrels file, or leave the set out"
        )
    return one
