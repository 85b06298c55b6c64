"""What a batch plan is made by: named once here, checked when it is put together, repeated in the plan's manifest."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from cde_jax.batching.pack import PACKINGS

METHODS = ("random", "clustered")
AT_LEAST = {  # the smallest value of a setting
    "batch_size": 1, "cluster_size": 1, "cluster_dimensions": 0, "cluster_rows": 1, "iterations": 1, "tries": 1,
    "epochs": 1, "hard_negatives": 0, "mine_first": 0, "mine_last": 0, "seed": 0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PlanSettings:
    """The settings of `build_plan`. Raises ValueError for one outside its range."""

    batch_size: int  # B
    method: str  # "clustered" within domains, or "random": each domain is one cluster
    cluster_size: int  # pairs in a cluster, on average
    cluster_dimensions: int  # this and the next three: as `cluster.cluster_domains` has them
    cluster_rows: int
    iterations: int
    tries: int
    packing: str  # the order of the clusters, "random" or "tsp"
    epochs: int
    domain_weights: Sequence[str]  # "NAME=0.5"; `pack` has their meaning, and which rows an epoch leaves out
    hard_negatives: int  # K: from the data, then mined, then any of the group's
    mine_first: int  # ranks and margin of mined ones: as `mine.mine_hard_negatives` has them
    mine_last: int  # 0: none are mined
    mine_margin: float
    margin: float | None  # ε of equation 4 of the paper; None masks equal texts only
    seed: int

    def __post_init__(self):
        for name, smallest in AT_LEAST.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"expected {name} ≥ {smallest}, got {getattr(self, name)}; change it in the config")
        for name, known in (("method", METHODS), ("packing", PACKINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"expected {name} to be one of {', '.join(known)}; got {getattr(self, name)!r}")
        if self.batch_size * (1 + self.hard_negatives) < 2:
            raise ValueError("expected at least two documents in a batch, got batch_size=1 without hard negatives")
        for name, also in (("margin", " or None"), ("mine_margin", "")):
            value = getattr(self, name)
            if not (value is None and also) and not (math.isfinite(value) and -2 <= value <= 2):
                raise ValueError(f"expected {name} in −2…2 (a difference of cosines){also}, got {value}")
        if self.mine_last and not 1 <= self.mine_first <= self.mine_last:
            raise ValueError(
                f"expected 1 ≤ mine_first ≤ mine_last (ranks among the nearest), got {self.mine_first} and "
                f"{self.mine_last}; with mine_last=0 none are mined"
            )

    def as_dict(self) -> dict[str, Any]:
        """As a manifest has it; JSON knows lists only."""
        return dataclasses.asdict(self) | {"domain_weights": list(self.domain_weights)}
