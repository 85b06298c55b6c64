"""Published training collections as TFDS data sets: ArrayRecord files, built once from the published ones.

`CollectionPairs` is an ordinary TFDS builder with a config for every set of the table ("bge.arguana" for
"bge/arguana"); neither building nor reading needs TensorFlow or a network:

    builder = CollectionPairs(data_dir=DATA, config="bge.arguana")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=FOLDER))
    builder.as_data_source("train")[0]  # {"query": b"…", "document": b"…", "negatives": [b"…"]}

A text of another type or a broken line is a ValueError that begins with file and line.
"""

import contextlib
import io
import logging
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from cde_jax.data import files
from cde_jax.data.files import NewFolder, given_path, read_json, temporary_database
from cde_jax.data.pairs import InputLog, Pair
from cde_jax.data.sources import beir
from cde_jax.data.sources.collections import COLLECTIONS, Collection, domains, find, select
from cde_jax.data.sources.huggingface import Row, parquet_rows, rows
from cde_jax.data.sources.jsonl import field, json_lines, text_lines

READER_VERSION = 1  # part of the identity: raise it when the same files give other pairs than before
# Of MS MARCO's mined negatives, those are taken that a cross-encoder scores lower than the positives by this margin
# (nearer ones are often unmarked positives), and so many of each system, as in BEIR's recipe and the paper's code.
CROSS_ENCODER_MARGIN = 3.0
PER_SYSTEM = 5
_SOURCE = "source.json"  # beside the data set: what it was built from, and what was left out
_BLOCK = 256  # rows read at a time
_BAR_AFTER = 3.0  # seconds of work on a shard before a progress bar shows
_log = logging.getLogger(__name__)
Read = Callable[[Path], Iterator[tuple[str, str, str]]]  # file → ("file:line", id, text)s


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
        collection = COLLECTIONS[name]
        read = partial(READERS[collection.format], collection, self.left_out, Path(dl_manager.download_dir))
        shards = _shards(name, Path(dl_manager.manual_dir))
        titles = [f"{name} {number}/{len(shards)}" for number in range(1, len(shards) + 1)]
        examples = [
            partial(_examples, partial(read, *shard), title) for shard, title in zip(shards, titles, strict=True)
        ]
        return {"train": examples}


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


def parts(names: Iterable[str], folder: str | Path, cache: str | Path) -> list[Callable[..., Iterator[Pair]]]:
    """`read_pairs` set by set: functions of a log that other processes can call."""
    folder, cache = given_path(folder), given_path(cache)
    return [partial(_read, {name: domain}, folder, cache) for name, domain in domains(names).items()]


def identity(names: Iterable[str], folder: str | Path) -> dict[str, str]:
    """File name (relative to the folder) → sha256 of its bytes, and the version of the reader."""
    folder = given_path(folder)
    return {"(rules)": str(READER_VERSION)} | files.digests(files_of(names, folder), folder)


def files_of(names: Iterable[str], folder: str | Path) -> list[Path]:
    """The published files of the collections, each once."""
    return list(dict.fromkeys(path for name in select(names) for path in find(name, given_path(folder))))


def _shards(name: str, folder: Path) -> list[list[Path]]:
    """The files of each shard of a set: one alone where a file has all of its texts, else all together."""
    paths = find(name, folder)
    return [[path] for path in paths] if COLLECTIONS[name].format in ("nomic", "bge") else [paths]


def _examples(read: Callable[[], Iterator[Row]], title: str) -> Iterator[tuple[int, dict[str, Any]]]:
    example: dict[str, Any] = {}
    # TFDS keeps all that a shard yields until it is written, so it is given one example that is filled anew.
    keyed = (0, example)
    for query, document, negatives in tqdm(read(), title, unit=" pairs", delay=_BAR_AFTER, leave=False):
        example.update(query=query, document=document, negatives=list(negatives))
        yield keyed


def _read(chosen: dict[str, str], folder: Path, cache: Path, log: InputLog) -> Iterator[Pair]:
    for name, domain in chosen.items():
        builder, left_out = _built(name, folder, cache / name)
        lengths = builder.info.splits["train"].shard_lengths
        for number, (paths, length) in enumerate(zip(_shards(name, folder), lengths, strict=True)):
            if length:  # shard by shard: a source holds the index of all that it spans
                part = f"train[{number}shard:{number + 1}shard]"
                source = builder.as_data_source(part, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
                for start in range(0, length, _BLOCK):
                    for record in source.__getitems__(range(start, min(start + _BLOCK, length))):
                        yield _pair(domain, record)
            log.finish(" + ".join(path.relative_to(folder).as_posix() for path in paths), length)
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
    states = {path: [each.st_size, each.st_mtime_ns] for path, each in status.items()}
    source = {"collection": name, "rules": READER_VERSION, "files": states}
    if not (target / _SOURCE).is_file() or read_json(target / _SOURCE, keys=("source",))["source"] != source:
        _build(name, folder, target, source)
    builder = CollectionPairs(data_dir=target, config=name.replace("/", "."))
    return builder, read_json(target / _SOURCE, keys=("left out",))["left out"]


def _build(name: str, folder: Path, target: Path, source: dict[str, Any]) -> None:
    with NewFolder(target, marker=_SOURCE) as new, files.explain_os_errors(target):
        builder = CollectionPairs(data_dir=new.path, config=name.replace("/", "."))
        with contextlib.redirect_stdout(io.StringIO()):  # where TFDS announces a download
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=folder))
        count = builder.info.splits["train"].num_examples
        if not count:
            raise ValueError(f"{name}: expected pairs in {folder}, found none; left out: {dict(builder.left_out)}")
        left_out = dict(sorted((+builder.left_out).items()))
        files.write_json(new.path / _SOURCE, {"source": source, "pairs": count, "left out": left_out})
        shutil.rmtree(new.path / "downloads")  # TFDS makes it even where nothing is fetched
        for path in new.path.rglob("*"):
            files.sync(path)
        new.put_in_place()
    if left_out:
        _log.warning("%s: %d pairs; left out: %s", name, count, left_out)


