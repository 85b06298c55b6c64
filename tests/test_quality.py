"""The laboratory of benchmarks/quality, end to end on tiny arrays, and each of its errors."""

import argparse
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from tiny_models import biencoder, contextual

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from quality import arrays, evaluation, prepare, results, scoring, settings, summary, train, training, variants  # noqa: E402

from cde_jax.adapters.whitening import pseudo_queries  # noqa: E402
from cde_jax.config import flatten, from_config_dict  # noqa: E402
from cde_jax.data.tokens import Tokenizer  # noqa: E402
from cde_jax.stages.prepare import TOKENIZER  # noqa: E402
from configs import minilm  # noqa: E402

TINY = [
    "data.vocab_size=150", "data.query_length=8", "data.document_length=16", "batching.surrogate_width=8",
    "batching.batch_size=16", "batching.cluster_size=32", "batching.iterations=5", "batching.tries=1",
    "model.backbone=nomic", "model.width=32", "model.layers=2", "model.heads=2", "model.mlp_width=32",
    "model.max_positions=32", "model.context_size=4", "model.soft_prompt=2", "train.learning_rate=0.01",
    "train.devices=1", "train.text_lengths=1",
]  # fmt: skip
BOTH = ["random-biencoder", "source-domain"]
CONTEXTUAL = BOTH[1]


def write_sets(folder):
    """Two sets with some ungraded and some irrelevant documents."""
    for name, domain in (("one", "sea"), ("two", "sky")):
        pairs = tiny_run.texts(domain, 14, seed=1)
        (folder / name).mkdir(parents=True)
        corpus = [{"_id": f"d{i}", "text": document} for i, (_, document) in enumerate(pairs)]
        tiny_run.write_lines(folder / name / "corpus.jsonl", corpus)
        queries = [{"_id": f"q{i}", "text": query} for i, (query, _) in enumerate(pairs[:6])]
        tiny_run.write_lines(folder / name / "queries.jsonl", queries)
        lines = [f"q{i}\td{i}\t2\nq{i}\td{i + 6}\t1\nq{i}\td13\t0\n" for i in range(6)]
        (folder / name / "qrels.tsv").write_text("".join(lines))


