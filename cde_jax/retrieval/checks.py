"""What an embedder refuses: texts that are none, and a tokenizer or lengths that do not fit the model."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from cde_jax.data.tokens import Tokenizer
from cde_jax.interop.read import TextSettings
from cde_jax.models.contextual import Biencoder, ContextualEncoder


def check_texts(texts: Any) -> list[str]:
    """The texts as a list; a ValueError for anything but an iterable of strings."""
    if isinstance(texts, str | bytes | Mapping) or not isinstance(texts, Iterable):
        raise ValueError(
            f"expected a list of texts, got one {type(texts).__name__}: put a single text in a list, "
            f"and pass list(corpus.values()) of a mapping"
        )
    texts = list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"expected a list of texts, got {type(text).__name__} at index {i}: {text!r:.80}")
    return texts


def check_tokens(sizes: Int[np.ndarray, " n"], start: int) -> None:
    """A ValueError where a text has no token; `start` is the index of the first text."""
    empty = np.flatnonzero(sizes == 0)
    if len(empty):
        raise ValueError(
            f"{len(empty)} texts have no token at all (first: index {start + empty[0]}), so they have no vector: "
            f"leave empty texts out"
        )


def check_fit(model: ContextualEncoder | Biencoder, tokenizer: Tokenizer, settings: TextSettings) -> None:
    """A wrong tokenizer or length would give wrong vectors without a word: look-ups outside a table are clipped."""
    c = model.config
    encoders = [c.encoder] if isinstance(model, Biencoder) else [c.second_stage]
    if isinstance(model, ContextualEncoder):
        encoders.append(c.first_stage.encoder)
    for encoder in encoders:
        if tokenizer.vocab_size > encoder.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model's table {encoder.vocab_size}: "
                f"give the tokenizer that the model was trained with"
            )
        longest = max(settings.query_length, settings.document_length)
        if encoder.positions == "learned" and longest > encoder.max_positions:
            raise ValueError(
                f"texts of {longest} tokens need as many learned positions, the model has "
                f"{encoder.max_positions}: lower query_length and document_length"
            )
