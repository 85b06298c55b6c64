"""Which rows are the first with their key, for more rows than memory holds.

Rows are resolved bucket by bucket, a bucket being the keys that are equal modulo the number of buckets. Nothing is
random: the same keys give the same answer. All files are temporary and have no name, so an error or a kill frees
them; what is returned is a memory map of one, which lives as long as the array.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Int64, Shaped, UInt64

from cde_jax.data.files import explain_os_errors, write_all
from cde_jax.data.texts import text_key

_BUCKET = 1 << 22  # rows held at a time: about 300 MB, however many rows there are
_BLOCK = 4096  # numbers converted to Python's, and rows of texts read, at a time
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio (Knuth, TAOCP vol. 3, section 6.4); any odd number would do


def _unnamed_file(folder: str | Path) -> IO[bytes]:
    Path(folder).mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryFile(dir=folder, buffering=0)


def on_disk(blocks: Iterable[Shaped[np.ndarray, "..."]], folder: str | Path, dtype: Any) -> Shaped[np.ndarray, "n"]:
    """The numbers of all blocks, in order, as a read-only memory map; a full disk is an OSError that says so."""
    with _unnamed_file(folder) as file:
        for block in blocks:
            with explain_os_errors(folder):
                write_all(file, np.ascontiguousarray(block, dtype).reshape(-1).view(np.uint8))
        if file.tell() == 0:  # an empty file cannot be mapped
            return np.zeros(0, dtype)
        return np.memmap(file, dtype, "r").view(np.ndarray)


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
    with _unnamed_file(folder) as file:
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
    starts = range(0, len(keys), _BUCKET)

    def ranks() -> Iterator[Int64[np.ndarray, "b"]]:
        """How many keys have appeared up to each row, minus one: the number of a key at its first row."""
        count = 0
        for start in starts:
            block = first[start : start + _BUCKET]
            appeared = count + np.cumsum(block == np.arange(start, start + len(block)))
            count = appeared[-1]
            yield appeared - 1

    ranked = on_disk(ranks(), folder, np.int64)
    return on_disk((ranked[first[start : start + _BUCKET]] for start in starts), folder, np.int64)


class DistinctTexts:
    """Rows of (group, text) on disk, equal texts of a group numbered once.

    `with DistinctTexts(folder) as t: t.add(rows); …; t.rows()`: all is added before anything is read.
    """

    def __init__(self, folder: str | Path):
        self.folder = folder

    def __enter__(self) -> "DistinctTexts":
        self._file = _unnamed_file(self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, rows: Sequence[Sequence[tuple[str, str]]]) -> None:
        """The next rows."""
        with explain_os_errors(self.folder):
            write_all(self._file, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def rows(self) -> Iterator[tuple[Int64[np.ndarray, "k"], list[tuple[str, str]]]]:
        """Of each row the numbers of its texts, each once and in its own order, and its entries that are new.

        A text's number is the number of different ones (by group) before it.
        """
        groups: dict[str, int] = {}

        def keys(rows: list[list[list[str]]]) -> UInt64[np.ndarray, "b"]:
            entries = list(chain.from_iterable(rows))
            texts = np.array([text_key(text) for _, text in entries], np.uint64)
            numbers = np.array([groups.setdefault(group, len(groups)) for group, _ in entries], np.uint64)
            return combine_keys(texts, numbers)

        numbers = each(number_by_appearance(on_disk(map(keys, self._read()), self.folder, np.uint64), self.folder))
        count = 0
        for row in chain.from_iterable(self._read()):
            new, own = [], {}
            for entry, number in zip(row, numbers, strict=False):
                own[number] = None
                if number == count:
                    count += 1
                    new.append(tuple(entry))
            yield np.array(list(own), np.int64), new

    def _read(self) -> Iterator[list[list[list[str]]]]:
        """All rows, in blocks."""
        with open(os.dup(self._file.fileno()), "rb") as lines:
            lines.seek(0)
            while block := list(islice(lines, _BLOCK)):
                yield [json.loads(line) for line in block]


def each(array: Shaped[np.ndarray, "n"]) -> Iterator[int]:
    """The numbers of a memory map as Python's, one by one."""
    for start in range(0, len(array), _BLOCK):
        yield from array[start : start + _BLOCK].tolist()
