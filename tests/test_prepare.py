"""The prepare stage beyond the plain case: other sources, two surrogates, and what does not fit."""

import logging
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_published
from test_stages import ROOT, bytes_of, config_of, go

from cde_jax.config import from_config_dict
from cde_jax.data.files import read_json
from cde_jax.data.store import Store
from cde_jax.data.tokens import Tokenizer
from cde_jax.stages.workdir import load_prepared


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("done") / "work"
    return workdir, go(data, workdir, "prepare")


@pytest.fixture
def workdir(done, tmp_path):
    return shutil.copytree(done[0], tmp_path / "work")


def test_it_ends_with_a_report_for_the_terminal_as_json_and_as_a_figure(done):
    workdir, (said,) = done
    found = read_json(workdir / "report.json")
    assert found["plan"] == read_json(workdir / "plan/manifest.json")["fingerprint"]
    assert "sample clusters:" in said and found["sample_clusters"][0]["pairs"][0]["query"] in said
    assert (workdir / "report.png").read_bytes().startswith(b"\x89PNG")


def test_parquet_files_are_a_source(data, tmp_path):
    rows = [{"question": f"what is {i}", "document": f"the {i} of many", "kind": "ab"[i % 2]} for i in range(80)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    columns = ("query=question", "domain=kind")
    source = {"data__source": "huggingface", "data__paths": (f"{tmp_path}/rows.parquet",), "data__columns": columns}
    go(data, tmp_path / "work", "prepare", **source)
    pairs = Store.open(tmp_path / "work/store/pairs")
    assert {d["name"]: d["pairs"] for d in pairs.manifest["domains"]} == {"a": 40, "b": 40}
    assert pairs.ragged("query_text").text(3) == "what is 3"


def test_published_collections_are_a_source_with_prefixes_of_their_own(data, tmp_path):
    expected = tiny_published.nomic_paired(tmp_path / "published")
    source = {
        "data__source": "tfds",
        "data__paths": (str(tmp_path / "published"),),
        "data__collections": ("nomic-unsupervised/wikipedia",),
    }
    go(data, tmp_path / "work", "prepare", **source)
    pairs = Store.open(tmp_path / "work/store/pairs")
    assert pairs.manifest["pairs"] == len(expected)
    prefix = "classification: "
    assert pairs.manifest["prefixes"]["domains"] == {"wikipedia": {"query": prefix, "document": prefix}}
    tokenizer = Tokenizer.load(tmp_path / "work/store/tokenizer")
    (tokens,) = tokenizer.encode([prefix + expected[0].query], 8)
    assert pairs.ragged("query_tokens").row(0).tolist() == list(tokens)


def test_two_surrogates_place_and_filter(data, workdir, tmp_path, caplog):
    list(go(data, tmp_path / "trained", train__steps=2))
    spec = f"checkpoint:{tmp_path / 'trained/export'}"
    before = bytes_of(workdir / "store/vectors")
    caplog.set_level(logging.INFO)
    with pytest.raises(ValueError, match="other filter vectors"):
        go(data, workdir, "prepare", batching__filter_surrogate=spec)
    shutil.rmtree(workdir / "plan")
    go(data, workdir, "prepare", batching__filter_surrogate=spec)
    assert bytes_of(workdir / "store/vectors") == before
    manifest = read_json(workdir / "plan/manifest.json")
    assert (manifest["surrogate"], manifest["filter_surrogate"]) == ("lsa", spec)
    assert manifest["filter_vectors"] == Store.open(workdir / "store/filter_vectors").fingerprint
    go(data, workdir, "prepare", batching__filter_surrogate=spec)
    assert "the plan is there and fits" in caplog.text


def test_hard_negatives_are_mined(data, workdir):
    shutil.rmtree(workdir / "plan")
    mined = {"hard_negatives": 2, "mine_first": 1, "mine_last": 6, "mine_margin": -0.5}
    config = {f"batching__{name}": value for name, value in mined.items()}
    go(data, workdir, "prepare", **config)
    pairs, plan, _ = load_prepared(from_config_dict(config_of(data, **config)), workdir)
    assert plan.hard_negatives.shape[2] == 2
    vectors = Store.open(workdir / "store/vectors")
    queries, documents = (vectors.array(name).astype(np.float32) for name in ("queries", "documents"))
    rows = np.asarray(plan.rows).ravel()
    hard = np.einsum("bd,bkd->bk", queries[rows], documents[np.asarray(plan.hard_negatives).reshape(-1, 2)]).mean()
    domain = pairs.array("domain")
    anywhere = np.mean([(queries[d] @ documents[: len(queries)][d].T).mean() for d in (domain == 0, domain == 1)])
    assert hard > anywhere


def test_what_differs_is_named_where_a_store_does_not_fit(data, workdir):
    with pytest.raises(ValueError, match=r"settings\.query_prefix: 'search_query: ' there, 'ask: ' now.*--rebuild"):
        go(data, workdir, "prepare", data__query_prefix="ask: ")
    with pytest.raises(ValueError, match=r"settings\.width: 8 there, 6 now.*--rebuild"):
        go(data, workdir, "prepare", batching__surrogate_width=6)


def test_pairs_of_another_tokenizer_are_refused(data, workdir):
    Tokenizer.train(["other words"] * 9, 70).save(workdir / "store/tokenizer")
    with pytest.raises(ValueError, match="made with another tokenizer: expected fingerprint"):
        load_prepared(from_config_dict(config_of(data)), workdir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__source": "tfds", "data__collections": ("bge",), "data__paths": ()}, "the one folder of their files"),
        ({"data__source": "huggingface", "data__paths": ()}, "name data sets or Parquet files"),
        ({"batching__surrogate_prompts": ("one",)}, "must be empty or"),
        ({"batching__mine_last": 3}, "must be ranks from 1"),
        ({"batching__mine_margin": 3.0}, "mine_margin"),
        ({"batching__domain_weights": ("see=2",)}, "the nearest is .sea"),
        ({"data__source": "tfds", "data__collections": ("beg",), "data__paths": ("x",)}, "did you mean bge"),
    ],
)
def test_bad_settings_are_told_before_anything_is_written(data, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        go(data, tmp_path / "work", "prepare", **changes)
    assert not (tmp_path / "work/plan").exists()


def test_a_work_directory_that_cannot_be_written_to_is_named(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        go(data, tmp_path / "file", "prepare")


def test_collections_cost_nothing_to_those_who_use_none(tmp_path):
    code = "import sys, cde_jax.stages.prepare\nsys.exit(bool({'tensorflow_datasets', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
