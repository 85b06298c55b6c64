"""False-negative masks and hard negatives, against definitions written the slow way."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cde_jax.batching.negatives import (
    UNIT,
    TextKeys,
    choose_hard_negatives,
    cosine,
    false_negative_mask,
    rounded_unit_rows,
)
from cde_jax.data.store import Ragged

repeatable = settings(max_examples=60, derandomize=True, deadline=None)


def keys(random, count, different):
    return random.integers(1, different + 1, count).astype(np.uint64)


@repeatable
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 12), st.integers(0, 5))
def test_positives_of_a_query_are_the_documents_of_all_pairs_with_its_text(seed, n, different, extra):
    random = np.random.default_rng(seed)
    query_keys, document_keys = keys(random, n, different), keys(random, n + extra, different)
    known = TextKeys(query_keys, document_keys)
    true = set(zip(query_keys.tolist(), document_keys[:n].tolist(), strict=True))
    everywhere = [[(q, d) in true for d in document_keys.tolist()] for q in query_keys.tolist()]
    np.testing.assert_array_equal(known.is_positive(np.arange(n), np.arange(n + extra)[None]), everywhere)
    different_answers = [len({d for q, d in true if q == query}) for query in query_keys.tolist()]
    np.testing.assert_array_equal(known.positive_texts(np.arange(n)), different_answers)
    rows, documents = random.integers(n, size=6), random.integers(n + extra, size=9)
    for asked in (documents[None], np.stack([random.permutation(documents) for _ in rows])):
        texts = document_keys[np.broadcast_to(asked, (6, 9))].tolist()
        expected = [[(q, d) in true for d in row] for q, row in zip(query_keys[rows].tolist(), texts, strict=True)]
        np.testing.assert_array_equal(known.is_positive(rows, asked), expected)
    answers = [sum((q, d) in true for d in document_keys.tolist()) for q in query_keys.tolist()]
    assert known.most_positives() == max(answers)


def batch_of(seed, batch, hard, width=4):
    """Vectors of a small batch, some of whose texts are equal, its documents' numbers, and the keys of a few pairs."""
    random = np.random.default_rng(seed)
    n, columns = batch + 4, batch * (1 + hard)
    queries = random.normal(size=(batch, width)).astype(np.float16)
    documents = random.normal(size=(columns, width)).astype(np.float16)
    documents[random.integers(columns)] = documents[0]
    text_keys = TextKeys(keys(random, n, batch + 1), keys(random, n + batch * hard, columns + 1))
    return queries, documents, np.concatenate([np.arange(batch), np.arange(n, n + batch * hard)]), text_keys


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
    queries, documents, numbers, text_keys = batch_of(seed, batch, hard)
    exempt = np.random.default_rng(seed).random((batch, hard)) < 0.5
    scores = cosine(queries, documents)
    keep = false_negative_mask(scores, np.arange(batch), numbers, text_keys, margin=margin, exempt=exempt)
    assert keep.shape == (batch, batch * (1 + hard))
    true = set(zip(text_keys.queries.tolist(), text_keys.documents.tolist(), strict=False))
    for i in range(batch):
        for j in range(batch * (1 + hard)):
            if i == j:
                assert keep[i, j]
                continue
            equal = (int(text_keys.queries[i]), int(text_keys.documents[numbers[j]])) in true
            theirs = j >= batch and (j - batch) // hard == i and exempt[i, (j - batch) % hard]
            near = False
            if margin is not None and not theirs:
                own, other = (score(queries[i], documents[k]) for k in (i, j))
                if abs(other - own - margin) < 1e-6 and not np.array_equal(documents[i], documents[j]):
                    continue  # too near the border for two ways of rounding to agree
                near = margin <= 0 if np.array_equal(documents[i], documents[j]) else other >= own + margin
            assert keep[i, j] == (not (equal or near))


def test_a_document_as_good_as_the_positive_is_a_false_negative_at_margin_zero():
    queries = np.random.default_rng(1).normal(size=(3, 33)).astype(np.float16)
    documents = np.repeat(np.random.default_rng(2).normal(size=(1, 33)), 3, axis=0).astype(np.float16)
    scores, different = cosine(queries, documents), np.arange(3, dtype=np.uint64)
    mask = partial(false_negative_mask, scores, np.arange(3), np.arange(3), TextKeys(different, different))
    np.testing.assert_array_equal(mask(margin=0.0), np.eye(3, dtype=bool))
    assert mask(margin=0.01).all()


def test_a_document_exactly_at_the_margin_is_a_false_negative():
    scores, different = np.array([[0.5, 0.75], [0.0, 0.5]]), np.arange(2, dtype=np.uint64)
    mask = partial(false_negative_mask, scores, np.arange(2), np.arange(2), TextKeys(different, different))
    assert mask(margin=0.25).tolist() == [[True, False], [True, True]]
    assert mask(margin=0.2500001).all()


@repeatable
@given(st.integers(0, 10_000), st.integers(1, 300), st.sampled_from([np.float16, np.float32]))
def test_cosine_is_exact_so_that_order_and_place_change_no_bit(seed, width, dtype):
    random = np.random.default_rng(seed)
    queries, documents = (random.normal(size=(count, width)).astype(dtype) for count in (3, 7))
    scores = cosine(queries, documents)
    whole = [[[int(x * UNIT) for x in row] for row in rounded_unit_rows(side)] for side in (queries, documents)]
    exact = [[sum(a * b for a, b in zip(q, d, strict=True)) / 2**52 for d in whole[1]] for q in whole[0]]
    np.testing.assert_array_equal(scores, exact)
    np.testing.assert_allclose(scores, [[score(q, d) for d in documents] for q in queries], atol=1e-7, rtol=0)
    order, turned = random.permutation(7), random.permutation(width)
    np.testing.assert_array_equal(cosine(queries[::-1], documents[order]), scores[::-1, order])
    np.testing.assert_array_equal(cosine(queries[:1], documents[order[:2]]), scores[:1, order[:2]])
    if dtype is np.float16:  # the squares of a norm are summed without rounding too
        np.testing.assert_array_equal(cosine(queries[:, turned], documents[:, turned]), scores)


