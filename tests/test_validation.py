"""Development sets: their scores choose the checkpoint, their pairs have a loss, and they are not reported."""

import json
import logging

import numpy as np
import pytest
from test_stages import go
from tiny_run import texts, write_data, write_lines

from cde_jax import Embedder
from cde_jax.data.files import read_json
from cde_jax.data.sources.beir import EvaluationSet
from cde_jax.evaluation import validation
from cde_jax.training.losses import info_nce


def dataset(qrels):
    queries = dict.fromkeys(qrels, "text")
    return EvaluationSet("sea", queries, {f"d{i}": "text" for i in range(6)}, qrels)


def test_the_loss_of_pairs_is_that_of_training_without_false_negatives():
    qrels = {"a": {"d0": 1, "d4": 2, "d5": 2}, "b": {"d1": 1, "d4": 1}, "c": {"d2": 0}, "e": {"d3": 1}, "f": {"d5": 1}}
    random = np.random.default_rng(0)
    q, d = random.normal(size=(5, 8)).astype(np.float32), random.normal(size=(6, 8)).astype(np.float32)
    pairs = {0: 4, 1: 1, 3: 3, 4: 5}  # the best document of each query that has one, of equal ones the first
    keep = np.ones((4, 4), bool)
    keep[1, 0] = keep[0, 3] = False  # d4 is relevant to b, d5 to a
    whole = float(info_nce(q[list(pairs)], d[list(pairs.values())], keep, 0.1)[0])
    assert validation.pair_loss(dataset(qrels), q, d, 16, 0.1) == pytest.approx(whole)
    assert validation.pair_loss(dataset(qrels), q, d, 4, 0.1) == pytest.approx(whole)
    halves = [float(info_nce(q[i], d[j], keep[k, k], 0.1)[0]) for i, j, k in HALVES]
    assert validation.pair_loss(dataset(qrels), q, d, 2, 0.1) == pytest.approx(np.mean(halves))
    first = [([0, 1, 3], [4, 1, 3], slice(0, 3))]  # the rest, one pair, is left out
    expected = float(info_nce(*(x[i] for x, i in zip((q, d), first[0][:2], strict=True)), keep[:3, :3], 0.1)[0])
    assert validation.pair_loss(dataset(qrels), q, d, 3, 0.1) == pytest.approx(expected)


HALVES = (([0, 1], [4, 1], slice(0, 2)), ([3, 4], [3, 5], slice(2, 4)))


def test_a_set_without_judgements_has_no_loss():
    q = np.ones((1, 8), np.float32)
    assert np.isnan(validation.pair_loss(dataset({"a": {"d0": 0}}), q, np.ones((6, 8), np.float32), 4, 0.1))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three evaluation sets, two of which are development sets."""
    data = write_data(tmp_path_factory.mktemp("data"))
    for name, domain in (("sky", "sky"), ("wood", "wood")):
        folder = data / name
        folder.mkdir()
        pairs = texts(domain, 10, seed=1)
        write_lines(folder / "corpus.jsonl", [{"_id": f"d{i}", "text": d} for i, (_, d) in enumerate(pairs)])
        write_lines(folder / "queries.jsonl", [{"_id": f"q{i}", "text": q} for i, (q, _) in enumerate(pairs)])
        (folder / "qrels.tsv").write_text("".join(f"q{i}\td{i}\t1\n" for i in range(10)))
    return data


def run(data, workdir, stage="all", **changes):
    sets = tuple(str(data / name) for name in ("held", "sky", "wood"))
    changes = {"train__evaluate_every": 2, "evaluate__baselines": False} | changes
    return go(data, workdir, stage, data__evaluation=sets, evaluate__development=("sky", "wood"), **changes)


def test_several_development_sets_choose_the_checkpoint_by_their_mean(data, tmp_path):
    run(data, tmp_path, train__ema_decay=0.5, train__matryoshka=(4, 8))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    measured = {line["step"]: line for line in lines if "score" in line}
    assert list(measured) == [2, 4, 6]
    for line in measured.values():
        for name in ("score", "validation_loss"):
            parts = [line[f"{name}/{of}"] for of in ("sky", "wood")]
            assert line[name] == pytest.approx(np.mean(parts), rel=1e-5) and parts[0] != parts[1]
    assert measured[6]["validation_loss"] < measured[2]["validation_loss"]
    kept = {step: read_json(tmp_path / f"checkpoints/{step}/metadata/metadata")["score"] for step in (4, 6)}
    assert kept == {step: pytest.approx(measured[step]["score"], rel=1e-5) for step in kept}
    assert set(read_json(tmp_path / "evaluation.json")["sets"]) == {"held"}
    exported = Embedder.from_pretrained(tmp_path / "export")
    assert exported.dimensions == (4, 8, 16)


def test_without_pytrec_eval_development_sets_have_a_loss_and_the_newest_is_the_best(
    data, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(validation, "can_score", lambda: False)
    with caplog.at_level(logging.WARNING, logger="cde_jax"):
        run(data, tmp_path, "prepare")
        run(data, tmp_path, "train", train__steps=2)
    assert "development sets get no score, the newest checkpoint counts as best" in caplog.text
    (line,) = (x for x in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()) if "loss" not in x)
    assert "score" not in line and line["validation_loss"] > 0
