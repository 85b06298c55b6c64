"""Mined hard negatives against the definition written the slow way."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cde_jax.batching import negatives
from cde_jax.batching.negatives import TextKeys, Vectors
from cde_jax.config import Batching

repeatable = settings(max_examples=100, derandomize=True, deadline=None)


def different(n):
    """Keys of n different texts."""
    return np.arange(1, n + 1, dtype=np.uint64)


def mine_hard_negatives(queries, documents, rows, keys, *, first, last, margin):
    """`negatives.mine_hard_negatives` by the settings given by name."""
    settings = Batching(hard_negatives=1, mine_first=first, mine_last=last, mine_margin=margin)
    return negatives.mine_hard_negatives(Vectors(queries, documents), rows, keys, settings, seed=0)


def cosines(query, documents):
    query, documents = query.astype(np.float64), documents.astype(np.float64)
    return documents @ query / np.maximum(np.linalg.norm(query) * np.linalg.norm(documents, axis=1), 1e-12)


def ranked(row, rows, queries, documents, query_keys, document_keys):
    """The group's documents that may be a negative of this pair, nearest first, with their f."""
    answers = {document_keys[i] for i in rows if query_keys[i] == query_keys[row]}
    others = [i for i in rows if document_keys[i] not in answers]
    f = cosines(queries[row], documents[others]) if others else np.empty(0)
    order = np.argsort(-f, kind="stable")
    return np.array(others, np.int64)[order], f[order]


@repeatable
@given(
    st.integers(1, 40),
    st.integers(0, 5),
    st.integers(1, 6),
    st.integers(0, 6),
    st.sampled_from([-2.0, -0.1, 0.0, 0.05, 0.3, 2.0]),
    st.booleans(),
    st.integers(0, 9999),
)
def test_mined_documents_are_those_of_the_definition(n, extra, first, more, margin, equal_texts, seed):
    random = np.random.default_rng(seed)
    queries = random.normal(size=(n, 4)).astype(np.float16)
    documents = random.normal(size=(n + extra, 4)).astype(np.float16)
    documents[:n] += queries  # nearer than the others', mostly
    query_keys, document_keys = different(n), different(n + extra)
    if equal_texts:
        query_keys, document_keys = (random.integers(1, n + 2, m).astype(np.uint64) for m in (n, n + extra))
    rows = np.sort(random.choice(n, random.integers(1, n + 1), replace=False))
    last = first + more
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(negatives, "MINED_BLOCK", 7)
        keys = TextKeys(query_keys, document_keys)
        mined = mine_hard_negatives(queries, documents, rows, keys, first=first, last=last, margin=margin)
    assert mined.shape == (len(rows), max(0, min(last, len(rows)) - first + 1))
    for row, found in zip(rows.tolist(), mined.tolist(), strict=True):
        expected, f = ranked(row, rows.tolist(), queries, documents, query_keys, document_keys)
        own = cosines(queries[row], documents[row : row + 1])[0]
        for rank, document in enumerate(found, start=first):
            if rank > len(f):
                assert document == -1
            elif abs(f[rank - 1] - own + margin) > 1e-5:  # nearer, two ways of rounding need not agree
                assert (document >= 0) == (f[rank - 1] <= own - margin)
            if document >= 0:
                assert document in expected
                np.testing.assert_allclose(cosines(queries[row], documents[[document]])[0], f[rank - 1], atol=1e-5)
        assert len({document for document in found if document >= 0}) == sum(document >= 0 for document in found)


def test_more_answers_than_are_skipped_leave_places_empty_and_never_an_answer(monkeypatch):
    monkeypatch.setattr(negatives, "MOST_SKIPPED", 3)
    random = np.random.default_rng(0)
    queries = np.repeat(random.normal(size=(1, 4)), 20, axis=0)
    documents = np.concatenate([queries[:10] + 0.01 * random.normal(size=(10, 4)), random.normal(size=(10, 4))])
    query_keys = np.concatenate([np.full(10, 1), np.arange(2, 12)]).astype(np.uint64)
    keys = TextKeys(query_keys, different(20))
    mined = mine_hard_negatives(queries, documents, np.arange(20), keys, first=1, last=9, margin=0.0)
    assert (mined[:10, :2] >= 10).all() and (mined[:10, 2:] == -1).all()


def test_mining_many_pairs_finds_nearly_the_same(monkeypatch):
    random = np.random.default_rng(1)
    heaps = random.normal(size=(100, 8))[random.integers(100, size=3000)]
    queries = heaps + 0.4 * random.normal(size=heaps.shape)
    documents = queries + 0.1 * random.normal(size=heaps.shape)
    keys = TextKeys(different(3000), different(3000))
    window = {"first": 3, "last": 12, "margin": 0.02}
    exact = mine_hard_negatives(queries, documents, np.arange(3000), keys, **window)
    monkeypatch.setattr(negatives, "EXACT_POINTS", 500)
    mined = mine_hard_negatives(queries, documents, np.arange(3000), keys, **window)
    assert (mined >= 0).mean() > 0.5 and not np.array_equal(mined, exact)
    both = np.mean([len(set(a) & set(b)) / len(set(a)) for a, b in zip(exact.tolist(), mined.tolist(), strict=True)])
    assert both > 0.9
    np.testing.assert_array_equal(mined, mine_hard_negatives(queries, documents, np.arange(3000), keys, **window))
    monkeypatch.setattr(negatives, "PROBED", 1)
    mined = mine_hard_negatives(queries, documents, np.arange(3000), keys, first=1, last=200, margin=-2.0)
    assert (mined[:, -1] == -1).any()  # a list does not hold so many
    for row, found in enumerate(mined.tolist()):
        found = [document for document in found if document >= 0]
        assert row not in found and len(set(found)) == len(found)


def test_vectors_with_nan_are_refused():
    documents, keys = np.eye(3), TextKeys(different(3), different(3))
    documents[1] = np.nan
    with pytest.raises(ValueError, match="first: row 1"):
        mine_hard_negatives(np.eye(3), documents, np.arange(3), keys, first=1, last=1, margin=0.0)


def test_a_document_exactly_at_the_margin_is_mined():
    keys = TextKeys(different(3), different(3))  # others' documents have cosine 0, a query's own 1
    for margin, count in ((1.0, 6), (1.0001, 0)):
        mined = mine_hard_negatives(np.eye(3), np.eye(3), np.arange(3), keys, first=1, last=2, margin=margin)
        assert (mined >= 0).sum() == count
