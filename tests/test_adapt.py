"""The adapt command, from files to an adapter and its other formats; what is wrong with files is named."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from test_adder import SMALL, random_tables, task
from test_interop import CONFIGS, SETTINGS, random_model, tokenizer

import cde_jax
from cde_jax.adapters import adder_training
from cde_jax.adapters.adder import Adapter
from cde_jax.adapters.whitening import Whitening
from cde_jax.config import AdapterSettings
from cde_jax.data.store import unit_rows
from cde_jax.interop.adapter_export import write_onnx, write_sentence_transformers
from cde_jax.interop.write import save_pretrained
from cde_jax.retrieval.embedder import Embedder
from cde_jax.stages.adapt import adapt

__all__ = ["tokenizer"]


def write_lines(path, ids):
    text = "".join(json.dumps({"_id": key, "text": f"text {key}"}) + "\n" for key in ids)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.fixture
def folder(tmp_path):
    """A BEIR folder whose qrels name queries and documents in another order than the files, and vectors as .npy."""
    queries, documents, pairs = task(100, 150)
    data, vectors = tmp_path / "data", tmp_path / "vectors"
    (data / "qrels").mkdir(parents=True)
    vectors.mkdir()
    write_lines(data / "queries.jsonl", [f"q{i}" for i in range(100)])
    write_lines(data / "corpus.jsonl.gz", [f"d{i}" for i in range(150)])
    lines = "".join(f"q{q}\td{d}\t1\n" for q, d in pairs[::-1])
    (data / "qrels/train.tsv").write_text(f"query-id\tcorpus-id\tscore\n{lines}")
    np.save(vectors / "queries.npy", queries.astype(np.float64))
    np.save(vectors / "documents.npy", documents.astype(np.float16))
    return tmp_path


def run(folder, **options):
    return adapt(folder / "data", folder / "out", vectors=str(folder / "vectors"), **SMALL | options)


def test_the_command_from_files_to_report(folder):
    command = [sys.executable, "-m", "cde_jax.adapt", f"--data={folder}/data", f"--vectors={folder}/vectors"]
    command += [f"--out={folder}/out", "--export=onnx", *(f"--{name}={value}" for name, value in SMALL.items())]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "nDCG@10" in ran.stdout and "adapter.safetensors" in ran.stdout and "run 1" in ran.stderr
    report = json.loads((folder / "out/report.json").read_text())
    assert list(report["ndcg"]) == ["1", "3", "5", "10"] and report["ndcg"]["10"]["low"] > 0
    assert report["settings"]["hidden"] == 8 and report["held_out"] == 100
    assert (folder / "out/ndcg.png").read_bytes().startswith(b"\x89PNG")
    names = {path.name for path in (folder / "out").iterdir()}
    assert names == {"adapter.safetensors", "report.json", "ndcg.png", "query.onnx", "document.onnx"}
    refused = subprocess.run([*command, "--hidden=0", "--sides=all"], capture_output=True, text=True, check=False)
    assert refused.returncode and refused.stderr.startswith("error: the configuration cannot be used:")
    assert "`hidden` must be ≥ 1 and ≤ 65536, got 0" in refused.stderr
    assert "`sides` must be one of 'query', 'both', got 'all'" in refused.stderr


def test_vectors_in_parquet_are_found_by_id(folder):
    expected = run(folder)
    first = (folder / "out/adapter.safetensors").read_bytes()
    for side, kind, prefix in (
        ("queries", pa.list_(pa.float64()), "q"),
        ("documents", pa.list_(pa.float16(), 12), "d"),
    ):
        rows = np.load(folder / f"vectors/{side}.npy")
        ids = [f"{prefix}{i}" for i in range(len(rows))]
        table = pa.table({"vector": pa.array(list(rows), kind), "id": ids, "other": ids})
        parquet.write_table(table, folder / f"vectors/{side}.parquet", row_group_size=7)
        (folder / f"vectors/{side}.npy").unlink()
    (folder / "data/corpus.jsonl.gz").unlink()  # the ids are in the Parquet files
    assert run(folder) == expected
    assert (folder / "out/adapter.safetensors").read_bytes() == first


def test_a_killed_command_goes_on(folder, monkeypatch):
    run(folder)
    expected = (folder / "out/adapter.safetensors").read_bytes()
    scored, left = adder_training.ndcg, [5]

    def killed(*args):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return scored(*args)

    monkeypatch.setattr(adder_training, "ndcg", killed)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    assert (folder / "out/checkpoint.safetensors").exists()
    run(folder)
    assert (folder / "out/adapter.safetensors").read_bytes() == expected


def test_an_encoder_in_place_of_vectors(folder, tokenizer):
    save_pretrained(random_model(CONFIGS["isolated"]), folder / "model", tokenizer=tokenizer, settings=SETTINGS)
    adapt(folder / "data", folder / "out", model=str(folder / "model"), **SMALL | {"steps": 2})
    adapter, embedder = Adapter.load(folder / "out/adapter.safetensors"), Embedder.from_pretrained(folder / "model")
    context = embedder.embed_context([f"text d{i}" for i in range(150)], seed=0)
    assert adapter.fingerprints == {"weights": embedder.weights, "context": context.documents}
    assert adapter.width == embedder.width and adapter.report["documents"] == 150


def damage_lines(name, *ids):
    return lambda folder: write_lines(folder / "data" / name, ids)


def damage_qrels(text):
    return lambda folder: (folder / "data/qrels/train.tsv").write_text(text)


def damage_vectors(name, array):
    return lambda folder: np.save(folder / "vectors" / name, array)


def damage_parquet(vectors, kind=None, ids=("q0", "q1")):
    def write(folder):
        (folder / "vectors/queries.npy").unlink()
        table = pa.table({"id": list(ids), "vector": pa.array(vectors, kind or pa.list_(pa.float32()))})
        parquet.write_table(table, folder / "vectors/queries.parquet")

    return write


ONES = np.ones((100, 12), np.float32)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "data/queries.jsonl").unlink(),
            r"data: expected queries\.jsonl or queries\.jsonl\.gz, found none",
        ),
        (
            lambda f: (f / "data/qrels/train.tsv").unlink(),
            r"expected qrels/train\.tsv or qrels\.tsv or qrels/test\.tsv",
        ),
        (lambda f: (f / "vectors/queries.npy").unlink(), r"expected queries\.npy or queries\.parquet, found none"),
        (lambda f: (f / "vectors/queries.npy").write_bytes(b"x"), r"queries\.npy: not readable as an array"),
        (
            damage_vectors("queries.npy", ONES[:99]),
            r"queries\.npy: expected 100 rows, .*queries\.jsonl, got \(99, 12\)",
        ),
        (
            damage_vectors("queries.npy", ONES[:, :7]),
            "document vectors: expected vectors of width 7, got 12; encode all",
        ),
        (damage_vectors("queries.npy", ONES * np.nan), "query vectors: expected finite vectors"),
        (damage_vectors("queries.npy", ONES.astype(int)), "query vectors: expected a float array"),
        (damage_lines("queries.jsonl", *["q0"] * 100), "the query id 'q0' is there more than once"),
        (
            damage_qrels("q0\td0\t1\nq1\tx\t1\n"),
            r"train\.tsv:2: names the document 'x', which is not among the 150 read",
        ),
        (damage_qrels("q0\td0\t1\nq\td0\t1\n"), r"train\.tsv:2: names the query 'q', which is not among the 100 read"),
        (damage_qrels("q0\td0\t0\nq1\td0\t0\n"), "two or more queries with a relevant document, got 0 of 100"),
        (damage_qrels("q0\td0\t1\nq0\td1\t1\n"), "two or more queries with a relevant document, got 1 of 100"),
        (damage_parquet([[1.0, 2.0], [1.0]]), r"queries\.parquet: expected float lists of one length .* in row 2"),
        (damage_parquet([[1.0, 2.0], None]), "expected float lists of one length .* in row 2"),
        (damage_parquet([[1, 2], [3, 4]], pa.list_(pa.int32())), "another in values of int32"),
        (damage_parquet([], ids=()), "expected rows of 'id' and 'vector', found none"),
    ],
)
def test_what_is_wrong_with_files_is_named(folder, monkeypatch, damage, message):
    monkeypatch.setattr(adder_training, "fit", None)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        run(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "m"}, "expected either --vectors or --model"),
        ({"vectors": None}, "expected either --vectors or --model"),
        ({"export": ["onnx", "tf"]}, r"--export: expected onnx or sentence-transformers .*, got 'tf'"),
        ({"export": ["sentence-transformers"]}, "needs --model"),
    ],
)
def test_bad_flags_are_named(folder, options, message):
    with pytest.raises(ValueError, match=message):
        adapt(folder / "data", folder / "out", **{"vectors": str(folder / "vectors")} | options)


@pytest.mark.parametrize("form", ["softmax", "linear", "low_rank", "mlp", None])
def test_onnx_gives_the_same_vectors(tmp_path, form):
    pytest.importorskip("onnx", reason="onnx is not installed: the export was not made")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: ONNX was not run")
    tables = random_tables(form, 12, "query") if form else {}
    adapter = Adapter(12, AdapterSettings(form=form or "softmax"), tables)
    vectors = np.concatenate([5 * task()[0], np.zeros((1, 12), np.float32)])
    expected = (adapter.transform_queries(vectors), adapter.transform_documents(vectors))
    for path, side in zip(write_onnx(tables, form or "softmax", 12, tmp_path), expected, strict=True):
        session = onnxruntime.InferenceSession(str(path))
        np.testing.assert_allclose(session.run(None, {"vectors": vectors})[0], side, atol=1e-5)


def tiny_encoder(directory):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="not installed: no module was made")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "c": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = np.random.default_rng(0).normal(size=(4, 12)).astype(np.float32)
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    model = sentence_transformers.SentenceTransformer(modules=[StaticEmbedding(words, embedding_weights=weights)])
    model.save(str(directory))
    return sentence_transformers.SentenceTransformer, model


@pytest.mark.parametrize(
    ("form", "sides"), [("softmax", "both"), ("linear", "query"), ("mlp", "query"), (None, "query")]
)
def test_sentence_transformers_gives_the_same_vectors(tmp_path, form, sides):
    load, encoder = tiny_encoder(tmp_path / "encoder")
    tables = random_tables(form, 12, sides) if form else {}
    adapter = Adapter(12, AdapterSettings(form=form or "softmax", sides=sides), tables)
    write_sentence_transformers(tables, form or "softmax", 12, str(tmp_path / "encoder"), tmp_path / "out")
    loaded, texts = load(str(tmp_path / "out"), trust_remote_code=True, device="cpu"), ["a b", "c", "b b c"]
    vectors = encoder.encode(texts)
    np.testing.assert_allclose(loaded.encode_query(texts), adapter.transform_queries(vectors), atol=1e-5)
    np.testing.assert_allclose(loaded.encode_document(texts), adapter.transform_documents(vectors), atol=1e-5)
    np.testing.assert_allclose(loaded.encode(texts), adapter.transform_documents(vectors), atol=1e-5)
    with pytest.raises(ValueError, match="expected an encoder of vectors of width 7, got 12"):
        write_sentence_transformers({}, "softmax", 7, str(tmp_path / "encoder"), tmp_path / "out")


def test_the_file_alone_is_enough_for_a_vector_database(tmp_path):
    """The function of docs/adapters.md."""
    from safetensors.numpy import load_file

    adapter = Adapter(12, AdapterSettings(form="softmax"), random_tables("softmax", 12, "query"))
    adapter.save(tmp_path / "adapter.safetensors")
    table, queries = load_file(tmp_path / "adapter.safetensors"), task()[0]
    weights = np.exp(queries @ table["query.K"].T + table["query.b"])
    moved = queries + weights / weights.sum(axis=1, keepdims=True) @ table["query.V"].T
    moved /= np.linalg.norm(moved, axis=1, keepdims=True)
    np.testing.assert_allclose(
        moved, cde_jax.Adapter.load(tmp_path / "adapter.safetensors").transform_queries(queries), atol=1e-5
    )


def test_a_whitening_is_exported_as_a_residual(tmp_path):
    load, encoder = tiny_encoder(tmp_path / "encoder")
    texts = ["a b", "c", "b b c"]
    vectors = unit_rows(encoder.encode(texts))
    random = np.random.default_rng(0)
    fitted = Whitening.fit(*(unit_rows(random.normal(size=(30, 12)).astype(np.float32)) for _ in range(2)))
    write_sentence_transformers(fitted.to_tables(), "low_rank", 12, str(tmp_path / "encoder"), tmp_path / "out")
    loaded = load(str(tmp_path / "out"), trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(loaded.encode_query(texts), fitted.transform_queries(vectors), atol=1e-5)
    np.testing.assert_allclose(loaded.encode_document(texts), fitted.transform_documents(vectors), atol=1e-5)
