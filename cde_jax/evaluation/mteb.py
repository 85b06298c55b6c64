"""MTEB (mteb 2.26 or later): our models under its encoder and search protocols, its tasks for the evaluate command.

A task's context is sampled from its own texts: of retrieval and reranking from the corpus of each subset and split, of
classification from the training texts, else from the first texts that are encoded (each clustering problem's own).
"""

import copy
import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from jaxtyping import Float
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
from mteb.models.model_implementations import MODEL_REGISTRY
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.models.search_wrappers import SearchEncoderWrapper
from mteb.types import PromptType

from cde_jax.adapters.statistics import CorpusStatistics
from cde_jax.adapters.whitening import pseudo_queries
from cde_jax.evaluation.beir import filled
from cde_jax.evaluation.metrics import DEPTH, PerQuery, measures_per_query
from cde_jax.evaluation.results import MAIN
from cde_jax.retrieval.embedder import Context, Embedder

log = logging.getLogger(__name__)

KINDS = ("corpus", "whitened", "statistics", "random", "none")
RETRIEVAL = ("Retrieval", "Reranking", "InstructionRetrieval", "InstructionReranking")
CLASSIFICATION = ("Classification", "MultilabelClassification", "Regression")
# By task type, of models that were trained with "search_query: ": as mteb has them for Nomic's and the paper's.
NOMIC_PROMPTS = dict.fromkeys(
    (*CLASSIFICATION, "PairClassification", "Reranking", "STS", "Summarization"), "classification: "
) | {"Clustering": "clustering: "}


class MtebModel(AbsEncoder):
    """An embedder with one kind of context, of `KINDS`, and the seed of its sample.

    prompts: by mteb's names (task, task type, "query", "document"); by default those of the embedder's settings.
    """

    def __init__(
        self,
        embedder: Embedder,
        meta: ModelMeta,
        context: str = "corpus",
        context_seed: int = 0,
        random_documents: Sequence[str] = (),
        prompts: Mapping[str, str] | None = None,
    ):
        if context not in KINDS:
            raise ValueError(f"context: expected one of {', '.join(KINDS)}, got {context!r}")
        self.embedder, self.kind, self.seed = embedder, context, context_seed
        self.random_documents = list(random_documents)
        nomic = embedder.settings.query_prefix.strip() == "search_query:"
        self.model_prompts = dict(NOMIC_PROMPTS if nomic else {}) if prompts is None else dict(prompts)
        experiment = {"context": context, "context_seed": context_seed}  # mteb keeps a folder of results for each
        self.mteb_model_meta = meta.model_copy(update={"experiment_kwargs": experiment})
        self._key: tuple[str, ...] | None = None  # what the context belongs to
        self._context: Context | None = None
        self.rankings: dict[str, dict[str, dict[str, float]]] = {}  # {"split/subset": run} of what was searched

    def index(self, corpus: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, **options: Any) -> None:
        """Sample the context from the corpus that will be searched."""
        texts = [f"{row.get('title') or ''} {row['text']}".strip() for row in corpus]
        self._set_context(texts, task_metadata, hf_split, hf_subset)
        self._search = SearchEncoderWrapper(self)
        options |= {"task_metadata": task_metadata, "hf_split": hf_split, "hf_subset": hf_subset}
        self._search.index(corpus, **options)

    def search(self, queries: Any, **options: Any) -> dict[str, dict[str, float]]:
        """Search as mteb does for any encoder: {query id: {document id: score}}."""
        run = self._search.search(queries, **options)
        self.rankings[f"{options['hf_split']}/{options['hf_subset']}"] = run
        return run

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **_: Any,
    ) -> Float[np.ndarray, "n D"]:
        """Vectors of the texts of a data loader, under the context of their task."""
        texts = [text for batch in inputs for text in batch["text"]]
        training = task_metadata.type in CLASSIFICATION and hf_split not in task_metadata.eval_splits
        known = self._key in [(task_metadata.name, hf_subset, split) for split in (hf_split, "training texts")]
        if not known or training or task_metadata.type == "Clustering":
            self._set_context(texts, task_metadata, "training texts" if training else hf_split, hf_subset)
        embedder = self._prompted(task_metadata)
        encode = embedder.encode_queries if prompt_type == PromptType.query else embedder.encode_documents
        return encode(texts, self._context)

    def _set_context(self, texts: list[str], task_metadata: Any, hf_split: str, hf_subset: str) -> None:
        self._key = (task_metadata.name, hf_subset, hf_split)
        corpus = filled(self.embedder, self.random_documents if self.kind == "random" else texts)
        if self.kind == "none":
            self._context = None
        elif self.kind in ("corpus", "random"):
            self._context = self.embedder.embed_context(corpus, self.seed)
        else:
            statistics = CorpusStatistics.fit(texts) if self.kind == "statistics" else None
            queries, embedder = pseudo_queries(texts, self.seed), self._prompted(task_metadata)
            self._context = embedder.embed_context(corpus, self.seed, queries, statistics)

    def _prompted(self, task_metadata: Any) -> Embedder:
        """The embedder with the task's prompts as prefixes; texts of symmetric tasks have one, the document's."""
        embedder, s = copy.copy(self.embedder), self.embedder.settings
        defaults = {PromptType.query: s.query_prefix, PromptType.document: s.document_prefix}
        if task_metadata.type not in RETRIEVAL:
            defaults = dict.fromkeys((None,), s.document_prefix)
        names = {kind: get_prompt_name(self.model_prompts, task_metadata, kind) for kind in defaults}
        prompts = [self.model_prompts.get(name, defaults[kind]) for kind, name in names.items()]
        embedder.settings = dataclasses.replace(s, query_prefix=prompts[0], document_prefix=prompts[-1])
        return embedder


