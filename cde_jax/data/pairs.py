"""The table of (domain, query, document, hard negatives): cleaning, prefixes, tokens, fingerprint.

`clean` drops duplicates and counts them; `write_pairs` streams the table to a store of kind "pairs", so that
nothing after it needs to read text or tokenize again. Memory is flat in both, however many pairs there are.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from itertools import count, islice, zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64
from tqdm import tqdm

from cde_jax.data.distinct import Column, DistinctTexts, each, first_occurrence
from cde_jax.data.keys import fold, text_key
from cde_jax.data.store import Store, StoreWriter, fingerprint
from cde_jax.data.tokens import Tokenizer

BAR_AFTER = 3.0  # seconds of work before a progress bar shows
_BLOCK = 4096  # texts tokenized and written at a time


class Pair(NamedTuple):
    """A query, the document that answers it, and documents known not to (hard negatives)."""

    domain: str
    query: str
    document: str
    negatives: tuple[str, ...] = ()


def clean(
    pairs: Callable[[], Iterable[Pair]],
    counts: MutableMapping[str, int],
    *,
    folder: str | Path,
    unique_documents: bool = True,
) -> Iterator[Pair]:
    """The pairs without exact and near-exact duplicates (equal `text_key`s), in order, the first one kept.

    A pair is dropped if both its texts were there before, and with `unique_documents` also if its document was.
    Turn that off for data where several queries share a document on purpose. Hard negatives equal to the
    positive are dropped too. `counts` gains "read", "duplicate pairs", "duplicate documents", "negatives equal
    to the positive" and "kept" as it goes.

    `pairs()` is called twice: at once for the keys, then for the pairs themselves as they are asked for. Memory
    stays flat; about 70 bytes a pair go to files without name in `folder`. A pair without text is a ValueError that
    names it, and so is one that differs the second time; a full disk is an OSError that says so.
    """
    for name in ("read", "duplicate pairs", "duplicate documents", "negatives equal to the positive", "kept"):
        counts[name] = counts.get(name, 0)
    rows = _keys(pairs(), folder)
    both = first_occurrence(rows["both"], folder)
    # A pair is kept where it is the first with its document (or with both texts). Only documents of kept pairs count
    # as there before, but that is the same: the first pair with a document is never dropped, so it is there.
    original = first_occurrence(rows["document"], folder) if unique_documents else both
    return _kept(pairs(), rows["mark"], both, original, counts)


_KEYS = np.dtype([("both", np.uint64), ("document", np.uint64), ("mark", np.int64)])


def _keys(pairs: Iterable[Pair], folder: str | Path) -> np.ndarray:
    """The keys of each pair's texts and a mark to know it again by, _KEYS [n], on disk."""
    with Column(folder, _KEYS) as rows:
        for block in _checked(pairs, "looking for duplicates"):
            records = np.empty(len(block), _KEYS)
            records["document"] = [text_key(pair.document) for pair in block]
            queries = np.array([text_key(pair.query) for pair in block], np.uint64)
            records["both"] = fold(queries, records["document"])
            records["mark"] = [hash(pair) for pair in block]  # good within one process: all that is asked of it
            rows.append(records)
        return rows.array()


def _kept(
    pairs: Iterable[Pair], marks: np.ndarray, both: np.ndarray, original: np.ndarray, counts: MutableMapping[str, int]
) -> Iterator[Pair]:
    """The pairs whose `original` is their own row; `both` tells how the others were dropped."""
    rows = zip(each(marks), each(both), each(original), strict=True)
    for number, (pair, row) in enumerate(zip_longest(pairs, rows)):
        if pair is None or row is None or hash(pair) != row[0]:
            raise ValueError(
                f"pair {number} is not what it was when the pairs were read for the first time: give the same pairs "
                "at each call, leave the data alone meanwhile, and run again"
            )
        _, same_texts, kept = row
        counts["read"] += 1
        if kept != number:
            # Against the kept pair: if both texts equal its, it is also the first with both.
            counts["duplicate pairs" if same_texts == kept else "duplicate documents"] += 1
            continue
        negatives = pair.negatives
        if negatives:
            document = text_key(pair.document)
            negatives = tuple(text for text in negatives if text_key(text) != document)
        counts["negatives equal to the positive"] += len(pair.negatives) - len(negatives)
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
    counts: MutableMapping[str, int] | None = None,
) -> Store:
    """Stream `pairs` to a store of kind "pairs" and return it opened.

    With n pairs and m different negative texts, documents 0..n−1 are the positives in order and n..n+m−1 the
    negatives in the order in which they appear. Arrays: `query_tokens` (ragged, n rows) and `document_tokens`
    (n + m rows), uint16 or for larger vocabularies uint32, prefix included, cut to the lengths, special tokens
    included; `query_text` and `document_text`, UTF-8 without prefix; `domain` int32 [n], an index into the
    manifest's "domains"; `query_key` uint64 [n] and `document_key` uint64 [n + m]; `negatives` (ragged int64, n
    rows), document numbers ≥ n. `counts` is `clean`'s, `source` says where the pairs come from; both go to the
    manifest.

    `prefixes` maps domains to a query and a document prefix of their own. A negative has the document prefix of its
    pair: one text under two prefixes is two documents.

    The fingerprint is a digest of the pairs in order, prefixes, lengths and tokenizer. No pairs, or a pair
    without text, is a ValueError; a full disk an OSError that says so; neither leaves anything behind.
    """
    directory = Path(directory)
    wide = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    queries = _Side("query", query_length, tokenizer, wide)
    documents = _Side("document", document_length, tokenizer, wide)
    sizes: dict[str, int] = {}  # pairs by domain, in the order of the domains' numbers
    stream = hashlib.sha256()
    with StoreWriter(directory, "pairs") as writer, DistinctTexts(directory.absolute().parent) as negatives:
        for block in _checked(pairs, "tokenizing"):
            writer.append("domain", _register(block, sizes, stream))
            before = [(*prefixes.get(pair.domain, (query_prefix, document_prefix)), pair) for pair in block]
            queries.append(writer, [(prefix, pair.query) for prefix, _, pair in before])
            documents.append(writer, [(prefix, pair.document) for _, prefix, pair in before])
            negatives.add([[(prefix, text) for text in pair.negatives] for _, prefix, pair in before])
        if not sizes:
            raise ValueError("expected pairs, there are none; look at the data source's settings")
        for block in _blocks(negatives.texts(), "tokenizing hard negatives"):
            documents.append(writer, block)
        for block in _blocks(negatives.rows(), "numbering hard negatives"):
            writer.append_ragged("negatives", [row + queries.count for row in block], np.int64)
        own = {name: prefixes[name] for name in sizes if name in prefixes}
        settings = {
            "prefixes": {
                "query": query_prefix,
                "document": document_prefix,
                "domains": {name: {"query": query, "document": document} for name, (query, document) in own.items()},
            },
            "lengths": {"query": query_length, "document": document_length},
            "tokenizer": tokenizer.fingerprint,
        }
        return writer.finish(
            {
                "fingerprint": fingerprint({"pairs": stream.hexdigest()} | settings),
                "pairs": queries.count,
                "documents": documents.count,
                "domains": [{"name": name, "pairs": size} for name, size in sizes.items()],
                "counts": dict(counts or {}),
                "tokens": {"query": queries.statistics(), "document": documents.statistics()},
                "source": source,
            }
            | settings
        )


