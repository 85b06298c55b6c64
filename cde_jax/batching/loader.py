"""Batches of tokens for the training step: `batch(step)` is a function, so order is data and resuming is an integer.

Grain runs that function ahead of time in threads. It only reads memory-mapped arrays and makes its own generator from
the seed and the place in the plan, so threads share nothing that they write to.
"""

from collections.abc import Iterator
from contextlib import closing

import numpy as np
from jaxtyping import Int64

from cde_jax.batching.pack import domain_groups
from cde_jax.batching.plan import BatchPlan
from cde_jax.data.store import Store

CONTEXT_STREAM = 31  # keeps the context draw apart from the other random numbers of the same seed
CONTEXT_SOURCES = ("batch", "domain")
NO_DOCUMENT = -1  # a missing context document: all padding, mask all False


class Loader:
    """Training batches of a plan over its pairs' tokens, each plan batch with its context (paper, section 3.2).

    batches_per_step G: plan batches in a step. context_size J: context documents of a plan batch, drawn without
    replacement from the batch's own documents (context_source "batch") or from the positives of its domain ("domain");
    the small domains that share batches count as one. query_length, document_length: tokens kept of a text, Lq and Ld.
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
    ):
        for name, value, smallest in (
            ("batches_per_step", batches_per_step, 1),
            ("context_size", context_size, 0),
            ("query_length", query_length, 1),
            ("document_length", document_length, 1),
            ("seed", seed, 0),
        ):
            if value < smallest:
                raise ValueError(f"expected {name} ≥ {smallest}, got {value}; change it in the config")
        if context_source not in CONTEXT_SOURCES:
            raise ValueError(f"expected context_source {' or '.join(CONTEXT_SOURCES)}, got {context_source!r}")
        plan.verify(pairs.fingerprint, plan.manifest["settings"])
        self.plan = plan
        self.batches_per_step = batches_per_step
        self.context_size = context_size
        self.context_source = context_source
        self.query_length = query_length
        self.document_length = document_length
        self.seed = seed
        self._queries = pairs.ragged("query_tokens")
        self._documents = pairs.ragged("document_tokens")
        names = [domain["name"] for domain in pairs.manifest["domains"]]
        groups, _ = domain_groups(pairs.array("domain"), names, plan.rows.shape[1])  # as the plan numbered them
        self._group_rows = [group.rows for group in groups]

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """The arrays of one step, a pure function of `step` ≥ 0; after the plan's last batch its first comes again.

        query_ids int32 [G, B, Lq], query_mask bool [G, B, Lq]; document_ids int32 [G, N, Ld], document_mask bool
        [G, N, Ld]; context_ids int32 [G, J, Ld], context_mask bool [G, J, Ld], a missing context document being all
        False; keep bool [G, B, N]; plan_batch int32 [G], the batches' places in the plan.
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
        return {
            "query_ids": query_ids,
            "query_mask": query_mask,
            "document_ids": document_ids,
            "document_mask": document_mask,
            "context_ids": context_ids,
            "context_mask": context_mask,
            "keep": np.stack([self.plan.keep(place) for place in places]),
            "plan_batch": np.array(places, np.int32),
        }

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

    def iterate(self, start: int, stop: int, *, threads: int, prefetch: int) -> Iterator[dict[str, np.ndarray]]:
        """`batch(start)` … `batch(stop − 1)` in order; Grain computes up to `prefetch` of them ahead in `threads`.

        With threads = 0 or prefetch = 0 each batch is computed when it is asked for.
        """
        if not 0 <= start <= stop:
            raise ValueError(f"expected 0 ≤ start ≤ stop, got {start} and {stop}")
        import grain  # loads jax, which this package does without elsewhere

        options = grain.ReadOptions(num_threads=min(threads, prefetch), prefetch_buffer_size=prefetch)
        dataset = grain.MapDataset.range(start, stop).map(self.batch).to_iter_dataset(options)
        # Closing lets go of the threads when the caller stops early.
        with closing(iter(dataset)) as batches:
            yield from batches


def _tokens(ragged, rows: Int64[np.ndarray, "G rows"], length: int) -> tuple[np.ndarray, np.ndarray]:
    ids, mask = ragged.padded(rows.reshape(-1), length)
    return ids.reshape(*rows.shape, length), mask.reshape(*rows.shape, length)
