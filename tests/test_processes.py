"""Several real processes train one model: the same numbers as one, one writer, and they end together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from test_stages import config_of
from tiny_run import write_data

from cde_jax.config import from_config_dict
from cde_jax.data.files import read_json
from cde_jax.stages import assemble
from cde_jax.stages import run as stages
from cde_jax.stages.workdir import load_prepared
from cde_jax.training.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parents[1]
STEPS = 20
# Adam divides by the gradient's size: where that is zero up to rounding, parameters differ by a share of the rate.
SETTINGS = {"steps": STEPS, "batches_per_step": 4, "checkpoint_every": 0, "text_lengths": 2, "learning_rate": 1e-4}
FLAGS = "--xla_backend_optimization_level=0"


def config(data: Path, **train):
    return config_of(data, **{f"train__{name}": value for name, value in (SETTINGS | train).items()})


def start(data: Path, workdir: Path, processes: int, devices: int, stage: str = "train", **train) -> list:
    """The main command, once in each process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = [f"--config.train.{name}={value}" for name, value in (SETTINGS | train).items()]
    command = [sys.executable, "-m", "cde_jax.main", f"--config=tests/tiny_run.py:{data}", f"--workdir={workdir}"]
    command += [f"--stage={stage}", *flags, *(["--distributed"] if processes > 1 else [])]
    shared = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {FLAGS}", "JAX_PLATFORMS": "cpu"}
    shared |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | shared | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]


def finish(processes: list) -> list[str]:
    """What each said; all must end well."""
    said = [process.communicate(timeout=400)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(x[-2000:] for x in said)
    return said


def lines(workdir: Path) -> list[dict]:
    file = workdir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_for_step(workdir: Path, step: int, processes: list) -> None:
    deadline = time.monotonic() + 300
    while len(lines(workdir)) < step:
        assert all(process.poll() is None for process in processes), [p.communicate()[1][-3000:] for p in processes]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def outcome(data: Path, workdir: Path, step: int = STEPS) -> tuple[list[float], dict]:
    """Losses of all steps, and the parameters of a checkpoint."""
    settings = from_config_dict(config(data))
    prepared = load_prepared(settings, workdir)
    checkpoints = Checkpoints(workdir / "checkpoints", assemble.run_identity(settings, prepared.plan))
    model = assemble.restore_model(settings, prepared.vocab_size, checkpoints, step)
    params = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    written = lines(workdir)
    assert [line["step"] for line in written] == list(range(1, step + 1))  # each once
    return [line["loss"] for line in written], params


def assert_same(got, expected, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(got[0], expected[0], atol=tolerance, rtol=tolerance)
    for path, value in expected[1].items():
        np.testing.assert_allclose(got[1][path], value, atol=tolerance, err_msg=str(path))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs, `prepared` work directory, and in `whole` a run that one device did."""
    folder = write_data(tmp_path_factory.mktemp("data"))
    list(stages.run(config(folder), folder / "prepared", "prepare"))
    shutil.copytree(folder / "prepared", folder / "whole")
    list(stages.run(config(folder, mesh=(1, 1)), folder / "whole", "train"))
    return folder


@pytest.fixture
def workdir(data, tmp_path):
    return Path(shutil.copytree(data / "prepared", tmp_path / "work"))


@pytest.fixture(scope="module")
def expected(data):
    losses, params = outcome(data, data / "whole")
    settings = from_config_dict(config(data))
    first = nnx.state(assemble.build_model(settings, load_prepared(settings, data / "whole").vocab_size), nnx.Param)
    moved = [np.abs(np.asarray(leaf[...]) - params[path]).max() for path, leaf in nnx.to_flat_state(first)]
    assert np.median(moved) > 3e-4  # far more than the tolerance
    return losses, params


@pytest.mark.slow
def test_two_processes_stop_together_and_one_goes_on_to_the_same_end(data, expected, workdir):
    processes = start(data, workdir, 2, 4, "all", mesh="(2,4)")
    wait_for_step(workdir, 5, processes)
    processes[1].send_signal(signal.SIGTERM)
    said = finish(processes)
    left = len(lines(workdir))
    assert 5 <= left < STEPS
    for text in said:
        assert f"stopped after step {left} of {STEPS}, as asked" in text
    assert sorted(os.listdir(workdir / "checkpoints")) == [str(left)]
    assert "step 1 " in said[0] and "step 1 " not in said[1]  # one of them logs
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    stopped = outcome(data, workdir, left)
    np.testing.assert_allclose(stopped[0], expected[0][:left], atol=1e-5, rtol=1e-5)
    list(stages.run(config(data, mesh=(8, 1)), workdir, "train"))
    assert_same(outcome(data, workdir), expected)
    assert list(stages.run(config(data, mesh=(-1, 1)), workdir, "export")) == [f"exported to {workdir / 'export'}"]


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others_with_a_message(data, workdir):
    processes = start(data, workdir, 2, 1, mesh="(-1,1)", steps=10**6)
    wait_for_step(workdir, 3, processes)
    processes[1].kill()
    began = time.monotonic()
    _, said = processes[0].communicate(timeout=90)
    assert time.monotonic() - began < 60
    assert processes[0].returncode != 0
    assert "process 0 lost the others" in said or "another task died" in said, said[-3000:]
    processes[1].communicate()


def test_what_stops_the_first_process_stops_the_others(data, tmp_path):
    processes = start(data, tmp_path / "work", 2, 1, "train", mesh="(-1,1)")
    said = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert "work/store/pairs" in said[0]
    assert "another process stopped with an error" in said[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "devices", "mesh"),
    [(1, 8, "(8,1)"), (1, 8, "(1,8)"), (2, 4, "(4,2)"), (4, 2, "(2,4)"), (4, 2, "(8,1)")],
)
def test_any_layout_ends_the_same(data, expected, workdir, processes, devices, mesh):
    finish(start(data, workdir, processes, devices, "all", mesh=mesh))
    assert_same(outcome(data, workdir), expected)
    assert (workdir / "export/model.safetensors").exists()


@pytest.mark.slow
def test_killed_and_started_again_on_the_same_layout_it_ends_byte_for_byte(data, tmp_path):
    for name in ("whole", "killed"):
        workdir = Path(shutil.copytree(data / "prepared", tmp_path / name))
        processes = start(data, workdir, 2, 4, mesh="(2,4)", checkpoint_every=4)
        if name == "killed":
            wait_for_step(workdir, 10, processes)
            for process in processes:
                process.kill()
                process.communicate()
            assert not (workdir / f"checkpoints/{STEPS}").exists(), "killed too late to show anything"
            processes = start(data, workdir, 2, 4, mesh="(2,4)", checkpoint_every=4)
        finish(processes)
    digests = [read_json(tmp_path / f"{name}/checkpoints/{STEPS}/metadata/metadata") for name in ("whole", "killed")]
    assert digests[0] == digests[1]
