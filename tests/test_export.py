"""The export command: a finished run's model for others, alone or with a corpus baked in."""

import json

import numpy as np
import pytest
from test_interop import CONFIGS, SETTINGS, TEXTS, equal, random_model, tokenizer

from cde_jax.export import export, read_corpus
from cde_jax.interop.read import load_model
from cde_jax.interop.write import save_pretrained
from cde_jax.retrieval.embedder import Embedder

__all__ = ["tokenizer"]


@pytest.fixture
def workdir(tmp_path, tokenizer):
    model = random_model(CONFIGS["isolated"])
    save_pretrained(model, tmp_path / "run/export", tokenizer=tokenizer, settings=SETTINGS, card="# Measured: 0.5")
    return tmp_path / "run"


def test_the_model_and_its_card_are_written(tmp_path, workdir):
    assert "the model" in export(workdir, tmp_path / "out", None, 0)
    assert equal(load_model(tmp_path / "out"), load_model(workdir / "export"))
    assert (tmp_path / "out/README.md").read_text() == "# Measured: 0.5"


def test_a_corpus_is_baked_in_for_servers_that_know_no_context(tmp_path, workdir):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: ONNX was not run")
    corpus = ["dogs and cats", "the night", "a city", "roads", "a man"]
    (tmp_path / "corpus.txt").write_text("\n".join(corpus))
    export(workdir, tmp_path / "out", tmp_path / "corpus.txt", seed=1)
    embedder = Embedder.from_pretrained(workdir / "export")
    expected = embedder.encode_queries(TEXTS, embedder.embed_context(corpus, seed=1))
    session = onnxruntime.InferenceSession(str(tmp_path / "out/onnx/model.onnx"))
    for text, vector in zip(TEXTS, expected, strict=True):
        (ids,) = embedder.tokenizer.encode([SETTINGS.query_prefix + text], SETTINGS.query_length)
        feed = {"input_ids": ids[None].astype(np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}
        assert np.abs(session.run(None, feed)[0][0] - vector).max() <= 1e-4


def test_corpora_are_lines_or_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one text\n\nanother\n")
    assert read_corpus(tmp_path / "a.txt") == ["one text", "another"]
    rows = [{"_id": "1", "title": "Title", "text": "body"}, {"text": "no title"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_corpus(tmp_path / "b.jsonl") == ["Title body", "no title"]
    (tmp_path / "c.jsonl").write_text('{"text": "fine"}\n{"txt": "wrong"}\n')
    with pytest.raises(ValueError, match=r"c.jsonl:2: expected an object with a text"):
        read_corpus(tmp_path / "c.jsonl")
    with pytest.raises(ValueError, match="no such file"):
        read_corpus(tmp_path / "none.txt")


def test_an_unfinished_run_is_told_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="--stage=export"):
        export(tmp_path, tmp_path / "out", None, 0)
