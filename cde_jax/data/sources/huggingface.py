"""Hugging Face data sets and Parquet files, by name or local path.

A path is a Parquet file or a pattern of them (`data/*.parquet`), read with pyarrow; or, through the `datasets` library
(`pip install 'cde_jax[huggingface]'`), a local folder (a copy of a data set's repository, or what `save_to_disk` wrote)
or a name on the Hub, with the ending `:CONFIG` for a configuration and `#SPLIT` for another split than "train":
`org/name:law#validation`. Everything is streamed or memory-mapped. Rows without text are left out, counted and logged.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from glob import has_magic
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cde_jax.data.files import digests, file_digest, matches
from cde_jax.data.pairs import InputLog, Pair
from cde_jax.data.sources.jsonl import as_text, numbered
from cde_jax.data.tokens import as_list, has_text

FIELDS = ("query", "document", "negatives", "domain")
Row = tuple[str, str, tuple[str, ...]]  # query, document, hard negatives
_BATCH = 256  # rows of a Parquet file decoded at a time


class _Table(NamedTuple):
    """A file or a data set: its name in the log, its default domain, its columns, and what reads their rows."""

    name: str
    domain: str
    path: str | Path
    columns: Sequence[str]
    read: Callable[[list[str]], Iterable[dict[str, Any]]]


def read_pairs(paths: Iterable[str], columns: Iterable[str] = (), log: InputLog | None = None) -> Iterator[Pair]:
    """The pairs of the paths, in order.

    `columns` maps our fields to the data's columns, ("query=question", "document=answer", "negatives=hard",
    "domain=source"); a field that is not given is the column of its own name. Query and document must be there.
    Documents and negatives are a text or a list of texts (each document makes a pair); the domain defaults to the
    data set's name. Unknown and missing columns are a ValueError that lists those present, before anything is read.
    `log` gains the pairs of each file or data set, and what was left out.
    """
    chosen: dict[str, str] = {}
    for text in as_list(columns, "columns"):
        field, _, column = (part.strip() for part in text.partition("="))
        if not column or field not in FIELDS or field in chosen:
            raise ValueError(f"column {text!r}: expected FIELD=COLUMN, with FIELD once each of {', '.join(FIELDS)}")
        chosen[field] = column
    mapping = {field: chosen.get(field, field) for field in FIELDS}
    needed = dict.fromkeys(mapping[field] for field in ("query", "document", *chosen))
    tables = [table._replace(name=prefix + table.name) for prefix, path in _given(paths) for table in _tables(path)]
    for table in tables:
        if absent := [column for column in needed if column not in table.columns]:
            raise ValueError(
                f"{table.domain}: expected the columns {absent}, found {list(table.columns)}; name the columns of the "
                "fields, for example query=question"
            )
    return _read(tables, mapping, InputLog() if log is None else log)


def _read(tables: list[_Table], mapping: dict[str, str], log: InputLog) -> Iterator[Pair]:
    for table in tables:
        left_out: Counter[str] = Counter()
        count = 0
        present = [column for column in dict.fromkeys(mapping.values()) if column in table.columns]
        for number, row in enumerate(table.read(present), 1):
            place = f"{table.path}: row {number}"
            query, document, negatives, domain = (row.get(mapping[field]) for field in FIELDS)
            domain = "".join(texts(domain, "domain", place)) or table.domain
            for texts_of_row in rows(query, document, negatives, place, left_out):
                count += 1
                yield Pair(domain, *texts_of_row)
        log.finish(table.name, count, left_out)


def identity(paths: Iterable[str]) -> dict[str, str]:
    """What decides the pairs, wherever it is stored: local files → sha256 of their bytes, names on the Hub → commit.

    A data set's name, configuration and split belong to it. Names begin with the path's number if there are several.
    """
    known: dict[str, str] = {}
    for prefix, path in _given(paths):
        name, _, split, title = _parse(path)
        folder = Path(name).expanduser()
        if files := _parquet_files(path):
            own = {file_name: file_digest(file) for file_name, file in files.items()}
        elif folder.is_dir():
            relative = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
            # Hidden ones aside, such as those that the Hub's client keeps beside a copy.
            visible = [folder / file for file in relative if not any(part.startswith(".") for part in file.parts)]
            own = {"(data set)": f"{title}#{split}"} | digests(visible, folder)
        else:
            own = {f"{title}#{split}": _commit(name)}
        known |= {prefix + key: value for key, value in own.items()}
    return known


def rows(query: Any, documents: Any, negatives: Any, place: str, left_out: Counter) -> Iterator[Row]:
    """One row for each document that has text, if the query has; documents and negatives are texts or lists of them.

    Rows without text are left out and counted: published sets have some, and they are not the reader's to repair.
    """
    queries = texts(query, "query", place)
    if len(queries) > 1:
        raise ValueError(f"{place}: expected one text as the query, got {len(queries)}")
    if not has_text("".join(queries)):
        left_out["rows whose query has no text"] += 1
        return
    hard = texts(negatives, "hard negatives", place)
    kept = tuple(filter(has_text, hard))
    left_out["hard negatives without text"] += len(hard) - len(kept)
    for document in texts(documents, "document", place) or [""]:
        if has_text(document):
            yield queries[0], document, kept
        else:
            left_out["rows whose document has no text"] += 1


def texts(value: Any, name: str, place: str) -> list[str]:
    """A text, a list of texts or None as a list; anything else is a ValueError."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    return [as_text(each, name, place, empty=True) for each in values]


