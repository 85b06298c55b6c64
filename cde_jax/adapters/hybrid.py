"""Hybrid vectors: a dense vector of any encoder beside a lexical one under the term statistics of its corpus.

One vector a text, scored by a plain inner product in any index; the lexical part approximates BM25. Related work:
densified lexical representations (Lin & Lin, 2206.09912), CLEAR (2004.13969), count sketches (Charikar et al., 2002),
and the hybrid search of vector databases, which keeps two indexes and fuses their lists.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int
from safetensors.numpy import save

from cde_jax.adapters.inputs import check_integer, check_vectors, read_tensors
from cde_jax.adapters.projection import RESIDUAL_SCALE, STREAM, TermVectors, fit_projection, random_signs
from cde_jax.adapters.statistics import BUCKETS, CorpusStatistics
from cde_jax.data.files import given_path, write_file
from cde_jax.data.store import unit_rows
from cde_jax.data.tokens import as_list

FORMAT = "cde_jax hybrid vectors 1"
LATENT_FRACTION = 2 / 3  # of the lexical width is for directions learned from the corpus
FIT_DOCUMENTS = 20_000  # at most, that projection and spreads are fitted on
NORM_QUANTILE = 0.999  # of the lexical norms of documents; larger ones are cut

# A query's weight of the lexical part is the smallest of WEIGHTS with at least CAUTION of the largest gain that is
# predicted, linear in (1, `query_features`), in points of NDCG@10. GAIN_MODEL is a ridge regression over the queries of
# ten sets (benchmarks/hybrid.py prints it, and what it gains on a set that it was not fitted on).
WEIGHTS = (0.0, 0.1, 0.15, 0.2, 0.25, 0.3)
LARGER_WEIGHTS = (0.4, 0.5, 0.6)  # that labelled queries may choose too
CAUTION = 0.9
GAIN_MODEL = np.float32([
    [0.0, 0.361, -0.699, -1.688, -3.062, -4.427],
    [0.0, 1.075, 1.554, 2.043, 2.553, 2.842],
    [0.0, -1.664, -0.384, 0.347, 1.290, 2.965],
])  # fmt: skip


@dataclass(frozen=True, eq=False)
class HybridVectors:
    """Dense vectors [n, D] and their texts → unit vectors [n, D + L + 1], whose inner product mixes both scores.

    The score of a query q and a document d is, up to a factor a query, (1 − w)·dense(q, d)/σ + w·lexical(q, d)/λ(q). σ
    is the spread of dense scores over pairs drawn at random, λ(q) that of the query's lexical scores over documents.
    The weight w acts on queries alone, so another weight leaves the index as it is. The last coordinate of documents
    fills them up to norm 1, so that cosine, inner product and Euclidean distance rank alike.
    """

    statistics: CorpusStatistics
    buckets: Int[np.ndarray, " V"]  # that have a row of their own in `projection`, ascending
    projection: Float32[np.ndarray, "V L"]
    signs_from: int  # column where the random signs of all other terms begin
    covariance: Float32[np.ndarray, "W W"]  # of documents' dense and lexical parts side by side, W = D + L
    dense_spread: float  # σ
    largest_norm: float  # of a document's lexical part
    weight: float | None  # of the lexical part; None: each query its own
    seed: int

    @classmethod
    def fit(
        cls,
        statistics: CorpusStatistics,
        vectors: Float[np.ndarray, "n D"],
        documents: Sequence[str],
        query_vectors: Float[np.ndarray, "q D"],
        *,
        corpus: Sequence[str] | None = None,
        width: int | None = None,
        weight: float | None = None,
        term_vectors: TermVectors | None = None,
        latent_fraction: float = LATENT_FRACTION,
        seed: int = 0,
    ) -> "HybridVectors":
        """Fit the projection of terms and the spreads of both scores. No labels are needed.

        vectors, documents: unit vectors and texts of the corpus, or of some hundred documents of it; then `corpus` may
        give more texts to learn the projection from. query_vectors: of some dozens of queries, or of `pseudo_queries`.
        width: of the result, D + L + 1; by default 2 D. weight: of the lexical part, from 0 to 1; None chooses one of
        `WEIGHTS` for each query. term_vectors: single words → their vectors, for example `Embedder.term_vectors`; words
        of like meaning then share weight.

        The first `latent_fraction` of the lexical width is for the largest singular vectors of the matrix of BM25
        weights (latent semantic analysis); the rest holds what they leave of term vectors, or of random signs.
        Raises ValueError for arrays and texts that do not belong together, and for a width of D + 2 or less.
        """
        random = np.random.default_rng([check_integer("seed", seed, 0), STREAM])
        vectors, documents = _check("documents", vectors, documents)
        texts = documents if corpus is None else as_list(corpus, "corpus")
        texts = [texts[i] for i in np.sort(random.permutation(len(texts))[:FIT_DOCUMENTS])]
        rows = np.sort(random.permutation(len(documents))[:FIT_DOCUMENTS])
        vectors, documents = unit_rows(np.asarray(vectors[rows], np.float32)), [documents[i] for i in rows]
        dense = vectors.shape[1]
        query_vectors = check_vectors("query_vectors", query_vectors, dense)
        if not len(documents) or not len(query_vectors):
            raise ValueError(f"expected documents and queries, got {len(documents)} and {len(query_vectors)}")
        if isinstance(latent_fraction, bool) or not 0 <= latent_fraction <= 1:
            raise ValueError(f"latent_fraction: expected a number from 0 to 1, got {latent_fraction!r}")
        width = check_integer("width", 2 * dense if width is None else width, dense + 3) - dense - 1
        buckets, projection, signs_from = fit_projection(statistics, texts, width, latent_fraction, term_vectors, seed)
        none = np.zeros((0, 0), np.float32)
        fitted = cls(statistics, buckets, projection, signs_from, none, 1.0, 1.0, check_weight(weight), seed)
        lexical = fitted._lexical(statistics.document_weights(documents))
        spread = (unit_rows(np.asarray(query_vectors, np.float32)) @ vectors.T).std()
        largest = np.quantile(np.linalg.norm(lexical, axis=1), NORM_QUANTILE)
        return replace(
            fitted,
            covariance=np.cov(np.concatenate([vectors, lexical], axis=1).T, bias=True).astype(np.float32),
            dense_spread=max(float(spread), 1e-6),
            largest_norm=max(float(largest), 1e-6),
        )

    def transform_documents(
        self, vectors: Float[np.ndarray, "n D"], texts: Iterable[str]
    ) -> Float32[np.ndarray, "n _"]:
        """Dense unit vectors and texts of documents → unit vectors."""
        vectors, texts = _check("documents", vectors, texts, self._dense_width)
        lexical = self._lexical(self.statistics.document_weights(texts)) / np.float32(self.largest_norm)
        lexical /= np.maximum(np.linalg.norm(lexical, axis=1, keepdims=True), 1)
        rest = np.sqrt(np.maximum(1 - (lexical**2).sum(axis=1, keepdims=True), 0))
        dense = unit_rows(np.asarray(vectors, np.float32))
        return unit_rows(np.concatenate([dense, lexical, rest], axis=1))

    def transform_queries(self, vectors: Float[np.ndarray, "n D"], texts: Iterable[str]) -> Float32[np.ndarray, "n _"]:
        """Dense unit vectors and texts of queries → unit vectors; a query without known words keeps the dense part."""
        dense, lexical, spreads, features = self._query_parts(vectors, texts)
        weights = choose_weights(features) if self.weight is None else np.full(len(dense), self.weight, np.float32)
        dense = ((1 - weights) / np.float32(self.dense_spread))[:, None] * dense
        lexical = (weights * np.float32(self.largest_norm) / spreads)[:, None] * lexical
        return unit_rows(np.concatenate([dense, lexical, np.zeros_like(dense[:, :1])], axis=1))

    def query_features(self, vectors: Float[np.ndarray, "n D"], texts: Iterable[str]) -> Float32[np.ndarray, "n 2"]:
        """What the weight of a query is chosen by; no labels are needed.

        The logarithm of 1 + its number of known terms, and the correlation of its dense and its lexical scores over
        documents.
        """
        return self._query_parts(vectors, texts)[3]

    def with_weight(self, weight: float | None) -> "HybridVectors":
        """Another weight of the lexical part, in [0, 1], or None; document vectors stay as they are."""
        return replace(self, weight=check_weight(weight))

    def fit_weight(
        self,
        vectors: Float[np.ndarray, "q D"],
        texts: Sequence[str],
        documents: Float[np.ndarray, "n _"],
        positives: Any,
    ) -> "HybridVectors":
        """With the one weight that is best for labelled queries, or each query its own if no other is clearly better.

        vectors, texts: of queries; documents: hybrid vectors of the corpus, as `transform_documents` gives them;
        positives: as of `Adapter.fit`. A weight is clearly better if its NDCG@10 is by more than the standard error of
        the difference: with few labels it seldom is, with 50 it gains (docs/results.md).
        """
        from cde_jax.adapters.adder import as_grades
        from cde_jax.adapters.adder_step import Corpus
        from cde_jax.adapters.adder_training import CUTOFFS, ndcg

        vectors, texts = _check("queries", vectors, texts, self._dense_width)
        documents = check_vectors("documents", documents, self._dense_width + self.projection.shape[1] + 1)
        grades = as_grades(positives, len(vectors), len(documents))
        vectors, texts = vectors[list(grades)], [texts[i] for i in grades]
        corpus, nothing, scores = Corpus(documents), np.full((len(grades), 1), -1), []
        for weight in (weights := (None, *WEIGHTS, *LARGER_WEIGHTS)):
            queries = self.with_weight(weight).transform_queries(vectors, texts)
            best = corpus.hardest({"query": None}, queries, nothing, CUTOFFS[-1], "linear")
            scores.append(ndcg(best, list(grades.values()))[:, -1])
        return self.with_weight(weights[best_choice(np.stack(scores, axis=1))])

    def save(self, path: str | Path) -> None:
        """Write a safetensors file atomically, the statistics included."""
        write_file(given_path(path), save(*self.to_tensors()))

    @classmethod
    def load(cls, path: str | Path) -> "HybridVectors":
        """Read what `save` wrote. Raises ValueError for another file."""
        return cls.from_tensors(*read_tensors(path, FORMAT))

    def to_tensors(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Tensors and metadata of the file that `save` writes."""
        numbers = {name: getattr(self, name) for name in ("signs_from", "dense_spread", "largest_norm", "seed")}
        numbers |= {"documents": self.statistics.documents, "terms": self.statistics.terms}
        numbers |= {} if self.weight is None else {"weight": self.weight}
        tensors = {name: getattr(self, name) for name in ("buckets", "projection", "covariance")}
        tensors["frequencies"] = self.statistics.frequencies
        return tensors, {"format": FORMAT} | {name: repr(value) for name, value in numbers.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> "HybridVectors":
        """The inverse of `to_tensors`."""
        arrays = {name: tensors[name] for name in ("buckets", "projection", "covariance")}
        numbers = {name: int(metadata[name]) for name in ("signs_from", "seed")}
        numbers |= {name: float(metadata[name]) for name in ("dense_spread", "largest_norm")}
        numbers["weight"] = float(metadata["weight"]) if "weight" in metadata else None
        counts = int(metadata["documents"]), int(metadata["terms"])
        return cls(CorpusStatistics(*counts, tensors["frequencies"]), **arrays, **numbers)

    @property
    def _dense_width(self) -> int:
        return len(self.covariance) - self.projection.shape[1]

    def _lexical(self, weights: Any) -> Float32[np.ndarray, "n L"]:
        """Sparse term weights [n, BUCKETS] → the lexical part: learned rows, and signs of terms without one."""
        lexical = np.asarray(weights[:, self.buckets] @ self.projection)
        others, known = weights.copy(), np.zeros(BUCKETS, bool)
        known[self.buckets] = True
        others.data[known[others.indices]] = 0
        signs = random_signs(self.projection.shape[1] - self.signs_from, self.seed)
        lexical[:, self.signs_from :] += RESIDUAL_SCALE[1] * (others @ signs).toarray()
        return lexical

    def _query_parts(
        self, vectors: Float[np.ndarray, "n D"], texts: Iterable[str]
    ) -> tuple[
        Float32[np.ndarray, "n D"], Float32[np.ndarray, "n L"], Float32[np.ndarray, " n"], Float32[np.ndarray, "n 2"]
    ]:
        """Unit dense vectors, lexical parts, spreads of the lexical scores, and the features of `query_features`."""
        vectors, texts = _check("queries", vectors, texts, self._dense_width)
        weights = self.statistics.query_weights(texts)
        dense, lexical = unit_rows(np.asarray(vectors, np.float32)), self._lexical(weights)
        c, d = self.covariance, dense.shape[1]
        variances = [np.einsum("ni,ij,nj->n", a, b, a) for a, b in ((dense, c[:d, :d]), (lexical, c[d:, d:]))]
        spreads = [np.sqrt(np.maximum(variance, 1e-12)) for variance in variances]
        correlation = np.einsum("ni,ij,nj->n", dense, c[:d, d:], lexical) / (spreads[0] * spreads[1])
        features = np.stack([np.log1p(np.diff(weights.indptr)), correlation], axis=1)
        return dense, lexical, spreads[1], features.astype(np.float32)


def choose_weights(features: Float[np.ndarray, "n 2"]) -> Float32[np.ndarray, " n"]:
    """One of `WEIGHTS` for each query, from its features."""
    gains = np.concatenate([np.ones_like(features[:, :1]), features], axis=1) @ GAIN_MODEL  # [n, weights]
    enough = gains >= CAUTION * gains.max(axis=1, keepdims=True)
    return np.float32(WEIGHTS)[enough.argmax(axis=1)]


def best_choice(scores: Float[np.ndarray, "q c"]) -> int:
    """The column of the greatest mean, or 0 unless that is above column 0's by a standard error of the difference."""
    best = int(scores.mean(axis=0).argmax())
    difference = scores[:, best] - scores[:, 0]
    return best if difference.mean() > difference.std(ddof=1) / len(scores) ** 0.5 else 0


def check_weight(weight: float | None) -> float | None:
    """`weight` as a float, or None; a ValueError outside [0, 1]."""
    if weight is None:
        return None
    if isinstance(weight, bool) or not isinstance(weight, int | float | np.number) or not 0 <= weight <= 1:
        raise ValueError(f"weight: expected a number from 0 (dense only) to 1 (terms only), got {weight!r}")
    return float(weight)


def _check(
    name: str, vectors: Float[np.ndarray, "n D"], texts: Iterable[str], width: int | None = None
) -> tuple[Float[np.ndarray, "n D"], list[str]]:
    vectors, texts = check_vectors(name, vectors, width), as_list(texts, name)
    if len(vectors) != len(texts):
        raise ValueError(f"{name}: expected one vector a text, got {len(vectors)} vectors and {len(texts)} texts")
    return vectors, texts
