"""Packing: the groups of domains, their weights, and equal batches without a row lost or doubled."""

import copy
import json
from itertools import pairwise

import numpy as np
import pytest
from conftest import shared
from hypothesis import given, settings
from hypothesis import strategies as st

from cde_jax.batching.pack import (
    SMALL_DOMAINS,
    Group,
    arrange,
    document_centroids,
    domain_groups,
    epoch_batches,
    epoch_size,
    greedy_tour,
    weighted,
)

repeatable = settings(max_examples=60, derandomize=True, deadline=None)


def test_clusters_of_a_domain_follow_each_other_as_in_the_reference():
    folder = shared("golden/sampler")
    cases = json.loads((folder / "cases.json").read_text())
    vectors = np.load(folder / "embeddings.npz")["document_embeddings"]
    run = next(r for r in cases["runs"] if r["batch_packing_strategy"] == "tsp_greedy" and "ordered_clusters" in r)
    compared = 0
    for clusters in cases["cluster_assignments_per_domain"]:
        members = list(clusters.values())
        rows = np.concatenate(members)
        assignments = np.repeat(np.arange(len(members)), [len(m) for m in members])
        centroids = document_centroids(vectors, assignments, rows)
        ordered = [sorted(cluster) for cluster in run["ordered_clusters"] if set(cluster) <= set(rows.tolist())]
        start = [sorted(m) for m in members].index(ordered[0])
        assert [sorted(members[i]) for i in greedy_tour(centroids, start)] == ordered
        compared += len(ordered)
    assert compared == len(run["ordered_clusters"]) > 3


def test_centroids_are_plain_means_of_documents():
    documents = np.array([[1, 0], [3, 0], [0, 5]], np.float16)
    np.testing.assert_array_equal(document_centroids(documents, np.array([1, 1, 0]), np.arange(3)), [[0, 5], [2, 0]])
    np.testing.assert_array_equal(document_centroids(documents, np.array([0, 1]), np.array([2, 0])), [[0, 5], [1, 0]])


def test_centroids_are_those_of_each_cluster_s_rows():
    random = np.random.default_rng(0)
    documents, rows = random.normal(size=(60, 3)).astype(np.float16), random.permutation(60)[:50]
    assignments = np.concatenate([np.arange(9), random.integers(9, size=41)])
    centroids = document_centroids(documents, assignments, rows)
    for cluster in range(9):
        mean = documents[rows[assignments == cluster]].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(centroids[cluster], mean, rtol=1e-12)


@repeatable
@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(1, 9), st.integers(0, 9))
def test_domains_smaller_than_a_batch_share_one_group_or_are_left_out(sizes, batch_size, seed):
    domain = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int32)
    names = [f"d{i}" for i in range(len(sizes))]
    small = [i for i, size in enumerate(sizes) if 0 < size < batch_size]
    pooled = sum(sizes[i] for i in small)
    if max(sizes) < batch_size and pooled < batch_size:
        with pytest.raises(ValueError, match=f"at least one batch of {batch_size}"):
            domain_groups(domain, names, batch_size)
        return
    groups, left_out = domain_groups(domain, names, batch_size)
    for group in groups:
        assert len(group.rows) >= batch_size
        assert set(domain[group.rows].tolist()) == set(group.domains)
        assert (group.name == SMALL_DOMAINS) == (group.domains == tuple(small))
    everything = np.concatenate([g.rows for g in groups] + ([left_out.rows] if left_out else []))
    np.testing.assert_array_equal(np.sort(everything), np.arange(len(domain)))
    assert (left_out is not None) == (0 < pooled < batch_size)


