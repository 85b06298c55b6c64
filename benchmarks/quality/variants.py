"""The grid: plans that the first command makes, variants that the second trains, and groups of them.

A variant is a flat dict of changes of the configuration by their dotted names, and two more keys: "plan", the name of
the batch plan it trains on (default "clustered"), and "start", whether its encoders start from the file's pretrained
weights (default True). The first variant of a list is what the others are compared with.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

Variant = Mapping[str, Any]

PLANS: dict[str, dict[str, Any]] = {
    "random": {"batching.method": "random"},
    "clustered": {"batching.method": "clustered"},
    **{f"clustered-{size}": {"batching.cluster_size": size} for size in (64, 128, 256, 1024, 2048, 4096)},
    **{f"clustered-batch-{size}": {"batching.batch_size": size} for size in (32, 64, 256, 512)},
    **{f"random-batch-{s}": {"batching.method": "random", "batching.batch_size": s} for s in (32, 64, 256, 512)},
    "margin-none": {"batching.filter_margin": None},
    **{f"margin-{m}": {"batching.filter_margin": m} for m in (-0.1, 0.0, 0.1, 0.2)},
}

MODELS: dict[str, dict[str, Any]] = {
    "biencoder": {"model.kind": "biencoder"},
    "isolated": {"model.kind": "contextual", "model.context_attention": "isolated", "model.slot_bias": None},
    "joint": {"model.kind": "contextual", "model.context_attention": "joint", "model.slot_bias": None},
}
BIENCODER, ISOLATED = MODELS["biencoder"], MODELS["isolated"]


def _table1() -> dict[str, Variant]:
    """The paper's table 1, from pretrained weights and from random ones."""
    return {
        f"{before}{plan}-{model}": {**changes, "plan": plan, "start": not before}
        for before in ("", "scratch-")
        for plan in ("random", "clustered")
        for model, changes in MODELS.items()
    }


def _isolated(prefix: str, key: str, values: Sequence[Any]) -> dict[str, Variant]:
    """Isolated attention on clustered batches with one setting changed."""
    return {f"{prefix}-{value}".lower().replace("--", "-minus-"): {**ISOLATED, key: value} for value in values}


def _batches() -> dict[str, Variant]:
    """Each plan other than the two of table 1, for a biencoder and with context."""
    others = [name for name in PLANS if name not in ("random", "clustered")]
    return {
        f"{plan}-{model}": {**MODELS[model], "plan": plan} for plan in others for model in ("biencoder", "isolated")
    }


_BASE = {"clustered-biencoder": BIENCODER, "clustered-isolated": ISOLATED}  # stand in table 1 too
_BY_GROUP: dict[str, dict[str, Variant]] = {
    "table1": _table1(),
    "source": {**_BASE, **_isolated("source", "batching.context_source", ("batch", "domain"))},
    "bias": {**_BASE, **_isolated("bias", "model.slot_bias", (-5.0, -2.0, 0.0))},
    "first": {
        **_BASE,
        "clustered-head": {**BIENCODER, "model.head": True},  # no first stage, but the same output projection
        "first-frozen": {**ISOLATED, "train.first_stage_rate": 0.0},
        "first-fast": {**ISOLATED, "train.first_stage_rate": 3.0},
    },
    "slots": {
        **_BASE,
        **_isolated("slots", "model.context_size", (16, 64, 128, 256, 512)),
        **_isolated("prompt", "model.soft_prompt", (0, 32)),
        **_isolated("null", "train.sequence_dropout", (0.05, 0.2, 0.5, 1.0)),
    },
    "batches": {**_BASE, **_batches()},
}
# Isolated slots on clustered batches, and without each of these parts in turn.
_ABLATIONS = (
    "random-biencoder", "clustered-isolated", "clustered-biencoder", "clustered-head", "null-1.0", "random-isolated",
    "clustered-joint", "bias-minus-5.0", "scratch-clustered-isolated",
)  # fmt: skip
GROUPS: dict[str, tuple[str, ...]] = {group: tuple(variants) for group, variants in _BY_GROUP.items()}
GROUPS["ablations"] = _ABLATIONS
VARIANTS: dict[str, Variant] = {
    name: {"plan": "clustered", "start": True, **variant}
    for variants in _BY_GROUP.values()
    for name, variant in variants.items()
}


def expand(names: Sequence[str]) -> dict[str, Variant]:
    """The named variants in order, each once; a group's name stands for its variants.

    Raises ValueError for an unknown name, with the nearest ones that are known.
    """
    found: dict[str, Variant] = {}
    for name in names:
        if name not in GROUPS and name not in VARIANTS:
            raise ValueError(_unknown("variant", name, (*GROUPS, *VARIANTS)))
        found |= {one: VARIANTS[one] for one in GROUPS.get(name, (name,))}
    return found


def plans(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The changes of the configuration of each named plan. Raises ValueError for an unknown name."""
    for name in names:
        if name not in PLANS:
            raise ValueError(_unknown("plan", name, tuple(PLANS)))
    return {name: PLANS[name] for name in names}


def _unknown(kind: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 3, 0.4)
    return f"unknown {kind} {name!r}: " + (
        f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
    )
