"""The evaluation stage: NDCG@k of the trained model and the baselines → evaluation.json, per_query.json.

In two parts: `rank` (rankings.json) reads token ids, so that it runs where there is no tokenizer; `evaluate` scores.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cde_jax.batching.plan import BatchPlan
from cde_jax.config import Config, Train, evaluation_name, names_affecting
from cde_jax.data.files import fingerprint, write_json
from cde_jax.data.sources.beir import EvaluationSet, read_sets
from cde_jax.data.store import Store
from cde_jax.data.tokens import Tokenizer
from cde_jax.evaluation import beir, metrics
from cde_jax.evaluation.beir import KIND, read_tokens, write_tokens
from cde_jax.interop.modules import TextSettings
from cde_jax.models.contextual import Biencoder, ContextualEncoder
from cde_jax.retrieval.embedder import Embedder
from cde_jax.stages.assemble import restore_model
from cde_jax.stages.workdir import (
    CHECKPOINTS,
    EVALUATION,
    LSA,
    PER_QUERY,
    RANKINGS,
    SETS,
    TOKENIZER,
    TOKENS,
    Prepared,
    read_record,
)
from cde_jax.training.checkpoint import Checkpoints

log = logging.getLogger(__name__)

OTHER_DOCUMENTS = 4096  # training documents that stand for a context of the wrong corpus
NOTHING = (
    "nothing to evaluate: name packages in data.held_out or BEIR folders in data.evaluation (the one that is "
    "evaluate.development does not count)"
)


def evaluation_sets(config: Config, workdir: Path, names: Sequence[str]) -> list[EvaluationSet]:
    """The named sets among the held-out packages that `prepare` wrote and the folders that the config names."""
    folders = {name: workdir / SETS / name for name in config.data.evaluation_names}
    folders |= {evaluation_name(path): Path(path) for path in config.data.evaluation}
    return read_sets([folders[name] for name in names])


def reported_sets(config: Config) -> list[str]:
    """Names of the evaluation sets without the development set: that one chose the checkpoint."""
    return [name for name in config.data.evaluation_names if name != config.evaluate.development]


def write_token_sets(config: Config, workdir: Path, prepared: Prepared) -> None:
    """Write the evaluation sets as token ids, where they are not there."""
    for dataset in evaluation_sets(config, workdir, config.data.evaluation_names):
        write_tokens(dataset, workdir / TOKENS / dataset.name, prepared.tokenizer, text_settings(config), config.seed)


def evaluate(config: Config, embedder: Embedder, workdir: Path, prepared: Prepared) -> metrics.Means:
    """NDCG of the trained model by set and kind of context, beside the baselines.

    The means are returned and written to evaluation.json, the scores of each query to per_query.json
    (`metrics.Scores.from_json` reads it). Kept where they are of the same rankings and baselines.
    """
    rankings, ranked = rank(config, embedder, workdir, prepared)
    e, identity = config.evaluate, fingerprint([ranked, config.evaluate.baselines])
    if (before := read_scores(workdir)) and before["fingerprint"] == identity:
        log.info("the evaluation of this model is there: kept")
        return before["sets"]
    sets = evaluation_sets(config, workdir, reported_sets(config))
    scores = metrics.score_rankings(rankings, sets, e.cutoff)
    if e.baselines:
        from cde_jax.batching.surrogate import Lsa
        from cde_jax.evaluation.baselines import evaluate_baselines

        b = config.batching
        lsa = {"LSA": Lsa.load(workdir / LSA).encode} if "lsa" in (b.surrogate, b.filter_surrogate) else {}
        scores = scores.merged(evaluate_baselines(sets, lsa, e.cutoff))
    means = scores.means
    write_json(workdir / PER_QUERY, scores.to_json())
    content = {"metric": f"ndcg@{e.cutoff}", "fingerprint": identity, "sets": means}
    write_json(workdir / EVALUATION, content | {"mean": metrics.mean_over_sets(means)})
    return means


def rank(config: Config, embedder: Embedder, workdir: Path, prepared: Prepared) -> tuple[metrics.Rankings, str]:
    """The best documents of every query, and their fingerprint; kept where weights, sets and settings are the same."""
    folders = [workdir / TOKENS / name for name in reported_sets(config)]
    sets = [Store.open(folder, kind=KIND, verify=False).fingerprint for folder in folders]
    pairs, seed, k = prepared.pairs, config.seed, config.evaluate.cutoff
    identity = fingerprint([embedder.weights, pairs.fingerprint, seed, k, sets])
    record = read_record(workdir / RANKINGS, fingerprint=str, rankings=dict)
    if record and record["fingerprint"] == identity:
        log.info("the rankings of this model are there: kept")
        return record["rankings"], identity
    documents = pairs.ragged("document_tokens")
    count = min(OTHER_DOCUMENTS, documents.count())
    drawn = np.random.default_rng([seed, 1]).choice(documents.count(), count, replace=False)
    rankings = beir.rank(embedder, list(map(read_tokens, folders)), [documents.row(i) for i in drawn.tolist()], seed, k)
    write_json(workdir / RANKINGS, {"fingerprint": identity, "rankings": rankings})
    return rankings, identity


def read_scores(workdir: Path) -> dict[str, Any] | None:
    """The content of evaluation.json; None where there is none. Raises ValueError where it holds something else."""
    record = read_record(workdir / EVALUATION, fingerprint=str, sets=dict)
    for row in record["sets"].values() if record else ():
        if not isinstance(row, dict) or not all(isinstance(score, float) for score in row.values()):
            raise ValueError(f"{workdir / EVALUATION}: expected scores of sets, found {row!r:.40}: move it away")
    return record


def make_embedder(
    config: Config, workdir: Path, model: Biencoder | ContextualEncoder, tokenizer: Tokenizer | None
) -> Embedder:
    """The model with the run's tokenizer and text settings."""
    return Embedder(model, tokenizer, text_settings(config), workdir / TOKENIZER)


def text_settings(config: Config) -> TextSettings:
    """Prefixes and lengths of a run's texts."""
    d = config.data
    return TextSettings(d.query_prefix, d.document_prefix, d.query_length, d.document_length)


def run_identity(config: Config, plan: BatchPlan) -> dict[str, str]:
    """What a checkpoint is tied to: the plan and the settings that shape parameters or optimiser."""
    train = {name: getattr(config.train, name) for name in names_affecting(Train, "training")}
    settings = {"seed": config.seed, "model": dataclasses.asdict(config.model), "train": train}
    return {"plan": plan.fingerprint, "config": fingerprint(settings)}


def trained(config: Config, workdir: Path, prepared: Prepared) -> Embedder:
    """The trained model of a work directory: its best checkpoint, or its newest, as the config says."""
    checkpoints = Checkpoints(workdir / CHECKPOINTS, run_identity(config, prepared.plan))
    step = checkpoints.best() if config.evaluate.checkpoint == "best" else checkpoints.newest()
    if step is None:
        raise ValueError(f"{workdir} has no checkpoint yet: run --stage=train first")
    model = restore_model(config, prepared.vocab_size, checkpoints, step)
    log.info("checkpoint %d", step)
    return make_embedder(config, workdir, model, prepared.tokenizer)
