"""Parts of long work, each written whole or not at all: one that is there when the work begins again is kept.

Functions that divide their work take `map_tasks`, which calls a function with each task and gives the results in order:
the built-in `map`, or one of `stages/engines.py` that uses other processes. Tasks and results then are small: they name
files.
"""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cde_jax.data.store import Store, StoreWriter

MapTasks = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
Arrays = Mapping[str, np.ndarray]
_log = logging.getLogger(__name__)


def make(path: Path | None, digest: str, compute: Callable[[], Arrays]) -> Arrays | Path:
    """Arrays by name in a store in `path`, computed unless they are there; None: the arrays themselves.

    digest: of all that the arrays depend on; a shard of another one, and a broken one, are made again.
    """
    if path is None:
        return compute()
    if not is_whole(path, "shard", digest):
        arrays = compute()
        with StoreWriter(path, "shard") as writer:
            for name, array in arrays.items():
                writer.append(name, array)
            writer.finish({"fingerprint": digest})
    return path


def read(made: Arrays | Path) -> Arrays:
    """The arrays that `make` gave, memory-mapped where they are in a file."""
    if not isinstance(made, Path):
        return made
    store = Store.open(made, kind="shard", verify=False)
    return {name: store.array(name) for name in store.manifest["arrays"]}


def is_whole(path: Path, kind: str, digest: str) -> bool:
    """Whether a store of this fingerprint is in `path`; a broken one and one of other inputs are removed."""
    if not path.exists():
        return False
    try:
        if (actual := Store.open(path, kind=kind).fingerprint) == digest:
            return True
        reason = f"of other inputs or settings, fingerprint {actual}"
    except ValueError as error:
        reason = str(error)
    _log.warning("a %s is discarded: %s", kind, reason)
    shutil.rmtree(path)
    return False
