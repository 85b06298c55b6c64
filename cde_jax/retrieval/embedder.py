"""What users hold: `Embedder` (texts → vectors) and `Context` (a sample of the corpus, read once).

Usage and meaning are those of the paper, section 4: the first stage embeds a sample of the corpus that the texts
live in, the second stage reads each text beside those vectors. Texts of similar length share a batch of static
shape, so that few programs are compiled; parameters and context are arguments of those programs, never constants.
"""

import dataclasses
from collections.abc import Iterable
from functools import cached_property, partial
from pathlib import Path
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from cde_jax.adapters.whitening import SIZE, whitening
from cde_jax.data.files import fingerprint
from cde_jax.data.tokens import Tokenizer
from cde_jax.interop.baked import export_corpus
from cde_jax.interop.read import TextSettings, load_pretrained
from cde_jax.interop.write import save_pretrained
from cde_jax.models.attention import Prefix
from cde_jax.models.contextual import Biencoder, ContextCache, ContextualConfig, ContextualEncoder
from cde_jax.retrieval.checks import check_fit, check_texts
from cde_jax.retrieval.context import Context, weights_fingerprint
from cde_jax.retrieval.encode import encode
from cde_jax.retrieval.padding import padded_lengths

__all__ = ["Context", "Embedder"]

WHITENING_STREAM = 52  # keeps the sample that whitening is of apart from that of the context documents


