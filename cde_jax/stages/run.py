"""A run: its stages in order, each of which reads named files of the work directory and leaves named files there.

Only `prepare` and scoring need more than JAX; their libraries are imported when they are run.
"""

import importlib.metadata
import importlib.util
import logging
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax

from cde_jax.config import Config, from_config_dict
from cde_jax.data.files import fingerprint, write_json
from cde_jax.data.sources import beir
from cde_jax.evaluation import metrics
from cde_jax.stages import assemble, evaluate, export, report, train
from cde_jax.stages import workdir as work
from cde_jax.training.processes import barrier, explain_lost_processes, is_first

log = logging.getLogger(__name__)

# "rank" is the part of "evaluate" that needs an accelerator: for a work directory that is carried to one and back.
STAGES = ("prepare", "train", "rank", "evaluate", "export")
CACHED_PROGRAMS = 10 * 2**30  # bytes of compiled programs that are kept; the oldest go first
_LIBRARIES = "jax flax optax orbax-checkpoint numpy scikit-learn tokenizers faiss-cpu faiss-gpu"


def run(
    config: Any, workdir: Path, stage: str = "all", *, rebuild: bool = False, engine: str = "local"
) -> Iterator[str]:
    """Run one stage or all, in order; yields what each reports, as text. Stops after an interrupted training.

    `config` is a ConfigDict or a nested dict with every key. What the configuration and a first look at the inputs can
    tell is checked before anything is written. A second process in the same work directory gets a ValueError, unless
    both belong to one run (`training.processes`): then all train, and the first one does the rest and reports. engine:
    who prepares, "local" or "ray" (`engines.py`).
    """
    if stage not in ("all", *STAGES):
        raise ValueError(f"unknown stage {stage!r}: choose all, {', '.join(STAGES)}")
    stages = STAGES if stage == "all" else (stage,)
    config = from_config_dict(config)
    cache_programs()
    with explain_lost_processes(), ExitStack() as held:
        with barrier():  # of several processes the first one prepares
            if is_first():
                make = _check_inputs(config, workdir, stages, rebuild, engine)
                held.enter_context(work.locked(workdir))
                prepared = _prepared(config, workdir, make, stages, rebuild)
                if "prepare" in stages:
                    yield report.write(prepared.pairs, prepared.plan, workdir)
        if "train" in stages:
            prepared = prepared if is_first() else work.load_prepared(config, workdir)
            if not train.train(config, workdir, prepared):
                return
        with barrier():
            if is_first() and {"rank", "evaluate", "export"} & set(stages):
                yield from _use(config, workdir, prepared, stages)


def _use(config: Config, workdir: Path, prepared: work.Prepared, stages: Sequence[str]) -> Iterator[str]:
    """Evaluate and export the trained model."""
    embedder = evaluate.trained(config, workdir, prepared)
    if not evaluate.reported_sets(config) and stages == STAGES:
        yield evaluate.NOTHING
    elif "evaluate" in stages:
        means = evaluate.evaluate(config, embedder, workdir, prepared)
        yield metrics.table(means, f"NDCG@{config.evaluate.cutoff}")
    elif "rank" in stages:
        evaluate.rank(config, embedder, workdir, prepared)
    if "export" in stages:
        yield f"exported to {export.export(config, embedder, workdir, prepared)}"


def cache_programs() -> None:
    """Keep what JAX compiles in the user's cache folder for the next start, unless JAX was told where, or not to.

    Set JAX_COMPILATION_CACHE_DIR to another folder, or to nothing to keep none.
    """
    told = jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache
    if told or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    # A folder for each kind of CPU: JAX's key does not tell them apart, and programs for another one may not run.
    cpu = platform.machine() + platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cde_jax" / fingerprint(cpu)[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if importlib.util.find_spec("filelock"):  # else without a limit
            jax.config.update("jax_compilation_cache_max_size", CACHED_PROGRAMS)
            # JAX writes the time after the program: what has none was cut short by a kill, and would stay so for ever.
            for program in folder.glob("*-cache"):
                if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                    program.unlink(missing_ok=True)
    except OSError as error:
        log.warning("compiled programs are not kept for the next start: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _check_inputs(
    config: Config, workdir: Path, stages: Sequence[str], rebuild: bool, engine: str
) -> Callable[[], work.Prepared]:
    """Raises ValueError for what these stages could not use, before anything is written; makes what they read."""
    make = partial(work.load_prepared, config, workdir)
    if unused := config.unused():
        log.warning("these settings have no effect with the other ones: %s", ", ".join(unused))
    if "prepare" in stages:
        from cde_jax.stages import engines, prepare

        engines.check_engine(engine)
        options = {"rebuild": rebuild, "training": "train" in stages, "engine": engine}
        make = partial(prepare.prepare, config, workdir, prepare.open_source(config, workdir), **options)
    if {"prepare", "evaluate"} & set(stages):
        beir.read_sets(config.data.evaluation)
    if "train" in stages:
        train.check_runtime(config)
        if rebuild or not work.has_checkpoint(workdir):
            assemble.check_initial_encoders(config)
    if list(stages) in (["rank"], ["evaluate"]) and not evaluate.reported_sets(config):
        raise ValueError(evaluate.NOTHING)
    return make


def _prepared(
    config: Config, workdir: Path, make: Callable[[], work.Prepared], stages: Sequence[str], rebuild: bool
) -> work.Prepared:
    """What `make` makes or loads. A work directory that holds another run keeps its config.json and checkpoints."""
    checkpoints, file = workdir / work.CHECKPOINTS, workdir / work.CONFIG
    trained_before = work.has_checkpoint(workdir)
    if trained_before and not rebuild and (recorded := work.read_record(file, config=dict)):
        work.check_same_run(config.as_dict(), recorded["config"], workdir)
    if not file.exists():
        _write_config(config, file)
    prepared = make()
    if trained_before and rebuild:
        identity = None
        with suppress(ValueError):  # another file of that name
            identity = (work.read_record(workdir / work.TRAINING, identity=dict) or {}).get("identity")
        if identity != assemble.run_identity(config, prepared.plan):
            work.move_aside(checkpoints)
    if prepared.tokenizer and {"prepare", "evaluate"} & set(stages):
        evaluate.write_token_sets(config, workdir, prepared)
    _write_config(config, file)
    return prepared


def _write_config(config: Config, file: Path) -> None:
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES.split():
        with suppress(importlib.metadata.PackageNotFoundError):  # FAISS is one of two; training needs few of these
            versions[name] = importlib.metadata.version(name)
    write_json(file, {"config": config.as_dict(), "versions": versions})
