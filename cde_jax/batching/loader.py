"""Batches of tokens for the training step: `batch(step)` is a function, so a run is resumed by its step number alone.

Its only state is memory-mapped arrays, and draws come from a generator seeded by the run's seed and the place in the
plan. So threads may call it ahead of time.
"""

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from cde_jax.batching.layout import (
    Layout,
    LengthCounts,
    choose_layout,
    count_lengths,
    read_layouts,
    to_chunks,
    write_layouts,
)
from cde_jax.batching.pack import domain_groups
from cde_jax.batching.plan import BatchPlan
from cde_jax.data.store import Ragged, Store

log = logging.getLogger(__name__)

CONTEXT_STREAM = 31  # separates the draws of context from the other random numbers of the same seed
NO_DOCUMENT = -1  # a missing context document: all padding, mask all False
_BLOCK = 2**20  # texts whose lengths are looked up at a time


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
    chunk_positions: int = 0  # of a chunk of queries and documents; 0: chosen
    context_chunk_positions: int = 0
    slots: int = 0  # positions that every query and document takes beside its tokens: those of joint attention
    layouts_file: Path | None = None  # keeps layouts from one process to the next
    devices_per_plan_batch: int = 1  # how many share its chunks
    share: Sequence[int] | None = None  # which of the G plan batches of a step are read; None: all
    skip: Collection[int] = ()  # plan batches that are left out: the next one that stands for the same g comes instead

    def __post_init__(self):
        try:
            self.plan.verify(self.pairs.fingerprint, self.plan.manifest["settings"])
        except ValueError as error:
            advice = "texts, prefixes, lengths and the tokenizer all count"
            raise ValueError(f"{error} ({self.pairs.directory}: {advice})") from None
        if out := sorted(place for place in self.skip if not 0 <= place < len(self.plan)):
            raise ValueError(f"train.skip_batches names {out}, and the plan has the batches 0 to {len(self.plan) - 1}")
        self._instead = {place: self._replacement(place) for place in self.skip}
        self._queries, self._documents = self.pairs.ragged("query_tokens"), self.pairs.ragged("document_tokens")

    @cached_property
    def _group_rows(self) -> list[Int64[np.ndarray, " rows"]]:
        """Pairs of each of the plan's groups."""
        names = [domain["name"] for domain in self.pairs.manifest["domains"]]
        groups, _ = domain_groups(self.pairs.array("domain"), names, self.plan.rows.shape[1])
        return [group.rows for group in groups]

    @cached_property
    def layouts(self) -> dict[str, Layout]:
        """Chunks of "texts" and, unless context_size is 0, of "context": those in `layouts_file`, or chosen now."""
        settings = {
            "plan": self.plan.fingerprint,
            "lengths": self.text_lengths,
            "positions": [self.chunk_positions, self.context_chunk_positions, self.slots],
            "context": [self.context_size, self.context_source, self.seed] if self.context_size else [],
        }
        if kept := read_layouts(self.layouts_file, settings):
            return kept
        layouts = {"texts": choose_layout(self.lengths["texts"], self.text_lengths, self.chunk_positions, self.slots)}
        if self.context_size:  # half as many lengths, for these are documents only
            lengths = -(-self.text_lengths // 2)
            layouts["context"] = choose_layout(self.lengths["context"], lengths, self.context_chunk_positions)
        write_layouts(self.layouts_file, settings, layouts)
        return layouts

    @cached_property
    def lengths(self) -> dict[str, LengthCounts]:
        """Of the "texts" and the "context" of all plan batches: the plan is gone through once."""
        hard = self.plan.hard_negatives.reshape(len(self.plan), -1)  # [S, B·K]

        def texts(places: slice) -> Int64[np.ndarray, "s m"]:
            rows = self.plan.rows[places]
            parts = [_sizes(self._queries, rows), _sizes(self._documents, rows), _sizes(self._documents, hard[places])]
            return np.concatenate(parts, axis=1)

        def context(places: slice) -> Int64[np.ndarray, "s J"]:
            return _sizes(self._documents, np.stack([self.context(p) for p in range(*places.indices(len(self.plan)))]))

        def blocks(texts: int) -> Iterator[slice]:
            size = max(1, _BLOCK // texts)
            return (slice(start, start + size) for start in range(0, len(self.plan), size))

        counted = {"texts": count_lengths(map(texts, blocks(2 * self.plan.rows.shape[1] + hard.shape[1])))}
        if self.context_size:
            counted["context"] = count_lengths(map(context, blocks(self.context_size)))
        return counted

    def batch(self, step: int) -> dict[str, Any]:
        """The arrays of one step, a pure function of `step` ≥ 0; after the plan's last batch its first comes again.

        "texts": the B queries and then the N documents of each plan batch in chunks (`to_chunks`): "ids" int32 and
        "mask" bool [G, chunks, texts, ℓ] for each padded length ℓ, and "place" int32 [G, B + N]. "context", unless
        context_size is 0: the same of J context documents, a missing one being all False. "keep" bool [G, B, N].
        "plan_batch" int32 [G]: the batches' places in the plan. The shapes are the same at every step. With a `share`,
        all but "plan_batch" is of these plan batches only, in its order.
        """
        if step < 0:
            raise ValueError(f"expected a step ≥ 0, got {step}")
        places = (int(step) * self.batches_per_step + np.arange(self.batches_per_step)) % len(self.plan)
        places = np.array([self._instead.get(place, place) for place in places.tolist()])
        read = places if self.share is None else places[list(self.share)]
        return _stack([self._plan_batch(int(place)) for place in read]) | {"plan_batch": places.astype(np.int32)}

    def _replacement(self, skipped: int) -> int:
        """The plan batch that is read for a skipped one: that of the first step after it whose own is not skipped."""
        for later in range(1, len(self.plan) + 1):  # another place of the same step never becomes the same batch
            if (place := (skipped + later * self.batches_per_step) % len(self.plan)) not in self.skip:
                return place
        raise ValueError(f"train.skip_batches leaves no plan batch that could stand for {skipped}: name fewer")

    def _plan_batch(self, place: int) -> dict[str, Any]:
        """`batch`, of one plan batch and without the axis G."""
        batch: dict[str, Any] = {"keep": self.plan.keep(place)}
        for name, layout in self.layouts.items():
            padded = [tokens.padded(rows, layout.lengths[-1]) for tokens, rows in self._rows(name, place)]
            texts = map(np.concatenate, zip(*padded, strict=True))
            batch[name] = to_chunks(*texts, layout, self.devices_per_plan_batch)
        return batch

    def _rows(self, name: str, place: int) -> list[tuple[Ragged, Int64[np.ndarray, "_"]]]:
        """Which rows of which tokens are the "texts" or the "context" of a plan batch."""
        if name == "context":
            return [(self._documents, self.context(place))]
        return [(self._queries, self.plan.rows[place]), (self._documents, self.plan.documents(place))]

    def context(self, place: int) -> Int64[np.ndarray, " J"]:
        """The context documents of plan batch `place`, by the seed and the place alone; −1 where there are too few."""
        if self.context_source == "batch":
            documents = np.sort(self.plan.documents(place))
            documents = documents[np.diff(documents, prepend=-1) > 0]  # each once; np.unique takes six times as long
        else:
            documents = self._group_rows[self.plan.groups[place]]
        random = np.random.default_rng([self.seed, CONTEXT_STREAM, place])
        drawn, count = np.full(self.context_size, NO_DOCUMENT), min(self.context_size, len(documents))
        drawn[:count] = random.choice(documents, count, replace=False)
        return drawn

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


def _sizes(tokens: Ragged, rows: Int64[np.ndarray, "*rows"]) -> Int64[np.ndarray, "*rows"]:
    """Number of tokens of each row; 0 of a missing one."""
    return np.where(rows < 0, 0, tokens.offsets[rows + 1] - tokens.offsets[rows])


def _stack(parts: list[Any]) -> Any:
    """Arrays, or dicts and tuples of them, of G plan batches as arrays [G, …]."""
    if isinstance(parts[0], dict):
        return {name: _stack([part[name] for part in parts]) for name in parts[0]}
    if isinstance(parts[0], tuple):
        return tuple(_stack(list(group)) for group in zip(*parts, strict=True))
    return np.stack(parts)
