"""The evaluation stage: NDCG@k of the trained model and the baselines → evaluation.json, per_query.json.

In two parts: `rank` (rankings.json) reads token ids, so that it runs where there is no tokenizer; `evaluate` scores.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cde_jax.config import Config, evaluation_name
from cde_jax.data.files import fingerprint, write_json
from cde_jax.data.sources.beir import EvaluationSet, read_sets
from cde_jax.data.store import Store
from cde_jax.evaluation import beir, metrics
from cde_jax.retrieval.embedder import Embedder
from cde_jax.stages import workdir as work
from cde_jax.stages.assemble import make_embedder, restore_model, run_identity, text_settings
from cde_jax.training.checkpoint import Checkpoints

log = logging.getLogger(__name__)

OTHER_DOCUMENTS = 4096  # training documents that stand for a context of the wrong corpus
NOTHING = (
    "nothing to evaluate: name packages in data.held_out or BEIR folders in data.evaluation (those that are "
    "in evaluate.development do not count)"
)


def evaluation_sets(config: Config, workdir: Path, names: Sequence[str]) -> list[EvaluationSet]:
    """The named sets among the held-out packages that `prepare` wrote and the folders that the config names."""
    folders = {name: workdir / work.SETS / name for name in config.data.evaluation_names}
    folders |= {evaluation_name(path): Path(path) for path in config.data.evaluation}
    return read_sets([folders[name] for name in names])


def reported_sets(config: Config) -> list[str]:
    """Names of the evaluation sets without the development sets: those chose the checkpoint."""
    return [name for name in config.data.evaluation_names if name not in config.evaluate.development]


def write_token_sets(config: Config, workdir: Path, prepared: work.Prepared) -> None:
    """Write the evaluation sets as token ids, where they are not there."""
    settings, folder = text_settings(config), workdir / work.TOKENS
    for dataset in evaluation_sets(config, workdir, config.data.evaluation_names):
        beir.write_tokens(dataset, folder / dataset.name, prepared.tokenizer, settings, config.seed)


def trained(config: Config, workdir: Path, prepared: work.Prepared) -> Embedder:
    """The trained model of a work directory: its best checkpoint, or its newest, as the config says."""
    checkpoints = Checkpoints(workdir / work.CHECKPOINTS, run_identity(config, prepared.plan))
    step = checkpoints.best() if config.evaluate.checkpoint == "best" else checkpoints.newest()
    if step is None:
        raise ValueError(f"{workdir} has no checkpoint yet: run --stage=train first")
    model = restore_model(config, prepared.vocab_size, checkpoints, step)
    log.info("checkpoint %d", step)
    return make_embedder(config, workdir, model, prepared.tokenizer)


def evaluate(config: Config, embedder: Embedder, workdir: Path, prepared: work.Prepared) -> metrics.Means:
    """NDCG of the trained model by set and kind of context, beside the baselines.

    The means are returned and written to evaluation.json, the scores of each query to per_query.json
    (`metrics.Scores.from_json` reads it). Kept where they are of the same rankings and baselines.
    """
    rankings, ranked = rank(config, embedder, workdir, prepared)
    e, b, identity = config.evaluate, config.batching, fingerprint([ranked, config.evaluate.baselines])
    if (recorded := read_scores(workdir)) and recorded["fingerprint"] == identity:
        log.info("the evaluation of this model is there: kept")
        return recorded["sets"]
    sets = evaluation_sets(config, workdir, reported_sets(config))
    scores = metrics.score_rankings(rankings, sets, e.cutoff)
    if e.baselines:
        from cde_jax.batching.surrogate import Lsa
        from cde_jax.evaluation.baselines import evaluate_baselines

        has_lsa = "lsa" in (b.surrogate, b.filter_surrogate)
        encoders = {"LSA": Lsa.load(workdir / work.LSA).encode} if has_lsa else {}
        scores = scores.merged(evaluate_baselines(sets, encoders, e.cutoff))
    means = scores.means
    write_json(workdir / work.PER_QUERY, scores.to_json())
    content = {"metric": f"ndcg@{e.cutoff}", "fingerprint": identity, "sets": means}
    write_json(workdir / work.EVALUATION, content | {"mean": metrics.mean_over_sets(means)})
    return means


def rank(config: Config, embedder: Embedder, workdir: Path, prepared: work.Prepared) -> tuple[metrics.Rankings, str]:
    """The best documents of every query, and their fingerprint; kept where weights, sets and settings are the same."""
    folders = [workdir / work.TOKENS / name for name in reported_sets(config)]
    sets = [Store.open(folder, kind=beir.KIND, verify=False).fingerprint for folder in folders]
    pairs, seed, k = prepared.pairs, config.seed, config.evaluate.cutoff
    identity = fingerprint([embedder.weights, pairs.fingerprint, seed, k, sets])
    recorded = work.read_record(workdir / work.RANKINGS, fingerprint=str, rankings=dict)
    if recorded and recorded["fingerprint"] == identity:
        log.info("the rankings of this model are there: kept")
        return recorded["rankings"], identity
    documents = pairs.ragged("document_tokens")
    count = min(OTHER_DOCUMENTS, documents.count())
    drawn = np.random.default_rng([seed, 1]).choice(documents.count(), count, replace=False)
    rankings = beir.rank(
        embedder, list(map(beir.read_tokens, folders)), [documents.row(i) for i in drawn.tolist()], seed, k
    )
    write_json(workdir / work.RANKINGS, {"fingerprint": identity, "rankings": rankings})
    return rankings, identity


def read_scores(workdir: Path) -> dict[str, Any] | None:
    """The content of evaluation.json; None where there is none. Raises ValueError where it holds something else."""
    record = work.read_record(workdir / work.EVALUATION, fingerprint=str, sets=dict)
    for row in record["sets"].values() if record else ():
        if not isinstance(row, dict) or not all(isinstance(score, float) for score in row.values()):
            raise ValueError(f"{workdir / work.EVALUATION}: expected scores of sets, found {row!r:.40}: move it away")
    return record
