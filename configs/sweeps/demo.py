"""The demo's three models from random weights, on the docstrings of installed packages: 150 steps each."""

from configs.sweeps.base import BIENCODER, ISOLATED, JOINT

BASE = "demo"
CHANGES = {"train.steps": 150, "evaluate.baselines": False}
VARIANTS = {
    "biencoder": {**BIENCODER, "model.head": False},
    "biencoder-head": BIENCODER,
    "joint": JOINT,
    "isolated": ISOLATED,
}
