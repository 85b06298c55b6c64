"""The encode command: files of texts → Parquet files of vectors."""

import gzip
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from tiny_retrieval import SETTINGS, embedder, tokenizer
from tiny_run import texts

from cde_jax.adapters.adder import Adapter
from cde_jax.adapters.statistics import CorpusStatistics
from cde_jax.config import AdapterSettings
from cde_jax.encode import main
from cde_jax.interop.write import save_pretrained
from cde_jax.retrieval import encode as encode_file
from cde_jax.retrieval.embedder import Embedder
from cde_jax.retrieval.vectors import read_vectors, write_vectors
from cde_jax.stages.encode import encode

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [text for name in ("sea", "sky") for pair in texts(name, 20, seed=3) for text in pair]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model directory, the embedder and context of it, and three input files of 30, 30 and 20 texts."""
    folder = tmp_path_factory.mktemp("encode")
    tokenizer().save(folder / "tokenizer")
    save_pretrained(embedder().model, folder / "model", tokenizer=folder / "tokenizer", settings=SETTINGS)
    loaded = Embedder.from_pretrained(folder / "model", progress=False)
    context = loaded.embed_context(TEXTS)
    context.save(folder / "context.safetensors")
    (folder / "corpus").mkdir()
    write_parquet(folder / "corpus/a.parquet", TEXTS[:30], 0)
    write_parquet(folder / "corpus/b.parquet", TEXTS[30:60], 30)
    with gzip.open(folder / "corpus/c.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"_id": f"d{i}", "title": "", "text": TEXTS[i]}) + "\n" for i in range(60, 80))
    return folder, loaded, context


def write_parquet(path, some, start):
    ids = [f"d{start + i}" for i in range(len(some))]
    parquet.write_table(pyarrow.table({"id": ids, "title": [None] * len(some), "text": some}), path)


def command(made, output, *more, pattern="*"):
    folder = made[0]
    given = ["--model", str(folder / "model"), "--context", str(folder / "context.safetensors")]
    return [*given, "--input", str(folder / "corpus" / pattern), "--output", str(output), *more]


def test_the_command_writes_a_file_for_each_input_with_the_vectors_of_the_embedder(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encode_file, "BLOCK", 1)  # 8 texts on 8 devices: several blocks a file
    main(command(made, tmp_path))
    _, loaded, context = made
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "a.parquet", "b.parquet", "c.parquet"]
    ids, vectors, _ = found = read_vectors(tmp_path)
    metadata = found.metadata
    assert ids == [f"d{i}" for i in range(80)]
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, loaded.encode_documents(TEXTS, context), atol=1e-6)
    field = parquet.read_schema(tmp_path / "a.parquet").field("vector").type
    assert field == pyarrow.list_(pyarrow.float32(), loaded.width)
    assert metadata["weights"] == loaded.weights and metadata["context"] == context.fingerprint
    assert (metadata["side"], metadata["prefix"], metadata["dimensions"]) == ("documents", "of ", loaded.width)
    assert re.search(r"c.parquet \(3 of 3\): 20 texts, [\d,]+ a second\n80 texts in", capsys.readouterr().out)


def test_the_same_command_goes_on_and_encodes_only_what_is_new_or_changed(made, tmp_path):
    folder = made[0]
    inputs = tmp_path / "corpus"
    inputs.mkdir()
    for name in ("a", "b"):
        (inputs / f"{name}.parquet").write_bytes((folder / f"corpus/{name}.parquet").read_bytes())
    options = {"model": str(folder / "model"), "context": folder / "context.safetensors", "progress": False}

    def run():
        return list(encode([str(inputs / "*")], tmp_path / "out", **options))

    run()
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.parquet")}
    write_parquet(inputs / "b.parquet", TEXTS[:3], 0)
    write_parquet(inputs / "c.parquet", TEXTS[3:5], 3)
    lines = run()
    assert lines[0] == "a.parquet (1 of 3): was there" and lines[-1].startswith("5 texts in")
    assert (tmp_path / "out/a.parquet").stat().st_mtime_ns == stamps["a.parquet"]
    assert len(read_vectors(tmp_path / "out").ids) == 35


def test_a_damaged_file_does_not_stop_the_others_and_leaves_nothing(made, tmp_path):
    corpus = made[0] / "corpus"
    bad = {"bad.parquet": b"PAR1 and no more", "cut.jsonl.gz": (corpus / "c.jsonl.gz").read_bytes()[:-30]}
    bad["late.jsonl"] = b'{"_id": "1", "text": "the sea"}\n' * 50 + b'{"_id": "2"}\n'
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    inputs = [*(str(tmp_path / name) for name in bad), str(corpus / "a.parquet")]
    with pytest.raises(SystemExit, match="3 of 4 input files could not be encoded") as error:
        main([*command(made, tmp_path / "out")[:4], "--input", *inputs, "--output", str(tmp_path / "out")])
    assert all(f"- {tmp_path / name}" in str(error.value) for name in bad)
    assert "late.jsonl:51: expected the key 'text'" in str(error.value)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".lock", "a.parquet"]


@pytest.mark.parametrize("dtype", ["float16", "int8", "binary"])
def test_smaller_types_keep_the_direction(dtype, made, tmp_path):
    main(command(made, tmp_path, "--dtype", dtype, pattern="a*"))
    _, loaded, context = made
    exact, found = loaded.encode_documents(TEXTS[:30], context), read_vectors(tmp_path)
    vectors, metadata = found.vectors, found.metadata
    assert metadata["dtype"] == dtype and metadata["dimensions"] == loaded.width
    if dtype == "binary":
        assert vectors.dtype == np.uint8
        np.testing.assert_array_equal(np.unpackbits(vectors, axis=1), exact > 0)
    else:
        assert vectors.dtype == dtype and (dtype != "int8" or np.abs(vectors).max(axis=1).tolist() == [127] * 30)
        near = vectors.astype(np.float32)
        np.testing.assert_allclose(near / np.linalg.norm(near, axis=1, keepdims=True), exact, atol=5e-3)


def test_vectors_of_two_contexts_or_types_are_not_read_together(made, tmp_path):
    _, loaded, context = made
    main(command(made, tmp_path / "one", pattern="a*"))
    loaded.embed_context(TEXTS[:9], seed=1).save(tmp_path / "other.safetensors")
    other = command(made, tmp_path / "two", "--context", str(tmp_path / "other.safetensors"), pattern="b*")
    main(other)
    documents = read_vectors(tmp_path / "one")
    with pytest.raises(ValueError, match=r"two: was made with context '\w+' and not '\w+', that of `like`"):
        read_vectors(tmp_path / "two", like=documents)
    (tmp_path / "two/b.parquet").rename(tmp_path / "one/b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet: was made with context '\w+' and not '\w+', that of \S+a.parquet"):
        read_vectors(tmp_path / "one")
    with pytest.raises(
        SystemExit, match=r"b.parquet: was made with context .*choose another --output, or move it away"
    ):
        main(command(made, tmp_path / "one"))
    main(command(made, tmp_path / "queries", "--side", "queries", pattern="c*"))
    queries = read_vectors(tmp_path / "queries", like=documents)
    assert queries.metadata["prefix"] == "the " and len(queries.ids) == 20
    np.testing.assert_allclose(queries.vectors, loaded.encode_queries(TEXTS[60:], context), atol=1e-6)


def test_hybrid_and_whitened_vectors_are_those_of_the_context(made, tmp_path):
    _, loaded, _ = made
    context = loaded.embed_context(TEXTS, queries=TEXTS[:20], statistics=CorpusStatistics.fit(TEXTS))
    context.save(tmp_path / "hybrid.safetensors")
    main(command(made, tmp_path / "out", "--context", str(tmp_path / "hybrid.safetensors"), pattern="a*"))
    vectors = read_vectors(tmp_path / "out").vectors
    np.testing.assert_allclose(vectors, loaded.encode_documents(TEXTS[:30], context), atol=1e-5)
    with pytest.raises(SystemExit, match="--dimensions: expected 32, got 16: only vectors of a model that was"):
        more = ["--context", str(tmp_path / "hybrid.safetensors"), "--dimensions", "16"]
        main(command(made, tmp_path / "cut", *more))


def test_an_adapter_goes_through_the_command(made, tmp_path):
    _, loaded, context = made
    table = {"V": np.random.default_rng(0).normal(size=(loaded.width, loaded.width)).astype(np.float32)}
    settings, fingerprints = AdapterSettings(sides="both"), {"weights": loaded.weights, "context": context.documents}
    adapter = Adapter(loaded.width, settings, {"query": table, "document": table}, fingerprints=fingerprints)
    adapter.save(tmp_path / "adapter.safetensors")
    main(command(made, tmp_path / "out", "--adapter", str(tmp_path / "adapter.safetensors"), pattern="a*"))
    expected = adapter.transform_documents(loaded.encode_documents(TEXTS[:30], context))
    np.testing.assert_allclose(read_vectors(tmp_path / "out").vectors, expected, atol=1e-5)
    with pytest.raises(SystemExit, match="adapter: was fitted on vectors with the context"):
        more = ["--adapter", str(tmp_path / "adapter.safetensors")]
        main([*command(made, tmp_path)[:2], *command(made, tmp_path / "none", *more)[4:]])


def test_a_cut_vector_is_a_unit_vector_of_the_first_dimensions(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32)
    write_vectors(tmp_path / "x.parquet", [(list("abcde"), vectors)], {"dtype": "float32", "dimensions": 4}, "s")
    cut = vectors[:, :4] / np.linalg.norm(vectors[:, :4], axis=1, keepdims=True)
    np.testing.assert_allclose(read_vectors(tmp_path).vectors, cut, atol=1e-6)


def test_what_does_not_fit_is_an_error_before_anything_is_encoded(made, tmp_path):
    folder = made[0]
    with pytest.raises(SystemExit, match=r"--input \S+: expected files, found none; name them, as '\S+/\*.parquet'"):
        main(command(made, tmp_path, pattern="../corpus"))
    with pytest.raises(SystemExit, match=r"model/README.md: expected a name with the ending .parquet"):
        main([*command(made, tmp_path), "--input", str(folder / "model/README.md")])
    (tmp_path / "a.jsonl").write_text('{"_id": "1", "text": "sea"}')
    with pytest.raises(SystemExit, match=r"both would be written as a\.parquet"):
        main([*command(made, tmp_path / "out"), "--input", str(tmp_path / "a.jsonl"), str(folder / "corpus/a.parquet")])
    (tmp_path / "taken").mkdir()
    parquet.write_table(pyarrow.table({"id": ["1"]}), tmp_path / "taken/x.parquet")
    with pytest.raises(SystemExit, match=r"x.parquet: expected vectors of `python -m cde_jax.encode`"):
        main(command(made, tmp_path / "taken"))


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    metadata = {"dtype": "float32", "dimensions": 2}
    path = tmp_path / "x.parquet"
    write_vectors(path, [(["1"], np.eye(2, dtype=np.float32)[:1])], metadata, "s")
    before = path.read_bytes()

    def blocks():
        yield ["2"], np.eye(2, dtype=np.float32)[:1]
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="the disk, quota or file-size limit is full"):
        write_vectors(path, blocks(), metadata, "s")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.parquet"]


def recipe(title: str) -> str:
    """The Python under a title of docs/encode.md."""
    section = (ROOT / "docs/encode.md").read_text().partition(f"## {title}\n")[2]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


@pytest.mark.parametrize(
    ("title", "library"), [("FAISS", "faiss"), ("LanceDB", "lancedb"), ("Qdrant", "qdrant_client")]
)
def test_the_recipes_of_the_docs_find_the_nearest_documents(title, library, made, tmp_path, monkeypatch):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed: the recipe of docs/encode.md was not run")
    monkeypatch.chdir(tmp_path)
    main(command(made, "vectors"))
    main(command(made, "queries", "--side", "queries", pattern="c*"))
    documents, queries = read_vectors("vectors"), read_vectors("queries")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the databases' own
        names: dict = {}
        exec(recipe(title), names)
    scores = queries.vectors @ documents.vectors.T
    for row, query in zip(scores, queries.ids, strict=True):
        found = [row[documents.ids.index(key)] for key in names["found"][query]]
        np.testing.assert_allclose(found, np.sort(row)[::-1][:10], atol=1e-5)
    if title == "LanceDB":
        assert json.loads(names["table"].schema.metadata[b"cde_jax"])["context"] == made[2].fingerprint


def test_the_recipe_for_postgresql_is_python():
    compile(recipe("PostgreSQL with pgvector"), "docs/encode.md", "exec")


def processes_below(parent: int) -> dict[int, str]:
    """Process id → command line of all descendants."""
    parents, names = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(entry.name)] = (entry / "cmdline").read_text().strip("\0")
        except OSError:  # it has ended
            continue
    found = {parent}
    while more := {pid for pid, above in parents.items() if above in found} - found:
        found |= more
    return {pid: names.get(pid, "") for pid in found - {parent}}


@pytest.mark.slow
def test_actors_of_ray_write_the_same_bytes_although_one_is_killed(made, tmp_path):
    pytest.importorskip("ray", reason="Ray, an extra, is not installed")
    (tmp_path / "in").mkdir()
    for number in range(8):
        write_parquet(tmp_path / f"in/{number}.parquet", [f"{text} {number}" for text in TEXTS * 40], 0)
    (tmp_path / "in/bad.parquet").write_bytes(b"PAR1 and no more")
    environment = os.environ | {"XLA_FLAGS": "", "RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)}
    given = [*command(made, tmp_path)[:4], "--input", str(tmp_path / "in/*.parquet"), "--output"]
    run = [sys.executable, "-m", "cde_jax.encode", *given]
    started = [
        subprocess.Popen(
            [*run, str(tmp_path / engine), "--engine", engine], env=environment, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for engine in ("ray", "local")
    ]  # fmt: skip
    killed = None
    while killed is None and started[0].poll() is None:
        time.sleep(0.05)
        actors = [pid for pid, name in processes_below(started[0].pid).items() if "ray::MapWorker" in name]
        if actors and list((tmp_path / "ray").glob("*.parquet")):
            killed = actors[0]
            os.kill(killed, signal.SIGKILL)
    for process in started:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 1 and "1 of 9 input files could not be encoded" in err, err
        assert "25,600 texts in" in out
    assert killed is not None
    for number in range(8):
        assert (tmp_path / f"ray/{number}.parquet").read_bytes() == (tmp_path / f"local/{number}.parquet").read_bytes()
    wrong = [*run, str(tmp_path / "ray"), "--engine", "ray", "--side", "queries"]
    done = subprocess.run(wrong, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert re.search("error: .*was made with side 'documents' and not 'queries'", done.stderr), done.stderr
