"""The projection of terms to the lexical part of hybrid vectors: learned directions, and a sketch of the rest."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int

from cde_jax.adapters.inputs import check_vectors
from cde_jax.adapters.statistics import BUCKETS, CorpusStatistics, bucket, terms
from cde_jax.data.store import unit_rows

RESIDUAL_SCALE = 0.7, 0.55  # of what these directions leave: of term vectors, of random signs
SIGNS = 4  # a term, of a random projection
STREAM = 71  # random stream id

TermVectors = Callable[[list[str]], Float[np.ndarray, "n E"]]


def random_signs(width: int, seed: int) -> Any:
    """Count sketch: a sparse matrix [BUCKETS, width] with `SIGNS` entries ±1/√SIGNS in random columns of each row."""
    from scipy.sparse import csr_matrix

    if not width:
        return csr_matrix((BUCKETS, 0), dtype=np.float32)
    random = np.random.default_rng([seed, STREAM, width])
    columns = random.integers(width, size=BUCKETS * SIGNS)
    values = random.choice(np.float32([-1, 1]) / np.float32(np.sqrt(SIGNS)), size=BUCKETS * SIGNS)
    return csr_matrix((values, columns, np.arange(BUCKETS + 1) * SIGNS), shape=(BUCKETS, width))


def fit_projection(
    statistics: CorpusStatistics,
    texts: list[str],
    width: int,
    latent_fraction: float,
    term_vectors: TermVectors | None,
    seed: int,
) -> tuple[Int[np.ndarray, " V"], Float32[np.ndarray, "V L"], int]:
    """The buckets of the texts' terms, their rows, and the number of latent columns, which come first."""
    from sklearn.decomposition import TruncatedSVD

    weights = statistics.document_weights(texts)
    used = np.flatnonzero(np.bincount(weights.indices, weights.data, BUCKETS)).astype(np.int32)
    weights = weights[:, used]  # [n, V]
    latent = min(int(width * latent_fraction), *weights.shape)
    basis = np.zeros((len(used), 0), np.float32)
    if latent:
        with np.errstate(divide="ignore", invalid="ignore"):  # documents that are all alike have no variance
            svd = TruncatedSVD(latent, random_state=seed, n_iter=2).fit(weights)
        basis = np.ascontiguousarray(svd.components_.T, np.float32)  # [V, latent]
    if term_vectors is None:
        vectors, scale = random_signs(width - latent, seed)[used].toarray(), RESIDUAL_SCALE[1]
    else:
        vectors, scale = _whitened_terms(used, texts, weights, term_vectors), RESIDUAL_SCALE[0]
    rest = vectors - basis @ (basis.T @ vectors)
    if rest.shape[1] > width - latent:  # keep its directions of largest variance in documents
        projected = weights @ rest  # [n, E]
        rest = rest @ np.linalg.eigh(projected.T @ projected)[1][:, rest.shape[1] - width + latent :]
    rest = np.pad(rest, ((0, 0), (0, width - latent - rest.shape[1])))
    return used, np.concatenate([basis, np.float32(scale) * rest], axis=1, dtype=np.float32), latent


def _whitened_terms(
    used: Int[np.ndarray, " V"], texts: list[str], weights: Any, term_vectors: TermVectors
) -> Float32[np.ndarray, "V E"]:
    """Unit vectors of the terms of `texts`, whitened under the number of texts that have each."""
    words = {bucket(word): word for text in texts for word in terms(text)}
    vectors = check_vectors("term_vectors", term_vectors([words[b] for b in used.tolist()])).astype(np.float64)
    if len(vectors) != len(used):
        raise ValueError(f"term_vectors: expected one vector a word, got {len(vectors)} for {len(used)} words")
    counts = np.asarray((weights > 0).sum(axis=0), np.float64).ravel()  # [V]
    vectors -= np.average(vectors, axis=0, weights=counts)
    variances, directions = np.linalg.eigh((vectors.T * counts) @ vectors / counts.sum())
    vectors = vectors @ directions / np.sqrt(np.maximum(variances, 1e-6 * variances[-1]))
    return unit_rows(vectors).astype(np.float32)
