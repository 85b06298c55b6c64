"""Sweeps and comparisons: benchmarks/sweep.py and compare.py on tiny runs, trained where only JAX is installed."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from tiny_models import biencoder

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import compare  # noqa: E402
import evaluation_sets  # noqa: E402
import harness  # noqa: E402
import sweep  # noqa: E402
import whiten  # noqa: E402

from cde_jax.config import from_config_dict, with_changes  # noqa: E402
from cde_jax.data.sources.beir import EvaluationSet  # noqa: E402
from cde_jax.data.tokens import Tokenizer  # noqa: E402
from cde_jax.evaluation.metrics import Scores  # noqa: E402
from cde_jax.interop.modules import TextSettings  # noqa: E402
from cde_jax.interop.write import save_pretrained  # noqa: E402

SWEEPS = sorted(path.stem for path in (ROOT / "configs/sweeps").glob("*.py") if path.stem != "base")
VARIANTS = ["random-biencoder", "clustered-isolated"]
RUNS = [f"{variant}-{seed}" for seed in (0, 1) for variant in VARIANTS]
TINY = [
    "data.query_length=8", "data.document_length=16",
    "batching.surrogate_width=8", "batching.batch_size=16", "batching.cluster_size=16", "batching.iterations=5",
    "batching.tries=1", "model.backbone=nomic", "model.width=16", "model.layers=1", "model.init.layers=1",
    "model.heads=2", "model.mlp_width=32", "model.max_positions=32", "model.context_size=4", "model.soft_prompt=2",
    "train.learning_rate=0.01", "train.mesh=[1,1]", "train.text_lengths=1", "train.log_every=1",
]  # fmt: skip

# A machine that has only what models and training need. (Flax itself imports absl and rich.)
BARE = """
import sys
import flax.nnx, jax, jaxtyping, numpy, optax, safetensors.numpy

BLOCKED = {"faiss", "orbax", "grain", "pytrec_eval", "tokenizers", "tensorboardX", "rich", "tqdm", "sklearn",
           "ml_collections", "absl", "transformers", "torch", "bm25s", "matplotlib", "huggingface_hub"}

class Installed:
    # another finder of modules, without the blocked ones
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in BLOCKED else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Installed(finder) for finder in sys.meta_path if hasattr(finder, "find_spec")]
for name in [name for name in sys.modules if name.partition(".")[0] in BLOCKED]:
    del sys.modules[name]
sys.path.insert(0, "benchmarks")
import sweep
for stage in ("train", "rank"):
    sweep.main([*sys.argv[1:], "--stage", stage])
