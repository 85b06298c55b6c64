"""The stages by name: each reads named files of the work directory and leaves named files there."""

import dataclasses
import importlib.metadata
import json
import logging
import platform
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from cde_jax.batching.loader import Loader
from cde_jax.batching.plan import BatchPlan
from cde_jax.batching.surrogate import Lsa, Texts
from cde_jax.config import Config, Train, check_same_run, from_config_dict, names_affecting
from cde_jax.data.files import fingerprint, read_json, write_json
from cde_jax.data.store import Store
from cde_jax.data.tokens import Tokenizer
from cde_jax.evaluation import beir as measure
from cde_jax.interop.read import TextSettings, load_encoder
from cde_jax.models.attention import pick
from cde_jax.models.contextual import Biencoder, ContextualEncoder
from cde_jax.models.encoder import Encoder, pick_remat
from cde_jax.retrieval.embedder import Embedder
from cde_jax.stages.assemble import CHUNKS, Training, build_model, compute_dtype, fit_chunks, make_loader, make_training
from cde_jax.stages.prepare import LSA, TOKENIZER, Encoders, evaluation_sets, load_plan, prepare
from cde_jax.training import loop, sharding
from cde_jax.training.checkpoint import Checkpoints
from cde_jax.training.step import TrainState, stream

log = logging.getLogger(__name__)

STAGES = ("prepare", "train", "evaluate", "export")
EXPORT, TRAINING = "export", "training.json"
_VERSIONS = ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "faiss-cpu", "scikit-learn", "tokenizers")


def run(config: Any, workdir: Path, stage: str = "all", *, rebuild: bool = False) -> Iterator[str]:
    """Run one stage or all, in order; yields what each has to say, as text.

    `config` is a ConfigDict. Everything is checked before anything is written. Stops after an interrupted training.
    """
    if stage not in ("all", *STAGES):
        raise ValueError(f"unknown stage {stage!r}: choose all, {', '.join(STAGES)}")
    config = from_config_dict(config)
    claim(config, workdir, rebuild)
    for name in STAGES if stage == "all" else (stage,):
        if name == "prepare":
            yield prepare(config, workdir, rebuild=rebuild, checkpoint=_own_encoders)
        elif name == "train":
            if not train(config, workdir):
                return
        elif name == "evaluate":
            yield measure.table(evaluate(config, workdir), f"NDCG@{config.evaluate.cutoff}")
        else:
            yield f"exported to {export(config, workdir)}"


def claim(config: Config, workdir: Path, rebuild: bool = False) -> None:
    """Write config.json, or check that the work directory's checkpoints are of this configuration.

    Store and plan are checked where they are read, against the settings that made them. With `rebuild` another
    configuration may take the directory over; checkpoints are moved aside, never deleted.
    """
    file, checkpoints = workdir / "config.json", workdir / "checkpoints"
    if file.exists() and checkpoints.exists() and any(checkpoints.iterdir()):
        if rebuild:
            _move_aside(checkpoints)
        else:
            check_same_run(config.as_dict(), read_json(file)["config"], str(workdir))
    versions = {name: importlib.metadata.version(name) for name in _VERSIONS} | {"python": platform.python_version()}
    write_json(file, {"config": config.as_dict(), "versions": versions})


def train(config: Config, workdir: Path) -> bool:
    """Train to the end, from the newest checkpoint if there is one; False if asked to stop before the end."""
    config, run = _run(config, workdir, choose_chunks=True)
    mesh, graph, state, step, steps = run.training
    newest = run.checkpoints.newest()
    if newest is not None:
        if newest >= steps:
            log.info("all %d steps are done: training is skipped", steps)
            run.checkpoints.close()
            return True
        state = run.checkpoints.restore(newest, state)
        log.info("going on from checkpoint %d of %d", newest, steps)
    t, b = config.train, config.batching
    loader = make_loader(config, run.plan, run.pairs)
    chosen = _describe(config, run, loader)
    write_json(workdir / TRAINING, chosen)
    log.info("%s", ", ".join(f"{name} {value}" for name, value in chosen.items() if name != "belongs"))

    def batches(start: int, stop: int) -> Iterator[dict[str, Any]]:
        read = loader.iterate(start, stop, threads=b.threads, workers=b.workers, prefetch=b.prefetch)
        with closing(read):
            yield from sharding.shard_ahead(mesh, read)

    development = [one for one in evaluation_sets(config, workdir) if one.name == config.evaluate.development]

    def score(state: TrainState) -> float:
        embedder = _embedder(config, workdir, nnx.merge(graph, state.params))
        return measure.score(embedder, development[0], config.seed, config.evaluate.cutoff)

    try:
        outcome = loop.run(
            step,
            state,
            batches,
            sharding.replicate(mesh, stream(config.seed, "dropout")),
            steps=steps,
            cadence=loop.Cadence(t.log_every, t.checkpoint_every, t.evaluate_every),
            checkpoints=run.checkpoints,
            workdir=workdir,
            evaluate=score if development else None,
            peak_tflops=t.peak_tflops,
            profile_steps=t.profile_steps,
        )
    finally:
        run.checkpoints.close()
    return outcome.finished


