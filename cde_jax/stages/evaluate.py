"""The evaluation stage: NDCG@k of the trained model and the baselines → evaluation.json."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
from flax import nnx

from cde_jax.batching.plan import BatchPlan
from cde_jax.batching.surrogate import Lsa, Texts
from cde_jax.config import Config, Train, names_affecting
from cde_jax.data.files import fingerprint, read_json, write_json
from cde_jax.data.sources.beir import EvaluationSet
from cde_jax.data.tokens import Tokenizer
from cde_jax.evaluation import baselines, beir
from cde_jax.evaluation.metrics import mean_over_sets
from cde_jax.interop.read import TextSettings
from cde_jax.models.contextual import Biencoder, ContextualEncoder
from cde_jax.retrieval.embedder import Embedder
from cde_jax.stages.assemble import build_model, compute_dtype, make_training
from cde_jax.stages.prepare import LSA, TOKENIZER, Prepared, evaluation_sets
from cde_jax.training.checkpoint import Checkpoints

log = logging.getLogger(__name__)

CHECKPOINTS, EVALUATION, PER_QUERY = "checkpoints", "evaluation.json", "per_query.json"
OTHER_DOCUMENTS = 4096  # training documents that stand for a context of the wrong corpus


NOTHING = (
    "nothing to evaluate: name packages in data.held_out or BEIR folders in data.evaluation (the one that is "
    "evaluate.development does not count)"
)


def reported_sets(config: Config, workdir: Path) -> list[EvaluationSet]:
    """The evaluation sets without the development set: that one chose the checkpoint, so its score means nothing."""
    return [s for s in evaluation_sets(config, workdir) if s.name != config.evaluate.development]


def evaluate(
    config: Config, embedder: Embedder, sets: list[EvaluationSet], workdir: Path, prepared: Prepared
) -> dict[str, dict[str, float]]:
    """NDCG of the trained model by set and kind of context, beside the baselines; means are written to evaluation.json.

    The scores of each query are written to per_query.json (`metrics.Scores.from_json` reads it).

    Kept as it is where it was measured with the same weights, sets and settings.
    """
    e, pairs = config.evaluate, prepared.pairs
    identity = fingerprint(
        [embedder.weights, pairs.fingerprint, config.seed, e.cutoff, e.baselines, [dataclasses.asdict(s) for s in sets]]
    )
    file = workdir / EVALUATION
    if file.exists() and (before := read_json(file))["fingerprint"] == identity:
        log.info("the evaluation of this model is there: kept")
        return before["sets"]
    documents = Texts(pairs.ragged("document_text"))
    count = min(OTHER_DOCUMENTS, len(documents))
    drawn = np.random.default_rng([config.seed, 1]).choice(len(documents), count, replace=False)
    scores = beir.evaluate_embedder(embedder, sets, [documents[i] for i in drawn.tolist()], config.seed, e.cutoff)
    if e.baselines:
        b = config.batching
        lsa = {"LSA": Lsa.load(workdir / LSA).encode} if "lsa" in (b.surrogate, b.filter_surrogate) else {}
        scores = scores.merged(baselines.evaluate_baselines(sets, lsa, e.cutoff))
    means = scores.means
    write_json(workdir / PER_QUERY, scores.to_json())
    content = {"metric": f"ndcg@{e.cutoff}", "fingerprint": identity, "sets": means, "mean": mean_over_sets(means)}
    write_json(file, content)
    return means


def make_embedder(
    config: Config, workdir: Path, model: Biencoder | ContextualEncoder, tokenizer: Tokenizer
) -> Embedder:
    """The model with the run's tokenizer and text settings."""
    d = config.data
    settings = TextSettings(d.query_prefix, d.document_prefix, d.query_length, d.document_length)
    return Embedder(model, tokenizer, settings, workdir / TOKENIZER)


def run_identity(config: Config, plan: BatchPlan) -> dict[str, str]:
    """What a checkpoint is tied to: the plan and the settings that shape parameters or optimiser."""
    train = {name: getattr(config.train, name) for name in names_affecting(Train, "training")}
    settings = {"seed": config.seed, "model": dataclasses.asdict(config.model), "train": train}
    return {"plan": plan.fingerprint, "config": fingerprint(settings)}


def trained(config: Config, workdir: Path, prepared: Prepared) -> Embedder:
    """The trained model of a work directory: its best checkpoint, or its newest, as the config says."""
    checkpoints = Checkpoints(workdir / CHECKPOINTS, run_identity(config, prepared.plan))
    try:
        step = checkpoints.best() if config.evaluate.checkpoint == "best" else checkpoints.newest()
        if step is None:
            raise ValueError(f"{workdir} has no checkpoint yet: run --stage=train first")
        model = build_model(config, prepared.tokenizer.vocab_size, compute_dtype(config))
        training = make_training(config, model, prepared.plan)
        state = checkpoints.restore(step, training.state)
    finally:
        checkpoints.close()
    log.info("checkpoint %d of %d", step, training.steps)
    return make_embedder(config, workdir, nnx.merge(training.graph, state.params), prepared.tokenizer)
