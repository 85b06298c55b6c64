"""What corpus statistics beside dense vectors gain: one JSON line a case, NDCG@10 in points.

    python benchmarks/vectors.py --model all-MiniLM-L6-v2 --evaluation SETS --out VECTORS --length 128
    python benchmarks/hybrid.py --model all-MiniLM-L6-v2 --evaluation SETS --vectors VECTORS [--widths 768 1152]

Everything is fitted on the corpus alone (whitening and spreads by pseudo queries); labels only score. A case is scored
with one weight for all queries and with a weight by query; both are chosen on the other sets (`loo`), and `fixed` is
the mean at each weight. Cases: `lsa+terms` (with the encoder's token embeddings), `lsa+signs` (without), `signs` (a
count sketch alone), `int8` and `stems` (`lsa+terms` with documents of 8 bits a dimension; with words cut to stems by
snowballstemmer). Controls, to compare with `lsa+signs`: `idf of`, `directions of` or `both of` (document frequencies,
latent directions) `another corpus`, the set half the list away, or `general text`, the documents of `--general`; the
frequencies of another corpus count with those of `--general` as of 300 documents more, so that no term has weight 0;
`both of another corpus, whitening too`. Two indexes, dense and BM25: `exact`
(scores mixed, each divided by its spread), `z-score` (each standardised by query), `rrf` (reciprocal ranks + 60,
Cormack et al., 2009). `N labels`: the weight that `fit_weight` chooses by N queries, drawn 20 times and scored on the
others.
`interval` is a paired 95 % interval of the gain over whitened vectors, queries resampled within sets.
"""

import argparse
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import evaluation_sets
import numpy as np
from harness import emit
from jaxtyping import Float

from cde_jax.adapters.hybrid import CAUTION, GAIN_MODEL, LARGER_WEIGHTS, WEIGHTS, HybridVectors, best_choice
from cde_jax.adapters.projection import TermVectors
from cde_jax.adapters.statistics import CorpusStatistics, terms
from cde_jax.adapters.whitening import SAMPLE_SIZE, Whitening, whitening
from cde_jax.data.sources.beir import EvaluationSet
from cde_jax.evaluation.compare import bootstrap
from cde_jax.evaluation.metrics import ndcg_per_query
from cde_jax.retrieval.embedder import Embedder
from cde_jax.retrieval.index import as_run, search

RIDGE = 0.06
MORE_WEIGHTS = (*WEIGHTS, *LARGER_WEIGHTS)  # scored too; GAIN_MODEL knows WEIGHTS alone
LABELS, DRAWS = (10, 50, 200), 20
ANOTHER, GENERAL, WHITENING_TOO = "another corpus", "general text", ", whitening too"
CONTROLS = tuple(f"{part} of {other}" for part in ("idf", "directions", "both") for other in (ANOTHER, GENERAL))
CONTROLS += (f"both of {ANOTHER}{WHITENING_TOO}",)
CASES = ("exact", "z-score", "rrf", "lsa+terms", "lsa+signs", "signs", "int8", "stems", *CONTROLS)
FUSIONS = CASES[:3]
GENERAL_DOCUMENTS = 2000  # at most, of a file
PRIOR_DOCUMENTS = 300  # of general text, among the frequencies of another corpus


class Case(NamedTuple):
    """NDCG@10 of each query in points at each of MORE_WEIGHTS, and its features, of one set."""

    scores: Float[np.ndarray, "q w"]
    features: Float[np.ndarray, "q 2"]


