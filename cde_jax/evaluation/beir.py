"""NDCG@k on retrieval sets, for each kind of context, beside BM25 and any function from texts to vectors.

Where a contextual model takes its context from decides what its score means, so the kinds always stand side by side:
the corpus that is searched (the paper's setting), the same with vectors whitened, training documents that have nothing
to do with it, and null slots. Scores are plain dicts, {set: {kind: NDCG@k}}, that write as `evaluation.json`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytrec_eval
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from cde_jax.adapters.whitening import SIZE, beginnings, whitening
from cde_jax.data.sources.beir import EvaluationSet
from cde_jax.retrieval.embedder import WHITENING_STREAM, Context, Embedder
from cde_jax.retrieval.index import as_run, search

SAME_CORPUS, RANDOM_DOCUMENTS, NO_CONTEXT = "same corpus", "random training documents", "none"
WHITENED = "same corpus, whitened"
BM25, MEAN = "BM25", "mean"

Encode = Callable[[Sequence[str]], np.ndarray]  # texts → float vectors [n, D]
Scores = dict[str, dict[str, float]]  # {set: {kind: NDCG@k}}


def ndcg(run: Mapping[str, Mapping[str, float]], qrels: Mapping[str, Mapping[str, int]], k: int = 10) -> float:
    """Mean NDCG@k, by pytrec_eval, over the judged queries: those with at least one relevant document.

    `run` is {query: {document: score}}; a judged query that is not in it, or found nothing, counts as 0. Equal
    scores are ranked as trec_eval does, by document id, greatest first. Raises ValueError if no query is judged.
    """
    judged = {query: grades for query, grades in qrels.items() if any(g > 0 for g in grades.values())}
    if not judged:
        raise ValueError(
            f"NDCG needs queries with a relevant document, but none of the {len(qrels)} queries in the qrels has "
            f"one: look at the qrels file"
        )
    evaluator = pytrec_eval.RelevanceEvaluator(
        {query: {document: int(g) for document, g in grades.items()} for query, grades in judged.items()},
        {f"ndcg_cut.{k}"},
    )
    found = evaluator.evaluate({query: dict(run[query]) for query in judged if run.get(query)})
    return float(sum(scores[f"ndcg_cut_{k}"] for scores in found.values()) / len(judged))


def evaluate_embedder(
    embedder: Embedder,
    sets: Sequence[EvaluationSet],
    other_documents: Sequence[str],
    seed: int,
    k: int = 10,
) -> Scores:
    """NDCG@k of every set under every kind of context that the model can take.

    "same corpus" samples the context from the set's own corpus, "random training documents" from
    `other_documents` (left out if there are none), "none" is null slots (left out if the model has no null
    embedding). A biencoder reads no context and has no more than "none" of these. "same corpus, whitened" is the
    first of them with whitened vectors (`retrieval.whiten`): by the corpus alone, without its queries.
    """
    _check_names(sets)
    contextual = embedder.contextual
    elsewhere = None
    if contextual and len(other_documents):
        elsewhere = embedder.embed_context(other_documents, seed)  # one draw for all sets
    results: Scores = {}
    for one in sets:
        contexts: dict[str, Context | None] = {}
        if contextual:
            contexts[SAME_CORPUS] = embedder.embed_context(list(one.corpus.values()), seed)
        if elsewhere is not None:
            contexts[RANDOM_DOCUMENTS] = elsewhere
        if embedder.works_without_context:
            contexts[NO_CONTEXT] = None
        results[one.name] = found = {}
        for kind, context in contexts.items():
            vectors = _encode(embedder, one, context)
            found[kind] = _vector_ndcg(one, *vectors, k)
            if WHITENED not in found:  # of the first kind only
                found[WHITENED] = _vector_ndcg(one, *_whitened(embedder, one, context, *vectors, seed), k)
    return results


def score(embedder: Embedder, one: EvaluationSet, seed: int, k: int = 10) -> float:
    """NDCG@k of one set as the model is meant to be used: a contextual one with context from the set's own corpus."""
    context = embedder.embed_context(list(one.corpus.values()), seed) if embedder.contextual else None
    return _vector_ndcg(one, *_encode(embedder, one, context), k)


def evaluate_baselines(
    sets: Sequence[EvaluationSet], encoders: Mapping[str, Encode] | None = None, k: int = 10
) -> Scores:
    """NDCG@k of BM25 and of each of `encoders`, {kind: texts → vectors}, on every set."""
    _check_names(sets)
    return {
        one.name: {BM25: bm25(one, k)}
        | {kind: vectors_baseline(one, encode, k) for kind, encode in (encoders or {}).items()}
        for one in sets
    }


