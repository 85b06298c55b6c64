"""The report of a plan: what a person reads is what the plan holds."""

import io

import numpy as np
import pytest
from matplotlib.image import imread
from tiny_pairs import tiny_pairs, tiny_plan, tiny_vectors

from cde_jax.data.files import read_json
from cde_jax.stages import report


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    pairs = tiny_pairs(folder / "pairs", sizes=(40, 26, 3))
    plan = tiny_plan(folder / "plan", pairs, tiny_vectors(folder / "vectors", pairs))
    return pairs, plan, folder, report.write(pairs, plan, folder)


def test_json_holds_each_group_and_the_plan_s_numbers(made):
    pairs, plan, folder, _ = made
    found = read_json(folder / "report.json")
    assert found["plan"] == plan.fingerprint and found["pairs"] == len(pairs.array("domain"))
    assert found["batches"] == len(plan) and found["difficulty"] == plan.manifest["difficulty"]
    assert [group["name"] for group in found["groups"]] == [group["name"] for group in plan.manifest["groups"]]
    assert all({"rows", "clusters", "difficulty", "masked_share"} <= group.keys() for group in found["groups"])
    assert sum(found["cluster_sizes"].values()) == sum(group["clusters"] for group in found["groups"])


def test_sample_clusters_show_pairs_that_share_a_cluster(made):
    pairs, plan, _, _ = made
    queries, documents = pairs.ragged("query_text"), pairs.ragged("document_text")
    samples = report.sample_clusters(pairs, plan)
    assert len(samples) == report.SAMPLE_CLUSTERS
    for sample in samples:
        rows = np.flatnonzero(np.asarray(plan.clusters) == sample["cluster"])
        inside = {(queries.text(row), documents.text(row)) for row in rows.tolist()}
        assert sample["size"] == len(rows)
        assert {(pair["query"], pair["document"]) for pair in sample["pairs"]} <= inside
    assert samples == report.sample_clusters(pairs, plan)


def test_the_terminal_s_text_names_domains_sizes_difficulty_and_samples(made):
    _, plan, folder, said = made
    found = read_json(folder / "report.json")
    for group in plan.manifest["groups"]:
        assert group["name"] in said
    assert f"{found['difficulty']['masked_share']}" in said and "clusters by size" in said
    assert found["sample_clusters"][0]["pairs"][0]["query"] in said
    assert max(map(len, said.splitlines())) < 2 * report.CUT + 20


def test_the_figure_is_a_png_and_the_same_each_time(made):
    _, _, folder, _ = made
    png = (folder / "report.png").read_bytes()
    assert report.figure(read_json(folder / "report.json")) == png
    image = imread(io.BytesIO(png))
    assert image.shape[0] > 400 and image[..., :3].std() > 0.05  # something is drawn


def test_long_texts_and_many_groups_are_cut_on_the_terminal_only(made):
    _, _, folder, _ = made
    found = read_json(folder / "report.json")
    found["groups"] = [dict(found["groups"][0], name=f"group{i}", rows=1000 - i) for i in range(30)]
    said = report.text(found)
    assert "group19" in said and "group20" not in said and "10 more, in report.json" in said
    assert report.figure(found).startswith(b"\x89PNG")
