"""The arithmetic of paired k-means against its definition on the rows q⊕d and d⊕q, written out."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cde_jax.batching import cluster
from cde_jax.batching.cluster import assign, lloyd, plus_plus, rotate
from cde_jax.data.store import unit_rows


def normal(*shape, seed=0):
    return unit_rows(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def both_rows(rotated):
    """The rows q⊕d, then d⊕q, of rotated pairs."""
    rows = rotate(rotated)
    return np.concatenate([rows, np.roll(rows, rows.shape[1] // 2, axis=1)])


def test_the_rotation_is_its_own_inverse_and_keeps_inner_products():
    rows = normal(7, 10)
    np.testing.assert_allclose(rotate(rotate(rows)), rows, atol=1e-6)
    np.testing.assert_allclose(rotate(rows) @ rotate(rows).T, rows @ rows.T, atol=1e-6)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(n=st.integers(1, 400), k=st.integers(1, 9), width=st.integers(1, 6), seed=st.integers(0, 99))
def test_the_nearest_centroid_is_the_one_of_both_rows_written_out(n, k, width, seed):
    pairs, centroids = normal(n, 2 * width, seed=seed), normal(k, 2 * width, seed=seed + 1)
    scores = both_rows(pairs) @ rotate(centroids).T
    labels, products = assign(pairs, centroids)
    np.testing.assert_allclose(products.ravel(), scores.max(axis=1), atol=1e-5)
    np.testing.assert_allclose(scores[np.arange(2 * n), labels.ravel()], scores.max(axis=1), atol=1e-5)


def test_many_centroids_are_gone_through_in_tiles(monkeypatch):
    pairs, centroids = normal(300, 8), normal(50, 8, seed=1)
    whole = assign(pairs, centroids)
    monkeypatch.setattr(cluster, "TILE", 7)
    np.testing.assert_array_equal(assign(pairs, centroids)[0], whole[0])
    np.testing.assert_array_equal(assign(pairs, np.concatenate([centroids] * 2))[0], whole[0])  # the first of equals


@settings(max_examples=30, derandomize=True, deadline=None)
@given(n=st.integers(20, 300), k=st.integers(1, 6), steps=st.integers(1, 6), seed=st.integers(0, 99))
def test_iterations_are_lloyds_on_both_rows(n, k, steps, seed):
    pairs, begun = normal(n, 8, seed=seed), normal(k, 8, seed=seed + 1)
    found, used = lloyd(pairs, begun, steps, np.random.default_rng(0))
    rows, centroids = both_rows(pairs).astype(np.float64), rotate(begun)
    for _ in range(used):
        labels = (rows @ centroids.T).argmax(axis=1)
        if len(set(labels.tolist())) < k:
            return  # a cluster became empty and was filled: tested below
        centroids = unit_rows(np.stack([rows[labels == number].sum(axis=0) for number in range(k)]))
    np.testing.assert_allclose(rotate(found), centroids, atol=1e-4)


def test_iterations_stop_when_nothing_moves_any_more():
    pairs = normal(3000, 12)
    _, short = lloyd(pairs, pairs[:20], 3, np.random.default_rng(0))
    found, used = lloyd(pairs, pairs[:20], 500, np.random.default_rng(0))
    assert short == 3 < used < 60
    best = assign(pairs, lloyd(pairs, found, 500, np.random.default_rng(0))[0])[1].mean()
    assert assign(pairs, found)[1].mean() >= 0.995 * best
    found, used = pairs[:2], []
    for _ in range(20):
        found, more = lloyd(pairs, found, 500, np.random.default_rng(0))
        used.append(more)
    assert used[-1] == 2  # the second iteration saw that no row had changed its cluster


def test_no_cluster_stays_empty_while_another_can_be_split():
    pairs = normal(200, 6)
    centroids, _ = lloyd(pairs, np.repeat(pairs[:1], 10, axis=0), 50, np.random.default_rng(0))
    assert len(np.unique(assign(pairs, centroids)[0])) == 10


def test_starts_are_rows_far_apart():
    centers = np.repeat(np.eye(6, dtype=np.float32), [900, 5, 5, 5, 5, 5], axis=0)
    rows = rotate(unit_rows(np.concatenate([centers, centers], axis=1) + 0.01 * normal(925, 12)))
    for seed in range(10):
        start = plus_plus(rows, 6, np.random.default_rng(seed))
        assert len(set((rotate(start) @ np.tile(np.eye(6), 2).T).argmax(axis=1).tolist())) == 6


def test_starts_after_the_first_are_drawn_at_once_and_differ(monkeypatch):
    monkeypatch.setattr(cluster, "SEQUENTIAL", 4)
    pairs = np.repeat(normal(30, 8), 2, axis=0)  # each row twice: a row that is chosen leaves its copy no weight
    start = plus_plus(pairs, 25, np.random.default_rng(0))
    assert np.isin(np.abs(start).round(5), np.abs(pairs).round(5)).all()
    assert len(np.unique(start[:4].round(5), axis=0)) == 4
    assert not {tuple(row) for row in start[:4].round(5)} & {tuple(row) for row in start[4:].round(5)}


@pytest.mark.parametrize(("n", "k"), [(10, 3), (4097, 5), (100_000, 196), (2_000_000, 3000)])
def test_samples_grow_by_at_most_the_ratio_to_all_pairs(n, k):
    sizes = cluster.sample_sizes(n, k)
    assert sizes[-1] == n and sizes[0] >= min(n, cluster.PAIRS_PER_CLUSTER * k)
    assert all(a < b <= (cluster.GROWTH + 0.01) * a for a, b in pairwise(sizes))
