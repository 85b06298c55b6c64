"""Nearest neighbours against a plain sort of all distances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from cde_jax.batching import neighbours
from cde_jax.batching.neighbours import Unvisited, nearest

repeatable = settings(max_examples=60, derandomize=True, deadline=None)


def scores_of(queries, points, cosine):
    """All scores, greater nearer, in float64."""
    queries, points = queries.astype(np.float64), points.astype(np.float64)
    if not cosine:
        return -((queries[:, None] - points[None]) ** 2).sum(-1)
    norms = [np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, points)]
    queries, points = (x / np.where(norm > 0, norm, 1) for x, norm in zip((queries, points), norms, strict=True))
    return queries @ points.T


def clustered(n, width=8, seed=0):
    """Points in n / 20 loose heaps, as centroids of texts lie."""
    random = np.random.default_rng(seed)
    heaps = random.normal(size=(n // 20, width))
    return (heaps[random.integers(len(heaps), size=n)] + 0.3 * random.normal(size=(n, width))).astype(np.float32)


@repeatable
@given(
    st.integers(1, 12),
    st.integers(1, 15),
    st.integers(1, 20),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["float16", "float32", "float64"]),
    st.integers(0, 999),
)
def test_neighbours_are_those_of_a_sort_of_all(m, n, count, cosine, small_pieces, dtype, seed):
    random = np.random.default_rng(seed)
    queries, points = (random.integers(-2, 3, (size, 3)).astype(dtype) for size in (m, n))  # equal ones, and zeros
    with pytest.MonkeyPatch.context() as patch:
        if small_pieces:  # so that a query's neighbours come from several indexes
            patch.setattr(neighbours, "POINT_BYTES", 3 * 3 * 4)
            patch.setattr(neighbours, "READ_BYTES", 2 * 3 * 4)
        ids, scores = nearest(queries, points, count, seed=0, cosine=cosine)
    found = min(count, n)
    expected = scores_of(queries, points, cosine)
    best = np.sort(expected, axis=1)[:, ::-1][:, :found]
    np.testing.assert_allclose(scores[:, :found] if cosine else -scores[:, :found], best, atol=2e-6)
    np.testing.assert_allclose(np.take_along_axis(expected, ids[:, :found], axis=1), best, atol=2e-6)
    assert all(len(set(row)) == found for row in ids[:, :found].tolist())
    assert (np.diff(ids[:, :found])[np.diff(scores[:, :found]) == 0] > 0).all()
    assert (ids[:, found:] == -1).all() and np.isinf(scores[:, found:]).all()


def test_neighbours_of_some_rows_only():
    queries, points, rows = clustered(200, seed=1), clustered(200, seed=2), np.arange(3, 200, 7)
    ids, scores = nearest(queries, points, 5, seed=0, rows=rows)
    expected = nearest(queries[rows], points[rows], 5, seed=0)
    np.testing.assert_array_equal(ids, expected.ids)
    np.testing.assert_array_equal(scores, expected.scores)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("pieces", [1, 2])
def test_inverted_lists_find_nearly_all(monkeypatch, cosine, pieces):
    points = clustered(4000, seed=3).astype(np.float16)
    exact = nearest(points, points, 10, seed=0, cosine=cosine)
    monkeypatch.setattr(neighbours, "EXACT_POINTS", 500)
    monkeypatch.setattr(neighbours, "POINT_BYTES", -(-4000 // pieces) * 8 * 4)
    ids, scores = nearest(points, points, 10, seed=0, cosine=cosine)
    shared = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids.tolist(), exact.ids.tolist(), strict=True)])
    assert 0.95 < shared < 1  # below 1, or the lists were not used at all
    sign = 1 if cosine else -1
    assert (np.diff(sign * scores, axis=1) <= 0).all()
    np.testing.assert_allclose(sign * scores[0], scores_of(points[:1], points[ids[0]], cosine)[0], atol=1e-4)
    again = nearest(points, points, 10, seed=0, cosine=cosine)
    np.testing.assert_array_equal(again.ids, ids)
    np.testing.assert_array_equal(again.scores, scores)
    monkeypatch.setattr(neighbours, "PROBED", 1)
    ids, scores = nearest(points, points, 100, seed=0, cosine=cosine)
    assert (ids < 0).any() and ((ids < 0) == np.isinf(scores)).all()  # a few lists do not hold so many


def test_neighbours_do_not_depend_on_the_number_of_threads(monkeypatch):
    points, found = clustered(5000, width=24, seed=5), []
    monkeypatch.setattr(neighbours, "EXACT_POINTS", 500)
    monkeypatch.setattr(neighbours, "THREADED_WORK", 0)
    for threads in (1, 2, 3):
        with threadpool_limits(threads):
            found.append(nearest(points, points, 10, seed=0))
    for other in found[1:]:
        np.testing.assert_array_equal(other.ids, found[0].ids)
        np.testing.assert_array_equal(other.scores, found[0].scores)


@pytest.mark.parametrize("exact_points", [1000, 100])
def test_the_nearest_unvisited_point_is_found_however_few_are_left(monkeypatch, exact_points):
    monkeypatch.setattr(neighbours, "EXACT_POINTS", exact_points)
    monkeypatch.setattr(neighbours, "PROBED", 4)
    points = clustered(600, seed=4)
    unvisited, left, nearer = Unvisited(points, seed=0), set(range(600)), 0
    for point in np.random.default_rng(0).permutation(600)[:-1].tolist():
        unvisited.visit(point)
        left.remove(point)
        found = unvisited.nearest(point)
        assert found in left
        distances = ((points - points[point]) ** 2).sum(axis=1)
        nearer += distances[found] > min(distances[i] for i in left) + 1e-5
    assert nearer == 0 if exact_points == 1000 else nearer < 60


@pytest.mark.parametrize(
    ("queries", "points", "count", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 3)), 0, "at least one neighbour .* count = 0"),
        (np.ones((2, 3)), np.ones((2, 4)), 1, "one width, got 3 and 4"),
        (np.ones((2, 3)), np.array([[1.0], [np.nan]]) * np.ones(3), 1, r"1 of those read together \(first: row 1\)"),
        (np.array([[np.inf], [1.0]]) * np.ones(3), np.ones((2, 3)), 1, r"first: row 0"),
    ],
)
def test_vectors_that_cannot_be_searched(queries, points, count, message):
    with pytest.raises(ValueError, match=message):
        nearest(queries, points, count, seed=0)


def test_a_broken_row_is_named_by_its_own_number():
    points = np.ones((9, 3))
    points[7] = np.nan
    with pytest.raises(ValueError, match="first: row 7"):
        nearest(points, points, 1, seed=0, rows=np.array([2, 5, 7]))
