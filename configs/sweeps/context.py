"""Isolated attention on clustered batches with one setting of the context changed, beside a biencoder.

Source of the context documents, slot bias (gates), first stage, number of slots, soft prompt, sequence dropout.
"""

from configs.sweeps.base import BASE, BIENCODER, CHANGES, ISOLATED

_SETTINGS = {
    "source": ("batching.context_source", ("domain",)),
    "bias": ("model.slot_bias", (-5.0, -2.0, 0.0)),
    "first-stage-rate": ("train.first_stage_rate", (0.0, 3.0)),  # 0: frozen
    "slots": ("model.context_size", (16, 64, 128, 256, 512)),
    "prompt": ("model.soft_prompt", (0, 32)),
    "null": ("train.sequence_dropout", (0.05, 0.2, 0.5, 1.0)),  # 1: trained on the null embedding alone
}
VARIANTS = {
    "biencoder": BIENCODER,
    "biencoder-head": {**BIENCODER, "model.head": True},  # the output projection that contextual models have
    "isolated": ISOLATED,
    **{
        f"{name}-{value}".replace("--", "-minus-"): {**ISOLATED, key: value}
        for name, (key, values) in _SETTINGS.items()
        for value in values
    },
}
__all__ = ["BASE", "CHANGES", "VARIANTS"]
