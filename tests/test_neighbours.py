"""Nearest neighbours against a plain sort of all cosines or distances."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from cde_jax.batching import negatives
from cde_jax.batching.negatives import Vectors, build_index, load_faiss, nearest_documents, search_selected

repeatable = settings(max_examples=60, derandomize=True, deadline=None)


def cosines(queries, documents):
    """All cosines, in float64."""
    sides = [side.astype(np.float64) for side in (queries, documents)]
    norms = [np.linalg.norm(side, axis=1, keepdims=True) for side in sides]
    queries, documents = (side / np.where(norm > 0, norm, 1) for side, norm in zip(sides, norms, strict=True))
    return queries @ documents.T


def clustered(n, width=8, seed=0):
    """Points in n / 20 loose heaps, as centroids of texts lie."""
    random = np.random.default_rng(seed)
    heaps = random.normal(size=(n // 20, width))
    return (heaps[random.integers(len(heaps), size=n)] + 0.3 * random.normal(size=(n, width))).astype(np.float32)


@repeatable
@given(
    st.integers(1, 15),
    st.integers(0, 5),
    st.integers(1, 20),
    st.booleans(),
    st.sampled_from(["float16", "float32", "float64"]),
    st.integers(0, 999),
)
def test_neighbours_are_those_of_a_sort_of_all(n, others, count, small_pieces, dtype, seed):
    random = np.random.default_rng(seed)
    rows = np.sort(random.choice(n + others, n, replace=False))
    queries, documents = (random.integers(-2, 3, (n + others, 3)).astype(dtype) for _ in range(2))  # equal ones, zeros
    with pytest.MonkeyPatch.context() as patch:
        if small_pieces:  # so that a query's neighbours come from several indexes
            patch.setattr(negatives, "INDEX_BYTES", 3 * 3 * 4)
            patch.setattr(negatives, "READ_BYTES", 2 * 3 * 4)
        ids, scores = nearest_documents(Vectors(queries, documents), rows, count, seed=0)
    found = min(count, n)
    expected = cosines(queries[rows], documents[rows])
    best = np.sort(expected, axis=1)[:, ::-1][:, :found]
    np.testing.assert_allclose(scores[:, :found], best, atol=2e-6)
    np.testing.assert_allclose(np.take_along_axis(expected, ids[:, :found], axis=1), best, atol=2e-6)
    assert all(len(set(row)) == found for row in ids[:, :found].tolist())
    assert (np.diff(ids[:, :found])[np.diff(scores[:, :found]) == 0] > 0).all()
    assert (ids[:, found:] == -1).all() and (scores[:, found:] == -np.inf).all()


@pytest.mark.parametrize("pieces", [1, 2])
def test_inverted_lists_find_nearly_all(monkeypatch, pieces):
    points, rows = clustered(4000, seed=3).astype(np.float16), np.arange(4000)
    exact, _ = nearest_documents(Vectors(points, points), rows, 10, seed=0)
    monkeypatch.setattr(negatives, "EXACT_POINTS", 500)
    monkeypatch.setattr(negatives, "INDEX_BYTES", -(-4000 // pieces) * 8 * 4)
    ids, scores = nearest_documents(Vectors(points, points), rows, 10, seed=0)
    shared = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids.tolist(), exact.tolist(), strict=True)])
    assert 0.95 < shared < 1  # below 1, or the lists were not used at all
    assert (np.diff(scores, axis=1) <= 0).all()
    np.testing.assert_allclose(scores[0], cosines(points[:1], points[ids[0]])[0], atol=1e-4)
    again = nearest_documents(Vectors(points, points), rows, 10, seed=0)
    np.testing.assert_array_equal(again[0], ids)
    np.testing.assert_array_equal(again[1], scores)
    monkeypatch.setattr(negatives, "PROBED", 1)
    ids, scores = nearest_documents(Vectors(points, points), rows, 100, seed=0)
    assert (ids < 0).any() and ((ids < 0) == np.isinf(scores)).all()  # a few lists do not hold so many


def test_neighbours_do_not_depend_on_the_number_of_threads(monkeypatch):
    points, found = clustered(5000, width=24, seed=5), []
    monkeypatch.setattr(negatives, "EXACT_POINTS", 500)
    monkeypatch.setattr(negatives, "THREADED_WORK", 0)
    for threads in (1, 2, 3):
        with threadpool_limits(threads):
            found.append(nearest_documents(Vectors(points, points), np.arange(5000), 10, seed=0))
    for other in found[1:]:
        np.testing.assert_array_equal(other[0], found[0][0])
        np.testing.assert_array_equal(other[1], found[0][1])


def test_an_index_reads_its_points_in_pieces(monkeypatch):
    monkeypatch.setattr(negatives, "READ_BYTES", 7 * 8 * 4)
    points = clustered(100)
    index = build_index(points.__getitem__, 100, 8, (0,), cosine=False)
    distances = ((points[:, None] - points[None]) ** 2).sum(axis=2)
    np.testing.assert_array_equal(index.search(points, 5)[1], distances.argsort(axis=1)[:, :5])


@pytest.mark.parametrize("exact_points", [1000, 100])
def test_the_nearest_selected_point_is_found_however_few_are_left(monkeypatch, exact_points):
    monkeypatch.setattr(negatives, "EXACT_POINTS", exact_points)
    monkeypatch.setattr(negatives, "PROBED", 4)
    points = clustered(600, seed=4)
    index, selected = build_index(points.__getitem__, 600, 8, (0,), cosine=False), bytearray(b"\xff") * 76
    left, nearer = set(range(600)), 0
    for point in np.random.default_rng(0).permutation(600)[:-1].tolist():
        selected[point >> 3] &= ~(1 << (point & 7))
        left.remove(point)
        found = search_selected(index, points[point], selected)
        assert found in left
        distances = ((points - points[point]) ** 2).sum(axis=1)
        nearer += distances[found] > min(distances[i] for i in left) + 1e-5
    assert nearer == 0 if exact_points == 1000 else nearer < 60


@pytest.mark.parametrize("side", [0, 1])
def test_a_broken_row_is_named_by_its_own_number(side):
    sides = [np.ones((9, 3)), np.ones((9, 3))]
    sides[side][7] = np.nan
    with pytest.raises(ValueError, match=r"NaN or infinity in 1 of 3 rows \(first: row 7\)"):
        nearest_documents(Vectors(*sides), np.array([2, 5, 7]), 1, seed=0)


def test_a_missing_faiss_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"cde_jax\[cpu\]'.* 'cde_jax\[cuda\]'"):
        load_faiss()


def test_what_plans_of_large_domains_depend_on_is_as_it_was():
    """Another value is another plan from the same data: change it with a note, not by accident."""
    assert (negatives.EXACT_POINTS, negatives.LIST_ROWS, negatives.LIST_ITERATIONS) == (32_768, 32, 4)
