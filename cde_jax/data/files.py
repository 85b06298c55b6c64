"""Writing so that nothing is half written: whole folders, atomic JSON, a full disk said clearly."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

_ADVICE = dict.fromkeys(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    "the disk, quota or file-size limit is full; nothing that was whole is lost; free some space (or choose another "
    "directory) and run again",
) | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS),
    "this process may not write there; choose another directory or change its permissions",
)


class NewFolder:
    """A folder that appears whole: `with NewFolder(target, marker="x") as new: …new.path…; new.put_in_place()`.

    `path` is a temporary folder beside the target. Leaving the block without `put_in_place` removes it, a kill
    leaves it to be swept by the next NewFolder of the same target. What is at the target already stays until
    then, and is replaced only if it is empty or holds the file `marker`, the sign of its kind.

    With `resumable` the temporary folder has one name. If it holds `marker` it is never removed: whoever enters next
    finds it as it was left, by an error or a kill. A second process that enters meanwhile gets a ValueError.
    """

    def __init__(self, target: str | Path, *, marker: str, resumable: bool = False):
        self.target = Path(target).absolute()
        self.marker = marker
        self.resumable = resumable
        self.path: Path | None = None
        self._lock = -1

    def __enter__(self) -> "NewFolder":
        if self.target.exists() and not self._replaceable():
            raise ValueError(
                f"{self.target}: expected a free name or an older folder with {self.marker}, found something else; "
                "choose another directory or move it away"
            )
        parent = self.target.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            # The parent is held while stale folders are removed and a name is made, so that nobody takes a folder for
            # a dead writer's before its own lock is on it.
            with _held(parent):
                for entry in list(parent.iterdir()):
                    if entry.name.startswith(self._prefix()):
                        _remove_if_dead(entry)
                if self.resumable:
                    self._take_over(parent / f".{self.target.name}.partial")
                else:
                    self.path = Path(tempfile.mkdtemp(prefix=self._prefix(), dir=parent))
                    self._lock = os.open(self.path, os.O_RDONLY)
                    _flock(self._lock, fcntl.LOCK_EX)
                    os.chmod(self.path, 0o755)  # mkdtemp's 0700 would follow the folder into its place
        except OSError as error:
            raise explained(error, self.target) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self.path is not None:
            if not (self.resumable and (self.path / self.marker).exists()):
                shutil.rmtree(self.path, ignore_errors=True)
            self.path = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def put_in_place(self) -> None:
        """Rename the finished folder to its target; its files must be synced already."""
        sync_folder(self.path)
        old = None
        with _held(self.target.parent):
            if self.target.exists():
                # The old one goes under a stale name first: a kill in between leaves none, never half of one.
                old = Path(tempfile.mkdtemp(prefix=self._prefix(), dir=self.target.parent))
                os.rename(self.target, old)
            try:
                os.rename(self.path, self.target)
            except OSError:
                if old is not None:
                    os.rename(old, self.target)
                raise
        self.path = None
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
        sync_folder(self.target.parent)

    def _take_over(self, path: Path) -> None:
        path.mkdir(exist_ok=True)
        lock = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise ValueError(
                f"{self.target}: another process is writing it; wait until that one ends, or choose another directory"
            ) from None
        except OSError:  # a file system without locks
            pass
        self.path, self._lock = path, lock

    def _prefix(self) -> str:
        return f".{self.target.name}.tmp-"

    def _replaceable(self) -> bool:
        return self.target.is_dir() and ((self.target / self.marker).exists() or not any(self.target.iterdir()))


def fingerprint(obj: Any) -> str:
    """The sha256 (hex) of `obj` as canonical JSON: key order, tuple or list, numpy or Python are one."""
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: str | Path, obj: Any) -> None:
    """Write readable JSON so that a kill or a full disk leaves the old file or the new one.

    numpy scalars and arrays become numbers and lists; NaN and infinity are a ValueError (JSON has none).
    """
    path = Path(path)
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False, default=plain) + "\n"
    except ValueError as error:
        raise ValueError(f"{path}: {error}; JSON holds finite numbers only, write None for the rest") from None
    write_file(path, text.encode())


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that a kill or a full disk leaves the old one or the new one; makes its folder."""
    # One fixed name: what a kill leaves is overwritten by the next write.
    temporary = path.parent / f".{path.name}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb", buffering=0) as file:
            write_all(file, content)
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):  # where nothing may be written, nothing may be removed
            temporary.unlink()
        raise explained(error, path) from error


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a missing or broken one is a ValueError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: expected a JSON file, there is none") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); it was truncated or altered") from None


def plain(value: Any) -> Any:
    """The `default` of `json.dumps`: numpy values as numbers and lists, paths as text."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"JSON has no form for {type(value).__name__}: {value!r}")


def write_all(file: Any, content: Any) -> None:
    """Write all of `content` (bytes or 1-d uint8) to a raw file, whose `write` may take a part only."""
    view = memoryview(content)
    while len(view):
        view = view[file.write(view) :]


def explained(error: OSError, path: Path) -> OSError:
    """`error`, or for a full or a read-only disk or folder one that says what happened and what to do."""
    advice = _ADVICE.get(error.errno)
    if advice is None or advice in str(error):
        return error
    return OSError(error.errno, f"{os.strerror(error.errno)}: {advice}", str(path))


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable, after a rename."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(folder)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """One process at a time makes, removes and moves names in `folder`. The kernel drops the locks of the dead."""
    guard = os.open(folder, os.O_RDONLY)
    try:
        _flock(guard, fcntl.LOCK_EX)
        yield
    finally:
        os.close(guard)


def _flock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation)
    except OSError:  # held by another, or a file system without locks: then nothing counts as dead
        return False
    return True


def _remove_if_dead(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)
