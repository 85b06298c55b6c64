"""ADDER: the formula, the hardest negatives, the held-out queries and the guard, files, and bad input."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cde_jax
from cde_jax.adapters import adder_step, adder_training
from cde_jax.adapters.adder import Adapter, adapt, as_grades
from cde_jax.adapters.adder_step import Batch, Corpus, initial_tables, optimizer, train_step
from cde_jax.adapters.adder_training import ndcg
from cde_jax.config import AdapterSettings
from cde_jax.evaluation.metrics import ndcg_per_query

FORMS = ("softmax", "linear", "low_rank", "mlp")
SMALL = {"form": "softmax", "hidden": 8, "batch_size": 16, "steps": 40, "hardest": 4, "learning_rate": 0.02}


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def task(queries=48, documents=150, width=12, seed=0):
    """A query is its document, turned and with noise: a residual can learn to turn it back."""
    random = np.random.default_rng(seed)
    corpus = unit(random.normal(size=(documents, width)))
    skew = np.triu(0.15 * random.normal(size=(width, width)), 1)
    turn = np.linalg.solve(np.eye(width) - skew + skew.T, np.eye(width) + skew - skew.T)
    relevant = random.permutation(documents)[:queries]
    asked = unit(corpus[relevant] @ turn + 0.05 * random.normal(size=(queries, width)))
    return asked, corpus, np.stack([np.arange(queries), relevant], axis=1)


def random_tables(form, width, sides="both", hidden=5, seed=1):
    random = np.random.default_rng(seed)
    tables = initial_tables(AdapterSettings(form=form, sides=sides, hidden=hidden), width)
    return {s: {n: random.normal(size=a.shape).astype(np.float32) for n, a in t.items()} for s, t in tables.items()}


def formula(table, x, form):
    """Query by query, in float64."""
    if table is None:
        return np.asarray(x, np.float64)
    out = []
    for q in np.asarray(x, np.float64):
        if form == "linear":
            h = q
        else:
            z = table["K"].astype(np.float64) @ q + table["b"]
            h = {"softmax": np.exp(z) / np.exp(z).sum(), "low_rank": z, "mlp": np.where(z > 0, z, 0)}[form]
        moved = q + table["V"].astype(np.float64) @ h
        out.append(moved / np.linalg.norm(moved))
    return np.array(out)


@pytest.mark.parametrize("form", FORMS)
def test_both_sides_follow_the_formula(form):
    queries, documents, _ = task(9, 20)
    tables = random_tables(form, 12)
    adapter = Adapter(12, AdapterSettings(form=form, sides="both"), tables)
    np.testing.assert_allclose(adapter.transform_queries(queries), formula(tables["query"], queries, form), atol=1e-5)
    found = adapter.transform_documents(documents.astype(np.float16))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, formula(tables["document"], documents, form), atol=2e-3)


@pytest.mark.parametrize("form", FORMS)
def test_training_starts_at_the_identity(form):
    queries, documents, _ = task(5, 7)
    adapter = Adapter(
        12, AdapterSettings(form=form, sides="both"), initial_tables(AdapterSettings(form=form, sides="both"), 12)
    )
    np.testing.assert_allclose(adapter.transform_queries(3 * queries), queries, atol=1e-6)
    np.testing.assert_allclose(adapter.transform_documents(documents), documents, atol=1e-6)


def hardest(tables, queries, documents, positives, k, form):
    scores = formula(tables.get("query"), queries, form) @ formula(tables.get("document"), documents, form).T
    for row, known in enumerate(positives):
        scores[row, [d for d in known if d >= 0]] = -np.inf
    return np.argsort(-scores, axis=1)[:, :k]


@pytest.mark.parametrize("sides", ["query", "both"])
@pytest.mark.parametrize("on_the_device", [True, False])
def test_the_hardest_negatives_are_those_of_the_whole_corpus(monkeypatch, sides, on_the_device):
    monkeypatch.setattr(adder_step, "BLOCK", 100)
    monkeypatch.setattr(adder_step, "CHUNK", 4)
    monkeypatch.setattr(adder_step, "QUERIES", 16)
    if not on_the_device:
        monkeypatch.setattr(adder_step, "DEVICE_BYTES", 0)
    queries, documents, _ = task(40, 333)
    tables = random_tables("softmax", 12, sides)
    corpus = Corpus(7 * documents)
    assert (corpus.resident is not None) == on_the_device and len(corpus.starts) == 4
    near = hardest(tables, queries, documents, [[]] * 40, 3, "softmax").astype(np.int32)
    for positives in (near, np.full((40, 1), -1, np.int32)):
        found = corpus.hardest(tables, queries, positives, 5, "softmax")
        np.testing.assert_array_equal(found, hardest(tables, queries, documents, positives, 5, "softmax"))


def test_documents_that_are_not_there_are_no_negatives():
    queries, documents, _ = task(3, 4)
    found = Corpus(documents).hardest(
        random_tables("softmax", 12), queries, np.array([[0, 2]] * 3, np.int32), 6, "softmax"
    )
    assert np.sort(found, axis=1).tolist() == [[-1, -1, -1, -1, 1, 3]] * 3


@pytest.mark.parametrize("loss", ["infonce", "margin"])
@pytest.mark.parametrize("negatives", ["global", "batch", "both"])
@pytest.mark.parametrize("searched", [True, False])
def test_a_step_lowers_the_loss_of_the_formula(loss, negatives, searched):
    chosen = AdapterSettings(
        form="softmax",
        loss=loss,
        negatives=negatives,
        hardest=3,
        sides="both",
        margin=0.9,
        temperature=0.05,
        learning_rate=3e-4,
    )
    queries, documents, pairs = task(6, 30)
    tables = random_tables("softmax", 12, "both", hidden=4)
    positives = np.array([[d, (d + 1) % 30 if q % 2 else -1] for q, d in pairs], np.int32)
    candidates = np.zeros((6, 0), np.int32)
    if not searched:
        candidates = hardest(tables, queries, documents, positives, 8, "softmax").astype(np.int32)
    vectors = None if searched else Corpus(documents).gather(np.concatenate([positives, candidates], axis=1))
    batch = Batch(queries, positives, positives, candidates, vectors)
    state = optimizer(chosen).init(tables)
    new, _, found = train_step(tables, state, batch, Corpus(documents).resident, 30, chosen)
    scores = formula(tables["query"], queries, "softmax") @ formula(tables["document"], documents, "softmax").T
    expected = []
    for q, known in enumerate(positives):
        known = [d for d in known if d >= 0]
        far = hardest(tables, queries, documents, positives, 3, "softmax")[q].tolist() if negatives != "batch" else []
        far += [d for d in positives[:, 0] if d not in known] if negatives != "global" else []
        wrong = scores[q, far]
        for d in known:
            right = scores[q, d]
            if loss == "margin":
                expected.append((max(0, 0.9 + wrong.max() - right)) / len(known))
            else:
                expected.append(np.log1p(np.exp((wrong - right) / 0.05).sum()) / len(known))
    np.testing.assert_allclose(found, sum(expected) / 6, rtol=1e-4)
    again = train_step(new, state, batch, Corpus(documents).resident, 30, chosen)[2]
    assert again < found
    if not searched:  # so every product is of the loss
        program = str(train_step.trace(tables, state, batch, Corpus(documents).resident, 30, chosen).jaxpr)
        highest = program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")
        assert highest == program.count("= dot_general[") > 0


def test_scores_are_those_of_trec_eval():
    random = np.random.default_rng(0)
    grades = [{int(d): int(random.integers(1, 4)) for d in random.permutation(30)[:n]} for n in (1, 2, 5, 15)]
    found = np.stack([random.permutation(30)[:10] for _ in grades])
    found[0, 3:] = -1
    for column, k in enumerate(adder_training.CUTOFFS):
        run = {str(q): {str(d): 20.0 - i for i, d in enumerate(row) if d >= 0} for q, row in enumerate(found.tolist())}
        qrels = {str(q): {str(d): g for d, g in relevant.items()} for q, relevant in enumerate(grades)}
        np.testing.assert_allclose(ndcg(found, grades)[:, column], list(ndcg_per_query(run, qrels, k).values()))


@pytest.mark.parametrize(("sides", "form"), [("query", "softmax"), ("both", "softmax"), ("query", "linear")])
def test_a_task_is_learned_and_the_report_says_so(sides, form):
    queries, documents, pairs = task(80, 200)
    adapter = Adapter.fit(queries, documents, pairs, sides=sides, **SMALL | {"form": form})
    gain = adapter.report["ndcg"]["10"]
    assert not adapter.report["identity"] and gain["low"] > 0 and gain["adapted"] > gain["frozen"] + 0.05
    assert adapter.report["held_out"] == 80 and adapter.report["folds"] == 5 and adapter.report["refresh"] == 1
    moved = np.abs(adapter.transform_documents(documents) - documents).max()
    assert moved > 1e-3 if sides == "both" else moved < 1e-6
    assert np.abs(adapter.transform_queries(queries) - queries).max() > 1e-2
    assert adapter.get_params()["sides"] == sides


def test_the_adapter_of_one_fold_is_the_one_that_was_measured():
    queries, documents, pairs = task(100, 200)
    adapter = Adapter.fit(queries, documents, pairs, folds=1, **SMALL)
    held_out = np.random.default_rng([0, adder_step.STREAM]).permutation(100)[:20]
    adapted = adapter.transform_queries(queries[held_out]) @ adapter.transform_documents(documents).T
    scores = ndcg(np.argsort(-adapted, axis=1)[:, :10], [{int(pairs[q, 1]): 1} for q in held_out])[:, -1]
    assert adapter.report["curve"][str(adapter.report["steps"])] == pytest.approx(scores.mean(), abs=1e-4)


@pytest.mark.parametrize("folds", [1, 5])
def test_labels_without_meaning_give_the_identity(caplog, folds):
    queries, documents, pairs = task(60, 120)
    pairs[:, 1] = np.random.default_rng(1).permutation(120)[:60]
    adapter = Adapter.fit(queries, documents, pairs, folds=folds, **SMALL)
    assert adapter.report["identity"] and not adapter.tables and "the adapter is the identity" in caplog.text
    np.testing.assert_allclose(adapter.transform_queries(queries), queries, atol=1e-6)


def test_few_held_out_queries_cannot_show_a_gain():
    queries, documents, pairs = task(5, 60)
    adapter = Adapter.fit(queries, documents, pairs, **SMALL)
    assert adapter.report["identity"] and adapter.report["ndcg"]["10"]["low"] == -1


@pytest.mark.parametrize("kind", ["global", "batch"])
def test_the_order_of_the_corpus_does_not_matter(kind):
    queries, documents, pairs = task(100, 200)
    order = np.random.default_rng(3).permutation(len(documents))
    places = np.argsort(order)
    options = SMALL | {"negatives": kind, "steps": 20}
    first = Adapter.fit(queries, documents, pairs, **options)
    second = Adapter.fit(queries, documents[order], np.stack([pairs[:, 0], places[pairs[:, 1]]], axis=1), **options)
    assert first.report["curve"] == pytest.approx(second.report["curve"], abs=1e-5)
    assert first.report["steps"] == second.report["steps"] > 0 and (kind == "batch" or not first.report["identity"])
    np.testing.assert_allclose(first.transform_queries(queries), second.transform_queries(queries), atol=1e-4)


def test_qrels_and_pairs_are_the_same_labels():
    pairs = np.array([[0, 3], [2, 1], [0, 4], [0, 3]])
    qrels = {0: {3: 1, 4: 1, 5: 0}, 2: {1: 1}, 1: {0: -1}}
    assert as_grades(pairs, 3, 6) == as_grades(qrels, 3, 6) == {0: {3: 1, 4: 1}, 2: {1: 1}}


@pytest.mark.parametrize("refresh", [None, 1, 3])
def test_a_corpus_beyond_the_device_is_read_from_its_file(monkeypatch, tmp_path, refresh):
    queries, documents, pairs = task()
    np.save(tmp_path / "documents.npy", documents)
    mapped = np.load(tmp_path / "documents.npy", mmap_mode="r")
    options = SMALL | {"folds": 1, "refresh": refresh}
    expected = Adapter.fit(queries, documents, pairs, **options | {"refresh": refresh or 2})
    monkeypatch.setattr(adder_step, "DEVICE_BYTES", 0)
    adapter = Adapter.fit(queries, mapped, pairs, **options)
    assert adapter.report["refresh"] == (refresh or 2)
    np.testing.assert_allclose(adapter.transform_queries(queries), expected.transform_queries(queries), atol=1e-4)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("folds", "refresh"), [(1, 3), (3, None)])
def test_the_same_seed_gives_the_same_bytes_also_after_a_kill(tmp_path, monkeypatch, folds, refresh):
    queries, documents, pairs = task()
    options = SMALL | {"folds": folds, "refresh": refresh, "validation": 0.3}
    Adapter.fit(queries, documents, pairs, **options).save(tmp_path / "whole")
    checkpoint, written = tmp_path / "checkpoint", adder_training.write_arrays
    for survived in (1, 4, 7, 25, 40, 55, 1000):

        def limited(*args, left=[survived]):  # noqa: B006
            written(*args)
            left[0] -= 1
            if not left[0]:
                raise Killed

        monkeypatch.setattr(adder_training, "write_arrays", limited)
        try:
            Adapter.fit(queries, documents, pairs, checkpoint=checkpoint, **options).save(tmp_path / "resumed")
        except Killed:
            with pytest.raises(ValueError, match="other vectors, qrels or settings"):
                Adapter.fit(queries, documents, pairs, checkpoint=checkpoint, **options | {"seed": 1})
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not checkpoint.exists()
    Adapter.fit(queries, documents, pairs, **options | {"seed": 1}).save(tmp_path / "other")
    assert (tmp_path / "other").read_bytes() != (tmp_path / "whole").read_bytes()


def test_a_saved_adapter_is_the_same(tmp_path):
    tables = random_tables("mlp", 12)
    adapter = Adapter(12, AdapterSettings(form="mlp", sides="both"), tables, {"identity": False}, {"weights": "abc"})
    adapter.save(tmp_path / "adapter.safetensors")
    loaded = cde_jax.Adapter.load(tmp_path / "adapter.safetensors")
    assert loaded.settings == adapter.settings and loaded.report == adapter.report
    assert loaded.fingerprints == {"weights": "abc"} and loaded.width == 12
    queries = task()[0]
    np.testing.assert_array_equal(loaded.transform_queries(queries), adapter.transform_queries(queries))
    np.testing.assert_array_equal(loaded.transform_documents(queries), adapter.transform_documents(queries))
    (tmp_path / "adapter.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="not safetensors, truncated or altered"):
        Adapter.load(tmp_path / "adapter.safetensors")


QUERIES, DOCUMENTS, PAIRS = task(12, 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_vectors": QUERIES[0]}, "query vectors: expected a float array of shape"),
        ({"document_vectors": DOCUMENTS[:, :5]}, "document vectors: expected vectors of width 12, got 5"),
        ({"query_vectors": QUERIES * [[np.nan]] * 12}, "query vectors: expected finite vectors, got NaN"),
        ({"document_vectors": DOCUMENTS * np.inf}, "document vectors: expected finite vectors"),
        ({"positives": []}, "expected two or more queries with a relevant document, got 0 of 12"),
        ({"positives": {0: {1: 1}, 2: {2: 0}}}, "expected two or more queries with a relevant document, got 1 of 12"),
        ({"positives": PAIRS[:, :1]}, r"positives: expected integer pairs .* got int64 \[12, 1\]"),
        ({"positives": PAIRS + 0.5}, "positives: expected integer pairs"),
        ({"positives": [[0, 1], [12, 2]]}, "name row 12 of the query vectors, of which there are 12"),
        ({"positives": {0: {1: 1}, 1: {20: 1}}}, "name row 20 of the document vectors, of which there are 20"),
        ({"positives": {0: {1: 1}, "q1": {2: 1}}}, "positives, query row: expected an integer of 0 or more, got 'q1'"),
        ({"hidden": 0}, "`hidden` must be ≥ 1 and ≤ 65536, got 0"),
        ({"temperature": 0.0}, "`temperature` must be ≥ 0.001 and ≤ 1000.0, got 0.0"),
        ({"validation": 0.7}, "`validation` must be ≥ 0.01 and ≤ 0.5, got 0.7"),
        ({"folds": 6}, "`folds` must be ≤ 1 / validation = 5, got 6"),
        ({"refresh": 0}, "`refresh` must be ≥ 1"),
    ],
)
def test_bad_input_is_named_before_training(monkeypatch, change, message):
    monkeypatch.setattr(adder_training, "fit", None)
    given = {"query_vectors": QUERIES, "document_vectors": DOCUMENTS, "positives": PAIRS} | change
    with pytest.raises(ValueError, match=message):
        Adapter.fit(**given)


def test_other_widths_and_values_are_refused_when_used():
    adapter = Adapter(12, AdapterSettings(), {})
    with pytest.raises(ValueError, match="queries: expected vectors of width 12, got 11"):
        adapter.transform_queries(QUERIES[:, 1:])
    with pytest.raises(ValueError, match="documents: expected finite vectors"):
        adapter.transform_documents(DOCUMENTS * np.nan)


def test_a_loss_that_is_not_finite_stops_the_fit(monkeypatch):
    monkeypatch.setattr(adder_step, "KEY_SCALE", np.nan)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 2: lower learning_rate"):
        Adapter.fit(*task(), **SMALL)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 5), width=st.integers(1, 9), hidden=st.integers(1, 7), form=st.sampled_from(FORMS),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
)  # fmt: skip
def test_any_shape_gives_finite_unit_rows(n, width, hidden, form, dtype):
    vectors = np.random.default_rng(n).normal(size=(n, width)).astype(dtype)
    tables = random_tables(form, width, hidden=hidden)
    found = Adapter(width, AdapterSettings(form=form, sides="both"), tables).transform_documents(vectors)
    assert found.shape == (n, width) and found.dtype == np.float32 and np.isfinite(found).all()
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.ones(n), atol=1e-3)
    assert np.isfinite(adapt(tables["query"], np.zeros((1, width), np.float32), form)).all()


def test_a_saved_report_is_json():
    adapter = Adapter.fit(*task(20, 40), **SMALL | {"steps": 4})
    assert json.loads(json.dumps(adapter.report)) == adapter.report