"""


def write_pretrained(folder):
    """A plain encoder with its tokenizer, in a Hugging Face directory."""
    texts = [text for domain in tiny_run.SIZES for pair in tiny_run.texts(domain, 70, seed=0) for text in pair]
    Tokenizer.train(texts, 150).save(folder / "tokenizer")
    vocabulary = Tokenizer.load(folder / "tokenizer").vocab_size
    model = biencoder(vocab_size=vocabulary, layers=1, mlp_width=32, max_positions=32)
    save_pretrained(model, folder / "pretrained", tokenizer=folder / "tokenizer", settings=TextSettings())


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Two variants with two seeds: prepared and evaluated here, trained and ranked where little is installed."""
    folder = tmp_path_factory.mktemp("sweep")
    tiny_run.write_data(folder)
    write_pretrained(folder)
    inputs = ["--pairs", f"{folder}/pairs.jsonl", "--evaluation", f"{folder}/held", "--queries", "10"]
    command = ["--workdir", f"{folder}/runs", "--variants", *VARIANTS]
    define = ["--sweep", "table1", "--seeds", "0", "1", "--steps", "3", "--start", f"{folder}/pretrained", *inputs]
    sweep.main([*command, *define, "--set", *TINY, "--stage", "prepare"])
    for name in ("pairs.jsonl", "held", "pretrained", "tokenizer"):  # the other machine has the work directory only
        (folder / name).rename(folder / f"{name}.away")
    ran = subprocess.run([sys.executable, "-c", BARE, *command], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    sweep.main([*command, "--stage", "evaluate"])
    return folder / "runs"


@pytest.mark.slow
def test_each_variant_and_seed_has_a_work_directory_with_scores_of_each_query(swept):
    assert sorted(json.loads((swept / sweep.SWEEP).read_text())["runs"]) == sorted(RUNS)
    for name in RUNS:
        scores = Scores.from_json(json.loads((swept / name / compare.PER_QUERY).read_text()))
        assert all(len(queries) == 10 for queries in scores.per_query["held"].values())
    config = json.loads((swept / RUNS[1] / "config.json").read_text())["config"]
    assert config["batching"]["method"] == "clustered" and config["model"]["context_attention"] == "isolated"
    assert config["train"]["steps"] == 3 and config["model"]["init"]["second_stage"] == str(swept / "start")


@pytest.mark.slow
def test_each_seed_trains_on_batches_of_its_own(swept):
    """From pretrained weights nothing else would distinguish the seeds of a biencoder."""
    plans = {name: (swept / name / "plan" / "rows.bin").read_bytes() for name in RUNS}
    assert len(set(plans.values())) == len(RUNS)


@pytest.mark.slow
def test_work_directories_share_what_fits(swept):
    inodes = [os.stat(swept / name / "store" / "pairs" / "query_tokens.values.bin").st_ino for name in RUNS]
    assert len(set(inodes)) == 1
    vectors = [os.stat(swept / name / "store" / "vectors" / "queries.bin").st_ino for name in RUNS]
    assert vectors[0] == vectors[1] != vectors[2] == vectors[3]  # LSA depends on the seed


@pytest.mark.slow
def test_the_same_command_trains_nothing_again(swept, capsys):
    before = {name: (swept / name / "metrics.jsonl").read_bytes() for name in RUNS}
    sweep.main(["--workdir", str(swept), "--stage", "train", "--seeds", "0"])
    assert before == {name: (swept / name / "metrics.jsonl").read_bytes() for name in RUNS}
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["variant"] for line in lines] == VARIANTS and lines[0]["step"] == 3
    assert lines[1]["changes"]["model.kind"] == "contextual" and "held" not in lines[0]["mean"]


@pytest.mark.slow
def test_the_comparison_pairs_queries_with_the_baseline(swept, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compare.py", str(swept)])
    compare.main()
    content = json.loads((swept / "comparison.json").read_text())
    rows = {(row["variant"], row["kind"]): row for row in content["rows"]}
    assert content["baseline"] == VARIANTS[0] and content["idf_shift"]["held"] > 0
    first, context = rows[VARIANTS[0], "none"], rows[VARIANTS[1], "same corpus"]
    assert context["difference"] == pytest.approx(context["mean"] - first["mean"]) and context["seeds"] == 2
    assert "difference" not in first and context["baseline_kind"] == "none" and context["sets"] == 1
    assert (VARIANTS[1], "BM25") not in rows
    assert f"difference to {VARIANTS[0]}" in capsys.readouterr().out


def scores(**kinds):
    return Scores(10, {"set": {kind: dict(zip("abcd", values, strict=False)) for kind, values in kinds.items()}})


def test_a_variant_is_compared_over_the_seeds_that_the_baseline_has():
    first = {0: scores(none=[0.1, 0.3]), 1: scores(none=[0.2, 0.4])}
    other = {1: scores(same=[0.5, 0.5], none=[0.2, 0.4]), 2: scores(same=[0.9, 0.9], none=[0.9, 0.9])}
    runs = {"first": first, "other": other}
    first, same, none = compare.rows(runs, "first")
    assert first["mean"] == pytest.approx(0.25) and first["sd"] == pytest.approx(0.07071, abs=1e-5)
    assert same["difference"] == pytest.approx(0.2) and same["baseline_kind"] == "none" and same["wins"] == 1
    assert none["difference"] == 0 and none["wins"] == 0 and none["mean"] == pytest.approx(0.6)


def test_idf_shift_is_the_mean_log_ratio_of_rates():
    training = np.array([99, 9, 0])
    assert compare.idf_shift(training, 99, training, 99) == 0
    assert compare.idf_shift(training, 99, np.array([99, 49, 0]), 99) == pytest.approx(np.log(49.5 / 9.5) * 49 / 148)
    assert compare.document_rates([np.array([1, 1, 2]), np.array([2])], 4).tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("name", SWEEPS)
def test_every_variant_is_a_configuration(name):
    module = sweep.load_sweep(name)
    base = import_module(f"configs.{module.BASE}").get_config().to_dict()
    common = dict(module.CHANGES) | {"data.paths": ("pairs.jsonl",)}
    configs = [from_config_dict(with_changes(base, common | dict(own))) for own in module.VARIANTS.values()]
    assert len(set(map(repr, configs))) == len(configs)  # no two variants are the same


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep", "tabel1"], "unknown sweep 'tabel1': known are .*table1"),
        (["--sweep", "demo", "--variants", "join"], r"no variant matches \['join'\]: the sweep has biencoder"),
        (["--sweep", "demo", "--set", "train.steps"], "expected SECTION.KEY=VALUE"),
        (["--sweep", "demo", "--set", "train.step=3"], "did you mean `train.steps`"),
        (["--sweep", "demo", "--evaluation", "nowhere"], "nowhere: expected corpus.jsonl"),
        ([], "sweep.json"),
    ],
)
def test_bad_arguments_exit_with_a_message_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(SystemExit) as error:
        sweep.main(["--workdir", str(tmp_path / "runs"), *arguments])
    assert str(error.value).startswith("error: ")
    with pytest.raises(ValueError, match=message):
        raise ValueError(str(error.value))
    assert not (tmp_path / "runs").exists()


