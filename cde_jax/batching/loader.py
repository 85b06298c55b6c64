"""Batches of tokens for the training step: `batch(step)` is a function, so a run is resumed by its step number alone.

It reads memory-mapped arrays and draws from a generator of its own, seeded by the run's seed and the place in the plan.
So threads may call it ahead of time without sharing any state.
"""

import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64

from cde_jax.batching.lengths import Layout, choose_layout, to_chunks
from cde_jax.batching.pack import domain_groups
from cde_jax.batching.plan import BatchPlan
from cde_jax.data.store import Ragged, Store

log = logging.getLogger(__name__)

CONTEXT_STREAM = 31  # separates the draws of context from the other random numbers of the same seed
SOURCES = ("batch", "domain")  # of context documents
NO_DOCUMENT = -1  # a missing context document: all padding, mask all False
MINIMUM = {
    "batches_per_step": 1,
    "context_size": 0,
    "query_length": 1,
    "document_length": 1,
    "seed": 0,
    "text_lengths": 1,
}


@dataclass
class Loader:
    """Training batches of a plan over its pairs' tokens, each plan batch with its context (paper, section 3.2).

    Context documents are drawn without replacement from the batch's own documents (context_source "batch") or from the
    positives of its domain ("domain"); the small domains that share batches count as one.
    """

    plan: BatchPlan
    pairs: Store
    batches_per_step: int  # G
    context_size: int  # J; 0: no context
    context_source: str
    query_length: int  # tokens kept
    document_length: int
    seed: int
    text_lengths: int = 1  # number of padded lengths
    chunk_tokens: int = 0  # of a chunk (`lengths`) of queries and documents; 0: chosen
    context_chunk_tokens: int = 0

    def __post_init__(self):
        for name, smallest in MINIMUM.items():
            if (value := getattr(self, name)) < smallest:
                raise ValueError(f"expected {name} ≥ {smallest}, got {value}; change it in the config")
        if self.context_source not in SOURCES:
            raise ValueError(f"expected context_source {' or '.join(SOURCES)}, got {self.context_source!r}")
        try:
            self.plan.verify(self.pairs.fingerprint, self.plan.manifest["settings"])
        except ValueError as error:
            advice = "texts, prefixes, lengths and the tokenizer all count"
            raise ValueError(f"{error} ({self.pairs.directory}: {advice})") from None
        self._queries, self._documents = self.pairs.ragged("query_tokens"), self.pairs.ragged("document_tokens")

    @cached_property
    def _group_rows(self) -> list[Int64[np.ndarray, " rows"]]:
        """Pairs of each of the plan's groups."""
        names = [domain["name"] for domain in self.pairs.manifest["domains"]]
        groups, _ = domain_groups(self.pairs.array("domain"), names, self.plan.rows.shape[1])
        return [group.rows for group in groups]

    @cached_property
    def layouts(self) -> dict[str, Layout]:
        """Chunks of "texts" and, unless context_size is 0, of "context"; computed by going through the plan once."""
        places = range(len(self.plan))
        layouts = {"texts": choose_layout(lambda: map(self._text_sizes, places), self.text_lengths, self.chunk_tokens)}
        if self.context_size:  # half as many lengths, for these are documents only
            sizes = lambda: (_sizes(self._documents, self.context(p), self.document_length) for p in places)  # noqa: E731
            layouts["context"] = choose_layout(sizes, -(-self.text_lengths // 2), self.context_chunk_tokens)
        return layouts

    def batch(self, step: int) -> dict[str, Any]:
        """The arrays of one step, a pure function of `step` ≥ 0; after the plan's last batch its first comes again.

        "texts": the B queries and then the N documents of each plan batch in chunks (`lengths.to_chunks`): "ids" int32
        and "mask" bool [G, chunks, texts, ℓ] for each padded length ℓ, and "place" int32 [G, B + N]. "context", unless
        context_size is 0: the same of J context documents, a missing one being all False. "keep" bool [G, B, N].
        "plan_batch" int32 [G]: the batches' places in the plan. The shapes are the same at every step.
        """
        if step < 0:
            raise ValueError(f"expected a step ≥ 0, got {step}")
        first = int(step) * self.batches_per_step
        return _stack([self._plan_batch((first + g) % len(self.plan)) for g in range(self.batches_per_step)])

    def _plan_batch(self, place: int) -> dict[str, Any]:
        """`batch`, of one plan batch and without the axis G."""
        query_ids, query_mask = self._queries.padded(self.plan.rows[place], self.query_length)
        document_ids, document_mask = self._documents.padded(self.plan.documents(place), self.document_length)
        ids, mask = _concatenate(query_ids, document_ids), _concatenate(query_mask, document_mask)  # [B + N, L]
        batch: dict[str, Any] = {"texts": to_chunks(ids, mask, self.layouts["texts"])}
        if self.context_size:
            context = self._documents.padded(self.context(place), self.document_length)
            batch["context"] = to_chunks(*context, self.layouts["context"])
        return batch | {"keep": self.plan.keep(place), "plan_batch": np.int32(place)}

    def context(self, place: int) -> Int64[np.ndarray, " J"]:
        """The context documents of plan batch `place`, by the seed and the place alone; −1 where there are too few."""
        if self.context_source == "batch":
            documents = np.unique(self.plan.documents(place))
        else:
            documents = self._group_rows[self.plan.groups[place]]
        random = np.random.default_rng([self.seed, CONTEXT_STREAM, place])
        drawn = random.choice(documents, min(self.context_size, len(documents)), replace=False)
        context = np.full(self.context_size, NO_DOCUMENT, np.int64)
        context[: len(drawn)] = drawn
        return context

    def _text_sizes(self, place: int) -> Int64[np.ndarray, " texts"]:
        """Tokens of a plan batch's queries and documents."""
        queries = _sizes(self._queries, self.plan.rows[place], self.query_length)
        return np.concatenate([queries, _sizes(self._documents, self.plan.documents(place), self.document_length)])

    def iterate(self, start: int, stop: int, *, threads: int, prefetch: int) -> Iterator[dict[str, Any]]:
        """`batch(start)` … `batch(stop − 1)` in order; Grain's threads compute up to `prefetch` of them ahead.

        With threads = 0 or prefetch = 0, and where Grain is not installed, each is computed when it is asked for.
        """
        if not 0 <= start <= stop:
            raise ValueError(f"expected 0 ≤ start ≤ stop, got {start} and {stop}")
        for name, layout in self.layouts.items():  # computed now, before threads need them
            log.info("%s run at %s tokens, %s in a chunk", name, layout.lengths, layout.texts)
        try:
            import grain  # loads jax, which this package does without elsewhere
        except ImportError:
            yield from map(self.batch, range(start, stop))
            return
        options = grain.ReadOptions(num_threads=min(threads, prefetch), prefetch_buffer_size=prefetch)
        dataset = grain.MapDataset.range(start, stop).map(self.batch).to_iter_dataset(options)
        with closing(iter(dataset)) as batches:  # ends the threads when the caller stops early
            yield from batches


def _stack(parts: list[Any]) -> Any:
    """Arrays, or dicts and tuples of them, of G plan batches as arrays [G, …]."""
    if isinstance(parts[0], dict):
        return {name: _stack([part[name] for part in parts]) for name in parts[0]}
    if isinstance(parts[0], tuple):
        return tuple(_stack(list(group)) for group in zip(*parts, strict=True))
    return np.stack(parts)


def _sizes(ragged: Ragged, rows: Int64[np.ndarray, " rows"], length: int) -> Int64[np.ndarray, " rows"]:
    """Tokens of the rows when they are cut to `length`; 0 of a missing one."""
    at = np.maximum(rows, 0)
    return np.where(rows < 0, 0, np.minimum(ragged.offsets[at + 1] - ragged.offsets[at], length))


Tokens = Int32[np.ndarray, "_ _"] | Bool[np.ndarray, "_ _"]


def _concatenate(queries: Tokens, documents: Tokens) -> Tokens:
    """[B, Lq] and [N, Ld] as [B + N, the longer of both]."""
    width = max(queries.shape[1], documents.shape[1])
    return np.concatenate([np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in (queries, documents)])
