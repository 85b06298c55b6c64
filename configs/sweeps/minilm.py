"""`configs/minilm.py` with context, with gates on the slots that stay shut, and without context."""

from configs.sweeps.base import BIENCODER, ISOLATED

BASE = "minilm"
CHANGES = {}
VARIANTS = {"biencoder": BIENCODER, "isolated": ISOLATED, "isolated-gates": {**ISOLATED, "model.slot_bias": -5.0}}
