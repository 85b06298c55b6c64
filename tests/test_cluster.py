"""Paired k-means: as good as the reference's, on every row, the same every time."""

import json

import numpy as np
import pytest
from conftest import shared
from threadpoolctl import threadpool_limits

from cde_jax.batching.cluster import cluster_domains, paired_kmeans, paired_rows

SETTINGS = {"iterations": 30, "tries": 2, "seed": 3}


def blobs(n, k, width, *, noise=0.1, seed=0):
    random = np.random.default_rng(seed)
    centers, label = random.normal(size=(k, width)), random.permutation(np.arange(n) % k)
    queries, documents = (centers[label] + noise * random.normal(size=(n, width)) for _ in range(2))
    return queries.astype(np.float32), documents.astype(np.float32), label


@pytest.mark.parametrize("case", ["separated", "overlapping_fp16"])
@pytest.mark.parametrize("seed", [0, 1, 42])
def test_objective_reaches_the_reference(case, seed):
    folder = shared("golden/clustering")
    reference = json.loads((folder / "config.json").read_text())["cases"][case]
    arrays = np.load(folder / "inputs.npz")
    queries, documents = arrays[f"{case}/q"], arrays[f"{case}/X"]
    found = paired_kmeans(queries, documents, reference["k"], iterations=100, tries=3, seed=seed)
    assert found.objective >= 0.995 * max(reference["reference_objective_by_seed"].values())


def test_objective_is_the_mean_cosine_of_each_pair_to_its_nearest_centroid():
    queries, documents, _ = blobs(60, 4, 6, noise=0.8)
    found = paired_kmeans(queries, documents, 4, **SETTINGS)
    rows = np.concatenate([queries, documents], axis=1).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = rows @ found.centroids.T.astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(found.assignments, cosines.argmax(axis=1))
    assert found.objective == pytest.approx(cosines.max(axis=1).mean(), abs=1e-6)


def test_separated_clusters_are_found():
    queries, documents, label = blobs(120, 6, 8)
    found = paired_kmeans(queries, documents, 6, **SETTINGS)
    assert len({(a, b) for a, b in zip(found.assignments.tolist(), label.tolist(), strict=True)}) == 6


def test_every_row_is_trained_on():
    queries, documents, _ = blobs(900, 2, 3, noise=0.3)  # 1800 rows: FAISS by default would take 512 of them
    found = paired_kmeans(queries, documents, 2, iterations=50, tries=1, seed=0)
    rows = np.concatenate([paired_rows(queries, documents), paired_rows(documents, queries)])
    nearest = (rows @ found.centroids.T).argmax(axis=1)
    for cluster in range(2):
        mean = rows[nearest == cluster].mean(axis=0)
        np.testing.assert_allclose(found.centroids[cluster], mean / np.linalg.norm(mean), atol=1e-5)


def test_same_seed_same_bits_and_more_tries_are_never_worse():
    queries, documents, _ = blobs(200, 12, 5, noise=0.9)
    first = paired_kmeans(queries, documents, 12, iterations=10, tries=1, seed=5)
    again = paired_kmeans(queries, documents, 12, iterations=10, tries=1, seed=5)
    more = paired_kmeans(queries, documents, 12, iterations=10, tries=4, seed=5)
    assert first.assignments.tobytes() == again.assignments.tobytes()
    assert first.centroids.tobytes() == again.centroids.tobytes()
    assert first.objective == again.objective <= more.objective


def test_clusters_of_a_small_domain_do_not_depend_on_the_number_of_cores():
    queries, documents, _ = blobs(400, 12, 40, noise=0.9)
    found = []
    for threads in (1, 4):
        with threadpool_limits(threads):
            found.append(paired_kmeans(queries, documents, 12, iterations=10, tries=1, seed=5))
    assert found[0].centroids.tobytes() == found[1].centroids.tobytes()
    assert found[0].objective == found[1].objective


def test_half_precision_gives_the_clusters_of_single_precision():
    queries, documents, _ = blobs(80, 4, 6)
    half = paired_kmeans(queries.astype(np.float16), documents.astype(np.float16), 4, **SETTINGS)
    full = paired_kmeans(queries, documents, 4, **SETTINGS)
    assert half.centroids.dtype == np.float32
    assert half.objective == pytest.approx(full.objective, abs=1e-3)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_equal_and_zero_rows_stay_finite(k):
    queries = np.zeros((5, 4), np.float32)
    queries[:3] = 1
    found = paired_kmeans(queries, queries, k, **SETTINGS)
    assert np.isfinite(found.centroids).all() and np.isfinite(found.objective)
    assert found.assignments.min() >= 0 and found.assignments.max() < k


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 7}, "1 ≤ k ≤ 6"),
        ({"k": 0}, "k = 0"),
        ({"iterations": 0}, "iterations ≥ 1"),
        ({"tries": 0}, "tries ≥ 1"),
    ],
)
def test_settings_out_of_range_are_named(change, message):
    queries, documents, _ = blobs(6, 2, 3)
    with pytest.raises(ValueError, match=message):
        paired_kmeans(queries, documents, **({"k": 2} | SETTINGS | change))


def test_vectors_that_are_not_finite_are_named():
    queries, documents, _ = blobs(6, 2, 3)
    documents[4, 1] = np.nan
    with pytest.raises(ValueError, match=r"1 of 6 pairs have NaN or infinity .*pair 4"):
        paired_kmeans(queries, documents, 2, **SETTINGS)


def test_domains_are_clustered_apart_to_the_size_asked_for():
    queries, documents, label = blobs(50, 5, 6)
    groups = [np.flatnonzero(label < 3), np.flatnonzero(label >= 3)]
    found = cluster_domains(queries, documents, groups, cluster_size=8, **SETTINGS)
    assert [len(clusters.centroids) for clusters in found] == [4, 3]  # ⌈30 / 8⌉ and ⌈20 / 8⌉
    assert [len(clusters.assignments) for clusters in found] == [30, 20]
    whole = cluster_domains(queries, documents, groups, cluster_size=1000, **SETTINGS)
    assert [len(clusters.centroids) for clusters in whole] == [1, 1]
    with pytest.raises(ValueError, match="cluster_size ≥ 1"):
        cluster_domains(queries, documents, groups, cluster_size=0, **SETTINGS)
