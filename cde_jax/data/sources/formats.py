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

from cde_jax.data.sources import beir
from cde_jax.data.sources.collections import Collection
from cde_jax.data.sources.jsonl import as_text, field, json_lines, json_object
from cde_jax.data.tokens import has_text

Row = tuple[str, str, tuple[str, ...]]  # query, document, hard negatives
Shard = Callable[[], Iterator[Row]]  # reads a part of a collection, from its beginning each time
Parse = Callable[[bytes, str], tuple[str, str]]  # a line and its place → id and text
# Of MS MARCO's mined negatives, those are taken that a cross-encoder scores lower than the positives by this margin
# (nearer ones are often unmarked positives), and so many of each system, as in BEIR's recipe and the paper's code.
CROSS_ENCODER_MARGIN = 3.0
PER_SYSTEM = 5
_BATCH = 256  # rows of a Parquet file decoded at a time


def shards(collection: Collection, files: Sequence[Path], left_out: Counter) -> list[Shard]:
    """Readers of the collection's parts, in order; `left_out` gains what was left out, by reason."""
    reader = READERS[collection.format]
    return [partial(reader, collection, part, left_out) for part in parts(collection, files)]


def parts(collection: Collection, files: Sequence[Path]) -> list[Sequence[Path]]:
    """The files of each part: one alone where a file has all of its texts, else all together."""
    return [[file] for file in files] if collection.format in ("nomic", "bge") else [files]


def rows(query: Any, documents: Any, negatives: Any, place: str, left_out: Counter) -> Iterator[Row]:
    """One row for each document that has text, if the query has; documents and negatives are texts or lists of them."""
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
    """The names of a Parquet file's columns; a file that is no Parquet is a ValueError."""
    with _parquet(path) as file:
        return file.schema_arrow.names


def parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file: row n", row) of a Parquet file's columns, n from 1, with a batch in memory at a time."""
    number = 0
    with _parquet(path) as file:
        names = file.schema_arrow.names
        if absent := [name for name in columns if name not in names]:
            raise ValueError(f"{path}: expected the columns {absent}, found {names}")
        for batch in file.iter_batches(batch_size=_BATCH, columns=list(columns)):
            for number, row in enumerate(batch.to_pylist(), number + 1):  # noqa: B020
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
    columns = list(collection.columns)
    objective = "triplet" if len(columns) == 3 else "paired"
    for place, entry in json_lines(files[0]):
        metadata = entry.get("metadata")
        published = metadata.get("objective") if isinstance(metadata, dict) else None
        if isinstance(published, dict) and columns not in (published.get(objective) or []):
            raise ValueError(
                f"{place}: expected the {objective} objective with columns {columns}, the line's metadata has "
                f"{published}; is this another set's file?"
            )
        query, document, *negatives = (field(entry, column, place) for column in columns)
        yield from rows(query, document, negatives[0] if negatives else None, place, left_out)


def _bge(collection: Collection, files: Sequence[Path], left_out: Counter) -> Iterator[Row]:
    for place, row in parquet_rows(files[0], collection.columns):
        yield from rows(*(row[column] for column in collection.columns), place, left_out)


def _qrels(parse: Parse, columns: int, _: Collection, files: Sequence[Path], left_out: Counter) -> Iterator[Row]:
    documents, queries, qrels = files
    with texts_by_id(documents, parse) as document_of, texts_by_id(queries, parse) as query_of:
        for place, query, document, relevance in beir.qrels_lines(qrels, columns):
            if relevance > 0:
                yield from rows(query_of(query, place), document_of(document, place), None, place, left_out)


def _msmarco_hard_negatives(_: Collection, files: Sequence[Path], left_out: Counter) -> Iterator[Row]:
    passages, queries, mined = files
    with texts_by_id(passages, _tsv_text) as document_of, texts_by_id(queries, _tsv_text) as query_of:
        for place, entry in json_lines(mined):
            positives = _ids_and_scores(field(entry, "pos", place), "pos", place)
            systems = field(entry, "neg", place)
            if not isinstance(systems, dict):
                raise ValueError(f"{place}: expected lists of ids by system as 'neg', got {systems!r:.60}")
            if not positives:
                left_out["queries without a positive"] += 1
                continue
            # Without scores the limit is NaN, and nothing is above it.
            limit = min(score for _, score in positives) - CROSS_ENCODER_MARGIN
            chosen: dict[str, None] = {}
            for name, ranked in systems.items():
                scored = _ids_and_scores(ranked, name, place)
                new = [i for i, score in scored if i not in chosen and not score > limit]
                chosen |= dict.fromkeys(new[:PER_SYSTEM])
            query = query_of(str(field(entry, "qid", place)), place)
            documents = [document_of(identifier, place) for identifier, _ in positives]
            yield from rows(query, documents, [document_of(i, place) for i in chosen], place, left_out)


def _ids_and_scores(items: Any, name: str, place: str) -> list[tuple[str, float]]:
    """Passage ids and cross-encoder scores (NaN where the file has none: it is published with and without)."""
    if not isinstance(items, list):
        raise ValueError(f"{place}: expected a list as {name!r}, got {items!r:.60}")
    return [
        (str(field(item, "pid", place)), float(field(item, "ce-score", place)))
        if isinstance(item, dict)
        else (str(item), math.nan)
        for item in items
    ]


@contextmanager
def texts_by_id(path: Path, parse: Parse) -> Iterator[Callable[[str, str], str]]:
    """A function (id, place that names it) → text, for a file of one text a line, which stays on disk.

    Memory: 16 bytes a line. `parse` (line, its place) gives id and text. Two lines of one id, and an id that is not
    there, are ValueErrors.
    """
    keys, starts, position = array("Q"), array("Q"), 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                keys.append(_key(parse(line, f"{path}:{number}")[0]))
                starts.append(position)
            position += len(line)
        order = np.argsort(np.asarray(keys), kind="stable")  # [lines], by key
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
    try:
        identifier, tab, text = line.decode().rstrip("\r\n").partition("\t")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 ({error}); repair the file") from None
    if not tab:
        raise ValueError(f"{place}: expected an id and a text with a tab between, got {line!r:.80}")
    return identifier, text


def _json_text(line: bytes, place: str) -> tuple[str, str]:
    return beir.document(json_object(line, place), place)


READERS = {
    "nomic": _nomic,
    "bge": _bge,
    "msmarco": partial(_qrels, _tsv_text, 4),
    "msmarco-hard-negatives": _msmarco_hard_negatives,
    "beir": partial(_qrels, _json_text, 3),
}
