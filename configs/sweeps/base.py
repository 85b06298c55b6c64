"""What the sweeps over models and batches share: short texts and few layers, so that a run takes minutes on a CPU.

A sweep is a module with BASE, the name of a config; CHANGES of it for all variants; and VARIANTS, {name: changes}, the
first of which is the baseline. Changes are {"section.key": value}; `benchmarks/sweep.py` runs them. Pretrained weights
are those of the base config (`--start` names others); a variant starts from random weights with SCRATCH.
"""

BASE = "minilm"
CHANGES = {
    "data.source": "jsonl",
    "data.held_out": (),
    "data.query_length": 32,
    "data.document_length": 64,
    "batching.batch_size": 128,
    "batching.cluster_size": 512,
    "batching.epochs": 1,
    "model.layers": 3,
    "model.init.layers": 3,
}
BIENCODER = {"model.kind": "biencoder"}
ISOLATED = {"model.kind": "contextual", "model.context_attention": "isolated"}
JOINT = {"model.kind": "contextual", "model.context_attention": "joint"}
MODELS = {"biencoder": BIENCODER, "isolated": ISOLATED, "joint": JOINT}
RANDOM, CLUSTERED = {"batching.method": "random"}, {"batching.method": "clustered"}
SCRATCH = {"model.init.first_stage": "", "model.init.second_stage": "", "model.init.layers": 0}