def prepare_arguments(folder, *more, changes=()):
    paths = ["--out", f"{folder}/lab.zip", "--pairs", f"{folder}/pairs.jsonl", "--evaluation", f"{folder}/sets"]
    return prepare._arguments([*paths, *more, "--config", "base", "--set", *TINY, *changes])


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The folder of an array file with its sources."""
    folder = tmp_path_factory.mktemp("lab")
    tiny_run.write_data(folder)
    write_sets(folder / "sets")
    prepare.make(prepare_arguments(folder))
    return folder / "lab.zip"


def train_arguments(lab, out, *more, variants=BOTH, seeds=(0,), steps=3):
    command = [str(lab), "--out", str(out), "--variants", *variants, "--no-start"]
    return train._arguments([*command, "--seeds", *map(str, seeds), "--steps", str(steps), *more])


@pytest.fixture(scope="module")
def trained(lab, tmp_path_factory):
    """A results directory: two variants with one seed, and another seed of the biencoder."""
    out = tmp_path_factory.mktemp("results")
    train.run(train_arguments(lab, out))
    train.run(train_arguments(lab, out, variants=BOTH[:1], seeds=(1,)))
    return out


def test_the_file_says_what_is_in_it_and_names_no_path(lab):
    with zipfile.ZipFile(lab) as file:
        about, config = (json.loads(file.read(name)) for name in (arrays.ABOUT, arrays.CONFIG))
        assert not [name for name in file.namelist() if str(lab.parent).encode() in file.read(name)]
    assert about["sets"]["one"]["queries"] == 6 and about["sets"]["one"]["documents"] == 14
    assert about["sets"]["one"]["idf_shift"] > 0
    assert set(about["plans"]) == {"random", "clustered"}
    assert from_config_dict(config).data.paths == ("pairs.jsonl",)


def test_beginnings_are_in_the_file_as_queries(lab, tmp_path):
    opened = arrays.unpack(lab, tmp_path)
    data, one = opened.config["data"], evaluation.read_all([lab.parent / "sets"])[0]
    texts = pseudo_queries([one.corpus[name] for name in sorted(one.corpus)], opened.config["seed"])
    tokenizer = Tokenizer.load(Path(f"{lab}.work") / TOKENIZER)
    expected = tokenizer.encode([data["query_prefix"] + text for text in texts], data["query_length"])
    found = opened.sets[0].beginnings
    assert [found.row(i).tolist() for i in range(found.count())] == [list(row) for row in expected]


def test_each_run_has_a_line_with_every_set_and_kind_of_context(trained):
    lines = results.read(trained)
    assert [(line["variant"], line["seed"]) for line in lines] == [(BOTH[0], 0), (BOTH[1], 0), (BOTH[0], 1)]
    biencoder, with_context = lines[:2]
    whitened = set(summary.WHITENED)
    assert set(biencoder["ndcg@10"]["one"]) == {scoring.NONE} | whitened
    assert set(with_context["ndcg@10"]["two"]) == {scoring.SAME, scoring.OTHER, scoring.NONE} | whitened
    assert biencoder["steps"] == 3 and {"device", "jax", "commit"} <= set(biencoder)
    queries = results.load_queries(trained, CONTEXTUAL, 0)
    assert queries["one"][scoring.SAME].mean() == pytest.approx(with_context["ndcg@10"]["one"][scoring.SAME], abs=1e-5)
    assert lines[0]["loss"] != lines[2]["loss"]  # seeds differ
    assert not list(trained.glob("*.safetensors"))


def test_a_model_that_never_read_a_context_is_measured_without_one(lab, tmp_path):
    train.run(train_arguments(lab, tmp_path, variants=["null-1.0"], steps=1))
    (line,) = results.read(tmp_path)
    assert set(line["ndcg@10"]["one"]) == {scoring.NONE, *summary.WHITENED}


def test_a_second_call_trains_nothing_and_summarises(lab, trained, capsys):
    before = (trained / results.LINES).read_bytes()
    train.run(train_arguments(lab, trained))
    assert (trained / results.LINES).read_bytes() == before
    printed = capsys.readouterr().out
    assert f"{CONTEXTUAL}: same above other corpus on" in printed and f"{BOTH[0]}  none" in printed
    train.main([str(lab), "--out", str(trained), "--summary"])
    assert set(BOTH) == set(json.loads((trained / "summary.json").read_text())["gains"])


def test_a_killed_run_goes_on_to_the_same_result(lab, trained, tmp_path, monkeypatch):
    write, saved = training.store, []

    def store_and_die(*arguments):
        write(*arguments)
        saved.append(arguments[0])
        raise KeyboardInterrupt

    arguments = train_arguments(lab, tmp_path, "--save-every", "2", variants=[CONTEXTUAL])
    monkeypatch.setattr(training, "store", store_and_die)
    with pytest.raises(KeyboardInterrupt):
        train.run(arguments)
    monkeypatch.undo()
    assert saved[0].exists() and not results.read(tmp_path)
    train.run(arguments)
    again, straight = results.read(tmp_path)[0], results.read(trained)[1]
    assert again["loss"] == straight["loss"] and again["ndcg@10"] == straight["ndcg@10"]


def test_each_seed_trains_on_batches_of_its_own(lab, tmp_path, monkeypatch):
    """From pretrained weights nothing else would tell a biencoder's seeds apart."""
    places, batches = [], training._batches

    def watched(made, batch, first):
        return batches(made, lambda step: places.append(int(batch(step)["plan_batch"][0])) or batch(step), first)

    monkeypatch.setattr(training, "_batches", watched)
    train.run(train_arguments(lab, tmp_path, variants=BOTH[:1], seeds=(0, 1), steps=2))
    plan = arrays.unpack(lab, tmp_path / "arrays").plan("random")
    assert places == [step % len(plan) for step in range(4)]


def test_every_group_is_known_and_every_variant_names_a_plan():
    assert set(variants.expand(list(variants.GROUPS))) == set(variants.VARIANTS)
    assert all(variant["plan"] in variants.PLANS for variant in variants.VARIANTS.values())


def test_every_variant_is_a_configuration():
    assert not variants.GROUPS.keys() & variants.VARIANTS.keys()  # a name means one thing
    base = minilm.get_config().to_dict()
    for variant in variants.VARIANTS.values():
        changes = {key: value for key, value in variant.items() if key not in ("plan", "start")}
        config = from_config_dict(settings.override(base, variants.PLANS[variant["plan"]], changes))
        assert changes.items() <= flatten(config.as_dict()).items()


# Pretrained weights.


