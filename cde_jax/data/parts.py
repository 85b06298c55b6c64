"""Pairs in parts: read, cleaned and tokenized by tasks that leave shards; the store is that of `write_pairs`.

A source that has parts (files, data sets) is read part by part. A shard keeps its pairs as lines of JSON, compressed
block by block with zstd, and their keys. Duplicates are found among the keys of all parts, then tasks tokenize a few
blocks each, and the store is put together from their shards.
"""

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from cde_jax.data import shards
from cde_jax.data.files import fingerprint
from cde_jax.data.pairs import EQUAL, InputLog, Pair, PairWriter, Rules, Side, append_texts, check_text, line
from cde_jax.data.store import Store, StoreWriter
from cde_jax.data.tokens import Tokenizer, text_key

Read = Callable[..., Iterator[Pair]]
BLOCK = 4096  # pairs compressed together
BLOCKS = 8  # tokenized by one task
NO_NEGATIVES = Pair("", "", "")
KEYS = 2**24  # pairs whose keys are compared at a time


class _Part(NamedTuple):
    path: Path
    digest: str
    read: Read


def read_parts(folder: Path, parts: Sequence[Read], identity: Any, map_tasks: shards.MapTasks) -> list[Path]:
    """A shard of each part of a source: compressed lines and keys. identity: of all that decides the pairs.

    ValueError for a pair without text, and what `parts` raise.
    """
    tasks = []
    for number, read in enumerate(parts):
        digest = fingerprint({"source": identity, "part": number, "of": len(parts)})
        tasks.append(_Part(folder / f"read-{number}", digest, read))
    return list(map_tasks(_read_part, tasks))


def _read_part(part: _Part) -> Path:
    if shards.is_whole(part.path, "part", part.digest):
        return part.path
    import pyarrow as pa

    log, count, negatives = InputLog(), 0, 0
    pairs = part.read(log=log)
    with StoreWriter(part.path, "part") as writer:
        empty = np.zeros(0, np.uint64)
        for name in ("query_key", "document_key"):
            writer.append(name, empty)
        writer.append("dropped", np.zeros(0, np.int64))
        writer.append_ragged("lines", [], np.uint8)
        while block := list(islice(pairs, BLOCK)):
            for number, pair in enumerate(block, count):
                check_text(pair, number)
            keys = [(text_key(pair.query), text_key(pair.document)) for pair in block]
            kept = [
                pair._replace(negatives=tuple(text for text in pair.negatives if text_key(text) != document))
                for pair, (_, document) in zip(block, keys, strict=True)
            ]
            dropped = [len(pair.negatives) - len(rest.negatives) for pair, rest in zip(block, kept, strict=True)]
            for name, side in zip(("query_key", "document_key"), zip(*keys, strict=True), strict=True):
                writer.append(name, np.array(side, np.uint64))
            writer.append("dropped", np.array(dropped, np.int64))
            text = b"".join(map(line, kept))
            writer.append("bytes", np.array([len(text)], np.int64))
            writer.append_ragged("lines", [np.frombuffer(pa.compress(text, "zstd", asbytes=True), np.uint8)])
            count += len(block)
            negatives += sum(len(pair.negatives) for pair in kept)
        writer.finish({"fingerprint": part.digest, "negatives": negatives, "log": asdict(log)})
    return part.path


def lines(part: Store, block: int) -> list[bytes]:
    """The lines of a block of a part, each the JSON of a pair."""
    import pyarrow as pa

    size = int(part.array("bytes")[block])
    compressed = part.ragged("lines").row(block).tobytes()
    return pa.decompress(compressed, decompressed_size=size, codec="zstd", asbytes=True).splitlines(keepends=True)


class Texts:
    """Queries and documents of all parts, in order, read anew each time they are gone through."""

    def __init__(self, paths: Sequence[Path]):
        self.parts = [Store.open(path, verify=False) for path in paths]

    def __iter__(self) -> Iterator[str]:
        for part in self.parts:
            for block in range(part.ragged("lines").count()):
                for text in lines(part, block):
                    yield from json.loads(text)[1:3]


