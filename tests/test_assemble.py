"""A run's parts from its config, and chunk sizes that are found by the memory that there is."""

import dataclasses
import logging
from pathlib import Path

import pytest
from test_stages import config_of, go
from tiny_run import write_data

from cde_jax.config import from_config_dict
from cde_jax.data.files import read_json, write_json
from cde_jax.stages import assemble, train
from cde_jax.stages.evaluate import run_identity
from cde_jax.stages.workdir import load_prepared
from cde_jax.training import sharding
from cde_jax.training.memory import program_bytes
from cde_jax.training.step import stream

AUTO = {f"train__{name}": -1 for name in assemble.CHUNKS}
GIB = 2**30


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def prepared(data, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("prepared") / "work"
    go(data, workdir, "prepare")
    return workdir


def step_bytes(config, prepared) -> int:
    """What the compiler says of the step with the config's chunks."""
    pairs, plan, _ = load_prepared(config, prepared)
    training = assemble.make_training(config, assemble.build_model(config, 150, "float32"), plan)
    batch = assemble.make_loader(config, plan, pairs).batch(0)
    batch = sharding.shard_batch(training.mesh, {k: v for k, v in batch.items() if k != "plan_batch"})
    return program_bytes(training.step.lower(training.state, batch, stream(0, "dropout")).compile())


def fitted(config, prepared):
    pairs, plan, _ = load_prepared(config, prepared)
    return assemble.fit_chunks(config, assemble.build_model(config, 150, "float32"), plan, pairs)


def with_chunks(config, texts: int):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **dict.fromkeys(assemble.CHUNKS, texts)))


@pytest.mark.parametrize(("lengths", "texts"), [(1, 16), (3, 32)])  # queries apart from documents, and together
def test_a_chunk_of_auto_is_the_largest_that_fits(data, prepared, lengths, texts):
    config = from_config_dict(config_of(data, train__text_lengths=lengths, train__memory_gib=1.0, **AUTO))
    everything = fitted(config, prepared)
    assert {getattr(everything.train, name) for name in assemble.CHUNKS} == {texts}
    less = step_bytes(with_chunks(config, texts // 2), prepared)
    assert less < step_bytes(everything, prepared)
    tight = dataclasses.replace(config, train=dataclasses.replace(config.train, memory_gib=less / GIB))
    assert {getattr(fitted(tight, prepared).train, name) for name in assemble.CHUNKS} == {texts // 2}


def test_only_what_is_auto_is_found(data, prepared):
    config = from_config_dict(config_of(data, train__memory_gib=1.0, train__document_chunk=-1, train__context_chunk=3))
    train = fitted(config, prepared).train
    assert (train.query_chunk, train.document_chunk, train.context_chunk) == (0, 32, 3)
    assert fitted(from_config_dict(config_of(data)), prepared) == from_config_dict(config_of(data))


def test_a_run_says_what_it_chose_and_keeps_it(data, tmp_path, caplog):
    changes = {"train__steps": 2, "train__memory_gib": 1.0} | AUTO
    with caplog.at_level(logging.INFO, logger="cde_jax"):
        for stage in ("prepare", "train"):
            go(data, tmp_path, stage, **changes)
    chosen = read_json(tmp_path / "training.json")
    assert chosen["chunks"] == dict.fromkeys(assemble.CHUNKS, 32)
    assert (chosen["attention"], chosen["remat"], chosen["dtype"]) == ("blocks", "dots", "float32")
    assert chosen["devices"].startswith("1 x cpu") and chosen["layouts"]["texts"]["lengths"][-1] == 16
    assert "chunks of 32 texts: the step needs" in caplog.text and "remat dots" in caplog.text
    # What was found before is used again, whatever would be found now.
    write_json(tmp_path / "training.json", chosen | {"chunks": dict.fromkeys(assemble.CHUNKS, 4)})
    config = from_config_dict(config_of(data, **changes))
    prepared = load_prepared(config, tmp_path)
    wanted = config, tmp_path, run_identity(config, prepared.plan), train.initial_model(config, 150), prepared
    assert train.with_chunks(*wanted).train.document_chunk == 4
    write_json(tmp_path / "training.json", chosen | {"identity": {}, "chunks": dict.fromkeys(assemble.CHUNKS, 4)})
    assert train.with_chunks(*wanted).train.document_chunk == 32


def test_a_step_that_cannot_fit_is_an_error_before_training(data, tmp_path):
    with pytest.raises(ValueError, match=r"even one text at a time the step needs 0\.0. GiB, and there are 0\.00"):
        go(data, tmp_path, "all", train__memory_gib=1e-6, **AUTO)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_auto_on_a_device_that_does_not_say_its_memory_names_the_key(data, tmp_path):
    with pytest.raises(ValueError, match=r"train\.memory_gib"):
        go(data, tmp_path, "all", **AUTO)
