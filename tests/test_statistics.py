"""Corpus statistics: BM25 weights of hashed terms."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cde_jax import CorpusStatistics
from cde_jax.adapters.statistics import K1, B, bucket, terms

CORPUS = [
    "The flow over a thin wing at high speed, and the wing's lift",
    "def read_file(path): opens a file and reads its lines",
    "boundary layer flow with heat transfer",
    "lift of a wing in supersonic flow flow flow",
    "heat is transferred by the layer of air",
]


def test_inner_products_are_the_scores_of_bm25():
    import bm25s  # starts a JAX backend: not before cde_jax

    statistics = CorpusStatistics.fit(CORPUS)
    queries = ["wing flow", "heat of the layer", "read file"]
    scores = (statistics.query_weights(queries) @ statistics.document_weights(CORPUS).T).toarray()
    reference = bm25s.BM25(k1=K1, b=B, method="lucene")
    reference.index([terms(text) for text in CORPUS], show_progress=False)
    np.testing.assert_allclose(scores, [reference.get_scores(terms(query)) for query in queries], rtol=1e-5, atol=1e-6)


def test_a_query_term_counts_once_and_an_unknown_one_not_at_all():
    statistics = CorpusStatistics.fit(CORPUS)
    once, twice, unknown = statistics.query_weights(["wing", "wing wing", "wing zeppelin"])
    assert (once != twice).nnz == 0 and (once != unknown).nnz == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Wings of a swept-wing plane", ["wings", "swept", "wing", "plane"]),
        ("parseHTTPResponse get_file_name2", ["parse", "http", "response", "file"]),  # "get", "name": stop words
        ("Über Ärzte, naïve", ["über", "ärzte", "naïve"]),
        ("東京都庁", ["東京", "京都", "都庁"]),
        ("x = 42;", ["42"]),
        ("", []),
    ],
)
def test_terms_are_words_and_parts_of_identifiers(text, expected):
    assert terms(text) == expected


def test_buckets_do_not_depend_on_the_process():
    command = "from cde_jax.adapters.statistics import bucket; print(bucket('wing'), bucket('東京'))"
    output = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout
    assert output.split() == [str(bucket("wing")), str(bucket("東京"))]


@given(st.integers(0, len(CORPUS)), st.permutations(CORPUS))
def test_shards_and_updates_give_the_statistics_of_the_whole(cut, corpus):
    whole = CorpusStatistics.fit(CORPUS)
    empty = CorpusStatistics(0, 0, np.zeros_like(whole.frequencies))
    first, second = empty.update(corpus[:cut]), empty.update(corpus[cut:])
    for other in (first.merge(second), first.update(corpus[cut:])):
        assert (other.documents, other.terms) == (whole.documents, whole.terms)
        np.testing.assert_array_equal(other.frequencies, whole.frequencies)


def test_updating_leaves_the_old_statistics_as_they_were():
    statistics = CorpusStatistics.fit(CORPUS)
    before = statistics.frequencies.copy()
    statistics.update(["wing"])
    np.testing.assert_array_equal(statistics.frequencies, before)


def test_a_corpus_may_be_an_iterator():
    assert CorpusStatistics.fit(iter(CORPUS)).documents == len(CORPUS)


def test_idf_falls_with_the_number_of_documents():
    statistics = CorpusStatistics.fit(CORPUS)
    flow, boundary, absent = (statistics.idf[bucket(word)] for word in ("flow", "boundary", "zeppelin"))
    assert flow == pytest.approx(np.log1p((5 - 3 + 0.5) / 3.5)) and boundary > flow and absent == 0


def test_drift_is_zero_for_the_corpus_itself_and_one_for_new_terms():
    statistics = CorpusStatistics.fit(CORPUS)
    assert statistics.drift(statistics) == 0
    assert statistics.drift(CorpusStatistics.fit(["zeppelin dirigible", "balloon"])) == pytest.approx(1)
    assert 0 < statistics.drift(statistics.update(["wing of a zeppelin"])) < 0.5


def test_saved_statistics_are_small_and_the_same(tmp_path):
    statistics = CorpusStatistics.fit(CORPUS)
    statistics.save(tmp_path / "statistics.safetensors")
    assert (tmp_path / "statistics.safetensors").stat().st_size < 600_000
    loaded = CorpusStatistics.load(tmp_path / "statistics.safetensors")
    assert (loaded.documents, loaded.terms) == (statistics.documents, statistics.terms)
    np.testing.assert_array_equal(loaded.frequencies, statistics.frequencies)


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ([], "got 0 documents"),
        (["the", "?"], "2 documents without any"),
        ("one text", "expected a list of texts"),
    ],
)
def test_corpora_without_terms_are_refused(corpus, message):
    with pytest.raises(ValueError, match=message):
        CorpusStatistics.fit(corpus)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "there is none"), (b"x" * 100, "not safetensors, truncated or altered")]
)
def test_other_files_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        CorpusStatistics.load(tmp_path / "file")
