"""The defaults of every setting, as a ConfigDict; `cde_jax/config.py` declares them, the other configs override."""

import dataclasses

from ml_collections import ConfigDict

from cde_jax.config import Config

VARIANTS = {
    "biencoder": {"model.kind": "biencoder"},
    "contextual": {"model.kind": "contextual", "model.context_attention": "joint"},  # as the paper
    "joint": {"model.kind": "contextual", "model.context_attention": "joint"},
    "isolated": {"model.kind": "contextual", "model.context_attention": "isolated"},
    "random": {"batching.method": "random"},
    "clustered": {"batching.method": "clustered"},
    # No download: latent semantic analysis places pairs and finds false negatives.
    "lsa": {
        **{"batching.surrogate": "lsa", "batching.surrogate_prompts": ()},
        **{"batching.filter_surrogate": "", "batching.filter_prompts": ()},
    },
}


def get_config(variant: str = "") -> ConfigDict:
    """The defaults, with a variant: names of `VARIANTS`, joined by commas, e.g. "joint,random"."""
    return apply_variant(ConfigDict(dataclasses.asdict(Config())), variant)


def apply_variant(c: ConfigDict, variant: str) -> ConfigDict:
    """Change `c` as the named variants say, the last one last. Raises ValueError for an unknown one."""
    for name in filter(None, variant.split(",")):
        if name not in VARIANTS:
            known = "biencoder, contextual (also: joint), isolated; random, clustered; lsa"
            raise ValueError(f"unknown variant {name!r}: known are {known}, joined by commas, e.g. :isolated,clustered")
        c.update_from_flattened_dict(VARIANTS[name])
    return c
