"""`Embedder`: texts → vectors, with a `Context` sampled from their corpus (paper, section 4)."""

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Integer

from cde_jax.adapters.adder import Adapter
from cde_jax.adapters.hybrid import HybridVectors
from cde_jax.adapters.inputs import check_integer
from cde_jax.adapters.statistics import CorpusStatistics
from cde_jax.adapters.whitening import SAMPLE_SIZE, Whitening, pseudo_queries, whitening
from cde_jax.data.files import fingerprint
from cde_jax.data.tokens import Tokenizer, as_list
from cde_jax.interop.modules import TextSettings
from cde_jax.interop.read import check_vocabulary
from cde_jax.models.attention import Prefix
from cde_jax.models.contextual import Biencoder, ContextCache, ContextualConfig, ContextualEncoder
from cde_jax.retrieval.context import Context, digest
from cde_jax.retrieval.encode import Tokens, as_texts, checked, encode, in_blocks, joined, padded_lengths
from cde_jax.training.accounting import encoding_flops
from cde_jax.training.sharding import local_mesh, map_rows, replicate

__all__ = ["Context", "Embedder"]

WHITENING_STREAM = 52  # random stream id of the documents that a whitening is fitted on
Side = Literal["queries", "documents"]
Texts = Iterable[str] | Iterable[Integer[np.ndarray, "_"]]  # strings, or token ids with prefix and special tokens


