"""ADDER (arXiv 2310.05380): vectors of a frozen encoder adapted to a task by a small residual, learned from qrels.

    q′ = q + V softmax(K q + b),   K ∈ R^{h×D}, V ∈ R^{D×h}

`Adapter.fit` learns it from queries and their relevant documents, against the hardest negatives of the whole corpus.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from cde_jax.adapters.inputs import check_integer, check_vectors, read_tensors
from cde_jax.config import AdapterSettings
from cde_jax.data.files import given_path, write_file
from cde_jax.data.store import unit_rows

log = logging.getLogger(__name__)

FORMAT = "cde_jax adapter 1"
BLOCK = 8192  # rows adapted at a time
Table = Mapping[str, Any]  # K [h, D], b [h] and V [D, h]; of the linear form V [D, D] alone
Grades = dict[int, dict[int, int]]  # {query row: {document row: grade above 0}}


@dataclass(frozen=True, eq=False)
class Adapter:
    """Adapts vectors of queries, and for both sides of documents; they are compared by cosine. Made by `fit`."""

    width: int
    settings: AdapterSettings
    tables: Mapping[str, Table]  # by side, "query" and "document"; none: the identity
    report: dict[str, Any] = field(default_factory=dict)  # what was gained, on which queries
    fingerprints: Mapping[str, str] = field(default_factory=dict)  # of the weights and context of the vectors

    @classmethod
    def fit(
        cls,
        query_vectors: Any,
        document_vectors: Any,
        positives: Any,
        *,
        fingerprints: Mapping[str, str] | None = None,
        checkpoint: str | Path | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> "Adapter":
        """Learn from vectors [q, D] and [n, D] and `positives`, pairs of rows [m, 2] (query, document) or qrels by row.

        Queries without a relevant document are not used. Some queries are held out: they say when to stop and what was
        gained (`report`). Unless the gain in NDCG@10 is above 0, by its 95 % interval, the result is the identity. The
        same arguments give the same bytes.

        document_vectors: may be a memory map larger than memory. checkpoint: a file from which a killed fit goes on;
        removed at the end. settings: fields of `AdapterSettings`. Raises ValueError for bad input.
        """
        from cde_jax.adapters import adder_training

        chosen = AdapterSettings(**settings)
        queries = unit_rows(check_vectors("query vectors", query_vectors).astype(np.float32))
        check_vectors("document vectors", document_vectors, queries.shape[1])
        grades = as_grades(positives, len(queries), len(document_vectors))
        path = None if checkpoint is None else given_path(checkpoint, "checkpoint")
        tables, report = adder_training.fit(queries, document_vectors, grades, chosen, path, progress)
        if report["identity"]:
            gain = [report["ndcg"]["10"][name] for name in ("frozen", "adapted", "low", "high")]
            text = "the adapter is the identity: NDCG@10 of %d held-out queries %.3f → %.3f, gain in [%+.3f, %+.3f]"
            log.warning(text, report["held_out"], *gain)
        adapter = cls(queries.shape[1], chosen, {} if report["identity"] else tables, report, dict(fingerprints or {}))
        if path is not None:
            path.unlink(missing_ok=True)
        return adapter

    def transform_queries(self, vectors: Any) -> Float[np.ndarray, "n D"]:
        """Vectors of queries → adapted unit vectors, float32."""
        return self._transform("queries", vectors, self.tables.get("query"))

    def transform_documents(self, vectors: Any) -> Float[np.ndarray, "n D"]:
        """Vectors of documents → unit vectors, float32; the same vectors, unless `sides` is "both"."""
        return self._transform("documents", vectors, self.tables.get("document"))

    def _transform(self, name: str, vectors: Any, table: Table | None) -> Float[np.ndarray, "n D"]:
        vectors = check_vectors(name, vectors, self.width)
        adapted = np.empty(vectors.shape, np.float32)
        for start in range(0, len(vectors), BLOCK):
            rows = unit_rows(vectors[start : start + BLOCK].astype(np.float32))
            adapted[start : start + BLOCK] = adapt(table, rows, self.settings.form)
        return adapted

    def get_params(self) -> dict[str, Any]:
        """The settings that it was fitted with."""
        return asdict(self.settings)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file atomically."""
        tensors = {f"{side}.{name}": array for side, table in self.tables.items() for name, array in table.items()}
        names = ("width", "report", "fingerprints")
        content = {name: getattr(self, name) for name in names} | {"settings": self.get_params()}
        write_arrays(given_path(path), tensors, FORMAT, content)

    @classmethod
    def load(cls, path: str | Path) -> "Adapter":
        """Read what `save` wrote. Raises ValueError for another file."""
        tensors, content = read_arrays(path, FORMAT)
        sides = dict.fromkeys(name.partition(".")[0] for name in tensors)
        tables = {s: {n.partition(".")[2]: a for n, a in tensors.items() if n.startswith(f"{s}.")} for s in sides}
        return cls(tables=tables, **content | {"settings": AdapterSettings(**content["settings"])})


