"""The contrastive loss (paper, equations 1 and 4) and its metrics; pure functions in float32."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def info_nce(
    queries: Float[Array | np.ndarray, "B D"],
    documents: Float[Array | np.ndarray, "N D"],
    keep: Bool[Array | np.ndarray, "B N"] | None,
    temperature: float | Float[Array, ""],
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Masked InfoNCE over cosine scores: the mean over queries of −log softmax of the positive.

    Vectors of any dtype are normalised in here; scores are cosine / τ. Document i < B is query i's positive, the rest
    are hard negatives. `keep` is False where a column must not count as a negative (a false negative, paper eq. 4); the
    positive always counts; None keeps all.

    Returns the loss and metrics, float32 scalars: `accuracy` (share of queries whose positive scores highest among the
    columns that count), `positive` and `negative` (mean cosine), `masked` (share of negatives left out).
    """
    count = queries.shape[0]
    # Accelerators multiply float32 in fewer bits unless told otherwise, here and in the gradient: 0.5 % of it.
    highest = jax.lax.Precision.HIGHEST
    cosine = jnp.matmul(normalise(queries), normalise(documents).T, precision=highest)  # [B, N]
    own = jnp.eye(count, documents.shape[0], dtype=bool)
    counted = jnp.ones_like(own) if keep is None else own | keep
    logits = jnp.where(counted, cosine / temperature, -jnp.inf)
    positive = jnp.diagonal(logits)
    loss = jnp.mean(jax.nn.logsumexp(logits, axis=1) - positive)
    negatives = counted & ~own
    of_negatives = jnp.maximum(negatives.sum(), 1)
    metrics = {
        "accuracy": jnp.mean(positive >= logits.max(axis=1)),
        "positive": jnp.mean(jnp.diagonal(cosine)),
        "negative": jnp.sum(jnp.where(negatives, cosine, 0.0)) / of_negatives,
        "masked": 1 - negatives.sum() / jnp.maximum((~own).sum(), 1),
    }
    return loss, {name: value.astype(jnp.float32) for name, value in metrics.items()}


def matryoshka_info_nce(
    queries: Float[Array | np.ndarray, "B D"],
    documents: Float[Array | np.ndarray, "N D"],
    keep: Bool[Array | np.ndarray, "B N"] | None,
    temperature: float | Float[Array, ""],
    dimensions: Sequence[int] = (),
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean `info_nce` of the first d dimensions for each d of `dimensions`, and of all D; metrics of all D alone.

    It makes the first d dimensions of a vector a vector of their own (Kusupati et al., arXiv 2205.13147).
    """
    losses = [info_nce(queries[:, :d], documents[:, :d], keep, temperature)[0] for d in dimensions]
    loss, metrics = info_nce(queries, documents, keep, temperature)
    return sum(losses, loss) / (1 + len(losses)), metrics


def normalise(vectors: Float[Array | np.ndarray, "*B D"]) -> Float[Array, "*B D"]:
    """Unit vectors in float32; a zero vector (shorter than 1e-12) becomes zero, with no gradient."""
    vectors = vectors.astype(jnp.float32)
    square = jnp.sum(vectors**2, axis=-1, keepdims=True)
    zero = square <= 1e-24  # where the derivative of rsqrt leaves float32; not true of NaN, which must be seen
    return jnp.where(zero, 0.0, vectors * jax.lax.rsqrt(jnp.where(zero, 1.0, square)))
