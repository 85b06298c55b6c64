"""Which rows are the first with their key, for more rows than memory holds.

Rows are resolved bucket by bucket, a bucket being the keys that are equal modulo the number of buckets. Nothing is
random: the same keys give the same answer. All files are temporary and have no name, so an error or a kill frees
them; what is returned is a memory map of one, which lives as long as the array.
"""

import io
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Int64, Shaped, UInt64

from cde_jax.data.files import explain_os_errors, write_all
from cde_jax.data.texts import text_key

_BUCKET = 1 << 22  # rows held at a time: about 300 MB, however many rows there are
_BLOCK = 4096  # numbers converted to Python's at a time
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio (Knuth, TAOCP vol. 3, section 6.4); any odd number would do


class Column:
    """An array on disk that grows at its end: `with Column(folder, dtype) as c: c.append(…); rows = c.array()`."""

    def __init__(self, folder: str | Path, dtype: Any):
        self.folder, self.dtype = Path(folder), np.dtype(dtype)
        self._file: IO[bytes]

    def __enter__(self) -> "Column":
        self._file = _unnamed_file(self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, values: Shaped[np.ndarray, "b"]) -> None:
        """Add values at the end; a full disk is an OSError that says so."""
        with explain_os_errors(self.folder):
            write_all(self._file, np.ascontiguousarray(values, self.dtype).view(np.uint8))

    def array(self) -> Shaped[np.ndarray, "n"]:
        """All that was appended, read-only and memory-mapped; it stays valid after the `with` block."""
        if self._file.tell() == 0:  # an empty file cannot be mapped
            return np.zeros(0, self.dtype)
        return np.memmap(self._file, self.dtype, "r").view(np.ndarray)


def _unnamed_file(folder: Path) -> IO[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryFile(dir=folder, buffering=0)


def combine_keys(left: UInt64[np.ndarray, "n"], right: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """One 64-bit key of two, left · odd + right mod 2^64.

    Two pairs with one side in common never collide. Others, of digests, do with probability 2^-64: among n rows about
    n²/2^65 collisions, 3·10^-4 at 100 million rows.
    """
    return left * _ODD + right


def first_occurrence(keys: UInt64[np.ndarray, "n"], folder: str | Path) -> Int64[np.ndarray, "n"]:
    """For each row the number of the first row with the same key, as a memory map.

    `keys` are digests, best a memory map themselves. Memory is bounded by the size of a bucket as long as the keys
    modulo the number of buckets are spread evenly; one key in many rows does no harm. Needs 8 bytes of disk a row in
    `folder`; a full disk is an OSError that says so.
    """
    count = len(keys)
    if not count:
        return np.zeros(0, np.int64)
    buckets = -(-count // _BUCKET)
    with _unnamed_file(Path(folder)) as file:
        with explain_os_errors(folder):  # now: a memory map that meets a full disk ends the process
            os.posix_fallocate(file.fileno(), 0, 8 * count)
        first = np.memmap(file, np.int64, "r+", shape=(count,)).view(np.ndarray)
    for bucket in range(buckets):
        known, known_rows = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        for start in range(0, count, _BUCKET):
            block = keys[start : start + _BUCKET]
            rows = np.flatnonzero(block % np.uint64(buckets) == bucket)
            values, index, inverse = np.unique(block[rows], return_index=True, return_inverse=True)
            rows += start
            earliest = rows[index]  # np.unique gives the first index of each value, and rows ascend
            place = np.searchsorted(known, values)
            old = np.searchsorted(known, values, side="right") > place
            earliest[old] = known_rows[place[old]]
            known = np.insert(known, place[~old], values[~old])
            known_rows = np.insert(known_rows, place[~old], earliest[~old])
            first[rows] = earliest[inverse]
    first.flags.writeable = False
    return first


def number_by_appearance(keys: UInt64[np.ndarray, "n"], folder: str | Path) -> Int64[np.ndarray, "n"]:
    """For each row the number of its key, 0 for the first that appears, 1 for the next one…, as a memory map.

    A row is thus the first with its key where its number is larger than all before. Memory and errors as
    `first_occurrence`, with three times its disk.
    """
    first = first_occurrence(keys, folder)
    with Column(folder, np.int64) as ranks, Column(folder, np.int64) as numbers:
        count = 0
        for start in range(0, len(keys), _BUCKET):
            block = first[start : start + _BUCKET]
            # How many keys have appeared up to each row: minus one, that is the number of a key at its first row.
            appeared = count + np.cumsum(block == np.arange(start, start + len(block)))
            ranks.append(appeared - 1)
            count = appeared[-1]
            numbers.append(ranks.array()[block])
        return numbers.array()


class DistinctTexts:
    """Rows of (group, text) on disk, equal texts of a group numbered once.

    `with DistinctTexts(folder) as t: t.add(rows); …; t.rows()`: all is added before anything is read.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.groups: dict[str, int] = {}

    def __enter__(self) -> "DistinctTexts":
        with ExitStack() as stack:
            self.lines = stack.enter_context(_unnamed_file(self.folder))
            self.keys = stack.enter_context(Column(self.folder, np.uint64))
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def add(self, rows: Sequence[Sequence[tuple[str, str]]]) -> None:
        """The next rows."""
        entries = [entry for row in rows for entry in row]
        texts = np.array([text_key(text) for _, text in entries], np.uint64)
        groups = np.array([self.groups.setdefault(group, len(self.groups)) for group, _ in entries], np.uint64)
        self.keys.append(combine_keys(texts, groups))
        with explain_os_errors(self.folder):
            write_all(self.lines, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def rows(self) -> Iterator[tuple[Int64[np.ndarray, "k"], list[tuple[str, str]]]]:
        """Of each row the numbers of its texts, each once and in its own order, and its entries that are new.

        A text's number is the number of different ones (by group) before it. Can be called once.
        """
        numbers = each(number_by_appearance(self.keys.array(), self.folder))
        self.lines.seek(0)
        with io.BufferedReader(self.lines) as lines:
            count = 0
            for line in lines:
                new, own = [], {}
                for entry, number in zip(json.loads(line), numbers, strict=False):
                    own[number] = None
                    if number == count:
                        count += 1
                        new.append(tuple(entry))
                yield np.array(list(own), np.int64), new


def each(array: Shaped[np.ndarray, "n"]) -> Iterator[int]:
    """The numbers of a memory map as Python's, one by one."""
    for start in range(0, len(array), _BLOCK):
        yield from array[start : start + _BLOCK].tolist()
