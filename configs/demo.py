"""The whole job on a laptop in minutes: docstrings of our own dependencies, held-out packages as evaluation sets.

Command: make demo   (python -m cde_jax.main --config=configs/demo.py --workdir=runs/demo)
"""

from configs import base


def get_config(variant: str = ""):
    """Four layers of width 128; `variant` as in `base.apply_variant`."""
    c = base.get_config()
    c.data.held_out = ("scipy", "optax", "fsspec", "pygments", "click", "urllib3", "markdown_it", "joblib")
    c.data.query_prefix = c.data.document_prefix = ""  # a prefix would take a quarter of a 16-token query
    c.data.query_length = 16
    c.data.document_length = 48
    c.batching.batch_size = 128
    c.batching.cluster_size = 128
    c.batching.iterations = 20
    c.batching.epochs = 6
    c.model.context_size = 32
    c.model.width = 128
    c.model.layers = 4
    c.model.heads = 4
    c.model.mlp_width = 256
    c.model.max_positions = 512
    c.train.learning_rate = 1e-3
    c.train.warmup_steps = 50
    c.train.checkpoint_every = 200
    c.evaluate.development = "joblib"  # chooses the best checkpoint; the other seven are the result
    return base.apply_variant(c, variant)
