"""The paper's large setting: NomicBERT base twice, 512 tokens, 512 context documents (arXiv 2410.02525, section 5).

Command: python -m cde_jax.main --config=configs/large.py --workdir=DIR --config.data.paths="('pairs/',)"
Hardware: one 80 GB accelerator or more; which settings change with their number is in docs/scaling.md.
Time and score: not measured yet. The surrogates, and the variant `:lsa`, are those of configs/small.py.
"""

from cde_jax.config import AUTO
from configs import base, small


def get_config(variant: str = ""):
    """281 M parameters; `variant` as in `base.apply_variant`."""
    c = base.get_config()
    small.paper(c)
    c.train.document_chunk = c.train.context_chunk = AUTO  # recomputation and chunks by the memory of the accelerator
    return base.apply_variant(c, variant)
