"""The evaluate command on small sets: results of every kind of context and seed, resuming, comparing two runs."""

import math
from pathlib import Path

import numpy as np
import pytest
from test_evaluate import ANIMALS, OTHERS, SHIPS, embedder

from cde_jax.data.files import read_json
from cde_jax.data.sources import beir
from cde_jax.data.tokens import Tokenizer
from cde_jax.evaluate import main
from cde_jax.evaluation import results
from cde_jax.evaluation.beir import rank
from cde_jax.evaluation.metrics import measures_per_query, ndcg
from cde_jax.interop.write import save_pretrained
from cde_jax.retrieval.embedder import Embedder
from cde_jax.stages import benchmark
from cde_jax.stages.benchmark import evaluate

KINDS = {kind: name for kind, name in benchmark.KINDS.items() if kind not in ("document", "late")}  # those are ConTEB's


def test_all_measures_of_a_known_ranking_come_in_one_pass():
    run = {"q": {"b": 0.9, "x": 0.8, "a": 0.7, "c": 0.6}}  # e is not found
    scores = measures_per_query(run, {"q": {"a": 3, "b": 1, "c": 0, "e": 2}, "not run": {"a": 1}})
    expected = {"ndcg@1": 1 / 3, "mrr": 1.0, "map@100": (1 + 2 / 3) / 3, "recall@10": 2 / 3, "recall@100": 2 / 3}
    assert {name: scores["q"][name] for name in expected} == pytest.approx(expected)
    ideal = 3 + 2 / math.log2(3) + 1 / 2
    assert [scores["q"][f"ndcg@{k}"] for k in (3, 5, 10)] == pytest.approx([2.5 / ideal] * 3)
    assert scores["not run"] == dict.fromkeys(scores["q"], 0.0)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Exports of a contextual model, a biencoder and a model without null embedding; two sets; other documents."""
    home = tmp_path_factory.mktemp("evaluate")
    tokenizer = Tokenizer.train([*ANIMALS.corpus.values(), *ANIMALS.queries.values()], 100)
    tokenizer.save(home / "tokenizer")
    for name, kind, changes in (
        ("contextual", "isolated", {}), ("biencoder", "biencoder", {}), ("no_null", "joint", {"null_embedding": False})
    ):  # fmt: skip
        model = embedder(kind, tokenizer, **changes)
        save_pretrained(model.model, home / name, tokenizer=home / "tokenizer", settings=model.settings)
    for dataset in (ANIMALS, SHIPS):
        beir.write(dataset, home / dataset.name)
    (home / "others.txt").write_text("\n".join(OTHERS))
    return home


def run(home: Path, out: Path, model: str = "contextual", sets: tuple[str, ...] = ("animals", "ships"), **options):
    text = list(evaluate(str(home / model), out, data=[str(home / name) for name in sets], **options))
    return text[0], read_json(out / "results.json")


def test_every_kind_and_seed_is_scored_as_rank_scores_it(home, tmp_path):
    text, content = run(home, tmp_path, kinds=list(KINDS), seeds=[3, 4], random_corpus=str(home / "others.txt"))
    one = Embedder.from_pretrained(home / "contextual", progress=False)
    for dataset in (ANIMALS, SHIPS):
        scores = content["tasks"][dataset.name]
        assert list(scores) == list(KINDS)
        for seed in (3, 4):
            rankings = rank(one, [dataset], OTHERS, seed, kinds=list(KINDS.values()))[dataset.name]
            assert rankings.keys() == set(KINDS.values())
            for kind, name in KINDS.items():
                found = scores[kind]["ndcg@10"]["seeds"].get(str(seed), scores["none"]["ndcg@10"]["mean"])
                assert found == pytest.approx(ndcg(rankings[name], dataset.qrels), abs=1e-9), (kind, seed)
        assert list(scores["none"]["ndcg@10"]["seeds"]) == ["None"] and scores["none"]["mrr"]["spread"] is None
        entry = scores["corpus"]["ndcg@10"]
        assert entry["spread"] == pytest.approx(np.std(list(entry["seeds"].values()), ddof=1))
    cells = results.read_scores(tmp_path / "scores/animals.parquet")
    assert list(cells["corpus", 3]) == list(ANIMALS.queries) and len(cells) == 9
    assert "| animals, ndcg@10 |" in text and text.splitlines()[-1].startswith("| mean ")


def test_the_statistics_kind_is_what_an_embedder_gives_with_statistics_of_the_corpus(home):
    from cde_jax import CorpusStatistics, pseudo_queries

    one, corpus = Embedder.from_pretrained(home / "biencoder", progress=False), list(ANIMALS.corpus.values())
    context = one.embed_context(corpus, 3, pseudo_queries(corpus, 3), CorpusStatistics.fit(corpus))
    scores = one.encode_queries(ANIMALS.queries.values(), context) @ one.encode_documents(corpus, context).T
    ranking = rank(one, [ANIMALS], [], 3, kinds=[KINDS["statistics"]])["animals"]["same corpus, statistics"]
    for query, row in zip(ANIMALS.queries, scores, strict=True):
        assert ranking[query] == pytest.approx(dict(zip(ANIMALS.corpus, row.tolist(), strict=True)), abs=1e-5)


def test_a_finished_task_is_kept_and_a_kind_that_is_new_is_added(home, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(benchmark.beir, "rank", lambda *args: calls.append(args[1:]) or rank(*args))
    first = run(home, tmp_path, sets=("ships",), kinds=["none", "corpus"])
    before = (tmp_path / "scores/ships.parquet").read_bytes()
    assert run(home, tmp_path, sets=("ships",), kinds=["none", "corpus"]) == first and len(calls) == 1
    assert (tmp_path / "scores/ships.parquet").read_bytes() == before
    _, content = run(home, tmp_path, kinds=["none", "corpus", "whitened"], seeds=[0, 5])
    asked = [(call[0][0].name, call[2], set(call[4].values())) for call in calls[1:]]
    everything = {"none", "corpus", "whitened"}
    assert asked == [("animals", 0, everything), ("animals", 5, everything - {"none"}),
                     ("ships", 0, {"whitened"}), ("ships", 5, everything - {"none"})]  # fmt: skip
    assert list(content["tasks"]["ships"]) == ["corpus", "whitened", "none"]
    _, content = run(home, tmp_path, sets=("animals",), kinds=["none"])
    assert sorted(content["tasks"]) == ["animals", "ships"] and list(content["tasks"]["animals"]) == ["none"]
    with pytest.raises(ValueError, match="another model, data or random corpus, expected fingerprint"):
        run(home, tmp_path, "biencoder", sets=("ships",), kinds=["none"])


def test_a_task_that_fails_does_not_stop_the_others(home, tmp_path):
    found = evaluate(str(home / "no_null"), tmp_path, data=[str(home / "animals"), str(home / "ships")], seeds=[0])
    assert "ships" in next(found)  # 8 documents; animals has 4, the context as many
    small = beir.EvaluationSet("three", {"q": "cat"}, dict(list(ANIMALS.corpus.items())[:3]), {"q": {"b": 1}})
    beir.write(small, tmp_path / "three")
    found = evaluate(str(home / "no_null"), tmp_path / "b", data=[str(tmp_path / "three"), str(home / "ships")])
    assert "three" not in next(found)
    with pytest.raises(
        ValueError, match=r"1 of 2 tasks failed.*\n- three: .*need 4 context documents, got a corpus of 3: add"
    ):
        next(found)


def test_an_error_of_any_kind_is_reported_after_the_other_tasks(home, tmp_path, monkeypatch, caplog):
    def fail(*args):
        if args[1][0].name == "animals":
            raise KeyError("a bug")
        return rank(*args)

    monkeypatch.setattr(benchmark.beir, "rank", fail)
    found = evaluate(str(home / "biencoder"), tmp_path, data=[str(home / "animals"), str(home / "ships")])
    assert "ships" in next(found) and "Traceback" in caplog.text
    with pytest.raises(ValueError, match=r"1 of 2 tasks failed.*\n- animals: 'a bug'"):
        next(found)


@pytest.mark.parametrize(
    ("model", "kinds", "message"),
    [
        (
            "contextual",
            ["corpus", "nune"],
            "unknown kind 'nune'; choose among corpus, whitened, statistics, random, none",
        ),
        ("contextual", ["random"], "random: it needs --random-corpus"),
        ("biencoder", ["corpus"], "corpus: a biencoder reads no context; this model and call can have whitened, stat"),
        ("no_null", ["none"], "none: these weights have no null embedding"),
    ],
)
def test_a_kind_that_cannot_be_had_is_named_with_those_that_can(home, tmp_path, model, kinds, message):
    with pytest.raises(ValueError, match=message):
        run(home, tmp_path, model, kinds=kinds)


def test_the_usual_kinds_are_those_that_a_model_can_have(home, tmp_path):
    assert list(run(home, tmp_path / "a", "biencoder")[1]["tasks"]["ships"]) == ["whitened", "statistics", "none"]
    assert list(run(home, tmp_path / "b", "no_null")[1]["tasks"]["ships"]) == ["corpus", "whitened", "statistics"]


def test_the_command_scores_two_models_and_compares_them(home, tmp_path, capsys):
    for model in ("contextual", "biencoder"):
        main(["--model", str(home / model), "--data", str(home / "animals"), str(home / "ships"), "--context",
              "none,whitened", "--context-seeds", "0", "1", "--out", str(tmp_path / model)])  # fmt: skip
    capsys.readouterr()
    folders = [str(tmp_path / "contextual"), str(tmp_path / "biencoder")]
    main(["compare", *folders])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["whitened", "none"]
    means = [read_json(Path(folder) / "results.json")["tasks"] for folder in folders]
    expected = [np.mean([m[s]["none"]["ndcg@10"]["mean"] for s in ("animals", "ships")]) for m in means]
    assert f"{expected[0] - expected[1]:+.4f}" in lines[3] and "| 1 " not in lines[2]
    main(["compare", folders[0], folders[0], "--context", "whitened,none", "--measure", "mrr"])
    assert "whitened − none" in (line := capsys.readouterr().out.splitlines()[2]) and line.split("|")[-2].strip() == "2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "HOME/contextual", "--out", "OUT"], "nothing to evaluate: give --data"),
        (["--model", "HOME/none", "--data", "HOME/ships", "--out", "OUT"], "connect to the network once"),
        (["--model", "HOME/biencoder", "--data", "HOME/nope", "--out", "OUT"], "nope: expected corpus.jsonl"),
        (
            ["--model", "HOME/biencoder", "--data", "HOME/ships", "--out", "OUT", "--random-corpus", "HOME/x"],
            "x: there is",
        ),
        (
            ["--model", "HOME/untokenized", "--data", "HOME/ships", "--out", "OUT"],
            "expected a folder with tokenizer.json",
        ),
        (["compare", "HOME/ships", "HOME/ships"], "expected results of `python -m cde_jax.evaluate --out`"),
    ],
)
def test_what_is_wrong_is_named_without_a_traceback(home, tmp_path, arguments, message):
    if not (home / "untokenized").exists():
        (home / "untokenized").mkdir()
        for file in ("config.json", "model.safetensors"):
            (home / "untokenized" / file).write_bytes((home / "biencoder" / file).read_bytes())
    arguments = [a.replace("HOME", str(home)).replace("OUT", str(tmp_path)) for a in arguments]
    with pytest.raises(SystemExit, match=message):
        main(arguments)
    assert not (tmp_path / "results.json").exists()


def test_runs_without_a_common_kind_cannot_be_compared(home, tmp_path):
    run(home, tmp_path / "a", "biencoder", ("ships",), kinds=["none"])
    run(home, tmp_path / "b", "biencoder", ("ships",), kinds=["whitened"])
    folders = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(ValueError, match=r"tasks \['ships'\] and \['ships'\], the kinds \['none'\] and \['whitened'\]"):
        results.compare_runs(folders, None, "ndcg@10")
    assert "none − whitened" in results.compare_runs(folders, ("none", "whitened"), "ndcg@10")
    (tmp_path / "a/scores/ships.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="or damaged"):
        results.compare_runs(folders, None, "ndcg@10")
