"""A run: its stages in order, each of which reads named files of the work directory and leaves named files there.

Training and ranking need no more than JAX: each stage imports its libraries when it is run.
"""

import importlib.metadata
import logging
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cde_jax.config import Config, check_same_run, from_config_dict
from cde_jax.data.files import write_json
from cde_jax.evaluation import metrics
from cde_jax.stages import check
from cde_jax.stages.workdir import CHECKPOINTS, CONFIG, TRAINING, load_prepared, locked, move_aside, read_record

log = logging.getLogger(__name__)

# "rank" is the part of "evaluate" that needs an accelerator: for a work directory that is carried to one and back.
STAGES = ("prepare", "train", "rank", "evaluate", "export")
_VERSIONS = (
    "jax",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "scikit-learn",
    "tokenizers",
    "faiss-cpu",
    "faiss-gpu",
)


def run(config: Any, workdir: Path, stage: str = "all", *, rebuild: bool = False) -> Iterator[str]:
    """Run one stage or all, in order; yields what each reports, as text. Stops after an interrupted training.

    `config` is a ConfigDict or a nested dict with every key. What the configuration and a first look at the inputs can
    tell is checked before anything is written. A second process in the same work directory gets a ValueError.
    """
    if stage not in ("all", *STAGES):
        raise ValueError(f"unknown stage {stage!r}: choose all, {', '.join(STAGES)}")
    stages = STAGES if stage == "all" else (stage,)
    config = from_config_dict(config)
    check.check_inputs(config, stages)
    source = None
    if "prepare" in stages:
        from cde_jax.stages.prepare import open_source

        source = open_source(config, workdir)
    with locked(workdir):
        yield from _run(config, workdir, stages, source, rebuild)


def _run(config: Config, workdir: Path, stages: Sequence[str], source: Any, rebuild: bool) -> Iterator[str]:
    checkpoints, file = workdir / CHECKPOINTS, workdir / CONFIG
    trained_before = checkpoints.is_dir() and any(checkpoints.iterdir())
    if trained_before and not rebuild and (before := read_record(file, config=dict)):
        check_same_run(config.as_dict(), before["config"], str(workdir))
    if not file.exists():
        _write_config(config, file)
    if "prepare" in stages:
        from cde_jax.stages import prepare, report

        prepared = prepare.prepare(config, workdir, source, rebuild=rebuild, training="train" in stages)
    else:
        prepared = load_prepared(config, workdir)
    from cde_jax.stages import evaluate

    if trained_before and rebuild and _training_identity(workdir) != evaluate.run_identity(config, prepared.plan):
        move_aside(checkpoints)
    if prepared.tokenizer and {"prepare", "evaluate"} & set(stages):
        evaluate.write_token_sets(config, workdir, prepared)
    _write_config(config, file)  # only now: a work directory that refuses another configuration keeps its own
    if "prepare" in stages:
        yield report.write(prepared.pairs, prepared.plan, workdir)
    if "train" in stages:
        from cde_jax.stages.train import train

        if not train(config, workdir, prepared):
            return
    if not {"rank", "evaluate", "export"} & set(stages):
        return
    if not evaluate.reported_sets(config):
        if list(stages) in (["rank"], ["evaluate"]):
            raise ValueError(evaluate.NOTHING)
        yield evaluate.NOTHING
        stages = [stage for stage in stages if stage == "export"]
    embedder = evaluate.trained(config, workdir, prepared)
    if "evaluate" in stages:
        means = evaluate.evaluate(config, embedder, workdir, prepared)
        yield metrics.table(means, f"NDCG@{config.evaluate.cutoff}")
    elif "rank" in stages:
        evaluate.rank(config, embedder, workdir, prepared)
    if "export" in stages:
        from cde_jax.stages.export import export

        yield f"exported to {export(config, embedder, workdir, prepared)}"


def _training_identity(workdir: Path) -> dict[str, str] | None:
    """What the checkpoints are tied to; None where that is not known."""
    try:
        return (read_record(workdir / TRAINING, identity=dict) or {}).get("identity")
    except ValueError:
        return None


def _write_config(config: Config, file: Path) -> None:
    versions = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # FAISS is one of two; training needs few of these
            continue
    write_json(file, {"config": config.as_dict(), "versions": versions})
