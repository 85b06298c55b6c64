"""Vectors and their ids as Parquet files that say which weights and which context they belong to.

    id: string, vector: fixed-size list of float32, float16 or int8, or of uint8 with 8 signs in each

The schema's metadata has, under the key "cde_jax", what decides the vectors: fingerprints of weights and context, side,
prefix, type, dimensions. Vectors that differ in it cannot be compared, and are not read together.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from cde_jax.data.files import explain_os_errors, given_path, new_file
from cde_jax.data.sources.huggingface import open_parquet
from cde_jax.data.store import unit_rows

FORMAT = "cde_jax vectors 1"
_KEY = b"cde_jax"
_ROW_GROUP = 16_384  # rows
# What two sides of a search have in common; the others may differ between queries and documents.
_SHARED = ("weights", "context", "adapter", "dtype", "dimensions")


def _int8(vectors: Float[np.ndarray, "n D"]) -> Shaped[np.ndarray, "n D"]:
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    return np.rint(vectors * (127 / np.maximum(largest, 1e-12))).astype(np.int8)


# Databases of bytes score them as they are, by cosine, which a factor for each vector leaves alone and one for each
# dimension does not. The norm was 1, so that a vector is its bytes divided by their norm, and no factor needs keeping.
DTYPES: dict[str, Callable[[Float[np.ndarray, "n D"]], Shaped[np.ndarray, "n _"]]] = {
    "float32": lambda vectors: vectors,
    "float16": lambda vectors: vectors.astype(np.float16),
    "int8": _int8,
    "binary": lambda vectors: np.packbits(vectors > 0, axis=1),
}


class Vectors(NamedTuple):
    """What `read_vectors` reads."""

    ids: list[str]
    vectors: Shaped[np.ndarray, "n _"]  # as they are stored
    dataset: Any  # of `open_vectors`

    @property
    def metadata(self) -> dict[str, Any]:
        """What decides the vectors: "weights", "context", "side", "dtype", "dimensions" and others."""
        return _described(self.dataset.schema)


def open_vectors(folder: str | Path, like: "pyarrow.dataset.Dataset | None" = None) -> "pyarrow.dataset.Dataset":
    """The files of a folder that `python -m cde_jax.encode` wrote, or one file, to stream from (`to_batches()`).

    Raises ValueError for files that were made with different weights, context or settings, for damaged ones, and where
    they are not comparable with those of `like`: weights, context, adapter, dtype and dimensions must be the same.
    """
    import pyarrow.dataset

    folder = given_path(folder, "vectors")
    paths = [folder] if folder.is_file() else vector_files(folder)
    if not paths:
        raise ValueError(f"{folder}: expected Parquet files of `python -m cde_jax.encode --output`, found none")
    first, _ = read_metadata(paths[0])
    for path in paths[1:]:
        check_same(path, first, read_metadata(path)[0], f"that of {paths[0]}; read them one by one")
    if like is not None:
        wanted, got = ({name: metadata[name] for name in _SHARED} for metadata in (_described(like.schema), first))
        check_same(folder, wanted, got, "that of `like`; encode both with the same model and context")
    return pyarrow.dataset.dataset([str(path) for path in paths], format="parquet")


def read_vectors(folder: str | Path, like: Vectors | None = None) -> Vectors:
    """All ids and vectors that `open_vectors` gives, in the order of file names and rows.

    int8 vectors are compared by cosine, binary ones by Hamming distance.
    """
    data = open_vectors(folder, None if like is None else like.dataset)
    table = data.to_table(["id", "vector"])
    values = table["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return Vectors(table["id"].to_pylist(), values.reshape(-1, table.schema.field("vector").type.list_size), data)


def vector_files(folder: Path) -> list[Path]:
    """The Parquet files below a folder, sorted."""
    return sorted(folder.rglob("*.parquet"))


def read_metadata(path: Path) -> tuple[dict[str, Any], str]:
    """What decides the vectors of a file, and the digest of its input file. Raises ValueError for another file."""
    with open_parquet(path, "delete it and encode again") as file:
        metadata = _described(file.schema_arrow)
    if metadata.pop("format", None) != FORMAT:
        raise ValueError(f"{path}: expected vectors of `python -m cde_jax.encode`, found another file; move it away")
    source = metadata.pop("source")
    return metadata, source


def _described(schema: Any) -> dict[str, Any]:
    return json.loads((schema.metadata or {}).get(_KEY, b"{}"))


def check_same(path: Path, expected: Mapping[str, Any], got: Mapping[str, Any], advice: str) -> None:
    """ValueError, with what differs, for the metadata of vectors that cannot be compared."""
    different = [name for name in {**expected, **got} if expected.get(name) != got.get(name)]
    if different:
        listed = ", ".join(f"{name} {got.get(name)!r} and not {expected.get(name)!r}" for name in different)
        raise ValueError(f"{path}: was made with {listed}, {advice}")


def write_vectors(
    path: Path, blocks: Iterable[tuple[list[str], Float[np.ndarray, "_ D"]]], metadata: Mapping[str, Any], source: str
) -> int:
    """Write blocks of ids and unit vectors [_, D] as they come, atomically; returns the number of rows.

    `metadata` has the "dtype" and the "dimensions" d ≤ D, to which vectors are cut, and made unit vectors again;
    `source` is the digest of the input file.
    """
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    writer, count, dimensions = None, 0, metadata["dimensions"]
    described = {_KEY: json.dumps({"format": FORMAT, "source": source, **metadata}, sort_keys=True)}
    with new_file(path) as temporary, explain_os_errors(path):
        try:
            for ids, vectors in blocks:
                if dimensions < vectors.shape[1]:
                    vectors = unit_rows(vectors[:, :dimensions])
                stored = DTYPES[metadata["dtype"]](vectors)
                values = pyarrow.array(stored.reshape(-1))
                lists = pyarrow.FixedSizeListArray.from_arrays(values, stored.shape[1])
                table = pyarrow.table({"id": pyarrow.array(ids, pyarrow.string()), "vector": lists})
                table = table.replace_schema_metadata(described)
                if writer is None:
                    # Vectors have hardly two equal numbers: neither a dictionary nor compression makes them smaller.
                    writer = ParquetWriter(temporary, table.schema, use_dictionary=False, compression="none")
                writer.write_table(table, row_group_size=_ROW_GROUP)
                count += len(ids)
        finally:
            if writer is not None:
                writer.close()
    return count
