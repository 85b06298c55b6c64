"""Files that are either whole or absent: folders, JSON and other files written atomically; digests of content."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from glob import glob, has_magic
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import UInt8

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ADVICE = dict.fromkeys(
    _FULL,
    "the disk, quota or file-size limit is full; nothing that was whole is lost; free some space (or choose another "
    "directory) and run again",
) | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS),
    "this process may not write there; choose another directory or change its permissions",
)


class NewFolder:
    """A folder that appears whole: `with NewFolder(target, marker="x") as new: …new.path…; new.put_in_place()`.

    `path` is a temporary folder beside the target. Leaving the block without `put_in_place` removes it; what a killed
    process left there is removed by the next writer of the same target. A second writer meanwhile gets a ValueError.
    An existing target stays until `put_in_place`, and is replaced only if it is empty or contains the file `marker`.
    """

    def __init__(self, target: str | Path, *, marker: str):
        self.target = Path(target).absolute()
        self.marker = marker
        self.path: Path | None = None

    def __enter__(self) -> Any:
        target = self.target
        if target.exists() and not ((target / self.marker).exists() or (target.is_dir() and not any(target.iterdir()))):
            raise ValueError(
                f"{target}: expected a free name or an older folder with {self.marker}, found something else; "
                "choose another directory or move it away"
            )
        path = target.parent / f".{target.name}.tmp"
        with explain_os_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _make_locked(path, target)
            self.path = path
            for left in path.iterdir():
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        return self

    def __exit__(self, *_: object) -> None:
        if self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)
        self.path = None
        os.close(self._lock)

    def put_in_place(self) -> None:
        """Rename the finished folder to its target; its files must be synced already."""
        old = self.target.parent / f".{self.target.name}.old"
        with explain_os_errors(self.target):
            sync(self.path)
            shutil.rmtree(old, ignore_errors=True)
            # The old one is renamed first: a kill in between leaves no target, never half of one.
            with suppress(FileNotFoundError):
                os.rename(self.target, old)
            try:
                os.rename(self.path, self.target)
            except OSError:
                with suppress(FileNotFoundError):
                    os.rename(old, self.target)
                raise
            self.path = None
            shutil.rmtree(old, ignore_errors=True)
            sync(self.target.parent)


def _make_locked(path: Path, target: Path) -> int:
    """A descriptor of the folder `path`, made if it is missing, with a lock that ends with the process."""
    while True:
        path.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(
                f"{target}: another process is writing it; wait until that one ends, or choose another directory"
            ) from None
        except OSError:  # a file system without locks
            pass
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # renamed or removed before the lock was taken: once more


def fingerprint(obj: Any) -> str:
    """The sha256 (hex) of `obj` as canonical JSON: key order, tuple or list, numpy or Python make no difference."""
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=as_json)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """The sha256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(files: Iterable[Path], folder: Path) -> dict[str, str]:
    """Path relative to `folder` → sha256 of the file's bytes: the content, wherever it is stored."""
    return {file.relative_to(folder).as_posix(): file_digest(file) for file in files}


def given_path(path: str | Path, what: str = "path") -> Path:
    """A path that a user gave, with "~" expanded. An empty one is a ValueError, not the current folder."""
    if not str(path).strip() or "\0" in str(path):
        raise ValueError(f"{what}: expected a path, got {str(path)!r}; the current folder is '.'")
    return Path(path).expanduser()


def matches(path: Path) -> dict[str, Path]:
    """What a pattern matches, sorted, by name below its part without wildcards; or the path itself, if it exists."""
    if path.exists() or path.is_symlink():
        return {path.name: path}
    folder = next(parent for parent in path.parents if not has_magic(str(parent)))
    return {file.relative_to(folder).as_posix(): file for file in sorted(map(Path, glob(str(path), recursive=True)))}


