"""A user's own pairs: one JSON object a line, plain or gzip.

    {"query": "…", "document": "…", "domain": "optional", "negatives": ["optional", …]}

Other keys are ignored, apart from likely misspellings of the optional ones. The domain defaults to the file's
name without its endings. Every mistake is a ValueError that begins with file and line.
"""

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from cde_jax.data.pairs import Pair

_ENDINGS = (".jsonl", ".jsonl.gz")
_MISTAKEN = {"negative": "negatives", "hard_negatives": "negatives", "neg": "negatives", "domains": "domain"}


def read_pairs(paths: str | Path | Sequence[str | Path]) -> Iterator[Pair]:
    """The pairs of files, folders (every .jsonl and .jsonl.gz below, sorted) and glob patterns, in order.

    That there are files is checked before this returns, their lines as they are read.
    """
    return _read(find(paths))


def identity(paths: str | Path | Sequence[str | Path]) -> dict[str, str]:
    """File name (relative to the folder that all share) → sha256 of its bytes."""
    files = find(paths)
    shared = os.path.commonpath([file.absolute().parent for file in files])
    digests = {}
    for file in files:
        with open(file, "rb") as content:
            name = file.absolute().relative_to(shared).as_posix()
            digests[name] = hashlib.file_digest(content, "sha256").hexdigest()
    return digests


def find(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that the paths name, each once; a path that names none is a ValueError."""
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    if not paths:
        raise ValueError("expected paths of .jsonl files, got none; name a file, a folder or a pattern")
    found: dict[Path, None] = {}
    for path in paths:
        files = _files(Path(path).expanduser())
        if not files:
            raise ValueError(f"{path}: expected .jsonl or .jsonl.gz files, found none; correct the path")
        for file in files:
            if file.stat().st_size == 0:
                raise ValueError(f"{file}: the file is empty; expected one JSON object a line")
        found |= dict.fromkeys(files)
    return list(found)


def text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """("file:line", line) of every line of a UTF-8 file that is not blank, through gzip if it ends in .gz."""
    number = 0
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        lines = iter(file)
        while True:
            try:
                line = next(lines, None)
            except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
                # Text is decoded ahead of the line asked for, so this names the first that may hold the fault.
                raise ValueError(f"{path}:{number + 1}: from here not readable ({error}); repair the file") from None
            if line is None:
                return
            number += 1
            if line.strip():
                yield f"{path}:{number}", line


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of every line that is not blank; a file without any is a ValueError."""
    empty = True
    for place, line in text_lines(path):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: broken JSON ({error}); expected one object a line") from None
        if not isinstance(entry, dict):
            raise ValueError(f"{place}: expected a JSON object, got {type(entry).__name__}")
        empty = False
        yield place, entry
    if empty:
        raise ValueError(f"{path}: expected one JSON object a line, found no lines")


def text_field(entry: dict[str, Any], key: str, place: str, *, empty: bool = False) -> str:
    """`entry[key]`, a text; missing, of another type, or without text (unless `empty`) is a ValueError."""
    if key not in entry:
        raise ValueError(f"{place}: expected the key {key!r}, found {sorted(entry)}")
    return _text(entry[key], key, place, empty)


def _text(value: Any, key: str, place: str, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: expected text as {key!r}, got {type(value).__name__}: {value!r:.60}")
    if not value.strip() and not empty:
        raise ValueError(f"{place}: {key!r} has no text; fill it in or take the line out")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: {key!r} is not valid Unicode ({error.reason}); correct the escapes") from None
    return value


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*.jsonl*") if file.is_file() and file.name.endswith(_ENDINGS))
    if path.is_file():
        return [path]
    if has_magic(str(path)):
        return [Path(name) for name in sorted(glob(str(path), recursive=True)) if Path(name).is_file()]
    return []


def _read(files: list[Path]) -> Iterator[Pair]:
    for file in files:
        default = file.name.removesuffix(".gz").removesuffix(".jsonl")
        for place, entry in json_lines(file):
            if mistaken := sorted(set(entry) & set(_MISTAKEN)):
                wanted = _MISTAKEN[mistaken[0]]
                raise ValueError(f"{place}: unknown key {mistaken[0]!r}; did you mean {wanted!r}?")
            query, document = text_field(entry, "query", place), text_field(entry, "document", place)
            domain = default if entry.get("domain") is None else text_field(entry, "domain", place)
            negatives = entry.get("negatives") or []
            if not isinstance(negatives, list):
                raise ValueError(f"{place}: expected a list of texts as 'negatives', got {negatives!r:.60}")
            texts = tuple(_text(negative, "negatives", place) for negative in negatives)
            yield Pair(domain, query, document, texts)
