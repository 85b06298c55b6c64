"""A user's own pairs: one JSON object a line, plain or gzip.

    {"query": "…", "document": "…", "domain": "optional", "negatives": ["optional", …]}

Other keys are ignored, apart from likely misspellings of these. The domain defaults to the file's name without its
endings. Whatever is wrong with a line is a ValueError that begins with file and line.
"""

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from cde_jax.data.files import file_digest, given_path, matches
from cde_jax.data.pairs import InputLog, Pair
from cde_jax.data.tokens import as_list, has_text

_ENDINGS = (".jsonl", ".jsonl.gz")
_KEYS = ("query", "document", "domain", "negatives")
_MISTAKEN = {"negative": "negatives", "hard_negatives": "negatives", "neg": "negatives", "domains": "domain"}
_MISTAKEN |= {"queries": "query", "documents": "document"}


def read_pairs(paths: str | Path | Iterable[str | Path], log: InputLog | None = None) -> Iterator[Pair]:
    """The pairs of files, folders (every .jsonl and .jsonl.gz below, sorted) and glob patterns, in order.

    Files are looked for before this returns. `log` gains those that are skipped, and how many pairs each other gave.
    """
    log = InputLog() if log is None else log
    return _read(find(paths, log), log)


def parts(paths: str | Path | Iterable[str | Path], log: InputLog) -> list[Callable[..., Iterator[Pair]]]:
    """`read_pairs` file by file: functions of a log that other processes can call."""
    return [partial(_read, {name: file}) for name, file in find(paths, log).items()]


def identity(paths: str | Path | Iterable[str | Path]) -> dict[str, str]:
    """The files' names, as `find` gives them, → sha256 of their bytes: the same wherever the files are stored."""
    return {name: file_digest(file) for name, file in find(paths).items()}


def find(paths: str | Path | Iterable[str | Path], log: InputLog | None = None) -> dict[str, Path]:
    """The files that the paths name, each once and in order, by their name below the path.

    Names begin with the path's number if there are several. A path that names no file, and a file that is empty or
    not readable, is a ValueError; other files of a folder are noted in `log`.
    """
    log = InputLog() if log is None else log
    paths = [paths] if isinstance(paths, str | Path) else paths
    files: dict[Path, str] = {}
    for prefix, path in numbered(paths, "expected paths of .jsonl files, got none; name a file, a folder or a pattern"):
        named = _files(Path(path).expanduser(), prefix, log)
        if not named:
            skipped = [name for name in log.skipped if name.startswith(prefix)]
            raise ValueError(
                f"{path}: expected .jsonl or .jsonl.gz files, found none"
                f"{f' (other files: {skipped[:5]})' if skipped else ''}; correct the path"
            )
        for name, file in named.items():
            files.setdefault(file, name)
    return {name: file for file, name in files.items()}


def numbered(paths: Iterable[str | Path], none: str) -> list[tuple[str, str]]:
    """The paths, each after what precedes the names of its files: its number, if there are several.

    Anything but a list of paths is a ValueError, an empty one with the message `none`.
    """
    paths = as_list(paths, "paths", (str, Path))
    if not paths:
        raise ValueError(none)
    for path in paths:
        given_path(path)
    return [(f"{number}:" if len(paths) > 1 else "", str(path)) for number, path in enumerate(paths, 1)]


