"""Killed or stopped at any moment and started again with the same command, a run ends with the same bytes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import get_config, write_data

from cde_jax.data.files import read_json
from cde_jax.stages import run as stages

ROOT = Path(__file__).resolve().parents[1]
STEPS = 24


def start(folder: Path, workdir: Path, stage: str = "train", **train) -> subprocess.Popen:
    """The main command as a user starts it."""
    flags = [f"--config.train.{key}={value}" for key, value in {"steps": STEPS, **train}.items()]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "cde_jax.main",
            f"--config=tests/tiny_run.py:{folder}",
            f"--workdir={workdir}",
            f"--stage={stage}",
            *flags,
        ],
        cwd=ROOT,
        # Programs compiled once are read back in the runs that follow, as they would be with any JAX program.
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), **CACHE_ALL},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


CACHE_ALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


def finish(process: subprocess.Popen, expected: int = 0) -> str:
    _, said = process.communicate(timeout=300)
    assert process.returncode == expected, said[-3000:]
    return said


def steps_done(workdir: Path) -> int:
    file = workdir / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def checkpoints(workdir: Path) -> list[int]:
    """Steps of the checkpoints that are whole."""
    return sorted(int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit())


def wait_for(condition, process: subprocess.Popen) -> None:
    """Until `condition()`; the process must still be at work then."""
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.001)


def digest(workdir: Path) -> str:
    """sha256 of the last checkpoint's parameters and optimiser state."""
    lines = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert lines == sorted(set(lines)) and lines[-1] == STEPS
    return read_json(workdir / f"checkpoints/{STEPS}/metadata/metadata")["digests"]


def outcome(folder: Path, workdir: Path) -> tuple[str, bytes]:
    """The digest, and the exported weights."""
    config = get_config(str(folder))
    config.train.steps = STEPS
    list(stages.run(config, workdir, "export"))
    return digest(workdir), (workdir / "export/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The data, a prepared work directory, and how a run ends that nobody disturbs."""
    folder = write_data(tmp_path_factory.mktemp("data"))
    whole = folder / "whole"
    list(stages.run(get_config(str(folder)), folder / "prepared", "prepare"))
    shutil.copytree(folder / "prepared", whole)
    finish(start(folder, whole))
    return folder, outcome(folder, whole)


@pytest.fixture
def workdir(prepared, tmp_path):
    return Path(shutil.copytree(prepared[0] / "prepared", tmp_path / "work"))


def test_a_run_killed_between_checkpoints_ends_as_if_it_was_not(prepared, workdir):
    folder, expected = prepared
    step = random.Random(2).randrange(3, STEPS - 4)
    process = start(folder, workdir)
    wait_for(lambda: steps_done(workdir) >= step and checkpoints(workdir), process)
    process.kill()
    finish(process, -signal.SIGKILL)
    assert not (workdir / f"checkpoints/{STEPS}").exists(), "killed too late to show anything"
    said = finish(start(folder, workdir))
    assert "going on from checkpoint" in said
    assert outcome(folder, workdir) == expected


def half_written(workdir: Path) -> list[Path]:
    """Temporary folders in which Orbax has begun to write arrays."""
    return [p for p in workdir.glob("checkpoints/*tmp*") if p.is_dir()]


@pytest.mark.slow
def test_a_run_killed_while_it_writes_a_checkpoint_ends_as_if_it_was_not(prepared, workdir):
    folder, expected = prepared
    for attempt in range(8):
        process = start(folder, workdir, checkpoint_every=1)
        seen = attempt * 2 + 3
        wait_for(lambda seen=seen: steps_done(workdir) >= seen and half_written(workdir), process)
        process.kill()
        finish(process, -signal.SIGKILL)
        if half_written(workdir):  # what the kill left: it hit a checkpoint in the middle
            break
    assert half_written(workdir), "no kill came while a checkpoint was written: this machine is too fast for the test"
    assert not (workdir / f"checkpoints/{STEPS}").exists()
    assert checkpoints(workdir), "nothing to go on from"
    finish(start(folder, workdir, checkpoint_every=1))
    assert not half_written(workdir)
    assert outcome(folder, workdir) == expected


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_leaves_a_checkpoint_and_goes_on_later(prepared, workdir, number):
    folder, expected = prepared
    process = start(folder, workdir, checkpoint_every=0)
    wait_for(lambda: steps_done(workdir) >= 3, process)
    process.send_signal(number)
    said = finish(process, 0)
    assert "as asked; the same command goes on from there" in said
    (left,) = checkpoints(workdir)
    assert 3 <= left < STEPS
    assert steps_done(workdir) == left
    assert f"going on from checkpoint {left} of {STEPS}" in finish(start(folder, workdir, checkpoint_every=0))
    assert digest(workdir) == expected[0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_run_killed_again_and_again_ends_as_if_it_was_not(prepared, workdir, seed):
    folder, expected = prepared
    chance = random.Random(seed)
    for _ in range(4):
        process = start(folder, workdir)
        time.sleep(chance.uniform(0.5, 6.0))
        process.kill()
        process.communicate()
    finish(start(folder, workdir))
    assert outcome(folder, workdir) == expected
