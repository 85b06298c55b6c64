"""Hugging Face data sets and Parquet files, by name or local path.

A path is one of

* a Parquet file, or a pattern of them (`data/*.parquet`), read with pyarrow;
* a local folder: a copy of a data set's repository, or what `save_to_disk` wrote;
* a name on the Hub, `org/name`;

the last two through the `datasets` library (`pip install 'cde_jax[huggingface]'`), and with the ending `:CONFIG`
for a configuration and `#SPLIT` for another split than "train": `org/name:law#validation`. Everything is streamed
or memory-mapped. Rows without text are left out, counted and logged.
"""

import functools
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from glob import has_magic
from pathlib import Path
from typing import Any, NamedTuple

from cde_jax.data.files import digests, file_digest, given_path, matches
from cde_jax.data.pairs import InputLog, Pair
from cde_jax.data.sources.formats import parquet_columns, parquet_rows, rows, texts
from cde_jax.data.tokens import as_list

FIELDS = ("query", "document", "negatives", "domain")
_REQUIRED = ("query", "document")
_log = logging.getLogger(__name__)


class _Table(NamedTuple):
    """One file or data set: its default domain, its columns, and what reads them."""

    domain: str
    columns: Sequence[str]
    read: Any  # columns → ("place", row)s


def read_pairs(paths: Iterable[str], columns: Iterable[str] = (), log: InputLog | None = None) -> Iterator[Pair]:
    """The pairs of the paths, in order.

    `columns` maps our fields to the data's columns, ("query=question", "document=answer", "negatives=hard",
    "domain=source"); a field that is not given is the column of its own name. Query and document must be there.
    Documents and negatives are a text or a list of texts (each document makes a pair); the domain defaults to the
    data set's name. Unknown and missing columns are a ValueError that lists those present, before anything is read.
    `log` gains the pairs of each file or data set, and what was left out.
    """
    chosen = _chosen(columns)
    tables = [
        (prefix + name, table, _mapping(table, chosen))
        for prefix, path in _given(paths)
        for name, table in _tables(path)
    ]
    return _read(tables, InputLog() if log is None else log)


def identity(paths: Iterable[str]) -> dict[str, str]:
    """What decides the pairs, wherever it is stored: local files → sha256 of their bytes, names on the Hub → commit.

    A data set's name, configuration and split belong to it. Names begin with the path's number if there are several.
    """
    known: dict[str, str] = {}
    for prefix, path in _given(paths):
        name, config, split = _split(path)
        folder = Path(name).expanduser()
        if files := _parquet_files(path):
            own = {file_name: file_digest(file) for file_name, file in files.items()}
        elif folder.is_dir():
            relative = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
            # Hidden ones aside, such as those that the Hub's client keeps beside a copy.
            visible = [folder / file for file in relative if not any(part.startswith(".") for part in file.parts)]
            own = {"(data set)": f"{_title(name, config)}#{split}"} | digests(visible, folder)
        else:
            own = {f"{_title(name, config)}#{split}": _commit(name)}
        known |= {prefix + key: value for key, value in own.items()}
    return known


def _given(paths: Iterable[str]) -> list[tuple[str, str]]:
    """The paths, and what precedes the names of their files: their number, if there are several."""
    paths = as_list(paths, "paths", (str, Path))
    if not paths:
        raise ValueError("expected paths of data sets, got none; name a data set, a folder or Parquet files")
    for path in paths:
        given_path(path)
    return [(f"{number}:" if len(paths) > 1 else "", str(path)) for number, path in enumerate(paths, 1)]


def _chosen(columns: Iterable[str]) -> dict[str, str]:
    """Field → column, from "FIELD=COLUMN"."""
    chosen: dict[str, str] = {}
    for text in as_list(columns, "columns"):
        field, equals, column = (part.strip() for part in text.partition("="))
        if not equals or not column or field not in FIELDS or field in chosen:
            raise ValueError(f"column {text!r}: expected FIELD=COLUMN, with FIELD once each of {', '.join(FIELDS)}")
        chosen[field] = column
    return chosen


def _mapping(table: _Table, chosen: dict[str, str]) -> dict[str, str]:
    """Field → column, of those that this table has."""
    mapping = {field: chosen.get(field, field) for field in FIELDS}
    wanted = [column for field, column in mapping.items() if field in chosen or field in _REQUIRED]
    if absent := [column for column in wanted if column not in table.columns]:
        raise ValueError(
            f"{table.domain}: expected the columns {absent}, found {list(table.columns)}; name the columns of the "
            "fields, for example query=question"
        )
    return {field: column for field, column in mapping.items() if column in table.columns}


def _read(tables: list[tuple[str, _Table, dict[str, str]]], log: InputLog) -> Iterator[Pair]:
    for name, table, mapping in tables:
        left_out: Counter[str] = Counter()
        count = 0
        for place, row in table.read(list(dict.fromkeys(mapping.values()))):
            query, document, negatives, domain = (row[mapping[field]] if field in mapping else None for field in FIELDS)
            domain = "".join(texts(domain, "domain", place)) or table.domain
            for texts_of_row in rows(query, document, negatives, place, left_out):
                count += 1
                yield Pair(domain, *texts_of_row)
        log.finish(name, count, left_out)


def _tables(path: str) -> list[tuple[str, _Table]]:
    """Name and content of each file of a path, or of its data set."""
    tables = []
    for file_name, file in _parquet_files(path).items():
        stem = re.sub(r"-\d+-of-\d+$", "", file.stem)  # arguana-00000-of-00002 → arguana
        tables.append((file_name, _Table(stem, parquet_columns(file), functools.partial(parquet_rows, file))))
    if not tables:
        name, config, split = _split(path)
        data = _data_set(path, name, config, split)
        columns = data.column_names or list(next(iter(data), {}))
        title = _title(name, config)
        tables = [(f"{title}#{split}", _Table(title, columns, functools.partial(_rows, data, path)))]
    return tables


def _parquet_files(path: str) -> dict[str, Path]:
    """The Parquet files that a path names; one that looks like it and names none is a ValueError."""
    files = {name: file for name, file in matches(Path(path).expanduser()).items() if not file.is_dir()}
    if (path.endswith(".parquet") or has_magic(path)) and not (files or Path(path).expanduser().is_dir()):
        raise ValueError(f"{path}: expected Parquet files, found none; correct the path")
    if other := [file for file in files.values() if file.suffix != ".parquet"]:
        raise ValueError(f"{other[0]}: expected a Parquet file; other files are read as a folder, as `datasets` does")
    return files


def _split(path: str) -> tuple[str, str | None, str]:
    """(name or folder, configuration, split) of `NAME[:CONFIG][#SPLIT]`."""
    if Path(path).expanduser().exists():
        return path, None, "train"
    name, _, split = path.partition("#")
    name, _, config = name.partition(":")
    return name, config or None, split or "train"


def _title(name: str, config: str | None) -> str:
    """The domain of a data set: the folder's own name, wherever it lies, or that on the Hub."""
    folder = Path(name).expanduser()
    name = folder.resolve().name if folder.exists() else name
    return f"{name}:{config}" if config else name


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


def _rows(data: Any, path: str, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(data.select_columns(list(columns)), 1):
        yield f"{path}: row {number}", row


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