def evaluate(config: Config, workdir: Path) -> measure.Scores:
    """NDCG of the trained model by set and kind of context, beside the baselines; written to evaluation.json.

    Kept as it is where it was measured with the same weights, sets and settings.
    """
    # The development set chose the checkpoint, so its score is no measurement.
    sets = [one for one in evaluation_sets(config, workdir) if one.name != config.evaluate.development]
    if not sets:
        raise ValueError(
            "nothing to evaluate: name packages in data.held_out or BEIR folders in data.evaluation (the one that is "
            "evaluate.development does not count)"
        )
    pairs, _ = load_plan(config, workdir)
    embedder = trained(config, workdir)
    documents = Texts(pairs.ragged("document_text"))
    drawn = np.random.default_rng([config.seed, 1]).choice(len(documents), min(4096, len(documents)), replace=False)
    k = config.evaluate.cutoff
    about = (embedder.weights, pairs.fingerprint, config.seed, k, config.evaluate.baselines)
    about = fingerprint([*about, [dataclasses.asdict(one) for one in sets]])
    file = workdir / "evaluation.json"
    if file.exists() and (before := read_json(file))["fingerprint"] == about:
        log.info("the evaluation of this model is there: kept")
        return before["sets"]
    scores = measure.evaluate_embedder(embedder, sets, [documents[i] for i in drawn.tolist()], config.seed, k)
    if config.evaluate.baselines:
        b = config.batching
        lsa = {"LSA": Lsa.load(workdir / LSA).encode} if "lsa" in (b.surrogate, b.filter_surrogate) else {}
        scores = measure.combine(scores, measure.evaluate_baselines(sets, lsa, k))
    means = measure.means(scores)
    write_json(file, {"metric": f"ndcg@{k}", "fingerprint": about, "sets": scores, "mean": means})
    return scores


def export(config: Config, workdir: Path) -> Path:
    """Write the trained model to export/, with a card that says how it was made and what was measured.

    An export of the same weights with the same card is kept; any other is replaced.
    """
    folder, embedder, card = workdir / EXPORT, trained(config, workdir), model_card(config, workdir)
    written = folder / "README.md"
    same_card = written.exists() and written.read_text(encoding="utf-8") == card
    if same_card and Embedder.from_pretrained(folder).weights == embedder.weights:
        log.info("the export of this model is there: kept")
        return folder
    embedder.save_pretrained(folder, card=card)
    return folder


def trained(config: Config, workdir: Path) -> Embedder:
    """The trained model of a work directory: its best checkpoint, or its newest, as the config says."""
    _, (training, _, _, checkpoints) = _run(config, workdir)
    step = checkpoints.best() if config.evaluate.checkpoint == "best" else checkpoints.newest()
    if step is None:
        raise ValueError(f"{workdir} has no checkpoint yet: run --stage=train first")
    state = checkpoints.restore(step, training.state)
    checkpoints.close()
    log.info("checkpoint %d of %d", step, training.steps)
    return _embedder(config, workdir, nnx.merge(training.graph, state.params))


def model_card(config: Config, workdir: Path) -> str:
    """README.md of an export."""
    pairs, plan = load_plan(config, workdir)
    file = workdir / "evaluation.json"
    results = "Not evaluated."
    if file.exists():
        results = "```\n" + measure.table(read_json(file)["sets"], f"NDCG@{config.evaluate.cutoff}") + "\n```"
    kind = config.model.kind if config.model.kind == "biencoder" else f"contextual, {config.model.context_attention}"
    return f"""# A cde_jax model ({kind})

Contextual document embeddings (arXiv 2410.02525), trained with cde_jax.

```python
from cde_jax import Embedder, beginnings

embedder = Embedder.from_pretrained("this directory")
context = embedder.embed_context(corpus, queries=beginnings(corpus))  # or some dozens that people ask of it
vectors = embedder.encode_documents(corpus, context)
scores = embedder.encode_queries(queries, context) @ vectors.T
```

## Data
{pairs.manifest["pairs"]} pairs in {len(pairs.manifest["domains"])} domains, source `{config.data.source}`, fingerprint
`{pairs.fingerprint}`; {len(plan)} plan batches of {config.batching.batch_size}.

## Results
{results}

## Configuration
```json
{json.dumps(config.as_dict(), indent=1)}
```
"""


