"""The batch plan: what it promises about rows, masks and hard negatives, and that nothing of it changes unseen."""

import itertools
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pairs import PLAN, bag_of_letters, tiny_pairs, tiny_plan, tiny_vectors

from cde_jax.batching import build, tasks
from cde_jax.batching.build import check_sizes
from cde_jax.batching.plan import ARRAYS, BatchPlan
from cde_jax.batching.vectors import texts_fingerprint
from cde_jax.config import Batching
from cde_jax.data.store import StoreWriter

SETTINGS = Batching(**PLAN).plan_settings(7)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Pairs, the vectors that place them, and those of the filter."""
    folder = tmp_path_factory.mktemp("stores")
    pairs = tiny_pairs(folder / "pairs", (20, 13, 3, 2))
    return (
        pairs,
        tiny_vectors(folder / "vectors", pairs),
        tiny_vectors(folder / "letters", pairs, bag_of_letters),
    )


@pytest.fixture(scope="module")
def plan(stores, tmp_path_factory):
    return tiny_plan(tmp_path_factory.mktemp("plan") / "plan", *stores[:2])


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A place where each plan replaces the one before."""
    return tmp_path_factory.mktemp("scratch") / "plan"


def texts_of_queries(pairs):
    """For each pair the keys of all documents that any pair has for its query's text."""
    queries, documents = pairs.array("query_key").tolist(), pairs.array("document_key").tolist()
    return [{d for q, d in zip(queries, documents, strict=False) if q == query} for query in queries]


def cosines(vectors, row, documents):
    query = vectors.array("queries")[row].astype(np.float64)
    others = vectors.array("documents")[documents].astype(np.float64)
    return others @ query / np.maximum(np.linalg.norm(others, axis=1) * np.linalg.norm(query), 1e-300)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    batch_size=st.integers(2, 9),
    method=st.sampled_from(["random", "clustered"]),
    packing=st.sampled_from(["random", "tsp"]),
    cluster_size=st.integers(1, 38),
    hard_negatives=st.integers(0, 3),
    mine_last=st.integers(0, 4),
    filter_margin=st.none() | st.sampled_from([-0.5, 0.0, 0.3]),
    domain_weights=st.sampled_from([(), ("domain0=0.5",), ("domain0=2.25",), ("domain1=0",)]),
    seed=st.integers(0, 5),
)
def test_a_plan_keeps_its_promises(stores, scratch, **changes):
    pairs, vectors, letters = stores
    changes |= {"iterations": 3, "tries": 1, "mine_first": min(1, changes["mine_last"])}
    plan = tiny_plan(scratch, pairs, vectors, letters, **changes)
    assert_rows_by_the_rule(plan, pairs)
    answers, document_keys = texts_of_queries(pairs), pairs.array("document_key")
    listed = pairs.ragged("negatives")
    for step in range(len(plan)):
        assert np.diagonal(plan.keep(step)).all()
        assert_mask_is_the_definition(plan, step, pairs, letters, answers)
        for row, hard in zip(plan.rows[step].tolist(), plan.hard_negatives[step], strict=True):
            texts = document_keys[hard].tolist()
            assert not answers[row] & set(texts)
            own = [d for d in listed.row(row).tolist() if int(document_keys[d]) not in answers[row]]
            first = min(len(own), len(hard))
            assert set(hard[:first].tolist()) <= set(own)
            assert set(hard[first:].tolist()) <= set(group_rows(plan, step, pairs))


def group_rows(plan, step, pairs):
    names = [domain["name"] for domain in pairs.manifest["domains"]]
    of = [names.index(name) for name in plan.manifest["groups"][plan.groups[step]]["domains"]]
    return np.flatnonzero(np.isin(pairs.array("domain"), of)).tolist()


