"""Write-once folders of memory-mapped arrays with a readable `manifest.json`.

A store is a folder of raw little-endian `<name>.bin` files; the manifest gives each one's dtype, shape, bytes
and sha256, so `np.memmap` reads it without parsing. It is written under a temporary name beside its place and
renamed when whole: a kill at any moment leaves either no store or the whole one, and a store that is being
replaced stays until the new one is complete. Rows of different lengths ("ragged") are two arrays, `x.values`
and `x.offsets`.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64, Shaped

from cde_jax.data.files import (
    NewFolder,
    as_json,
    explain_os_errors,
    file_digest,
    fingerprint,
    read_json,
    write_all,
    write_json,
)

FORMAT = 1
_RESERVED = ("kind", "format", "arrays", "manifest_sha256")
_CLOCK_STEP = 50_000_000  # ns: two changes of a file that are nearer may have the same time
_REBUILD = "delete the folder (or run with --rebuild) and write it again"


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
        self, rows: Int[np.ndarray, "m"], length: int, *, fill: int = 0
    ) -> tuple[Int32[np.ndarray, "m length"], Bool[np.ndarray, "m length"]]:
        """The named rows cut or padded to `length`: ids int32 and mask bool (True = token), [m, length].

        A row number of −1 is "no row": all `fill`, all False. Other numbers outside 0..n−1 raise IndexError.
        """
        if len(rows) and (rows.min() < -1 or rows.max() >= self.count()):
            raise IndexError(f"rows {rows.min()}..{rows.max()} of {self.count()} rows (−1 = no row)")
        at = np.maximum(rows, 0).astype(np.int64)
        starts = self.offsets[at]
        ends = self.offsets[np.minimum(at + 1, self.count())]  # the minimum: n = 0 and every row absent
        sizes = np.where(rows < 0, 0, ends - starts)
        columns = np.arange(length)
        mask = columns < sizes[:, None]  # [m, length]
        ids = np.full(mask.shape, fill, np.int32)
        ids[mask] = self.values[(starts[:, None] + columns)[mask]]
        return ids, mask


class StoreWriter:
    """Writes one store: `with StoreWriter(directory, "pairs") as w: w.append(...); w.finish({...})`.

    Memory stays flat: each append goes to disk. Leaving the block without `finish` removes what was written.
    An existing store in `directory` is replaced by `finish`; a folder that is not a store is never touched.
    """

    def __init__(self, directory: str | Path, kind: str):
        self.directory = Path(directory)
        self.kind = kind
        self._folder = NewFolder(directory, marker="manifest.json")
        self._files: dict[str, Any] = {}
        self._hashes: dict[str, Any] = {}
        self._arrays: dict[str, dict] = {}
        self._ends: dict[str, int] = {}

    def __enter__(self) -> "StoreWriter":
        self._folder.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._close_files()
        self._folder.__exit__()

    def append(self, name: str, array: Shaped[np.ndarray, "rows ..."]) -> None:
        """Add `array` at the end of `name` along axis 0. The first call fixes dtype and trailing shape."""
        array = np.asarray(array)
        dtype = array.dtype.newbyteorder("<")
        if name not in self._arrays:
            self._create(name, array, dtype)
        entry = self._arrays[name]
        if entry["dtype"] != dtype.str or entry["shape"][1:] != list(array.shape[1:]):
            raise ValueError(
                f"{name}: every append needs dtype {entry['dtype']} and trailing shape {entry['shape'][1:]}, "
                f"got {dtype.str} and {list(array.shape[1:])}"
            )
        content = np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8)  # [bytes]
        with explain_os_errors(self.directory / f"{name}.bin"):
            write_all(self._files[name], content)
        self._hashes[name].update(content)
        entry["shape"][0] += len(array)
        entry["bytes"] += len(content)

    def append_ragged(self, name: str, rows: Iterable[Shaped[np.ndarray, "_"]], dtype: Any = None) -> None:
        """Add 1-d rows of one dtype at the end of the ragged array `name`; no rows at all need `dtype`."""
        rows = [np.asarray(row, dtype) for row in rows]
        if not rows and dtype is None and name not in self._ends:
            raise ValueError(f"{name}: no rows to take the dtype from; give dtype=")
        if name not in self._ends:
            self._ends[name] = 0
            self.append(f"{name}.offsets", np.zeros(1, np.int64))
            self.append(f"{name}.values", np.zeros(0, rows[0].dtype if rows else dtype))
        if not rows:
            return
        ends = self._ends[name] + np.cumsum([len(row) for row in rows], dtype=np.int64)
        self.append(f"{name}.values", np.concatenate(rows))
        self.append(f"{name}.offsets", ends)
        self._ends[name] = int(ends[-1])

    def finish(self, manifest_extra: dict[str, Any] | None = None) -> "Store":
        """Write the manifest, sync everything and put the store in its place; returns it opened.

        `manifest_extra` may give "fingerprint"; without one it is the digest of kind and arrays.
        """
        extra = dict(manifest_extra or {})
        if taken := sorted(set(extra) & set(_RESERVED)):
            raise ValueError(f"manifest keys {taken} are the store's own; rename yours")
        if self._folder.path is None:
            raise ValueError("the writer is closed: call finish() once, inside the `with` block")
        for name, hashed in self._hashes.items():
            self._arrays[name]["sha256"] = hashed.hexdigest()
        body = {"kind": self.kind, "format": FORMAT, "arrays": self._arrays}
        manifest = {"kind": self.kind, "fingerprint": fingerprint(body)} | extra | body
        manifest = json.loads(json.dumps(manifest, default=as_json))  # as a reader will see it: int keys are text
        manifest["manifest_sha256"] = fingerprint(manifest)
        with explain_os_errors(self.directory):
            for file in self._files.values():
                os.fsync(file.fileno())
            self._close_files()
            write_json(self._folder.path / "manifest.json", manifest)
            self._folder.put_in_place()
        return Store.open(self.directory, kind=self.kind, verify=False)

    def _create(self, name: str, array: np.ndarray, dtype: np.dtype) -> None:
        if self._folder.path is None:
            raise ValueError("the writer is closed: append inside the `with` block, before finish()")
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise ValueError(f"array name {name!r}: letters, digits, '_', '.', '-' only; it is a file name")
        if array.ndim == 0 or dtype.kind not in "biuf":
            raise ValueError(f"{name}: expected numbers with at least one axis, got {dtype} {array.shape}")
        with explain_os_errors(self.directory / f"{name}.bin"):
            self._files[name] = open(self._folder.path / f"{name}.bin", "wb", buffering=0)  # noqa: SIM115
        self._hashes[name] = hashlib.sha256()
        self._arrays[name] = {"dtype": dtype.str, "shape": [0, *array.shape[1:]], "bytes": 0}

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


@dataclass(frozen=True)
class Store:
    """A finished store, read-only. `manifest` is the content of manifest.json."""

    directory: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, directory: str | Path, *, kind: str | None = None, verify: bool = True) -> "Store":
        """Open the store in `directory`; sizes are always compared, the bytes' digests when `verify` is True.

        A file is hashed once in a process as long as its size and time of change stay the same. Raises ValueError
        naming the file, what was expected and found, and what to do.
        """
        directory = Path(directory)
        path = directory / "manifest.json"
        if not path.exists():
            raise ValueError(f"{directory}: expected a store, found no manifest.json; run the stage that writes it")
        manifest = read_json(path, keys=_RESERVED)
        if manifest["format"] != FORMAT:
            raise ValueError(f"{path}: expected store format {FORMAT}, got {manifest['format']}; {_REBUILD}")
        if kind is not None and manifest["kind"] != kind:
            raise ValueError(f"{path}: expected kind {kind!r}, got {manifest['kind']!r}; name the {kind} store")
        expected = manifest["manifest_sha256"]
        got = fingerprint({key: value for key, value in manifest.items() if key != "manifest_sha256"})
        if got != expected:
            raise ValueError(f"{path}: expected digest {expected}, got {got}: it was altered; {_REBUILD}")
        for name, entry in manifest["arrays"].items():
            _check_file(directory / f"{name}.bin", entry, verify)
        return cls(directory, manifest)

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
            empty = np.zeros(shape, dtype)
            empty.flags.writeable = False
            return empty
        # A plain view of the map: slicing np.memmap itself costs several times what an ndarray's does.
        return np.memmap(self.directory / f"{name}.bin", dtype, "r", shape=shape).view(np.ndarray)

    def ragged(self, name: str) -> Ragged:
        """The ragged array `name`, memory-mapped and read-only."""
        return Ragged(self.array(f"{name}.values"), self.array(f"{name}.offsets"))


_verified: dict[str, tuple[int, int, str]] = {}  # file → time of change (ns), size, digest it was found to have


def _check_file(path: Path, entry: dict[str, Any], verify: bool) -> None:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise ValueError(f"{path}: the manifest names this file, it is missing; {_REBUILD}") from None
    if status.st_size != entry["bytes"]:
        raise ValueError(
            f"{path}: expected {entry['bytes']} bytes, got {status.st_size}: truncated or altered; {_REBUILD}"
        )
    state = (status.st_mtime_ns, status.st_size, entry["sha256"])
    if not verify or _verified.get(str(path.absolute())) == state:
        return
    digest = file_digest(path)
    if digest != entry["sha256"]:
        raise ValueError(f"{path}: expected sha256 {entry['sha256']}, got {digest}: altered; {_REBUILD}")
    if time.time_ns() - status.st_mtime_ns > _CLOCK_STEP:
        _verified[str(path.absolute())] = state
