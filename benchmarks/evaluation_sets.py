"""Evaluation sets of the benchmarks: folders in BEIR form, cut down to a size that a small machine can encode."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cde_jax.data.sources import beir
from cde_jax.data.sources.beir import EvaluationSet


def read(paths: Sequence[str | Path], queries: int = 0, documents: int = 0, seed: int = 0) -> list[EvaluationSet]:
    """The sets in the folders, or in their subfolders by name, each cut by `cut`.

    Raises ValueError for a folder without a set, and for two sets of one name.
    """
    sets: dict[str, EvaluationSet] = {}
    for path in map(Path, paths):
        folders = [folder for folder in (path, *sorted(path.glob("*"))) if any(folder.glob("corpus.jsonl*"))]
        if not folders:
            raise ValueError(f"{path}: expected a folder in BEIR form (corpus.jsonl, queries.jsonl, qrels.tsv) or a "
                             "folder of such folders")  # fmt: skip
        for folder in folders:
            if folder.name in sets:
                raise ValueError(f"two evaluation sets are called {folder.name!r}: rename one of the folders")
            sets[folder.name] = cut(beir.read(folder), queries, documents, seed)
    return list(sets.values())


def cut(dataset: EvaluationSet, queries: int, documents: int, seed: int) -> EvaluationSet:
    """At most so many queries with a relevant document, and so many documents; 0: all.

    The relevant documents of the drawn queries are always kept, and others are drawn beside them. Raises ValueError
    where no query has a relevant document.
    """
    random = np.random.default_rng([seed, *dataset.name.encode()])
    judged = [query for query in dataset.queries if any(grade > 0 for grade in dataset.qrels[query].values())]
    if not judged:
        raise ValueError(
            f"{dataset.name}: none of its {len(dataset.qrels)} queries has a relevant document (score > 0)"
        )
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
