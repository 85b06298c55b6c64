"""Exports as others run them: sentence-transformers, transformers and onnxruntime, with no JAX and no network."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: the PyTorch side of exports was not run")
sentence_transformers = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
transformers = pytest.importorskip("transformers")

from test_interop import CONFIGS, LEARNED, ROTARY, SETTINGS, TEXTS, contextual, equal, random_model, tokenizer  # noqa: E402

from cde_jax.data.tokens import Tokenizer  # noqa: E402
from cde_jax.interop.architectures import backbone_keys, reference_config  # noqa: E402
from cde_jax.interop.read import load_model  # noqa: E402
from cde_jax.interop.reference_model import ReferenceContextualConfig, ReferenceEncoderConfig  # noqa: E402
from cde_jax.interop.write import export_corpus, save_pretrained  # noqa: E402
from cde_jax.models.contextual import Biencoder, BiencoderConfig  # noqa: E402

DOCUMENTS = ("a document about dogs", "another one", "the night in the city")
__all__ = ["tokenizer"]

# What sentence-transformers and transformers say while they load is theirs to fix.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def padded(folder: Path, texts, prefix: str = "", length: int = 32) -> tuple[np.ndarray, np.ndarray]:
    rows = Tokenizer.load(folder).encode([prefix + text for text in texts], length)
    mask = np.arange(max(map(len, rows))) < np.asarray([len(row) for row in rows])[:, None]
    ids = np.zeros(mask.shape, np.int32)
    ids[mask] = np.concatenate(rows)
    return ids, mask


@jax.jit
def embed(model, ids, mask, context=None):
    return model.embed(ids, mask) if context is None else model.embed(ids, mask, context)


@jax.jit
def embed_context(model, ids, mask):
    return model.embed_context(ids, mask)


def unit(vectors) -> np.ndarray:
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def sentence_transformer(folder: Path):
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)


def torch_tokens(ids: np.ndarray, mask: np.ndarray) -> dict:
    return {"input_ids": torch.from_numpy(ids).long(), "attention_mask": torch.from_numpy(mask).long()}


@pytest.mark.parametrize(
    ("name", "native"),
    [
        ("biencoder, rotary", "NomicBertModel"),
        ("biencoder, learned positions, first token", "BertModel"),
        ("biencoder with a head", "NomicBertModel"),
        ("biencoder with a residual head", "CdeModel"),
        ("biencoder of no native class", "CdeModel"),
    ],
)
def test_biencoders_run_in_sentence_transformers_and_come_back(tmp_path, tokenizer, name, native):
    model = random_model(CONFIGS[name])
    save_pretrained(model, tmp_path / "x", tokenizer=tokenizer, settings=SETTINGS)
    remote = native == "CdeModel"
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "x"), device="cpu", trust_remote_code=remote)
    expected = unit(embed(model, *padded(tokenizer, TEXTS, "query: ")))
    assert np.abs(unit(loaded.encode(list(TEXTS), prompt_name="query")) - expected).max() <= 1e-5
    if not remote:  # sentence-transformers normalises these itself
        assert np.abs(loaded.encode(list(TEXTS), prompt_name="query") - expected).max() <= 1e-5
    assert type(transformers.AutoModel.from_pretrained(tmp_path / "x", trust_remote_code=remote)).__name__ == native
    loaded.save(str(tmp_path / "back"))
    assert equal(load_model(tmp_path / "back"), model)


def numerics(name: str):
    keys = {
        "architecture": "transductive",
        "embedder": "somebody's",
        "transductive_corpus_size": 3,
        "transductive_sequence_dropout_prob": 0.1,
        "backbone_config": {**backbone_keys(ROTARY), "rotary_emb_interleaved": True},
    }
    return reference_config(keys, name, null=True, colon=lambda: 7)


CONTEXTUAL = {
    "joint": CONFIGS["joint"],
    "isolated": CONFIGS["isolated"],
    "joint, learned positions": contextual(LEARNED, context_attention="joint"),
    "isolated, learned positions": CONFIGS["isolated, learned positions"],
    "shipped": numerics("shipped"),
    "shipped-sequence": numerics("shipped-sequence"),
    "training": numerics("training"),
    "isolated, geglu, interleaved": contextual(
        ReferenceEncoderConfig(200, 16, 2, 2, 24, activation="geglu", rotary_fraction=0.5, rotary_interleaved=True)
    ),
}


SLOW = ("joint, learned positions", "shipped-sequence")  # each half is covered by a neighbour
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CONTEXTUAL]


@pytest.mark.parametrize("name", NAMES)
def test_two_stage_calls_give_our_vectors_and_the_weights_come_back(tmp_path, tokenizer, name):
    model = random_model(CONTEXTUAL[name])
    save_pretrained(model, tmp_path / "x", tokenizer=tokenizer, settings=SETTINGS)
    loaded = sentence_transformer(tmp_path / "x")
    context = loaded.encode(list(DOCUMENTS), prompt_name="document")
    vectors_of_context = embed_context(model, *padded(tokenizer, DOCUMENTS, "document: "))
    assert np.abs(context - vectors_of_context).max() <= 1e-5
    tokens = padded(tokenizer, TEXTS, "query: ")
    expected = np.asarray(embed(model, *tokens, vectors_of_context))
    for given in (context, torch.from_numpy(context)):
        vectors = loaded.encode(list(TEXTS), prompt_name="query", dataset_embeddings=given)
        assert np.abs(vectors - expected).max() <= 1e-5
    plain = transformers.AutoModel.from_pretrained(tmp_path / "x", trust_remote_code=True)
    with torch.no_grad():  # no context: null slots
        assert np.abs(plain(**torch_tokens(*tokens)).numpy() - embed(model, *tokens)).max() <= 1e-5
    loaded.save(str(tmp_path / "back"))
    assert equal(load_model(tmp_path / "back"), model)
    again = sentence_transformer(tmp_path / "back")
    np.testing.assert_array_equal(
        again.encode(list(TEXTS), dataset_embeddings=context), loaded.encode(list(TEXTS), dataset_embeddings=context)
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_corpus_export_serves_as_a_one_input_model(tmp_path, tokenizer, name):
    _, expected = corpus_export(tmp_path, tokenizer, name)
    vectors = sentence_transformer(tmp_path / "x").encode(list(TEXTS), prompt_name="query")
    assert np.abs(vectors - expected).max() <= 1e-5
    with pytest.raises(ValueError, match="context of a corpus"):
        load_model(tmp_path / "x")


@pytest.mark.parametrize(
    "name", [name if name == "isolated" else pytest.param(name, marks=pytest.mark.slow) for name in CONTEXTUAL]
)
def test_a_corpus_export_serves_as_onnx(tmp_path, tokenizer, name):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: ONNX was not run")
    tokens, expected = corpus_export(tmp_path, tokenizer, name, onnx=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "x/onnx/model.onnx"))
    assert [x.name for x in session.get_inputs()] == ["input_ids", "attention_mask"]
    feed = {"input_ids": tokens[0].astype(np.int64), "attention_mask": tokens[1].astype(np.int64)}
    assert np.abs(session.run(None, feed)[0] - expected).max() <= 1e-5
    one = {name: x[:1, : tokens[1][0].sum()] for name, x in feed.items()}  # another shape than the first
    assert np.abs(session.run(None, one)[0] - expected[:1]).max() <= 1e-5


def corpus_export(folder, tokenizer, name, *, onnx=False):
    """Exports a random model with a context to `folder`/x; the query tokens and what the model makes of them."""
    model = random_model(CONTEXTUAL[name])
    context = embed_context(model, *padded(tokenizer, DOCUMENTS))
    export_corpus(model, context, folder / "x", tokenizer=tokenizer, settings=SETTINGS, onnx=onnx)
    tokens = padded(tokenizer, TEXTS, "query: ")
    return tokens, unit(embed(model, *tokens, context))


def test_an_export_runs_without_jax_and_without_network(tmp_path, tokenizer):
    save_pretrained(random_model(CONFIGS["isolated"]), tmp_path / "x", tokenizer=tokenizer, settings=SETTINGS)
    script = f"""
