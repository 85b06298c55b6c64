"""The whole job on a laptop in minutes: docstrings of our own dependencies, held-out packages as evaluation sets.

Command: make demo   (python -m cde_jax.main --config=configs/demo.py --workdir=runs/demo)
Hardware: 2 CPU cores (AMD EPYC), 2.9 GiB. Time after installation: 5 min 14 s to 5 min 57 s, 510 to 570 s of CPU.
Score: mean NDCG@10 0.630 with corpus statistics, 0.554 whitened by the corpus, 0.546 with any context or none; BM25
0.576, LSA 0.216 (benchmarks/results/demo.json). Three epochs: 0.574 whitened, 0.561 with any context or none.
"""

from configs import base


def get_config(variant: str = ""):
    """Two layers of width 256; `variant` as in `base.apply_variant`."""
    c = base.get_config()
    c.data.held_out = ("scipy", "optax", "fsspec", "pygments", "click", "urllib3", "markdown_it")
    c.data.query_prefix = c.data.document_prefix = ""  # a prefix would take a sixth of a 24-token query
    c.data.query_length = 24
    c.data.document_length = 80
    c.batching.batch_size = 128
    c.batching.cluster_size = 128
    c.batching.iterations = 20
    c.batching.epochs = 1
    c.batching.filter_margin = 0.1
    c.model.context_size = 32
    c.model.width = 256
    c.model.layers = 2
    c.model.first_stage_layers = 1
    c.model.heads = 4
    c.model.mlp_width = 512
    c.model.max_positions = 512
    c.model.head = True  # a biencoder gains 2.7 points by it here (benchmarks/results/variants_cpu.jsonl)
    c.train.text_lengths = 2  # queries are short, documents nearly all as long as allowed; each takes time to compile
    c.train.learning_rate = 2e-3
    c.train.warmup_steps = 50
    c.train.checkpoint_every = 200
    return base.apply_variant(c, variant)
