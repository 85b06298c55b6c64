"""The paper's figures of any export, on sets in BEIR form: `make` measures and draws one by its name."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cde_jax.adapters.statistics import CorpusStatistics
from cde_jax.batching.plan import BatchPlan
from cde_jax.data.files import read_json
from cde_jax.data.sources.beir import EvaluationSet, read_sets
from cde_jax.data.store import Store
from cde_jax.evaluation import plots
from cde_jax.evaluation.attribution import Triple, deletion_test
from cde_jax.evaluation.baselines import BM25, bm25
from cde_jax.evaluation.beir import rank_by_vectors
from cde_jax.evaluation.metrics import Run, ndcg
from cde_jax.evaluation.plots import Figure
from cde_jax.retrieval.choice import CHOICES
from cde_jax.retrieval.embedder import Context, Embedder, sample_rows

NDCG, GAIN, SIZE, SOURCE = "NDCG@10", "NDCG@10: gain over BM25", "context documents", "context from"
SHIFT = "IDF shift (0: the same term weights, 1: all terms new)"
DIFFICULTY = "batch difficulty: mean surrogate cosine of in-batch negatives"
STREAM = 73  # random stream id
PCA_DRAWS = 4  # times `seeds`: contexts of each set
MOST_QUERIES = 64  # of a set, in the deletion test

Sets = Sequence[EvaluationSet]
Folders = Sequence[str | Path]


def make(
    name: str,
    directory: str | Path,
    model: str | Path | None = None,
    data: Folders = (),
    workdirs: Folders = (),
    seeds: int = 3,
) -> tuple[Figure, Path]:
    """Measure, and write NAME.svg and NAME.csv; returns the figure and the SVG's path.

    model: an export or hub name; data: BEIR folders; workdirs: of runs, for "difficulty" and the training data of
    "idf-shift"; seeds: samples of context documents. Raises ValueError where the figure misses what it is made of.
    """
    if name not in FIGURES:
        raise ValueError(f"unknown figure {name!r}: choose one of {', '.join(FIGURES)}")
    needs = {"--workdir": workdirs} if name == "difficulty" else {"--model": model, "--data": data}
    if missing := [flag for flag, value in (needs | {"--seeds of 1 or more": seeds > 0}).items() if not value]:
        raise ValueError(f"the figure {name!r} needs {' and '.join(missing)}")
    if name == "difficulty":
        figure = difficulty(workdirs)
    else:
        sets, embedder = read_sets(data), Embedder.from_pretrained(model)
        if name != "idf-shift" and not embedder.contextual:
            raise ValueError(f"{model} is a biencoder, which reads no context: {name!r} needs a contextual model")
        figure = FIGURES[name](embedder, sets, workdirs if name == "idf-shift" else seeds)
    return figure, plots.write(figure, directory, name)


def context_size(embedder: Embedder, sets: Sets, seeds: int = 3) -> Figure:
    """NDCG against the number of context documents, 0 … 4 J (paper, figure 16)."""
    j, rows = embedder.context_size, []
    for dataset in sets:
        for size in sorted({0, j // 8, j // 4, j // 2, j, 2 * j, 4 * j}):
            if size <= len(dataset.corpus) and (embedder.works_without_context or (size and size % j == 0)):
                for seed in range(seeds if size else 1):
                    score = _score(embedder, dataset, sized_context(embedder, dataset, size, seed))
                    rows.append({"set": dataset.name, SIZE: size, "seed": seed, NDCG: score})
    return Figure(f"Quality by the number of context documents (J = {j})", rows, SIZE, NDCG, "set", plots.lines)


def sized_context(embedder: Embedder, dataset: EvaluationSet, size: int, seed: int) -> Context | None:
    """A context of `size` documents of a set, which may be more than J; None for 0."""
    corpus, j = list(dataset.corpus.values()), embedder.context_size
    drawn = [corpus[i] for i in sample_rows(len(corpus), size, [seed, STREAM])]
    parts = [embedder.embed_context(drawn[i : i + j], seed) for i in range(0, size, j)]
    if len(parts) < 2:
        return parts[0] if parts else None
    return dataclasses.replace(parts[0], vectors=np.concatenate([part.vectors for part in parts]), cache=None)


def context_grid(embedder: Embedder, sets: Sets, seeds: int = 3) -> Figure:
    """NDCG of every set with the context of every set (paper, figure 18)."""
    rows = []
    for seed in range(seeds):
        contexts = {dataset.name: _context(embedder, dataset, seed) for dataset in sets}
        contexts |= {"no context": None} if embedder.works_without_context else {}
        for dataset in sets:
            for name, context in contexts.items():
                score = _score(embedder, dataset, context)
                rows.append({SOURCE: name, "set": dataset.name, "seed": seed, NDCG: score})
    return Figure("Each set with the context of each set", rows, SOURCE, "set", NDCG, plots.grid)


def context_pca(embedder: Embedder, sets: Sets, seeds: int = 3, text: str | None = None) -> Figure:
    """One text, by default the first query, under many contexts, by principal components (paper, figure 15)."""
    text = text or next(iter(sets[0].queries.values()))
    draws = [(dataset, seed) for dataset in sets for seed in range(PCA_DRAWS * seeds)]
    vectors = np.concatenate([embedder.encode_queries([text], _context(embedder, *draw)) for draw in draws])
    directions, lengths, _ = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    shares = np.square(lengths) / max(np.square(lengths).sum(), 1e-12)
    x, y = (f"component {i + 1} ({shares[i]:.0%} of the variance)" for i in range(2))
    rows = [
        {SOURCE: dataset.name, "seed": seed, x: float(place[0]), y: float(place[1])}
        for (dataset, seed), place in zip(draws, directions[:, :2] * lengths[:2], strict=True)
    ]
    least = (vectors @ vectors.T).min()
    title = f"“{text[:60]}” under {len(draws)} contexts; least cosine of two of its vectors {least:.4f}"
    return Figure(title, rows, x, y, SOURCE, plots.points)


def idf_shift(embedder: Embedder, sets: Sets, workdirs: Folders = ()) -> Figure:
    """Gain over BM25 against how far a corpus' IDF is from the training data's (paper, figure 8).

    Without work directories, from the other sets'.
    """
    statistics, rows = {s.name: CorpusStatistics.fit(s.corpus.values()) for s in sets}, []
    training = [Store.open(Path(w) / "store/pairs", kind="pairs").ragged("document_text") for w in workdirs]
    if not training and len(sets) < 2:
        raise ValueError("the IDF shift needs training data, --workdir=DIR, or two evaluation sets or more")
    fitted = [CorpusStatistics.fit(texts.text(i) for i in range(texts.count())) for texts in training]
    for dataset in sets:
        first, *others = fitted or [s for name, s in statistics.items() if name != dataset.name]
        for other in others:
            first = first.merge(other)
        score = _score(embedder, dataset, _context(embedder, dataset, 0) if embedder.contextual else None)
        base = ndcg(bm25(dataset), dataset.qrels)
        row = {"set": dataset.name, SHIFT: first.drift(statistics[dataset.name]), GAIN: score - base}
        rows.append(row | {NDCG: score, BM25: base})
    title = f"Gain over BM25 by IDF shift from the {'training data' if fitted else 'other sets'}"
    return Figure(title, rows, SHIFT, GAIN, "set", plots.points)


def difficulty(workdirs: Folders) -> Figure:
    """Mean score of runs against the difficulty of their batches (paper, figure 10), by kind of context."""
    rows = []
    for workdir in map(Path, workdirs):
        if not (workdir / "evaluation.json").is_file():
            raise ValueError(f"{workdir} has no evaluation.json: run --stage=evaluate first")
        cosine = BatchPlan.load(workdir / "plan").manifest["difficulty"]["in_batch_negative_similarity"]
        for kind, score in read_json(workdir / "evaluation.json")["mean"].items():
            if kind not in (BM25, "LSA"):
                rows.append({"run": workdir.resolve().name, "context": kind, DIFFICULTY: cosine, NDCG: score})
    title = "Quality by the difficulty of the training batches"
    return Figure(title, rows, DIFFICULTY, NDCG, "context", plots.points, "run")


def context_choice(embedder: Embedder, sets: Sets, seeds: int = 3) -> Figure:
    """NDCG by how the context documents are chosen (`retrieval.choice`), by their vectors without context."""
    rows = []
    for dataset in sets:
        corpus = list(dataset.corpus.values())
        start = None if embedder.works_without_context else _context(embedder, dataset, 0)
        vectors = embedder.encode_documents(corpus, start)
        for name, choose in CHOICES.items():
            for seed in range(seeds):
                chosen = choose(vectors, embedder.context_size, seed)
                score = _score(embedder, dataset, embedder.embed_context([corpus[i] for i in chosen]))
                rows.append({"set": dataset.name, "choice": name, "seed": seed, NDCG: score})
    return Figure("Quality by the choice of context documents", rows, "set", NDCG, "choice", plots.bars)


def attribution(embedder: Embedder, sets: Sets, seeds: int = 3) -> Figure:
    """Deletion test of context attribution, with contexts of `seeds` samples; the title has its verdict on each set."""
    rows, verdicts, fall = [], [], "mean fall of the margin"
    for dataset in sets:
        for seed in range(seeds):
            context = _context(embedder, dataset, seed)
            test = deletion_test(embedder, context, _triples(dataset, _rank(embedder, dataset, context)), seed)
            verdicts += [f"{dataset.name}: {test.verdict}"] * (seed == 0)
            for name, falls in (("largest attribution", test.attributed), ("random", test.random)):
                for count, mean in zip(test.counts, falls.mean(axis=0).tolist(), strict=True):
                    row = {"deleted": f"{dataset.name}, {name}", SIZE: count, "seed": seed, fall: mean}
                    rows.append(row | {"change without documents": test.none, "change with their mean": test.same})
    return Figure("\n".join(verdicts), rows, SIZE, fall, "deleted", plots.lines)


FIGURES = {
    "context-size": context_size,
    "context-grid": context_grid,
    "context-pca": context_pca,
    "context-choice": context_choice,
    "attribution": attribution,
    "idf-shift": idf_shift,
    "difficulty": difficulty,
}


def _context(embedder: Embedder, dataset: EvaluationSet, seed: int) -> Context:
    return embedder.embed_context(list(dataset.corpus.values()), seed)


def _rank(embedder: Embedder, dataset: EvaluationSet, context: Context | None) -> Run:
    queries = embedder.encode_queries(dataset.queries.values(), context)
    return rank_by_vectors(dataset, queries, embedder.encode_documents(dataset.corpus.values(), context), 10)


def _score(embedder: Embedder, dataset: EvaluationSet, context: Context | None) -> float:
    return ndcg(_rank(embedder, dataset, context), dataset.qrels)


def _triples(dataset: EvaluationSet, run: Run) -> list[Triple]:
    """Queries, each with its most relevant document and the best ranked one that is not relevant."""
    triples = []
    for query, grades in dataset.qrels.items():
        relevant = max(grades, key=grades.get)
        wrong = {d: score for d, score in run[query].items() if grades.get(d, 0) <= 0}
        if grades[relevant] > 0 and wrong:
            other = dataset.corpus[max(wrong, key=wrong.get)]
            triples.append((dataset.queries[query], dataset.corpus[relevant], other))
    return triples[:MOST_QUERIES]
