"""The paper's small setting: six layers, 64 tokens, 64 context documents (arXiv 2410.02525, section 5).

Command: python -m cde_jax.main --config=configs/small.py --workdir=DIR --config.data.paths="('pairs/',)"
The paper varies batches and clusters from 256 to 4096: --config.batching.batch_size=… --config.batching.cluster_size=…
Hardware: one accelerator. Time and score: not measured yet.
"""

from configs import base


def get_config(variant: str = ""):
    """Six layers of NomicBERT in both stages; `variant` as in `base.apply_variant`."""
    c = base.get_config()
    c.data.source = "jsonl"
    c.data.tokenizer = "bert-base-uncased"
    c.data.query_length = c.data.document_length = 64
    c.model.vocab_size = 30528
    c.model.layers = 6
    c.model.context_size = 64
    c.model.init.first_stage = "nomic-ai/nomic-bert-2048"
    c.model.init.second_stage = "nomic-ai/nomic-bert-2048"
    c.model.init.layers = 6
    c.model.slot_bias = None  # no gates: why is in configs/minilm.py
    c.train.query_chunk = c.train.document_chunk = 256
    return base.apply_variant(c, variant)
