"""The vectors of all pairs by a surrogate, written in blocks that are kept until all are there."""

import functools
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float16

from cde_jax.data import shards
from cde_jax.data.files import fingerprint
from cde_jax.data.store import Ragged, Store, StoreWriter

log = logging.getLogger(__name__)

Encode = Callable[[Sequence[str]], Float[np.ndarray, "n D"]]

BLOCK = 4096  # texts encoded, and written to a file, at a time
MANY = 16  # vectors of which not all can be zeros
BAR_AFTER = 3.0  # seconds of work before a progress bar shows


class Texts(Sequence[str]):
    """The texts of a pairs store (`query_text`, `document_text`) as a sequence that reads them one by one."""

    def __init__(self, ragged: Ragged):
        self.ragged = ragged

    def __len__(self) -> int:
        return self.ragged.count()

    def __getitem__(self, i):
        return [self.ragged.text(j) for j in range(len(self))[i]] if isinstance(i, slice) else self.ragged.text(i)


class Loaded(NamedTuple):
    """One of the functions that `load` gives, for queries (0) or documents (1); each process loads them once.

    It can be sent to another process, which the model itself cannot.
    """

    load: Callable[..., tuple[Encode, Encode]]
    arguments: tuple[Any, ...]
    side: int

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "n D"]:
        """Vectors of the texts."""
        return _load(self.load, self.arguments)[self.side](texts)


@functools.lru_cache(maxsize=1)
def _load(load: Callable[..., tuple[Encode, Encode]], arguments: tuple[Any, ...]) -> tuple[Encode, Encode]:
    return load(*arguments)


def texts_fingerprint(pairs: Store) -> str:
    """Digest of the query and document texts of a pairs store, whatever their tokens, prefixes, domains or folder."""
    arrays = pairs.manifest["arrays"].items()
    return fingerprint({name: array["sha256"] for name, array in arrays if "_text." in name})


def vectors_fingerprint(pairs: Store, name: str, settings: dict[str, Any]) -> str:
    """The fingerprint that `write_vectors` gives its store, from texts, model and settings, before anything is encoded.

    A model in a folder is known by its files (`identity`, as settings["files"]), wherever the folder is.
    """
    model = name.partition(":")[0] if settings.get("files") else name
    return fingerprint({"kind": "vectors", "texts": texts_fingerprint(pairs), "surrogate": model, "settings": settings})


class _Block(NamedTuple):
    """Consecutive texts of one side of a pairs store, and the store that gets their vectors."""

    path: Path
    digest: str
    pairs: Path
    text: str  # array of the pairs store
    rows: range
    encode: Encode
    what: str
    width: int


def write_vectors(
    directory: str | Path,
    pairs: Store,
    encode: Encode | tuple[Encode, Encode],
    *,
    name: str,
    settings: dict[str, Any],
    map_tasks: shards.MapTasks = map,
) -> Store:
    """Encodes every query and document of a pairs store into a store of kind "vectors".

    Arrays: queries float16 [n, D], documents float16 [n + m, D]. `encode` is one function, or one for queries and one
    for documents, `Loaded` where `map_tasks` uses other processes. It gets BLOCK consecutive rows at a time, the
    longest first: always the same texts in the same order, because padding changes the last bits of a vector. Each
    block is a task, kept as a store of its own until all are there: after a kill or an error the same call continues
    with those that are missing. Needs twice the room of the vectors.

    Raises ValueError if `encode` gives vectors that are not finite in float16, not one of the same width for each text,
    or only zeros; OSError if there is no room or no right to write.
    """
    from tqdm import tqdm

    directory, encoders = Path(directory).absolute(), encode if isinstance(encode, tuple) else (encode, encode)
    folder, width = directory.with_name(f".{directory.name}.blocks"), None
    sides: dict[str, tuple[str, Encode, int]] = {}
    for side, text, encoder in zip(("queries", "documents"), ("query_text", "document_text"), encoders, strict=True):
        texts = Texts(pairs.ragged(text))
        # One text: models of two widths are found before anything is written.
        width = _encode(encoder, texts, f"surrogate {name}, {side}", range(1), width).shape[1]
        sides[side] = text, encoder, len(texts)
    metadata = {"fingerprint": vectors_fingerprint(pairs, name, settings), "width": width}
    digest, store = fingerprint(metadata | {"block": BLOCK}), pairs.directory.absolute()

    def blocks() -> Iterator[_Block]:
        for side, (text, encoder, count) in sides.items():
            for start in range(0, count, BLOCK):
                path, rows = folder / f"{side}-{start}", range(start, min(start + BLOCK, count))
                yield _Block(path, digest, store, text, rows, encoder, f"surrogate {name}, {side}", width)

    with StoreWriter(directory, "vectors") as writer:  # opened first: no second process can write this store
        done = sum(len(block.rows) for block in blocks() if shards.is_whole(block.path, "block", digest))
        total = sum(count for *_, count in sides.values())
        if done:
            log.info("vectors of %s: %d of %d texts are there, continuing", name, done, total)
        with tqdm(total=total, initial=done, desc="vectors", unit=" texts", delay=BAR_AFTER, leave=False) as bar:
            for count in map_tasks(_write_block, blocks()):
                bar.update(count)
        for block in blocks():
            array = Store.open(block.path, kind="block", verify=False).array("vectors")
            writer.append(block.path.name.partition("-")[0], array)
        store = writer.finish({"texts": texts_fingerprint(pairs), "surrogate": name, "settings": settings} | metadata)
    shutil.rmtree(folder)
    return store


def _write_block(block: _Block) -> int:
    """Encode a block unless it is there; returns how many texts were encoded."""
    if block.path.exists():
        return 0
    texts = Texts(Store.open(block.pairs, verify=False).ragged(block.text))
    with StoreWriter(block.path, "block") as writer:
        writer.append("vectors", _encode(block.encode, texts, block.what, block.rows, block.width))
        writer.finish({"fingerprint": block.digest})
    return len(block.rows)


def _encode(encode: Encode, texts: Texts, what: str, rows: range, width: int | None) -> Float16[np.ndarray, "rows D"]:
    """Vectors of consecutive texts, the longest encoded first; ValueError if they are not what is expected."""
    lengths = np.diff(texts.ragged.offsets[rows.start : rows.stop + 1])  # in bytes
    order = np.argsort(-lengths, kind="stable")
    vectors = np.asarray(encode([texts[rows[i]] for i in order.tolist()]))
    where = f"{what} {rows.start} to {rows.stop - 1}"
    if vectors.ndim != 2 or len(vectors) != len(rows) or width not in (None, vectors.shape[1]):
        expected, got = f"[{len(rows)}, {width or 'width'}]", list(vectors.shape)
        raise ValueError(f"{where}: expected vectors of shape {expected}, got {got}; the surrogate must give these")
    broken = order[~(np.abs(vectors) <= np.finfo(np.float16).max).all(axis=1)]
    if len(broken):
        raise ValueError(
            f"{where}: {len(broken)} vectors have NaN, infinity or numbers above the float16 range (first: row "
            f"{rows.start + broken.min()}); look at that text and the surrogate, or let it give unit vectors"
        )
    if zeros := np.count_nonzero(~vectors.any(axis=1)):
        if zeros == len(rows) >= MANY:
            raise ValueError(f"{where}: expected vectors, got only zeros; look at the surrogate, or use another one")
        log.warning("%s: %d vectors are zeros", where, zeros)
    return vectors.astype(np.float16)[np.argsort(order)]
