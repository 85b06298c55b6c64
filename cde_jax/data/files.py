"""Writing so that nothing is half written: atomic JSON, whole raw writes, a full disk said clearly."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
        raise ValueError(
            f"{path}: {error}; JSON holds finite numbers only, write None for the rest"
        ) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    # One fixed name: what a kill leaves is overwritten by the next write.
    temporary = path.parent / f".{path.name}.tmp"
    try:
        with open(temporary, "wb", buffering=0) as file:
            write_all(file, text.encode())
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
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
    """`error`, or for a full disk, quota or file-size limit one that says what happened and what to do."""
    if error.errno not in _NO_ROOM or "free some space" in str(error):
        return error
    return OSError(
        error.errno,
        f"{os.strerror(error.errno)}: the disk, quota or file-size limit is full; what was half written is "
        "removed, everything older is untouched; free some space (or choose another directory) and run again",
        str(path),
    )


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