def write_json(path: str | Path, obj: Any) -> None:
    """Write readable JSON so that a kill or a full disk leaves the old file or the new one.

    numpy scalars and arrays become numbers and lists; NaN and infinity are a ValueError (JSON has none).
    """
    path = Path(path)
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False, default=as_json) + "\n"
    except ValueError as error:
        raise ValueError(f"{path}: {error}; JSON holds finite numbers only, write None for the rest") from None
    write_file(path, text.encode())


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that a kill or a full disk leaves the old one or the new one; makes its folder."""
    with new_file(path) as temporary, open(temporary, "wb", buffering=0) as file:
        write_all(file, content)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, whose folder is made: what the block writes there becomes `path` at its end.

    After an error it is removed; a kill or a full disk leaves the old file or the new one.
    """
    # One fixed name: what a kill leaves is overwritten by the next write.
    temporary = path.parent / f".{path.name}.tmp"
    with explain_os_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        except BaseException:
            with suppress(OSError):  # where nothing may be written, nothing may be removed
                temporary.unlink()
            raise


def read_json(path: str | Path, kind: type | None = None, keys: Sequence[str] = ()) -> Any:
    """Read a JSON file. A missing or broken one is a ValueError that names it.

    With `kind` (dict, list, …) or `keys` (of an object) a file that holds something else is a ValueError too.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: expected a JSON file, there is none") from None
    except (ValueError, RecursionError, IsADirectoryError, PermissionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); it was truncated or altered") from None
    kind = dict if keys else kind
    if kind is not None and not isinstance(content, kind):
        name = {dict: "object", list: "array", str: "string"}[kind]
        problem = f"expected a JSON {name}, got {type(content).__name__}: {content!r:.60}"
    elif missing := [key for key in keys if key not in content]:
        problem = f"expected the keys {list(keys)}, got none of the name {missing[0]!r}"
    else:
        return content
    raise ValueError(f"{path}: {problem}; it was altered, or is another file of that name")


def as_json(value: Any) -> Any:
    """The `default` of `json.dumps`: numpy values as numbers and lists, paths as text."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"JSON has no form for {type(value).__name__}: {value!r}")


def write_all(file: IO[bytes], content: bytes | UInt8[np.ndarray, "n"]) -> None:
    """Write all of `content` to a raw file, whose `write` may take a part only."""
    view = memoryview(content)
    while len(view):
        view = view[file.write(view) :]


@contextmanager
def explain_os_errors(path: str | Path) -> Iterator[None]:
    """An error of a full or read-only disk in the block becomes an OSError that says so of `path`, and what to do."""
    try:
        yield
    except (OSError, RuntimeError, sqlite3.OperationalError) as error:
        code, words = getattr(error, "errno", None), str(error)
        if isinstance(error, RuntimeError):  # of ArrayRecord, with the system's words
            code = next((full for full in _FULL if os.strerror(full) in words), None)
        elif getattr(error, "sqlite_errorname", None) in ("SQLITE_FULL", "SQLITE_IOERR_WRITE"):
            code = errno.ENOSPC
        if code not in _ADVICE or _ADVICE[code] in words:
            raise
        raise OSError(code, f"{os.strerror(code)}: {_ADVICE[code]}", str(path)) from error


@contextmanager
def temporary_database(folder: str | Path) -> Iterator[Callable[..., sqlite3.Cursor]]:
    """The `execute` of an empty SQLite database in `folder`, for what may not fit in memory (it holds 64 MB there).

    Its file has no name, so that the block's end, an error or a kill frees it. A full disk is an OSError that says so.
    """
    with explain_os_errors(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".tmp") as file:
            connection = sqlite3.connect(file.name, isolation_level=None)
            for setting in ("journal_mode = OFF", "locking_mode = EXCLUSIVE", "cache_size = -65536"):
                connection.execute(f"PRAGMA {setting}")
            connection.execute("BEGIN EXCLUSIVE")  # opens the file, before its name goes
        with closing(connection):
            yield connection.execute


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder after a rename, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
