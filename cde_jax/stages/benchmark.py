"""The evaluate command's work: one model on many tasks, under each kind of context and seed of its sample.

Leaves scores/TASK.parquet (every query's scores) and results.json (means, spread over seeds). A task's file is written
when it is finished and kept by the next call; kinds and seeds that it lacks are added to it.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from tqdm import tqdm

from cde_jax.data.files import fingerprint, read_json, write_json
from cde_jax.data.sources.beir import EvaluationSet, read, read_sets
from cde_jax.evaluation import beir, results
from cde_jax.evaluation.baselines import candidates as first_candidates
from cde_jax.evaluation.baselines import truncated
from cde_jax.evaluation.conteb import DOCUMENT, LATE, rank_chunks
from cde_jax.evaluation.conteb import read as read_chunks
from cde_jax.evaluation.metrics import DEPTH, PerQuery, Run, measures_per_query
from cde_jax.retrieval.embedder import Embedder
from cde_jax.stages.export import read_corpus

log = logging.getLogger(__name__)

NONE, RANDOM = "none", "random"
KINDS = {
    "corpus": beir.SAME_CORPUS,
    "whitened": beir.WHITENED,
    "statistics": beir.STATISTICS,
    RANDOM: beir.RANDOM_DOCUMENTS,
    NONE: beir.NO_CONTEXT,
    "document": DOCUMENT,  # these two of ConTEB sets only
    "late": LATE,
}


class Task(NamedTuple):
    """Something to score a model on."""

    name: str
    identity: Any  # of its data, as JSON
    run: Callable[[Sequence[str], int], Mapping[str, PerQuery]]  # kinds of context, seed → scores


def evaluate(
    model: str,
    out: Path,
    *,
    data: Sequence[str] = (),
    conteb: Sequence[str] = (),
    tasks: Sequence[str] = (),
    benchmark: str | None = None,
    kinds: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    random_corpus: str | None = None,
    first_model: str | None = None,
    candidates: int = 1024,
) -> Iterator[str]:
    """Score a model, by default under every kind of context that it can have but those of ConTEB.

    Yields the table of results. Raises ValueError for what cannot be evaluated, before anything is encoded; for a task
    that failed, after the others.
    """
    sets, chunked = read_sets(data), [read_chunks(folder) for folder in conteb]
    beir.check_names([*sets, *chunked])
    mteb = _mteb() if tasks or benchmark else None
    mteb_tasks = mteb.find_tasks(tasks, benchmark) if mteb else []
    if not sets and not chunked and not mteb_tasks:
        raise ValueError(
            "nothing to evaluate: give --data with folders in BEIR's layout, --conteb, --tasks or --benchmark"
        )
    other = [] if random_corpus is None else _random_documents(random_corpus)
    embedder = Embedder.from_pretrained(model)
    kinds = check_kinds(embedder, kinds, random_corpus is not None)
    tasks = []
    for dataset in sets:
        run = first_model and first_candidates(
            dataset, first_model, candidates, out / f"candidates/{dataset.name}.json"
        )
        tasks.append(_retrieval(embedder, truncated(dataset, run) if run else dataset, other, run))
    tasks += [_retrieval(embedder, dataset, other, chunks=True) for dataset in chunked]
    for task in mteb_tasks:
        run = partial(mteb.score_task, embedder, mteb.model_meta(embedder, model), task, other, out / "mteb")
        tasks.append(Task(task.metadata.name, mteb.identity(task), run))
    settings = [embedder.weights, dataclasses.asdict(embedder.settings), embedder.tokenizer.fingerprint]
    summaries, failed = {}, {}
    for task in (bar := tqdm(tasks, desc="tasks")):
        bar.set_postfix_str(task.name)
        identity = fingerprint([settings, task.identity, other])
        try:
            summaries[task.name] = results.summary(_scores(task, out, kinds, seeds, identity))
        except Exception as error:  # a task of mteb may raise anything
            log.error("%s: %s", task.name, error, exc_info=not isinstance(error, ValueError | OSError))
            failed[task.name] = error
    if summaries:
        content, file = {"model": str(model), "weights": embedder.weights}, out / "results.json"
        before = read_json(file, dict) if file.is_file() else {}
        kept = before.get("tasks", {}) if before.get("weights") == embedder.weights else {}
        write_json(file, content | {"tasks": kept | summaries})
        yield results.table(summaries)
    if failed:
        lines = "".join(f"\n- {name}: {error}" for name, error in failed.items())
        raise ValueError(f"{len(failed)} of {len(tasks)} tasks failed; the same command tries them again:{lines}")


def _mteb() -> ModuleType:
    try:
        from cde_jax.evaluation import mteb
    except ImportError as error:
        raise ImportError(f"--tasks and --benchmark need mteb: pip install 'cde_jax[mteb]' ({error})") from None
    return mteb


def check_kinds(embedder: Embedder, kinds: Sequence[str], random: bool) -> list[str]:
    """The kinds of context wanted, or all usual ones; ValueError for those that the model cannot have."""
    unusable = (
        {} if embedder.contextual else dict.fromkeys(("corpus", RANDOM, "document"), "a biencoder reads no context")
    )
    if not embedder.works_without_context:
        unusable |= dict.fromkeys((NONE, "late"), "these weights have no null embedding")
    if not random:
        unusable.setdefault(RANDOM, "it needs --random-corpus, a BEIR folder or a file of texts")
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"--context: unknown kind {kind!r}; choose among {', '.join(KINDS)}")
        if kind in unusable:
            possible = ", ".join(kind for kind in KINDS if kind not in unusable)
            raise ValueError(f"--context {kind}: {unusable[kind]}; this model and call can have {possible}")
    usual = [kind for kind in ("corpus", "whitened", "statistics", RANDOM, NONE) if kind not in unusable]
    return list(dict.fromkeys(kinds)) or usual


def _scores(task: Task, out: Path, kinds: Sequence[str], seeds: Sequence[int], identity: str) -> results.Cells:
    """The task's scores of all kinds and seeds: those of its file, and what it lacks."""
    path = out / results.SCORES / f"{task.name}.parquet"
    cells = results.read_scores(path, identity)
    wanted = {(kind, None if kind == NONE else seed): None for seed in seeds for kind in kinds}
    before = len(cells)
    for seed in seeds:
        if missing := [kind for kind in kinds if (kind, None if kind == NONE else seed) not in cells]:
            for kind, scores in task.run(missing, seed).items():
                cells[kind, None if kind == NONE else seed] = scores
    if len(cells) > before:
        results.write_scores(path, cells, identity)
    return {key: cells[key] for key in sorted(wanted, key=lambda key: list(KINDS).index(key[0])) if key in cells}


def _retrieval(
    embedder: Embedder, dataset: EvaluationSet, other: list[str], candidates: Run | None = None, chunks: bool = False
) -> Task:
    def run(kinds: Sequence[str], seed: int) -> Mapping[str, PerQuery]:
        names = {KINDS[kind]: kind for kind in kinds}
        if chunks:
            rankings = rank_chunks(embedder, dataset, other, seed, DEPTH, names)
        else:
            runs = candidates and {dataset.name: candidates}
            rankings = beir.rank(embedder, [dataset], other, seed, DEPTH, names, runs)[dataset.name]
        return {names[kind]: measures_per_query(ranking, dataset.qrels) for kind, ranking in rankings.items()}

    identity = [dataclasses.asdict(dataset), candidates and fingerprint(candidates), chunks]
    return Task(dataset.name, fingerprint(identity), run)


def _random_documents(path: str) -> list[str]:
    folder = Path(path).expanduser()
    return list(read(folder).corpus.values()) if folder.is_dir() else read_corpus(folder)
