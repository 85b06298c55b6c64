"""The published formats of training collections: what their files mean, as (query, document, hard negatives).

| format | files |
|---|---|
| nomic | `shard-00000.jsonl.gz`: lines with the set's columns and `metadata.objective`, the columns that make pairs |
| bge | Parquet with `query`, and lists `pos` and `neg`; each of several positives makes a pair |
| msmarco | TSV: passages and queries as id and text, qrels as query id, 0, passage id, relevance |
| msmarco-hard-negatives | the same passages and queries; lines of `qid`, ids `pos`, ids `neg` by who found them |
| beir | `corpus.jsonl` (`_id`, `title`, `text`), `queries.jsonl` (`_id`, `text`), TSV qrels with a header line |

A text of another type or a broken line is a ValueError that begins with file and line. Rows without text are left
out and counted: published sets have some, and they are not the reader's to repair.
"""

import json
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from cde_jax.data.sources.collections import Collection
from cde_jax.data.sources.jsonl import json_lines, text_field, text_lines

Row = tuple[str, str, tuple[str, ...]]  # query, document, hard negatives
Shard = Callable[[], Iterator[Row]]  # reads a part of a collection, from its beginning each time
# Of MS MARCO's mined negatives, those are taken that a cross-encoder scores lower than the positives by this margin
# (nearer ones are often unmarked positives), and so many of each system, as in BEIR's recipe and the paper's code.
CROSS_ENCODER_MARGIN = 3.0
PER_SYSTEM = 5
_BATCH = 256  # rows of a Parquet file decoded at a time


def shards(collection: Collection, files: Sequence[Path], left_out: Counter) -> list[Shard]:
    """Readers of the collection's parts, in order; `left_out` gains what was left out, by reason."""
    parts = [[file] for file in files] if collection.format in _BY_FILE else [files]
    return [partial(READERS[collection.format], collection, part, left_out) for part in parts]


def rows(query: Any, documents: Any, negatives: Any, place: str, left_out: Counter) -> Iterator[Row]:
    """One row for each document that has text, if the query has; documents and negatives are texts or lists of them."""
    queries = texts(query, "query", place)
    if len(queries) > 1:
        raise ValueError(f"{place}: expected one text as the query, got {len(queries)}")
    if not "".join(queries).strip():
        left_out["rows whose query has no text"] += 1
        return
    hard = texts(negatives, "hard negatives", place)
    kept = tuple(text for text in hard if text.strip())
    left_out["hard negatives without text"] += len(hard) - len(kept)
    for document in texts(documents, "document", place) or [""]:
        if document.strip():
            yield queries[0], document, kept
        else:
            left_out["rows whose document has no text"] += 1


def texts(value: Any, name: str, place: str) -> list[str]:
    """A text, a list of texts or None as a list; anything else is a ValueError."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    return [text_field({name: each}, name, place, empty=True) for each in values]


def parquet_columns(path: Path) -> list[str]:
    """The names of a Parquet file's columns; a file that is no Parquet is a ValueError."""
    with _parquet(path) as file:
        return file.schema_arrow.names


def parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file: row n", row) of a Parquet file's columns, n from 1, with a batch in memory at a time."""
    if absent := [name for name in columns if name not in parquet_columns(path)]:
        raise ValueError(f"{path}: expected the columns {absent}, found {parquet_columns(path)}")
    number = 0
    with _parquet(path) as file:
        for batch in file.iter_batches(batch_size=_BATCH, columns=list(columns)):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not readable as Parquet ({error}); fetch it again") from None


def _nomic(collection: Collection, files: Sequence[Path], left_out: Counter) -> Iterator[Row]:
    objective, columns = collection.objective, list(collection.columns)
    for place, entry in json_lines(files[0]):
        metadata = entry.get("metadata")
        published = metadata.get("objective") if isinstance(metadata, dict) else None
        if isinstance(published, dict) and columns not in (published.get(objective) or []):
            raise ValueError(
                f"{place}: expected the {objective} objective with columns {columns}, the line's metadata has "
                f"{published}; is this another set's file?"
            )
        query, document, *negatives = (_present(entry, column, place) for column in columns)
        yield from rows(query, document, negatives[0] if negatives else None, place, left_out)


def _bge(collection: Collection, files: Sequence[Path], left_out: Counter) -> Iterator[Row]:
    for place, row in parquet_rows(files[0], collection.columns):
        yield from rows(*(row[column] for column in collection.columns), place, left_out)


def _msmarco(_: Collection, files: Sequence[Path], left_out: Counter) -> Iterator[Row]:
    passages, queries, qrels = files
    with texts_by_id(passages, _tsv_text) as document_of, texts_by_id(queries, _tsv_text) as query_of:
        for place, (query, _iteration, passage, relevance) in _tsv(qrels, 4):
            if _relevant(relevance, place):
                yield from rows(query_of(query, place), document_of(passage, place), None, place, left_out)


