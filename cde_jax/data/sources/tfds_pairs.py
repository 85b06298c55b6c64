"""Published training collections as TFDS data sets: ArrayRecord files, built once from the published ones.

`CollectionPairs` is an ordinary TFDS builder with a config for every set of the table ("bge.arguana" for
"bge/arguana"); neither building nor reading needs TensorFlow or a network:

    builder = CollectionPairs(data_dir=DATA, config="bge.arguana")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=FOLDER))
    builder.as_data_source("train")[0]  # {"query": b"…", "document": b"…", "negatives": [b"…"]}
"""

import contextlib
import errno
import io
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from cde_jax.data.files import NewFolder, digests, explain_os_errors, given_path, read_json, sync, write_json
from cde_jax.data.pairs import InputLog, Pair
from cde_jax.data.sources.collections import COLLECTIONS, domains, find, prefixes, select
from cde_jax.data.sources.formats import Shard, parts, shards

__all__ = ["CollectionPairs", "identity", "prefixes", "read_pairs"]

READER_VERSION = 1  # part of the identity: raise it when the same files give other pairs than before
_SOURCE = "source.json"  # beside the data set: what it was built from, and what was left out
_BLOCK = 256  # rows read at a time
_BAR_AFTER = 3.0  # seconds of work on a shard before a progress bar shows
_log = logging.getLogger(__name__)


class CollectionPairs(tfds.core.ShardBasedBuilder):
    """One published set as query, document and hard negatives, in the order of its files.

    A data set of one split, "train", with as many ArrayRecord files as the published one. (TFDS's builders that
    shuffle hold a gigabyte in memory and need TensorFlow for more; this one holds 8 bytes a row.)
    """

    VERSION = tfds.core.Version(f"{READER_VERSION}.0.0")
    BUILDER_CONFIGS: ClassVar[list[Any]] = [
        tfds.core.BuilderConfig(name=name.replace("/", ".")) for name in COLLECTIONS
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Put the published files into the manual folder, named as cde_jax/data/sources/collections.py lists them."
    )

    # Nothing is downloaded. (To look for checksums, TFDS would import a package that it does not require.)
    url_infos: ClassVar[dict[str, Any]] = {}

    def __init__(self, *, file_format: str = "array_record", **kwargs: Any):
        super().__init__(file_format=file_format, **kwargs)
        self.left_out: Counter[str] = Counter()  # rows and texts that building left out, by reason

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = {"query": text, "document": text, "negatives": tfds.features.Sequence(text)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Any]]:
        name = self.builder_config.name.replace(".", "/")
        readers = shards(COLLECTIONS[name], find(name, Path(dl_manager.manual_dir)), self.left_out)
        titles = [f"{name} {i}/{len(readers)}" for i in range(1, len(readers) + 1)]
        return {"train": [partial(_examples, *each) for each in zip(readers, titles, strict=True)]}


def read_pairs(
    names: Iterable[str], folder: str | Path, cache: str | Path, log: InputLog | None = None
) -> Iterator[Pair]:
    """The pairs of the named collections (see `collections.select`) in order of set, file and line.

    `folder` holds the published files, `cache` the data sets: a set is built when it is first reached and kept
    until its files change (their names, sizes or times). Unknown names and missing files are ValueErrors before
    anything is built; a broken file is one that begins with file and line, and leaves no data set behind. `log` gains
    the pairs of each set, and what was left out.
    """
    chosen, folder, cache = domains(names), given_path(folder), given_path(cache)
    for name in chosen:
        find(name, folder)
    return _read(chosen, folder, cache, InputLog() if log is None else log)


def identity(names: Iterable[str], folder: str | Path) -> dict[str, str]:
    """File name (relative to the folder) → sha256 of its bytes, and the version of the reader."""
    folder = given_path(folder)
    files = [path for name in select(names) for path in find(name, folder)]
    return {"(rules)": str(READER_VERSION)} | digests(dict.fromkeys(files), folder)