def parquet_columns(path: Path) -> list[str]:
    """Names of a Parquet file's columns."""
    with open_parquet(path) as file:
        return file.schema_arrow.names


def parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file's columns, with a batch in memory at a time."""
    with open_parquet(path) as file:
        names = file.schema_arrow.names
        if absent := [name for name in columns if name not in names]:
            raise ValueError(f"{path}: expected the columns {absent}, found {names}")
        for batch in file.iter_batches(batch_size=_BATCH, columns=list(columns)):
            yield from batch.to_pylist()


def parquet_vectors(path: Path, key: str = "id", column: str = "vector") -> tuple[list[str], np.ndarray]:
    """Ids and vectors [n, D] of a Parquet file, in the float type of its lists, all of one length, else ValueError."""
    with open_parquet(path) as file:
        if absent := [name for name in (key, column) if name not in file.schema_arrow.names]:
            raise ValueError(f"{path}: expected the columns {absent}, found {file.schema_arrow.names}")
        blocks = []
        ids: list[str] = []
        for batch in file.iter_batches(columns=[key, column]):
            ids += map(str, batch[key].to_pylist())
            lengths = batch[column].value_lengths().to_numpy(zero_copy_only=False)  # NaN: null
            values = batch[column].flatten().to_numpy(zero_copy_only=False)
            width = blocks[0].shape[1] if blocks else lengths[0]
            if (wrong := np.flatnonzero(lengths != width)).size or values.dtype.kind != "f":
                where = f"row {len(ids) - len(lengths) + wrong[0] + 1}" if wrong.size else f"values of {values.dtype}"
                raise ValueError(f"{path}: expected float lists of one length as {column!r}, got another in {where}")
            blocks.append(values.reshape(len(lengths), -1))
    if not blocks:
        raise ValueError(f"{path}: expected rows of {key!r} and {column!r}, found none")
    return ids, np.concatenate(blocks)


@contextmanager
def open_parquet(path: Path, advice: str = "fetch it again") -> Iterator[Any]:
    """A Parquet file, open for reading; ValueError, with this advice, for one that cannot be read."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not readable as Parquet ({error}); {advice}") from None


def _given(paths: Iterable[str]) -> list[tuple[str, str]]:
    return numbered(paths, "expected paths of data sets, got none; name a data set, a folder or Parquet files")


def _tables(path: str) -> list[_Table]:
    """Each Parquet file of a path, or its data set."""
    tables = []
    for name, file in _parquet_files(path).items():
        columns = parquet_columns(file)
        domain = re.sub(r"-\d+-of-\d+$", "", file.stem)  # arguana-00000-of-00002 → arguana
        tables.append(_Table(name, domain, file, columns, functools.partial(parquet_rows, file)))
    if not tables:
        name, config, split, title = _parse(path)
        data = _data_set(path, name, config, split)
        columns = data.column_names or list(next(iter(data), {}))
        tables = [_Table(f"{title}#{split}", title, path, columns, data.select_columns)]
    return tables


def _parquet_files(path: str) -> dict[str, Path]:
    """The Parquet files that a path names; one that looks like it and names none is a ValueError."""
    files = {name: file for name, file in matches(Path(path).expanduser()).items() if not file.is_dir()}
    if (path.endswith(".parquet") or has_magic(path)) and not (files or Path(path).expanduser().is_dir()):
        raise ValueError(f"{path}: expected Parquet files, found none; correct the path")
    if other := [file for file in files.values() if file.suffix != ".parquet"]:
        raise ValueError(f"{other[0]}: expected a Parquet file; other files are read as a folder, as `datasets` does")
    return files


def _parse(path: str) -> tuple[str, str | None, str, str]:
    """(name or folder, configuration, split, title) of `NAME[:CONFIG][#SPLIT]`.

    The title, the domain of a data set, has the folder's own name, wherever it lies, or that on the Hub.
    """
    name, config, split = path, "", ""
    if not Path(path).expanduser().exists():
        name, _, split = path.partition("#")
        name, _, config = name.partition(":")
    folder = Path(name).expanduser()
    title = folder.resolve().name if folder.exists() else name
    return name, config or None, split or "train", f"{title}:{config}" if config else title


def _data_set(path: str, name: str, config: str | None, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            "data sets by name or folder need the `datasets` library: pip install 'cde_jax[huggingface]', or name "
            "Parquet files (folder/*.parquet)"
        ) from None
    folder = Path(name).expanduser()
    source, commit = (str(folder), None) if folder.exists() else (name, _commit(name))
    try:
        if any((folder / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
            data = datasets.load_from_disk(source)
            return data[split] if isinstance(data, dict) else data
        return datasets.load_dataset(source, config, split=split, streaming=True, revision=commit)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not readable as a data set ({error}); a path is NAME[:CONFIG][#SPLIT]") from error


@functools.cache
def _commit(name: str) -> str:
    """The newest commit of a data set on the Hub, asked for once, so that all passes read the same."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return HfApi().dataset_info(name).sha
    except HFValidationError as error:
        raise ValueError(f"{name}: there is no such file or folder, and it is no name on the Hub ({error})") from error
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"{name}: there is no such folder, and the Hub did not answer for it ({error}); correct the name, go "
            "online, or give a local folder or Parquet files"
        ) from error
