"""Which rows are the first with their key, for more rows than memory holds.

Rows are spread over buckets by their key, each bucket is resolved in memory, and the repeats found are spread back
over ranges of rows: two counting sorts on disk. Nothing random: the same keys give the same answer.

All files are temporary and have no name, so an error or a kill frees them. What is returned is a memory map of one,
which lives as long as the array.
"""

import io
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Int64, UInt64

from cde_jax.data.files import explained, write_all
from cde_jax.data.keys import fold, text_key

_BUCKET = 1 << 20  # rows held at a time: about 100 MB, however many rows there are
_BLOCK = 4096  # numbers made into Python's at a time
_RECORD = 16  # bytes of two 64-bit numbers


class Column:
    """An array on disk that grows at its end: `with Column(folder, dtype) as c: c.append(…); rows = c.array()`."""

    def __init__(self, folder: str | Path, dtype: Any):
        self.folder, self.dtype = Path(folder), np.dtype(dtype)
        self._file: IO[bytes]

    def __enter__(self) -> "Column":
        self._file = unnamed_file(self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, values: np.ndarray) -> None:
        """Add `values` [b] at the end; a full disk is an OSError that says so."""
        try:
            write_all(self._file, np.ascontiguousarray(values, self.dtype).view(np.uint8))
        except OSError as error:
            raise explained(error, self.folder) from error

    def array(self) -> np.ndarray:
        """All that was appended, 1-d, read-only and memory-mapped; it stays valid after the `with` block."""
        if self._file.tell() == 0:  # an empty file cannot be mapped
            return np.zeros(0, self.dtype)
        return np.memmap(self._file, self.dtype, "r").view(np.ndarray)


def unnamed_file(folder: Path) -> IO[bytes]:
    """A temporary file without name or buffer in `folder`, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryFile(dir=folder, buffering=0)


def first_occurrence(keys: UInt64[np.ndarray, "n"], folder: str | Path) -> Int64[np.ndarray, "n"]:
    """For each row the number of the first row with the same key, as a memory map.

    `keys` are digests, best a memory map themselves. Memory is bounded by the size of a bucket as long as the keys
    modulo the number of buckets are spread evenly; one key in many rows does no harm. Needs up to 40 bytes of disk
    a row in `folder`; a full disk is an OSError that says so.
    """
    folder = Path(folder)
    buckets = max(1, -(-len(keys) // _BUCKET))
    sizes = np.zeros(buckets, np.int64)
    for start in range(0, len(keys), _BUCKET):
        sizes += np.bincount(_bucket(keys[start : start + _BUCKET], buckets), minlength=buckets)
    # Of a range of rows at most all are repeats: each gets that much room, and what is not written takes none.
    ranges = np.arange(buckets) * _BUCKET
    with unnamed_file(folder) as by_key, unnamed_file(folder) as by_row, Column(folder, np.int64) as result:
        try:
            starts = np.cumsum(sizes) - sizes
            ends = _spread(_keyed(keys, buckets), starts, by_key)
            repeats_end = _spread(_repeats(by_key, starts, ends), ranges, by_row)
        except OSError as error:
            raise explained(error, folder) from error
        for start, end in zip(ranges.tolist(), repeats_end.tolist(), strict=True):
            rows = np.arange(start, min(start + _BUCKET, len(keys)))
            repeats = _read(by_row, start, end).view(np.int64)
            rows[repeats[:, 0] - start] = repeats[:, 1]
            result.append(rows)
        return result.array()


def number_by_appearance(keys: UInt64[np.ndarray, "n"], folder: str | Path) -> Int64[np.ndarray, "n"]:
    """For each row the number of its key, 0 for the first that appears, 1 for the next one…, as a memory map.

    A row is thus the first with its key where its number is larger than all before. Memory, disk and errors as
    `first_occurrence`.
    """
    first = first_occurrence(keys, folder)
    with Column(folder, np.int64) as ranks, Column(folder, np.int64) as numbers:
        count = 0
        for start in range(0, len(keys), _BUCKET):
            block = first[start : start + _BUCKET]
            # So many keys have appeared, up to each row: minus one, that is the number of a key at its first row.
            appeared = count + np.cumsum(block == np.arange(start, start + len(block)))
            ranks.append(appeared - 1)
            count = appeared[-1]
            numbers.append(ranks.array()[block])
        return numbers.array()


class DistinctTexts:
    """Rows of (group, text) on disk, equal texts of a group kept once.

    `with DistinctTexts(folder) as t: t.add(rows); …; t.texts(); t.rows()`: all is added before anything is read.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.groups: dict[str, int] = {}

    def __enter__(self) -> "DistinctTexts":
        with ExitStack() as stack:
            self.lines = stack.enter_context(unnamed_file(self.folder))
            self.keys = stack.enter_context(Column(self.folder, np.uint64))
            self.sizes = stack.enter_context(Column(self.folder, np.int64))
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def add(self, rows: Sequence[Sequence[tuple[str, str]]]) -> None:
        """The next rows."""
        flat = [entry for row in rows for entry in row]
        texts = np.array([text_key(text) for _, text in flat], np.uint64)
        groups = np.array([self.groups.setdefault(group, len(self.groups)) for group, _ in flat], np.uint64)
        self.keys.append(fold(texts, groups))
        self.sizes.append(np.array([len(row) for row in rows], np.int64))
        try:
            write_all(self.lines, "".join(json.dumps(entry) + "\n" for entry in flat).encode())
        except OSError as error:
            raise explained(error, self.folder) from error

    def texts(self) -> Iterator[tuple[str, str]]:
        """The different (group, text), in the order in which they appeared; can be called once."""
        self.lines.seek(0)
        with io.BufferedReader(self.lines) as lines:
            count = 0
            for number, line in zip(each(self.numbers), lines, strict=True):
                if number == count:
                    count += 1
                    yield tuple(json.loads(line))

    def rows(self) -> Iterator[Int64[np.ndarray, "k"]]:
        """Of each row the numbers of its texts in the order of `texts`, each once, in the row's own order."""
        numbers = each(self.numbers)
        for size in each(self.sizes.array()):
            yield np.array(list(dict.fromkeys(islice(numbers, size))), np.int64)

    @cached_property
    def numbers(self) -> Int64[np.ndarray, "n"]:
        """The number of each text that was added."""
        return number_by_appearance(self.keys.array(), self.folder)


