"""Soft-ZCA whitening of a corpus (arXiv 2411.17538).

A fraction of the mean of the vectors is subtracted, queries and documents each by their own mean, and directions of
large variance are shortened. Full whitening would amplify the noise of directions with little variance. Related:
spectral powers (2603.19339), nearest-neighbour normalisation (2410.24114), whitening for re-ranking (2209.00218);
`benchmarks/closed_forms.py` compares.
"""

import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from safetensors.numpy import save

from cde_jax.adapters.inputs import check_integer, check_vectors, read_tensors
from cde_jax.data.files import given_path, write_file
from cde_jax.data.store import unit_rows
from cde_jax.data.tokens import as_list

SAMPLE_SIZE = 512  # documents that a whitening is fitted on
MEAN_FRACTION = 0.75  # of the mean that is subtracted
STRENGTH = 16.0  # a direction with 1/16 of the variance is shortened to 1/√2

FORMAT = "cde_jax whitening 1"

PSEUDO_QUERY_STREAM = 53  # random stream id
MAX_WORDS = 12  # of a pseudo query: about as many as a query has
MAX_CHARACTERS = 100  # for texts without spaces
WORD = re.compile(r"\W*([^\W\d_]+(?:[-'’][^\W\d_]+)*)\W*")  # letters, with punctuation around them


class Whitening(NamedTuple):
    """Statistics of a corpus, float32. Made by `fit`, or the function `whitening`."""

    query_mean: Float[np.ndarray, " D"]
    document_mean: Float[np.ndarray, " D"]
    matrix: Float[np.ndarray, "D D"]  # symmetric

    @classmethod
    def fit(
        cls,
        queries: Float[np.ndarray, "q D"],
        documents: Float[np.ndarray, "n D"],
        strength: float = STRENGTH,
    ) -> "Whitening":
        """`whitening` of samples of a corpus' unit vectors."""
        return whitening(queries, documents, strength)

    def to_tables(self) -> dict[str, dict[str, Float[np.ndarray, "..."]]]:
        """As tables K, b and V by side of a residual V (K x + b), the form "low_rank" of `interop.adapter_export`."""
        identity = np.eye(len(self.matrix), dtype=np.float32)
        means = {"query": self.query_mean, "document": self.document_mean}
        return {
            side: {"K": self.matrix - identity, "b": -np.float32(MEAN_FRACTION) * mean @ self.matrix, "V": identity}
            for side, mean in means.items()
        }

    def save(self, path: str | Path) -> None:
        """Write a safetensors file atomically."""
        write_file(given_path(path), save(self._asdict(), {"format": FORMAT}))

    @classmethod
    def load(cls, path: str | Path) -> "Whitening":
        """Read what `save` wrote. Raises ValueError for another file."""
        return cls(**read_tensors(path, FORMAT)[0])

    def transform_queries(self, vectors: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
        """Unit vectors of queries → whitened unit vectors, float32."""
        return self._transform("queries", vectors, self.query_mean)

    def transform_documents(self, vectors: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
        """Unit vectors of documents → whitened unit vectors, float32."""
        return self._transform("documents", vectors, self.document_mean)

    def _transform(
        self, name: str, vectors: Float[np.ndarray, "n D"], mean: Float[np.ndarray, " D"]
    ) -> Float[np.ndarray, "n D"]:
        vectors = check_vectors(name, vectors, len(mean)).astype(np.float32, copy=False)
        whitened = (vectors - np.float32(MEAN_FRACTION) * mean) @ self.matrix
        return unit_rows(whitened)


def whitening(
    queries: Float[np.ndarray, "q D"], documents: Float[np.ndarray, "n D"], strength: float = STRENGTH
) -> Whitening:
    """Fit the whitening of a corpus on samples of its unit vectors, of any encoder.

    Some dozens of queries and some hundred documents are enough. The matrix is (I + strength · C / tr C)^(−1/2), with C
    the covariance of queries and documents about their own means; strength 0 only subtracts means.

    Raises ValueError for no queries or no documents, different widths, NaN or infinity, and a negative strength.
    """
    queries = check_vectors("queries", queries)
    documents = check_vectors("documents", documents, queries.shape[1])
    if not len(queries) or not len(documents):
        raise ValueError(f"expected vectors of queries and documents, got {len(queries)} and {len(documents)}")
    if not isinstance(strength, int | float | np.number) or not 0 <= strength < np.inf:
        raise ValueError(
            f"strength: expected a finite number of 0 or more, got {strength!r}; the default is {STRENGTH}"
        )
    means = [vectors.mean(axis=0, dtype=np.float64) for vectors in (queries, documents)]
    centered = np.concatenate([queries - means[0], documents - means[1]])
    variances, directions = np.linalg.eigh(centered.T @ centered)
    variances = np.maximum(variances, 0) / max(variances.sum(), np.finfo(np.float64).tiny)
    matrix = directions / np.sqrt(1 + strength * variances) @ directions.T
    return Whitening(*(array.astype(np.float32) for array in (*means, matrix)))


def pseudo_queries(corpus: Iterable[str], seed: int = 0, size: int = SAMPLE_SIZE) -> list[str]:
    """The first words of min(size, len(corpus)) documents drawn by `seed`, in the order of the corpus.

    They stand in for queries that nobody has asked yet, as `queries` of `Embedder.embed_context`. Only words of letters
    are taken: most queries have no dotted names or code, and on docstrings whitening was worse with them. A text
    without such a word gives its first words as they are.
    """
    if not isinstance(corpus, Iterable):
        raise ValueError(f"corpus: expected a list of texts, got {type(corpus).__name__}")
    corpus, size = as_list(corpus, "corpus"), check_integer("size", size, 1)
    random = np.random.default_rng([check_integer("seed", seed, 0), PSEUDO_QUERY_STREAM])
    drawn = np.sort(random.choice(len(corpus), min(size, len(corpus)), replace=False))
    return [_first_words(corpus[i].split()) for i in drawn.tolist()]


def _first_words(words: list[str]) -> str:
    letters_only = (match[1] for match in map(WORD.fullmatch, words) if match)
    return " ".join(list(islice(letters_only, MAX_WORDS)) or words[:MAX_WORDS])[:MAX_CHARACTERS]
