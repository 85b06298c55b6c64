"""The training stage: settings reach the step, chunk sizes fit the memory, weights are read alone."""

import functools
import importlib.util
import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from test_stages import config_of, go
from tiny_batches import step_batch

from cde_jax.config import Config, Data, Evaluate, Model, Train, from_config_dict
from cde_jax.data.files import read_json, write_json
from cde_jax.interop.modules import TextSettings
from cde_jax.interop.write import save_pretrained
from cde_jax.models.contextual import Biencoder, BiencoderConfig
from cde_jax.models.encoder import EncoderConfig
from cde_jax.stages import assemble, placement
from cde_jax.stages import train as stage
from cde_jax.stages.run import run as run_stage
from cde_jax.stages.workdir import load_prepared
from cde_jax.training import sharding
from cde_jax.training.accounting import choose_chunk
from cde_jax.training.checkpoint import Checkpoints
from cde_jax.training.step import stream

AUTO = {f"train__{name}": -1 for name in placement.CHUNKS}
GIB = 2**30


@pytest.fixture(scope="module")
def prepared(data, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("prepared") / "work"
    go(data, workdir, "prepare")
    return workdir


def chosen(config, workdir):
    return placement.choose_placement(config, workdir, load_prepared(config, workdir))


def chunks(config):
    return [getattr(config.train, name) for name in placement.CHUNKS]


@pytest.mark.parametrize("lengths", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_chunks_and_what_is_computed_again_are_chosen_by_the_compiled_step(data, prepared, lengths, monkeypatch):
    asked = []

    def choose(needs, limit, remats, useful, texts):
        asked.append((limit, remats, useful, texts))
        needs = functools.cache(needs)  # each size compiles the step
        assert needs("dots", 8) < needs("dots", 16) < needs("dots", 32)
        return choose_chunk(needs, needs("dots", 32) - 1, remats, 8, texts)

    monkeypatch.setattr(placement, "choose_chunk", choose)
    config = from_config_dict(config_of(data, train__text_lengths=lengths, train__memory_gib=1.0, **AUTO))
    config = chosen(config, prepared)
    assert chunks(config) == [16, 16] and config.model.remat == "dots"
    assert asked == [(GIB, ("dots", "full"), 32, 32)]  # 512 positions of 16, and all texts of a plan batch


def test_only_what_is_auto_is_chosen(data, prepared):
    changes = {"train__memory_gib": 1.0, "train__text_lengths": 1, "model__remat": "full"}
    config = from_config_dict(config_of(data, **changes, train__document_chunk=-1, train__context_chunk=3))
    config = chosen(config, prepared)
    assert chunks(config) == [32, 3] and config.model.remat == "full"
    assert chosen(from_config_dict(config_of(data)), prepared) == from_config_dict(config_of(data))


@pytest.mark.slow
def test_a_run_says_what_it_chose_and_keeps_it_where_it_is(data, tmp_path, caplog, monkeypatch):
    changes = {"train__steps": 2, "train__memory_gib": 1.0, "train__text_lengths": 2} | AUTO
    with caplog.at_level(logging.INFO, logger="cde_jax"):
        for name in ("prepare", "train"):
            go(data, tmp_path, name, **changes)
    record = read_json(tmp_path / "training.json")
    assert record["chunks"] == dict.fromkeys(placement.CHUNKS, 32)
    assert (record["attention"], record["remat"], record["dtype"]) == ("blocks", "dots", "float32")
    assert record["devices"].startswith("1 x cpu") and record["layouts"]["texts"]["lengths"][-1] == 16
    assert "remat dots, chunks of 32 texts: " in caplog.text and " of 1.00 GiB" in caplog.text
    # What was chosen before is used again by the same run in the same place, whatever would be chosen now.
    config = from_config_dict(config_of(data, **changes))
    monkeypatch.setattr(placement, "choose_chunk", lambda *_: ("full", 7))
    changed = {"chunks": dict.fromkeys(placement.CHUNKS, 4)}
    other_place = changed | {"placement": record["placement"] | {"devices": "4 x gpu H100"}}
    for update, remat, chunk in (
        (changed, "dots", 4),
        (changed | {"identity": {}}, "full", 7),
        (other_place, "full", 7),
    ):
        write_json(tmp_path / "training.json", record | update)
        config_now = chosen(config, tmp_path)
        assert (chunks(config_now), config_now.model.remat) == ([chunk, chunk], remat)


def test_the_step_is_measured_from_shapes_as_it_will_run(data, prepared):
    config = from_config_dict(config_of(data, train__mesh=(2, 2), train__batches_per_step=2, train__text_lengths=1))
    pairs, plan, _ = load_prepared(config, prepared)
    batch = assemble.make_loader(config, plan, pairs).batch(0)
    del batch["plan_batch"]
    training = assemble.make_training(config, assemble.build_model(config, 150), config.train.warmup_steps + 1)
    arrays = (training.state, sharding.shard_batch(training.mesh, batch, 2), stream(0, "dropout"))
    measured, run = placement.lower_step(config, 150, batch), training.step.lower(*arrays)
    assert measured.in_avals == run.in_avals
    assert measured.as_text() == run.as_text()  # so its memory is measured too


def test_a_step_that_cannot_fit_is_an_error_before_training(data, tmp_path, monkeypatch):
    monkeypatch.setattr(placement, "choose_chunk", lambda needs, limit, *_: choose_chunk(needs, limit, ["full"], 1, 1))
    with pytest.raises(ValueError, match=r"even one text at a time the step needs 0\.0. GiB, and there are 0\.00"):
        go(data, tmp_path, "all", train__memory_gib=1e-6, train__text_lengths=1, **AUTO)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_auto_on_a_device_that_does_not_say_its_memory_names_the_key(data, tmp_path):
    with pytest.raises(ValueError, match=r"train\.memory_gib"):
        go(data, tmp_path / "work", "all", **AUTO)
    assert not (tmp_path / "work").exists()


# --- settings reach the step

TINY = {"layers": 1, "width": 8, "heads": 2, "mlp_width": 8, "context_size": 3, "soft_prompt": 2, "max_positions": 512}
BASE = {"learning_rate": 0.1, "warmup_steps": 0, "temperature": 0.5, "sequence_dropout": 0.0, "weight_decay": 0.0}
BASE |= {"clip_norm": 1e9, "mesh": (1, 1), "batches_per_step": 2}
STEPS = 10
BATCH = step_batch(0, 2, lengths=1)


def config_with(
    kind: str = "biencoder", evaluate: Evaluate | None = None, model: dict | None = None, **train
) -> Config:
    shape = Model(**(TINY | {"kind": kind} | (model or {})))
    return Config(
        model=shape, data=Data(evaluation=("sets/sea",)), train=Train(**(BASE | train)), evaluate=evaluate or Evaluate()
    )


def trained_step(kind: str = "biencoder", **train):
    """Parameters before and after the first step, its metrics, and Adam's first moment."""
    config = config_with(kind, **train)
    model = assemble.build_model(config, 50)
    training = assemble.make_training(config, model, STEPS)
    before = jax.device_get(training.state.params)
    batch = {name: part for name, part in BATCH.items() if name != "context" or kind != "biencoder"}
    batch = sharding.shard_batch(training.mesh, batch)
    state, metrics = training.step(training.state, batch, sharding.replicate(training.mesh, stream(0, "dropout")))
    moment = jax.device_get(optax.tree.get(state.optimizer, "mu"))
    return *(flat(tree) for tree in (before, jax.device_get(state.params), moment)), jax.device_get(metrics)


def flat(params) -> dict[tuple, np.ndarray]:
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(params)}


def norm(moment) -> float:
    return float(np.sqrt(sum((x**2).sum() for x in moment.values())))


@pytest.fixture(scope="module")
def base():
    return trained_step()


@pytest.fixture(scope="module")
def contextual_base():
    return trained_step("contextual", weight_decay=0.1)


def test_the_temperature_reaches_the_loss(base):
    *_, metrics = trained_step(temperature=10.0)
    counted = (BATCH["keep"] | np.eye(*BATCH["keep"].shape[1:], dtype=bool)).sum(axis=2)
    assert abs(float(metrics["loss"]) - np.log(counted).mean()) < 0.1  # τ → ∞: all columns are alike
    assert abs(float(metrics["loss"]) - float(base[3]["loss"])) > 1e-3
    assert metrics["positive"] == base[3]["positive"]


def test_weight_decay_reaches_the_matrices(base):
    before, plain, _, _ = base
    _, decayed, _, _ = trained_step(weight_decay=0.5)
    for path, value in before.items():
        expected = -0.1 * 0.5 * value if path[-1] in ("kernel", "embedding") else np.zeros_like(value)
        np.testing.assert_allclose(decayed[path] - plain[path], expected, atol=1e-6, err_msg=str(path))


def test_the_clipping_norm_reaches_the_gradient(base):
    size = norm(base[2]) / 0.1  # Adam's first moment is a tenth of the clipped gradient
    np.testing.assert_allclose(size, base[3]["gradient_norm"], rtol=1e-4)
    _, _, moment, metrics = trained_step(clip_norm=float(size) / 4)
    np.testing.assert_allclose(norm(moment) / 0.1, size / 4, rtol=1e-4)
    np.testing.assert_allclose(metrics["gradient_norm"], size, rtol=1e-4)


def test_warm_up_and_learning_rate_reach_the_update(base):
    before, after, _, metrics = trained_step(warmup_steps=4)
    assert float(metrics["learning_rate"]) == pytest.approx(0.1 / 4) and float(
        base[3]["learning_rate"]
    ) == pytest.approx(0.1)
    for path, value in before.items():
        np.testing.assert_allclose(4 * (after[path] - value), base[1][path] - value, atol=1e-5, err_msg=str(path))


def test_shared_negatives_reach_the_loss(base):
    _, _, _, metrics = trained_step(share_negatives=True)
    assert float(metrics["loss"]) > float(base[3]["loss"]) + 0.3  # twice as many columns
    assert float(metrics["masked"]) < float(base[3]["masked"]) and float(metrics["flops"]) > float(base[3]["flops"])


def test_sequence_dropout_reaches_the_context(contextual_base):
    before, after, _, _ = trained_step("contextual", sequence_dropout=1.0)
    for path, value in before.items():  # no document is left, so the first stage has no gradient
        moved = np.abs(after[path] - value).max() > 0
        assert moved == (path[0] != "first_stage"), path
        assert np.abs(contextual_base[1][path] - value).max() > 0, path


def test_the_first_stage_s_rate_reaches_its_update_and_no_other(contextual_base):
    before, after, _, _ = trained_step("contextual", weight_decay=0.1, first_stage_rate=0.5)
    for path, value in before.items():
        rate = 0.5 if path[0] == "first_stage" else 1.0
        np.testing.assert_allclose(after[path] - value, rate * (contextual_base[1][path] - value), atol=2e-7)


def test_a_frozen_first_stage_keeps_every_byte_and_the_rest_is_trained(contextual_base):
    before, after, moment, metrics = trained_step("contextual", weight_decay=0.1, first_stage_rate=0.0)
    assert {path[0] for path in before} > {"first_stage", "encoder", "null"}
    for path, value in before.items():
        frozen = path[0] == "first_stage"
        assert (value.tobytes() == after[path].tobytes()) == frozen == (np.abs(moment[path]).max() == 0), path
    # Adam's moment of it, a tenth of the clipped gradient, is zero: it takes no part in the norm that is clipped.
    assert float(metrics["flops"]) < float(contextual_base[3]["flops"])


def test_batches_per_step_devices_and_lengths_reach_mesh_and_loader(data, prepared):
    config = from_config_dict(
        config_of(
            data,
            train__mesh=(2, 1),
            train__batches_per_step=4,
            train__text_lengths=1,
            batching__context_source="domain",
        )
    )
    pairs, plan, _ = load_prepared(config, prepared)
    loader = assemble.make_loader(config, plan, pairs)
    batch = loader.batch(0)
    assert batch["plan_batch"].tolist() == [0, 1, 2, 3] and len(batch["texts"]["ids"]) == 1
    assert (loader.context_source, loader.context_size, loader.seed) == ("domain", 4, 0)
    assert loader.chunk_positions == 8 * 16 and loader.context_chunk_positions == 0
    assert assemble.make_loader(config, plan, pairs, platform="tpu").context_chunk_positions == 8192
    training = assemble.make_training(config, assemble.build_model(config, 150), STEPS)
    assert training.mesh.size == 2 and training.steps == STEPS
    none = from_config_dict(config_of(data, model__kind="biencoder"))
    assert "context" not in assemble.make_loader(none, plan, pairs).batch(0)


@pytest.mark.parametrize(("kind", "attention", "slots"), [("contextual", "joint", 6), ("contextual", "isolated", 0)])
def test_chunks_are_counted_in_positions_that_are_run(data, prepared, kind, attention, slots):
    config = from_config_dict(config_of(data, model__kind=kind, model__context_attention=attention))
    pairs, plan, _ = load_prepared(config, prepared)
    loader = assemble.make_loader(config, plan, pairs)
    assert (loader.slots, loader.chunk_positions) == (slots, 8 * (16 + slots))
    layout = loader.layouts["texts"]
    assert max(np.multiply(layout.texts, np.add(layout.lengths, slots))) <= 8 * (16 + slots)


@pytest.mark.parametrize(
    ("dtype", "platform", "expected"),
    [
        ("auto", "cpu", "float32"),
        ("auto", "cuda", "bfloat16"),
        ("auto", "tpu", "bfloat16"),
        ("float32", "tpu", "float32"),
    ],
)
def test_compute_is_bfloat16_off_the_cpu(dtype, platform, expected):
    assert assemble.compute_dtype(config_with(model={"dtype": dtype}), platform) == expected


# --- before anything is written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": (9, 1)}, r"train\.mesh is \(9, 1\), 9 devices, and there are 8"),
        ({"model": {"attention": "cudnn"}}, "'cudnn' needs an NVIDIA GPU"),
        ({"model": {"width": 2**15, "mlp_width": 2**18, "layers": 100}}, r"[\d,]{13,} parameters.* GiB of a device"),
    ],
)
def test_what_this_machine_cannot_train_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        stage.check_runtime(config_with("contextual", **changes))


