"""False-negative masks and hard negatives, against definitions written the slow way."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cde_jax.batching.negatives import NO_QUERY, choose_hard_negatives, false_negative_mask
from cde_jax.data.store import Ragged

repeatable = settings(max_examples=60, derandomize=True, deadline=None)


def batch_of(seed, batch, hard, width=4):
    """Vectors and keys of a small batch in which some texts are equal."""
    random = np.random.default_rng(seed)
    columns = batch * (1 + hard)
    queries = random.normal(size=(batch, width)).astype(np.float16)
    documents = random.normal(size=(columns, width)).astype(np.float16)
    query_keys = random.integers(1, batch + 2, batch).astype(np.uint64)
    document_keys = random.integers(1, columns + 2, columns).astype(np.uint64)
    own = np.full(columns, NO_QUERY)
    own[:batch] = query_keys
    own[batch:] = random.integers(0, batch + 2, columns - batch)  # 0 is NO_QUERY
    return queries, documents, query_keys, document_keys, own


def score(q, d):
    q, d = q.astype(np.float64), d.astype(np.float64)
    return float(q @ d / np.sqrt((q @ q) * (d @ d)))


@repeatable
@given(
    st.integers(0, 10_000),
    st.integers(1, 6),
    st.integers(0, 2),
    st.none() | st.floats(-1, 1).map(lambda x: round(x, 2)),
)
def test_mask_is_equation_4_and_equal_texts(seed, batch, hard, margin):
    queries, documents, query_keys, document_keys, own = batch_of(seed, batch, hard)
    exempt = np.random.default_rng(seed).random((batch, hard)) < 0.5
    keep = false_negative_mask(queries, documents, query_keys, document_keys, own, margin=margin, exempt=exempt)
    assert keep.shape == (batch, batch * (1 + hard))
    for i in range(batch):
        for j in range(batch * (1 + hard)):
            if i == j:
                assert keep[i, j]
                continue
            equal = document_keys[j] == document_keys[i] or (own[j] != NO_QUERY and own[j] == query_keys[i])
            theirs = j >= batch and (j - batch) // hard == i and exempt[i, (j - batch) % hard]
            excess = (
                0.0 if margin is None else score(queries[i], documents[j]) - score(queries[i], documents[i]) - margin
            )
            if margin is not None and not theirs and abs(excess) < 1e-5:
                continue  # too near the border for two ways of rounding to agree
            assert keep[i, j] == (not (equal or (margin is not None and not theirs and excess > 0)))


def test_a_document_as_good_as_the_positive_is_a_false_negative_at_margin_zero():
    queries = np.random.default_rng(1).normal(size=(3, 33)).astype(np.float16)
    documents = np.repeat(np.random.default_rng(2).normal(size=(1, 33)), 3, axis=0).astype(np.float16)
    keys = np.arange(1, 4, dtype=np.uint64)
    keep = false_negative_mask(queries, documents, keys, keys, keys, margin=0.0)
    np.testing.assert_array_equal(keep, np.eye(3, dtype=bool))
    assert false_negative_mask(queries, documents, keys, keys, keys, margin=0.01).all()


def test_zero_vectors_are_no_trouble():
    keys = np.arange(1, 3, dtype=np.uint64)
    keep = false_negative_mask(np.zeros((2, 3)), np.zeros((2, 3)), keys, keys, keys, margin=0.1)
    assert keep.all()


def ragged(lists):
    sizes = [len(x) for x in lists]
    return Ragged(
        np.array([i for x in lists for i in x], np.int64), np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    )


@repeatable
@given(st.integers(0, 10_000), st.integers(2, 8), st.integers(0, 4))
def test_hard_negatives_are_the_data_s_own_first_and_never_the_positive(seed, n, count):
    random = np.random.default_rng(seed)
    extra = 5
    query_keys = random.integers(1, 4 * n, n).astype(np.uint64)
    document_keys = random.integers(1, 4 * n, n + extra).astype(np.uint64)
    document_keys[n - 1], query_keys[n - 1] = 10_000, 10_000  # so that every other pair has a filler
    document_keys[0], query_keys[0] = 10_001, 10_001  # … and the last pair too
    listed = [[int(x) for x in n + random.permutation(extra)[: random.integers(0, 4)]] for _ in range(n)]
    rows = random.permutation(n)[: random.integers(1, n + 1)]
    chosen, given_ = choose_hard_negatives(
        rows,
        ragged(listed),
        count,
        pool=np.arange(n),
        query_keys=query_keys,
        document_keys=document_keys,
        random=random,
    )
    assert chosen.shape == given_.shape == (len(rows), count)
    for row, documents, from_data in zip(rows, chosen, given_, strict=True):
        usable = [d for d in listed[row] if document_keys[d] != document_keys[row]]
        own = documents[from_data].tolist()
        assert set(own) <= set(usable) and len(set(own)) == len(own) == min(count, len(usable))
        assert all(document_keys[d] != document_keys[row] for d in documents)
        assert all(d < n and query_keys[d] != query_keys[row] for d in documents[~from_data])


def test_fillers_differ_while_there_are_enough():
    keys = np.arange(1, 9, dtype=np.uint64)
    chosen, _ = choose_hard_negatives(
        np.arange(8), ragged([[]] * 8), 7, pool=np.arange(8), query_keys=keys, document_keys=keys,
        random=np.random.default_rng(0),
    )  # fmt: skip
    for row, documents in enumerate(chosen):
        assert sorted(documents.tolist()) == [d for d in range(8) if d != row]


def test_no_possible_filler_is_said():
    keys = np.ones(3, np.uint64)
    with pytest.raises(ValueError, match=r"negative of pair 0, but all 3 .* hard_negatives=0"):
        choose_hard_negatives(
            np.arange(3), ragged([[]] * 3), 1, pool=np.arange(3), query_keys=keys, document_keys=keys,
            random=np.random.default_rng(0),
        )  # fmt: skip
