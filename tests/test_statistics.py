"""Token statistics: how rare tokens are in a sample of a corpus."""

import math

import numpy as np
import pytest

from cde_jax.batching.statistics import document_frequencies
from cde_jax.data.store import Ragged

V = 12


def ragged(rows) -> Ragged:
    sizes = [len(row) for row in rows]
    return Ragged(np.array([i for row in rows for i in row], np.uint16), np.cumsum([0, *sizes]).astype(np.int64))


def plain(rows, length, vocab_size):
    """One token at a time."""
    n = len(rows)
    df = [sum(token in row[:length] for row in rows) for token in range(vocab_size)]
    return [math.log((n + 1) / (count + 0.5)) / math.log(2 * (n + 1)) for count in df]


def test_frequencies_are_a_straightforward_count():
    random = np.random.default_rng(0)
    rows = [random.integers(0, 10, random.integers(0, 9)).tolist() for _ in range(30)]
    drawn = random.choice(30, 17, replace=False)
    for length in (1, 4, 20):
        found = document_frequencies(ragged(rows), drawn, length, V)
        assert found.dtype == np.float32 and found.shape == (V,)
        np.testing.assert_allclose(found, plain([rows[i] for i in drawn], length, V), rtol=1e-6)


def test_a_token_in_no_document_has_one_and_one_in_all_has_almost_nothing():
    found = document_frequencies(ragged([[0, 1, 1, 1], [0, 2], [3, 0]] * 100), np.arange(300), 8, V)
    assert (found[4:] == 1.0).all()
    assert 0 < found[0] < 1e-3 < found[1] == found[2] < 1


def test_a_document_counts_a_token_once_and_every_order_is_equal():
    rows = [[1, 2, 1], [2, 2, 3], [5]]
    found = document_frequencies(ragged(rows), np.arange(3), 8, V)
    np.testing.assert_array_equal(found, document_frequencies(ragged(rows), np.array([2, 0, 1]), 8, V))
    np.testing.assert_array_equal(found, document_frequencies(ragged([[1, 2], [3, 2], [5]]), np.arange(3), 8, V))


def test_no_document_at_all_is_not_known_and_missing_rows_are_none():
    rows = ragged([[1, 2], [2, 3]])
    for nothing in (np.zeros(0, np.int64), np.array([-1, -1])):
        np.testing.assert_array_equal(document_frequencies(rows, nothing, 8, V), np.zeros(V))
    np.testing.assert_array_equal(
        document_frequencies(rows, np.array([1, -1]), 8, V), document_frequencies(rows, np.array([1]), 8, V)
    )


def test_a_token_outside_of_the_vocabulary_is_an_error():
    with pytest.raises(ValueError, match="below the vocabulary size 5, got 7: give the vocabulary size of the model"):
        document_frequencies(ragged([[1, 7]]), np.array([0]), 8, 5)
