"""The batch plan: what it promises about rows, masks and hard negatives, and that nothing of it changes unseen."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pairs import tiny_pairs, tiny_vectors

from cde_jax.batching.plan import BatchPlan, build_plan
from cde_jax.data.store import StoreWriter

SETTINGS = {
    "batch_size": 4,
    "method": "clustered",
    "cluster_size": 6,
    "iterations": 10,
    "tries": 2,
    "packing": "tsp",
    "epochs": 2,
    "hard_negatives": 2,
    "margin": 0.1,
    "seed": 7,
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    pairs = tiny_pairs(folder / "pairs", (20, 13, 3, 2))
    return pairs, tiny_vectors(folder / "vectors", pairs)


@pytest.fixture(scope="module")
def plan(stores):
    return build_plan(*stores, **SETTINGS)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    batch_size=st.integers(2, 9),
    method=st.sampled_from(["random", "clustered"]),
    packing=st.sampled_from(["random", "tsp"]),
    cluster_size=st.integers(1, 40),
    hard_negatives=st.integers(0, 3),
    margin=st.none() | st.sampled_from([-0.5, 0.0, 0.3]),
    seed=st.integers(0, 5),
)
def test_rows_once_per_epoch_one_group_per_batch_positives_kept(stores, **changes):
    pairs, vectors = stores
    plan = build_plan(pairs, vectors, **(SETTINGS | {"iterations": 3, "tries": 1} | changes))
    batch, per_epoch = changes["batch_size"], plan.manifest["batches_per_epoch"]
    domain, names = pairs.array("domain"), [d["name"] for d in pairs.manifest["domains"]]
    groups = plan.manifest["groups"]
    left_out = sum(g["left_out"] for g in groups) + plan.manifest["dropped"]["rows"]
    assert len(plan) == 2 * per_epoch == plan.manifest["batches"]
    assert per_epoch * batch + left_out == len(domain)
    for epoch in (plan.rows[:per_epoch], plan.rows[per_epoch:]):
        assert len(np.unique(epoch)) == epoch.size == len(domain) - left_out
    keys, document_keys = pairs.array("query_key"), pairs.array("document_key")
    for step in range(len(plan)):
        rows, group, keep = plan.rows[step], groups[plan.groups[step]], plan.keep(step)
        of = {names[d] for d in domain[rows]}
        assert of <= set(group["domains"])
        assert len(of) == 1 or group["name"] == "(small domains)"
        assert keep.shape == (batch, batch * (1 + changes["hard_negatives"])) and np.diagonal(keep).all()
        columns = plan.documents(step)
        for i in range(batch):
            equal_text = (document_keys[columns] == document_keys[rows[i]]) | np.isin(
                columns, np.flatnonzero(keys == keys[rows[i]])
            )
            equal_text[i] = False
            assert not keep[i][equal_text].any()
            assert (document_keys[plan.hard_negatives[step, i]] != document_keys[rows[i]]).all()


def test_masks_are_equation_4_over_the_stored_vectors(stores):
    pairs, vectors = stores
    plan = build_plan(pairs, vectors, **(SETTINGS | {"margin": -0.2}))
    queries, documents = (vectors.array(name).astype(np.float64) for name in ("queries", "documents"))
    keys, document_keys, listed = pairs.array("query_key"), pairs.array("document_key"), pairs.ragged("negatives")
    removed = 0
    for step in range(len(plan)):
        columns, keep = plan.documents(step).tolist(), plan.keep(step)
        for i, row in enumerate(plan.rows[step].tolist()):
            for j, document in enumerate(columns):
                if j == i:
                    continue
                f = [queries[row] @ documents[d] / np.linalg.norm(queries[row]) / np.linalg.norm(documents[d])
                     for d in (row, document)]  # fmt: skip
                equal = document_keys[document] == document_keys[row]
                equal |= document < len(keys) and keys[min(document, len(keys) - 1)] == keys[row]
                own_hard_negative = j >= 4 and (j - 4) // 2 == i and document in listed.row(row)
                if abs(f[1] - f[0] + 0.2) > 1e-5:
                    assert keep[i, j] == (not (equal or (f[1] >= f[0] - 0.2 and not own_hard_negative)))
                    removed += not (keep[i, j] or equal)
    assert removed > 10  # the margin had something to do


def test_epochs_arrange_the_same_clusters_anew(plan):
    per_epoch = plan.manifest["batches_per_epoch"]
    assert not np.array_equal(plan.rows[:per_epoch], plan.rows[per_epoch:])
    assert len(set(plan.groups[:per_epoch].tolist())) > 1
    assert np.any(np.diff(plan.groups[:per_epoch]) < 0)  # batches of the groups are mixed


def test_small_domains_are_merged_or_dropped_and_counted(stores):
    merged = build_plan(*stores, **SETTINGS).manifest
    pool = merged["groups"][-1]
    assert pool["name"] == "(small domains)" and pool["domains"] == ["domain2", "domain3"]
    assert [pool[count] for count in ("rows", "clusters", "batches", "left_out")] == [5, 1, 1, 1]
    assert merged["dropped"] == {"domains": [], "rows": 0}
    dropped = build_plan(*stores, **(SETTINGS | {"batch_size": 6})).manifest
    assert dropped["dropped"] == {"domains": ["domain2", "domain3"], "rows": 5}
    with pytest.raises(ValueError, match="at least one batch of 99"):
        build_plan(*stores, **(SETTINGS | {"batch_size": 99}))


def test_manifest_tells_how_hard_the_batches_are(stores, plan):
    found = plan.manifest["difficulty"]
    easy = build_plan(*stores, **(SETTINGS | {"method": "random"})).manifest["difficulty"]
    assert found["in_batch_negative_similarity"] > easy["in_batch_negative_similarity"]
    assert 0 < found["masked_share"] < 1
    assert -1 <= found["random_pair_similarity"] <= 1
    assert sum(plan.manifest["cluster_sizes"].values()) == sum(g["clusters"] for g in plan.manifest["groups"])


def test_same_inputs_and_seed_give_the_same_bytes(stores, plan, tmp_path):
    plan.save(tmp_path / "one")
    build_plan(*stores, **SETTINGS).save(tmp_path / "two")
    build_plan(*stores, **(SETTINGS | {"seed": 8})).save(tmp_path / "other")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir()) and len(files) == 5
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert (tmp_path / "one" / "rows.bin").read_bytes() != (tmp_path / "other" / "rows.bin").read_bytes()


@pytest.mark.parametrize("hard_negatives", [0, 2])
def test_a_plan_loads_as_it_was_saved(stores, tmp_path, hard_negatives):
    plan = build_plan(*stores, **(SETTINGS | {"hard_negatives": hard_negatives}))
    plan.save(tmp_path / "plan")
    loaded = BatchPlan.load(tmp_path / "plan")
    np.testing.assert_array_equal(loaded.rows, plan.rows)
    np.testing.assert_array_equal(loaded.hard_negatives, plan.hard_negatives)
    assert loaded.hard_negatives.shape == (len(plan), 4, hard_negatives)
    assert loaded.manifest == plan.manifest and loaded.fingerprint == plan.fingerprint
    for step in range(len(plan)):
        np.testing.assert_array_equal(loaded.keep(step), plan.keep(step))


@pytest.mark.parametrize("name", ["rows.bin", "hard_negatives.bin", "keep_bits.bin", "groups.bin", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_plan_is_named(plan, tmp_path, name, damage):
    plan.save(tmp_path / "plan")
    path = tmp_path / "plan" / name
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-3])
    elif damage == "altered":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.raises(ValueError, match=name):
        BatchPlan.load(tmp_path / "plan")


def test_a_plan_of_other_pairs_or_settings_names_both_fingerprints_and_the_flag(stores, plan):
    pairs, vectors = stores
    plan.verify(pairs.fingerprint, dict(SETTINGS), vectors.fingerprint)
    with pytest.raises(ValueError, match=rf"other pairs.*abc.*{pairs.fingerprint}.*--rebuild"):
        plan.verify("abc", SETTINGS)
    with pytest.raises(ValueError, match=r"other settings: .* \(margin: expected 0.2, got 0.1\).*--rebuild"):
        plan.verify(pairs.fingerprint, SETTINGS | {"margin": 0.2})
    with pytest.raises(ValueError, match=rf"other vectors.*abc.*{vectors.fingerprint}.*--rebuild"):
        plan.verify(pairs.fingerprint, SETTINGS, "abc")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size ≥ 1"),
        ({"batch_size": 1, "hard_negatives": 0}, "two documents"),
        ({"cluster_size": 0}, "cluster_size ≥ 1"),
        ({"epochs": 0}, "epochs ≥ 1"),
        ({"hard_negatives": -1}, "hard_negatives ≥ 0"),
        ({"seed": -1}, "seed ≥ 0"),
        ({"method": "kmeans"}, "random, clustered; got 'kmeans'"),
        ({"packing": "greedy"}, "random, tsp; got 'greedy'"),
        ({"margin": 2.5}, "margin in −2…2"),
        ({"margin": float("nan")}, "margin in −2…2"),
    ],
)
def test_settings_out_of_range_are_named(stores, change, message):
    with pytest.raises(ValueError, match=message):
        build_plan(*stores, **(SETTINGS | change))


def test_vectors_of_other_pairs_are_refused(stores, tmp_path):
    pairs, vectors = stores
    other = tiny_pairs(tmp_path / "other", (20, 13, 3, 2), seed=1)
    with pytest.raises(ValueError, match=rf"{other.fingerprint}.*{pairs.fingerprint}.*--rebuild"):
        build_plan(other, vectors, **SETTINGS)
    with StoreWriter(tmp_path / "short", "vectors") as writer:
        writer.append("queries", vectors.array("queries")[:-1])
        writer.append("documents", vectors.array("documents"))
        short = writer.finish({"pairs": pairs.fingerprint})
    with pytest.raises(ValueError, match="vectors of 38 queries, got 37"):
        build_plan(pairs, short, **SETTINGS)
    with StoreWriter(tmp_path / "narrow", "vectors") as writer:
        writer.append("queries", vectors.array("queries")[:, :5])
        writer.append("documents", vectors.array("documents"))
        narrow = writer.finish({"pairs": pairs.fingerprint})
    with pytest.raises(ValueError, match="queries of 5 and documents of 13"):
        build_plan(pairs, narrow, **SETTINGS)


def test_a_place_outside_the_plan_is_refused(plan):
    with pytest.raises(ValueError, match=f"0…{len(plan) - 1}, got {len(plan)}"):
        plan.keep(len(plan))
    with pytest.raises(ValueError, match="got -1"):
        plan.keep(-1)


def test_the_manifest_is_readable_json(plan, tmp_path):
    plan.save(tmp_path / "plan")
    manifest = json.loads((tmp_path / "plan" / "manifest.json").read_text())
    assert manifest["settings"] == SETTINGS
    assert {"pairs", "vectors", "surrogate", "groups", "dropped", "cluster_sizes", "difficulty"} <= set(manifest)