def assert_rows_by_the_rule(plan, pairs):
    """Each row once an epoch but for the remainder, at most ⌈weight⌉ times; a batch within one group."""
    batch, per_epoch, epochs = plan.rows.shape[1], plan.manifest["batches_per_epoch"], PLAN["epochs"]
    assert len(plan) == epochs * per_epoch == plan.manifest["batches"]
    placed = sum(group["rows"] for group in plan.manifest["groups"]) + plan.manifest["dropped"]["rows"]
    assert placed == len(pairs.array("domain")) == len(plan.clusters)
    for epoch in range(epochs):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        for number, group in enumerate(plan.manifest["groups"]):
            batches = [step for step in steps if plan.groups[step] == number]
            assert len(batches) == group["batches"]
            rows, times = np.unique(plan.rows[batches], return_counts=True)
            assert times.max(initial=0) <= np.ceil(group["weight"])
            assert group["weight"] != 0 or len(batches) == 0
            if group["weight"] == 1:
                assert group["rows"] - len(rows) == group["left_out"] == group["rows"] % batch
    for step in range(len(plan)):
        assert len(np.unique(plan.rows[step])) == batch
        assert set(plan.rows[step].tolist()) <= set(group_rows(plan, step, pairs))


def assert_mask_is_the_definition(plan, step, pairs, vectors, answers):
    """Equation 4 over the filter's vectors, and equal texts; the data's own hard negatives are exempt from ε."""
    rows, columns, keep = plan.rows[step].tolist(), plan.documents(step), plan.keep(step)
    keys, margin = pairs.array("document_key")[columns].tolist(), plan.manifest["settings"]["filter_margin"]
    assert keep.shape == (len(rows), len(columns))
    for i, row in enumerate(rows):
        hard = range(len(rows) + i * plan.hard_negatives.shape[2], len(rows) + (i + 1) * plan.hard_negatives.shape[2])
        f, listed = cosines(vectors, row, columns), pairs.ragged("negatives").row(row)
        for j, document in enumerate(columns.tolist()):
            exempt = j in hard and document in listed
            equal_vectors = np.array_equal(*vectors.array("documents")[[document, row]])
            excess = 0.0 if equal_vectors else f[j] - f[i]
            if j == i:
                assert keep[i, j]
            elif keys[j] in answers[row]:
                assert not keep[i, j]
            elif margin is None or exempt:
                assert keep[i, j]
            elif equal_vectors or abs(excess - margin) > 1e-6:  # nearer, two ways of rounding need not agree
                assert keep[i, j] == (excess < margin)


def test_filter_vectors_decide_masks_and_not_places(stores, plan, scratch):
    pairs, vectors, letters = stores
    other = tiny_plan(scratch, pairs, vectors, letters)
    np.testing.assert_array_equal(other.rows, plan.rows)
    np.testing.assert_array_equal(other.clusters, plan.clusters)
    assert any((other.keep(step) != plan.keep(step)).any() for step in range(len(plan)))
    assert other.manifest["difficulty"] != plan.manifest["difficulty"]
    same = tiny_plan(scratch, pairs, vectors, vectors)
    assert same.fingerprint == plan.fingerprint


def test_hard_negatives_that_the_data_lacks_are_mined(stores, scratch):
    pairs, vectors, letters = stores
    mining = {"hard_negatives": 3, "mine_first": 2, "mine_last": 7, "mine_margin": 0.02}
    plan = tiny_plan(scratch, pairs, vectors, letters, **mining)
    answers, keys, listed = texts_of_queries(pairs), pairs.array("document_key"), pairs.ragged("negatives")
    mined = 0
    for step in range(len(plan)):
        pool = np.array(group_rows(plan, step, pairs))
        for row, hard in zip(plan.rows[step].tolist(), plan.hard_negatives[step].tolist(), strict=True):
            others = np.array([d for d in pool if int(keys[d]) not in answers[row]])
            f = cosines(letters, row, others)
            ranks = np.sort(f)[::-1][1:7]  # the window: ranks 2 … 7
            inside = (f >= ranks.min(initial=2) - 1e-6) & (f <= ranks.max(initial=-2) + 1e-6)
            window = others[inside & (f <= cosines(letters, row, [row]) - 0.02 + 1e-6)].tolist()
            given = sum(int(keys[d]) not in answers[row] for d in listed.row(row))
            sure = len({int(keys[d]) for d in window}) - (len(window) > len(ranks))  # ties at an edge of the window
            assert set(hard[given : given + sure]) <= set(window)
            mined += len(hard[given : given + sure])
    assert mined > 50