def each(array: np.ndarray) -> Iterator[int]:
    """The numbers of a memory map [n] as Python's, one by one."""
    for start in range(0, len(array), _BLOCK):
        yield from array[start : start + _BLOCK].tolist()


def _bucket(keys: np.ndarray, buckets: int) -> np.ndarray:
    return (keys % np.uint64(buckets)).astype(np.int64)


def _keyed(keys: np.ndarray, buckets: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of (bucket [b], [b, 2] of key and row)."""
    for start in range(0, len(keys), _BUCKET):
        block = keys[start : start + _BUCKET]
        rows = np.arange(start, start + len(block), dtype=np.uint64)
        yield _bucket(block, buckets), np.stack([block, rows], axis=1)


def _spread(blocks: Iterable[tuple[np.ndarray, np.ndarray]], starts: np.ndarray, file: IO[bytes]) -> np.ndarray:
    """Write each bucket's records, in order, from its own start on; returns where each ends (counted in records)."""
    ends = starts.copy()
    for bucket, records in blocks:
        records = records[np.argsort(bucket, kind="stable")]
        sizes = np.bincount(bucket, minlength=len(starts))
        stops = np.cumsum(sizes)
        for i in np.flatnonzero(sizes):
            file.seek(int(ends[i]) * _RECORD)
            write_all(file, records[stops[i] - sizes[i] : stops[i]].reshape(-1).view(np.uint8))
        ends += sizes
    return ends


def _repeats(file: IO[bytes], starts: np.ndarray, ends: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of (range of rows [b], [b, 2] of row and first row) of all rows whose key was there before."""
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        # Read in parts: one key in very many rows makes a bucket larger than memory, but not what is known of it.
        known, known_rows = np.zeros(0, np.uint64), np.zeros(0, np.uint64)
        for at in range(start, end, _BUCKET):
            keys, rows = _read(file, at, min(at + _BUCKET, end)).T
            values, index, inverse = np.unique(keys, return_index=True, return_inverse=True)
            first = rows[index]  # rows ascend, and np.unique gives the first index of each value
            place = np.searchsorted(known, values)
            old = np.searchsorted(known, values, side="right") > place
            first[old] = known_rows[place[old]]
            known = np.insert(known, place[~old], values[~old])
            known_rows = np.insert(known_rows, place[~old], first[~old])
            repeated = np.stack([rows, first[inverse]], axis=1)[first[inverse] != rows]
            yield (repeated[:, 0] // np.uint64(_BUCKET)).astype(np.int64), repeated


def _read(file: IO[bytes], start: int, end: int) -> np.ndarray:
    """Records start…end−1, uint64 [end − start, 2]."""
    file.seek(start * _RECORD)
    return np.fromfile(file, np.uint64, 2 * (end - start)).reshape(end - start, 2)