def main() -> None:
    """Score every case on every set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="for its token embeddings: a directory or a hub name")
    parser.add_argument("--evaluation", nargs="+", required=True, help="BEIR folders, or folders of such; two or more")
    parser.add_argument("--vectors", type=Path, required=True, help="directory written by benchmarks/vectors.py")
    parser.add_argument("--queries", type=int, default=0, help="as of benchmarks/vectors.py")
    parser.add_argument("--documents", type=int, default=0, help="as of benchmarks/vectors.py")
    parser.add_argument("--general", nargs="*", default=[], metavar="FILE", help="pairs, for the controls")
    parser.add_argument("--widths", nargs="+", type=int, default=[768, 1152, 1920], help="of the hybrid vectors")
    parser.add_argument("--cases", nargs="+", default=CASES[: -len(CONTROLS)], choices=CASES, metavar="CASE")
    args = parser.parse_args()
    if any(case in CONTROLS for case in args.cases) and not args.general:
        parser.error("--general is needed for the controls")
    term_vectors = Embedder.from_pretrained(args.model, progress=False).term_vectors
    sets = evaluation_sets.read(args.evaluation, args.queries, args.documents)
    dense = [whitened(dataset, dict(np.load(args.vectors / f"{dataset.name}.npz"))) for dataset in sets]
    frozen = [x["frozen"] for x in dense]
    base = [x["whitened"] for x in dense]
    line = {"benchmark": "hybrid"}
    emit(line | {"case": "frozen", **summary(sets, frozen, base)}, "jax")
    emit(line | {"case": "whitened", **summary(sets, base, base)}, "jax")
    statistics = [CorpusStatistics.fit(dataset.corpus.values()) for dataset in sets]
    for name in (name for name in FUSIONS if name in args.cases):
        fused = [fusion(*each, name) for each in zip(sets, dense, statistics, strict=True)]
        report(line | {"case": name}, sets, fused, base)
    for width in args.widths:
        for name in (name for name in args.cases if name not in (*FUSIONS, *CONTROLS)):
            cases = [hybrid(*each, width, name, term_vectors) for each in zip(sets, dense, statistics, strict=True)]
            report(line | {"case": name, "width": width}, sets, cases, base)
    controls = [name for name in args.cases if name in CONTROLS]
    corpora = [Corpus(list(dataset.corpus.values()), each) for dataset, each in zip(sets, statistics, strict=True)]
    general = general_text(args.general) if controls else None
    for width in args.widths:
        for name in controls:
            scores = []
            for i, dataset in enumerate(sets):
                j = (i + len(sets) // 2) % len(sets)
                other = with_other_words(corpora[j], general) if ANOTHER in name else general
                vectors = dense[i]
                if name.endswith(WHITENING_TOO):
                    vectors = whitened(dataset, vectors["raw"], dense[j]["fitted"])
                scores.append(control(name, dataset, vectors, corpora[i], other, width))
            weight = "by query, as the library has it"
            emit(line | {"case": name, "width": width, "weight": weight, **summary(sets, scores, base)}, "jax")


class Corpus(NamedTuple):
    """Documents and their statistics."""

    texts: list[str]
    statistics: CorpusStatistics


def general_text(files: Sequence[str]) -> Corpus:
    """Documents of files of training pairs, drawn."""
    texts = []
    for file in files:
        documents = list(evaluation_sets.from_pairs(Path(file)).corpus.values())
        drawn = np.random.default_rng(0).permutation(len(documents))[:GENERAL_DOCUMENTS]
        texts += [documents[i] for i in drawn]
    return Corpus(texts, CorpusStatistics.fit(texts))


def with_other_words(corpus: Corpus, general: Corpus) -> Corpus:
    """A corpus whose frequencies count those of general text as of `PRIOR_DOCUMENTS` more documents."""
    share = PRIOR_DOCUMENTS / general.statistics.documents
    frequencies = np.ceil(share * general.statistics.frequencies).astype(np.uint32)
    prior = CorpusStatistics(PRIOR_DOCUMENTS, round(share * general.statistics.terms), frequencies)
    return corpus._replace(statistics=corpus.statistics.merge(prior))


def control(
    name: str, dataset: EvaluationSet, dense: dict[str, Any], own: Corpus, other: Corpus, width: int
) -> Float[np.ndarray, " q"]:
    """NDCG@10 in points of a set's queries under document frequencies or latent directions that are not its own."""
    statistics = own.statistics if name.startswith("directions") else other.statistics
    texts = own.texts if name.startswith("idf") else other.texts
    fitted = HybridVectors.fit(
        statistics, dense["documents"], own.texts, dense["pseudo_queries"], width=width, corpus=texts
    )
    queries = fitted.transform_queries(dense["queries"], list(dataset.queries.values()))
    return per_query(dataset, queries, fitted.transform_documents(dense["documents"], own.texts))


def whitened(dataset: EvaluationSet, arrays: dict[str, np.ndarray], fitted: Whitening | None = None) -> dict[str, Any]:
    """Whitened vectors of a set (None: by its corpus alone), and the NDCG@10 of its queries with and without."""
    documents = arrays["documents"]
    sample = documents[np.random.default_rng(0).permutation(len(documents))[:SAMPLE_SIZE]]
    fitted = fitted or whitening(arrays["pseudo_queries"], sample)
    result = {
        "queries": fitted.transform_queries(arrays["queries"]),
        "documents": fitted.transform_documents(documents),
        "pseudo_queries": fitted.transform_queries(arrays["pseudo_queries"]),
    }
    frozen = per_query(dataset, arrays["queries"], documents)
    result |= {"raw": arrays, "fitted": fitted}
    return result | {"frozen": frozen, "whitened": per_query(dataset, result["queries"], result["documents"])}


