"""Cluster sizes, batch sizes and margins of the false-negative filter, for a biencoder and with context."""

from configs.sweeps.base import BASE, CHANGES, CLUSTERED, MODELS, RANDOM

_BATCHES = {
    "random": RANDOM,
    "clustered": CLUSTERED,
    **{f"clusters-{size}": {"batching.cluster_size": size} for size in (64, 128, 256, 1024, 2048, 4096)},
    **{
        f"{name}-batch-{size}": {**method, "batching.batch_size": size}
        for name, method in {"random": RANDOM, "clustered": CLUSTERED}.items()
        for size in (32, 64, 256, 512)
    },
    **{
        f"margin-{margin}".lower().replace("--", "-minus-"): {"batching.filter_margin": margin}
        for margin in (None, -0.1, 0.0, 0.2)  # 0.1: the base
    },
}
VARIANTS = {
    f"{name}-{model}": {**batches, **MODELS[model]}
    for name, batches in _BATCHES.items()
    for model in ("biencoder", "isolated")
}
__all__ = ["BASE", "CHANGES", "VARIANTS"]
