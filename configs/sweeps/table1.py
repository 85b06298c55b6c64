"""The paper's table 1: random and clustered batches for each model, from pretrained weights and from random ones."""

from configs.sweeps.base import BASE, CHANGES, CLUSTERED, MODELS, RANDOM, SCRATCH

VARIANTS = {
    f"{start}{method}-{model}": {**batches, **changes, **weights}
    for start, weights in {"": {}, "scratch-": SCRATCH}.items()
    for method, batches in {"random": RANDOM, "clustered": CLUSTERED}.items()
    for model, changes in MODELS.items()
}
__all__ = ["BASE", "CHANGES", "VARIANTS"]
