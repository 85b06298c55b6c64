"""The paper's figures: the numbers are those of the embedder called by hand, and SVG and CSV can be read."""

import csv
import subprocess
import sys
from xml.etree import ElementTree

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import J
from tiny_pairs import tiny_pairs, tiny_plan, tiny_vectors
from tiny_retrieval import SETTINGS, embedder, evaluation_set, tokenizer

from cde_jax.adapters.statistics import CorpusStatistics
from cde_jax.data.files import write_json
from cde_jax.data.sources import beir
from cde_jax.data.store import Store
from cde_jax.evaluation import figures, plots
from cde_jax.evaluation.baselines import bm25
from cde_jax.evaluation.metrics import ndcg
from cde_jax.evaluation.validation import validate
from cde_jax.retrieval.choice import CHOICES
from cde_jax.retrieval.embedder import Embedder

OURS = embedder()
SETS = [evaluation_set("sea", 4 * J), evaluation_set("sky")]


def score(model, dataset, seed):
    return validate(model, [dataset], seed, 10, batch_size=8, temperature=0.02)["score"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two evaluation sets, an export, the export of a biencoder, and two work directories."""
    folder = tmp_path_factory.mktemp("figures")
    for dataset in SETS:
        beir.write(dataset, folder / dataset.name)
    tokenizer().save(folder / "tokenizer")
    for name, model in {"export": OURS, "biencoder": embedder("biencoder")}.items():
        Embedder(model.model, tokenizer(), SETTINGS, folder / "tokenizer").save_pretrained(folder / name)
    for name, changes in {"random": {"method": "random"}, "clustered": {}}.items():
        work = folder / name
        pairs = tiny_pairs(work / "store/pairs", sizes=(20, 12))
        tiny_plan(work / "plan", pairs, tiny_vectors(work / "store/vectors", pairs), **changes)
        write_json(work / "evaluation.json", {"mean": {"none": 0.25, "same corpus": 0.5, "BM25": 0.75}})
    return folder


def read(path):
    """Rows of the CSV, and the texts of the SVG."""
    with path.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    return rows, [node.text for node in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_has_titled_axes_and_its_data_beside_it(name, files, tmp_path):
    data, work = [files / "sea", files / "sky"], [files / "random", files / "clustered"]
    figure, path = figures.make(name, tmp_path, files / "export", data, work, seeds=1)
    rows, shown = read(path)
    assert path.name == f"{name}.svg" and len(rows) == len(figure.rows) > 1
    assert rows[0].keys() == figure.rows[0].keys() and {figure.x, figure.y, figure.series} <= rows[0].keys()
    assert {figure.x, figure.y} <= set(shown) and figure.title.split()[0] in " ".join(shown).split()
    assert plots.svg(figure) == path.read_bytes()


def test_quality_by_context_size_runs_from_none_to_four_times_j():
    rows = figures.context_size(OURS, SETS, seeds=2).rows
    sizes = {name: sorted({row[figures.SIZE] for row in rows if row["set"] == name}) for name in ("sea", "sky")}
    assert sizes == {"sea": [0, 1, 2, 5, 10, 20], "sky": [0, 1, 2, 5, 10]}  # no more than there are documents
    none = ndcg(figures._rank(OURS, SETS[0], None), SETS[0].qrels)
    assert [row[figures.NDCG] for row in rows if row["set"] == "sea" and not row[figures.SIZE]] == [none]
    assert len({row[figures.NDCG] for row in rows if row["set"] == "sea"}) > 3  # the context counts


@pytest.mark.parametrize("attention", ["isolated", "joint"])
def test_a_context_larger_than_the_model_s_has_a_slot_for_each_document(attention):
    ours = embedder(attention)
    context = figures.sized_context(ours, SETS[0], 2 * J + 1, seed=0)
    assert len(context.vectors) == 2 * J + 1 == len(np.unique(context.vectors.round(5), axis=0))
    ids = tokenizer().encode([SETTINGS.query_prefix + "the sea"], 8)[0]
    mask = jnp.ones((1, len(ids)), bool)
    expected = np.asarray(nnx.jit(lambda model, *x: model.embed(*x))(ours.model, ids[None], mask, context.vectors))[0]
    found = ours.encode_queries(["the sea"], context)[0]
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), atol=1e-5)


def test_the_grid_has_each_set_with_each_context():
    rows = figures.context_grid(OURS, SETS, seeds=1).rows
    cells = {(row["set"], row[figures.SOURCE]): row[figures.NDCG] for row in rows}
    assert cells.keys() == {(s.name, source) for s in SETS for source in ("sea", "sky", "no context")}
    assert cells["sea", "sea"] == score(OURS, SETS[0], 0) and cells["sky", "sky"] == score(OURS, SETS[1], 0)
    assert cells["sea", "sea"] != cells["sea", "sky"]


def test_components_keep_the_distances_that_their_shares_say():
    figure = figures.context_pca(OURS, SETS, seeds=1, text="sea of the")
    places = np.array([[row[figure.x], row[figure.y]] for row in figure.rows])
    contexts = [figures._context(OURS, s, seed) for s in SETS for seed in range(figures.PCA_DRAWS)]
    vectors = np.concatenate([OURS.encode_queries(["sea of the"], context) for context in contexts])
    shares = [int(label.split("(")[1].split("%")[0]) for label in (figure.x, figure.y)]
    kept = np.square(places).sum(axis=0) / np.square(vectors - vectors.mean(axis=0)).sum()
    np.testing.assert_allclose(100 * kept, shares, atol=0.51)
    assert f"{(vectors @ vectors.T).min():.4f}" in figure.title


def test_idf_shift_is_from_the_training_data_or_the_other_sets(files):
    other = figures.idf_shift(OURS, SETS).rows
    trained = figures.idf_shift(OURS, SETS[:1], [files / "random"]).rows
    statistics = [CorpusStatistics.fit(s.corpus.values()) for s in SETS]
    assert other[0][figures.SHIFT] == statistics[1].drift(statistics[0])
    texts = Store.open(files / "random/store/pairs", kind="pairs").ragged("document_text")
    training = CorpusStatistics.fit(texts.text(i) for i in range(texts.count()))
    assert trained[0][figures.SHIFT] == training.drift(statistics[0])
    gain = score(OURS, SETS[0], 0) - ndcg(bm25(SETS[0]), SETS[0].qrels)
    assert other[0][figures.GAIN] == trained[0][figures.GAIN] == pytest.approx(gain)
    with pytest.raises(ValueError, match="training data"):
        figures.idf_shift(OURS, SETS[:1])


def test_difficulty_is_of_the_plan_and_leaves_baselines_out(files):
    rows = figures.difficulty([files / "random", files / "clustered"]).rows
    assert [(row["run"], row["context"]) for row in rows[:2]] == [("random", "none"), ("random", "same corpus")]
    assert len(rows) == 4 and rows[0][figures.DIFFICULTY] < rows[2][figures.DIFFICULTY]
    with pytest.raises(ValueError, match="--stage=evaluate"):
        figures.difficulty([files])


def test_each_choice_of_context_is_scored():
    rows = figures.context_choice(OURS, SETS[:1], seeds=2).rows
    assert [(row["choice"], row["seed"]) for row in rows] == [(name, seed) for name in CHOICES for seed in range(2)]
    scores = {name: {row[figures.NDCG] for row in rows if row["choice"] == name} for name in CHOICES}
    assert len(scores["random"]) == 2 and len(scores["most central"]) == 1
    corpus = list(SETS[0].corpus.values())
    rows = CHOICES["most central"](OURS.encode_documents(corpus), J, 0)
    context = OURS.embed_context([corpus[row] for row in rows])
    assert scores["most central"] == {ndcg(figures._rank(OURS, SETS[0], context), SETS[0].qrels)}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fig16", {}, "choose one of context-size, context-grid"),
        ("context-grid", {"data": ["sea"]}, "needs --model"),
        ("context-grid", {"model": "export"}, "needs --data"),
        ("difficulty", {"model": "export"}, "needs --workdir"),
        ("context-grid", {"model": "biencoder", "data": ["sea"]}, "reads no context"),
        ("context-grid", {"model": "export", "data": ["sea"], "seeds": 0}, "--seeds of 1 or more"),
        ("context-grid", {"model": "export", "data": ["lake"]}, "expected corpus.jsonl"),
    ],
)
def test_a_figure_says_what_it_misses(name, options, message, files, tmp_path):
    if "model" in options:
        options = options | {"model": files / options["model"]}
    options = options | {"data": [files / folder for folder in options.get("data", ())]}
    with pytest.raises(ValueError, match=message):
        figures.make(name, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_biencoder_has_the_figure_that_needs_no_context(files, tmp_path):
    data = [files / "sea", files / "sky"]
    _, path = figures.make("idf-shift", tmp_path, files / "biencoder", data)
    assert len(read(path)[0]) == 2


def test_the_command_draws_and_names_the_figures(files, tmp_path):
    command = [sys.executable, "-m", "cde_jax.figures", f"--out={tmp_path}"]
    flags = ["--workdir", files / "random", files / "clustered"]
    ran = subprocess.run([*command, "difficulty", *flags], capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and ran.stdout.splitlines()[-1] == str(tmp_path / "difficulty.svg"), ran.stderr
    ran = subprocess.run([*command, "fig16"], capture_output=True, text=True, check=False)
    assert ran.returncode == 1 and "choose one of" in ran.stderr and "Traceback" not in ran.stderr


def test_lines_name_their_series_and_no_data_is_an_error(tmp_path):
    rows = [{"a": a, "b": b, "c": c} for a, b, c in [("x", 0, 1.0), ("x", 0, 3.0), ("y", 1, 5.0)]]
    figure = plots.Figure("title", rows, "b", "c", "a", plots.lines)
    assert ">x<" in plots.svg(figure).decode() and list(figure.by_series()) == ["x", "y"]
    with pytest.raises(ValueError, match="expected data"):
        plots.write(figure._replace(rows=[]), tmp_path, "name")
