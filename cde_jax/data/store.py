"""Write-once folders of memory-mapped arrays with a readable `manifest.json`.

A store is a folder of raw little-endian `<name>.bin` files; the manifest gives each one's dtype, shape, bytes and
sha256. It is written under a temporary name and renamed when whole: a kill at any moment leaves no store or a whole
one. Rows of different lengths ("ragged") are two arrays, `x.values` and `x.offsets`.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Int32, Int64, Shaped

from cde_jax.data import files
from cde_jax.data.files import NewFolder, explain_os_errors, fingerprint, read_json

FORMAT = 1
_RESERVED = ("kind", "format", "arrays", "manifest_sha256")
_CLOCK_STEP = 50_000_000  # ns: two changes of a file that are nearer may have the same time
_REBUILD = "delete the folder (or run with --rebuild) and write it again"
_BLOCK = 8192  # rows of vectors checked at a time: a memory map is never in memory as a whole


def unit_rows(rows: Float[np.ndarray, "n D"], norms: Float[np.ndarray, " n"] | None = None) -> Float[np.ndarray, "n D"]:
    """Each row divided by its Euclidean norm, in its own dtype; a row of zeros stays zero.

    norms: of the rows, where the caller has them already.
    """
    norms = np.linalg.norm(rows, axis=1) if norms is None else norms
    return rows / np.where(norms > 0, norms, 1)[:, None]


def check_finite(
    name: str,
    vectors: Float[np.ndarray, "n D"],
    numbers: Int[np.ndarray, " n"] | range | None = None,
    advice: str = "look at the text or the model that this row came from",
) -> None:
    """Raises ValueError if rows of `vectors`, memory-mapped or not, have NaN or infinity: how many, and the first one.

    name: what the rows are, e.g. "documents". numbers: what the user knows each row by; None: its index.
    """
    blocks = (vectors[start : start + _BLOCK] for start in range(0, len(vectors) or 1, _BLOCK))
    bad = np.flatnonzero(~np.concatenate([np.isfinite(block).all(axis=1) for block in blocks]))
    if len(bad):
        first = bad[0] if numbers is None else numbers[bad[0]]
        raise ValueError(
            f"{name}: expected finite vectors, got NaN or infinity in {len(bad)} of {len(vectors)} rows (first: row "
            f"{first}); {advice}"
        )


class Ragged(NamedTuple):
    """Rows of different lengths: row i is `values[offsets[i]:offsets[i + 1]]`."""

    values: Shaped[np.ndarray, "total"]
    offsets: Int64[np.ndarray, "n+1"]

    def count(self) -> int:
        """Number of rows, n (`len()` of a NamedTuple is its number of fields)."""
        return len(self.offsets) - 1

    def row(self, i: int) -> Shaped[np.ndarray, "_"]:
        """Row i as a view."""
        if not 0 <= i < self.count():
            raise IndexError(f"row {i} of {self.count()} rows")
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def text(self, i: int) -> str:
        """Row i of UTF-8 bytes (uint8) as text."""
        return self.row(i).tobytes().decode("utf-8")

    def padded(
        self, rows: Int[np.ndarray, "m"], length: int
    ) -> tuple[Int32[np.ndarray, "m length"], Bool[np.ndarray, "m length"]]:
        """The named rows cut, or padded with zeros, to `length`: ids, and a mask that is True for tokens.

        A row number of −1 is "no row": all zeros, all False. Other numbers outside 0..n−1 raise IndexError.
        """
        if len(rows) and (rows.min() < -1 or rows.max() >= self.count()):
            raise IndexError(f"rows {rows.min()}..{rows.max()} of {self.count()} rows (−1 = no row)")
        at = np.maximum(rows, 0).astype(np.int64)
        starts = self.offsets[at]
        ends = self.offsets[np.minimum(at + 1, self.count())]  # the minimum: n = 0 and every row absent
        sizes = np.where(rows < 0, 0, ends - starts)
        columns = np.arange(length)
        mask = columns < sizes[:, None]  # [m, length]
        ids = np.zeros(mask.shape, np.int32)
        ids[mask] = self.values[(starts[:, None] + columns)[mask]]
        return ids, mask


class StoreWriter(NewFolder):
    """Writes one store: `with StoreWriter(directory, "pairs") as w: w.append(...); w.finish({...})`.

    Memory stays flat: each append goes to disk. Leaving the block without `finish` removes what was written.
    An existing store in `directory` is replaced by `finish`; a folder that is not a store is never touched.
    """

    def __init__(self, directory: str | Path, kind: str):
        super().__init__(directory, marker="manifest.json")
        self.directory, self.kind = Path(directory), kind
        self._files: dict[str, tuple[Any, Any]] = {}  # array → file, digest so far
        self._arrays: dict[str, dict[str, Any]] = {}  # array → its entry in the manifest

    def __exit__(self, *error: object) -> None:
        for file, _ in self._files.values():
            file.close()
        super().__exit__(*error)

    def append(self, name: str, array: Shaped[np.ndarray, "rows ..."]) -> None:
        """Add `array` at the end of `name` along axis 0. The first call fixes dtype and trailing shape."""
        array = np.asarray(array)
        dtype, path = array.dtype.newbyteorder("<"), self.directory / f"{name}.bin"
        if name not in self._arrays:
            self._check_open()
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
                raise ValueError(f"array name {name!r}: letters, digits, '_', '.', '-' only; it is a file name")
            if array.ndim == 0 or dtype.kind not in "biuf":
                raise ValueError(f"{name}: expected numbers with at least one axis, got {dtype} {array.shape}")
            with explain_os_errors(path):
                self._files[name] = open(self.path / path.name, "wb", buffering=0), hashlib.sha256()  # noqa: SIM115
            self._arrays[name] = {"dtype": dtype.str, "shape": [0, *array.shape[1:]], "bytes": 0}
        entry, (file, digest) = self._arrays[name], self._files[name]
        expected, got = (entry["dtype"], entry["shape"][1:]), (dtype.str, list(array.shape[1:]))
        if got != expected:
            wanted = "dtype {} and trailing shape {}".format(*expected)
            raise ValueError(f"{name}: every append needs {wanted}, got {got[0]} and {got[1]}")
        content = np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8)  # [bytes]
        with explain_os_errors(path):
            files.write_all(file, content)
        digest.update(content)
        entry["shape"][0] += len(array)
        entry["bytes"] += len(content)

    def append_ragged(self, name: str, rows: Iterable[Shaped[np.ndarray, "_"]], dtype: Any = None) -> None:
        """Add 1-d rows of one dtype at the end of the ragged array `name`; no rows at all need `dtype`."""
        rows = [np.asarray(row, dtype) for row in rows]
        before = self._arrays.get(f"{name}.values")
        if not rows and before:
            return
        if not rows and dtype is None:
            raise ValueError(f"{name}: no rows to take the dtype from; give dtype=")
        sizes = [before["shape"][0] if before else 0, *map(len, rows)]
        ends = np.cumsum(sizes, dtype=np.int64)
        self.append(f"{name}.offsets", ends[1:] if before else ends)
        self.append(f"{name}.values", np.concatenate(rows) if rows else np.zeros(0, dtype))

    def append_rows(self, name: str, ragged: Ragged) -> None:
        """Add all rows of another ragged array at the end of the ragged array `name`."""
        before = self._arrays.get(f"{name}.values")
        ends = ragged.offsets + (before["shape"][0] if before else 0)
        self.append(f"{name}.offsets", ends[1:] if before else ends)
        self.append(f"{name}.values", ragged.values)

    def finish(self, manifest_extra: dict[str, Any] | None = None) -> "Store":
        """Write the manifest, sync everything and put the store in its place; returns it opened.

        `manifest_extra` may give "fingerprint"; without one it is the digest of kind and arrays.
        """
        extra = manifest_extra or {}
        if taken := sorted(set(extra) & set(_RESERVED)):
            raise ValueError(f"manifest keys {taken} are the store's own; rename yours")
        self._check_open()
        for name, (_, digest) in self._files.items():
            self._arrays[name]["sha256"] = digest.hexdigest()
        body = {"kind": self.kind, "format": FORMAT, "arrays": self._arrays}
        manifest = {"kind": self.kind, "fingerprint": fingerprint(body)} | extra | body
        manifest = json.loads(json.dumps(manifest, default=files.as_json))  # as a reader will see it: int keys are text
        manifest["manifest_sha256"] = fingerprint(manifest)
        with explain_os_errors(self.directory):
            for file, _ in self._files.values():
                os.fsync(file.fileno())
            files.write_json(self.path / "manifest.json", manifest)
            self.put_in_place()
        return Store.open(self.directory, kind=self.kind, verify=False)

    def _check_open(self) -> None:
        if self.path is None:
            raise ValueError("the writer is closed: call append and finish inside the `with` block, finish once")


@dataclass(frozen=True)
class Store:
    """A finished store, read-only. `manifest` is the content of manifest.json."""

    directory: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, directory: str | Path, *, kind: str | None = None, verify: bool = True) -> "Store":
        """Open the store in `directory`; sizes are always compared, the bytes' digests when `verify` is True.

        A file is hashed once: `.NAME.verified.json` beside the store keeps its size, time of change and inode. It is
        hashed again when one of them is another, or when that record is deleted. Raises ValueError naming the file,
        what was expected and found, and what to do.
        """
        path = Path(directory) / "manifest.json"
        if not path.exists():
            raise ValueError(f"{directory}: expected a store, found no manifest.json; run the stage that writes it")
        manifest = read_json(path, keys=_RESERVED)
        digest = fingerprint({key: value for key, value in manifest.items() if key != "manifest_sha256"})
        if manifest["format"] != FORMAT:
            raise ValueError(f"{path}: expected store format {FORMAT}, got {manifest['format']}; {_REBUILD}")
        if kind is not None and manifest["kind"] != kind:
            raise ValueError(f"{path}: expected kind {kind!r}, got {manifest['kind']!r}; name the {kind} store")
        if digest != manifest["manifest_sha256"]:
            raise ValueError(
                f"{path}: expected digest {manifest['manifest_sha256']}, got {digest}: it was altered; {_REBUILD}"
            )
        record = Path(directory).absolute()
        record = record.with_name(f".{record.name}.verified.json")
        verified = _read_verified(record)
        checked = {
            name: _check_file(path.with_name(f"{name}.bin"), entry, verify, verified.get(name))
            for name, entry in manifest["arrays"].items()
        }
        if verify and checked != verified and any(checked.values()):
            with suppress(OSError):  # where nothing may be written, the next process hashes again
                files.write_json(record, checked)
        return cls(Path(directory), manifest)

    @property
    def fingerprint(self) -> str:
        """What the store holds, as one hex digest."""
        return self.manifest["fingerprint"]

    def array(self, name: str) -> Shaped[np.ndarray, "rows ..."]:
        """Array `name`, memory-mapped and read-only."""
        if name not in self.manifest["arrays"]:
            raise ValueError(f"{self.directory}: no array {name!r}; it has {', '.join(self.manifest['arrays'])}")
        entry = self.manifest["arrays"][name]
        dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
        if entry["bytes"] == 0:  # an empty file cannot be mapped
            return np.broadcast_to(np.zeros((), dtype), shape)  # read-only
        # As an ndarray: slicing np.memmap itself costs several times as much.
        return np.memmap(self.directory / f"{name}.bin", dtype, "r", shape=shape).view(np.ndarray)

    def ragged(self, name: str) -> Ragged:
        """The ragged array `name`, memory-mapped and read-only."""
        return Ragged(self.array(f"{name}.values"), self.array(f"{name}.offsets"))


_verified: dict[str, list[Any]] = {}  # file → its state, as in `_check_file`


def _read_verified(record: Path) -> dict[str, Any]:
    """{array: state of its file when it was hashed}; {} where there is no such record."""
    with suppress(ValueError):
        return read_json(record, dict)
    return {}


def _check_file(path: Path, entry: dict[str, Any], verify: bool, verified: Any) -> Any:
    """Raises ValueError for a file that is not what the manifest says. Returns the state that may be recorded for it:
    time of change (ns), size, inode and the digest it was found to have; None where it may still change unnoticed."""
    if not path.exists():
        raise ValueError(f"{path}: the manifest names this file, it is missing; {_REBUILD}")
    status = path.stat()
    state = [status.st_mtime_ns, status.st_size, status.st_ino, entry["sha256"]]
    if status.st_size != entry["bytes"]:
        raise ValueError(
            f"{path}: expected {entry['bytes']} bytes, got {status.st_size}: truncated or altered; {_REBUILD}"
        )
    if not verify or state in (verified, _verified.get(str(path.absolute()))):
        return state
    if (digest := files.file_digest(path)) != entry["sha256"]:
        raise ValueError(f"{path}: expected sha256 {entry['sha256']}, got {digest}: altered; {_REBUILD}")
    if time.time_ns() - status.st_mtime_ns <= _CLOCK_STEP:
        return None
    _verified[str(path.absolute())] = state
    return state