def per_query(
    dataset: EvaluationSet, queries: Float[np.ndarray, "q D"], documents: Float[np.ndarray, "n D"]
) -> Float[np.ndarray, " q"]:
    """NDCG@10 in points."""
    run = as_run(list(dataset.queries), list(dataset.corpus), search(queries, documents, 10))
    return 100 * np.array(list(ndcg_per_query(run, dataset.qrels).values()))


def judged(dataset: EvaluationSet) -> list[int]:
    """Rows of the queries with a relevant document, which alone are scored."""
    return [i for i, query in enumerate(dataset.queries) if any(g > 0 for g in dataset.qrels[query].values())]


def hybrid(
    dataset: EvaluationSet,
    dense: dict[str, Any],
    statistics: CorpusStatistics,
    width: int,
    name: str,
    term_vectors: TermVectors,
) -> Case:
    """Scores of hybrid vectors of a total width."""
    corpus, texts = list(dataset.corpus.values()), list(dataset.queries.values())
    if name == "stems":
        corpus, texts, term_vectors = stemmed(corpus, texts, term_vectors)
        statistics = CorpusStatistics.fit(corpus)
    options = {"width": width, "term_vectors": None if name.endswith("signs") else term_vectors}
    if name == "signs":
        options["latent_fraction"] = 0.0
    fitted = HybridVectors.fit(statistics, dense["documents"], corpus, dense["pseudo_queries"], **options)
    documents = fitted.transform_documents(dense["documents"], corpus)
    if name == "int8":
        scale = np.abs(documents).max(axis=0) / 127
        documents = np.round(documents / scale).astype(np.int8) * scale
    scores = [
        per_query(dataset, fitted.with_weight(weight).transform_queries(dense["queries"], texts), documents)
        for weight in MORE_WEIGHTS
    ]
    return Case(np.stack(scores, axis=1), fitted.query_features(dense["queries"], texts)[judged(dataset)])


def stemmed(
    corpus: list[str], queries: list[str], term_vectors: TermVectors
) -> tuple[list[str], list[str], TermVectors]:
    """Texts of stems, and the vector of a stem: that of the first word that has it."""
    from snowballstemmer import stemmer

    stem, words = lru_cache(None)(stemmer("english").stemWord), {}

    def stems(text: str) -> str:
        return " ".join(words.setdefault(stem(word), word) and stem(word) for word in terms(text))

    return [*map(stems, corpus)], [*map(stems, queries)], lambda found: term_vectors([words.get(s, s) for s in found])


def fusion(dataset: EvaluationSet, dense: dict[str, np.ndarray], statistics: CorpusStatistics, name: str) -> Case:
    """Two indexes, their scores of all documents fused as FUSIONS say."""
    queries = statistics.query_weights(dataset.queries.values())
    lexical = (queries @ statistics.document_weights(dataset.corpus.values()).T).toarray()
    lexical /= np.sqrt(np.maximum(queries.multiply(queries).sum(axis=1), 1e-12))
    lists = []
    for scores in (dense["queries"] @ dense["documents"].T, np.asarray(lexical)):
        if name == "rrf":
            ranks = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1)
            lists.append(1 / (61.0 + ranks))
        elif name == "z-score":
            spread = np.maximum(scores.std(axis=1, keepdims=True), 1e-9)
            lists.append((scores - scores.mean(axis=1, keepdims=True)) / spread)
        else:
            lists.append(scores / scores.std())
    names, scores = list(dataset.corpus), []
    for weight in MORE_WEIGHTS:
        mixed = (1 - weight) * lists[0] + weight * lists[1]
        best = np.argsort(-mixed, axis=1, kind="stable")[:, :10]
        run = {
            query: {names[j]: float(row[j]) for j in top}
            for query, row, top in zip(dataset.queries, mixed, best, strict=True)
        }
        scores.append(100 * np.array(list(ndcg_per_query(run, dataset.qrels).values())))
    return Case(np.stack(scores, axis=1), np.zeros((len(scores[0]), 2)))