def test_settings_are_json_or_text():
    assert sweep.settings(["a.b=1e-4", "a.c=text", "a.d=null"]) == {"a.b": 1e-4, "a.c": "text", "a.d": None}


def test_a_cut_keeps_relevant_documents_and_is_the_same_each_time():
    qrels = {f"q{i}": {f"d{i}": 1, f"d{i + 20}": 0} for i in range(10)} | {"q10": {"d0": 0}}
    dataset = EvaluationSet("set", {q: q for q in qrels}, {f"d{i}": "text" for i in range(40)}, qrels)
    small = evaluation_sets.cut(dataset, 4, 9, 0)
    assert len(small.queries) == 4 and len(small.corpus) == 9 and "q10" not in small.queries
    assert all(f"d{query[1:]}" in small.corpus for query in small.queries)
    assert all(document in small.corpus for grades in small.qrels.values() for document in grades)
    assert small == evaluation_sets.cut(dataset, 4, 9, 0) != evaluation_sets.cut(dataset, 4, 9, 1)
    assert len(evaluation_sets.cut(dataset, 0, 0, 0).corpus) == 40


def test_no_query_has_a_part_in_its_own_whitening():
    vectors = whiten.Vectors(*(np.arange(7.0)[:, None] for _ in range(3)))
    parts = list(whiten.parts(vectors, vectors, vectors.documents, "queries"))
    assert sorted(np.concatenate([rows for rows, _ in parts]).tolist()) == list(range(7))
    assert all(sorted([*rows, *queries[:, 0]]) == list(range(7)) for rows, queries in parts)


def test_speed_ratios_compare_rounds():
    seconds = {"first": [1.0, 2.0, 4.0], "other": [0.5, 4.0, 4.0]}
    assert harness.speed_ratio(seconds, "other") == {"ratio_to_first": 1.0, "ratio_range": [0.5, 2.0]}
    called = []
    taken = harness.take_turns({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 2)
    assert called == ["a", "b", "a", "b"] and [len(times) for times in taken.values()] == [2, 2]


@pytest.mark.parametrize(
    "name",
    [
        "cluster",
        "cost",
        "embedder",
        "encode",
        "figure",
        "gpu",
        "installation",
        "kernels",
        "memory",
        "plan",
        "profile_step",
        "train_step",
    ],
)
def test_benchmarks_import(name):
    assert import_module(name).main