def model_meta(embedder: Embedder, path: str | Path, name: str | None = None) -> ModelMeta:
    """What mteb records of a model; its revision is the fingerprint of the weights."""
    folder, settings = Path(path).expanduser(), embedder.settings
    return ModelMeta.create_empty({
        "loader": load,
        "loader_kwargs": {"path": str(path)},
        "name": name or (f"cde_jax/{folder.resolve().name}" if folder.is_dir() else str(path)),
        "revision": embedder.weights[:16],
        "max_tokens": settings.document_length,
        "embed_dim": embedder.width,
        "framework": ["JAX"],
        "similarity_fn_name": ScoringFunction.COSINE,
        "use_instructions": bool(settings.query_prefix or settings.document_prefix),
    })  # fmt: skip


def register(path: str | Path, name: str | None = None) -> ModelMeta:
    """Make a model known to mteb, so that `mteb.get_model(name, context=…, context_seed=…)` and its command find it."""
    meta = model_meta(Embedder.from_pretrained(path, progress=False), path, name)
    MODEL_REGISTRY[meta.name] = meta
    return meta


def load(name: str, revision: str | None = None, device: str | None = None, *, path: str, **options: Any) -> MtebModel:
    """The loader of `register`ed models. Runs on JAX's first device, whatever `device` says."""
    embedder = Embedder.from_pretrained(path)
    if "context" not in options and not embedder.contextual:
        options["context"] = "none"
    return MtebModel(embedder, model_meta(embedder, path, name), **options)


def find_tasks(names: Sequence[str], benchmark: str | None = None) -> list[Any]:
    """Tasks by mteb's names, and those of a benchmark. ValueError for unknown names."""
    try:
        tasks = list(mteb.get_benchmark(benchmark).tasks) if benchmark else []
        return tasks + [mteb.get_task(name) for name in names]
    except KeyError as error:
        known = "`mteb available-benchmarks` and `mteb available-tasks` list them"
        raise ValueError(f"mteb: {str(error.args[0]).removeprefix('KeyError: ')} {known}") from None


def identity(task: Any) -> list[Any]:
    """What decides a task's scores beside the model, as JSON."""
    metadata = task.metadata
    data = getattr(metadata, "dataset", None)  # name and revision
    return [version("mteb"), metadata.name, data, list(task.eval_splits), list(task.hf_subsets or ())]


def score_task(
    embedder: Embedder,
    meta: ModelMeta,
    task: Any,
    random_documents: Sequence[str],
    folder: Path,
    kinds: Sequence[str],
    seed: int,
) -> dict[str, PerQuery]:
    """The task's main score of each split and subset, by kind of context; mteb's own result files in `folder`.

    Of retrieval and reranking also our measures of every query ("split/subset/query"), unless mteb's file was there.

    "statistics" is for retrieval and reranking alone, whose vectors are of queries and documents; other kinds than
    `KINDS` are left out too. Raises ValueError where the task's data cannot be had.
    """
    scores = {}
    for kind in kinds:
        if kind not in KINDS or (kind == "statistics" and task.metadata.type not in RETRIEVAL):
            continue
        fresh = copy.deepcopy(task)  # a task draws samples by a random state that moves on
        for part in fresh.metadata.tasks if fresh.is_aggregate else [fresh]:
            _load_data(part)
        model = MtebModel(embedder, meta, kind, seed, random_documents)
        options = {"cache": mteb.ResultCache(folder), "co2_tracker": False, "show_progress_bar": False}
        result = mteb.evaluate(model, fresh, **options).task_results[0]
        scores[kind] = {
            f"{split}/{entry['hf_subset']}": {MAIN[0]: float(entry[MAIN[0]])}
            for split, entries in result.scores.items()
            for entry in entries
        }
        for place, run in model.rankings.items() if not fresh.is_aggregate else ():
            split, subset = place.split("/", 1)
            best = {q: _best(d, q if fresh.ignore_identical_ids else None) for q, d in run.items()}
            measures = measures_per_query(best, fresh.dataset[subset][split]["relevant_docs"])
            scores[kind] |= {f"{place}/{query}": row for query, row in measures.items()}
    return scores


def _best(documents: Mapping[str, float], without: str | None) -> dict[str, float]:
    """The 100 best documents but one."""
    ranked = sorted(documents.items(), key=lambda item: (item[1], item[0]), reverse=True)
    return dict([item for item in ranked if item[0] != without][:DEPTH])


def _load_data(task: Any) -> None:
    try:
        task.load_data()
    except Exception as error:  # hub, connection and file errors share no base class
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"the task's data {task.metadata.dataset.get('path')!r} is not in the local cache and cannot be fetched "
            f"now ({reason}); connect to the network once, or leave the task out"
        ) from None
