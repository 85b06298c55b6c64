"""Which documents of a corpus become its context: chosen by their vectors, in place of the random sample.

Each function takes vectors [n, D] of the corpus (of any encoder), how many to choose, and a seed; it returns
min(size, n) different rows: `embedder.embed_context([corpus[row] for row in rows])`.
"""

import warnings

import numpy as np
from jaxtyping import Float, Int64

from cde_jax.adapters.inputs import check_integer, check_vectors
from cde_jax.data.store import unit_rows

STREAM = 71  # random stream id
MOST = 4096  # documents that are compared with each other; of a larger corpus a sample

Vectors = Float[np.ndarray, "n D"]
Rows = Int64[np.ndarray, " m"]


def random_rows(vectors: Vectors, size: int, seed: int = 0) -> Rows:
    """A sample without replacement."""
    return _sample(vectors, size, seed)[0][:size]


def medoids(vectors: Vectors, size: int, seed: int = 0) -> Rows:
    """The document nearest to each centroid of k-means with `size` clusters: every topic has one."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    rows, sample = _sample(vectors, size, seed)
    k = min(size, len(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different documents than clusters
        fitted = KMeans(k, n_init=1, random_state=seed).fit(sample)
    order = np.lexsort((fitted.transform(sample).min(axis=1), fitted.labels_))
    nearest = order[np.unique(fitted.labels_[order], return_index=True)[1]]
    rest = np.setdiff1d(order, nearest)[: k - len(nearest)]  # empty clusters have no medoid
    return rows[np.concatenate([nearest, rest])]


def facility_location(vectors: Vectors, size: int, seed: int = 0) -> Rows:
    """Greedy: the next document most raises Σ_i max_{j chosen} max(0, cos(i, j)), how well all are covered.

    The sum is submodular, so that it is within 1 − 1/e of the best.
    """
    rows, sample = _sample(vectors, size, seed)
    similarity = np.maximum(sample @ sample.T, 0)
    covered, chosen = np.zeros(len(rows), np.float32), []
    for _ in range(min(size, len(rows))):
        gains = np.maximum(similarity - covered, 0).sum(axis=1)
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
        covered = np.maximum(covered, similarity[chosen[-1]])
    return rows[chosen]


def most_central(vectors: Vectors, size: int, seed: int = 0) -> Rows:
    """The documents of greatest mean cosine with the others."""
    rows, sample = _sample(vectors, size, seed)
    return rows[np.argsort(-(sample @ sample.mean(axis=0)), kind="stable")[:size]]


CHOICES = {
    "random": random_rows,
    "k-means medoids": medoids,
    "facility location": facility_location,
    "most central": most_central,
}


def _sample(vectors: Vectors, size: int, seed: int) -> tuple[Rows, Float[np.ndarray, "m D"]]:
    """At most max(MOST, size) rows in random order, and their unit vectors. Raises ValueError for other input."""
    vectors = check_vectors("vectors", vectors)
    size, seed = check_integer("size, the documents to choose", size, 1), check_integer("seed", seed, 0)
    rows = np.random.default_rng([seed, STREAM]).permutation(len(vectors))[: max(MOST, size)]
    return rows, unit_rows(vectors[rows].astype(np.float32))