import sys
sys.modules["jax"] = sys.modules["flax"] = sys.modules["cde_jax"] = None  # importing any of them fails
import socket
socket.socket.connect = None
from sentence_transformers import SentenceTransformer
model = SentenceTransformer({str(tmp_path / "x")!r}, trust_remote_code=True, device="cpu")
context = model.encode(["a", "b", "c"], prompt_name="document")
vectors = model.encode(["a text"], prompt_name="query", dataset_embeddings=context)
print(vectors.shape)
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip().endswith("(1, 16)")


def test_settings_that_run_in_jax_only_are_named(tmp_path, tokenizer):
    first = BiencoderConfig(ROTARY, head=True)
    options = {"context_attention": "joint", "numerics": "training", "pool_slots": True}
    config = ReferenceContextualConfig(first, ROTARY, 3, **options)
    model = random_model(config)
    save_pretrained(model, tmp_path / "x", tokenizer=tokenizer, settings=SETTINGS)
    assert equal(load_model(tmp_path / "x"), model)
    with pytest.raises(ValueError, match=r"cde_jax only: pool_slots"):
        transformers.AutoModel.from_pretrained(tmp_path / "x", trust_remote_code=True)
    with pytest.raises(ValueError, match=r"JAX only.*pool_slots"):
        export_corpus(model, None, tmp_path / "y", tokenizer=tokenizer, settings=SETTINGS)


