"""The adapt command: vectors or an encoder, queries and qrels → an adapter, what it gained, and its other formats."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cde_jax.adapters.adder import Adapter
from cde_jax.data.files import write_file, write_json
from cde_jax.data.sources import beir
from cde_jax.data.sources.huggingface import parquet_vectors
from cde_jax.data.sources.jsonl import json_lines, text_field
from cde_jax.evaluation.metrics import text_table
from cde_jax.interop import adapter_export

EXPORTS = ("onnx", "sentence-transformers")
_QRELS = ("qrels/train.tsv", "qrels.tsv", "qrels/test.tsv")


def adapt(
    data: Path,
    out: Path,
    *,
    vectors: str | None = None,
    model: str | None = None,
    qrels: str | None = None,
    export: Sequence[str] = (),
    **settings: Any,
) -> str:
    """Fit an adapter and write `adapter.safetensors`, `report.json` and `ndcg.png` into `out`; returns a table.

    Raises ValueError, before training, for missing or broken files, ids and vectors that do not fit, other settings.
    """
    if (vectors is None) == (model is None):
        raise ValueError("expected either --vectors or --model: the vectors, or the encoder that makes them")
    if unknown := [name for name in export if name not in EXPORTS or (name != "onnx" and model is None)]:
        raise ValueError(f"--export: expected {' or '.join(EXPORTS)} (which needs --model), got {unknown[0]!r}")
    read = _encoded(data, model) if vectors is None else _stored(data, Path(vectors))
    (query_ids, queries), (document_ids, documents), fingerprints = read
    grades = _grades(_found(data, *_QRELS) if qrels is None else Path(qrels), query_ids, document_ids)
    options = {"fingerprints": fingerprints, "checkpoint": out / "checkpoint.safetensors", "progress": True}
    adapter = Adapter.fit(queries, documents, grades, **options, **settings)
    adapter.save(out / "adapter.safetensors")
    parts = (dict(adapter.tables), adapter.settings.form, adapter.width)
    if "onnx" in export:
        adapter_export.write_onnx(*parts, out)
    if "sentence-transformers" in export:
        adapter_export.write_sentence_transformers(*parts, model, out / "sentence-transformers")
    report = adapter.report | {"settings": adapter.get_params(), "fingerprints": fingerprints, "data": str(data)}
    write_json(out / "report.json", report)
    write_file(out / "ndcg.png", _figure(report["ndcg"]))
    return _table(report)


def _stored(data: Path, folder: Path) -> tuple[Any, Any, dict[str, str]]:
    """(ids, vectors) of queries and of documents from files; no fingerprints."""
    sides = []
    for side, name in (("queries", "queries.jsonl"), ("documents", "corpus.jsonl")):
        path = _found(folder, f"{side}.npy", f"{side}.parquet")
        if path.suffix == ".parquet":
            sides.append(parquet_vectors(path))
            continue
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{path}: not readable as an array of numpy ({error})") from None
        ids = [text_field(entry, "_id", place) for place, entry in _lines(data, name)]
        if len(np.atleast_1d(array)) != len(ids):
            raise ValueError(f"{path}: expected {len(ids)} rows, one for each line of {data / name}, got {array.shape}")
        sides.append((ids, array))
    return *sides, {}


def _encoded(data: Path, name: str) -> tuple[Any, Any, dict[str, str]]:
    """(ids, vectors) of queries and of documents by an encoder; a contextual one reads a sample of the corpus."""
    from cde_jax.retrieval.embedder import Embedder

    embedder = Embedder.from_pretrained(name)
    corpus = dict(beir.document(entry, place) for place, entry in _lines(data, "corpus.jsonl"))
    lines = _lines(data, "queries.jsonl")
    queries = {text_field(entry, "_id", place): text_field(entry, "text", place) for place, entry in lines}
    context = embedder.embed_context(list(corpus.values()), seed=0) if embedder.contextual else None
    fingerprints = {"weights": embedder.weights} | ({"context": context.documents} if context else {})
    vectors = embedder.encode_queries(queries.values(), context), embedder.encode_documents(corpus.values(), context)
    return (list(queries), vectors[0]), (list(corpus), vectors[1]), fingerprints


def _grades(path: Path, query_ids: Sequence[str], document_ids: Sequence[str]) -> dict[int, dict[int, int]]:
    """Qrels by row."""
    rows = {}
    for kind, ids in (("query", query_ids), ("document", document_ids)):
        rows[kind] = {key: row for row, key in enumerate(ids)}
        if len(rows[kind]) < len(ids):
            doubled = next(key for row, key in enumerate(ids) if rows[kind][key] != row)
            raise ValueError(f"the {kind} id {doubled!r} is there more than once; ids must differ")
    grades: dict[int, dict[int, int]] = {}
    for place, query, document, grade in beir.qrels_lines(path):
        for kind, key in (("query", query), ("document", document)):
            if key not in rows[kind]:
                raise ValueError(f"{place}: names the {kind} {key!r}, which is not among the {len(rows[kind])} read")
        grades.setdefault(rows["query"][query], {})[rows["document"][document]] = grade
    return grades


def _lines(folder: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    return json_lines(_found(folder, name, f"{name}.gz"))


def _found(folder: Path, *names: str) -> Path:
    """The first of these files that is there."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder}: expected {' or '.join(names)}, found none")


def _table(report: dict[str, Any]) -> str:
    rows = [
        [f"nDCG@{k}", *(f"{row[name]:.3f}" for name in ("frozen", "adapted")), f"{row['gain']:+.3f}",
         f"{row['low']:+.3f} … {row['high']:+.3f}"]
        for k, row in report["ndcg"].items()
    ]  # fmt: skip
    said = "no gain is shown at nDCG@10: the adapter is the identity" if report["identity"] else "adapter.safetensors"
    count = f"{report['held_out']} of {report['queries']} queries, {report['folds']} folds, {report['steps']} steps"
    return text_table([f"held out: {count}", "frozen", "adapted", "gain", "95 % interval"], rows) + f"\n{said}"


def _figure(ndcg: dict[str, dict[str, float]]) -> bytes:
    """A PNG of nDCG by cutoff, before and after, with the interval of the gain."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6, 3.5), layout="constrained")
    axes, places = drawn.subplots(), np.arange(len(ndcg))
    for shift, name in ((-0.2, "frozen"), (0.2, "adapted")):
        axes.bar(places + shift, [row[name] for row in ndcg.values()], 0.4, label=name)
    ends = [[row["gain"] - row["low"], row["high"] - row["gain"]] for row in ndcg.values()]
    adapted = [row["adapted"] for row in ndcg.values()]
    axes.errorbar(places + 0.2, adapted, np.transpose(ends), fmt="none", color="black", capsize=3)
    axes.set_xticks(places, [f"nDCG@{k}" for k in ndcg])
    axes.legend()
    png = io.BytesIO()
    FigureCanvasAgg(drawn).print_png(png, metadata={"Software": None})
    return png.getvalue()
