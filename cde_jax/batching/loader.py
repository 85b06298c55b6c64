"""Batches of tokens for the training step: `batch(step)` is a function, so order is data and resuming is an integer.

Grain runs that function ahead of time, in threads or in processes. It only reads memory-mapped arrays and makes its
own generator from the seed and the place in the plan, so threads share nothing that they write to; a process is given
the names of the mapped files, not their content.
"""

import dataclasses
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from cde_jax.batching.lengths import Layout, choose_layout, chunked
from cde_jax.batching.pack import domain_groups
from cde_jax.batching.plan import BatchPlan
from cde_jax.data.store import Ragged, Store

log = logging.getLogger(__name__)

CONTEXT_STREAM = 31  # keeps the draws of context apart from the other random numbers of the same seed
SOURCES = ("batch", "domain")  # of context documents
NO_DOCUMENT = -1  # a missing context document: all padding, mask all False


class Loader:
    """Training batches of a plan over its pairs' tokens, each plan batch with its context (paper, section 3.2).

    batches_per_step G: plan batches in a step. context_size J: context documents of a plan batch, drawn without
    replacement from the batch's own documents (context_source "batch") or from the positives of its domain ("domain");
    the small domains that share batches count as one. query_length, document_length: tokens kept of a text, Lq and Ld.

    text_lengths: how many padded lengths texts run at; more than 1 gives batches in chunks (`lengths`), 1 as plain
    arrays. chunk_tokens, context_chunk_tokens: of a chunk of queries and documents, or context documents; 0: chosen.
    """

    def __init__(
        self,
        plan: BatchPlan,
        pairs: Store,
        *,
        batches_per_step: int,
        context_size: int,
        context_source: str,
        query_length: int,
        document_length: int,
        seed: int,
        text_lengths: int = 1,
        chunk_tokens: int = 0,
        context_chunk_tokens: int = 0,
    ):
        for name, value, smallest in (
            ("batches_per_step", batches_per_step, 1),
            ("context_size", context_size, 0),
            ("query_length", query_length, 1),
            ("document_length", document_length, 1),
            ("seed", seed, 0),
            ("text_lengths", text_lengths, 1),
        ):
            if value < smallest:
                raise ValueError(f"expected {name} ≥ {smallest}, got {value}; change it in the config")
        if context_source not in SOURCES:
            raise ValueError(f"expected context_source {' or '.join(SOURCES)}, got {context_source!r}")
        try:
            plan.verify(pairs.fingerprint, plan.manifest["settings"])
        except ValueError as error:
            raise ValueError(
                f"{error} ({pairs.directory}: texts, prefixes, lengths and the tokenizer all count)"
            ) from None
        self.plan = plan
        self.batches_per_step = batches_per_step
        self.context_size = context_size
        self.context_source = context_source
        self.query_length = query_length
        self.document_length = document_length
        self.seed = seed
        self._queries = pairs.ragged("query_tokens")
        self._documents = pairs.ragged("document_tokens")
        self._group_rows: list[np.ndarray] = []
        if context_source != "batch":
            names = [domain["name"] for domain in pairs.manifest["domains"]]
            groups, _ = domain_groups(pairs.array("domain"), names, plan.rows.shape[1])  # as the plan numbered them
            self._group_rows = [group.rows for group in groups]
        self.text_lengths = text_lengths
        self._chunk_tokens = {"texts": chunk_tokens, "context": context_chunk_tokens}

    @cached_property
    def layouts(self) -> dict[str, Layout]:
        """Of "texts" and "context" where texts run at several lengths; found by going through the plan once."""
        if self.text_lengths == 1:
            return {}
        layouts = {"texts": choose_layout(self._text_sizes, self.text_lengths, self._chunk_tokens["texts"])}
        if self.context_size:  # fewer lengths: these are documents only
            few = -(-self.text_lengths // 2)
            layouts["context"] = choose_layout(self._context_sizes, few, self._chunk_tokens["context"])
        return layouts

    def batch(self, step: int) -> dict[str, Any]:
        """The arrays of one step, a pure function of `step` ≥ 0; after the plan's last batch its first comes again.

        query_ids int32 [G, B, Lq], query_mask bool [G, B, Lq]; document_ids int32 [G, N, Ld], document_mask bool
        [G, N, Ld]; context_ids int32 [G, J, Ld], context_mask bool [G, J, Ld], a missing context document being all
        False; keep bool [G, B, N]; plan_batch int32 [G], the batches' places in the plan.

        With several text lengths, instead of ids and masks: "texts", the B queries and then the N documents as
        `lengths.chunked` has them, and "context", the J context documents. The shapes are the same at every step.
        """
        if step < 0:
            raise ValueError(f"expected a step ≥ 0, got {step}")
        first = int(step) * self.batches_per_step
        places = [(first + g) % len(self.plan) for g in range(self.batches_per_step)]
        rows = np.stack([self.plan.rows[place] for place in places])  # [G, B]
        documents = np.stack([self.plan.documents(place) for place in places])  # [G, N]
        context = np.stack([self.context(place) for place in places])  # [G, J]
        query_ids, query_mask = _tokens(self._queries, rows, self.query_length)
        document_ids, document_mask = _tokens(self._documents, documents, self.document_length)
        context_ids, context_mask = _tokens(self._documents, context, self.document_length)
        batch = {
            "keep": np.stack([self.plan.keep(place) for place in places]),
            "plan_batch": np.array(places, np.int32),
        }
        if not self.layouts:
            return {
                "query_ids": query_ids,
                "query_mask": query_mask,
                "document_ids": document_ids,
                "document_mask": document_mask,
                "context_ids": context_ids,
                "context_mask": context_mask,
            } | batch
        batch["texts"] = chunked(
            _joined(query_ids, document_ids), _joined(query_mask, document_mask), self.layouts["texts"]
        )
        if self.context_size:
            batch["context"] = chunked(context_ids, context_mask, self.layouts["context"])
        return batch

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

    def _text_sizes(self) -> Iterator[Int64[np.ndarray, " texts"]]:
        """Tokens of each plan batch's queries and documents."""
        for place in range(len(self.plan)):
            queries = _sizes(self._queries, self.plan.rows[place], self.query_length)
            yield np.concatenate([queries, _sizes(self._documents, self.plan.documents(place), self.document_length)])

    def _context_sizes(self) -> Iterator[Int64[np.ndarray, " J"]]:
        """Tokens of each plan batch's context documents."""
        for place in range(len(self.plan)):
            yield _sizes(self._documents, self.context(place), self.document_length)

    def iterate(
        self, start: int, stop: int, *, threads: int, workers: int = 0, prefetch: int
    ) -> Iterator[dict[str, Any]]:
        """`batch(start)` … `batch(stop − 1)` in order; Grain computes up to `prefetch` of them ahead.

        They come from `threads` threads of this process, or from `workers` > 0 processes; the batches are the same.
        Processes start in seconds and are worth it where threads, which share one interpreter, cannot keep up. With
        no workers and threads = 0 or prefetch = 0 each batch is computed when it is asked for.
        """
        if not 0 <= start <= stop:
            raise ValueError(f"expected 0 ≤ start ≤ stop, got {start} and {stop}")
        import grain  # loads jax, which this package does without elsewhere

        for name, layout in self.layouts.items():  # found now, before threads and processes need them
            log.info("%s run at %s tokens, %s in a chunk", name, layout.lengths, layout.texts)
        if workers:
            dataset = _in_processes(grain.MapDataset.range(start, stop).map(self.batch), workers, prefetch)
        else:
            options = grain.ReadOptions(num_threads=min(threads, prefetch), prefetch_buffer_size=prefetch)
            dataset = grain.MapDataset.range(start, stop).map(self.batch).to_iter_dataset(options)
        # Closing lets go of threads and processes when the caller stops early.
        with closing(iter(dataset)) as batches:
            yield from batches

    def __getstate__(self) -> dict[str, Any]:
        """For Grain's processes: mapped arrays by the names of their files."""
        state = dict(vars(self))
        state["plan"] = {
            field.name: _by_name(getattr(self.plan, field.name)) for field in dataclasses.fields(self.plan)
        }
        for name in ("_queries", "_documents"):
            state[name] = [_by_name(array) for array in state[name]]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.plan = BatchPlan(**{name: _opened(value) for name, value in state["plan"].items()})
        for name in ("_queries", "_documents"):
            setattr(self, name, Ragged(*map(_opened, state[name])))


class _MappedFile(NamedTuple):
    """An array of a store, by the name of its file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]


def _by_name(value: Any) -> Any:
    mapped = value.base if isinstance(value, np.ndarray) else None
    if isinstance(mapped, np.memmap) and mapped.shape == value.shape:
        return _MappedFile(Path(mapped.filename), value.dtype, value.shape)
    return value


def _opened(value: Any) -> Any:
    if isinstance(value, _MappedFile):
        return np.memmap(value.file, value.dtype, "r", shape=value.shape).view(np.ndarray)
    return value


def _in_processes(batches: Any, workers: int, prefetch: int) -> Any:
    """The Grain data set `batches` computed by `workers` processes, in the same order."""
    import grain
    import jax

    # Grain reads absl's flags before it starts processes; a notebook has parsed none.
    jax.config.parse_flags_with_absl()
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=max(1, prefetch // workers))
    nothing_ahead = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return batches.to_iter_dataset(nothing_ahead).mp_prefetch(options, worker_init_fn=_start_worker)


def _start_worker(index: int, count: int) -> None:
    """A worker lives as long as its parent: Ctrl-C is the parent's to handle; killed with it, nothing is left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _tokens(ragged, rows: Int64[np.ndarray, "G rows"], length: int) -> tuple[np.ndarray, np.ndarray]:
    ids, mask = ragged.padded(rows.reshape(-1), length)
    return ids.reshape(*rows.shape, length), mask.reshape(*rows.shape, length)


def _sizes(ragged: Ragged, rows: Int64[np.ndarray, " rows"], length: int) -> Int64[np.ndarray, " rows"]:
    """Tokens of the rows when they are cut to `length`; 0 of a missing one."""
    at = np.maximum(rows, 0)
    return np.where(rows < 0, 0, np.minimum(ragged.offsets[at + 1] - ragged.offsets[at], length))


def _joined(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """[G, B, Lq] and [G, N, Ld] as [G, B + N, the longer of both]."""
    width = max(queries.shape[2], documents.shape[2])
    both = [np.pad(x, ((0, 0), (0, 0), (0, width - x.shape[2]))) for x in (queries, documents)]
    return np.concatenate(both, axis=1)
