"""Paired k-means: as good as the reference's, on every row, the same every time."""

import json
import os
import tracemalloc

import numpy as np
import pytest
from conftest import shared
from threadpoolctl import threadpool_limits

from cde_jax.batching import cluster
from cde_jax.batching.cluster import paired_kmeans
from cde_jax.batching.negatives import Vectors
from cde_jax.config import Batching
from cde_jax.data.store import unit_rows

SETTINGS = {"iterations": 30, "tries": 2, "seed": 3}


def cluster_domains(queries, documents, groups, *, seed=3, **settings):
    """`cluster.cluster_domain` of each group by the settings given by name."""
    names = {"dimensions": "cluster_dimensions", "rows": "cluster_rows"}
    settings = {names.get(name, name): value for name, value in settings.items()}
    vectors, settings = Vectors(queries, documents), Batching(**settings)
    return [cluster.cluster_domain(vectors, rows, i, settings, seed) for i, rows in enumerate(groups)]


def blobs(n, k, width, *, noise=0.1, seed=0):
    random = np.random.default_rng(seed)
    centers, label = random.normal(size=(k, width)), random.permutation(np.arange(n) % k)
    queries, documents = (centers[label] + noise * random.normal(size=(n, width)) for _ in range(2))
    return queries.astype(np.float32), documents.astype(np.float32), label


def paired_rows(queries, documents):
    rows = np.concatenate([queries, documents], axis=1)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


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
    for number in range(2):
        mean = rows[nearest == number].mean(axis=0)
        np.testing.assert_allclose(found.centroids[number], mean / np.linalg.norm(mean), atol=1e-5)


def test_same_seed_same_bits_and_more_tries_are_never_worse():
    queries, documents, _ = blobs(200, 12, 5, noise=0.9)
    first = paired_kmeans(queries, documents, 12, iterations=10, tries=1, seed=5)
    again = paired_kmeans(queries, documents, 12, iterations=10, tries=1, seed=5)
    more = paired_kmeans(queries, documents, 12, iterations=10, tries=4, seed=5)
    assert first.assignments.tobytes() == again.assignments.tobytes()
    assert first.centroids.tobytes() == again.centroids.tobytes()
    assert first.objective == again.objective <= more.objective


def test_many_pairs_go_through_growing_samples_repeatably(monkeypatch):
    monkeypatch.setattr(cluster, "FIRST_PAIRS", 60)
    queries, documents, _ = blobs(700, 5, 8, noise=0.9)
    found = [paired_kmeans(queries, documents, 5, **SETTINGS) for _ in range(2)]
    assert found[0].centroids.tobytes() == found[1].centroids.tobytes()
    monkeypatch.undo()
    assert found[0].objective >= 0.98 * paired_kmeans(queries, documents, 5, **SETTINGS).objective


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
        ({"iterations": 0}, "iterations. must be ≥ 1"),
        ({"tries": 0}, "tries. must be ≥ 1"),
    ],
)
def test_settings_out_of_range_are_named(change, message):
    queries, documents, _ = blobs(6, 2, 3)
    with pytest.raises(ValueError, match=message):
        paired_kmeans(queries, documents, **({"k": 2} | SETTINGS | change))


def test_vectors_that_are_not_finite_are_named():
    queries, documents, _ = blobs(6, 2, 3)
    documents[4, 1] = np.nan
    with pytest.raises(ValueError, match=r"documents: .*NaN or infinity in 1 of 6 rows \(first: row 4\)"):
        paired_kmeans(queries, documents, 2, **SETTINGS)
    queries[5, 0] = np.inf
    with pytest.raises(ValueError, match=r"queries: .*NaN or infinity in 1 of 6 rows \(first: row 5\)"):
        paired_kmeans(queries, documents, 2, **SETTINGS)


def test_domains_are_clustered_apart_to_the_size_asked_for():
    queries, documents, label = blobs(50, 5, 6)
    groups = [np.flatnonzero(label < 3), np.flatnonzero(label >= 3)]
    found = cluster_domains(queries, documents, groups, cluster_size=8, **SETTINGS)
    assert [len(clusters.centroids) for clusters in found] == [4, 3]  # ⌈30 / 8⌉ and ⌈20 / 8⌉
    assert [len(clusters.assignments) for clusters in found] == [30, 20]
    whole = cluster_domains(queries, documents, groups, cluster_size=40, **SETTINGS)
    assert [len(clusters.centroids) for clusters in whole] == [1, 1]


def test_a_domain_of_one_pair_is_one_cluster():
    queries, documents, _ = blobs(9, 2, 3)
    found = cluster_domains(queries, documents, [np.array([4]), np.arange(8)], cluster_size=3, **SETTINGS)
    assert found[0].assignments.tolist() == [0]
    mean = unit_rows(queries[4:5] + documents[4:5])  # of q⊕d and d⊕q
    np.testing.assert_allclose(found[0].centroids, np.tile(mean, 2) / np.sqrt(2), atol=1e-6)


def svd(queries, documents, dimensions):
    both = np.concatenate([queries, documents]).astype(np.float64)
    return np.linalg.svd(both, full_matrices=False)[2][:dimensions].T


