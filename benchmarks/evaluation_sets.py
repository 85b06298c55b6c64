"""Evaluation sets of the benchmarks: folders in BEIR form, cut down to a size that a small machine can encode."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cde_jax.data.sources import beir, jsonl
from cde_jax.data.sources.beir import EvaluationSet


def read(paths: Sequence[str | Path], queries: int = 0, documents: int = 0, seed: int = 0) -> list[EvaluationSet]:
    """The sets in the folders, or in their subfolders by name, each cut by `cut`. Raises ValueError as `beir.read`.

    A path that ends in .jsonl or .jsonl.gz is a file of training pairs, made into a set by `from_pairs`.
    """
    files = [path for path in map(Path, paths) if ".jsonl" in path.name]
    folders: list[Path] = []
    for path in (path for path in map(Path, paths) if path not in files):
        subfolders = [folder for folder in sorted(path.glob("*")) if any(folder.glob("corpus.jsonl*"))]
        folders += [path] if any(path.glob("corpus.jsonl*")) else subfolders or [path]
    sets = [*beir.read_sets(folders), *map(from_pairs, files)]
    return [cut(dataset, queries, documents, seed) for dataset in sets]


def from_pairs(file: Path) -> EvaluationSet:
    """A retrieval set of all documents of a file of pairs; each query has the documents that it is paired with."""
    queries: dict[str, str] = {}
    corpus: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    for pair in jsonl.read_pairs(file):
        query, document = (
            queries.setdefault(pair.query, f"q{len(queries)}"),
            corpus.setdefault(pair.document, f"d{len(corpus)}"),
        )
        qrels.setdefault(query, {})[document] = 1
    texts = ({key: text for text, key in side.items()} for side in (queries, corpus))
    return EvaluationSet(file.name.split(".")[0], *texts, qrels)


def cut(dataset: EvaluationSet, queries: int, documents: int, seed: int) -> EvaluationSet:
    """At most so many queries with a relevant document, and so many documents; 0: all.

    The relevant documents of the drawn queries are always kept, and others are drawn beside them.
    """
    random = np.random.default_rng([seed, *dataset.name.encode()])
    judged = [query for query in dataset.queries if any(grade > 0 for grade in dataset.qrels[query].values())]
    judged = _draw(judged, queries or len(judged), random)
    relevant = {document for query in judged for document, grade in dataset.qrels[query].items() if grade > 0}
    others = [document for document in dataset.corpus if document not in relevant]
    kept = relevant.union(_draw(others, max(0, (documents or len(dataset.corpus)) - len(relevant)), random))
    return EvaluationSet(
        dataset.name,
        {query: dataset.queries[query] for query in judged},
        {document: text for document, text in dataset.corpus.items() if document in kept},
        {query: {d: grade for d, grade in dataset.qrels[query].items() if d in kept} for query in judged},
    )


def _draw(names: list[str], count: int, random: np.random.Generator) -> list[str]:
    """At most `count` of the names, in their order."""
    if len(names) <= count:
        return names
    return [names[i] for i in np.sort(random.choice(len(names), count, replace=False))]
