"""A short contextual fine-tuning of a real pretrained encoder, all-MiniLM-L6-v2, on the demo's docstrings.

Command: python -m cde_jax.main --config=configs/minilm.py --workdir=DIR [--config.model.init.second_stage=PATH …], or
with several seeds python benchmarks/sweep.py --sweep=minilm --workdir=DIR --variants isolated --seeds 0 1
Hardware: 2 CPU cores. Time: about 6 minutes a seed, evaluation included (12 on one core).
Score: mean NDCG@10 0.741 over 2 seeds, whitened 0.748, MiniLM itself 0.675 (benchmarks/results/from_minilm.jsonl).

Why it has no gates: mean NDCG@10 of ten evaluation sets, MiniLM's first three layers after steps of 128 pairs of twelve
other sets, context from the right corpus (quality_cpu.jsonl and quality_centred_cpu.jsonl in benchmarks/results):

                                       steps  seeds   as it is   whitened by the corpus alone   by queries of it too
  biencoder, random batches              200      3      0.567                          0.597                  0.609
  biencoder, clustered batches           200      1      0.569                          0.597                  0.611
  isolated, no gates                     200      3      0.586                          0.610                  0.621
  the same, all slots null (p = 1)       200      1      0.588                          0.609                  0.622
  isolated, gates from -2, rate 100      200      1      0.579                          0.609                  0.617
  biencoder, random batches               60      3      0.514                          0.561                  0.580
  isolated, no gates                      60      2      0.533                          0.574                  0.590
  isolated, gates from -2, rate 100       60      3      0.525                          0.568                  0.586
  isolated, shut gates                    60      1      0.515

(A rate of 100: gates learned at 100 times the learning rate, a setting that is gone.) Without any context a model
without gates falls behind the biencoder: 0.542 after 200 steps, with another corpus' documents in its slots 0.584.
"""

from configs import base, demo

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def get_config(variant: str = ""):
    """Both stages start from MiniLM; `variant` as in `base.apply_variant`."""
    c = demo.get_config()
    c.data.tokenizer = c.model.init.first_stage = c.model.init.second_stage = MINILM
    c.data.query_length = 32
    c.data.document_length = 96
    c.batching.batch_size = 64
    c.batching.cluster_size = 64
    c.batching.epochs = 1
    c.model.backbone = "bert"
    c.model.width = 384
    c.model.layers = 6
    c.model.first_stage_layers = 0
    c.model.heads = 12
    c.model.mlp_width = 1536
    c.model.max_positions = 512
    c.model.head = False  # as MiniLM has it
    c.model.slot_bias = None  # no gates, as the paper
    c.train.steps = 40
    c.train.learning_rate = 1e-4
    c.train.warmup_steps = 5
    c.train.checkpoint_every = 0
    return base.apply_variant(c, variant)
