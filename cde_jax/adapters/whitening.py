"""Whitening: what all texts of a corpus have in common tells none of them apart, and counts for less.

Two things are common: a centre, which is taken away, and the directions in which the vectors of a corpus differ most,
which are shortened. Queries and documents, as different kinds of text, have a centre each; the directions are those of
both. In full, whitening would stretch noise as well: this is the softened form, soft-ZCA whitening (arXiv 2411.17538).
"""

import re
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

SIZE = 512  # documents that a whitening is of
SHARE = 0.75  # of a centre that is taken away
STRENGTH = 16.0  # a direction with a sixteenth of all variance is shortened to 1/√2

WORDS = 12  # of a document's beginning, about as many as a query has
PLAIN = re.compile(r"\W*([^\W\d_]+(?:[-'’][^\W\d_]+)*)\W*")  # letters, with punctuation around them
LETTERS = 100  # … at most, where a text has no spaces

BEGINNINGS_STREAM = 53  # keeps this sample apart from the others of an embedder's seed


class Whitening(NamedTuple):
    """What a corpus' vectors have in common, float32. Made by `whitening`."""

    query_centre: Float[np.ndarray, " D"]
    document_centre: Float[np.ndarray, " D"]
    matrix: Float[np.ndarray, "D D"]  # symmetric

    def of_queries(self, vectors: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
        """Unit vectors of queries, whitened: unit vectors again, float32."""
        return _whitened(vectors, self.query_centre, self.matrix)

    def of_documents(self, vectors: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
        """Unit vectors of documents, whitened: unit vectors again, float32."""
        return _whitened(vectors, self.document_centre, self.matrix)


def whitening(
    queries: Float[np.ndarray, "q D"], documents: Float[np.ndarray, "n D"], strength: float = STRENGTH
) -> Whitening:
    """The whitening of a corpus by a sample of its unit vectors, of this or of any other encoder.

    Some dozens of queries and some hundred documents are enough. The matrix is (I + strength · C / tr C)^(−1/2), with C
    the covariance of both kinds about their own means; strength 0 only centres.

    Raises ValueError for no vectors of a kind.
    """
    if not len(queries) or not len(documents):
        raise ValueError(f"expected vectors of queries and documents, got {len(queries)} and {len(documents)}")
    means = [vectors.mean(axis=0, dtype=np.float64) for vectors in (queries, documents)]
    around = np.concatenate([queries - means[0], documents - means[1]])
    shares, directions = np.linalg.eigh(around.T @ around)
    shares = np.maximum(shares, 0) / max(shares.sum(), np.finfo(np.float64).tiny)
    matrix = directions / np.sqrt(1 + strength * shares) @ directions.T
    return Whitening(*(array.astype(np.float32) for array in (*means, matrix)))


def beginnings(corpus: Sequence[str], seed: int = 0, size: int = SIZE) -> list[str]:
    """The first plain words of min(size, len(corpus)) documents drawn by `seed`, in the corpus' order.

    They stand in for queries that nobody has yet, as `queries` of `Embedder.embed_context`. Only words of letters
    count: names with dots and code are no part of most queries, and with them docstrings lost. A text without a plain
    word gives its first words as they are.
    """
    random = np.random.default_rng([seed, BEGINNINGS_STREAM])
    drawn = np.sort(random.choice(len(corpus), min(size, len(corpus)), replace=False))
    return [_beginning(corpus[i].split()) for i in drawn.tolist()]


def _whitened(
    vectors: Float[np.ndarray, "n D"], centre: Float[np.ndarray, " D"], matrix: Float[np.ndarray, "D D"]
) -> Float[np.ndarray, "n D"]:
    moved = (vectors - np.float32(SHARE) * centre) @ matrix
    return moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), np.float32(1e-12))


def _beginning(words: list[str]) -> str:
    plain = (match[1] for match in map(PLAIN.fullmatch, words) if match)
    return " ".join(list(islice(plain, WORDS)) or words[:WORDS])[:LETTERS]
