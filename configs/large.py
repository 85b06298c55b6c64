"""The paper's large setting: NomicBERT base twice, 512 tokens, 512 context documents (arXiv 2410.02525, section 5).

Command: python -m cde_jax.main --config=configs/large.py --workdir=DIR --config.data.paths="('pairs/',)"
Hardware: one 80 GB accelerator or more; `train.batches_per_step` is a multiple of their number.
Time and score: not measured yet.
"""

from configs import base


def get_config(variant: str = ""):
    """281 M parameters; `variant` as in `base.apply_variant`."""
    c = base.get_config()
    c.data.source = "jsonl"
    c.data.tokenizer = "bert-base-uncased"
    c.model.vocab_size = 30528  # NomicBERT pads the 30,522 tokens of its tokenizer to a multiple of 64
    c.model.init.first_stage = "nomic-ai/nomic-bert-2048"
    c.model.init.second_stage = "nomic-ai/nomic-bert-2048"
    c.model.slot_bias = None  # no gates: why is in configs/minilm.py
    c.train.query_chunk = 64
    c.train.document_chunk = 64
    c.train.context_chunk = 64
    return base.apply_variant(c, variant)