def _msmarco_hard_negatives(_: Collection, files: Sequence[Path], left_out: Counter) -> Iterator[Row]:
    passages, queries, mined = files
    with texts_by_id(passages, _tsv_text) as document_of, texts_by_id(queries, _tsv_text) as query_of:
        for place, entry in json_lines(mined):
            positives = [_judged(item, place) for item in _list(_present(entry, "pos", place), "pos", place)]
            systems = _present(entry, "neg", place)
            if not isinstance(systems, dict):
                raise ValueError(f"{place}: expected lists of ids by system as 'neg', got {systems!r:.60}")
            if not positives:
                left_out["queries without a positive"] += 1
                continue
            # Without scores the limit is NaN, and nothing is above it.
            limit = min(score for _, score in positives) - CROSS_ENCODER_MARGIN
            chosen: dict[str, None] = {}
            for name, ranked in systems.items():
                judged = (_judged(item, place) for item in _list(ranked, name, place))
                fresh = [i for i, score in judged if i not in chosen and not score > limit]
                chosen |= dict.fromkeys(fresh[:PER_SYSTEM])
            query = query_of(str(_present(entry, "qid", place)), place)
            documents = [document_of(identifier, place) for identifier, _ in positives]
            yield from rows(query, documents, [document_of(i, place) for i in chosen], place, left_out)


def _beir(_: Collection, files: Sequence[Path], left_out: Counter) -> Iterator[Row]:
    corpus, queries, qrels = files
    with texts_by_id(corpus, _json_text) as document_of, texts_by_id(queries, _json_text) as query_of:
        for place, (query, document, score) in _tsv(qrels, 3):
            if place == f"{qrels}:1" and not score.strip().lstrip("-").isdigit():
                continue  # the header line
            if _relevant(score, place):
                yield from rows(query_of(query, place), document_of(document, place), None, place, left_out)


READERS = {
    "nomic": _nomic,
    "bge": _bge,
    "msmarco": _msmarco,
    "msmarco-hard-negatives": _msmarco_hard_negatives,
    "beir": _beir,
}
_BY_FILE = ("nomic", "bge")  # each file is a part of its own; the others' files are read together


@contextmanager
def texts_by_id(path: Path, parse: Callable[[bytes, str], tuple[str, str]]) -> Iterator[Callable[[str, str], str]]:
    """A function (id, place that names it) → text, for a file of one text a line, read where it lies.

    Memory: 16 bytes a line. `parse` (line, its place) gives id and text. Two lines of one id, and an id that is not
    there, are ValueErrors.
    """
    keys, starts = array("Q"), array("Q")
    position = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                keys.append(_key(parse(line, f"{path}:{number}")[0]))
                starts.append(position)
            position += len(line)
        order = np.argsort(np.asarray(keys), kind="stable")
        by_key, start_of = np.asarray(keys)[order], np.asarray(starts)[order]
        del keys, starts, order

        def line_at(at: int) -> tuple[str, str]:
            file.seek(int(start_of[at]))
            return parse(file.readline(), str(path))

        def text_of(identifier: str, place: str) -> str:
            at = int(np.searchsorted(by_key, np.uint64(_key(identifier))))
            found, text = line_at(at) if at < len(by_key) else (None, "")
            if found != identifier:
                raise ValueError(f"{place}: names {identifier!r}, which is not among the {len(by_key)} of {path}")
            return text

        if len(twice := np.flatnonzero(by_key[1:] == by_key[:-1])):
            raise ValueError(f"{path}: the id {line_at(int(twice[0]))[0]!r} is there twice; ids must differ")
        yield text_of


def _key(identifier: str) -> int:
    return int.from_bytes(blake2b(identifier.encode(), digest_size=8).digest(), "little")


def _tsv_text(line: bytes, place: str) -> tuple[str, str]:
    identifier, tab, text = _decoded(line, place).rstrip("\r\n").partition("\t")
    if not tab:
        raise ValueError(f"{place}: expected an id and a text with a tab between, got {line!r:.80}")
    return identifier, text


def _json_text(line: bytes, place: str) -> tuple[str, str]:
    try:
        entry = json.loads(_decoded(line, place))
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: broken JSON ({error}); expected one object a line") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: expected a JSON object, got {type(entry).__name__}")
    title = text_field(entry, "title", place, empty=True) if entry.get("title") is not None else ""
    return text_field(entry, "_id", place), f"{title} {text_field(entry, 'text', place, empty=True)}".strip()


def _decoded(line: bytes, place: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 ({error}); repair the file") from None


def _tsv(path: Path, fields: int) -> Iterator[tuple[str, list[str]]]:
    for place, line in text_lines(path):
        row = line.rstrip("\r\n").split("\t")
        if len(row) != fields:
            raise ValueError(f"{place}: expected {fields} fields with tabs between, got {row!r:.80}")
        yield place, row


def _relevant(score: str, place: str) -> bool:
    try:
        return int(score) > 0
    except ValueError:
        raise ValueError(f"{place}: expected an integer relevance, got {score!r}") from None


def _present(entry: dict[str, Any], key: str, place: str) -> Any:
    if key not in entry:
        raise ValueError(f"{place}: expected the key {key!r}, found {sorted(entry)}")
    return entry[key]


def _list(value: Any, name: str, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{place}: expected a list as {name!r}, got {value!r:.60}")
    return value


def _judged(item: Any, place: str) -> tuple[str, float]:
    """(passage id, cross-encoder score or NaN): the file is published with scores ({"pid", "ce-score"}) and without."""
    if isinstance(item, dict):
        return str(_present(item, "pid", place)), float(_present(item, "ce-score", place))
    return str(item), math.nan
