"""The defaults of every setting, as a ConfigDict; `cde_jax/config.py` declares them, the other configs override."""

import dataclasses

from ml_collections import ConfigDict

from cde_jax.config import Config


def get_config(variant: str = "") -> ConfigDict:
    """The defaults. `variant` is a comma-separated choice, e.g. `joint,random`; see `apply_variant`."""
    return apply_variant(ConfigDict(dataclasses.asdict(Config())), variant)


def apply_variant(c: ConfigDict, variant: str) -> ConfigDict:
    """Choose the model (biencoder, contextual = the paper's joint attention, isolated) and the batches."""
    for name in filter(None, variant.split(",")):
        if name == "biencoder":
            c.model.kind = "biencoder"
        elif name in ("contextual", "joint", "isolated"):
            c.model.kind = "contextual"
            c.model.context_attention = "isolated" if name == "isolated" else "joint"
        elif name in ("random", "clustered"):
            c.batching.method = name
        else:
            known = "biencoder, contextual (also: joint), isolated; random, clustered"
            raise ValueError(f"unknown variant {name!r}: known are {known}, joined by commas, e.g. :isolated,clustered")
    return c
