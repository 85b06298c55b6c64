"""A work directory: one process at a time, what is kept and what is made again, and what it refuses without a loss."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_stages import ROOT, bytes_of, config_of, go
from tiny_run import write_data, write_lines

from cde_jax.config import Train, from_config_dict
from cde_jax.data.files import read_json, write_json
from cde_jax.stages import prepare
from cde_jax.stages.assemble import run_identity
from cde_jax.stages.train import check_steps
from cde_jax.stages.workdir import load_prepared, locked, read_record


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("done") / "work"
    go(data, workdir, "prepare")
    return workdir


@pytest.fixture
def workdir(done, tmp_path):
    return Path(shutil.copytree(done, tmp_path / "work"))


def changed(workdir: Path, before: dict[str, bytes]) -> set[str]:
    """The folders of store/ and plan/ whose files are not what they were."""
    now = bytes_of(workdir)
    names = {name for name in {**before, **now} if before.get(name) != now.get(name)}
    return {name.rpartition("/")[0] for name in names if name.startswith(("store/", "plan/"))}


# --- one process at a time


def test_a_second_process_is_refused_by_the_pid_of_the_first(data, workdir):
    with locked(workdir), pytest.raises(ValueError, match=f"is used by another process, pid {os.getpid()}: wait"):
        go(data, workdir, "prepare", rebuild=True)
    go(data, workdir, "prepare")


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom cde_jax.stages.workdir import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('locked', flush=True)\n    time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=f"pid {process.pid}"), locked(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
    with locked(tmp_path):
        pass


# --- what is kept


def test_data_that_moved_is_the_same_data(data, workdir, tmp_path, caplog):
    moved = Path(shutil.copytree(data, tmp_path / "elsewhere"))
    before = bytes_of(workdir)
    with caplog.at_level(logging.INFO, logger="cde_jax"):
        go(moved, workdir, "prepare")
    assert not changed(workdir, before) and "the plan is there and fits" in caplog.text
    assert str(data) not in (workdir / "store/pairs/manifest.json").read_text()


@pytest.mark.parametrize(
    ("change", "remade"),
    [
        ({}, set()),
        ({"batching__cluster_size": 20}, {"plan"}),
        ({"batching__surrogate_width": 6}, {"store/vectors", "store/lsa", "plan"}),
        ({"data__query_length": 9}, {"store/pairs", "store/evaluation_tokens/held", "plan"}),
    ],
)
def test_rebuild_makes_again_only_what_does_not_fit(data, workdir, change, remade):
    before = bytes_of(workdir)
    if change:
        with pytest.raises(ValueError, match="--rebuild"):
            go(data, workdir, "prepare", **change)
        assert bytes_of(workdir) == before
    go(data, workdir, "prepare", rebuild=True, **change)
    assert changed(workdir, before) == remade
    config = read_json(workdir / "config.json")["config"]
    for name, value in change.items():
        section, key = name.split("__")
        assert config[section][key] == value


@pytest.mark.parametrize(
    ("missing", "remade"),
    [
        ("store/tokenizer", "store/tokenizer"),
        ("store/lsa", "store/lsa"),
        ("store/vectors/queries.bin", "store/vectors"),
    ],
)
def test_what_is_missing_or_damaged_is_named_and_rebuild_makes_it_again(data, workdir, missing, remade):
    before = bytes_of(workdir)
    path = workdir / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=f"{Path(missing).name}.*--rebuild"):
        go(data, workdir, "prepare")
    if "tokenizer" in missing:
        with pytest.raises(ValueError, match=r"store/tokenizer.*--rebuild"):
            go(data, workdir, "train")
    assert changed(workdir, before) == {remade}
    go(data, workdir, "prepare", rebuild=True)
    assert not changed(workdir, before)


def test_checkpoints_stay_where_a_rebuild_changes_nothing_they_are_tied_to(data, workdir):
    config = from_config_dict(config_of(data))
    identity = run_identity(config, load_prepared(config, workdir).plan)
    write_json(workdir / "training.json", {"identity": identity})
    write_json(workdir / "checkpoints/6/state.json", {})
    go(data, workdir, "prepare", rebuild=True)
    assert (workdir / "checkpoints/6").exists()
    go(data, workdir, "prepare", rebuild=True, batching__cluster_size=20)
    assert not (workdir / "checkpoints").exists() and (workdir / "checkpoints.before-1/6").exists()


# --- vectors shared by content


def test_work_directories_share_vectors_by_their_content(data, done, tmp_path, monkeypatch):
    cache = str(tmp_path / "cache")
    go(data, tmp_path / "first", "prepare", batching__vectors_cache=cache)
    monkeypatch.setattr(prepare, "write_vectors", lambda *_, **__: pytest.fail("vectors are encoded again"))
    go(data, tmp_path / "second", "prepare", batching__vectors_cache=cache, batching__batch_size=8)
    for name in ("store/vectors", "store/lsa"):
        assert bytes_of(tmp_path / "second" / name) == bytes_of(done / name)
    assert (tmp_path / "first/store/vectors/queries.bin").stat().st_nlink == 3
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("another file system")))
    go(data, tmp_path / "third", "prepare", batching__vectors_cache=cache)
    assert bytes_of(tmp_path / "third/store/vectors") == bytes_of(done / "store/vectors")
    monkeypatch.undo()
    go(data, tmp_path / "fourth", "prepare", batching__vectors_cache=cache, batching__surrogate_width=6)
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 4  # vectors and LSA of two widths


# --- JSON files that hold something else


@pytest.mark.parametrize("content", ["[]", "3", "{", '{"config": 3}', '{"other": {}}'])
def test_a_config_json_of_something_else_is_named(data, workdir, content):
    (workdir / "checkpoints/6").mkdir(parents=True)
    (workdir / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        go(data, workdir, "train")
    assert (workdir / "config.json").read_text() == content


def test_records_are_objects_with_their_keys(tmp_path):
    file = tmp_path / "x.json"
    assert read_record(file, a=str) is None
    for content in ([], {"a": 3}, {"b": "x"}, "a"):
        write_json(file, content)
        with pytest.raises(ValueError, match=r"x\.json: expected an object with a, found something else"):
            read_record(file, a=str)
    write_json(file, {"a": "x", "b": 3})
    assert read_record(file, a=str) == {"a": "x", "b": 3}


# --- bad input, before anything is written


def bad_set(folder: Path, **files: str) -> Path:
    """A copy of the evaluation set with other files; an empty content is a file that is not there."""
    write_data(folder)
    for name, content in files.items():
        path = folder / "held" / name.replace("__", ".")
        path.write_text(content) if content else path.unlink()
    return folder / "held"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"corpus__jsonl": ""}, "expected corpus.jsonl"),
        ({"qrels__tsv": ""}, "expected qrels.tsv"),
        ({"qrels__tsv": "query-id\tcorpus-id\tscore\n"}, r"qrels\.tsv"),
        ({"qrels__tsv": "q0\td0\t0\n"}, "scores above 0, found none"),
        ({"qrels__tsv": "q0\tnowhere\t1\n"}, "names the document 'nowhere'"),
        ({"qrels__tsv": "q0\td0\tone\nq0\td1\t1\n"}, "expected an integer score"),
        ({"qrels__tsv": "q0\td0\t1\nq0\td0\t1\n"}, "was there before"),
        ({"queries__jsonl": '{"_id": "q0", "text": 3}\n'}, "expected text as 'text', got int"),
        (
            {"corpus__jsonl": '{"_id": "d0", "text": "a"}\n{"_id": "d0", "text": "b"}\n'},
            "the _id 'd0' was there before",
        ),
    ],
)
def test_evaluation_sets_are_checked_before_anything_is_written(data, tmp_path, files, message):
    folder = bad_set(tmp_path / "bad", **files)
    for stage in ("all", "prepare", "evaluate"):
        with pytest.raises(ValueError, match=message):
            go(data, tmp_path / "work", stage, data__evaluation=(str(folder),))
    assert not (tmp_path / "work").exists()


def test_inputs_are_checked_before_anything_is_written(data, tmp_path):
    cases = [
        ({"data__evaluation": ("nowhere",)}, "nowhere"),
        ({"data__paths": ("nowhere.jsonl",)}, r"nowhere\.jsonl"),
        ({"data__paths": (str(tmp_path),)}, "expected .jsonl"),
        ({"batching__surrogate": "word2vec"}, "sentence-transformers:NAME"),
        ({"batching__surrogate": "checkpoint:nowhere"}, "nowhere"),
        ({"batching__filter_surrogate": "sentence-transformers:./nowhere"}, "nowhere"),
        ({"batching__surrogate_prompts": ("a", "b")}, "takes no prompts"),
        ({"data__tokenizer": "./nowhere"}, "nowhere"),
        ({"train__mesh": (4096, 1)}, "4096"),
        ({"model__attention": "cudnn"}, "cudnn"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            go(data, tmp_path / "work", **changes)
    assert not (tmp_path / "work").exists()


def test_a_tokenizer_larger_than_the_model_is_refused(data, workdir, tmp_path):
    with pytest.raises(ValueError, match=r"the tokenizer has 150 tokens, `model\.vocab_size` is 100"):
        go(data, tmp_path / "new", data__tokenizer=str(workdir / "store/tokenizer"), model__vocab_size=100)
    assert not (tmp_path / "new").exists()


def test_pairs_are_checked_as_soon_as_they_are_counted(data, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "write_vectors", lambda *_, **__: pytest.fail("vectors are encoded"))
    cases = [
        ({"batching__batch_size": 500}, "500"),
        ({"batching__cluster_size": 500}, "cluster_size"),
        ({"batching__domain_weights": ("see=2",)}, "the nearest is 'sea'"),
        ({"batching__hard_negatives": 200}, "hard_negatives"),
        ({"train__steps": 0, "train__warmup_steps": 14}, "must be fewer than the 14 steps of the plan"),
        ({"train__steps": 0, "train__warmup_steps": 0, "train__batches_per_step": 15}, "fewer than the 15 of one step"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            go(data, tmp_path / "work", **changes)


def test_steps_and_warm_up_are_compared_with_the_plan(caplog):
    assert check_steps(Train(steps=0, warmup_steps=2, batches_per_step=3), 11) == 3
    assert not caplog.records
    assert check_steps(Train(steps=7, warmup_steps=5, batches_per_step=3), 11) == 7
    assert "train.steps 7 are more than the 3 of the plan, which is repeated" in caplog.text
    with pytest.raises(ValueError, match="must be fewer than the 3 steps"):
        check_steps(Train(steps=0, warmup_steps=3, batches_per_step=3), 11)
    with pytest.raises(ValueError, match="the plan has 2 batches, fewer than the 3 of one step"):
        check_steps(Train(steps=0, warmup_steps=0, batches_per_step=3), 2)


def test_settings_without_effect_are_logged(data, tmp_path, caplog):
    with pytest.raises(ValueError, match="nowhere"):
        go(data, tmp_path, data__columns=("query=q",), data__evaluation=("nowhere",))
    assert "these settings have no effect with the other ones: data.columns" in caplog.text


# --- what is told


def test_the_report_lists_files_their_pairs_and_what_is_skipped(data, tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    shutil.copy(data / "pairs.jsonl", folder / "a.jsonl")
    write_lines(folder / "b.jsonl", [{"query": "one more", "document": "document"}])
    (folder / "notes.txt").write_text("notes")
    (said,) = go(data, tmp_path / "work", "prepare", data__paths=(str(folder),))
    inputs = read_json(tmp_path / "work/report.json")["inputs"]
    assert inputs["pairs"] == {"a.jsonl": 129, "b.jsonl": 1} and list(inputs["skipped"]) == ["notes.txt"]
    assert "a.jsonl: 129 pairs" in said and "notes.txt: not read" in said


def test_versions_name_the_faiss_that_is_installed(done):
    versions = read_json(done / "config.json")["versions"]
    assert {"python", "jax", "numpy"} <= versions.keys()
    assert versions.keys() & {"faiss-cpu", "faiss-gpu"}


def test_evaluation_sets_are_written_as_tokens_once(data, workdir):
    before = bytes_of(workdir / "store/evaluation_tokens")
    go(data, workdir, "prepare")
    assert bytes_of(workdir / "store/evaluation_tokens") == before
    assert json.loads(before["held/manifest.json"])["name"] == "held"
