"""How similar in-batch negatives are by cluster size (paper, section 5 and figure 3); needs --stage=prepare only."""

from configs.sweeps.base import CLUSTERED, RANDOM

BASE = "small"
CHANGES = {
    "data.tokenizer": "wordpiece",
    "data.query_prefix": "",
    "data.document_prefix": "",
    "batching.surrogate": "lsa",
    "batching.filter_surrogate": "",
    "batching.batch_size": 64,
    "batching.tries": 1,
    "batching.epochs": 1,
    "batching.filter_margin": 0.1,
}
VARIANTS = {
    "random": RANDOM,
    **{f"clusters-{size}": {**CLUSTERED, "batching.cluster_size": size} for size in (64, 256, 1024, 4096, 16384)},
}
