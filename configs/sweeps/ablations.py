"""Isolated attention on clustered batches, and without each of its parts in turn."""

from configs.sweeps.base import BASE, BIENCODER, CHANGES, ISOLATED, JOINT, RANDOM, SCRATCH

VARIANTS = {
    "isolated": ISOLATED,
    "biencoder": BIENCODER,
    "biencoder-head": {**BIENCODER, "model.head": True},
    "random-biencoder": {**RANDOM, **BIENCODER},
    "random-isolated": {**RANDOM, **ISOLATED},
    "joint": JOINT,
    "null-1.0": {**ISOLATED, "train.sequence_dropout": 1.0},
    "bias-minus-5.0": {**ISOLATED, "model.slot_bias": -5.0},
    "scratch-isolated": {**ISOLATED, **SCRATCH},
}
__all__ = ["BASE", "CHANGES", "VARIANTS"]
