"""Batches of tokens for the training step: `batch(step)` is a function, so a run is resumed by its step number alone.

Its only state is memory-mapped arrays, and draws come from a generator seeded by the run's seed and the place in the
plan. So threads may call it ahead of time.

Texts of many lengths become chunks of a few static lengths, chosen before training to pad the least. The texts of a
plan batch, queries and documents together, are sorted by length and cut into chunks of about equally many positions (in
joint attention every text takes those of the context slots beside its tokens); a chunk is padded to what its longest
text needs. The arrays have room for the most chunks of each length that any batch needs, and the training step skips
empty ones: every step has the same shapes, and one program is compiled.
"""

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64

from cde_jax.batching.pack import domain_groups
from cde_jax.batching.plan import BatchPlan
from cde_jax.data.files import fingerprint, read_json, write_json
from cde_jax.data.store import Ragged, Store

log = logging.getLogger(__name__)

CONTEXT_STREAM = 31  # separates the draws of context from the other random numbers of the same seed
NO_DOCUMENT = -1  # a missing context document: all padding, mask all False
MULTIPLE = 8  # padded lengths are multiples of it
# The default size of a chunk: 1/32 of a plan batch's positions, for on average half of the last chunk is empty. Fewer
# than 512 do not keep even a CPU busy, but it is never more than a quarter of a plan batch.
CHUNKS_PER_BATCH, MIN_POSITIONS, MIN_CHUNKS = 32, 512, 4
_BLOCK = 2**20  # texts whose lengths are looked up at a time


class Layout(NamedTuple):
    """The chunks that the arrays of a plan batch have room for: three tuples with one entry per padded length."""

    lengths: tuple[int, ...]  # tokens, ascending
    texts: tuple[int, ...]  # per chunk
    chunks: tuple[int, ...]


