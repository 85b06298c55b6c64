"""The table of (domain, query, document, hard negatives): cleaning, prefixes, tokens, fingerprint.

`clean` drops duplicates and counts them; `write_pairs` streams the table to a store of kind "pairs", so that
nothing after it needs to read text or tokenize again.
"""

import hashlib
import io
import json
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cde_jax.data.files import explained, write_all
from cde_jax.data.store import Store, StoreWriter, fingerprint
from cde_jax.data.tokens import Tokenizer

_BLOCK = 4096  # texts tokenized and written at a time: memory stays flat however many pairs there are


class Pair(NamedTuple):
    """A query, the document that answers it, and documents known not to (hard negatives)."""

    domain: str
    query: str
    document: str
    negatives: tuple[str, ...] = ()


class _Fold(dict):
    """A `str.translate` table that fills itself: punctuation and space fold to a space, signs stand alone."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if category[0] in "PZC" or category in ("Sk", "So"):
            folded = " "
        elif category[0] == "S":  # + < = $: "C" and "C++" differ, "a=b" and "a = b" do not
            folded = f" {character} "
        else:
            folded = character
        self[code] = folded
        return folded


_FOLD = _Fold()


def text_key(text: str) -> int:
    """A 64-bit key of the text with case, white space and punctuation folded: equal keys are "equal texts".

    Letters, marks, digits and mathematical signs count; a text of punctuation alone is its own key.
    """
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().translate(_FOLD).split())
    digest = hashlib.blake2b((folded or text.strip()).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def clean(pairs: Iterable[Pair], counts: MutableMapping[str, int], *, unique_documents: bool = True) -> Iterator[Pair]:
    """The pairs without exact and near-exact duplicates (equal `text_key`s), in order, the first one kept.

    A pair is dropped if both its texts were there before, and with `unique_documents` also if its document was.
    Turn that off for data where several queries share a document on purpose. Hard negatives equal to the
    positive are dropped too. `counts` gains "read", "duplicate pairs", "duplicate documents", "negatives equal
    to the positive" and "kept" as it goes. A pair without text is a ValueError that names it.
    """
    names = ("read", "duplicate pairs", "duplicate documents", "negatives equal to the positive", "kept")
    for name in names:
        counts[name] = counts.get(name, 0)
    seen: set[tuple[int, int]] = set()
    documents: set[int] = set()
    for pair in pairs:
        _demand_text(pair, counts["read"])
        counts["read"] += 1
        document = text_key(pair.document)
        both = (text_key(pair.query), document)
        if both in seen:
            counts["duplicate pairs"] += 1
            continue
        if unique_documents and document in documents:
            counts["duplicate documents"] += 1
            continue
        seen.add(both)
        documents.add(document)
        negatives = tuple(text for text in pair.negatives if text_key(text) != document)
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
    query_length: int,
    document_length: int,
    source: dict[str, Any],
    counts: MutableMapping[str, int] | None = None,
) -> Store:
    """Stream `pairs` to a store of kind "pairs" and return it opened.

    With n pairs and m different negative texts, documents 0..n−1 are the positives in order and n..n+m−1 the
    negatives. Arrays: `query_tokens` (ragged, n rows) and `document_tokens` (n + m rows), uint16 or for larger
    vocabularies uint32, prefix included, cut to the lengths, special tokens included; `query_text` and
    `document_text`, UTF-8 without prefix; `domain` int32 [n], an index into the manifest's "domains";
    `query_key` uint64 [n] and `document_key` uint64 [n + m]; `negatives` (ragged int64, n rows), document
    numbers ≥ n. `counts` is `clean`'s, `source` says where the pairs come from; both go to the manifest.

    The fingerprint is a digest of the pairs in order, prefixes, lengths and tokenizer. No pairs, or a pair
    without text, is a ValueError; a full disk an OSError that says so; neither leaves anything behind.
    """
    wide = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    queries = _Side("query", query_prefix, query_length, tokenizer, wide)
    documents = _Side("document", document_prefix, document_length, tokenizer, wide)
    domains: dict[str, int] = {}
    sizes: list[int] = []
    stream = hashlib.sha256()
    pairs = iter(pairs)
    directory = Path(directory)
    with StoreWriter(directory, "pairs") as writer, _Negatives(directory) as negatives:
        while block := list(islice(pairs, _BLOCK)):
            for i, pair in enumerate(block):
                _demand_text(pair, queries.count + i)
                stream.update(json.dumps(pair).encode() + b"\n")
                if domains.setdefault(pair.domain, len(domains)) == len(sizes):
                    sizes.append(0)
                sizes[domains[pair.domain]] += 1
            negatives.add(block)
            queries.append(writer, [pair.query for pair in block])
            documents.append(writer, [pair.document for pair in block])
            writer.append("domain", np.array([domains[pair.domain] for pair in block], np.int32))
        if not sizes:
            raise ValueError("expected pairs, there are none; look at the data source's settings")
        for block in negatives.texts():
            documents.append(writer, block)
        writer.append_ragged("negatives", [row + queries.count for row in negatives.rows], np.int64)
        settings = {
            "prefixes": {"query": query_prefix, "document": document_prefix},
            "lengths": {"query": query_length, "document": document_length},
            "tokenizer": tokenizer.fingerprint,
        }
        return writer.finish(
            {
                "fingerprint": fingerprint({"pairs": stream.hexdigest()} | settings),
                "pairs": queries.count,
                "documents": documents.count,
                "domains": [{"name": name, "pairs": sizes[i]} for name, i in domains.items()],
                "counts": dict(counts or {}),
                "tokens": {"query": queries.statistics(), "document": documents.statistics()},
                "source": source,
            }
            | settings
        )


class _Side:
    """Writes the arrays of one side and remembers its token lengths (4 bytes a text)."""

    def __init__(self, name: str, prefix: str, length: int, tokenizer: Tokenizer, dtype: type):
        self.name, self.prefix, self.length, self.tokenizer, self.dtype = name, prefix, length, tokenizer, dtype
        self.count = 0
        self.lengths: list[np.ndarray] = []

    def append(self, writer: StoreWriter, texts: Sequence[str]) -> None:
        rows, lengths = self.tokenizer.encode_counted([self.prefix + text for text in texts], self.length)
        writer.append_ragged(f"{self.name}_tokens", rows, self.dtype)
        writer.append_ragged(f"{self.name}_text", [np.frombuffer(text.encode(), np.uint8) for text in texts])
        writer.append(f"{self.name}_key", np.array([text_key(text) for text in texts], np.uint64))
        self.lengths.append(lengths.astype(np.int32))
        self.count += len(texts)

    def statistics(self) -> dict[str, float]:
        """Token counts before cutting, special tokens and prefix included, and the share that was cut."""
        lengths = np.concatenate(self.lengths)
        return {
            "mean": round(float(lengths.mean()), 2),
            "p50": float(np.percentile(lengths, 50)),
            "p95": float(np.percentile(lengths, 95)),
            "truncated": round(float((lengths > self.length).mean()), 4),
        }


class _Negatives:
    """The different negative texts in order of appearance, kept on disk until the positives are written."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.rows: list[np.ndarray] = []
        self.numbers: dict[int, int] = {}
        self.file: io.FileIO

    def __enter__(self) -> "_Negatives":
        parent = self.directory.absolute().parent
        self.file = tempfile.TemporaryFile(dir=parent, buffering=0)  # it has no name: a kill frees it
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def add(self, pairs: Sequence[Pair]) -> None:
        fresh = []
        for pair in pairs:
            row = []
            for text in pair.negatives:
                key = text_key(text)
                if key not in self.numbers:
                    self.numbers[key] = len(self.numbers)
                    fresh.append(json.dumps(text) + "\n")
                row.append(self.numbers[key])
            self.rows.append(np.array(list(dict.fromkeys(row)), np.int64))  # in the data's order: hardest first
        try:
            write_all(self.file, "".join(fresh).encode())
        except OSError as error:
            raise explained(error, self.directory) from error

    def texts(self) -> Iterator[list[str]]:
        """All of them, in blocks."""
        self.file.seek(0)
        with io.BufferedReader(self.file) as reader:
            while block := list(islice(reader, _BLOCK)):
                yield [json.loads(line) for line in block]


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
