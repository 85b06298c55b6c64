"""The paper's small setting: six layers, 64 tokens, 64 context documents (arXiv 2410.02525, section 5).

Command: python -m cde_jax.main --config=configs/small.py --workdir=DIR --config.data.paths="('pairs/',)"
The paper varies batches and clusters from 256 to 4096: --config.batching.batch_size=… --config.batching.cluster_size=…;
with --config.batching.vectors_cache=FOLDER the cells of such a grid share the surrogates' vectors.
Hardware: one accelerator. Time and score: not measured yet.

The surrogates are the paper's and need the hub once: GTR arranges the pairs, nomic-embed finds false negatives. The
variant `:lsa` needs no download, but LSA at ε = 0 masks 27 % of the negatives on the pairs of ../shared/data/train.
"""

from configs import base

NOMIC_BERT = "nomic-ai/nomic-bert-2048"


def get_config(variant: str = ""):
    """Six layers of NomicBERT in both stages; `variant` as in `base.apply_variant`."""
    c = base.get_config()
    paper(c)
    c.data.query_length = c.data.document_length = 64
    c.model.layers = 6
    c.model.context_size = 64
    c.model.init.layers = 6
    c.train.document_chunk = 256
    return base.apply_variant(c, variant)


def paper(c) -> None:
    """What both settings of the paper share: data, surrogates, and NomicBERT in both stages."""
    c.data.source = "jsonl"
    c.data.tokenizer = "bert-base-uncased"
    c.batching.surrogate = "sentence-transformers:sentence-transformers/gtr-t5-base"
    c.batching.filter_surrogate = "sentence-transformers:nomic-ai/nomic-embed-text-v1"
    c.batching.filter_prompts = ("search_query: ", "search_document: ")
    c.batching.surrogate_dtype = "bfloat16"
    c.model.vocab_size = 30528  # NomicBERT pads the 30,522 tokens of its tokenizer to a multiple of 64
    c.model.init.first_stage = c.model.init.second_stage = NOMIC_BERT
    c.model.slot_bias = None  # no gates: why is in configs/minilm.py