def report(line: dict, sets: list[EvaluationSet], cases: list[Case], base: list[np.ndarray]) -> None:
    """Emit a case: each weight for all, and weights chosen on the other sets for all queries and by query."""
    means = np.array([case.scores.mean(axis=0) for case in cases])  # [sets, w]
    line = line | {"fixed": dict(zip(map(str, MORE_WEIGHTS), means.mean(axis=0).round(2).tolist(), strict=True))}
    rest = [[j for j in range(len(cases)) if j != i] for i in range(len(cases))]
    one = [case.scores[:, means[others].mean(axis=0).argmax()] for case, others in zip(cases, rest, strict=True)]
    emit(line | {"weight": "one, loo", **summary(sets, one, base)}, "jax")
    if not any(case.features.any() for case in cases):
        return
    default = [predicted(GAIN_MODEL, case) for case in cases]  # honest for sets that GAIN_MODEL was not fitted on
    emit(line | {"weight": "by query, as the library has it", **summary(sets, default, base)}, "jax")
    by_query = [
        predicted(gain_model([cases[j] for j in others]), case) for case, others in zip(cases, rest, strict=True)
    ]
    emit(line | {"weight": "by query, loo", **summary(sets, by_query, base)}, "jax")
    for labels in LABELS:
        few = [few_labels(case, own, labels) for case, own in zip(cases, by_query, strict=True)]
        emit(line | {"weight": f"{labels} labels", **summary(sets, few, base)}, "jax")
    emit(line | {"gain_model": gain_model(cases).round(3).tolist()}, "jax")


def few_labels(case: Case, by_query: Float[np.ndarray, " q"], labels: int) -> Float[np.ndarray, " q"]:
    """Each query's score, meaned over draws of other queries that choose the weight; by query where there are few."""
    choices = np.concatenate([by_query[:, None], case.scores], axis=1)
    count, sums = len(choices), np.zeros((2, len(choices)))
    if count < 2 * labels:
        return by_query
    for draw in range(DRAWS):
        order = np.random.default_rng([draw, labels]).permutation(count)
        chosen = best_choice(choices[order[:labels]])
        sums[:, order[labels:]] += np.stack([choices[order[labels:], chosen], np.ones(count - labels)])
    return sums[0] / np.maximum(sums[1], 1)


def gain_model(cases: list[Case]) -> Float[np.ndarray, "3 w"]:
    """Ridge regression of the gain at each weight on a query's features, every set with the same mass."""
    mass = np.concatenate([np.full(len(case.scores), 1 / len(case.scores) / len(cases)) for case in cases])
    features = np.concatenate([case.features for case in cases]).astype(np.float64)
    gains = np.concatenate([case.scores[:, : len(WEIGHTS)] - case.scores[:, :1] for case in cases])
    mean = mass @ features
    spread = np.sqrt(mass @ (features - mean) ** 2) + 1e-9
    inputs = np.concatenate([np.ones((len(features), 1)), (features - mean) / spread], axis=1)
    gram = inputs.T @ (inputs * mass[:, None]) + RIDGE / len(cases) * np.eye(3)
    slopes = np.linalg.solve(gram, inputs.T @ (gains * mass[:, None]))
    slopes[1:] /= spread[:, None]
    slopes[0] -= mean @ slopes[1:]
    return slopes


def predicted(model: Float[np.ndarray, "3 w"], case: Case) -> Float[np.ndarray, " q"]:
    """Each query's score at the weight that `model` gives it (`choose_weights`)."""
    gains = np.concatenate([np.ones((len(case.features), 1)), case.features], axis=1) @ model
    enough = gains >= CAUTION * gains.max(axis=1, keepdims=True)
    return np.take_along_axis(case.scores, enough.argmax(axis=1)[:, None], axis=1)[:, 0]


def summary(sets: list[EvaluationSet], scores: list[np.ndarray], base: list[np.ndarray]) -> dict:
    """Mean over sets, the gain over `base` with its interval, the worst set, and every set."""
    gain, low, high = bootstrap([(a - b)[None] for a, b in zip(scores, base, strict=True)])
    means = [float(x.mean()) for x in scores]
    worst = min(float((a - b).mean()) for a, b in zip(scores, base, strict=True))
    by_set = {dataset.name: round(mean, 2) for dataset, mean in zip(sets, means, strict=True)}
    interval = [round(low, 2), round(high, 2)]
    return {
        "mean": round(np.mean(means), 2),
        "gain": round(gain, 2),
        "interval": interval,
        "worst": round(worst, 2),
        "sets": by_set,
    }


if __name__ == "__main__":
    main()
