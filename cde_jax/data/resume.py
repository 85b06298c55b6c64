"""Writing a store that costs hours, so that a kill loses only what came after the last checkpoint."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from cde_jax.data.files import NewFolder, explained, plain, read_json, write_json
from cde_jax.data.store import Store, StoreWriter

log = logging.getLogger(__name__)


class ResumableWriter(StoreWriter):
    """A `StoreWriter` that goes on where an error or a kill ended the one before it.

    `about` are manifest entries that say what is being written. What was left half written is taken up if it has the
    same ones, as far as its last `checkpoint`: ask `rows` where to go on. What has others, or was altered since, is
    discarded, and the log says so. A second process that writes the same store meanwhile gets a ValueError. Arrays of
    fixed row length only, no ragged ones.
    """

    def __init__(self, directory: str | Path, kind: str, about: dict[str, Any]):
        super().__init__(directory, kind)
        self.about = json.loads(json.dumps(about, default=plain))
        self._folder = NewFolder(directory, marker="manifest.json", resumable=True)

    def __enter__(self) -> "ResumableWriter":
        super().__enter__()
        try:
            self._take_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def rows(self, name: str) -> int:
        """Rows of `name` that are written."""
        return self._arrays[name]["shape"][0] if name in self._arrays else 0

    def checkpoint(self) -> None:
        """Make all rows so far durable: they survive whatever comes after."""
        assert not self._ends, "ragged arrays cannot be resumed"
        arrays = {name: entry | {"sha256": self._hashes[name].hexdigest()} for name, entry in self._arrays.items()}
        try:
            for file in self._files.values():
                os.fsync(file.fileno())
        except OSError as error:
            raise explained(error, self.directory) from error
        # Under the manifest's name: `finish` replaces it by the whole manifest, and no other file has to go.
        write_json(self._folder.path / "manifest.json", self.about | {"arrays": arrays})

    def finish(self, manifest_extra: dict[str, Any] | None = None) -> Store:
        """As `StoreWriter.finish`; the manifest repeats `about`."""
        return super().finish((manifest_extra or {}) | self.about)

    def _take_up(self) -> None:
        file = self._folder.path / "manifest.json"
        if file.exists():
            try:
                found = read_json(file)
                if self.about != {key: found.get(key) for key in self.about}:
                    raise ValueError("it belongs to other inputs or settings")
                for name, entry in found["arrays"].items():
                    self._open(name, entry)
                return
            except (ValueError, OSError) as error:
                log.warning("%s: what was half written is discarded: %s", self.directory, error)
        self._close_files()
        self._arrays.clear()
        self._hashes.clear()
        for file in self._folder.path.iterdir():
            file.unlink()

    def _open(self, name: str, entry: dict[str, Any]) -> None:
        file = self._files[name] = open(self._folder.path / f"{name}.bin", "r+b", buffering=0)  # noqa: SIM115
        file.truncate(entry["bytes"])  # what came after the checkpoint goes
        hashed = hashlib.file_digest(file, "sha256")  # reads to the end: the next rows go there
        if hashed.hexdigest() != entry.pop("sha256"):
            raise ValueError(f"{name}.bin was truncated or altered since")
        self._hashes[name], self._arrays[name] = hashed, entry