def bm25(evaluation_set: EvaluationSet, k: int = 10) -> float:
    """NDCG@k of BM25 (bm25s, Lucene's form, k1 = 1.2, b = 0.75; English stop words, no stemming).

    The stop words are scikit-learn's 318: the 33 of bm25s make a weaker baseline on most sets. A document that
    shares no word with the query is not found, rather than ranked by chance.
    """
    import bm25s  # starts a JAX backend when imported, which reading this module must not do

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells everyone its debug messages
    stop_words = sorted(ENGLISH_STOP_WORDS)

    def words(texts):
        return bm25s.tokenize(list(texts), stopwords=stop_words, return_ids=False, show_progress=False)

    documents = words(evaluation_set.corpus.values())
    if not any(documents):  # bm25s cannot index a corpus without a single word
        return ndcg({}, evaluation_set.qrels, k)
    model = bm25s.BM25(k1=1.2, b=0.75, method="lucene")
    model.index(documents, show_progress=False)
    ids = list(evaluation_set.corpus)
    run = {}
    for query, tokens in zip(evaluation_set.queries, words(evaluation_set.queries.values()), strict=True):
        scores = model.get_scores(tokens) if tokens else np.zeros(len(ids))
        best = np.argsort(-scores, kind="stable")[:k]
        run[query] = {ids[i]: float(scores[i]) for i in best if scores[i] > 0}
    return ndcg(run, evaluation_set.qrels, k)


def vectors_baseline(evaluation_set: EvaluationSet, encode: Encode, k: int = 10) -> float:
    """NDCG@k by cosine of what `encode` makes of the raw texts; a vector of zeros scores 0 against everything."""
    queries, documents = (encode(list(texts.values())) for texts in (evaluation_set.queries, evaluation_set.corpus))
    return _vector_ndcg(evaluation_set, _unit(queries), _unit(documents), k)


def combine(*results: Scores) -> Scores:
    """Several results side by side, set by set; the kinds in the order given."""
    together: Scores = {}
    for scores in results:
        for name, kinds in scores.items():
            together.setdefault(name, {}).update(kinds)
    return together


def means(scores: Scores) -> dict[str, float]:
    """The plain mean over the sets of every kind that all sets have."""
    kinds = _kinds(scores)
    complete = [kind for kind in kinds if all(kind in row for row in scores.values())]
    return {kind: float(np.mean([row[kind] for row in scores.values()])) for kind in complete}


def table(scores: Scores, title: str = "NDCG@10") -> str:
    """The scores as text: a row a set, a column a kind, a row of means; "–" where there is no score."""
    kinds = _kinds(scores)
    rows = [[title, *kinds]]
    rows += [[name, *(_cell(row.get(kind)) for kind in kinds)] for name, row in scores.items()]
    mean = means(scores)
    rows.append([MEAN, *(_cell(mean.get(kind)) for kind in kinds)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)])
        for row in rows
    ]
    rule = "─" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _encode(embedder: Embedder, one: EvaluationSet, context: Context | None) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of a set's queries and documents."""
    queries, documents = list(one.queries.values()), list(one.corpus.values())
    return embedder.encode_queries(queries, context), embedder.encode_documents(documents, context)


def _vector_ndcg(one: EvaluationSet, queries: np.ndarray, documents: np.ndarray, k: int) -> float:
    """NDCG@k of unit vectors by cosine."""
    return ndcg(as_run(list(one.queries), list(one.corpus), search(queries, documents, k)), one.qrels, k)


def _whitened(
    embedder: Embedder, one: EvaluationSet, context: Context | None, queries: np.ndarray, documents: np.ndarray, seed
) -> tuple[np.ndarray, np.ndarray]:
    """The vectors as `embed_context(corpus, seed, queries=beginnings(corpus, seed))` has them whitened."""
    stand_ins = embedder.encode_queries(beginnings(list(one.corpus.values()), seed), context)
    random = np.random.default_rng([seed, WHITENING_STREAM])
    found = whitening(stand_ins, documents[random.choice(len(documents), min(SIZE, len(documents)), replace=False)])
    return found.of_queries(queries), found.of_documents(documents)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Rows divided by their norms, float32; a row of zeros stays zero."""
    vectors = np.asarray(vectors, np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def _kinds(scores: Scores) -> list[str]:
    return list(dict.fromkeys(kind for row in scores.values() for kind in row))


def _cell(score: float | None) -> str:
    return "–" if score is None else f"{score:.3f}"


def _check_names(sets: Sequence[EvaluationSet]) -> None:
    """Results are keyed by name; two sets of one name would silently become one."""
    names = [one.name for one in sets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"evaluation sets need different names, these come more than once: {', '.join(twice)}")
