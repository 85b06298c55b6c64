"""A tiny embedder with a tokenizer, and evaluation sets in BEIR form."""

import functools

from tiny_models import biencoder, contextual
from tiny_run import texts

from cde_jax.data.sources.beir import EvaluationSet
from cde_jax.data.tokens import Tokenizer
from cde_jax.interop.modules import TextSettings
from cde_jax.retrieval.embedder import Embedder

VOCABULARY = 150
SETTINGS = TextSettings(query_prefix="the ", document_prefix="of ", query_length=8, document_length=16)


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train([text for name in ("sea", "sky") for pair in texts(name, 20, seed=0) for text in pair], 150)


def embedder(kind: str = "isolated", **changes) -> Embedder:
    """A contextual embedder of J = 5, or a biencoder; its weights make the context count."""
    shape = {"vocab_size": VOCABULARY}
    if kind == "biencoder":
        return Embedder(biencoder(**shape), tokenizer(), SETTINGS, progress=False)
    return Embedder(contextual(kind, encoder=shape, **changes), tokenizer(), SETTINGS, progress=False)


def evaluation_set(name: str, count: int = 12) -> EvaluationSet:
    pairs = texts(name, count, seed=1)
    queries, corpus = ({f"{kind}{i}": pair[side] for i, pair in enumerate(pairs)} for side, kind in enumerate("qd"))
    return EvaluationSet(name, queries, corpus, {f"q{i}": {f"d{i}": 1} for i in range(count)})
