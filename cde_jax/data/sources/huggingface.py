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
import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any, NamedTuple

from cde_jax.data.pairs import Pair
from cde_jax.data.sources.formats import parquet_columns, parquet_rows, rows, texts

FIELDS = ("query", "document", "negatives", "domain")
_REQUIRED = ("query", "document")
_log = logging.getLogger(__name__)


class _Part(NamedTuple):
    """One file or data set: its default domain, its columns, and what reads them."""

    domain: str
    columns: Sequence[str]
    read: Any  # columns → ("place", row)s


def read_pairs(paths: Sequence[str], columns: Sequence[str] = ()) -> Iterator[Pair]:
    """The pairs of the paths, in order.

    `columns` gives ours under their names, ("query=question", "document=answer", "negatives=hard", "domain=source");
    one that is not given is the column of its own name. Query and document must be there. Documents and negatives
    are a text or a list of texts (each document makes a pair); the domain defaults to the data set's name. Unknown
    and missing columns are a ValueError that lists those present, before anything is read.
    """
    chosen = _chosen(columns)
    parts = [(part, _mapping(part, chosen)) for path in _demand(paths) for part in _parts(path)]
    return _read(parts)


def identity(paths: Sequence[str]) -> dict[str, str]:
    """Local files → sha256 of their bytes, names on the Hub → the commit that is read."""
    local: list[Path] = []
    commits = {}
    for path in _demand(paths):
        files = _parquet_files(path)
        name, _, _ = _split(path)
        if not files and Path(name).expanduser().is_dir():
            files = _visible_files(Path(name).expanduser())
        if files:
            local += files
        else:
            commits[name] = _commit(name)
    return commits | _digests(local)


def _digests(files: list[Path]) -> dict[str, str]:
    """File name (relative to the folder that all share) → sha256."""
    shared = os.path.commonpath([file.absolute().parent for file in files]) if files else ""
    digests = {}
    for file in files:
        with open(file, "rb") as content:
            digests[os.path.relpath(file.absolute(), shared)] = hashlib.file_digest(content, "sha256").hexdigest()
    return digests


def _demand(paths: Sequence[str]) -> list[str]:
    if not paths:
        raise ValueError("expected paths of data sets, got none; name a data set, a folder or Parquet files")
    return [str(path) for path in paths]


def _chosen(columns: Sequence[str]) -> dict[str, str]:
    """Our name → theirs, from "ours=theirs"."""
    chosen: dict[str, str] = {}
    for text in columns:
        ours, equals, theirs = (part.strip() for part in text.partition("="))
        if not equals or not theirs or ours not in FIELDS or ours in chosen:
            raise ValueError(f"column {text!r}: expected OURS=THEIRS, with OURS once each of {', '.join(FIELDS)}")
        chosen[ours] = theirs
    return chosen


def _mapping(part: _Part, chosen: dict[str, str]) -> dict[str, str]:
    """Our name → their column, of those that this data set has."""
    mapping = {ours: chosen.get(ours, ours) for ours in FIELDS}
    wanted = [theirs for ours, theirs in mapping.items() if ours in chosen or ours in _REQUIRED]
    if absent := [theirs for theirs in wanted if theirs not in part.columns]:
        raise ValueError(
            f"{part.domain}: expected the columns {absent}, found {list(part.columns)}; give ours under their names, "
            "for example query=question"
        )
    return {ours: theirs for ours, theirs in mapping.items() if theirs in part.columns}


def _read(parts: list[tuple[_Part, dict[str, str]]]) -> Iterator[Pair]:
    for part, mapping in parts:
        left_out: Counter[str] = Counter()
        count = 0
        for place, row in part.read(list(dict.fromkeys(mapping.values()))):
            query, document, negatives, domain = (row[mapping[name]] if name in mapping else None for name in FIELDS)
            domain = "".join(texts(domain, "domain", place)) or part.domain
            for texts_of_row in rows(query, document, negatives, place, left_out):
                count += 1
                yield Pair(domain, *texts_of_row)
        if reasons := dict(sorted((+left_out).items())):
            _log.warning("%s: %d pairs; left out: %s", part.domain, count, reasons)


def _parts(path: str) -> list[_Part]:
    if files := _parquet_files(path):
        return [_Part(_stem(file), parquet_columns(file), functools.partial(parquet_rows, file)) for file in files]
    return [_data_set(path)]


def _parquet_files(path: str) -> list[Path]:
    """The Parquet files that a path names; one that looks like it and names none is a ValueError."""
    files = [Path(path).expanduser()]
    if files[0].is_dir():
        return []
    if has_magic(path) and not files[0].exists():
        files = [Path(name) for name in sorted(glob(str(files[0]), recursive=True))]
    files = [file for file in files if file.is_file()]
    if (path.endswith(".parquet") or has_magic(path)) and not files:
        raise ValueError(f"{path}: expected Parquet files, found none; correct the path")
    if other := [file for file in files if file.suffix != ".parquet"]:
        raise ValueError(f"{other[0]}: expected a Parquet file; other files are read as a folder, as `datasets` does")
    return files


def _visible_files(folder: Path) -> list[Path]:
    """All files below a folder but hidden ones, such as those that the Hub's client keeps beside a copy."""
    every = sorted(file for file in folder.rglob("*") if file.is_file())
    return [file for file in every if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def _stem(file: Path) -> str:
    """`arguana-00000-of-00002.parquet` → `arguana`."""
    return re.sub(r"-\d+-of-\d+$", "", file.stem)


def _split(path: str) -> tuple[str, str | None, str]:
    """(name or folder, configuration, split) of `NAME[:CONFIG][#SPLIT]`."""
    if Path(path).expanduser().exists():
        return path, None, "train"
    name, _, split = path.partition("#")
    name, _, config = name.partition(":")
    return name, config or None, split or "train"


def _data_set(path: str) -> _Part:
    library = _library()
    name, config, split = _split(path)
    folder = Path(name).expanduser()
    title = folder.resolve().name if folder.exists() else name
    source, commit = (str(folder), None) if folder.exists() else (name, _commit(name))
    try:
        if any((folder / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
            data = library.load_from_disk(source)
            data = data[split] if isinstance(data, dict) else data
        else:
            data = library.load_dataset(source, config, split=split, streaming=True, revision=commit)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not readable as a data set ({error}); a path is NAME[:CONFIG][#SPLIT]") from error
    columns = data.column_names or list(next(iter(data), {}))
    return _Part(f"{title}:{config}" if config else title, columns, functools.partial(_rows, data, path))


def _rows(data: Any, path: str, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    kept: Iterable[dict[str, Any]] = data.select_columns(list(columns))
    for number, row in enumerate(kept, 1):
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


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            "data sets by name or folder need the `datasets` library: pip install 'cde_jax[huggingface]', or name "
            "Parquet files (folder/*.parquet)"
        ) from None
    return datasets