class Embedder:
    """A model, its tokenizer and its text settings: texts → float32 unit vectors.

    Texts may be given as token ids too: a list of 1-d integer arrays with prefix and special tokens; `tokenizer` may be
    None where only those are. `model` is taken as it is now: after more training make a new Embedder. Runs on all local
    devices, or the `devices` given: each has the weights, and its part of every batch. `progress=False` shows no
    progress bar.

    With `statistics` of a corpus, `embed_context` makes contexts under which all vectors have a lexical part beside the
    dense one (`HybridVectors`) and the width 2 D. An `adapter` acts on all vectors, after whitening and before the
    lexical part; one that was fitted on other weights, or under another context, is refused.
    """

    def __init__(
        self,
        model: ContextualEncoder | Biencoder,
        tokenizer: Tokenizer | None,
        settings: TextSettings,
        tokenizer_directory: str | Path | None = None,
        *,
        progress: bool = True,
        statistics: CorpusStatistics | None = None,
        adapter: Adapter | None = None,
        devices: Sequence[jax.Device] | None = None,
    ):
        self.config = c = model.config
        self.statistics, self.adapter = statistics, adapter
        self.tokenizer = tokenizer
        self.settings = settings
        self.tokenizer_directory = tokenizer_directory and Path(tokenizer_directory)
        self.contextual = isinstance(c, ContextualConfig)  # reads a context; a biencoder does not
        self.context_size = c.context_size if self.contextual else 0  # J, documents that `embed_context` embeds
        self.works_without_context = not self.contextual or c.null_embedding  # whether `context=None` is possible
        self.width = (not self.contextual and c.head and c.output_width) or c.encoder.width  # D, of the vectors
        self.dimensions = (*c.matryoshka, self.width)  # that the model was trained for: vectors may be cut to these
        self._check_tables()
        self._graph, state = nnx.split(model)
        self._mesh = local_mesh(devices)
        self._state = replicate(self._mesh, state)
        self._caches: WeakKeyDictionary[Context, ContextCache] = WeakKeyDictionary()
        self._null_context = Context(np.zeros((0, self.width), np.float32), 0, 0, "", "")
        options = {"vocab_size": c.encoder.vocab_size, "devices": self._mesh.size, "progress": progress}
        length = settings.document_length
        options["token_flops"] = float(encoding_flops(c, np.array([length]))) / length
        self._run = partial(encode, tokenizer=tokenizer, **options)
        if adapter is not None:
            self._check_fitted(adapter, "weights", self.weights)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        numerics: str | None = None,
        *,
        progress: bool = True,
        statistics: CorpusStatistics | None = None,
        adapter: Adapter | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> "Embedder":
        """Load an export of this package, a directory laid out like cde-small-v1, or a hub name.

        `numerics` says how published weights are run (see `interop.read.load_model`).
        Raises ValueError where something is missing or does not fit.
        """
        from cde_jax.interop.read import load_pretrained

        if not isinstance(name_or_path, str | Path) or not str(name_or_path).strip():
            raise ValueError(f"expected a model directory or a hub name, got {name_or_path!r}")
        model, directory, settings = load_pretrained(name_or_path, numerics)
        options = {"progress": progress, "statistics": statistics, "adapter": adapter, "devices": devices}
        return cls(model, Tokenizer.load(directory), settings, directory, **options)

    def save_pretrained(self, directory: str | Path, card: str | None = None) -> None:
        """Write a directory that `from_pretrained` loads; `card` is the text of its README."""
        from cde_jax.interop.write import save_pretrained

        options = {"tokenizer": self.tokenizer_directory, "settings": self.settings}
        save_pretrained(self.model, Path(directory), card=card, **options)

    def export_corpus(
        self, context: Context | None, directory: str | Path, card: str | None = None, *, onnx: bool = True
    ) -> None:
        """Write a model of one input with `context` as constants, for PyTorch and ONNX."""
        from cde_jax.interop.write import export_corpus

        if not self.contextual:
            raise ValueError("a biencoder reads no context: save_pretrained writes a one-input model")
        parts = (self.adapter, *((context.whitening, context.hybrid) if context is not None else ()))
        if any(part is not None for part in parts):
            raise ValueError(
                "a one-input model cannot tell queries from documents: it takes no adapter, and a context that was "
                "embedded without queries and statistics"
            )
        options = {"tokenizer": self.tokenizer_directory, "settings": self.settings}
        export_corpus(self.model, self._cache(context), directory, card=card, onnx=onnx, **options)

    @property
    def model(self) -> ContextualEncoder | Biencoder:
        """The module, with this embedder's parameters."""
        return nnx.merge(self._graph, self._state)

    @cached_property
    def weights(self) -> str:
        """Fingerprint of the weights: sha256 (hex) of path, dtype, shape and bytes of each parameter."""
        parameters = nnx.to_flat_state(nnx.state(self._state, nnx.Param))
        return digest({".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in parameters})

    def term_vectors(self, words: list[str]) -> Float[np.ndarray, "n D"]:
        """Mean token embeddings of single words, without prefix and special tokens; for `HybridVectors.fit`."""
        if self.tokenizer is None:
            raise ValueError("term_vectors needs a tokenizer; load the embedder with from_pretrained")
        table = np.asarray(self.model.encoder.word.embedding[...], np.float32)
        rows = self.tokenizer.backend.encode_batch_fast(words, add_special_tokens=False)
        return np.stack([table[row.ids or [self.tokenizer.pad_id]].mean(axis=0) for row in rows])

    def embed_context(
        self,
        corpus: Texts,
        seed: int = 0,
        queries: Texts | None = None,
        statistics: CorpusStatistics | None = None,
        texts: Sequence[str] | None = None,
    ) -> Context:
        """Embed a sample of the corpus, min(J, len(corpus)) documents, as the context of its queries and documents.

        With fewer than J documents the other slots are null slots. With `queries`, some dozens that people ask of this
        corpus (their answers are not needed), vectors are whitened (`cde_jax.whitening`), by these and a second sample
        of documents; where there are none yet, use `cde_jax.pseudo_queries(corpus)`. With `statistics` (by default the
        embedder's), vectors have a lexical part beside the dense one and width 2 D (`cde_jax.HybridVectors`); it reads
        the words of `texts`, the corpus itself unless that is given as token ids. The context of a biencoder is these
        two alone.

        Raises ValueError for a corpus or queries without text, a biencoder without queries and statistics, statistics
        without texts, and too few documents for weights without a null embedding.
        """
        statistics = self.statistics if statistics is None else statistics
        if not self.contextual and queries is None and statistics is None:
            raise ValueError(
                "a biencoder reads no context: give queries to whiten by or statistics, or encode without context"
            )
        corpus, seed = as_texts(corpus, "corpus", required=True), check_integer("seed", seed, 0)
        if statistics is not None:
            texts = as_list(corpus if texts is None else texts, "corpus")  # not token ids
            if len(texts) != len(corpus):
                raise ValueError(f"expected one text a document, got {len(texts)} texts and {len(corpus)} documents")
        queries = None if queries is None else as_texts(queries, "queries", required=True)
        if len(corpus) < self.context_size and not self.works_without_context:
            raise ValueError(
                f"these weights have no null embedding, so they need {self.context_size} context documents, got a "
                f"corpus of {len(corpus)}: add documents, or repeat some"
            )
        documents = _sample(corpus, self.context_size, [seed])  # none for a biencoder
        rows = [] if queries is statistics is None else sample_rows(len(corpus), SAMPLE_SIZE, [seed, WHITENING_STREAM])
        fitted = [corpus[i] for i in rows]
        sampled = fingerprint(sorted(x if isinstance(x, str) else x.tolist() for x in documents + fitted))
        context = Context(self._context_vectors(documents), seed, len(corpus), self.weights, sampled)
        cache, parts = self._cache(context), {}
        if cache is not None and cache.prefix is not None:
            parts["cache"] = jax.device_get(cache)
        if fitted:
            asked = pseudo_queries(texts, seed) if queries is None else queries
            q, d = self._model_vectors(asked, context, "queries"), self._model_vectors(fitted, context, "documents")
            if queries is not None:
                parts["whitening"] = whitening(q, d)
            if statistics is not None:
                q, d = (
                    self._adapted(x, parts.get("whitening"), side) for x, side in ((q, "queries"), (d, "documents"))
                )
                options = {"corpus": texts, "term_vectors": self.tokenizer and self.term_vectors, "seed": seed}
                parts["hybrid"] = HybridVectors.fit(statistics, d, [texts[i] for i in rows], q, **options)
        context = dataclasses.replace(context, **parts)
        if cache is not None:
            self._caches[context] = cache
        return context

    def encode_queries(self, texts: Texts, context: Context | None = None) -> Float[np.ndarray, "n D"]:
        """Query vectors, float32, unit norm, in the order of `texts`; `context=None` means null slots.

        Raises ValueError for anything but a list of texts, for a text without a single token (with most
        tokenizers "" has two), and for a context of other weights.
        """
        return self._encode(as_texts(texts, "queries"), context, "queries")

    def encode_documents(self, texts: Texts, context: Context | None = None) -> Float[np.ndarray, "n D"]:
        """Document vectors, as `encode_queries` with the document prefix and length."""
        return self._encode(as_texts(texts, "documents"), context, "documents")

    def encode_stream(
        self, texts: Texts, context: Context | None = None, *, side: str = "documents"
    ) -> Iterator[Float[np.ndarray, "_ D"]]:
        """As `encode_queries` or `encode_documents`, for texts that do not fit into memory: yields vectors in order.

        Each array has the vectors of the next 16,384 texts a device, the last one of those left; without any text there
        is one of no rows. `texts` are read in another thread, a few blocks of as many ahead, so that memory is bounded.
        """
        if side not in ("queries", "documents"):
            raise ValueError(f"side: expected 'queries' or 'documents', got {side!r}")
        if isinstance(texts, str | bytes | Mapping | Set) or not isinstance(texts, Iterable):
            as_texts(texts, side)  # raises ValueError
        return self._stream(checked(in_blocks(texts, self._mesh.size), side), context, side)

    def _encode(self, texts: list[str] | Tokens, context: Context | None, side: Side) -> Float[np.ndarray, "n _"]:
        blocks = in_blocks(texts, self._mesh.size)
        return joined(self._stream(blocks, context, side, len(texts)), len(texts))

    def _stream(
        self, blocks: Iterable[list[str] | Tokens], context: Context | None, side: Side, total: int | None = None
    ) -> Iterator[Float[np.ndarray, "_ W"]]:
        """Vectors of each block of texts, whitened, adapted, with the lexical part; checks come before the first."""
        if context is not None:
            self._check_context(context)
        if self.adapter is not None:
            self._check_fitted(self.adapter, "context", "" if context is None else context.documents)
        hybrid, whitened = (None, None) if context is None else (context.hybrid, context.whitening)
        if hybrid is None:
            return (self._adapted(x, whitened, side) for x in self._model_stream(blocks, context, side, total))
        transform = hybrid.transform_queries if side == "queries" else hybrid.transform_documents
        waiting: deque[list[str]] = deque()  # texts whose vectors are not there yet
        kept = (waiting.append(as_list(block, side)) or block for block in blocks)  # not token ids
        stream = self._model_stream(kept, context, side, total)
        return (transform(self._adapted(x, whitened, side), waiting.popleft() if len(x) else []) for x in stream)

    def _model_vectors(
        self, texts: list[str] | Tokens, context: Context | None, side: Side
    ) -> Float[np.ndarray, "n D"]:
        return joined(self._model_stream([texts], context, side, len(texts)), len(texts))

    def _model_stream(
        self, blocks: Iterable[list[str] | Tokens], context: Context | None, side: Side, total: int | None
    ) -> Iterator[Float[np.ndarray, "_ D"]]:
        s, cache, of_queries = self.settings, self._cache(context), side == "queries"
        prefix, length = (s.query_prefix, s.query_length) if of_queries else (s.document_prefix, s.document_length)
        embed = partial(_embed, self._graph, self._mesh, self._state, cache)
        # Only joint attention has the slots in the sequence of every text.
        slots = cache.slots.shape[0] if cache is not None and cache.prefix is None else 0
        options = {"slots": slots, "width": self.width, "name": side, "total": total}
        return self._run(blocks, prefix, padded_lengths(length), embed, **options)

    def _adapted(
        self, vectors: Float[np.ndarray, "n D"], whitened: Whitening | None, side: Side
    ) -> Float[np.ndarray, "n D"]:
        """Vectors of the model, whitened and adapted."""
        for step in filter(None, (whitened, self.adapter)):
            vectors = step.transform_queries(vectors) if side == "queries" else step.transform_documents(vectors)
        return vectors

    def _context_vectors(self, documents: list[str] | Tokens) -> Float[np.ndarray, "m D"]:
        """The first stage's vectors of context documents."""
        if not documents:
            return self._null_context.vectors
        s, pieces = self.settings, self.config.first_stage.vectors_per_text
        # Several vectors a document, as the reference has them, are of the text padded to its full length.
        lengths = padded_lengths(s.document_length) if pieces == 1 else (s.document_length,)
        embed = partial(_first_stage, self._graph, self._mesh, self._state)
        options = {"width": pieces * self.width, "name": "context", "total": len(documents)}
        vectors = self._run([documents], s.document_prefix, lengths, embed, **options)
        return joined(vectors, len(documents)).reshape(-1, self.width)

    def _cache(self, context: Context | None) -> ContextCache | None:
        """The second stage's input of a context, computed at its first use; None for a biencoder."""
        if context is not None:
            self._check_context(context)
        if not self.contextual:
            return None
        context = self._null_context if context is None else context
        if context not in self._caches:
            cache = context.cache
            if cache is None:
                missing = max(0, self.config.slots - len(context.vectors))
                vectors = np.pad(context.vectors, ((0, missing), (0, 0)))
                present = np.arange(len(vectors)) < len(context.vectors) if missing else None
                cache = _prepare(self._graph, self._state, vectors, present)
            else:  # saved by an embedder of perhaps another compute dtype
                dtype = jnp.dtype(self.config.second_stage.dtype)
                cache = cache._replace(prefix=Prefix(*(x.astype(dtype) for x in cache.prefix)))
            self._caches[context] = replicate(self._mesh, cache)
        return self._caches[context]

    def _check_context(self, context: Context) -> None:
        if not isinstance(context, Context):
            kind = type(context).__name__
            raise ValueError(f"context: expected what embed_context or Context.load returns, or None, got {kind}")
        if not self.contextual and len(context.vectors):
            raise ValueError("a biencoder reads no context: leave `context` out")
        own, got = (self.weights, self.width), (context.weights, context.vectors.shape[1])
        if got != own:
            raise ValueError(
                f"context: expected one of this embedder's weights and width {own}, got one of other weights {got}; "
                "call embed_context of this embedder"
            )

    def _check_fitted(self, adapter: Adapter, what: str, own: str) -> None:
        """ValueError for an adapter that was fitted on vectors of other weights or another context."""
        if adapter.fingerprints and (fitted := adapter.fingerprints.get(what, "")) != own:
            raise ValueError(
                f"adapter: was fitted on vectors with the {what} {fitted or None!r}, these have {own or None!r}; fit "
                "it on vectors of this embedder"
            )

    def _check_tables(self) -> None:
        """ValueError for ids or positions beyond the model's tables, where look-ups would be clipped silently."""
        c, longest = self.config, max(self.settings.query_length, self.settings.document_length)
        if self.tokenizer:
            check_vocabulary(self.tokenizer.vocab_size, c)
        for encoder in (c.encoder, c.first_stage.encoder) if self.contextual else (c.encoder,):
            if encoder.positions == "learned" and longest > encoder.max_positions:
                raise ValueError(
                    f"texts of {longest} tokens need as many learned positions, the model has {encoder.max_positions}: "
                    "lower query_length and document_length"
                )


def sample_rows(count: int, size: int, seed: list[int]) -> Int[np.ndarray, " m"]:
    """min(size, count) of `count` rows, without replacement; `Embedder.embed_context` draws them with [seed]."""
    return np.random.default_rng(seed).choice(count, min(size, count), replace=False)


def _sample(corpus: list[str] | Tokens, size: int, seed: list[int]) -> list[str] | Tokens:
    return [corpus[i] for i in sample_rows(len(corpus), size, seed)]


@partial(jax.jit, static_argnames=("graph", "mesh"))
def _first_stage(
    graph: Any, mesh: Mesh, state: Any, ids: Int[Array, "B L"], mask: Bool[Array, "B L"]
) -> Float[Array, "B W"]:
    """Context vectors, not normalised: the T vectors of a document side by side, W = T·D."""

    def first_stage(state: Any, ids: Int[Array, "b L"], mask: Bool[Array, "b L"]) -> Float[Array, "b W"]:
        return nnx.merge(graph, state).embed_context(ids, mask).reshape(ids.shape[0], -1)

    return map_rows(mesh, first_stage, copied=1, split=2)(state, ids, mask)


@partial(jax.jit, static_argnames="graph")
def _prepare(graph: Any, state: Any, vectors: Float[Array, "P D"], present: Bool[Array, " P"] | None) -> ContextCache:
    """The second stage's input of a context; null slots where `present` is False."""
    return nnx.merge(graph, state).prepare_context(vectors, present)


@partial(jax.jit, static_argnames=("graph", "mesh"))
def _embed(
    graph: Any, mesh: Mesh, state: Any, cache: ContextCache | None, ids: Int[Array, "B L"], mask: Bool[Array, "B L"]
) -> Float[Array, "B D"]:
    """Unit vectors in float32."""

    def embed(
        state: Any, cache: ContextCache | None, ids: Int[Array, "b L"], mask: Bool[Array, "b L"]
    ) -> Float[Array, "b D"]:
        vectors = nnx.merge(graph, state).embed(ids, mask, cache)
        return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)

    return map_rows(mesh, embed, copied=2, split=2)(state, cache, ids, mask)