def first_occurrences(paths: Sequence[Path]) -> Bool[np.ndarray, " n"]:
    """Of the pairs of all parts, in order: False where both texts were there before, as `clean` compares them."""
    parts = [Store.open(path, verify=False) for path in paths]
    sizes = [len(part.array("query_key")) for part in parts]
    first, residues = np.ones(sum(sizes), bool), np.uint64(-(-sum(sizes) // KEYS) or 1)
    starts = np.cumsum([0, *sizes])
    for residue in range(int(residues)):  # equal pairs have equal residues
        rows = [np.flatnonzero(part.array("query_key") % residues == residue) for part in parts]
        queries, documents = (
            np.concatenate([part.array(name)[at] for part, at in zip(parts, rows, strict=True)])
            for name in ("query_key", "document_key")
        )
        places = np.concatenate([start + at for start, at in zip(starts, rows, strict=False)])
        order = np.lexsort((documents, queries))  # stable: of equal ones the first in front
        same = (np.diff(queries[order]) == 0) & (np.diff(documents[order]) == 0)
        first[places[order[1:][same]]] = False
    return first


class _Blocks(NamedTuple):
    """Some blocks of a part, the rules by which their pairs are tokenized, and which of them are kept."""

    path: Path
    digest: str
    part: Path
    blocks: range
    tokenizer: tuple[Path, str]  # its folder and fingerprint
    rules: tuple[Any, ...]  # of `Rules`, without the tokenizer
    first: bytes  # of the kept pairs, one bit each


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: Path, digest: str) -> Tokenizer:
    return Tokenizer.load(folder)


def _tokenize(task: _Blocks) -> Path:
    if shards.is_whole(task.path, "tokens", task.digest):
        return task.path
    rules = Rules(_tokenizer(*task.tokenizer), *task.rules)
    with StoreWriter(task.path, "tokens") as writer:
        sides = zip(("query", "document"), rules.lengths, strict=True)
        queries, documents = (Side(writer, name, length, rules.tokenizer) for name, length in sides)
        domains: Counter[str] = Counter()
        for kept in _kept(Store.open(task.part, verify=False), task.blocks, task.first):
            block = [_pair(text) for text in kept]
            domains.update(pair.domain for pair in block)
            append_texts(queries, documents, block, rules)
            numbers = {name: number for number, name in enumerate(domains)}
            writer.append("domain", np.array([numbers[pair.domain] for pair in block], np.int32))
        summary = {"domains": list(domains), "queries": queries.counted(), "documents": documents.counted()}
        writer.finish({"fingerprint": task.digest} | summary)
    return task.path


def _kept(part: Store, blocks: range, first: bytes) -> Iterator[list[bytes]]:
    """The lines that are kept, block by block."""
    keep = np.unpackbits(np.frombuffer(first, np.uint8)).view(bool)
    for number, block in enumerate(blocks):
        texts = lines(part, block)
        mask = keep[number * BLOCK : number * BLOCK + len(texts)]
        yield [text for text, kept in zip(texts, mask.tolist(), strict=True) if kept]


def _pair(text: bytes) -> Pair:
    domain, query, document, negatives = json.loads(text)
    return Pair(domain, query, document, tuple(negatives))


def write_parts(
    directory: Path,
    folder: Path,
    paths: Sequence[Path],
    tokenizer: Path,
    rules: Rules,
    *,
    source: dict[str, Any],
    counts: MutableMapping[str, int],
    inputs: InputLog,
    map_tasks: shards.MapTasks,
) -> Store:
    """The store that `write_pairs` makes of the cleaned pairs of all parts, byte for byte.

    folder: of the shards. tokenizer: the folder of that of the rules. counts gains what `clean` counts.
    """
    first, tasks = first_occurrences(paths), []
    for number, path in enumerate(paths):
        part = Store.open(path, verify=False)
        dropped = part.array("dropped")
        kept, first = first[: len(dropped)], first[len(dropped) :]
        tally = {"read": len(kept), EQUAL: dropped[kept].sum(), "kept": np.count_nonzero(kept)}
        tally |= {"duplicate pairs": len(kept) - tally["kept"]} if not kept.all() else {}
        for name, count in tally.items():
            counts[name] = counts.get(name, 0) + int(count)
        for name, entries in part.manifest["log"].items():
            getattr(inputs, name).update(entries)
        count = part.ragged("lines").count()
        for start in range(0, count, BLOCKS):
            bits = np.packbits(kept[start * BLOCK : (start + BLOCKS) * BLOCK]).tobytes()
            made_from = [part.fingerprint, rules.tokenizer.fingerprint, rules[1:], start, BLOCK, bits.hex()]
            shard, blocks = folder / f"tokens-{number}-{start}", range(start, min(start + BLOCKS, count))
            model = tokenizer, rules.tokenizer.fingerprint
            tasks.append(_Blocks(shard, fingerprint(made_from), path, blocks, model, tuple(rules[1:]), bits))
    with PairWriter(directory, rules) as writer:
        for task, path in zip(tasks, map_tasks(_tokenize, tasks), strict=True):
            _add(writer, task, Store.open(path, verify=False))
        return writer.finish(source, counts, inputs)


def _add(writer: PairWriter, task: _Blocks, tokens: Store) -> None:
    """Add a task's pairs to the store."""
    part, names, number = Store.open(task.part, verify=False), tokens.manifest["domains"], tokens.array("domain")
    writer.add_domains([names[i] for i in number.tolist()])
    writer.queries.add(tokens, tokens.manifest["queries"])
    writer.documents.add(tokens, tokens.manifest["documents"])
    for kept in _kept(part, task.blocks, task.first):
        writer.stream.update(b"".join(kept))
        if part.manifest["negatives"]:
            writer.add_negatives([_pair(text) for text in kept])
        else:
            writer.add_negatives([NO_NEGATIVES] * len(kept))