def test_a_start_fills_both_stages_and_one_of_another_shape_is_refused(tmp_path):
    model, source = contextual("isolated"), biencoder(seed=5)
    said = prepare._write_start(tmp_path, source.encoder, argparse.Namespace(start="a/model", start_layers=2))
    assert said["name"] == "model"
    training.put_start(model, tmp_path / arrays.START)
    for encoder in (model.encoder, model.first_stage.encoder):
        np.testing.assert_allclose(
            encoder.word.embedding[...], source.encoder.word.embedding[...], rtol=1e-3, atol=1e-6
        )
    with pytest.raises(ValueError, match=r"not those of the model's encoder .*expected .*--no-start"):
        training.put_start(biencoder(layers=3), tmp_path / arrays.START)


# Bad input: one clear sentence each.


def test_a_set_without_relevant_documents_is_refused(lab, tmp_path):
    shutil.copytree(lab.parent / "sets", tmp_path / "sets")
    (tmp_path / "sets" / "two" / "qrels.tsv").write_text("q0\td0\t0\n")
    with pytest.raises(ValueError, match=r"two: none of the 1 queries in its qrels has a relevant document"):
        evaluation.read_all([tmp_path / "sets"])
    (tmp_path / "sets" / "two" / "qrels.tsv").unlink()
    with pytest.raises(ValueError, match=r"two: expected qrels.tsv"):
        evaluation.read_all([tmp_path / "sets"])
    with pytest.raises(ValueError, match=r"expected an evaluation set"):
        evaluation.read_all([tmp_path / "nothing"])


def test_an_unknown_variant_is_named_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match=r"unknown variant 'clustered-isolate': did you mean clustered-isolated"):
        train.run(train_arguments(tmp_path / "none.zip", tmp_path / "out", variants=["clustered-isolate"]))
    with pytest.raises(ValueError, match=r"unknown plan 'randm': did you mean random"):
        variants.plans(["randm"])
    assert not (tmp_path / "out").exists()


def changed(lab, out, name, change):
    """The array file with one part changed."""
    with zipfile.ZipFile(lab) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.namelist():
            new.writestr(entry, change(old.read(entry)) if entry == name else old.read(entry))
    return out


def test_a_file_of_another_version_or_damaged_is_refused(lab, tmp_path):
    def older(content):
        return json.dumps(json.loads(content) | {"format": 0}).encode()

    def refused(file, message):
        with pytest.raises(ValueError, match=message):
            arrays.unpack(file, tmp_path / "arrays")
        shutil.rmtree(tmp_path / "arrays", ignore_errors=True)

    old = changed(lab, tmp_path / "old.zip", arrays.ABOUT, older)
    refused(old, f"expected an array file of format {arrays.FORMAT}, got 0")
    values = f"{arrays.STORE}/query_tokens.values.bin"
    refused(changed(lab, tmp_path / "b.zip", values, lambda content: content[:-2] + b"\0\0"), "expected sha256")
    refused(changed(lab, tmp_path / "c.zip", arrays.CONFIG, lambda _: b"{}"), "configuration was altered")
    (tmp_path / "cut.zip").write_bytes(lab.read_bytes()[:-300])
    refused(tmp_path / "cut.zip", "not an array file, or damaged")
    broken = bytearray(lab.read_bytes())
    with zipfile.ZipFile(lab) as file:
        broken[file.getinfo(values).header_offset + 120] ^= 255
    (tmp_path / "flip.zip").write_bytes(broken)
    refused(tmp_path / "flip.zip", "flip.zip: damaged")
    refused(tmp_path / "none.zip", "there is none; make one with prepare.py")


def test_another_plan_in_the_file_is_refused(lab, tmp_path):
    ours = arrays.unpack(lab, tmp_path / "arrays")
    shutil.rmtree(tmp_path / "arrays" / "plans" / "random")
    shutil.copytree(tmp_path / "arrays" / "plans" / "clustered", tmp_path / "arrays" / "plans" / "random")
    with pytest.raises(ValueError, match=r"plan 'random' was altered: expected fingerprint"):
        ours.plan("random")
    with pytest.raises(ValueError, match=r"no plan 'clustered-128', only random, clustered; make it with"):
        train.run(train_arguments(lab, tmp_path / "out", variants=["clustered-128-biencoder"]))
    with pytest.raises(ValueError, match=r"was made with batching.batch_size = 16, not 8"):
        train.run(train_arguments(lab, tmp_path / "out", "--set", "batching.batch_size=8"))


