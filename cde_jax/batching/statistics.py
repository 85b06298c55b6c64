"""Token statistics of a corpus: in how many documents of a sample each token of the vocabulary occurs."""

import numpy as np
from jaxtyping import Float32, Int

from cde_jax.data.store import Ragged


def document_frequencies(
    documents: Ragged, rows: Int[np.ndarray, " n"], length: int, vocab_size: int
) -> Float32[np.ndarray, " vocab_size"]:
    """How rare each token is among n documents, 1 for one in none of them and nearly 0 for one in all.

    f_t = log((n + 1) / (df_t + 1/2)) / log(2(n + 1)), with df_t the number of documents that have token t among their
    first `length`: an inverse document frequency as a share of its largest value, so that samples of different sizes
    can be compared. No document at all gives zeros: nothing is known. Rows of −1 are no documents.

    Raises ValueError for a token id that `vocab_size` has no place for.
    """
    n = int((rows >= 0).sum())
    if not n:
        return np.zeros(vocab_size, np.float32)
    ids, _ = documents.padded(rows, length, fill=-1)
    ids.sort(axis=1)  # equal tokens of a document side by side: each counts once
    counted = ids >= 0
    counted[:, 1:] &= ids[:, 1:] != ids[:, :-1]
    found = np.bincount(ids[counted], minlength=vocab_size)
    if len(found) > vocab_size:
        raise ValueError(
            f"expected token ids below the vocabulary size {vocab_size}, got {len(found) - 1}: give the vocabulary "
            f"size of the model and documents of its own tokenizer"
        )
    shares = np.log((n + 1) / (np.arange(n + 1) + 0.5)) / np.log(2 * (n + 1))
    return shares.astype(np.float32)[found]