# The readers of a shard: collection, counts of what is left out, folder for temporary files, files → rows.


def _nomic(collection: Collection, left_out: Counter, _: Path, file: Path) -> Iterator[Row]:
    """JSON lines with the set's columns and `metadata.objective`, the columns that make pairs."""
    columns = list(collection.columns)
    objective = "triplet" if len(columns) == 3 else "paired"
    for place, entry in json_lines(file):
        metadata = entry.get("metadata")
        published = metadata.get("objective") if isinstance(metadata, dict) else None
        if isinstance(published, dict) and columns not in (published.get(objective) or []):
            raise ValueError(
                f"{place}: expected the {objective} objective with columns {columns}, the line's metadata has "
                f"{published}; is this another set's file?"
            )
        query, document, *negatives = (field(entry, column, place) for column in columns)
        yield from rows(query, document, negatives[0] if negatives else None, place, left_out)


def _bge(collection: Collection, left_out: Counter, _: Path, file: Path) -> Iterator[Row]:
    """Parquet with `query`, and lists `pos` and `neg`; each of several positives makes a pair."""
    for number, row in enumerate(parquet_rows(file, collection.columns), 1):
        yield from rows(*(row[column] for column in collection.columns), f"{file}: row {number}", left_out)


def _qrels(read: Read, columns: int, _: Collection, left_out: Counter, folder: Path, *paths: Path) -> Iterator[Row]:
    """Files of documents and queries by id, and qrels in TREC's columns (MS MARCO) or BEIR's."""
    documents, queries, qrels = paths
    with _texts_by_id(documents, read, folder) as document_of, _texts_by_id(queries, read, folder) as query_of:
        for place, query, document, relevance in beir.qrels_lines(qrels, columns):
            if relevance > 0:
                yield from rows(query_of(query, place), document_of(document, place), None, place, left_out)


def _msmarco_hard_negatives(
    _: Collection, left_out: Counter, folder: Path, passages: Path, queries: Path, mined: Path
) -> Iterator[Row]:
    """Passages and queries as TSV; lines of `qid`, ids `pos`, ids `neg` by the system that found them."""
    read = _tsv_texts
    with _texts_by_id(passages, read, folder) as document_of, _texts_by_id(queries, read, folder) as query_of:
        for place, entry in json_lines(mined):
            positives = _ids_and_scores(field(entry, "pos", place), "pos", place)
            systems = field(entry, "neg", place)
            if not isinstance(systems, dict):
                raise ValueError(f"{place}: expected lists of ids by system as 'neg', got {systems!r:.60}")
            if not positives:
                left_out["queries without a positive"] += 1
                continue
            # Without scores the limit is NaN, and nothing is above it.
            limit = min(score for _, score in positives) - CROSS_ENCODER_MARGIN
            chosen: dict[str, None] = {}
            for name, ranked in systems.items():
                scored = _ids_and_scores(ranked, name, place)
                new = [i for i, score in scored if i not in chosen and not score > limit]
                chosen |= dict.fromkeys(new[:PER_SYSTEM])
            query = query_of(str(field(entry, "qid", place)), place)
            documents = [document_of(identifier, place) for identifier, _ in positives]
            yield from rows(query, documents, [document_of(i, place) for i in chosen], place, left_out)


def _ids_and_scores(items: Any, name: str, place: str) -> list[tuple[str, float]]:
    """Passage ids and cross-encoder scores (NaN where the file has none: it is published with and without)."""
    if not isinstance(items, list):
        raise ValueError(f"{place}: expected a list as {name!r}, got {items!r:.60}")
    return [
        (str(field(item, "pid", place)), float(field(item, "ce-score", place)))
        if isinstance(item, dict)
        else (str(item), math.nan)
        for item in items
    ]


@contextlib.contextmanager
def _texts_by_id(path: Path, read: Read, folder: Path) -> Iterator[Callable[[str, str], str]]:
    """A function (id, place that names it) → text, on disk. An id of two texts, or of none, is a ValueError."""
    count = 0
    with temporary_database(folder) as execute:
        execute("CREATE TABLE texts (id TEXT UNIQUE, text TEXT)")
        for place, identifier, text in read(path):
            count += 1
            if not execute("INSERT OR IGNORE INTO texts VALUES (?, ?)", [identifier, text]).rowcount:
                raise ValueError(f"{place}: the id {identifier!r} is there twice; ids must differ")

        def text_of(identifier: str, place: str) -> str:
            row = execute("SELECT text FROM texts WHERE id = ?", [identifier]).fetchone()
            if row is None:
                raise ValueError(f"{place}: names {identifier!r}, which is not among the {count} of {path}")
            return row[0]

        yield text_of


def _tsv_texts(path: Path) -> Iterator[tuple[str, str, str]]:
    for place, line in text_lines(path):
        identifier, tab, text = line.rstrip("\r\n").partition("\t")
        if not tab:
            raise ValueError(f"{place}: expected an id and a text with a tab between, got {line!r:.80}")
        yield place, identifier, text


def _json_texts(path: Path) -> Iterator[tuple[str, str, str]]:
    return ((place, *beir.document(entry, place)) for place, entry in json_lines(path))


READERS = {
    "nomic": _nomic,
    "bge": _bge,
    "msmarco": partial(_qrels, _tsv_texts, 4),
    "msmarco-hard-negatives": _msmarco_hard_negatives,
    "beir": partial(_qrels, _json_texts, 3),
}