def test_zero_vectors_are_no_trouble():
    different = TextKeys(*(np.arange(2, dtype=np.uint64),) * 2)
    scores = cosine(np.zeros((2, 3)), np.zeros((2, 3)))
    assert false_negative_mask(scores, np.arange(2), np.arange(2), different, margin=0.1).all()


def ragged(lists):
    sizes = [len(x) for x in lists]
    return Ragged(
        np.array([i for x in lists for i in x], np.int64), np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    )


def choose(rows, count, listed, query_keys, document_keys, *, mined=None, pool=None, random=None):
    n = len(query_keys)
    return choose_hard_negatives(
        np.asarray(rows),
        count,
        np.empty((len(rows), 0), np.int64) if mined is None else mined,
        np.arange(n) if pool is None else pool,
        TextKeys(query_keys, document_keys, ragged(listed)),
        random or np.random.default_rng(0),
    )


@repeatable
@given(st.integers(0, 10_000), st.integers(2, 8), st.integers(0, 4), st.integers(0, 3))
def test_hard_negatives_are_the_data_s_own_then_mined_then_others_and_never_a_positive(seed, n, count, window):
    random = np.random.default_rng(seed)
    extra = 5
    query_keys, document_keys = keys(random, n, 2 * n), keys(random, n + extra, 2 * n)
    document_keys[n - 1], query_keys[n - 1] = 10_000, 10_000  # so that every other pair has a filler
    document_keys[0], query_keys[0] = 10_001, 10_001  # … and the last pair too
    listed = [[int(x) for x in n + random.permutation(extra)[: random.integers(0, 4)]] for _ in range(n)]
    rows = random.permutation(n)[: random.integers(1, n + 1)]
    mined = random.integers(-1, n, (len(rows), window))
    chosen, given_ = choose(rows, count, listed, query_keys, document_keys, mined=mined, random=random)
    assert chosen.shape == given_.shape == (len(rows), count)
    true = set(zip(query_keys.tolist(), document_keys[:n].tolist(), strict=True))

    def usable(row, candidates):
        """The texts among the candidates that are no positive of the row's query."""
        texts = {int(document_keys[d]) for d in candidates if d >= 0}
        return {text for text in texts if (int(query_keys[row]), text) not in true}

    for row, documents, from_data, candidates in zip(rows, chosen, given_, mined.tolist(), strict=True):
        texts = document_keys[documents].tolist()
        assert len(usable(row, documents)) == len(set(texts))  # none is a positive
        own, near = usable(row, listed[row]), usable(row, candidates)
        first, then = min(count, len(own)), min(count, len(own | near))
        assert from_data.tolist() == [True] * first + [False] * (count - first)
        assert set(documents[:first]) <= set(listed[row]) and len(set(texts[:then])) == then
        assert set(documents[first:then]) <= set(candidates)
        assert all(d < n for d in documents[then:])
        everything = own | near | usable(row, range(n))
        assert len(set(texts)) == min(count, len(everything))


def test_more_candidates_than_places_are_chosen_at_random():
    texts = np.arange(1, 31, dtype=np.uint64)
    mined = np.tile(np.arange(10, 30), (8, 1))
    chosen, given_ = choose(np.arange(8), 4, [[]] * 30, texts, texts, mined=mined)
    assert not given_.any() and (chosen >= 10).all()
    assert len(np.unique(chosen)) > 10
    listed = [list(range(30, 50))] * 30
    chosen, given_ = choose(np.arange(8), 4, listed, texts, np.arange(1, 51, dtype=np.uint64), mined=mined)
    assert given_.all() and (chosen >= 30).all() and len(np.unique(chosen)) > 10


def test_fillers_differ_while_there_are_enough():
    texts = np.arange(1, 9, dtype=np.uint64)
    chosen, _ = choose(np.arange(8), 7, [[]] * 8, texts, texts)
    for row, documents in enumerate(chosen):
        assert sorted(documents.tolist()) == [d for d in range(8) if d != row]


def test_few_different_texts_come_twice_rather_than_a_positive():
    texts = np.arange(1, 61, dtype=np.uint64)
    labels = np.repeat(np.array([1, 2], np.uint64), 30)
    chosen, _ = choose(np.arange(60), 3, [[]] * 60, texts, labels)
    assert (labels[chosen] != labels[:, None]).all()
    texts, labels = np.arange(1, 10_001, dtype=np.uint64), np.ones(10_000, np.uint64)
    labels[70:72] = 2  # the draws miss them
    chosen, _ = choose(np.arange(9), 3, [[]] * 10_000, texts, labels)
    assert set(chosen.ravel().tolist()) == {70, 71}


def test_no_possible_filler_is_said():
    texts = np.ones(3, np.uint64)
    with pytest.raises(ValueError, match=r"negative of pair 0, but all 3 .* hard_negatives=0"):
        choose(np.arange(3), 1, [[]] * 3, texts, texts)
