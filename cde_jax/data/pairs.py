"""The table of (domain, query, document, hard negatives): cleaning, prefixes, tokens, fingerprint.

`clean` drops duplicates and counts them; `write_pairs` streams the table to a store of kind "pairs", so that
nothing after it needs to read text or tokenize again. Memory is flat in both, however many pairs there are.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from cde_jax.data.files import fingerprint, temporary_database
from cde_jax.data.store import Store, StoreWriter
from cde_jax.data.tokens import Tokenizer, has_text, text_key

BAR_AFTER = 3.0  # seconds of work before a progress bar shows
MANY_UNKNOWN = 0.05  # of the tokens: more that are unknown to the tokenizer are warned of
EQUAL = "negatives equal to the positive"
_BLOCK = 4096  # texts tokenized and written at a time
_log = logging.getLogger(__name__)


class Pair(NamedTuple):
    """A query, the document that answers it, and documents known not to (hard negatives)."""

    domain: str
    query: str
    document: str
    negatives: tuple[str, ...] = ()


@dataclass
class InputLog:
    """What a source read, for the manifest and the report. Files are named below the path that was given."""

    pairs: dict[str, int] = field(default_factory=dict)  # file (or package, or data set) → pairs that it gave
    skipped: dict[str, str] = field(default_factory=dict)  # file → why it was not read
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)  # file → reason → rows and texts left out

    def skip(self, name: str, reason: str) -> None:
        """Note a file that is not read; the first time as a log line too."""
        if self.skipped.get(name) != reason:
            _log.warning("%s is not read: %s", name, reason)
        self.skipped[name] = reason

    def finish(self, name: str, pairs: int, left_out: Mapping[str, int] = MappingProxyType({})) -> None:
        """Note what a file gave, and by reason what it left out; the latter as a log line too, the first time."""
        left_out = {reason: count for reason, count in sorted(left_out.items()) if count}
        if left_out and self.left_out.get(name) != left_out:
            _log.warning("%s: %d pairs; left out: %s", name, pairs, left_out)
            self.left_out[name] = left_out
        self.pairs[name] = pairs


def clean(pairs: Iterable[Pair], counts: MutableMapping[str, int], *, folder: str | Path) -> Iterator[Pair]:
    """The pairs without exact and near-exact duplicates (equal `text_key`s), in order, the first one kept.

    A pair is dropped if both its texts were there before; pairs that share a query or a document stay. Hard negatives
    equal to the positive are dropped too. `counts` gains "read", "duplicate pairs", "negatives equal to the positive"
    and "kept" as it goes. The keys are in a temporary database in `folder`. A pair without text is a ValueError.
    """
    counts |= {name: counts.get(name, 0) for name in ("read", "duplicate pairs", EQUAL, "kept")}
    with temporary_database(folder) as execute:
        execute("CREATE TABLE seen (query BLOB, document BLOB, PRIMARY KEY (query, document)) WITHOUT ROWID")
        for number, pair in enumerate(pairs):
            check_text(pair, number)
            counts["read"] += 1
            query, document = key_of(pair.query), key_of(pair.document)
            if not execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", [query, document]).rowcount:
                counts["duplicate pairs"] += 1
                continue
            negatives = tuple(text for text in pair.negatives if key_of(text) != document)
            counts[EQUAL] += len(pair.negatives) - len(negatives)
            counts["kept"] += 1
            yield pair._replace(negatives=negatives)


def write_pairs(
    directory: str | Path,
    pairs: Iterable[Pair],
    tokenizer: Tokenizer,
    *,
    query_prefix: str,
    document_prefix: str,
    prefixes: Mapping[str, tuple[str, str]] = MappingProxyType({}),
    query_length: int,
    document_length: int,
    source: dict[str, Any],
    counts: Mapping[str, int] | None = None,
    inputs: InputLog | None = None,
) -> Store:
    """Stream `pairs` to a store of kind "pairs" and return it opened.

    With n pairs and m different negative texts, documents 0..n−1 are the positives in order and n..n+m−1 the
    negatives in the order in which they appear. Arrays, where N = n + m:
    query_tokens, document_tokens: ragged uint16 (uint32 for large vocabularies), n and N rows, with prefix and
        special tokens, cut to the lengths
    query_text, document_text: ragged UTF-8 without prefix; query_key, document_key: their `text_key`s, uint64
    domain: int32 [n], an index into the manifest's "domains"; negatives: ragged int64, n rows of numbers ≥ n

    `prefixes` maps domains to a query and a document prefix of their own. A negative has the document prefix of its
    pair: one text under two prefixes is two documents. `source`, `counts` (of `clean`) and `inputs` (the source's log)
    are in the manifest, not in the fingerprint (of pairs, prefixes, lengths and tokenizer). No pairs, or one without
    text, is a ValueError; a full disk an OSError. Neither leaves anything.
    """
    rules = Rules(tokenizer, (query_prefix, document_prefix), dict(prefixes), (query_length, document_length))
    with PairWriter(directory, rules) as writer:
        for block in _blocks(pairs, "tokenizing"):
            writer.add(block)
        return writer.finish(source, counts or {}, inputs or InputLog())


class Rules(NamedTuple):
    """How texts become tokens."""

    tokenizer: Tokenizer
    prefix: tuple[str, str]  # of queries, of documents
    prefixes: dict[str, tuple[str, str]]  # of the domains that have their own
    lengths: tuple[int, int]  # of queries, of documents


class PairWriter:
    """Writes the store that `write_pairs` describes, block by block; nothing is left where `finish` is not reached."""

    def __init__(self, directory: str | Path, rules: Rules):
        self.store, self.rules, self.stack = StoreWriter(directory, "pairs"), rules, ExitStack()
        self.sizes: Counter[str] = Counter()  # pairs by domain, in the order of the domains' numbers
        self.stream = hashlib.sha256()  # of all pairs
        sides = zip(("query", "document"), rules.lengths, strict=True)
        self.queries, self.documents = (Side(self.store, name, length, rules.tokenizer) for name, length in sides)

    def __enter__(self) -> "PairWriter":
        self.stack.enter_context(self.store)
        self.execute = self.stack.enter_context(temporary_database(self.store.path))
        self.execute("CREATE TABLE negatives (prefix TEXT, key BLOB, text TEXT, UNIQUE (prefix, key))")
        self.execute("CREATE TABLE rows (numbers BLOB)")
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.__exit__(*error)

    def add(self, block: Sequence[Pair]) -> None:
        """Tokenize and write pairs. ValueError for one without text."""
        for number, pair in enumerate(block, self.queries.count):
            check_text(pair, number)
            self.stream.update(line(pair))
        self.add_domains([pair.domain for pair in block])
        append_texts(self.queries, self.documents, block, self.rules)
        self.add_negatives(block)

    def add_domains(self, domains: Sequence[str]) -> None:
        """The domains of the next pairs."""
        self.sizes.update(domains)
        numbers = {name: number for number, name in enumerate(self.sizes)}
        self.store.append("domain", np.array([numbers[domain] for domain in domains], np.int32))

    def add_negatives(self, block: Sequence[Pair]) -> None:
        """The hard negatives of the next pairs."""
        for pair in block:
            prefix = self.rules.prefixes.get(pair.domain, self.rules.prefix)[1]
            self.execute("INSERT INTO rows VALUES (?)", [_insert(self.execute, prefix, pair.negatives)])

    def finish(self, source: dict[str, Any], counts: Mapping[str, int], inputs: InputLog) -> Store:
        """Put the store in place and open it. ValueError if there are no pairs."""
        rules = self.rules
        if not self.sizes:
            raise ValueError("expected pairs, there are none; look at the data source's settings")
        _append_negatives(self.store, self.documents, self.queries.count, self.execute)
        own = {name: _named(rules.prefixes[name]) for name in self.sizes if name in rules.prefixes}
        settings = {
            "prefixes": _named(rules.prefix) | {"domains": own},
            "lengths": _named(rules.lengths),
            "tokenizer": rules.tokenizer.fingerprint,
        }
        digest = fingerprint({"pairs": self.stream.hexdigest()} | settings)
        origin = {"counts": dict(counts), "inputs": asdict(inputs), "source": source}
        sides = _described(self.queries, self.documents, self.sizes) | {"vocab_size": rules.tokenizer.vocab_size}
        return self.store.finish({"fingerprint": digest} | sides | origin | settings)


def line(pair: Pair) -> bytes:
    """A pair as a line of JSON, by which the fingerprint knows it."""
    return json.dumps(pair).encode() + b"\n"


def append_texts(queries: "Side", documents: "Side", block: Sequence[Pair], rules: Rules) -> None:
    """Tokenize the queries and documents of the pairs, each with its prefix."""
    before = [(*rules.prefixes.get(pair.domain, rules.prefix), pair) for pair in block]
    queries.append([(prefix, pair.query) for prefix, _, pair in before])
    documents.append([(prefix, pair.document) for _, prefix, pair in before])


def key_of(text: str) -> bytes:
    """The text's `text_key` as bytes."""
    return text_key(text).to_bytes(8)


def _described(queries: "Side", documents: "Side", sizes: Mapping[str, int]) -> dict[str, Any]:
    """Of the manifest: counts, domains and token statistics."""
    return {
        "pairs": queries.count,
        "documents": documents.count,
        "domains": [{"name": name, "pairs": size} for name, size in sizes.items()],
        "tokens": _named((queries.statistics(), documents.statistics())),
    }


def _append_negatives(writer: StoreWriter, documents: "Side", first: int, execute: Callable[..., Any]) -> None:
    """The numbers of each pair's hard negatives, from `first` on, and their texts as documents after the positives."""
    for rows in _blocks(execute("SELECT numbers FROM rows ORDER BY rowid"), "listing hard negatives"):
        writer.append_ragged("negatives", [np.frombuffer(row, np.int64) + first for (row,) in rows])
    for texts in _blocks(execute("SELECT prefix, text FROM negatives ORDER BY rowid"), "tokenizing hard negatives"):
        documents.append(texts)


def _insert(execute: Callable[..., Any], prefix: str, texts: Iterable[str]) -> bytes:
    """Insert the negatives that are new; returns the int64 numbers of all, each once: the order of first appearance."""
    numbers = {}
    for text in texts:
        execute("INSERT OR IGNORE INTO negatives VALUES (?, ?, ?)", [prefix, key_of(text), text])
        row = execute("SELECT rowid FROM negatives WHERE prefix = ? AND key = ?", [prefix, key_of(text)]).fetchone()
        numbers[row[0] - 1] = None
    return np.array(list(numbers), np.int64).tobytes()


def _named(values: tuple[Any, Any]) -> dict[str, Any]:
    return {"query": values[0], "document": values[1]}


class Side:
    """Writes the arrays of one side and counts its texts by their number of tokens."""

    def __init__(self, writer: StoreWriter, name: str, length: int, tokenizer: Tokenizer):
        self.writer, self.name, self.length, self.tokenizer = writer, name, length, tokenizer
        self.dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        self.lengths: Counter[int] = Counter()  # tokens before cutting → texts
        self.count = self.tokens = self.unknown = 0

    def append(self, texts: Sequence[tuple[str, str]]) -> None:
        """Add (prefix, text)."""
        rows, lengths = self.tokenizer.encode_counted([prefix + text for prefix, text in texts], self.length)
        encoded = [np.frombuffer(text.encode(), np.uint8) for _, text in texts]
        self.writer.append_ragged(f"{self.name}_tokens", rows, self.dtype)
        self.writer.append_ragged(f"{self.name}_text", encoded, np.uint8)
        self.writer.append(f"{self.name}_key", np.array([text_key(text) for _, text in texts], np.uint64))
        self.lengths.update(lengths.tolist())
        self.count += len(texts)
        self.tokens += sum(map(len, rows))
        self.unknown += sum(np.count_nonzero(row == self.tokenizer.unknown_id) for row in rows)

    def add(self, store: Store, counted: Mapping[str, Any]) -> None:
        """Add the texts of a shard that another `Side` has written, and what that one has `counted`."""
        for name in (f"{self.name}_tokens", f"{self.name}_text"):
            self.writer.append_rows(name, store.ragged(name))
        self.writer.append(f"{self.name}_key", store.array(f"{self.name}_key"))
        self.lengths.update({int(length): number for length, number in counted["lengths"].items()})
        self.count, self.tokens = self.count + counted["count"], self.tokens + counted["tokens"]
        self.unknown += counted["unknown"]

    def counted(self) -> dict[str, Any]:
        """Counts of texts by tokens before cutting, of texts, tokens and unknown tokens."""
        return {"lengths": self.lengths, "count": self.count, "tokens": self.tokens, "unknown": self.unknown}

    def statistics(self) -> dict[str, float]:
        """Token counts before cutting, special tokens and prefix included, and the share that was cut.

        Warns where the tokenizer does not fit the texts.
        """
        if self.unknown > MANY_UNKNOWN * self.tokens:
            _log.warning(
                "%.0f %% of the %s tokens, prefix included, are unknown to the tokenizer (%d of %d): choose one for "
                "such texts, or a larger data.vocab_size",
                *(100 * self.unknown / self.tokens, self.name, self.unknown, self.tokens),
            )
        lengths, texts = np.array(sorted(self.lengths.items())).T
        median, most = np.quantile(lengths, [0.5, 0.95], weights=texts, method="inverted_cdf").tolist()
        return {
            "mean": round(float(texts @ lengths / self.count), 2),
            "min": int(lengths[0]),
            "p50": median,
            "p95": most,
            "max": int(lengths[-1]),
            "truncated": round(float(texts[lengths > self.length].sum() / self.count), 4),
        }


def _blocks(items: Iterable[Any], what: str) -> Iterator[list[Any]]:
    """The items in lists, with a progress bar on long work."""
    from tqdm import tqdm  # not on a bare accelerator image

    items = iter(items)
    with tqdm(desc=what, unit="", unit_scale=True, delay=BAR_AFTER, leave=False) as bar:
        while block := list(islice(items, _BLOCK)):
            yield block
            bar.update(len(block))


def check_text(pair: Pair, number: int) -> None:
    """Raises ValueError for a pair with a text that is none; number: what the user knows it by."""
    texts = (("query", pair.query), ("document", pair.document), *(("hard negative", t) for t in pair.negatives))
    if missing := [name for name, text in texts if not has_text(text)]:
        raise ValueError(
            f"pair {number} of domain {pair.domain!r} has no text as its {missing[0]} (query {pair.query[:60]!r}, "
            f"document {pair.document[:60]!r}); take it out of the data or fill it in"
        )