def _examples(part: Shard, title: str) -> Iterator[tuple[int, dict[str, Any]]]:
    example: dict[str, Any] = {}
    # TFDS keeps all that a shard yields until it is written, so it is given one example that is filled anew.
    keyed = (0, example)
    for query, document, negatives in tqdm(part(), title, unit=" pairs", delay=_BAR_AFTER, leave=False):
        example.update(query=query, document=document, negatives=list(negatives))
        yield keyed


def _read(chosen: dict[str, str], folder: Path, cache: Path, log: InputLog) -> Iterator[Pair]:
    for name, domain in chosen.items():
        builder, left_out = _built(name, folder, cache / name)
        lengths = builder.info.splits["train"].shard_lengths
        for number, length in enumerate(lengths):
            if not length:
                continue
            # Shard by shard: a source holds the index of all that it spans.
            part = f"train[{number}shard:{number + 1}shard]"
            source = builder.as_data_source(part, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
            for start in range(0, length, _BLOCK):
                for record in source.__getitems__(range(start, min(start + _BLOCK, length))):
                    yield _pair(domain, record)
        files = parts(COLLECTIONS[name], [path.relative_to(folder) for path in find(name, folder)])
        for paths, length in zip(files, lengths, strict=True):
            log.finish(" + ".join(path.as_posix() for path in paths), length)
        if left_out:
            log.left_out[name] = left_out


def _pair(domain: str, record: bytes) -> Pair:
    # Four times faster than TFDS's own decoding, which makes numpy arrays of the texts.
    feature = tf_example_pb2.Example.FromString(record).features.feature
    query, document, negatives = (
        [text.decode() for text in feature[key].bytes_list.value] for key in ("query", "document", "negatives")
    )
    return Pair(domain, query[0], document[0], tuple(negatives))


def _built(name: str, folder: Path, target: Path) -> tuple[CollectionPairs, dict[str, int]]:
    """The set's builder on its data set in `target`, built anew if the files have changed, and what was left out."""
    status = {path.relative_to(folder).as_posix(): path.stat() for path in find(name, folder)}
    files = {path: [each.st_size, each.st_mtime_ns] for path, each in status.items()}
    source = {"collection": name, "rules": READER_VERSION, "files": files}
    if not (target / _SOURCE).is_file() or read_json(target / _SOURCE, keys=("source",))["source"] != source:
        _build(name, folder, target, source)
    builder = CollectionPairs(data_dir=target, config=name.replace("/", "."))
    return builder, read_json(target / _SOURCE, keys=("left out",))["left out"]


def _build(name: str, folder: Path, target: Path, source: dict[str, Any]) -> None:
    with NewFolder(target, marker=_SOURCE) as new, _full_disk_explained(target):
        builder = CollectionPairs(data_dir=new.path, config=name.replace("/", "."))
        settings = tfds.download.DownloadConfig(manual_dir=folder)
        with contextlib.redirect_stdout(io.StringIO()):  # where TFDS announces a download
            builder.download_and_prepare(download_config=settings)
        count = builder.info.splits["train"].num_examples
        if not count:
            raise ValueError(f"{name}: expected pairs in {folder}, found none; left out: {dict(builder.left_out)}")
        left_out = dict(sorted((+builder.left_out).items()))
        write_json(new.path / _SOURCE, {"source": source, "pairs": count, "left out": left_out})
        shutil.rmtree(new.path / "downloads")  # TFDS makes it even where nothing is fetched
        for path in new.path.rglob("*"):
            sync(path)
        new.put_in_place()
    if left_out:
        _log.warning("%s: %d pairs; left out: %s", name, count, left_out)


@contextlib.contextmanager
def _full_disk_explained(target: Path) -> Iterator[None]:
    """As `explain_os_errors`; ArrayRecord reports a full disk by a RuntimeError with the system's words."""
    with explain_os_errors(target):
        try:
            yield
        except RuntimeError as error:
            for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                if os.strerror(code) in str(error):
                    raise OSError(code, str(error)) from error
            raise
