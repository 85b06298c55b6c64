"""ConTEB (arXiv 2505.24782): queries whose answer is a chunk that must be read in its document.

A set is a folder in its data form: Parquet files in `documents` (chunk_id "DOC_i", chunk) and `queries` (query, and
chunk_id or chunk_ids), as on the Hub. Each query is scored against all chunks by inner product; NDCG@10.
"""

from collections.abc import Collection, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cde_jax.data.files import given_path
from cde_jax.data.sources.beir import EvaluationSet
from cde_jax.data.sources.huggingface import parquet_rows
from cde_jax.data.store import unit_rows
from cde_jax.evaluation.beir import filled, rank, rank_by_vectors
from cde_jax.evaluation.metrics import Run
from cde_jax.retrieval.embedder import Embedder
from cde_jax.retrieval.encode import Tokens, padded_lengths

# Kinds of context beside those of `beir.rank`: each document's chunks, and late chunking.
DOCUMENT, LATE = "own document", "late chunking"


def read(folder: str | Path) -> EvaluationSet:
    """A set whose corpus is the chunks by id, those of a document together and in order.

    Raises ValueError for missing files and columns, ids of another form, and queries that name unknown chunks.
    """
    folder, corpus = given_path(folder, "ConTEB set"), {}
    for row in _rows(folder, "documents", ("chunk_id", "chunk")):
        document, _, number = row["chunk_id"].rpartition("_")
        if not document or not number.isdecimal() or row["chunk_id"] in corpus:
            raise ValueError(f"{folder}: expected each chunk_id once, as DOCUMENT_NUMBER, got {row['chunk_id']!r}")
        corpus[row["chunk_id"]] = row["chunk"]
    order = sorted(corpus, key=lambda name: (_document(name), int(name.rpartition("_")[2])))
    queries, qrels = {}, {}
    for number, row in enumerate(_rows(folder, "queries", ("query", "chunk_id"), ("query", "chunk_ids"))):
        relevant = row["chunk_ids"] if "chunk_ids" in row else [row["chunk_id"]]
        if unknown := [name for name in relevant if name not in corpus]:
            raise ValueError(f"{folder}: query {number} names the chunk {unknown[0]!r}, which is in no document")
        queries[f"q{number}"], qrels[f"q{number}"] = row["query"], dict.fromkeys(relevant, 1)
    return EvaluationSet(folder.resolve().name, queries, {name: corpus[name] for name in order}, qrels)


def rank_chunks(
    embedder: Embedder, dataset: EvaluationSet, other: list[str], seed: int, k: int, kinds: Collection[str]
) -> dict[str, Run]:
    """The k best chunks of every query by kind of context: those of `beir.rank`, `DOCUMENT` and `LATE`.

    With `DOCUMENT`, the chunks of a document have each other as context, and queries the corpus; `LATE` is late
    chunking, with queries without context.
    """
    queries, runs = list(dataset.queries.values()), rank(embedder, [dataset], other, seed, k, kinds)[dataset.name]
    documents = [[dataset.corpus[name] for name in names] for _, names in groupby(dataset.corpus, _document)]
    if DOCUMENT in kinds and embedder.contextual:
        context = embedder.embed_context(list(dataset.corpus.values()), seed)
        vectors = embedder.encode_queries(queries, context), np.concatenate(embed_chunks(embedder, documents, seed))
        runs[DOCUMENT] = rank_by_vectors(dataset, *vectors, k)
    if LATE in kinds:
        runs[LATE] = rank_by_vectors(dataset, embedder.encode_queries(queries), late_chunks(embedder, documents), k)
    return runs


def embed_chunks(
    embedder: Embedder, documents: Sequence[Sequence[str]], seed: int = 0
) -> list[Float[np.ndarray, "_ D"]]:
    """Vectors of each document's chunks, with the document's chunks as context."""
    contexts = (embedder.embed_context(filled(embedder, chunks), seed) for chunks in documents)
    return [embedder.encode_documents(chunks, context) for chunks, context in zip(documents, contexts, strict=True)]


def late_chunks(embedder: Embedder, documents: Sequence[Sequence[str]]) -> Float[np.ndarray, "n D"]:
    """Late chunking (arXiv 2409.04701): a chunk's vector is the mean of its tokens' hidden states in its document.

    A document longer than the embedder's document length is cut into windows of whole chunks, a chunk longer than that
    at its end. A contextual model has null slots.
    """
    backend, s = embedder.tokenizer.backend, embedder.settings
    start, *end = backend.encode("").ids
    start = [start, *backend.encode(s.document_prefix, add_special_tokens=False).ids]
    room, windows = s.document_length - len(start) - len(end), []
    for chunks in documents:
        size = room + 1  # no window goes on from one document to the next
        for encoding in backend.encode_batch_fast(list(chunks), add_special_tokens=False):
            tokens = encoding.ids[:room]
            if size + len(tokens) > room:
                windows.append([])
                size = 0
            windows[-1].append(tokens)
            size += len(tokens)
    model, vectors = embedder.model, []
    for window in windows:
        ids: Tokens = [np.array([*start, *chain(*window), *end], np.int32)]
        length = next(n for n in padded_lengths(s.document_length) if n >= len(ids[0]))
        row = np.pad(ids[0], (0, length - len(ids[0])))[None]
        hidden = np.asarray(_hidden(model, row, np.arange(length)[None] < len(ids[0])), np.float32)[0]
        ends = len(start) + np.cumsum([len(tokens) for tokens in window])
        vectors += [hidden[b - len(t) : b].sum(axis=0) / max(len(t), 1) for b, t in zip(ends, window, strict=True)]
    return unit_rows(np.asarray(model.output(jnp.asarray(np.stack(vectors)))))


@nnx.jit
def _hidden(model: Any, ids: Int[Array, "1 L"], mask: Bool[Array, "1 L"]) -> Float[Array, "1 L D"]:
    if not hasattr(model, "prepare_context"):  # a biencoder
        return model.encoder(ids, mask)
    return model.hidden(ids, mask, model.prepare_context(None))[:, -ids.shape[1] :]


def _document(chunk: str) -> str:
    return chunk.rpartition("_")[0]


def _rows(folder: Path, name: str, *choices: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a configuration's Parquet files, of the split "test" where there is one, with the first columns found."""
    files = sorted(folder.glob(f"{name}/test*.parquet")) or sorted(folder.glob(f"{name}/*.parquet"))
    if not files:
        raise ValueError(
            f"{folder}: expected Parquet files in {name}/, found none; copy the data set's repository, for example by "
            f"`hf download illuin-conteb/covid-qa --repo-type dataset --local-dir {folder}`"
        )
    for columns in choices:
        try:
            return [row for file in files for row in parquet_rows(file, columns)]
        except ValueError as error:
            problem = error
    raise problem
