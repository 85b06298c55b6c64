"""Batches of tokens for the training step: `batch(step)` is a function, so a run is resumed by its step number alone.

Its only state is memory-mapped arrays, and draws come from a generator seeded by the run's seed and the place in the
plan. So threads may call it ahead of time.

Texts of many lengths become chunks of a few static lengths, chosen before training to pad the least. The texts of a
plan batch, queries and documents together, are sorted by length and cut into chunks of about equally many tokens; a
chunk is padded to what its longest text needs. The arrays have room for the most chunks of each length that any batch
needs, and the training step skips empty ones: every step has the same shapes, and one program is compiled.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64

from cde_jax.batching.pack import domain_groups
from cde_jax.batching.plan import BatchPlan
from cde_jax.data.store import Ragged, Store

log = logging.getLogger(__name__)

CONTEXT_STREAM = 31  # separates the draws of context from the other random numbers of the same seed
NO_DOCUMENT = -1  # a missing context document: all padding, mask all False
MULTIPLE = 8  # padded lengths are multiples of it
# The default size of a chunk: 1/32 of a plan batch's tokens, for on average half of the last chunk is empty. Fewer than
# 512 tokens do not keep even a CPU busy, but it is never more than a quarter of a plan batch.
CHUNKS_PER_BATCH, MIN_TOKENS, MIN_CHUNKS = 32, 512, 4


class Layout(NamedTuple):
    """The chunks that the arrays of a plan batch have room for: three tuples with one entry per padded length."""

    lengths: tuple[int, ...]  # tokens, ascending
    texts: tuple[int, ...]  # per chunk
    chunks: tuple[int, ...]


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
    seed: int
    text_lengths: int = 1  # number of padded lengths
    chunk_tokens: int = 0  # of a chunk of queries and documents; 0: chosen
    context_chunk_tokens: int = 0

    def __post_init__(self):
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

        def sizes(name: str) -> Iterator[Int64[np.ndarray, " texts"]]:
            for place in range(len(self.plan)):
                yield np.concatenate([_sizes(tokens, rows) for tokens, rows in self._rows(name, place)])

        layouts = {"texts": choose_layout(lambda: sizes("texts"), self.text_lengths, self.chunk_tokens)}
        if self.context_size:  # half as many lengths, for these are documents only
            lengths = -(-self.text_lengths // 2)
            layouts["context"] = choose_layout(lambda: sizes("context"), lengths, self.context_chunk_tokens)
        return layouts

    def batch(self, step: int) -> dict[str, Any]:
        """The arrays of one step, a pure function of `step` ≥ 0; after the plan's last batch its first comes again.

        "texts": the B queries and then the N documents of each plan batch in chunks (`to_chunks`): "ids" int32 and
        "mask" bool [G, chunks, texts, ℓ] for each padded length ℓ, and "place" int32 [G, B + N]. "context", unless
        context_size is 0: the same of J context documents, a missing one being all False. "keep" bool [G, B, N].
        "plan_batch" int32 [G]: the batches' places in the plan. The shapes are the same at every step.
        """
        if step < 0:
            raise ValueError(f"expected a step ≥ 0, got {step}")
        first = int(step) * self.batches_per_step
        return _stack([self._plan_batch((first + g) % len(self.plan)) for g in range(self.batches_per_step)])

    def _plan_batch(self, place: int) -> dict[str, Any]:
        """`batch`, of one plan batch and without the axis G."""
        batch: dict[str, Any] = {"keep": self.plan.keep(place), "plan_batch": np.int32(place)}
        for name, layout in self.layouts.items():
            padded = [tokens.padded(rows, layout.lengths[-1]) for tokens, rows in self._rows(name, place)]
            batch[name] = to_chunks(*map(np.concatenate, zip(*padded, strict=True)), layout)
        return batch

    def _rows(self, name: str, place: int) -> list[tuple[Ragged, Int64[np.ndarray, "_"]]]:
        """Which rows of which tokens are the "texts" or the "context" of a plan batch."""
        if name == "context":
            return [(self._documents, self.context(place))]
        return [(self._queries, self.plan.rows[place]), (self._documents, self.plan.documents(place))]

    def context(self, place: int) -> Int64[np.ndarray, " J"]:
        """The context documents of plan batch `place`, by the seed and the place alone; −1 where there are too few."""
        if self.context_source == "batch":
            documents = np.unique(self.plan.documents(place))
        else:
            documents = self._group_rows[self.plan.groups[place]]
        random = np.random.default_rng([self.seed, CONTEXT_STREAM, place])
        drawn = random.choice(documents, min(self.context_size, len(documents)), replace=False)
        return np.pad(drawn, (0, self.context_size - len(drawn)), constant_values=NO_DOCUMENT)

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


def _sizes(tokens: Ragged, rows: Int64[np.ndarray, " rows"]) -> Int64[np.ndarray, " rows"]:
    """Number of tokens of each row; 0 of a missing one."""
    return np.where(rows < 0, 0, tokens.offsets[rows + 1] - tokens.offsets[rows])


def _stack(parts: list[Any]) -> Any:
    """Arrays, or dicts and tuples of them, of G plan batches as arrays [G, …]."""
    if isinstance(parts[0], dict):
        return {name: _stack([part[name] for part in parts]) for name in parts[0]}
    if isinstance(parts[0], tuple):
        return tuple(_stack(list(group)) for group in zip(*parts, strict=True))
    return np.stack(parts)


def choose_layout(batches: Callable[[], Iterable[Int[np.ndarray, " m"]]], lengths: int, tokens: int = 0) -> Layout:
    """The layout of at most `lengths` lengths that holds every plan batch.

    batches: gives the token counts of each plan batch's texts, of which there are some; called twice. tokens: per
    chunk; 0: chosen by the average plan batch.
    """
    counts, number, largest = np.zeros(1, np.int64), 0, 1
    for sizes in batches():
        of_batch = np.bincount(sizes, minlength=len(counts))
        of_batch[: len(counts)] += counts
        counts, number, largest = of_batch, number + 1, max(largest, len(sizes))
    chosen = choose_lengths(counts, lengths)
    average = int(counts @ np.arange(len(counts))) // max(number, 1)
    tokens = tokens or max(average // CHUNKS_PER_BATCH, min(average // MIN_CHUNKS, MIN_TOKENS))
    texts = tuple(min(max(1, tokens // length), largest) for length in chosen)
    chunks, fullest = np.zeros((2, len(chosen)), np.int64)  # of any batch; texts of any chunk
    for sizes in batches():
        used = np.zeros_like(chunks)
        for k, rows in split_by_length(sizes, chosen, texts):
            used[k] += 1
            fullest[k] = max(fullest[k], len(rows))
        chunks = np.maximum(chunks, used)
    needed = np.flatnonzero(chunks)
    return Layout(*(tuple(np.asarray(values)[needed].tolist()) for values in (chosen, fullest, chunks)))


def choose_lengths(counts: Int64[np.ndarray, " sizes"], most: int) -> tuple[int, ...]:
    """At most `most` padded lengths, ascending, with the fewest padded tokens for `counts[s]` texts of s tokens.

    Multiples of 8, or the longest text's own length. Exact, by dynamic programming over the lengths.
    """
    longest = max(1, int(np.flatnonzero(counts).max(initial=0)))
    candidates = np.array([*range(MULTIPLE, longest, MULTIPLE), longest])
    shorter = np.cumsum(np.pad(counts, (0, 1)))[candidates]  # texts that fit each candidate
    cost = shorter * candidates  # of all texts up to candidate j, at one length
    came_from: list[Int64[np.ndarray, " candidates"]] = []
    for _ in range(most - 1):
        # One length more: the texts above candidate i run at candidate j.
        step = cost[:, None] + (shorter[None, :] - shorter[:, None]) * candidates[None, :]  # [i, j]
        came_from.append(step.argmin(axis=0))
        cost = step.min(axis=0)
    chosen = {at := len(candidates) - 1}
    for before in reversed(came_from):
        chosen.add(at := int(before[at]))
    return tuple(candidates[sorted(chosen)].tolist())


def split_by_length(
    sizes: Int[np.ndarray, " m"], lengths: tuple[int, ...], texts: tuple[int, ...]
) -> Iterator[tuple[int, Int64[np.ndarray, " rows"]]]:
    """The chunks of a plan batch: which of `lengths`, and the indices of its texts, the longest first.

    A chunk is filled up with shorter texts, so only the last one has room left.
    """
    order = np.argsort(-sizes, kind="stable")
    needed = np.searchsorted(lengths, sizes[order])
    start = 0
    while start < len(order):
        k = int(needed[start])
        rows = order[start : start + texts[k]]
        start += len(rows)
        yield k, rows


def to_chunks(ids: Int32[np.ndarray, "m L"], mask: Bool[np.ndarray, "m L"], layout: Layout) -> dict[str, Any]:
    """A plan batch's m texts, padded on the right to the longest of the layout's lengths or more, as chunks.

    Returns "ids" (int32) and "mask" (bool), for each of the layout's lengths ℓ an array [chunks, texts, ℓ], and "place"
    int32 [m]: the row of each text when the chunks of all lengths are concatenated. Rows without a text are all False.
    """
    shapes = list(zip(layout.chunks, layout.texts, layout.lengths, strict=True))
    chunk_ids = tuple(np.zeros(shape, np.int32) for shape in shapes)
    chunk_masks = tuple(np.zeros(shape, bool) for shape in shapes)
    first = np.cumsum([0, *np.multiply(layout.chunks, layout.texts)])
    place, used = np.empty(len(ids), np.int32), [0] * len(shapes)
    for k, rows in split_by_length(mask.sum(axis=1), layout.lengths, layout.texts):
        chunk_ids[k][used[k], : len(rows)] = ids[rows, : layout.lengths[k]]
        chunk_masks[k][used[k], : len(rows)] = mask[rows, : layout.lengths[k]]
        place[rows] = first[k] + used[k] * layout.texts[k] + np.arange(len(rows))
        used[k] += 1
    return {"ids": chunk_ids, "mask": chunk_masks, "place": place}