@repeatable
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 8), st.integers(0, 99), st.booleans())
def test_an_arrangement_loses_only_the_remainder_and_keeps_clusters_together(n, k, batch_size, seed, tsp):
    random = np.random.default_rng(seed)
    batch_size = min(batch_size, n)
    assignments = np.unique(random.integers(k, size=n), return_inverse=True)[1]
    rows = np.arange(n) * 10
    k = int(assignments.max()) + 1
    centroids = document_centroids(random.normal(size=(n, 3)), assignments, np.arange(n)) if tsp else None
    same = copy.deepcopy(random)
    order = greedy_tour(centroids, int(same.integers(k))) if tsp else same.permutation(k)
    batches = arrange(rows, assignments, centroids, batch_size, random)
    assert batches.shape == (n // batch_size, batch_size)
    flat = batches.ravel()
    assert len(set(flat.tolist())) == len(flat) and set(flat.tolist()) <= set(rows.tolist())
    visited = assignments[flat // 10]
    runs = visited[np.flatnonzero(np.diff(visited, prepend=-1))]
    # Every cluster is one run, in the order given; the gap may only shorten or drop some.
    assert runs.tolist() == [c for c in order.tolist() if c in set(visited.tolist())]


def test_every_row_has_its_turn_over_the_epochs():
    rows, assignments = np.arange(11), np.repeat([0, 1, 2], [5, 3, 3])
    centroids = np.array([[0.0], [1.0], [50.0]])  # a tour always ends in the far one, unless it starts there
    seen = set()
    for epoch in range(30):
        random = np.random.default_rng(epoch)
        seen |= set(arrange(rows, assignments, centroids, 4, random).ravel().tolist())
    assert seen == set(range(11))


@repeatable
@given(
    st.integers(1, 60),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.01, 0.25, 0.5, 0.99, 1.0, 1.5, 2.0, 2.75]),
    st.integers(0, 99),
    st.booleans(),
)
def test_an_epoch_has_each_row_as_often_as_its_weight_says(n, batch_size, weight, seed, tsp):
    batch_size = min(batch_size, n)
    random = np.random.default_rng(seed)
    assignments = np.unique(random.integers(5, size=n), return_inverse=True)[1]
    rows = np.sort(random.choice(1000, n, replace=False))
    centroids = document_centroids(random.normal(size=(n, 3)), assignments, np.arange(n)) if tsp else None
    group = Group("all", (0,), rows, weight, assignments, centroids=centroids)
    batches = epoch_batches(group, batch_size, random)
    assert batches.shape == (epoch_size(group, batch_size), batch_size)
    assert (len(batches) > 0) == (weight > 0)
    assert abs(len(batches) - weight * (n // batch_size)) <= (0.5 if len(batches) > 1 else 1)
    assert all(len(set(batch)) == batch_size for batch in batches.tolist())
    times = np.bincount(batches.ravel(), minlength=1000)
    assert set(np.flatnonzero(times).tolist()) <= set(rows.tolist())
    assert times.max() <= np.ceil(weight)
    lost = np.maximum(int(weight) - times[rows], 0).sum()
    assert lost <= int(weight) * (n % batch_size)  # a whole arrangement loses its remainder only


def test_weight_one_is_a_single_arrangement():
    rows, assignments, centroids = np.arange(23), np.arange(23) % 4, np.random.default_rng(0).normal(size=(4, 3))
    for points in (None, centroids):
        random = np.random.default_rng(5)
        expected = arrange(rows, assignments, points, 5, random)
        again = np.random.default_rng(5)
        group = Group("all", (0,), rows, assignments=assignments, centroids=points)
        np.testing.assert_array_equal(epoch_batches(group, 5, again), expected)
        assert random.random() == again.random()  # and the same random numbers are left for what follows


def test_half_of_a_domain_is_not_always_the_same_half():
    rows, assignments = np.arange(40), np.arange(40) // 10
    group = Group("all", (0,), rows, 0.5, assignments)
    halves = {tuple(sorted(epoch_batches(group, 4, np.random.default_rng(e)).ravel().tolist())) for e in range(20)}
    assert len(halves) == 20 and all(len(half) == 20 for half in halves)
    assert set().union(*halves) == set(range(40))


NAMES = ["wiki", "news", "tiny", "small"]
GROUPS = domain_groups(np.repeat([0, 1, 2, 3], [5, 6, 2, 3]).astype(np.int32), NAMES, 4)[0]


def weights(texts, groups=GROUPS, names=NAMES):
    return [group.weight for group in weighted(groups, texts, names)]


def test_weights_are_those_given_and_else_one():
    assert [group.name for group in GROUPS] == ["wiki", "news", SMALL_DOMAINS]
    assert weights([]) == [1, 1, 1]
    assert weights(["news=0.25", f"{SMALL_DOMAINS}=3", "wiki=0"]) == [0, 0.25, 3]
    assert weights(["a=b=2"], domain_groups(np.zeros(4, np.int32), ["a=b"], 4)[0], ["a=b"]) == [2]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["nwes=1"], "'nwes', no domain of these pairs; the nearest is 'news'"),
        (["tiny=2"], r"'tiny' has fewer pairs than a batch and is in '\(small domains\)'"),
        (["wiki=0", "news=0", "(small domains)=0"], "all are 0"),
    ],
)
def test_weights_that_cannot_be_used(texts, message):
    with pytest.raises(ValueError, match=message):
        weights(texts)


def test_weight_of_a_domain_that_was_left_out():
    groups, left_out = domain_groups(np.repeat([0, 1], [5, 2]).astype(np.int32), ["wiki", "tiny"], 4)
    assert left_out
    with pytest.raises(ValueError, match="'tiny' has fewer pairs than a batch and is left out"):
        weights(["tiny=2"], groups, ["wiki", "tiny"])


def test_small_domains_that_make_exactly_one_batch_are_a_group():
    groups, left_out = domain_groups(np.repeat([0, 1], [2, 3]).astype(np.int32), ["a", "b"], 5)
    assert [len(group.rows) for group in groups] == [5] and left_out is None


def test_rows_of_a_cluster_are_shuffled_anew_in_each_arrangement():
    rows, assignments = np.arange(8), np.zeros(8, np.int64)
    orders = [arrange(rows, assignments, None, 4, np.random.default_rng(seed)).tolist() for seed in range(5)]
    assert all(first != second for first, second in pairwise(orders))


def test_the_remainder_is_left_out_at_any_batch_boundary():
    rows, assignments = np.arange(14), np.arange(14)
    centroids = np.arange(14.0)[:, None] ** 2  # from cluster 0 the tour visits the clusters by number
    gaps = set()
    for seed in range(300):
        random = np.random.default_rng(seed)
        if copy.deepcopy(random).integers(14) == 0:  # this tour starts at cluster 0
            left_out = sorted(set(range(14)) - set(arrange(rows, assignments, centroids, 4, random).ravel().tolist()))
            assert left_out[1] == left_out[0] + 1
            gaps.add(left_out[0])
    assert gaps == {0, 4, 8, 12}
