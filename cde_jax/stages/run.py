"""A run: its stages in order, each of which reads named files of the work directory and leaves named files there."""

import importlib.metadata
import logging
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cde_jax.config import Config, check_same_run, from_config_dict
from cde_jax.data.files import read_json, write_json
from cde_jax.evaluation import metrics
from cde_jax.retrieval.embedder import Embedder
from cde_jax.stages import report
from cde_jax.stages.evaluate import CHECKPOINTS, NOTHING, evaluate, reported_sets, trained
from cde_jax.stages.export import export
from cde_jax.stages.prepare import Encoders, load_prepared, prepare
from cde_jax.stages.train import train

log = logging.getLogger(__name__)

STAGES = ("prepare", "train", "evaluate", "export")
CONFIG = "config.json"
_VERSIONS = ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "faiss-cpu", "scikit-learn", "tokenizers")


def run(config: Any, workdir: Path, stage: str = "all", *, rebuild: bool = False) -> Iterator[str]:
    """Run one stage or all, in order; yields what each reports, as text. Stops after an interrupted training.

    `config` is a ConfigDict or a nested dict with every key.
    """
    if stage not in ("all", *STAGES):
        raise ValueError(f"unknown stage {stage!r}: choose all, {', '.join(STAGES)}")
    stages = STAGES if stage == "all" else (stage,)
    config = from_config_dict(config)
    claim(config, workdir, rebuild)
    if "prepare" in stages:
        prepared = prepare(config, workdir, rebuild=rebuild, checkpoint=_checkpoint_encoders)
        yield report.write(prepared.pairs, prepared.plan, workdir)
        if stages == ("prepare",):
            return
    else:
        prepared = load_prepared(config, workdir)
    if "train" in stages and not train(config, workdir, prepared):
        return
    if stages == ("train",):
        return
    sets = reported_sets(config, workdir) if "evaluate" in stages else []
    if stages == ("evaluate",) and not sets:
        raise ValueError(NOTHING)
    embedder = trained(config, workdir, prepared)
    if sets:
        yield metrics.table(evaluate(config, embedder, sets, workdir, prepared), f"NDCG@{config.evaluate.cutoff}")
    elif "evaluate" in stages:
        yield NOTHING
    if "export" in stages:
        yield f"exported to {export(config, embedder, workdir, prepared)}"


def claim(config: Config, workdir: Path, rebuild: bool = False) -> None:
    """Write config.json, or check that the work directory's checkpoints are of this configuration.

    Store and plan are checked where they are read, against the settings that made them. With `rebuild` another
    configuration may take the directory over; checkpoints are moved aside, never deleted.
    """
    file, checkpoints = workdir / CONFIG, workdir / CHECKPOINTS
    if file.exists() and checkpoints.exists() and any(checkpoints.iterdir()):
        if rebuild:
            _move_aside(checkpoints)
        else:
            check_same_run(config.as_dict(), read_json(file)["config"], str(workdir))
    versions = {name: importlib.metadata.version(name) for name in _VERSIONS} | {"python": platform.python_version()}
    write_json(file, {"config": config.as_dict(), "versions": versions})


def _checkpoint_encoders(directory: str) -> Encoders:
    """One of our own models as a surrogate."""
    embedder = Embedder.from_pretrained(directory, progress=False)
    return embedder.encode_queries, embedder.encode_documents


def _move_aside(folder: Path) -> None:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.before-{number}")).exists():
        number += 1
    folder.rename(aside)
    log.warning("%s was moved to %s", folder, aside)