class _Run(NamedTuple):
    """What training and its readers share."""

    training: Training
    plan: BatchPlan
    pairs: Store
    checkpoints: Checkpoints


def _run(config: Config, workdir: Path, choose_chunks: bool = False) -> tuple[Config, _Run]:
    """The parts of a run, and its config, with numbers for chunk sizes of −1 where they are to be chosen."""
    pairs, plan = load_plan(config, workdir)
    belongs = {"plan": plan.fingerprint, "config": _training_fingerprint(config)}
    model = _initial_model(config, workdir)
    if choose_chunks:
        config = _with_chunks(config, workdir, belongs, model, plan, pairs)
    checkpoints = Checkpoints(workdir / "checkpoints", belongs)
    return config, _Run(make_training(config, model, plan), plan, pairs, checkpoints)


def _with_chunks(config: Config, workdir: Path, belongs: dict[str, str], model, plan, pairs) -> Config:
    """Chunk sizes are found once: a run that goes on keeps them, so that it computes the same numbers."""
    file = workdir / TRAINING
    if file.exists() and (before := read_json(file))["belongs"] == belongs:
        return dataclasses.replace(config, train=dataclasses.replace(config.train, **before["chunks"]))
    return fit_chunks(config, model, plan, pairs)


def _describe(config: Config, run: _Run, loader: Loader) -> dict[str, Any]:
    """What was chosen for this run where the config leaves it open: the content of training.json."""
    encoder, device = nnx.merge(run.training.graph, run.training.state.params).encoder.config, jax.devices()[0]
    return {
        "belongs": run.checkpoints.belongs,
        "steps": run.training.steps,
        "devices": f"{run.training.mesh.size} x {device.platform} {device.device_kind}",
        "dtype": encoder.dtype,
        "attention": pick(encoder.attention, encoder.dtype, encoder.head_dim),
        "remat": pick_remat(encoder.remat),
        "chunks": {name: getattr(config.train, name) for name in CHUNKS},
        "layouts": {name: layout._asdict() for name, layout in loader.layouts.items()},
    }


def _training_fingerprint(config: Config) -> str:
    """Of the settings that shape parameters or optimiser: how often things are logged or saved is not among them."""
    train = {name: getattr(config.train, name) for name in names_affecting(Train, "training")}
    return fingerprint({"seed": config.seed, "model": config.as_dict()["model"], "train": train})


def _initial_model(config: Config, workdir: Path) -> Biencoder | ContextualEncoder:
    """Random parameters, then the pretrained encoders that `model.init` names."""
    model = build_model(config, Tokenizer.load(workdir / TOKENIZER).vocab_size, compute_dtype(config))
    init = config.model.init
    second = model.encoder
    _start_from(second, init.second_stage, init.layers, "second_stage")
    if isinstance(model, ContextualEncoder) and config.model.context_size:
        _start_from(model.first_stage.encoder, init.first_stage, init.layers, "first_stage")
    return model


def _start_from(encoder: Encoder, name: str, layers: int, stage: str) -> None:
    if not name:
        return
    pretrained = load_encoder(name, layers or None)
    runtime = ("dtype", "remat", "attention")
    different = [
        f"{field}: the config says {ours!r}, the checkpoint {theirs!r}"
        for field, ours in vars(encoder.config).items()
        if field not in runtime and ours != (theirs := getattr(pretrained.config, field))
    ]
    if different:
        raise ValueError(
            f"model.init.{stage} {name!r} is of another shape than the config's model: " + "; ".join(different) + ". "
            "Set model.* to the checkpoint's shape"
        )
    nnx.update(encoder, nnx.state(pretrained, nnx.Param))


def _embedder(config: Config, workdir: Path, model: Biencoder | ContextualEncoder) -> Embedder:
    d = config.data
    settings = TextSettings(d.query_prefix, d.document_prefix, d.query_length, d.document_length)
    tokenizer = Tokenizer.load(workdir / TOKENIZER)
    return Embedder(model, tokenizer, settings, workdir / TOKENIZER)


def _own_encoders(directory: str) -> Encoders:
    """One of our own models as a surrogate."""
    embedder = Embedder.from_pretrained(directory, progress=False)
    return embedder.encode_queries, embedder.encode_documents


def _move_aside(folder: Path) -> None:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.before-{number}")).exists():
        number += 1
    folder.rename(aside)
    log.warning("%s was moved to %s", folder, aside)
