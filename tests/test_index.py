import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cde_jax.retrieval import index
from cde_jax.retrieval.index import as_run, search


def rows(n, width=8, seed=0):
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 20),
    m=st.integers(1, 60),
    k=st.integers(1, 70),
    query_block=st.integers(1, 21),
    document_block=st.integers(1, 61),
)
def test_blocks_of_any_size_give_the_exact_best(n, m, k, query_block, document_block):
    queries, documents = rows(n), rows(m, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "QUERY_BLOCK", query_block)
        patch.setattr(index, "DOCUMENT_BLOCK", document_block)
        hits = search(queries, documents, k)
    scores = queries @ documents.T
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    assert hits.indices.shape == (n, min(k, m))
    np.testing.assert_array_equal(hits.indices, expected)
    np.testing.assert_allclose(hits.scores, np.take_along_axis(scores, expected, axis=1), atol=1e-5)


def test_more_hits_than_documents_gives_every_document_once():
    hits = search(rows(3), rows(5, seed=1), k=100)
    assert np.sort(hits.indices, axis=1).tolist() == [[0, 1, 2, 3, 4]] * 3


def test_equal_scores_keep_the_order_of_the_documents():
    hits = search(np.ones((1, 4), np.float32), np.ones((6, 4), np.float32), k=6)
    assert hits.indices.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_nothing_to_search_gives_empty_hits():
    assert search(rows(0), rows(5), k=3).indices.shape == (0, 3)
    assert search(rows(2), rows(0), k=3).indices.shape == (2, 0)


def test_half_precision_documents_are_searched_as_float32():
    documents = rows(20).astype(np.float16)
    whole = search(rows(4, seed=1), documents.astype(np.float32), k=5)
    half = search(rows(4, seed=1), documents, k=5)
    np.testing.assert_array_equal(half.indices, whole.indices)
    np.testing.assert_array_equal(half.scores, whole.scores)


@pytest.mark.parametrize("where", ["queries", "documents"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_an_error_that_names_the_row(where, value, monkeypatch):
    monkeypatch.setattr(index, "DOCUMENT_BLOCK", 2)
    vectors = {"queries": rows(4), "documents": rows(9)}
    vectors[where][3, 2] = value
    with pytest.raises(ValueError, match=f"{where}: .* in 1 of . rows .first: row 3"):
        search(**vectors, k=2)


def test_k_below_one_and_different_widths_are_errors():
    with pytest.raises(ValueError, match="integer of 1 or more, got 0"):
        search(rows(2), rows(2), k=0)
    with pytest.raises(ValueError, match="documents: expected vectors of width 8, got 6"):
        search(rows(2), rows(2, width=6), k=1)


def test_a_run_names_queries_and_documents():
    queries = np.eye(2, dtype=np.float32)
    documents = np.array([[0.1, 1.0], [1.0, 0.2]], np.float32)
    run = as_run(["q1", "q2"], ["a", "b"], search(queries, documents, k=2))
    assert list(run["q1"]) == ["b", "a"] and list(run["q2"]) == ["a", "b"]
    assert run["q1"]["a"] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="2 queries need as many query ids, got 1"):
        as_run(["q1"], ["a", "b"], search(queries, documents, k=2))