def adapt(table: Table | None, vectors: Any, form: str, xp: Any = np) -> Any:
    """x + residual, as unit rows; `xp` is numpy or jax.numpy. Without a table the vectors as they are."""
    if table is None:
        return vectors
    hidden = vectors if form == "linear" else vectors @ table["K"].T + table["b"]
    if form == "softmax":
        hidden = xp.exp(hidden - hidden.max(axis=-1, keepdims=True))
        hidden = hidden / hidden.sum(axis=-1, keepdims=True)
    elif form == "mlp":
        hidden = xp.maximum(hidden, 0)
    adapted = vectors + hidden @ table["V"].T
    return adapted / xp.sqrt((adapted**2).sum(axis=-1, keepdims=True) + 1e-24)  # rows of zeros have a gradient too


def as_grades(positives: Any, queries: int, documents: int) -> Grades:
    """Relevant documents of pairs or qrels {query row: {document row: grade}}; ValueError for what is neither."""
    if isinstance(positives, Mapping):
        triples = [(q, d, grade) for q, relevant in positives.items() for d, grade in relevant.items()]
    else:
        pairs = np.asarray(positives)
        if pairs.size and (pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype.kind not in "iu"):
            raise ValueError(
                "positives: expected integer pairs (query row, document row) of shape [n, 2], or qrels by row, got "
                f"{pairs.dtype} {list(pairs.shape)}"
            )
        triples = [(*pair, 1) for pair in pairs.tolist()]
    grades: Grades = {}
    for query, document, grade in triples:
        for name, row, count in (("query", query, queries), ("document", document, documents)):
            if check_integer(f"positives, {name} row", row, 0) >= count:
                raise ValueError(f"positives: name row {row} of the {name} vectors, of which there are {count}")
        if grade > 0:
            grades.setdefault(int(query), {})[int(document)] = int(grade)
    if len(grades) < 2:
        raise ValueError(
            f"positives: expected two or more queries with a relevant document, got {len(grades)} of {queries}: some "
            "are held out to say whether it helps"
        )
    return grades


def write_arrays(path: Path, arrays: Mapping[str, Any], file_format: str, content: Mapping[str, Any]) -> None:
    """Write arrays and JSON content as a safetensors file, atomically: the same content gives the same bytes."""
    from safetensors.numpy import save

    # An array, as several keys of metadata have no fixed order.
    text = np.frombuffer(json.dumps(content, sort_keys=True).encode(), np.uint8)
    # safetensors writes the bytes of an array as they lie, whatever its strides say.
    tensors = {name: np.asarray(array, order="C") for name, array in arrays.items()} | {"content": text}
    write_file(path, save(tensors, {"format": file_format}))


def read_arrays(path: str | Path, file_format: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What `write_arrays` wrote; ValueError for another file."""
    tensors, _ = read_tensors(path, file_format, "fit it again")
    return tensors, json.loads(tensors.pop("content").tobytes())
