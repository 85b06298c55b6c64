"""Centring: what all queries, and all documents, of a corpus have in common tells none of them apart; it is taken away.

Queries and documents differ as kinds of text, so each have a centre of their own: by one for both, an encoder gained
little more than a third as much (benchmarks/results/centre_cpu.jsonl).
"""

import re
from collections.abc import Sequence
from itertools import islice

import numpy as np
from jaxtyping import Float

SHARE = 0.75  # of a centre that is taken away; all of it gained no more (benchmarks/results/centre_cpu.jsonl)
SIZE = 512  # documents that a centre is of
WORDS = 12  # of a document's beginning, about as many as a query has
PLAIN = re.compile(r"\W*([^\W\d_]+(?:[-'’][^\W\d_]+)*)\W*")  # letters, with punctuation around them
LETTERS = 100  # … at most, where a text has no spaces

BEGINNINGS_STREAM = 53  # keeps this sample apart from the others of an embedder's seed


def centre(vectors: Float[np.ndarray, "n D"]) -> Float[np.ndarray, " D"]:
    """The mean of unit vectors, float32."""
    return vectors.mean(axis=0, dtype=np.float64).astype(np.float32)


def centred(
    vectors: Float[np.ndarray, "n D"], of: Float[np.ndarray, " D"], share: float = SHARE
) -> Float[np.ndarray, "n D"]:
    """Unit vectors less a share of their kind's centre, as unit vectors again, float32."""
    moved = vectors - np.float32(share) * of
    return moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), np.float32(1e-12))


def beginnings(corpus: Sequence[str], seed: int = 0, size: int = SIZE) -> list[str]:
    """The first plain words of min(size, len(corpus)) documents drawn by `seed`, in the corpus' order.

    They stand in for queries that nobody has yet, as `queries` of `Embedder.embed_context`: they gave six tenths
    of what real ones gave on ten sets, a third on docstrings (benchmarks/results/centre_cpu.jsonl). Only words of
    letters count: names with dots and code are no part of most queries, and with them docstrings lost. A text without
    a plain word gives its first words as they are.
    """
    random = np.random.default_rng([seed, BEGINNINGS_STREAM])
    drawn = np.sort(random.choice(len(corpus), min(size, len(corpus)), replace=False))
    return [_beginning(corpus[i].split()) for i in drawn.tolist()]


def _beginning(words: list[str]) -> str:
    plain = (match[1] for match in map(PLAIN.fullmatch, words) if match)
    return " ".join(list(islice(plain, WORDS)) or words[:WORDS])[:LETTERS]