def test_tracking_without_its_library_is_refused(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    with pytest.raises(ValueError, match=r"train\.wandb needs Weights & Biases: pip install 'cde_jax\[wandb\]'"):
        stage.check_runtime(config_with(wandb="project"))


def test_scores_without_a_development_set_are_warned_of(caplog):
    stage.check_runtime(config_with())
    stage.check_runtime(config_with(evaluate_every=5, evaluate=Evaluate(development=("sea",))))
    assert not caplog.text
    stage.check_runtime(config_with(evaluate_every=5))
    assert "train.evaluate_every has no effect: evaluate.development names no evaluation set" in caplog.text


# --- weights alone


@pytest.mark.parametrize("kind", ["contextual", "biencoder"])
def test_a_model_is_restored_without_optimiser_or_mesh(kind, tmp_path, monkeypatch):
    config = config_with(kind, mesh=(2, 4))
    training = assemble.make_training(config, assemble.build_model(config, 50), STEPS)
    checkpoints = Checkpoints(tmp_path, {"plan": "p"})
    checkpoints.save(1, training.state)
    checkpoints.wait()
    for name in ("make_optimizer", "make_train_step", "build_model", "stream"):
        monkeypatch.delattr(assemble, name)
    monkeypatch.delattr(sharding, "make_mesh")
    model = assemble.restore_model(config, 50, Checkpoints(tmp_path, {"plan": "p"}), 1)
    restored, saved = flat(nnx.state(model)), flat(training.state.params)
    assert restored.keys() == saved.keys()
    for path, value in saved.items():
        np.testing.assert_array_equal(restored[path], value)
    assert model.embed(np.ones((2, 4), int), np.ones((2, 4), bool)).shape == (2, 8)


@pytest.mark.slow
def test_what_one_device_trained_goes_on_and_is_exported_on_eight_without_the_initial_encoder(data, tmp_path):
    start, work = tmp_path / "start", tmp_path / "work"

    def run(workdir: Path, name: str, mesh: tuple[int, int]):
        config = config_of(data, train__text_lengths=1, train__checkpoint_every=2, train__mesh=mesh)
        config.model.init.first_stage = str(start)
        list(run_stage(config, workdir, name))

    go(data, work, "prepare")
    model = Biencoder(BiencoderConfig(EncoderConfig(150, 16, 1, 2, 32, max_positions=32)), rngs=nnx.Rngs(0))
    save_pretrained(model, start, tokenizer=work / "store/tokenizer", settings=TextSettings("", "", 8, 16))
    shutil.copytree(work, tmp_path / "new")
    run(work, "train", (1, 1))
    shutil.rmtree(work / "checkpoints/6")
    start.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="start"):
        run(tmp_path / "new", "train", (1, 1))
    run(work, "train", (2, 4))
    run(work, "export", (-1, 1))
    assert (work / "checkpoints/6").exists() and (work / "export/model.safetensors").exists()
