"""The export command: a finished run's model for others, alone or with a corpus baked in."""

import gzip
import json

import numpy as np
import pytest
from test_interop import CONFIGS, SETTINGS, TEXTS, equal, random_model, tokenizer

from cde_jax.interop.read import load_model
from cde_jax.interop.write import save_pretrained
from cde_jax.retrieval.embedder import Embedder
from cde_jax.stages.export import export_run, read_corpus

__all__ = ["tokenizer"]


@pytest.fixture
def workdir(tmp_path, tokenizer):
    model = random_model(CONFIGS["isolated"])
    save_pretrained(model, tmp_path / "run/export", tokenizer=tokenizer, settings=SETTINGS, card="# Measured: 0.5")
    return tmp_path / "run"


def test_the_model_and_its_card_are_written(tmp_path, workdir):
    assert "the model" in export_run(workdir, tmp_path / "out")
    assert equal(load_model(tmp_path / "out"), load_model(workdir / "export"))
    assert (tmp_path / "out/README.md").read_text() == "# Measured: 0.5"


def test_a_corpus_is_baked_in_for_servers_that_know_no_context(tmp_path, workdir):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: ONNX was not run")
    corpus = ["dogs and cats", "the night", "a city", "roads", "a man"]
    (tmp_path / "corpus.txt").write_text("\n".join(corpus))
    export_run(workdir, tmp_path / "out", tmp_path / "corpus.txt", seed=1)
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
    rows = [{"_id": "1", "title": "Title", "text": "body"}, {"text": "no title"}, {"title": None, "text": "null"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_corpus(tmp_path / "b.jsonl") == ["Title body", "no title", "null"]
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write((tmp_path / "b.jsonl").read_bytes())
    assert read_corpus(tmp_path / "b.jsonl.gz") == read_corpus(tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.jsonl", b'{"text": "fine"}\n{"txt": "wrong"}\n', r"c\.jsonl:2: expected the key 'text'"),
        ("c.jsonl", b'{"text": 3}', r"c\.jsonl:1: expected text as 'text', got int"),
        ("c.jsonl", b'{"text": "a", "title": ["b"]}', r"c\.jsonl:1: expected text as 'title', got list"),
        ("c.jsonl", b'{"text": " "}', r"c\.jsonl:1: 'text' has no text"),
        ("c.jsonl", b"[1]", r"c\.jsonl:1: expected a JSON object"),
        ("c.jsonl", b"", r"c\.jsonl"),
        ("c.txt", b"\n \n", r"c\.txt: expected a text a line, found none"),
        ("c.txt", "Köln".encode("latin-1"), r"c\.txt:1: from here not readable .*utf-8"),
        ("none.txt", None, "no such file"),
    ],
)
def test_what_is_wrong_with_a_corpus_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_corpus(tmp_path / name)


def test_bad_arguments_are_named(tmp_path, workdir):
    with pytest.raises(ValueError, match="--stage=export"):
        export_run(tmp_path / "none", tmp_path / "out")
    with pytest.raises(ValueError, match=r"--seed must be ≥ 0 and < 4294967296, got -1"):
        export_run(workdir, tmp_path / "out", seed=-1)
    with pytest.raises(ValueError, match="is the export that is read"):
        export_run(workdir, workdir / "export")
