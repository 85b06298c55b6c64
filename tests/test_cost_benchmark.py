"""benchmarks/cost.py and the two processes of benchmarks/train_step.py, on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

pytestmark = pytest.mark.slow
KINDS = ("biencoder", "isolated", "joint")


def lines_of(*command: str) -> list[dict]:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_curve_for_each_model_and_size_with_its_slope_and_the_figure(tmp_path):
    import cost

    assert cost.slope([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)
    options = ["--shape=tiny", "--sizes=2", "--rounds=1", "--torch", f"--out={tmp_path / 'cost.svg'}"]
    curves = {(line["axis"], line["case"]): line for line in lines_of("benchmarks/cost.py", *options)}
    both = [case for kind in KINDS for case in (kind, f"{kind}, PyTorch eager")]
    expected = [(axis, case) for axis in ("B", "J", "L", "documents") for case in both]
    assert curves.keys() == {*expected, ("pairs", "batch plan")} - {("J", case) for case in both[:2]}
    assert curves["B", "joint"]["sizes"] == [32, 128] and curves["pairs", "batch plan"]["sizes"] == [4096, 16384]
    assert all(len(curve["seconds"]) == 2 and min(curve["seconds"]) > 0 for curve in curves.values())
    assert "</svg>" in (tmp_path / "cost.svg").read_text()


def test_training_in_two_processes_starts_from_the_same_weights_and_texts():
    lines = lines_of("benchmarks/train_step.py", "--shapes=tiny", "--rounds=2", "--torch", "eager")
    cases = [*KINDS, *(f"{kind}, PyTorch eager" for kind in KINDS)]
    assert [line["model"] for line in lines] == cases  # it exits where the first losses differ
    assert all(line["cores_used"] > 0 for line in lines)
    assert "ratio_to_joint" in lines[-1] and "ratio_to_biencoder" in lines[2]
