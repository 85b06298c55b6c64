"""Texts of many lengths as few static shapes: which texts share a batch, and how it is padded."""

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Int, Int32

SHORTEST = 16  # tokens; padded lengths are 16, 32, 64, … and the longest allowed
# A batch is as large as pays on the device, counted in tokens; what is left of a length goes in small batches, so
# that one query costs eight short rows and not a batch of hundreds.
TOKENS_PER_BATCH = {"cpu": 2048, "other": 32_768}
SMALL_BATCH, LARGEST_BATCH = 8, 1024


def padded_lengths(longest: int) -> tuple[int, ...]:
    """The padded lengths: 16, 32, 64, … and `longest` itself."""
    doubling = (SHORTEST << i for i in range(longest.bit_length()))
    return (*(n for n in doubling if n < longest), longest)


def full_batch(length: int, *, slots: int) -> int:
    """The static batch size of a padded length: a power of two that fits the device's tokens per batch."""
    tokens = TOKENS_PER_BATCH["cpu" if jax.default_backend() == "cpu" else "other"]
    fitting = max(SMALL_BATCH, min(LARGEST_BATCH, tokens // (length + slots)))
    return 1 << (fitting.bit_length() - 1)


def batches(
    sizes: Int[np.ndarray, " n"], lengths: Sequence[int], full_batch: Callable[[int], int]
) -> Iterator[tuple[Int[np.ndarray, " b"], int, int]]:
    """Which rows go together, in what batch size and padded length: full batches, the rest in small ones.

    A rest of more than half a full batch is one full batch too: its empty rows cost less than many small ones.
    """
    bucket = np.searchsorted(lengths, sizes)  # the shortest length that holds the text
    for b in np.unique(bucket):
        rows = np.flatnonzero(bucket == b)
        full = full_batch(lengths[b])
        while len(rows):
            size = full if 2 * len(rows) > full else SMALL_BATCH
            yield rows[:size], size, int(lengths[b])
            rows = rows[size:]


def padded(
    tokens: list[np.ndarray], size: int, length: int, pad_id: int
) -> tuple[Int32[np.ndarray, "size length"], Bool[np.ndarray, "size length"]]:
    """Ids and mask of a batch; rows beyond the texts repeat the first one, so that no row is empty."""
    ids = np.full((size, length), pad_id, np.int32)
    mask = np.zeros((size, length), bool)
    for i, row in enumerate(tokens):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = True
    ids[len(tokens) :], mask[len(tokens) :] = ids[0], mask[0]
    return ids, mask