def test_results_of_other_arrays_or_settings_are_kept_apart(lab, trained, tmp_path):
    with pytest.raises(ValueError, match=r"results of other settings .steps: 3 there, 4 now"):
        train.run(train_arguments(lab, trained, steps=4))
    with pytest.raises(ValueError, match=r"train.learning_rate: None there, 0.1 now"):
        train.run(train_arguments(lab, trained, "--set", "train.learning_rate=0.1"))
    train.run(train_arguments(lab, trained, "--set", "train.document_chunk=4"))  # memory alone: the same results
    prepare.make(prepare_arguments(lab.parent, "--out", str(tmp_path / "b.zip"), "--queries", "3", "--workdir",
                                   f"{lab}.work"))  # fmt: skip
    with pytest.raises(ValueError, match="has results of other arrays"):
        train.run(train_arguments(tmp_path / "b.zip", trained))


def test_a_variant_that_means_something_else_now_is_refused(lab, trained, monkeypatch):
    monkeypatch.setitem(variants.VARIANTS, CONTEXTUAL, variants.VARIANTS[CONTEXTUAL] | {"model.slot_bias": 0.0})
    with pytest.raises(ValueError, match=f"results of {CONTEXTUAL} with seed 0 of another definition"):
        train.run(train_arguments(lab, trained))


def test_pretrained_weights_that_are_not_there_are_missed_at_once(lab, tmp_path):
    arguments = train_arguments(lab, tmp_path)
    arguments.no_start = False
    with pytest.raises(ValueError, match=f"{', '.join(BOTH)} start from pretrained weights, and the array file"):
        train.run(arguments)


def test_a_damaged_or_foreign_state_is_refused(tmp_path):
    state = training.TrainState(jnp.zeros((), jnp.int32), {"a": jnp.ones(3)}, ())
    training.store(tmp_path / "state", state, np.ones(2, np.float32), 1.5, "ours")
    back, losses, seconds = training.restore(tmp_path / "state", state, "ours")
    assert back.params["a"].tolist() == [1, 1, 1] and losses.tolist() == [1, 1] and seconds == 1.5
    with pytest.raises(ValueError, match="expected the state of run theirs"):
        training.restore(tmp_path / "state", state, "theirs")
    (tmp_path / "state").write_bytes((tmp_path / "state").read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"damaged .*remove it"):
        training.restore(tmp_path / "state", state, "ours")


def test_out_of_memory_says_which_chunk_to_try(lab, tmp_path):
    ours = arrays.unpack(lab, tmp_path / "arrays")
    config = from_config_dict(settings.override(ours.config, {"train.document_chunk": 8}))
    with pytest.raises(MemoryError, match=r"=8: try --set train.document_chunk=4 train.context_chunk=4"):  # noqa: SIM117
        with training.explained_memory(config):
            jnp.zeros((1 << 50,), jnp.int8).block_until_ready()
    config = from_config_dict(settings.override(ours.config, {"train.document_chunk": 1}))
    assert "even single texts do not fit" in training.advice(config)


def test_a_line_that_was_cut_short_is_left_out(tmp_path, capsys):
    (tmp_path / results.LINES).write_text('{"variant": "a"}\n{"varia')
    results.append(tmp_path, {"variant": "b", "file": "none"})
    assert [line["variant"] for line in results.read(tmp_path)] == ["a", "b"]
    assert "results.jsonl:2: cut short" in capsys.readouterr().err


def test_a_change_without_a_value_is_refused():
    assert settings.parse(["a.b=1e-4", "a.c=text"]) == {"a.b": 1e-4, "a.c": "text"}
    with pytest.raises(ValueError, match=r"expected SECTION.KEY=VALUE"):
        settings.parse(["train.steps"])
    with pytest.raises(ValueError, match="'seed' is no section"):
        settings.override({"seed": 1}, {"seed.x": 2})


BARE = """
import sys
import jax, flax, optax, numpy, safetensors.numpy, jaxtyping
known = set(sys.modules)
sys.path.insert(0, "benchmarks/quality")
import train
heavy = {"faiss", "grain", "sklearn", "scipy", "tokenizers", "transformers", "torch", "orbax", "ml_collections", "absl",
         "tqdm", "rich", "pytrec_eval", "huggingface_hub", "threadpoolctl", "tensorboardX", "pandas", "matplotlib"}
print(sorted(heavy & {name.split(".")[0] for name in set(sys.modules) - known}))
"""


def test_the_second_command_loads_only_what_a_bare_image_has():
    ran = subprocess.run([sys.executable, "-c", BARE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "[]", ran.stderr