def text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """("file:line", line) of every line of a UTF-8 file that is not blank, through gzip if it ends in .gz."""
    number = 0
    try:
        with (gzip.open if path.name.lower().endswith(".gz") else open)(
            path, "rt", encoding="utf-8", newline="\n"
        ) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", line
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        # Text is decoded ahead of the line asked for, so this names the first that may be broken.
        raise ValueError(f"{path}:{number + 1}: from here not readable ({error}); repair the file") from None


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of every line that is not blank. None, other content or doubled keys are a ValueError."""
    place = ""
    for place, line in text_lines(path):
        try:
            entry = json.loads(line, object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: broken JSON ({error}); expected one object a line") from None
        if not isinstance(entry, dict):
            raise ValueError(f"{place}: expected a JSON object, got {type(entry).__name__}")
        yield place, entry
    if not place:
        raise ValueError(f"{path}: expected one JSON object a line, found no lines")


def _unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    entry = {}
    for key, value in items:
        if key in entry:
            raise ValueError(f"the key {key!r} is there twice")
        entry[key] = value
    return entry


def field(entry: dict[str, Any], key: str, place: str) -> Any:
    """`entry[key]`; a missing one is a ValueError."""
    if key not in entry:
        raise ValueError(f"{place}: expected the key {key!r}, found {sorted(entry)}")
    return entry[key]


def text_field(entry: dict[str, Any], key: str, place: str, *, empty: bool = False) -> str:
    """`entry[key]`, a text; missing, of another type, or without text (unless `empty`) is a ValueError."""
    return as_text(field(entry, key, place), key, place, empty=empty)


def as_text(value: Any, key: str, place: str, *, empty: bool = False) -> str:
    """`value`, a text that can be stored; ValueError as `text_field`."""
    if not isinstance(value, str):
        raise ValueError(f"{place}: expected text as {key!r}, got {type(value).__name__}: {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: {key!r} is not valid Unicode ({error.reason}); correct the escapes") from None
    if not empty and not has_text(value):
        raise ValueError(f"{place}: {key!r} has no text, got {value!r:.60}; fill it in or take the line out")
    return value


def _files(path: Path, prefix: str, log: InputLog) -> dict[str, Path]:
    """Name, after the prefix, → file of one path, sorted by name."""
    if path.is_dir():
        entries, endings = {file.relative_to(path).as_posix(): file for file in sorted(_below(path))}, _ENDINGS
    else:
        entries, endings = matches(path), ("",)  # what is named may have any ending
    files = {}
    for name, file in entries.items():
        if file.is_dir():
            log.skip(prefix + name, "a folder, or a link to one; name it as a path of its own")
        elif not name.lower().endswith(endings):
            log.skip(prefix + name, f"its name does not end in {' or '.join(_ENDINGS)}")
        elif not file.is_file():
            raise ValueError(f"{file}: expected a file, got a link to nothing or a special file; remove it")
        elif not os.access(file, os.R_OK):
            raise ValueError(f"{file}: this process may not read it; change its permissions or move it away")
        elif file.stat().st_size == 0:
            raise ValueError(f"{file}: the file is empty; expected one JSON object a line")
        else:
            files[prefix + name] = file
    return files


def _below(folder: Path) -> Iterator[Path]:
    """Files, and links to folders, below a folder; a subfolder that cannot be read is a ValueError."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename}: the folder is not readable ({error.strerror}); change its permissions")

    for parent, folders, names in os.walk(folder, onerror=refuse):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        yield from (Path(parent, name) for name in [*names, *links])


def _read(files: dict[str, Path], log: InputLog) -> Iterator[Pair]:
    for name, file in files.items():
        default = re.sub(r"(\.jsonl)?(\.gz)?$", "", file.name, flags=re.IGNORECASE)
        count = 0
        for count, (place, entry) in enumerate(json_lines(file), 1):  # noqa: B007
            yield _pair(entry, place, default)
        log.finish(name, count)


def _pair(entry: dict[str, Any], place: str, default_domain: str) -> Pair:
    for key in entry:
        meant = key.strip().lower()
        meant = _MISTAKEN.get(meant, meant)
        if meant in _KEYS and key != meant:
            raise ValueError(f"{place}: unknown key {key!r}; did you mean {meant!r}?")
    query, document = text_field(entry, "query", place), text_field(entry, "document", place)
    domain = default_domain if entry.get("domain") is None else text_field(entry, "domain", place)
    negatives = entry.get("negatives")
    if negatives is not None and not isinstance(negatives, list):
        raise ValueError(f"{place}: expected a list of texts as 'negatives', got {negatives!r:.60}")
    return Pair(domain, query, document, tuple(as_text(text, "negatives", place) for text in negatives or ()))
