"""Term statistics of a corpus: what BM25 needs to weigh the terms of a text (Robertson & Zaragoza, 2009).

Terms are hashed, so there is no vocabulary to keep or to merge. A text's weights are sparse rows over the buckets,
scaled so that the inner product of a query's row and a document's is the BM25 score.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt32
from safetensors.numpy import save

from cde_jax.adapters.inputs import read_tensors
from cde_jax.data.files import given_path, write_file
from cde_jax.data.tokens import as_list

BUCKETS = 2**17  # of the hash: 512 KiB of counts
K1, B = 1.2, 0.75  # BM25's saturation of counts and its normalisation by length
FORMAT = "cde_jax corpus statistics 1"

_RUN = re.compile(r"\d+|[^\W\d_]+")  # digits or letters; punctuation and "_" separate
_CASE = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # between the words of camelCase and HTTPServer
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")  # written without spaces


@lru_cache(1)
def _stop_words() -> frozenset[str]:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return ENGLISH_STOP_WORDS


def terms(text: str) -> list[str]:
    """Lower-case words of a text, in its order: identifiers in their parts, CJK in pairs of characters.

    English stop words (scikit-learn's) and single characters are left out.
    """
    words = [word.lower() for run in _RUN.findall(text) for word in _CASE.split(run)]
    pairs = [[w[i : i + 2] for i in range(len(w) - 1)] if _CJK.search(w) else [w] for w in words]
    return [word for parts in pairs for word in parts if len(word) > 1 and word not in _stop_words()]


@lru_cache(2**18)
def bucket(term: str) -> int:
    """The bucket of a term: the same in every process and version."""
    return zlib.crc32(term.encode("utf-8", "surrogatepass")) % BUCKETS


@dataclass(frozen=True, eq=False)
class CorpusStatistics:
    """Document frequencies and mean length of a corpus. Made by `fit`; `update` and `merge` give new statistics."""

    documents: int  # number of documents
    terms: int  # in all documents, repetitions included
    frequencies: UInt32[np.ndarray, " buckets"]  # documents with a term of the bucket

    @classmethod
    def fit(cls, corpus: Iterable[str]) -> "CorpusStatistics":
        """Statistics of documents. Raises ValueError for no documents and for documents without a single term."""
        fitted = cls(0, 0, np.zeros(BUCKETS, np.uint32)).update(corpus)
        if not fitted.terms:
            raise ValueError(f"corpus: expected documents with words, got {fitted.documents} documents without any")
        return fitted

    def update(self, documents: Iterable[str]) -> "CorpusStatistics":
        """With more documents; the same as fitting all at once."""
        count, total, frequencies = self.documents, self.terms, self.frequencies.copy()
        if isinstance(documents, str):
            raise ValueError(f"corpus: expected a list of texts, got a single one, {documents!r:.60}; write [text]")
        for number, text in enumerate(documents):  # may be an iterator over more than memory holds
            if not isinstance(text, str):
                kind = type(text).__name__
                raise ValueError(f"corpus: expected a list of texts, got {kind} as item {number}: {text!r:.60}")
            found = list(map(bucket, terms(text)))
            count, total = count + 1, total + len(found)
            frequencies[list(set(found))] += 1
        return CorpusStatistics(count, total, frequencies)

    def merge(self, other: "CorpusStatistics") -> "CorpusStatistics":
        """Of both corpora together, as if fitted on all documents of two shards."""
        return CorpusStatistics(
            self.documents + other.documents, self.terms + other.terms, self.frequencies + other.frequencies
        )

    @property
    def idf(self) -> Float32[np.ndarray, " buckets"]:
        """Inverse document frequency in Lucene's form, ln(1 + (n − f + ½)/(f + ½)); 0 for terms that nowhere occur."""
        f = self.frequencies.astype(np.float64)
        return np.where(f > 0, np.log1p((self.documents - f + 0.5) / (f + 0.5)), 0).astype(np.float32)

    def drift(self, other: "CorpusStatistics") -> float:
        """How far the term weights of `other`, for example the documents of the last month, are from these.

        Mean absolute difference of the IDF of its terms, relative to their IDF: 0 for the same corpus, 1 for terms that
        are all new. Fit again when it has clearly grown.
        """
        weights, own = other.frequencies * other.idf, self.idf
        difference = other.frequencies * np.abs(np.where(own > 0, own, 0) - other.idf)
        return float(difference.sum(dtype=np.float64) / max(weights.sum(dtype=np.float64), 1e-12))

    def document_weights(self, texts: Iterable[str]) -> Any:
        """Sparse rows [n, buckets], float32: BM25's weight of each term times √IDF."""
        counts, lengths = _counts(as_list(texts, "documents"))
        norms = K1 * (1 - B + B * lengths * self.documents / self.terms)
        counts.data /= counts.data + np.repeat(norms, np.diff(counts.indptr))
        counts.data *= np.sqrt(self.idf)[counts.indices]
        return counts

    def query_weights(self, texts: Iterable[str]) -> Any:
        """Sparse rows [n, buckets], float32: √IDF of each term, once however often it occurs."""
        counts, _ = _counts(as_list(texts, "queries"))
        counts.data = np.sqrt(self.idf)[counts.indices]
        counts.eliminate_zeros()
        return counts

    def save(self, path: str | Path) -> None:
        """Write a safetensors file atomically."""
        metadata = {"format": FORMAT, "documents": str(self.documents), "terms": str(self.terms)}
        write_file(given_path(path), save({"frequencies": self.frequencies}, metadata))

    @classmethod
    def load(cls, path: str | Path) -> "CorpusStatistics":
        """Read what `save` wrote. Raises ValueError for another file."""
        tensors, metadata = read_tensors(path, FORMAT)
        return cls(int(metadata["documents"]), int(metadata["terms"]), tensors["frequencies"])


def _counts(texts: list[str]) -> tuple[Any, Float32[np.ndarray, " n"]]:
    """Counts of terms by bucket, a sparse float32 matrix [n, BUCKETS], and the number of terms of each text."""
    from scipy.sparse import csr_matrix

    counts = [Counter(map(bucket, terms(text))) for text in texts]
    ends = np.cumsum([0, *map(len, counts)])
    indices = np.fromiter((i for c in counts for i in c), np.int32, ends[-1])
    values = np.fromiter((n for c in counts for n in c.values()), np.float32, ends[-1])
    matrix = csr_matrix((values, indices, ends), shape=(len(texts), BUCKETS))
    return matrix, np.array([c.total() for c in counts], np.float32)
