"""Training and ranking on a bare accelerator image: jax, flax, optax, numpy, safetensors, jaxtyping, nothing else."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from test_evaluate import ANIMALS, OTHERS, embedder, tokenizer
from test_stages import config_of
from tiny_run import write_data

from cde_jax.data.files import write_json
from cde_jax.data.store import read_json
from cde_jax.evaluation.beir import STATISTICS, rank, write_tokens
from cde_jax.evaluation.metrics import score_rankings
from cde_jax.interop.modules import TextSettings
from cde_jax.interop.write import save_pretrained
from cde_jax.models.contextual import Biencoder, BiencoderConfig
from cde_jax.models.encoder import EncoderConfig
from cde_jax.stages.run import run

__all__ = ["tokenizer"]

MISSING = (
    "bm25s faiss grain huggingface_hub matplotlib ml_collections orbax pytrec_eval sklearn tensorboardX "
    "threadpoolctl tokenizers torch tqdm transformers"
)

RANK = """
import sys
from pathlib import Path
sys.modules.update(dict.fromkeys(sys.argv[2].split()))  # importing one of them is an ImportError

import numpy as np
from flax import nnx
from cde_jax.data.files import write_json
from cde_jax.evaluation.beir import rank, read_tokens
from cde_jax.interop.modules import TextSettings
from cde_jax.models.contextual import BiencoderConfig, ContextualConfig, ContextualEncoder
from cde_jax.models.encoder import EncoderConfig
from cde_jax.retrieval.embedder import Embedder

folder = Path(sys.argv[1])
arrays = np.load(folder / "arrays.npz")
encoder = EncoderConfig(vocab_size=100, width=32, layers=2, heads=2, mlp_width=48)
config = ContextualConfig(BiencoderConfig(encoder, head=True), encoder, 4)
graph, state = nnx.split(nnx.eval_shape(lambda: ContextualEncoder(config, rngs=nnx.Rngs(0))))
for path, leaf in nnx.to_flat_state(state):
    leaf.value = arrays[".".join(map(str, path))]
embedder = Embedder(nnx.merge(graph, state), None, TextSettings("", "", 16, 16))
documents = [arrays[f"document.{i}"] for i in range(5)]
write_json(folder / "rankings.json", rank(embedder, [read_tokens(folder / "animals")], documents, seed=3))
"""


def test_token_sets_are_ranked_without_any_other_library_and_scored_where_pytrec_eval_is(tokenizer, tmp_path):
    model = embedder("isolated", tokenizer)
    arrays = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model.model))}
    arrays |= {f"document.{i}": ids for i, ids in enumerate(tokenizer.encode(OTHERS, 16))}
    np.savez(tmp_path / "arrays.npz", **arrays)
    write_tokens(ANIMALS, tmp_path / "animals", tokenizer, model.settings, seed=3)
    command = [sys.executable, "-c", RANK, str(tmp_path), MISSING]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert "scikit-learn is not installed: 'same corpus, statistics' is left out" in done.stderr
    there, here = read_json(tmp_path / "rankings.json"), rank(model, [ANIMALS], OTHERS, seed=3)
    assert here["animals"].keys() - there["animals"].keys() == {STATISTICS}
    here["animals"].pop(STATISTICS)
    assert score_rankings(there, [ANIMALS]) == score_rankings(here, [ANIMALS])


TRAIN_AND_RANK = """
import sys
from pathlib import Path
sys.modules.update(dict.fromkeys(sys.argv[2].split()))

from cde_jax.data.files import read_json
from cde_jax.stages.run import run

for stage in ("train", "rank"):
    assert list(run(read_json(sys.argv[1] + ".json"), Path(sys.argv[1]), stage)) == []
"""


@pytest.mark.slow
def test_a_carried_work_directory_is_trained_as_at_home_and_ranked_there_and_scored_here(tmp_path, caplog):
    data, start, home, carried = (tmp_path / name for name in ("data", "start", "home", "carried"))
    write_data(data)
    shutil.copytree(data / "held", data / "held2")
    changes = {"evaluate__development": ("held2",), "evaluate__baselines": False}
    config = config_of(data, data__evaluation=(f"{data}/held", f"{data}/held2"), **changes)
    config.model.init.first_stage = str(start)
    list(run(config, home, "prepare"))
    encoder = EncoderConfig(150, 16, 1, 2, 32, max_positions=32)
    model = Biencoder(BiencoderConfig(encoder), rngs=nnx.Rngs(0))
    save_pretrained(model, start, tokenizer=home / "store/tokenizer", settings=TextSettings("", "", 8, 16))
    shutil.copytree(home, carried)
    list(run(config, home, "train"))

    write_json(tmp_path / "carried.json", config.to_dict())
    shutil.move(data, tmp_path / "elsewhere")
    command = [sys.executable, "-c", TRAIN_AND_RANK, str(carried), f"{MISSING} packaging tensorflow_datasets"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    shutil.move(tmp_path / "elsewhere", data)
    np.testing.assert_allclose(losses(carried), losses(home), rtol=1e-5)
    assert sorted(os.listdir(carried / "checkpoints")) == sorted(os.listdir(home / "checkpoints")) == ["4", "6"]
    assert (carried / "checkpoints/6/params.safetensors").exists()

    with caplog.at_level(logging.INFO, logger="cde_jax"):
        (said,) = run(config, carried, "evaluate")
    assert "the rankings of this model are there: kept" in caplog.text
    assert "| held " in said and "held2" not in said
    list(run(config, carried, "train"))  # all steps are done: nothing is trained again
    assert list(run(config, carried, "export")) == [f"exported to {carried / 'export'}"]
    assert len(losses(carried)) == 6


def losses(workdir: Path) -> list[float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]
