"""The laboratory's numbers: NDCG against trec_eval, bootstrap, summary, IDF shift, smaller sets."""

import sys
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from quality import evaluation, scoring, summary

from cde_jax.data.sources.beir import EvaluationSet


def random_run(seed, queries=7, documents=30):
    """Vectors of few values, so that many scores tie, and judgements of several grades, below 0 too."""
    random = np.random.default_rng(seed)
    vectors = [random.integers(0, 3, (n, 3)).astype(np.float32) for n in (queries, documents)]
    judged, relevant = np.nonzero(random.random((queries, documents)) < 0.4)
    return *vectors, judged, relevant, random.integers(-1, 4, len(judged)).astype(np.int32)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("documents", [6, 30])
def test_ndcg_is_that_of_trec_eval(seed, documents):
    queries, corpus, judged, relevant, grades = random_run(seed, documents=documents)
    scores = queries @ corpus.T
    qrels = {f"q{q}": {f"d{d:03}": int(g) for j, d, g in zip(judged, relevant, grades, strict=True) if j == q}
             for q in range(len(queries))}  # fmt: skip
    found = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate(
        {f"q{q}": {f"d{d:03}": float(s) for d, s in enumerate(row)} for q, row in enumerate(scores)}
    )
    expected = [found[f"q{q}"]["ndcg_cut_10"] if f"q{q}" in found else 0.0 for q in range(len(queries))]
    np.testing.assert_allclose(scoring.ndcg(queries, corpus, judged, relevant, grades), expected, atol=1e-6)


def test_ndcg_in_blocks_is_the_same(monkeypatch):
    whole = scoring.ndcg(*random_run(0))
    monkeypatch.setattr(scoring, "SCORES_HELD", 60)
    np.testing.assert_array_equal(scoring.ndcg(*random_run(0)), whole)


def test_the_interval_is_that_of_a_mean():
    random = np.random.default_rng(0)
    differences = [random.normal(0.1, 1.0, (1, n)) for n in (400, 100)]
    mean, low, high = summary.bootstrap(differences)
    assert mean == pytest.approx(np.mean([d.mean() for d in differences]))
    error = np.sqrt(sum(d.var() / d.shape[1] for d in differences)) / 2  # of the mean of two means
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert summary.bootstrap([np.full((3, 5), 0.25)]) == (0.25, 0.25, 0.25)


def test_the_interval_counts_the_spread_of_seeds():
    by_seed = [np.array([[0.0] * 50, [0.2] * 50])] * 3  # queries agree, seeds do not: both, or either twice
    assert summary.bootstrap(by_seed) == pytest.approx((0.1, 0.0, 0.2))


def test_the_summary_pairs_queries_and_falls_back_to_no_context():
    def run(**kinds):
        return {"one": {k: np.array(v) for k, v in kinds.items()}}

    runs = {
        "first": {0: run(none=[0.1, 0.3]), 1: run(none=[0.2, 0.4])},
        "context": {1: {"one": {scoring.SAME: np.array([0.5, 0.5]), scoring.NONE: np.array([0.2, 0.4])}}},
    }
    content = summary.summarise(runs, {"one": 0.7})
    first, same, none = content["rows"]
    assert first["mean"] == 0.25 and first["sd"] == pytest.approx(0.07071, abs=1e-5) and first["difference"] is None
    assert same["difference"][0] == pytest.approx(0.2) and none["difference"] == [0.0, 0.0, 0.0]
    assert content["gains"]["context"]["one"] == {"same − none": 0.2, "same − first": 0.2}
    assert "0.700" in summary.text(content)


def test_a_query_has_no_part_in_its_own_whitening():
    parts = scoring.halves(7, 7, 0)
    assert sorted(np.concatenate([half for half, _ in parts]).tolist()) == list(range(7))
    assert all(sorted([*half, *rest]) == list(range(7)) for half, rest in parts)
    assert [len(rest) for _, rest in scoring.halves(1, 1, 0)] == [0, 1]  # nothing to whiten the one query by
    assert [max(rest) < 3 for _, rest in scoring.halves(7, 3, 0)] == [True, True]


def test_idf_shift_is_the_mean_log_ratio_of_rates():
    training = evaluation.Rates(99, np.array([99, 9, 0]))
    assert evaluation.idf_shift(training, training) == 0
    corpus = evaluation.Rates(99, np.array([99, 49, 0]))
    assert evaluation.idf_shift(training, corpus) == pytest.approx(np.log(49.5 / 9.5) * 49 / 148)


def test_a_cut_keeps_what_is_relevant_and_is_the_same_each_time():
    qrels = {f"q{i}": {f"d{i}": 1, f"d{i + 20}": 0} for i in range(10)} | {"q10": {"d0": 0}}
    queries, corpus = {q: q for q in qrels}, {f"d{i}": "text" for i in range(40)}
    small = evaluation.cut(EvaluationSet("set", queries, corpus, qrels), 4, 9, 0)
    assert len(small.queries) == 4 and len(small.corpus) == 9 and "q10" not in small.queries
    assert all(f"d{query[1:]}" in small.corpus for query in small.queries)
    assert all(document in small.corpus for grades in small.qrels.values() for document in grades)
    assert small == evaluation.cut(EvaluationSet("set", queries, corpus, qrels), 4, 9, 0)
    assert len(evaluation.cut(EvaluationSet("set", queries, corpus, qrels), 0, 0, 0).corpus) == 40