def _register(block: list[Pair], sizes: dict[str, int], stream: Any) -> Int32[np.ndarray, "b"]:
    """Add the pairs to the digest and to their domains' sizes; returns the domains' numbers."""
    for pair in block:
        stream.update(json.dumps(pair).encode() + b"\n")
        sizes[pair.domain] = sizes.get(pair.domain, 0) + 1
    number = {name: i for i, name in enumerate(sizes)}
    return np.array([number[pair.domain] for pair in block], np.int32)


class _Side:
    """Writes the arrays of one side and counts its texts by their number of tokens."""

    def __init__(self, name: str, length: int, tokenizer: Tokenizer, dtype: type):
        self.name, self.length, self.tokenizer, self.dtype = name, length, tokenizer, dtype
        self.count = 0
        self.lengths = np.zeros(1, np.int64)  # how many texts have 0, 1, 2, … tokens

    def append(self, writer: StoreWriter, texts: Sequence[tuple[str, str]]) -> None:
        """Add (prefix, text)."""
        rows, lengths = self.tokenizer.encode_counted([prefix + text for prefix, text in texts], self.length)
        writer.append_ragged(f"{self.name}_tokens", rows, self.dtype)
        writer.append_ragged(f"{self.name}_text", [np.frombuffer(text.encode(), np.uint8) for _, text in texts])
        writer.append(f"{self.name}_key", np.array([text_key(text) for _, text in texts], np.uint64))
        counted = np.bincount(lengths, minlength=len(self.lengths))
        counted[: len(self.lengths)] += self.lengths
        self.lengths = counted
        self.count += len(texts)

    def statistics(self) -> dict[str, float]:
        """Token counts before cutting, special tokens and prefix included, and the share that was cut."""
        present = np.flatnonzero(self.lengths)
        return {
            "mean": round(float(self.lengths @ np.arange(len(self.lengths)) / self.count), 2),
            "min": int(present[0]),
            "p50": percentile(self.lengths, 50),
            "p95": percentile(self.lengths, 95),
            "max": int(present[-1]),
            "truncated": round(float(self.lengths[self.length + 1 :].sum() / self.count), 4),
        }


def percentile(histogram: Int64[np.ndarray, "n"], q: int | float) -> float:
    """`np.percentile(values, q)` of whole numbers, of which `histogram[v]` are v."""
    ends = np.cumsum(histogram)
    place = (int(ends[-1]) - 1) * (q / 100)
    low, high = np.searchsorted(ends, [int(place), int(place) + 1], side="right").tolist()
    part = place - int(place)
    # As numpy writes it, so that it rounds as numpy does.
    return float(low + (high - low) * part if part < 0.5 else high - (high - low) * (1 - part))


def _checked(pairs: Iterable[Pair], what: str) -> Iterator[list[Pair]]:
    """The pairs in lists, each pair with text; one without is a ValueError with its number."""
    number = count()
    for block in _blocks(pairs, what):
        for pair in block:
            _demand_text(pair, next(number))
        yield block


def _blocks(items: Iterable[Any], what: str) -> Iterator[list[Any]]:
    """The items in lists, with a progress bar on long work."""
    items = iter(items)
    with tqdm(desc=what, unit="", unit_scale=True, delay=BAR_AFTER, leave=False) as bar:
        while block := list(islice(items, _BLOCK)):
            yield block
            bar.update(len(block))


def _demand_text(pair: Pair, number: int) -> None:
    for name, text in (("query", pair.query), ("document", pair.document)):
        if not text.strip():
            other = pair.document if name == "query" else pair.query
            raise ValueError(
                f"pair {number} of domain {pair.domain!r} has no text as its {name} (the other side is "
                f"{other[:60]!r}); take it out of the data or fill it in"
            )
    if any(not text.strip() for text in pair.negatives):
        raise ValueError(
            f"pair {number} of domain {pair.domain!r} has a hard negative without text (the query is "
            f"{pair.query[:60]!r}); take it out of the data or fill it in"
        )
