"""benchmarks/scaling.py reads memory and collectives from compiled programs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_splitting_the_state_saves_arguments_and_sends_the_same_bytes():
    command = [sys.executable, "benchmarks/scaling.py", "--config=configs/large.py:biencoder", "--topology=cpu:8"]
    command += ["--meshes", "8x1", "1x8", "--remat=full", "--chunk=4", "--queries=32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    copied, split = map(json.loads, done.stdout.splitlines())
    parameters = copied["arguments_gib"] * 2**30 / 12  # a value and Adam's two moments in float32
    assert 135e6 < parameters < 140e6
    assert split["arguments_gib"] == pytest.approx(copied["arguments_gib"] / 8, abs=2e-3)
    assert split["collectives"].keys() >= {"all-gather", "reduce-scatter"}
    for line in (copied, split):  # a ring over 8 devices
        assert line["collectives"]["sent_gb"] == pytest.approx(parameters * 4 * 2 * 7 / 8 / 1e9, rel=0.01)
