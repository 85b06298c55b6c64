"""What may change while a run goes on, and what may not: placement, schedules, and folders that moved."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from test_stages import bytes_of, config_of, go

from cde_jax.config import from_config_dict
from cde_jax.data.files import read_json
from cde_jax.stages import run as stages
from cde_jax.stages.evaluate import trained
from cde_jax.stages.workdir import load_prepared


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """A run of six steps with the checkpoints 4 and 6."""
    workdir = tmp_path_factory.mktemp("done") / "work"
    for stage in ("prepare", "train", "export"):
        go(data, workdir, stage)
    return workdir


@pytest.fixture
def halfway(done, tmp_path):
    """The same run as if it had been killed after step 4."""
    workdir = Path(shutil.copytree(done, tmp_path / "work"))
    shutil.rmtree(workdir / "checkpoints/6")
    return workdir


def weights(data, workdir) -> list[np.ndarray]:
    config = from_config_dict(config_of(data))
    return jax.tree.leaves(jax.device_get(nnx.state(trained(config, workdir, load_prepared(config, workdir)).model)))


def digests(workdir: Path) -> dict:
    return read_json(workdir / "checkpoints/6/metadata/metadata")["digests"]


# --- placement


def test_with_the_same_placement_a_run_ends_with_the_same_bytes(data, done, halfway):
    go(data, halfway, "train")
    assert digests(halfway) == digests(done)


def test_a_run_goes_on_in_other_pieces_and_ends_the_same_to_rounding(data, done, halfway, caplog):
    changes = {"train__document_chunk": 3, "train__text_lengths": 3, "model__remat": "full", "model__attention": "xla"}
    go(data, halfway, "train", **changes)
    assert "train.document_chunk: 8 there, 3 now" in caplog.text and "model.remat: 'auto' there" in caplog.text
    for one, other in zip(weights(data, halfway), weights(data, done), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=0)
    record = read_json(halfway / "training.json")
    assert (record["remat"], record["attention"], record["chunks"]["document_chunk"]) == ("full", "xla", 3)
    assert len(record["history"]) == 1


# --- schedules


def test_schedules_may_change_on_the_way_and_are_kept_as_a_history(data, halfway, caplog):
    changes = {"train__learning_rate": 1e-3, "train__steps": 8, "train__skip_batches": (5,)}
    go(data, halfway, "train", **changes)
    assert "from step 5 on: learning_rate: 0.01 there, 0.001 now" in caplog.text
    lines = [json.loads(line) for line in (halfway / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert len(rates) == 8 and rates[3] == pytest.approx(0.01 * 3 / 5) and rates[4] == pytest.approx(1e-3 * 4 / 7)
    names = ("from_step", "steps", "skip_batches", "learning_rate", "warmup_steps")
    entries = [[entry[name] for name in names] for entry in read_json(halfway / "training.json")["history"]]
    assert entries == [[1, 6, [], 0.01, 1], [5, 8, [5], 0.001, 1]]
    go(data, halfway, "export", **changes)
    card = (halfway / "export/README.md").read_text()
    assert "| 1 | 6 | [] | 0.01 | 1" in card and "| 5 | 8 | [5] | 0.001 | 1" in card


@pytest.mark.slow
def test_a_change_that_no_step_was_trained_with_leaves_no_trace(data, halfway):
    shutil.copytree(halfway, again := halfway.with_name("again"))
    go(data, halfway, "train", train__learning_rate=1e-3)
    shutil.rmtree(halfway / "checkpoints/6")
    go(data, halfway, "train")
    assert [entry["from_step"] for entry in read_json(halfway / "training.json")["history"]] == [1]
    go(data, again, "train")
    assert digests(halfway) == digests(again)


def test_a_skipped_plan_batch_is_not_trained(data, halfway, done):
    go(data, halfway, "train", train__skip_batches=(5,))
    assert digests(halfway) != digests(done)  # step 6 took another one
    with pytest.raises(ValueError, match=r"train\.skip_batches names \[99\], and the plan has the batches 0 to 13"):
        shutil.rmtree(halfway / "checkpoints/6")
        go(data, halfway, "train", train__skip_batches=(99,))


def test_what_decides_the_numbers_may_not_change(data, halfway):
    before = bytes_of(halfway)
    for name, value in {"train__temperature": 0.5, "train__first_stage_rate": 0.5, "seed": 3}.items():
        changed = config_of(data)
        section, _, key = name.rpartition("__")
        (changed[section] if section else changed)[key] = value
        with pytest.raises(ValueError, match=rf"- {name.replace('__', '.')}: .* there, .* now"):
            list(stages.run(changed, halfway, "train"))
    assert bytes_of(halfway) == before


def test_a_checkpoint_of_an_earlier_version_says_so(data, halfway):
    file = halfway / "checkpoints/4/metadata/metadata"
    metadata = read_json(file)
    metadata["identity"] = {"plan": metadata["identity"]["plan"], "config": "0" * 64}
    file.write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=r"written by another version of cde_jax.*--rebuild"):
        go(data, halfway, "train")


# --- folders that moved


def started_from(data, exported: Path, **changes):
    config = config_of(data, **changes)
    config.model.init.second_stage = str(exported)
    return config


@pytest.mark.slow
def test_an_initial_encoder_may_move_or_go_once_a_checkpoint_is_there(data, done, tmp_path):
    first, moved, other = (Path(shutil.copytree(done / "export", tmp_path / name)) for name in ("a", "b", "c"))
    workdir = Path(shutil.copytree(done, tmp_path / "work"))
    shutil.rmtree(workdir / "checkpoints")
    shutil.rmtree(workdir / "export")
    list(stages.run(started_from(data, first), workdir, "train"))
    shutil.rmtree(first)
    for config in (started_from(data, first), started_from(data, moved)):
        shutil.rmtree(workdir / "checkpoints/6")
        list(stages.run(config, workdir))  # all stages
        assert (workdir / "checkpoints/6").exists() and (workdir / "export").exists()
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    shutil.rmtree(workdir / "checkpoints/6")
    with pytest.raises(ValueError, match=r"model\.init\.second_stage is .*c', and the run started from other weights"):
        list(stages.run(started_from(data, other), workdir, "train"))


@pytest.mark.slow
def test_a_surrogate_and_a_tokenizer_may_move_and_go(data, done, tmp_path):
    def changes(folder: str) -> dict[str, str]:
        return {
            "batching__surrogate": f"checkpoint:{tmp_path / folder / 'surrogate'}",
            "data__tokenizer": str(tmp_path / folder / "tokenizer"),
        }

    shutil.copytree(done / "export", tmp_path / "a/surrogate")
    shutil.copytree(done / "store/tokenizer", tmp_path / "a/tokenizer")
    workdir = tmp_path / "work"
    go(data, workdir, "prepare", **changes("a"))
    go(data, workdir, "train", **changes("a"), train__steps=2)
    kept = bytes_of(workdir / "plan")
    (tmp_path / "a").rename(tmp_path / "b")
    go(data, workdir, "all", **changes("a"), train__steps=3)
    go(data, workdir, "all", **changes("b"), train__steps=4)
    assert bytes_of(workdir / "plan") == kept and (workdir / "checkpoints/4").exists()
    with pytest.raises(ValueError, match=r"data\.tokenizer: .* there, 'bert-base-cased' now"):
        go(data, workdir, "train", **(changes("b") | {"data__tokenizer": "bert-base-cased"}))