class LengthCounts(NamedTuple):
    """How long the texts of every plan batch are: all that a layout is chosen by."""

    texts: Int[np.ndarray, "S candidates"]  # that fit candidate length j (`_candidates`) and no shorter one
    longest: int
    tokens: int  # of all plan batches together


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
        if kept := _read_layouts(self.layouts_file, settings):
            return kept
        layouts = {"texts": choose_layout(self.lengths["texts"], self.text_lengths, self.chunk_positions, self.slots)}
        if self.context_size:  # half as many lengths, for these are documents only
            lengths = -(-self.text_lengths // 2)
            layouts["context"] = choose_layout(self.lengths["context"], lengths, self.context_chunk_positions)
        _write_layouts(self.layouts_file, settings, layouts)
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


def _read_layouts(file: Path | None, settings: dict[str, Any]) -> dict[str, Layout] | None:
    """The layouts of these settings in a file; None where there are none, or the file is damaged."""
    if file is None or not file.exists():
        return None
    try:
        entry = read_json(file, dict).get(fingerprint(settings))
        if entry is None:
            return None
        if entry["sha256"] != fingerprint([settings, entry["layouts"]]):
            raise ValueError("a layout was altered")
        return {name: Layout(*map(tuple, layout)) for name, layout in entry["layouts"].items()}
    except (ValueError, TypeError, KeyError) as error:
        log.warning("%s cannot be used, layouts are computed again: %s", file, error)
        return None


def _write_layouts(file: Path | None, settings: dict[str, Any], layouts: dict[str, Layout]) -> None:
    """Add layouts to a file, without those of another plan; not at all where it may not be written."""
    if file is None:
        return
    try:
        kept = read_json(file, dict) if file.exists() else {}
        kept = {key: entry for key, entry in kept.items() if entry["settings"]["plan"] == settings["plan"]}
    except (ValueError, TypeError, KeyError):  # damaged
        kept = {}
    entry = {"settings": settings, "layouts": layouts, "sha256": fingerprint([settings, layouts])}
    try:
        write_json(file, kept | {fingerprint(settings): entry})
    except OSError as error:
        log.warning("layouts are not kept for the next start: %s", error)


def _candidates(longest: int) -> Int64[np.ndarray, " candidates"]:
    """Padded lengths to choose from: multiples of 8, and the longest text's own."""
    return np.array([*range(MULTIPLE, longest, MULTIPLE), max(longest, 1)])


def count_lengths(batches: Iterable[Int[np.ndarray, "..."]]) -> LengthCounts:
    """Of the token counts of all plan batches' texts, given by the plan batch [m] or by blocks of them [s, m]."""
    blocks, longest, tokens = [], 0, 0
    for sizes in map(np.atleast_2d, batches):
        longest, tokens = max(longest, int(sizes.max(initial=0))), tokens + int(sizes.sum())
        candidates = -(-max(longest, 1) // MULTIPLE)
        cells = np.maximum(sizes - 1, 0) // MULTIPLE + np.arange(len(sizes))[:, None] * candidates
        counts = np.bincount(cells.ravel(), minlength=len(sizes) * candidates).reshape(len(sizes), candidates)
        blocks.append(counts.astype(np.min_scalar_type(sizes.shape[1])))
    counts = np.concatenate([np.pad(block, ((0, 0), (0, candidates - block.shape[1]))) for block in blocks])
    return LengthCounts(counts, longest, tokens)


def choose_layout(counted: LengthCounts, lengths: int, positions: int = 0, slots: int = 0) -> Layout:
    """The layout of at most `lengths` lengths that holds every plan batch.

    positions: of a chunk, where a text takes its padded length and `slots` more; 0: chosen by the average plan batch.
    """
    candidates, of_batch = _candidates(counted.longest), counted.texts.sum(axis=1, dtype=np.int64)
    of_length = np.zeros(candidates[-1] + 1, np.int64)
    of_length[candidates] = counted.texts.sum(axis=0, dtype=np.int64)
    chosen = choose_lengths(of_length, lengths)
    average = (counted.tokens + slots * int(of_batch.sum())) // len(of_batch)
    positions = positions or max(average // CHUNKS_PER_BATCH, min(average // MIN_CHUNKS, MIN_POSITIONS))
    texts = [min(max(1, positions // (length + slots)), int(of_batch.max())) for length in chosen]
    first = np.searchsorted(candidates, [0, *chosen[:-1]], side="right")  # candidate of each length
    needed = np.add.reduceat(counted.texts, first, axis=1, dtype=np.int64)[:, ::-1].cumsum(axis=1)[:, ::-1]
    # As `split_by_length` does, of all plan batches at once: needed[s, k] texts are of length k or longer.
    chunks, fullest, placed = [0] * len(chosen), [0] * len(chosen), np.zeros_like(of_batch)
    for k in reversed(range(len(chosen))):
        used = -(-np.maximum(needed[:, k] - placed, 0) // texts[k])
        chunks[k] = int(used.max())
        fullest[k] = int(np.minimum(texts[k], of_batch - placed)[used > 0].max(initial=0))
        placed = np.minimum(placed + used * texts[k], of_batch)
    kept = [k for k, count in enumerate(chunks) if count]
    return Layout(*(tuple(values[k] for k in kept) for values in (chosen, fullest, chunks)))


def choose_lengths(counts: Int64[np.ndarray, " sizes"], most: int) -> tuple[int, ...]:
    """At most `most` padded lengths, ascending, with the fewest padded tokens for `counts[s]` texts of s tokens.

    Multiples of 8, or the longest text's own length. Exact, by dynamic programming over the lengths.
    """
    longest = max(1, int(np.flatnonzero(counts).max(initial=0)))
    candidates = _candidates(longest)
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


def to_chunks(
    ids: Int32[np.ndarray, "m L"], mask: Bool[np.ndarray, "m L"], layout: Layout, devices: int = 1
) -> dict[str, Any]:
    """A plan batch's m texts, padded on the right to the longest of the layout's lengths or more, as chunks.

    Returns "ids" (int32) and "mask" (bool), for each of the layout's lengths ℓ an array [chunks, texts, ℓ], and "place"
    int32 [m]: the row of each text when the chunks of all lengths are concatenated. Rows without a text are all False.

    devices: how many share the plan batch. The chunks are dealt out to them in turn, so that each gets about as many of
    every length: of an array [chunks, …], `chunks` then being a multiple of `devices`, each takes its part in order.
    """
    each = [-(-chunks // devices) for chunks in layout.chunks]  # of a device
    shapes = [(devices * n, *shape) for n, *shape in zip(each, layout.texts, layout.lengths, strict=True)]
    chunk_ids = tuple(np.zeros(shape, np.int32) for shape in shapes)
    chunk_masks = tuple(np.zeros(shape, bool) for shape in shapes)
    first = np.cumsum([0, *(chunks * texts for chunks, texts, _ in shapes)])
    place, used = np.empty(len(ids), np.int32), np.zeros((len(shapes), devices), int)
    for number, (k, rows) in enumerate(split_by_length(mask.sum(axis=1), layout.lengths, layout.texts)):
        device = number % devices
        at = device * each[k] + used[k, device]
        chunk_ids[k][at, : len(rows)] = ids[rows, : layout.lengths[k]]
        chunk_masks[k][at, : len(rows)] = mask[rows, : layout.lengths[k]]
        place[rows] = first[k] + at * layout.texts[k] + np.arange(len(rows))
        used[k, device] += 1
    return {"ids": chunk_ids, "mask": chunk_masks, "place": place}