def test_slots_without_a_soft_prompt_run_in_jax_only(tmp_path, tokenizer):
    model = random_model(contextual(ROTARY, soft_prompt=0))
    save_pretrained(model, tmp_path / "x", tokenizer=tokenizer, settings=SETTINGS)
    with pytest.raises(ValueError, match=r"cde_jax only: soft_prompt$"):
        transformers.AutoModel.from_pretrained(tmp_path / "x", trust_remote_code=True)
    with pytest.raises(ValueError, match=r"JAX only.*soft_prompt"):
        export_corpus(model, None, tmp_path / "y", tokenizer=tokenizer, settings=SETTINGS)
    assert not (tmp_path / "y").exists()


def test_lengths_and_prompts_are_those_of_the_settings(tmp_path, tokenizer):
    save_pretrained(random_model(CONFIGS["biencoder, rotary"]), tmp_path / "x", tokenizer=tokenizer, settings=SETTINGS)
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "x"), device="cpu")
    assert loaded.prompts == {"query": "query: ", "document": "document: "}
    assert loaded.max_seq_length == 32
    assert isinstance(load_model(tmp_path / "x"), Biencoder)
    assert json.loads((tmp_path / "x/sentence_bert_config.json").read_text())["max_seq_length"] == 32


@pytest.mark.parametrize("shape", [CONFIGS["biencoder, rotary"], contextual(ROTARY)])
def test_sentence_transformers_cuts_vectors_where_the_model_was_trained_so(tmp_path, tokenizer, shape):
    model = random_model(dataclasses.replace(shape, matryoshka=(4, 8)))
    save_pretrained(model, tmp_path / "x", tokenizer=tokenizer, settings=SETTINGS)
    assert load_model(tmp_path / "x").config.matryoshka == (4, 8)
    options = {"device": "cpu", "trust_remote_code": True, "truncate_dim": 8}
    cut = sentence_transformers.SentenceTransformer(str(tmp_path / "x"), **options)
    context = {}
    if not isinstance(model, Biencoder):
        context["dataset_embeddings"] = np.array(embed_context(model, *padded(tokenizer, DOCUMENTS, "document: ")))
    vectors = cut.encode(list(TEXTS), prompt_name="query", normalize_embeddings=True, **context)
    whole = np.asarray(embed(model, *padded(tokenizer, TEXTS, "query: "), *context.values()))
    assert vectors.shape[1] == 8 < whole.shape[1]
    assert np.abs(vectors - unit(whole[:, :8])).max() <= 1e-5
