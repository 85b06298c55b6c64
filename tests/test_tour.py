"""The greedy tour: exact where it says so, and nearly as short on a graph of neighbours."""

import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest
from conftest import shared
from hypothesis import given, settings
from hypothesis import strategies as st

from cde_jax.batching import negatives, pack
from cde_jax.batching.pack import greedy_tour

repeatable = settings(max_examples=60, derandomize=True, deadline=None)


def plain_tour(points, start):
    """By all exact differences in float64."""
    points, order = points.astype(np.float64), [start]
    while len(order) < len(points):
        difference = points - points[order[-1]]
        distance = np.einsum("kd,kd->k", difference, difference)
        distance[order] = np.inf
        order.append(int(distance.argmin()))
    return order


@contextmanager
def graph_of(neighbours, **module):
    """Tours on a graph of so many neighbours, however few the points; `module`: constants of `negatives.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "EXACT_TOUR", 0)
        patch.setattr(pack, "NEIGHBOURS", neighbours)
        for name, value in module.items():
            patch.setattr(negatives, name, value)
        yield


def length(points, order):
    return np.linalg.norm(np.diff(points[order].astype(np.float64), axis=0), axis=1).sum()


def clustered(n, width=8, seed=0):
    """Points in n / 20 loose heaps, as centroids of texts lie."""
    random = np.random.default_rng(seed)
    heaps = random.normal(size=(n // 20, width))
    return (heaps[random.integers(len(heaps), size=n)] + 0.3 * random.normal(size=(n, width))).astype(np.float32)


@pytest.mark.parametrize("case", ["small/seed42", "small/seed43", "large/seed42", "large/seed43"])
def test_tour_is_the_reference_s(case):
    folder = shared("golden/packing")
    centroids = np.load(folder / "inputs.npz")[case.split("/")[0] + "/centroid_embeddings"]
    expected = np.load(folder / "outputs.npz")[f"{case}/no_svd_order"]
    np.testing.assert_array_equal(greedy_tour(centroids, int(expected[0])), expected)


@pytest.mark.usefixtures("usual_gc")
def test_tour_never_holds_all_pairs_of_centroids():
    centroids = np.random.default_rng(0).normal(size=(1500, 4)).astype(np.float32)
    tracemalloc.start()
    greedy_tour(centroids, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1500 * 1500  # a boolean for each pair would be more


@pytest.mark.parametrize("start", [-1, 3, 4])
def test_tour_from_a_start_that_is_not_there(start):
    with pytest.raises(ValueError, match=f"start in 0…2 for 3 centroids, got {start}"):
        greedy_tour(np.eye(3), start)


def test_tour_of_broken_centroids():
    with pytest.raises(ValueError, match="NaN"):
        greedy_tour(np.array([[0.0], [np.nan]]), 0)


@repeatable
@given(
    st.integers(1, 60),
    st.integers(1, 40),
    st.sampled_from([1e-6, 1.0, 1e6]),
    st.sampled_from([0.0, 1e3, 1e9]),
    st.sampled_from(["float16", "float32", "float64"]),
    st.booleans(),
    st.integers(0, 999),
)
def test_the_exact_tour_is_exact_at_any_scale_and_place(k, width, scale, offset, dtype, ties, seed):
    random = np.random.default_rng(seed)
    points = random.integers(0, 2, (k, width)) if ties else random.normal(size=(k, width))
    points = (points * scale + offset).astype(np.float64 if dtype == "float16" and max(scale, offset) > 1e3 else dtype)
    start = int(random.integers(k))
    assert greedy_tour(points, start).tolist() == plain_tour(points, start)


@repeatable
@given(st.integers(2, 60), st.integers(1, 8), st.integers(0, 999), st.booleans())
def test_a_tour_on_a_graph_visits_every_centroid_once(k, neighbours, seed, lists):
    random = np.random.default_rng(seed)
    points = random.integers(0, 4, (k, 2)).astype(np.float32)  # many stand on the same place
    with graph_of(neighbours, **({"EXACT_POINTS": 20, "PROBED": 1} if lists else {})):
        order = greedy_tour(points, 0)
    assert order[0] == 0 and sorted(order.tolist()) == list(range(k))


def test_with_a_complete_graph_the_tour_is_the_exact_one():
    points = np.random.default_rng(0).normal(size=(60, 2))
    with graph_of(60):
        assert greedy_tour(points, 7).tolist() == plain_tour(points, 7)


@pytest.mark.parametrize("lists", [{}, {"EXACT_POINTS": 500}])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_tour_on_a_graph_is_nearly_as_short_as_the_exact_one(seed, lists):
    points = clustered(2000, seed=seed)
    exact = length(points, greedy_tour(points, 0))
    with graph_of(8, **lists):
        order = greedy_tour(points, 0)
        np.testing.assert_array_equal(order, greedy_tour(points, 0))
    assert 0.97 < length(points, order) / exact < 1.03
    assert length(points, np.random.default_rng(0).permutation(2000)) > 3 * exact


def test_more_neighbours_leave_fewer_searches(monkeypatch):
    points, searches = clustered(500), []
    search = pack.search_selected
    monkeypatch.setattr(pack, "search_selected", lambda *a: searches.append(1) or search(*a))
    made = []
    for neighbours in (1, 4, 16):
        searches.clear()
        with graph_of(neighbours):
            greedy_tour(points, 0)
        made.append(len(searches))
    assert 400 > made[0] > 2 * made[1] > 4 * made[2] > 0  # of 499 steps


def test_only_many_centroids_are_toured_on_a_graph(monkeypatch):
    points = clustered(400)
    exact = plain_tour(points, 5)
    monkeypatch.setattr(negatives, "EXACT_POINTS", 50)
    monkeypatch.setattr(negatives, "PROBED", 1)
    monkeypatch.setattr(pack, "EXACT_TOUR", 400)
    assert greedy_tour(points, 5).tolist() == exact
    monkeypatch.setattr(pack, "EXACT_TOUR", 399)
    assert greedy_tour(points, 5).tolist() != exact
