"""The sample of documents that a plan batch reads as its context."""

import numpy as np
from jaxtyping import Int64

SOURCES = ("batch", "domain", "mixed")


def sample(
    source: str,
    count: int,
    batch: Int64[np.ndarray, " m"] | None,
    domain: Int64[np.ndarray, " n"] | None,
    random: np.random.Generator,
) -> Int64[np.ndarray, " drawn"]:
    """Up to `count` documents without replacement, from those of the batch, of its domain, or from both.

    batch, domain: documents, none twice; None where the source does not need them. "mixed" draws the first
    ⌊count / 2⌋ from the batch, and the rest from what else the domain has. Time does not grow with the domain.
    """
    if source == "domain":
        return random.choice(domain, min(count, len(domain)), replace=False)
    if source == "batch":
        return random.choice(batch, min(count, len(batch)), replace=False)
    first = random.choice(batch, min(count // 2, len(batch)), replace=False)
    # So many that enough are left without those drawn already; they come in random order.
    rest = random.choice(domain, min(count, len(domain)), replace=False)
    return np.concatenate([first, rest[~np.isin(rest, first)][: count - len(first)]])
