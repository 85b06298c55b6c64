"""Choosing context documents by their vectors."""

import numpy as np
import pytest

from cde_jax.retrieval import choice
from cde_jax.retrieval.choice import CHOICES, facility_location, medoids, most_central


def topics(sizes=(30, 8, 4), width=12, spread=0.05, seed=0):
    """Vectors in well separated groups, and the group of each."""
    random = np.random.default_rng(seed)
    group = np.repeat(np.arange(len(sizes)), sizes)
    order = random.permutation(len(group))
    return (np.eye(width)[group] + spread * random.normal(size=(len(group), width))).astype(np.float32)[order], group[
        order
    ]


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("size", [1, 5, 42, 60])
def test_choices_are_different_rows_and_the_same_each_time(name, size):
    vectors, _ = topics()
    rows = CHOICES[name](vectors, size, 3)
    assert len(rows) == len(np.unique(rows)) == min(size, 42) and rows.min() >= 0 and rows.max() < 42
    np.testing.assert_array_equal(rows, CHOICES[name](vectors, size, 3))
    np.testing.assert_array_equal(np.sort(rows), np.sort(CHOICES[name](100 * vectors, size, 3)))  # lengths do not count


@pytest.mark.parametrize("name", CHOICES)
def test_equal_vectors_are_no_obstacle(name):
    rows = CHOICES[name](np.ones((9, 4), np.float32), 6, 0)
    assert len(np.unique(rows)) == 6


@pytest.mark.parametrize("choose", [medoids, facility_location])
def test_each_topic_has_a_document_however_small(choose):
    vectors, group = topics()
    assert set(group[choose(vectors, 3, 0)]) == {0, 1, 2}


def test_a_medoid_is_the_nearest_to_its_centroid():
    vectors, group = topics()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for row in medoids(vectors, 3, 0):
        members = np.flatnonzero(group == group[row])
        distances = np.linalg.norm(unit[members] - unit[members].mean(axis=0), axis=1)
        assert row == members[distances.argmin()]


def test_facility_location_takes_the_largest_gain_each_time():
    vectors, _ = topics(spread=0.3)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = np.maximum(unit @ unit.T, 0)

    def covered(rows):
        return similarity[rows].max(axis=0).sum() if rows else 0.0

    chosen = facility_location(vectors, 6, 0).tolist()
    for n, row in enumerate(chosen):
        best = max(covered([*chosen[:n], other]) for other in range(42))
        assert covered([*chosen[:n], row]) == pytest.approx(best, abs=1e-4)


def test_the_most_central_are_of_the_largest_topic():
    vectors, group = topics()
    assert set(group[most_central(vectors, 5)]) == {0}
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert most_central(vectors, 1)[0] == (unit @ unit.mean(axis=0)).argmax()


def test_a_large_corpus_is_sampled(monkeypatch):
    monkeypatch.setattr(choice, "MOST", 10)
    vectors, _ = topics()
    for name, choose in CHOICES.items():
        rows = {tuple(np.sort(choose(vectors, 10, seed))) for seed in range(3)}
        assert len(rows) == 3, name
        assert len(choose(vectors, 20, 0)) == 20


def test_bad_input_is_named():
    vectors, _ = topics()
    with pytest.raises(ValueError, match="size"):
        medoids(vectors, 0)
    with pytest.raises(ValueError, match="got NaN or infinity"):
        facility_location(np.float32(vectors * np.nan), 2)