def test_directions_are_those_of_an_uncentred_svd_of_queries_and_documents():
    queries, documents, _ = blobs(300, 6, 20, noise=0.4)
    queries[:, :5] += 3  # far from the origin, where centring would show, and not where the documents are
    documents[:, 5:] += 2
    found = cluster._projection(Vectors(queries, documents), np.arange(300), 4, np.random.default_rng(0))
    expected = svd(queries, documents, 4)
    np.testing.assert_allclose(np.abs((found * expected).sum(axis=0)), 1, atol=1e-4)


def test_reduced_vectors_have_unit_norm():
    queries, documents, _ = blobs(300, 6, 20, noise=0.4)
    found = cluster_domains(queries, 9 * documents, [np.arange(300)], cluster_size=50, dimensions=4, **SETTINGS)[0]
    halves = [unit_rows((side @ svd(queries, 9 * documents, 4)).astype(np.float32)) for side in (queries, documents)]
    expected = paired_kmeans(*halves, 6, **SETTINGS)
    assert found.centroids.shape == (6, 8)
    assert found.objective == pytest.approx(expected.objective, abs=1e-4)
    assert len(set(zip(found.assignments.tolist(), expected.assignments.tolist(), strict=True))) == 6


@pytest.mark.parametrize("dimensions", [6, 7])
def test_vectors_that_are_narrow_already_are_left_alone(dimensions):
    queries, documents, _ = blobs(60, 3, 6)
    groups = [np.arange(60)]
    plain = cluster_domains(queries, documents, groups, cluster_size=20, **SETTINGS)[0]
    reduced = cluster_domains(queries, documents, groups, cluster_size=20, dimensions=dimensions, **SETTINGS)[0]
    assert plain.centroids.tobytes() == reduced.centroids.tobytes()


def mapped(folder, n, k, width):
    """Vectors of n pairs in float16, on disk only."""
    names, made = ("queries", "documents"), blobs(n, k, width, noise=0.5)
    for name, vectors in zip(names, made, strict=False):
        np.save(folder / f"{name}.npy", vectors.astype(np.float16))
    return [np.load(folder / f"{name}.npy", mmap_mode="r") for name in names]


def test_a_domain_that_does_not_fit_is_trained_on_a_sample_and_assigned_in_blocks(tmp_path, monkeypatch, caplog):
    queries, documents = mapped(tmp_path, 3000, 12, 24)
    group = np.arange(5, 3000)
    whole = cluster_domains(queries, documents, [group], cluster_size=250, **SETTINGS)[0]
    monkeypatch.setattr(cluster, "ASSIGNED", 256)
    monkeypatch.setattr(cluster, "LARGE", 2995)
    caplog.set_level("INFO")
    found = cluster_domains(queries, documents, [group], cluster_size=250, rows=600, **SETTINGS)[0]
    assert "2995 pairs, 12 clusters" in caplog.text and "on 600 pairs" in caplog.text
    rows = paired_rows(queries[group].astype(np.float64), documents[group].astype(np.float64))
    cosines = rows @ found.centroids.T
    np.testing.assert_array_equal(found.assignments, cosines.argmax(axis=1))
    assert found.objective == pytest.approx(cosines.max(axis=1).mean(), abs=1e-6)
    assert found.objective >= 0.98 * whole.objective


def test_a_sample_has_enough_pairs_for_its_clusters(tmp_path, caplog):
    queries, documents = mapped(tmp_path, 500, 4, 6)
    caplog.set_level("DEBUG")
    cluster_domains(queries, documents, [np.arange(500)], cluster_size=125, rows=1, **SETTINGS)
    assert "on 128 pairs" in caplog.text  # 4 clusters of 32


@pytest.mark.usefixtures("usual_gc")
def test_memory_does_not_grow_with_a_domain_but_for_its_assignments(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "ASSIGNED", 2048)
    monkeypatch.setattr(cluster, "BLOCK", 512)
    queries, documents = mapped(tmp_path, 60_000, 8, 64)
    group = np.arange(60_000)
    settings = {"cluster_size": 6000, "rows": 1000, "dimensions": 32, "iterations": 3, "tries": 1, "seed": 0}
    cluster_domains(queries[:2000], documents, [group[:2000]], **settings | {"cluster_size": 200})  # imports
    tracemalloc.start()
    cluster_domains(queries, documents, [group], **settings)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * 2**20  # in memory as a whole it would be 15 MB of rows alone


def test_the_bits_do_not_depend_on_the_number_of_cores(monkeypatch):
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores to choose from")
    monkeypatch.setattr(cluster, "BLOCK_SCORES", 1)
    monkeypatch.setattr(cluster, "BLOCK", 64)
    queries, documents, _ = blobs(700, 9, 70, noise=0.9)
    found, cores = [], os.sched_getaffinity(0)
    for some in (cores, {min(cores)}):
        os.sched_setaffinity(0, some)
        try:
            found += cluster_domains(queries, documents, [np.arange(700)], cluster_size=20, dimensions=64, **SETTINGS)
        finally:
            os.sched_setaffinity(0, cores)
    assert found[0].centroids.tobytes() == found[1].centroids.tobytes()
    assert found[0].assignments.tobytes() == found[1].assignments.tobytes()
