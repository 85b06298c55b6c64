"""Training on a bare accelerator image, where only jax, flax, optax, numpy, safetensors and jaxtyping are installed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from test_stages import go
from tiny_run import write_data

MISSING = (
    "bm25s faiss grain huggingface_hub matplotlib ml_collections orbax pytrec_eval sklearn tensorboardX threadpoolctl "
    "tokenizers torch tqdm transformers"
)
TRAIN = """
import sys
from pathlib import Path
sys.modules.update(dict.fromkeys(sys.argv[2].split()))  # importing one of them is an ImportError

from cde_jax.data.files import read_json
from cde_jax.stages import run

workdir = Path(sys.argv[1])
list(run.run(read_json(workdir / "config.json")["config"], workdir, "train"))
"""


def losses(workdir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_carried_work_directory_is_trained_as_at_home_and_goes_on_there(tmp_path):
    data = write_data(tmp_path / "data")
    home, carried = tmp_path / "home", tmp_path / "carried"
    go(data, home, "prepare")
    shutil.copytree(home, carried)
    go(data, home, "train")
    command = [sys.executable, "-c", TRAIN, str(carried), MISSING]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(losses(carried), losses(home), rtol=1e-5)
    assert sorted(os.listdir(carried / "checkpoints")) == sorted(os.listdir(home / "checkpoints")) == ["4", "6"]
    assert (carried / "checkpoints/6/params.safetensors").exists()
    for stage in ("train", "export"):  # all steps are done: nothing is trained again
        go(data, carried, stage)
    assert len(losses(carried)) == 6 and (carried / "export/model.safetensors").exists()
