"""Which pairs may share a batch.

A domain of at least B rows is a group of its own; smaller domains are merged into one group named "(small domains)",
which is left out if it has fewer than B rows itself.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int64

SMALL_DOMAINS = "(small domains)"


class Group(NamedTuple):
    """Rows that may share a batch: a domain, or the small domains together."""

    name: str
    domains: tuple[int, ...]  # indices of the domains it is made of
    rows: Int64[np.ndarray, " rows"]  # ascending


def domain_groups(
    domain: Int[np.ndarray, " n"], names: Sequence[str], batch_size: int
) -> tuple[list[Group], Group | None]:
    """The groups of n pairs by the rule above, and the group of small domains if it had to be left out.

    domain: the index into `names` of each pair. Raises ValueError if no batch of `batch_size` rows can be made.
    """
    order = np.argsort(domain, kind="stable").astype(np.int64)
    bounds = np.searchsorted(domain[order], np.arange(len(names) + 1))
    rows_of = [order[start:end] for start, end in pairwise(bounds)]
    groups = [Group(names[i], (i,), rows) for i, rows in enumerate(rows_of) if len(rows) >= batch_size]
    small = tuple(i for i, rows in enumerate(rows_of) if 0 < len(rows) < batch_size)
    left_out = None
    if small:
        merged = Group(SMALL_DOMAINS, small, np.sort(np.concatenate([rows_of[i] for i in small])))
        if len(merged.rows) >= batch_size:
            groups.append(merged)
        else:
            left_out = merged
    if not groups:
        raise ValueError(
            f"expected at least one batch of {batch_size} pairs, got {len(domain)} pairs in {len(names)} domains and "
            "none can be made; use a smaller batch_size or more data"
        )
    return groups, left_out