class Embedder:
    """A model, its tokenizer and its text settings: texts in, float32 unit vectors out.

    `model` is taken as it is now, its arrays shared and not copied: after more training make a new Embedder. Runs
    on one device, the first of this process, wherever the model was. `progress=False` never shows a progress bar.
    """

    def __init__(
        self,
        model: ContextualEncoder | Biencoder,
        tokenizer: Tokenizer,
        settings: TextSettings,
        tokenizer_directory: str | Path,
        *,
        progress: bool = True,
    ):
        check_fit(model, tokenizer, settings)
        self.tokenizer = tokenizer
        self.settings = settings
        self.tokenizer_directory = Path(tokenizer_directory)
        self.config = model.config
        self.progress = progress
        graph, state = nnx.split(model)
        self._graph = graph
        self._state = jax.device_put(state, jax.local_devices()[0])
        # Kept as long as the user keeps the context; the null context as long as the embedder.
        self._prepared: WeakKeyDictionary[Context, ContextCache] = WeakKeyDictionary()

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, numerics: str | None = None, *, progress: bool = True
    ) -> "Embedder":
        """Load one of our exports, a directory laid out like cde-small-v1, or a hub name.

        `numerics` says how published weights are run (see `interop.read.load_model`).
        Raises ValueError where something is missing or does not fit.
        """
        found = load_pretrained(name_or_path, numerics)
        tokenizer = Tokenizer.load(found.directory)
        return cls(found.model, tokenizer, found.settings, found.directory, progress=progress)

    def save_pretrained(self, directory: str | Path, card: str | None = None) -> None:
        """Write a directory that `from_pretrained` loads; `card` is the text of its README."""
        save_pretrained(
            self.model, Path(directory), tokenizer=self.tokenizer_directory, settings=self.settings, card=card
        )

    def export_corpus(
        self, context: Context | None, directory: str | Path, card: str | None = None, *, onnx: bool = True
    ) -> None:
        """Write a one-input model with `context` baked in, for PyTorch and ONNX (`interop.baked.export_corpus`)."""
        if not self.contextual:
            raise ValueError("a biencoder reads no context to bake in: save_pretrained writes a one-input model")
        if context is not None and context.whitening is not None:
            raise ValueError(
                "a one-input model cannot tell queries from documents, and this context whitens each by their own "
                "centre: embed the context without queries"
            )
        export_corpus(
            self.model,
            self._prepare(context),
            directory,
            tokenizer=self.tokenizer_directory,
            settings=self.settings,
            card=card,
            onnx=onnx,
        )

    @property
    def model(self) -> ContextualEncoder | Biencoder:
        """The module, with this embedder's parameters."""
        return nnx.merge(self._graph, self._state)

    @property
    def contextual(self) -> bool:
        """Whether the model reads a context; a biencoder does not."""
        return isinstance(self.config, ContextualConfig)

    @property
    def context_size(self) -> int:
        """J, how many documents of a corpus `embed_context` embeds; 0 for a biencoder."""
        return self.config.context_size if self.contextual else 0

    @property
    def works_without_context(self) -> bool:
        """Whether texts can be encoded with `context=None`: false for weights without a null embedding."""
        return not self.context_size or self.config.null_embedding

    @property
    def width(self) -> int:
        """D, the width of the vectors."""
        if self.contextual:
            return self.config.second_stage.width
        return (self.config.head and self.config.output_width) or self.config.encoder.width

    @cached_property
    def weights(self) -> str:
        """Fingerprint of the weights: sha256 (hex) over the sorted parameter paths, shapes and bytes."""
        return weights_fingerprint(self._state)

    def embed_context(self, corpus: Iterable[str], seed: int = 0, queries: Iterable[str] | None = None) -> Context:
        """Embed a sample of the corpus, to be read beside its queries and documents.

        Draws min(J, len(corpus)) documents without replacement (`seed`), each encoded with the document prefix at
        the document length. With fewer than J documents the other slots are null slots.

        `queries`, some dozens that people ask of this corpus (nobody needs to know their answers), have vectors
        whitened (`retrieval.whiten`), by these and a second sample of documents. Where there are none yet,
        `cde_jax.beginnings(corpus)` stands in for them. This is all that a context of a biencoder is.

        Raises ValueError for an empty corpus, no queries in `queries`, a biencoder without them, and too few documents
        for weights without a null embedding.
        """
        corpus, queries = check_texts(corpus), None if queries is None else check_texts(queries)
        self._check_sample(corpus, queries)
        documents = _sample(corpus, self.context_size, [seed])
        typical = _sample(corpus, 0 if queries is None else SIZE, [seed, WHITENING_STREAM])
        about = (seed, len(corpus), self.weights, fingerprint(sorted(documents + typical)))
        context = Context(self._context_vectors(documents), *about)
        prepared = self._computed(context) if self.contextual else None
        if queries is not None:
            vectors = self._encode_queries(queries, prepared), self._encode_documents(typical, prepared)
            context = dataclasses.replace(context, whitening=whitening(*vectors))
        if prepared is not None:
            if prepared.prefix is not None:
                context = dataclasses.replace(context, cache=jax.device_get(prepared))
            self._prepared[context] = prepared
        return context

    def _check_sample(self, corpus: list[str], queries: list[str] | None) -> None:
        """ValueError for what no context can be made of."""
        if not self.contextual and queries is None:
            raise ValueError(
                "a biencoder reads no context: call encode_queries(texts) and encode_documents(texts), give queries "
                "to whiten its vectors by, or load a contextual model"
            )
        if queries is not None and not queries:
            raise ValueError("expected at least one query to whiten by, got none: leave `queries` out")
        if not corpus:
            raise ValueError(
                "expected a corpus of at least one text, got none; without a corpus call encode_queries(texts) "
                "and encode_documents(texts), which use null slots"
            )
        if len(corpus) < self.context_size and not self.works_without_context:
            raise ValueError(
                f"these weights read {self.context_size} context documents and have no null embedding to stand in "
                f"for missing ones, got a corpus of {len(corpus)}: add documents, or repeat some"
            )

    def _context_vectors(self, documents: list[str]) -> Float[np.ndarray, "m D"]:
        """The first stage's vectors."""
        if not documents:
            return np.zeros((0, self.width), np.float32)
        s, pieces = self.settings, self.config.first_stage.tokens_per_document
        # Several vectors a document are pooled from equal stretches of the padded text: its length then matters.
        lengths = padded_lengths(s.document_length) if pieces == 1 else (s.document_length,)
        run = partial(_first_stage, self._graph, self._state)
        about = {"slots": 0, "width": pieces * self.width, "what": "context", "progress": self.progress}
        vectors = encode(documents, s.document_prefix, lengths, run, self.tokenizer, **about)
        return vectors.reshape(-1, self.width)

    def encode_queries(self, texts: Iterable[str], context: Context | None = None) -> Float[np.ndarray, "n D"]:
        """Query vectors, float32, unit norm, in the order of `texts`; `context=None` means null slots.

        Raises ValueError for anything but a list of texts, for a text without a single token (with most
        tokenizers "" has two), and for a context of other weights.
        """
        vectors = self._encode_queries(check_texts(texts), self._prepare(context))
        return vectors if context is None or context.whitening is None else context.whitening.of_queries(vectors)

    def encode_documents(self, texts: Iterable[str], context: Context | None = None) -> Float[np.ndarray, "n D"]:
        """Document vectors, as `encode_queries` with the document prefix and length."""
        vectors = self._encode_documents(check_texts(texts), self._prepare(context))
        return vectors if context is None or context.whitening is None else context.whitening.of_documents(vectors)

    def _encode_queries(self, texts: list[str], cache: ContextCache | None) -> Float[np.ndarray, "n D"]:
        s = self.settings
        return self._encode(texts, s.query_prefix, s.query_length, cache, "queries")

    def _encode_documents(self, texts: list[str], cache: ContextCache | None) -> Float[np.ndarray, "n D"]:
        s = self.settings
        return self._encode(texts, s.document_prefix, s.document_length, cache, "documents")

    def _encode(self, texts, prefix: str, length: int, cache: ContextCache | None, what: str) -> np.ndarray:
        run = partial(_embed, self._graph, self._state, cache=cache)
        # Only joint attention carries the slots along with every text.
        slots = cache.slots.shape[0] if cache is not None and cache.prefix is None else 0
        lengths = padded_lengths(length)
        about = {"slots": slots, "width": self.width, "what": what, "progress": self.progress}
        return encode(texts, prefix, lengths, run, self.tokenizer, **about)

    def _prepare(self, context: Context | None) -> ContextCache | None:
        """What the second stage reads of a context, computed at its first use."""
        if context is None:
            return self._null_context if self.contextual else None
        if not self.contextual and context.whitening is None:
            raise ValueError("a biencoder reads no context: leave `context` out")
        if context.weights != self.weights:
            raise ValueError(
                f"this context was embedded with other weights (fingerprint {context.weights}) than this "
                f"embedder's ({self.weights}): call embed_context(corpus) with this embedder"
            )
        if not self.contextual:
            return None
        if context not in self._prepared:
            self._prepared[context] = self._carried(context) or self._computed(context)
        return self._prepared[context]

    def _carried(self, context: Context) -> ContextCache | None:
        """The cache that came with the context, on our device and in our compute type."""
        if context.cache is None:
            return None
        dtype = jnp.dtype(self.config.second_stage.dtype)
        prefix = Prefix(*(x.astype(dtype) for x in context.cache.prefix))
        cache = ContextCache(context.cache.slots, prefix)
        return jax.device_put(cache, jax.local_devices()[0])

    def _computed(self, context: Context) -> ContextCache:
        vectors, present = context.vectors, None
        if missing := max(0, self.config.slots - len(vectors)):
            vectors = np.pad(vectors, ((0, missing), (0, 0)))
            present = np.arange(len(vectors)) < len(vectors) - missing
        return _prepare(self._graph, self._state, vectors, present)

    @cached_property
    def _null_context(self) -> ContextCache:
        return _prepare(self._graph, self._state, None, None)


def _sample(corpus: list[str], size: int, seed: list[int]) -> list[str]:
    """min(size, len(corpus)) documents, without replacement."""
    drawn = np.random.default_rng(seed).choice(len(corpus), min(size, len(corpus)), replace=False)
    return [corpus[i] for i in drawn]


@partial(jax.jit, static_argnames="graph")
def _first_stage(graph, state, ids, mask):
    """Context vectors [B, T·D], not normalised: T pieces of a document side by side."""
    return nnx.merge(graph, state).embed_context(ids, mask).reshape(ids.shape[0], -1)


@partial(jax.jit, static_argnames="graph")
def _prepare(graph, state, vectors, present):
    """What the second stage reads of a context; null slots where `present` is False, or everywhere without one."""
    model = nnx.merge(graph, state)
    return model.prepare_context(vectors if present is None else model.with_null(vectors, present))


@partial(jax.jit, static_argnames="graph")
def _embed(graph, state, ids, mask, cache):
    """Unit vectors [B, D] in float32."""
    vectors = nnx.merge(graph, state).embed(ids, mask, cache)
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
