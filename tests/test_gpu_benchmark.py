"""benchmarks/gpu.py runs the other benchmarks within a time and keeps every line, on any device."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_bare_image import MISSING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402


def test_a_case_fails_alone_and_ends_with_the_time():
    assert gpu.run("late", ["kernels.py"], 0.0) == [{"case": "late", "skipped": "no time left"}]
    (line,) = gpu.run("bad", ["gpu.py", "--minutes", "many"], 60.0)
    assert line["case"] == "bad" and "invalid float value: 'many'" in line["error_message"]
    start = time.monotonic()
    (line,) = gpu.run("slow", ["kernels.py", "--shapes", "large"], 1.0)
    assert line["skipped"] == "stopped at the end of the time" and time.monotonic() - start < 10


BARE = """
import sys
sys.modules.update(dict.fromkeys(sys.argv.pop().split()))  # importing one of them is an ImportError
import encode, gpu, kernels, train_step
sys.argv[1:] = ["--shapes", "tiny", "--models", "isolated", "--rounds", "1"]
train_step.main()
encode.main()
"""


@pytest.mark.slow
def test_its_cases_need_no_more_than_training_does():
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"}
    command = [sys.executable, "-c", BARE, MISSING]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["benchmark"] for line in done.stdout.splitlines()] == ["train_step", *["encode"] * 3]


@pytest.mark.slow
def test_every_case_runs_on_a_tiny_model_and_the_figure_is_drawn(tmp_path):
    command = [
        sys.executable,
        "benchmarks/gpu.py",
        "--shape=tiny",
        "--queries",
        "4",
        "8",
        "--chunk=4",
        "--dtype=float32",
    ]
    command += ["--texts=32", "--peak=0.1", f"--out={tmp_path / 'gpu.jsonl'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert lines == [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["attention"]: line.get("ok") for line in lines[:3]} == {"xla": True, "blocks": True, "cudnn": None}
    trained = {(line["model"], line["queries"]): line for line in lines if line.get("benchmark") == "train_step"}
    ours = [(kind, queries) for queries in (4, 8) for kind in ("biencoder", "isolated", "joint")]
    assert trained.keys() == {*ours, *((f"{kind}, PyTorch eager", 4) for kind, _ in ours)}
    assert all(trained[case]["utilisation"] > 0 and trained[case]["program_gib"] > 0 for case in ours)
    encoded = {line["model"] for line in lines if line.get("benchmark") == "encode"}
    assert encoded >= {"isolated", "joint, PyTorch eager", "biencoder, sentence-transformers"}
    assert "</svg>" in (tmp_path / "gpu.svg").read_text()