def test_epochs_arrange_the_same_clusters_anew(plan):
    per_epoch = plan.manifest["batches_per_epoch"]
    assert not np.array_equal(plan.rows[:per_epoch], plan.rows[per_epoch:])
    assert len(set(plan.groups[:per_epoch].tolist())) > 1
    assert np.any(np.diff(plan.groups[:per_epoch]) < 0)  # batches of the groups are mixed


def test_clusters_are_numbered_through_the_groups(stores, plan, scratch):
    domain, first = stores[0].array("domain"), 0
    for group in plan.manifest["groups"]:
        rows = np.isin(domain, [int(name.removeprefix("domain")) for name in group["domains"]])
        numbers, sizes = np.unique(plan.clusters[rows], return_counts=True)
        np.testing.assert_array_equal(numbers, np.arange(first, first + group["clusters"]))
        assert sizes.sum() == group["rows"] and 0 < group["objective"] <= 1
        first += group["clusters"]
    assert sum(plan.manifest["cluster_sizes"].values()) == first > 5
    for group in plan.manifest["groups"]:
        assert group["clusters"] + group["empty_clusters"] == -(-group["rows"] // PLAN["cluster_size"])
    assert plan.manifest["empty_clusters"] == sum(group["empty_clusters"] for group in plan.manifest["groups"])
    dropped = tiny_plan(scratch, *stores[:2], batch_size=6, domain_weights=("domain1=0",))
    np.testing.assert_array_equal(dropped.clusters == -1, np.isin(domain, [1, 2, 3]))
    assert [group["clusters"] > 0 for group in dropped.manifest["groups"]] == [True, False]
    whole = tiny_plan(scratch, *stores[:2], method="random")
    assert [(group["clusters"], group["objective"]) for group in whole.manifest["groups"]] == [(1, None)] * 3
    assert [group["median_cluster_size"] for group in whole.manifest["groups"]] == [20, 13, 5]
    assert whole.manifest["median_cluster_size"] == 20 and whole.manifest["empty_clusters"] == 0


def test_the_median_cluster_size_is_that_of_a_pair(stores, plan):
    sizes = np.bincount(plan.clusters)[plan.clusters]  # of each pair's cluster
    assert plan.manifest["median_cluster_size"] == np.median(sizes)
    for number, group in enumerate(plan.manifest["groups"]):
        rows = group_rows(plan, int(np.flatnonzero(plan.groups == number)[0]), stores[0])
        assert group["median_cluster_size"] == np.median(sizes[rows])


def test_small_domains_are_merged_or_dropped_and_counted(stores, plan, scratch):
    pool = plan.manifest["groups"][-1]
    assert pool["name"] == "(small domains)" and pool["domains"] == ["domain2", "domain3"]
    assert [pool[count] for count in ("rows", "clusters", "batches", "left_out")] == [5, 1, 1, 1]
    assert plan.manifest["dropped"] == {"domains": [], "rows": 0}
    dropped = tiny_plan(scratch, *stores[:2], batch_size=6).manifest
    assert dropped["dropped"] == {"domains": ["domain2", "domain3"], "rows": 5}
    with pytest.raises(ValueError, match="at least one batch of 99"):
        tiny_plan(scratch, *stores[:2], batch_size=99)


def test_weights_multiply_a_domain_s_batches(stores, plan, scratch):
    weighted = tiny_plan(scratch, *stores[:2], domain_weights=("domain0=0.4", "domain1=2"))
    assert [group["batches"] for group in plan.manifest["groups"]] == [5, 3, 1]
    assert [group["batches"] for group in weighted.manifest["groups"]] == [2, 6, 1]
    assert [group["weight"] for group in weighted.manifest["groups"]] == [0.4, 2, 1]
    np.testing.assert_array_equal(weighted.clusters, plan.clusters)


def test_manifest_tells_how_hard_the_batches_are(stores, scratch):
    pairs, vectors, letters = stores
    plan = tiny_plan(scratch, pairs, vectors, letters)
    found = {number: ([], [], []) for number in range(len(plan.manifest["groups"]))}
    for step in range(len(plan)):
        negatives, positives, masked = found[int(plan.groups[step])]
        keep = plan.keep(step)
        for i, row in enumerate(plan.rows[step].tolist()):
            f = cosines(letters, row, plan.rows[step])
            positives.append(f[i])
            negatives += [f[j] for j in np.flatnonzero(keep[i, : len(f)]) if j != i]
            masked += np.delete(~keep[i], i).tolist()
    for number, group in enumerate(plan.manifest["groups"]):
        names = ("in_batch_negative_similarity", "positive_similarity")
        got = [*(group["difficulty"][name] for name in names), group["masked_share"]]
        np.testing.assert_allclose(got, [np.mean(values) for values in found[number]], atol=2e-6)
    overall = plan.manifest["difficulty"]
    got = [overall[name] for name in (*names, "masked_share")]
    together = [np.mean(np.concatenate(values)) for values in zip(*found.values(), strict=True)]
    np.testing.assert_allclose(got, together, atol=2e-6)
    assert -1 <= overall["random_pair_similarity"] <= 1


def test_same_inputs_and_seed_give_the_same_bytes(stores, tmp_path):
    mining = {"hard_negatives": 3, "mine_first": 1, "mine_last": 5}
    for name, changes in (("one", {}), ("two", {}), ("other", {"seed": 8})):
        tiny_plan(tmp_path / name, *stores[:2], **mining, **changes)
    one, two, other = (
        {file.name: file.read_bytes() for file in sorted((tmp_path / name).iterdir())}
        for name in ("one", "two", "other")
    )
    assert one == two and len(one) == len(ARRAYS) + 3  # masks are two files, and the manifest
    assert {name for name in one if one[name] == other[name]} <= {"masks.offsets.bin"}  # too small to compress


@pytest.mark.usefixtures("usual_gc")
def test_memory_does_not_grow_with_the_number_of_batches(tmp_path):
    pairs = tiny_pairs(tmp_path / "pairs", (300,))
    vectors = tiny_vectors(tmp_path / "vectors", pairs)
    sizes, peaks = [], []
    # Large batches: the peak comes while one is made, on top of all that is held. The first plan warms up.
    for epochs in (1, 2, 80):
        tracemalloc.start()
        try:
            tiny_plan(
                tmp_path / "plan", pairs, vectors, batch_size=250, method="random", packing="random", epochs=epochs
            )
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        sizes.append(sum(file.stat().st_size for file in (tmp_path / "plan").iterdir()))
    assert sizes[2] - sizes[1] > 1_000_000
    assert peaks[2] - peaks[1] < 20_000


def test_a_plan_takes_the_place_of_an_older_one_and_of_nothing_else(stores, plan, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes: expected a free name"):
        tiny_plan(tmp_path / "notes", *stores[:2])
    old = tiny_plan(tmp_path / "plan", *stores[:2])
    with pytest.raises(ValueError, match="filter_margin"):
        tiny_plan(tmp_path / "plan", *stores[:2], filter_margin=3.0)
    assert BatchPlan.load(tmp_path / "plan").fingerprint == old.fingerprint == plan.fingerprint
    new = tiny_plan(tmp_path / "plan", *stores[:2], seed=8)
    assert BatchPlan.load(tmp_path / "plan").fingerprint == new.fingerprint != old.fingerprint
    assert {path.name for path in tmp_path.iterdir()} - {".plan.verified.json"} == {"notes", "plan"}


@pytest.mark.parametrize("name", [*(f"{array}.bin" for array in ARRAYS), "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_plan_is_named(stores, tmp_path, name, damage):
    tiny_plan(tmp_path / "plan", *stores[:2], epochs=1, tries=1)
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


def test_a_plan_of_other_inputs_names_both_fingerprints_and_the_flag(stores, plan, scratch):
    pairs, vectors, letters = stores
    plan.verify(pairs.fingerprint, SETTINGS, vectors.fingerprint, vectors.fingerprint)
    with pytest.raises(ValueError, match=rf"other pairs.*abc.*{pairs.fingerprint}.*--rebuild"):
        plan.verify("abc", SETTINGS)
    with pytest.raises(ValueError, match=r"other settings: .* \(filter_margin: expected 0.2, got 0.1\).*--rebuild"):
        plan.verify(pairs.fingerprint, SETTINGS | {"filter_margin": 0.2})
    with pytest.raises(ValueError, match=rf"other vectors.*abc.*{vectors.fingerprint}.*--rebuild"):
        plan.verify(pairs.fingerprint, SETTINGS, "abc")
    filtered = tiny_plan(scratch, *stores)
    filtered.verify(pairs.fingerprint, SETTINGS, vectors.fingerprint, letters.fingerprint)
    with pytest.raises(ValueError, match=rf"other filter vectors.*{vectors.fingerprint}.*{letters.fingerprint}"):
        filtered.verify(pairs.fingerprint, SETTINGS, vectors.fingerprint, vectors.fingerprint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 39}, "at least one batch of 39 pairs, got 38"),
        ({"cluster_size": 39}, "cluster_size ≤ 38, the number of pairs, got 39"),
        ({"hard_negatives": 38}, "hard_negatives < 38, the number of pairs, got 38"),
        ({"mine_first": 20, "mine_last": 30}, "mine_first < 20, the pairs of the largest domain, got 20"),
        ({"domain_weights": ("domain9=2",)}, "'domain9', no domain"),
        ({"domain_weights": ("domain2=2",)}, "'domain2' has fewer pairs than a batch"),
    ],
)
def test_settings_that_do_not_fit_the_pairs_are_named_before_and_by_the_plan(stores, tmp_path, change, message):
    settings = Batching(**PLAN | change)
    with pytest.raises(ValueError, match=message):
        check_sizes(settings, {"domain0": 20, "domain1": 13, "domain2": 3, "domain3": 2})
    with pytest.raises(ValueError, match=message):
        tiny_plan(tmp_path / "plan", *stores[:2], **change)
    assert not (tmp_path / "plan").exists()


def test_settings_that_fit_their_limits_are_accepted(caplog):
    domains = {"domain0": 20, "domain1": 13}
    unmined = {"mine_first": 20, "mine_last": 30, "hard_negatives": 0}
    for change in ({"cluster_size": 20}, {"hard_negatives": 32}, {"mine_first": 19, "mine_last": 30}, unmined):
        check_sizes(Batching(**PLAN | change), domains)
    check_sizes(Batching(**PLAN | {"method": "random", "cluster_size": 99}), domains)
    assert not caplog.text
    check_sizes(Batching(**PLAN | {"cluster_size": 21}), domains)
    assert "every domain is one cluster: cluster_size is 21, the largest has 20 pairs" in caplog.text


def test_the_number_of_batches_is_known_from_the_counts(plan):
    counts = {"domain0": 20, "domain1": 13, "domain2": 3, "domain3": 2}
    assert check_sizes(Batching(**PLAN), counts) == len(plan)
    weighted = Batching(**PLAN | {"domain_weights": ("domain0=0.4", "domain1=2")})
    assert check_sizes(weighted, counts) == 2 * (2 + 6 + 1)


def test_a_batch_of_more_scores_than_memory_is_refused():
    check_sizes(Batching(batch_size=2**16), {"a": 2**17})
    with pytest.raises(ValueError, match=r"≤ 4.3e\+09 scores in a batch, B²\(1 \+ hard_negatives\), got 8.6e\+09"):
        check_sizes(Batching(batch_size=2**16, hard_negatives=1), {"a": 2**17})


def altered(directory, vectors, **changes):
    """A store of vectors with some of its arrays changed."""
    with StoreWriter(directory, "vectors") as writer:
        for name in ("queries", "documents"):
            writer.append(name, changes.get(name, vectors.array(name)))
        return writer.finish({"texts": vectors.manifest["texts"]})


def test_vectors_that_do_not_fit_are_named(stores, tmp_path):
    pairs, vectors, _ = stores
    other = tiny_pairs(tmp_path / "other", (20, 13, 3, 2), seed=1)
    both = rf"{texts_fingerprint(other)}.*{texts_fingerprint(pairs)}"
    with pytest.raises(ValueError, match=f"vectors are of other texts: .*{both}.*--rebuild"):
        tiny_plan(tmp_path / "plan", other, vectors)
    broken = vectors.array("documents").copy()
    broken[41, 3] = np.nan
    for number, (changes, message) in enumerate(
        [
            ({"queries": vectors.array("queries")[:-1]}, "vectors of 38 queries, got 37"),
            ({"queries": vectors.array("queries")[:, :5]}, "queries of 5, documents of 13"),
            ({"documents": broken}, r"vectors of the documents: .*NaN or infinity in 1 of 44 rows \(first: row 41\)"),
        ]
    ):
        wrong = altered(tmp_path / f"vectors{number}", vectors, **changes)
        with pytest.raises(ValueError, match=message):
            tiny_plan(tmp_path / "plan", pairs, wrong)
        with pytest.raises(ValueError, match=f"the filter's {message}" if number != 1 else message):
            tiny_plan(tmp_path / "plan", pairs, vectors, wrong)
    assert not (tmp_path / "plan").exists()


def bare(folder, query_keys, document_keys, listed=(), topics=0):
    """Pairs of one domain, as far as a plan reads them, and their vectors: noise around `topics`, one for each pair."""
    n = len(query_keys)
    with StoreWriter(folder / "pairs", "pairs") as writer:
        writer.append("query_key", np.array([*query_keys], np.uint64))
        writer.append("document_key", np.array([*document_keys], np.uint64))
        writer.append("domain", np.zeros(n, np.int32))
        writer.append_ragged("negatives", [np.array(row, np.int64) for row in listed or [[]] * n], np.int64)
        pairs = writer.finish({"domains": [{"name": "all", "pairs": n}]})
    random, width = np.random.default_rng(0), np.shape(topics)[-1] if np.ndim(topics) else 3
    with StoreWriter(folder / "vectors", "vectors") as writer:
        for name, count in (("queries", n), ("documents", len(document_keys))):
            writer.append(name, (topics + 0.3 * random.normal(size=(count, width))).astype(np.float16))
        return pairs, writer.finish({"texts": texts_fingerprint(pairs)})


def test_clusters_make_batches_harder(tmp_path):
    topics = np.repeat(np.random.default_rng(1).normal(size=(10, 16)), 12, axis=0)
    stores = bare(tmp_path, range(120), range(120), topics=topics)
    difficulty = {}
    for name, changes in (
        ("small", {"cluster_size": 12}),
        ("large", {"cluster_size": 40}),
        ("random", {"method": "random"}),
    ):
        difficulty[name] = tiny_plan(
            tmp_path / name, *stores, filter_margin=None, hard_negatives=0, **changes
        ).manifest["difficulty"]
    hard, less, easy = (found["in_batch_negative_similarity"] for found in difficulty.values())
    assert hard > less + 0.1 > easy + 0.2
    assert len({found["random_pair_similarity"] for found in difficulty.values()}) == 1


def test_many_masked_negatives_are_warned_of_with_their_share(tmp_path, caplog):
    stores = bare(tmp_path, range(20), [7] * 20)
    plan = tiny_plan(tmp_path / "plan", *stores, hard_negatives=0, cluster_size=20)
    assert plan.manifest["difficulty"]["masked_share"] == 1
    assert "100.0 % of the negatives are masked" in caplog.text
    caplog.clear()
    tiny_plan(tmp_path / "other", *bare(tmp_path / "2", range(20), range(20)), filter_margin=None, hard_negatives=0)
    assert "masked" not in caplog.text


def test_hard_negatives_are_drawn_anew_at_each_step(tmp_path):
    stores = bare(tmp_path, range(40), range(40))
    plan = tiny_plan(tmp_path / "plan", *stores, epochs=6)
    drawn = [plan.hard_negatives[plan.rows == row].tolist() for row in range(40)]  # of a pair, by epoch
    assert sum(first == second for pair in drawn for first, second in itertools.pairwise(pair)) < 10
    whole = tiny_plan(tmp_path / "whole", *stores, batch_size=40, epochs=2)  # one batch an epoch
    assert (whole.hard_negatives[0] == whole.hard_negatives[1]).mean() < 0.3


def test_the_fingerprint_covers_the_content(stores, plan, scratch, monkeypatch):
    monkeypatch.setattr(tasks, "NEGATIVES_STREAM", 99)  # the same inputs and settings, other draws
    other = tiny_plan(scratch, *stores[:2])
    assert other.manifest["settings"] == plan.manifest["settings"] and other.fingerprint != plan.fingerprint


def test_clusters_without_pairs_are_counted(stores, scratch):
    groups = tiny_plan(scratch, *stores[:2], cluster_size=1).manifest["groups"]
    assert [group["clusters"] + group["empty_clusters"] for group in groups] == [20, 13, 5]
    assert sum(group["empty_clusters"] for group in groups) > 0


def test_the_similarity_of_random_pairs_leaves_out_a_query_s_own_document(tmp_path):
    pairs, vectors = bare(tmp_path, range(4), range(4))
    vectors = altered(
        tmp_path / "v", vectors, queries=np.eye(4, dtype=np.float16), documents=np.eye(4, dtype=np.float16)
    )
    plan = tiny_plan(tmp_path / "plan", pairs, vectors, hard_negatives=0, cluster_size=4)
    assert plan.manifest["difficulty"]["random_pair_similarity"] == 0


def test_hard_negatives_that_cannot_be_had_are_told_before_the_work(tmp_path, monkeypatch):
    cluster_groups = build.cluster_groups
    monkeypatch.setattr(build, "cluster_groups", lambda *_: pytest.fail("clustered before the check"))
    few = {"cluster_size": 2, "hard_negatives": 1}
    pairs = bare(tmp_path / "equal", [1, 2, 3, 4], [7, 7, 7, 7])
    with pytest.raises(ValueError, match=r"negative of pair 0, but all 4 .* hard_negatives=0"):
        tiny_plan(tmp_path / "plan", *pairs, **few)
    pairs = bare(tmp_path / "all", [1, 2, 1, 1], [7, 8, 8, 9])  # query 1 has every text
    with pytest.raises(ValueError, match="negative of pair 0"):
        tiny_plan(tmp_path / "plan", *pairs, **few)
    assert not (tmp_path / "plan").exists()
    monkeypatch.setattr(build, "cluster_groups", cluster_groups)
    pairs = bare(tmp_path / "own", [1, 2, 1, 1], [7, 8, 8, 9, 10], listed=[[4], [], [4], [4]])
    plan = tiny_plan(tmp_path / "plan", *pairs, **few)
    assert plan.hard_negatives[plan.rows == 0].tolist() == [[4]] * 2


def test_a_domain_of_one_pair_is_merged_or_named(tmp_path):
    pairs = bare(tmp_path / "one", [1], [7])
    with pytest.raises(ValueError, match="at least one batch of 4 pairs, got 1 pairs"):
        tiny_plan(tmp_path / "plan", *pairs, cluster_size=1)
    pairs = tiny_pairs(tmp_path / "pairs", (9, 3, 1))
    plan = tiny_plan(tmp_path / "plan", pairs, tiny_vectors(tmp_path / "vectors", pairs))
    assert plan.manifest["groups"][1]["domains"] == ["domain1", "domain2"]


def test_a_place_outside_the_plan_is_refused(plan):
    with pytest.raises(ValueError, match=f"0…{len(plan) - 1}, got {len(plan)}"):
        plan.keep(len(plan))
    with pytest.raises(ValueError, match=f"got {len(plan) + 1}"):
        plan.keep(len(plan) + 1)
    with pytest.raises(ValueError, match="got -1"):
        plan.keep(-1)


def test_the_manifest_is_readable_json(stores, plan, tmp_path):
    tiny_plan(tmp_path / "plan", *stores[:2])
    manifest = json.loads((tmp_path / "plan" / "manifest.json").read_text())
    assert manifest["settings"] == SETTINGS
    assert plan.manifest.items() <= manifest.items()
    assert (manifest["surrogate"], manifest["filter_surrogate"]) == ("bag_of_words", "bag_of_words")
