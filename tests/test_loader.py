"""The loader: `batch(step)` is a function, and threads only compute it ahead of time."""

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_pairs import tiny_pairs, tiny_plan, tiny_vectors

from cde_jax.batching import loader as loader_module
from cde_jax.batching.loader import Loader

ROOT = Path(__file__).resolve().parents[1]
B, K, LONGEST = 4, 1, 10
OPTIONS = {"batches_per_step": 2, "context_size": 3, "context_source": "batch", "seed": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="module")
def made(folder):
    pairs = tiny_pairs(folder / "pairs", (14, 9, 3, 2))
    vectors = tiny_vectors(folder / "vectors", pairs)
    plan = tiny_plan(
        folder / "plan", pairs, vectors, batch_size=B, cluster_size=4, packing="random", epochs=1, hard_negatives=K
    )
    return plan, pairs


def leaves(batch) -> list[np.ndarray]:
    """All arrays, in a fixed order."""
    if isinstance(batch, dict):
        return [leaf for name in sorted(batch) for leaf in leaves(batch[name])]
    return [leaf for x in batch for leaf in leaves(x)] if isinstance(batch, tuple) else [batch]


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def texts_of(chunks, g) -> list[list[int]]:
    """Tokens of each of plan batch g's texts, in their order."""
    rows = [
        ids[mask].tolist()
        for many_ids, many_masks in zip(chunks["ids"], chunks["mask"], strict=True)
        for chunk in zip(many_ids[g], many_masks[g], strict=True)
        for ids, mask in zip(*chunk, strict=True)
    ]
    return [rows[place] for place in chunks["place"][g]]


LENGTHS = {"text_lengths": 3, "chunk_positions": 20, "context_chunk_positions": 10}


def test_arrays_have_the_promised_shapes_and_types(made):
    n = B * (1 + K)
    batch = Loader(*made, **OPTIONS).batch(0)
    assert batch.keys() == {"texts", "context", "keep", "plan_batch"}
    assert (batch["keep"].dtype.name, batch["keep"].shape) == ("bool", (2, B, n))
    assert (batch["plan_batch"].dtype.name, batch["plan_batch"].shape) == ("int32", (2,))
    for options in ({}, LENGTHS):
        loader = Loader(*made, **(OPTIONS | options))
        batch = loader.batch(0)
        for name, count in (("texts", B + n), ("context", 3)):
            chunks, layout = batch[name], loader.layouts[name]
            shapes = list(zip(layout.chunks, layout.texts, layout.lengths, strict=True))
            for kind, dtype in (("ids", "int32"), ("mask", "bool")):
                assert [(x.dtype.name, x.shape) for x in chunks[kind]] == [(dtype, (2, *shape)) for shape in shapes]
            assert (chunks["place"].dtype.name, chunks["place"].shape) == ("int32", (2, count))
    assert loader.layouts["texts"].lengths == (8, 10) and len(loader.layouts["context"].lengths) == 2


def test_one_length_is_that_of_the_longest_text(made):
    layouts = Loader(*made, **(OPTIONS | {"text_lengths": 1})).layouts
    assert layouts["texts"].lengths == layouts["context"].lengths == (LONGEST,)


def test_every_step_has_the_same_shapes(made):
    loader = Loader(*made, **(OPTIONS | LENGTHS))
    assert len({str([(x.shape, x.dtype) for x in leaves(loader.batch(step))]) for step in range(4)}) == 1


@pytest.mark.parametrize("options", [{}, LENGTHS, LENGTHS | {"context_size": 40}])
def test_tokens_are_those_of_the_plan_s_rows(made, options):
    plan, pairs = made
    loader = Loader(*made, **(OPTIONS | options))
    batch = loader.batch(1)
    queries, documents = pairs.ragged("query_tokens"), pairs.ragged("document_tokens")
    document = lambda row: documents.row(row).tolist()  # noqa: E731
    for g, place in enumerate(batch["plan_batch"].tolist()):
        columns = plan.rows[place].tolist() + plan.hard_negatives[place].ravel().tolist()
        expected = [queries.row(row).tolist() for row in plan.rows[place].tolist()]
        assert texts_of(batch["texts"], g) == expected + [document(row) for row in columns]
        context = loader.context(place).tolist()
        assert texts_of(batch["context"], g) == [document(row) if row >= 0 else [] for row in context]
        np.testing.assert_array_equal(batch["keep"][g], plan.keep(place))


def test_a_batch_is_a_function_of_the_step(made):
    one, two = Loader(*made, **OPTIONS), Loader(*made, **OPTIONS)
    forward = [one.batch(step) for step in range(5)]
    for step in reversed(range(5)):
        assert_equal(forward[step], two.batch(step))


def test_the_plan_starts_again_after_its_last_batch(made):
    plan, _ = made
    loader = Loader(*made, **(OPTIONS | {"batches_per_step": 1}))
    assert [int(loader.batch(step)["plan_batch"][0]) for step in range(len(plan) + 2)] == [*range(len(plan)), 0, 1]
    assert_equal(loader.batch(1), loader.batch(len(plan) + 1))


@pytest.mark.parametrize("source", ["batch", "domain"])
def test_context_is_drawn_from_its_source_without_replacement(made, source):
    plan, pairs = made
    loader = Loader(*made, **(OPTIONS | {"context_size": 5, "context_source": source}))
    names = [d["name"] for d in pairs.manifest["domains"]]
    for place in range(len(plan)):
        allowed = set(plan.documents(place).tolist())
        if source == "domain":
            group = plan.manifest["groups"][plan.groups[place]]["domains"]
            allowed = {i for i, d in enumerate(pairs.array("domain")) if names[d] in group}
        context = loader.context(place).tolist()
        drawn = [document for document in context if document >= 0]
        assert set(drawn) <= allowed and len(set(drawn)) == len(drawn) == min(5, len(allowed))


@pytest.mark.parametrize("source", ["batch", "domain"])
def test_context_is_drawn_anew_for_every_plan_batch(made, source):
    """Not the same documents of a domain, nor the same places of a batch."""
    plan, _ = made
    loader = Loader(*made, **(OPTIONS | {"context_source": source}))
    drawn = set()
    for place in range(len(plan)):
        documents = np.unique(plan.documents(place)) if source == "batch" else loader._group_rows[plan.groups[place]]
        drawn.add(tuple(np.searchsorted(documents, loader.context(place)).tolist()))
    assert len(drawn) > len(plan) // 2


def test_the_loader_is_imported_without_the_libraries_that_make_plans():
    code = "import sys, cde_jax.batching.loader; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {name.split(".")[0] for name in ran.stdout.split()}
    assert "numpy" in loaded
    assert not loaded & {"faiss", "sklearn", "threadpoolctl", "scipy", "grain", "jax", "tokenizers", "safetensors"}


def test_a_share_is_those_plan_batches_of_the_whole_step(made):
    whole, shared = (Loader(*made, **OPTIONS, share=share).batch(1) for share in (None, [1]))
    np.testing.assert_array_equal(shared.pop("plan_batch"), whole.pop("plan_batch"))
    for a, b in zip(leaves(shared), leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b[1:2])


def test_context_depends_on_seed_and_place_alone(made):
    loader = Loader(*made, **OPTIONS)
    grouped = Loader(*made, **(OPTIONS | {"batches_per_step": 3}))
    wanted = {place: context for step in range(3) for place, context in contexts(loader.batch(step)).items()}
    for step in range(2):
        for place, context in contexts(grouped.batch(step)).items():
            assert context == wanted[place]
    other = Loader(*made, **(OPTIONS | {"seed": 2}))
    assert any(not np.array_equal(loader.context(p), other.context(p)) for p in range(4))


def contexts(batch) -> dict[int, list[list[int]]]:
    return {place: texts_of(batch["context"], g) for g, place in enumerate(batch["plan_batch"].tolist())}


@pytest.mark.parametrize("source", ["batch", "domain"])
def test_missing_context_documents_are_all_false_rows(made, source):
    loader = Loader(*made, **(OPTIONS | {"context_size": 40, "context_source": source}))
    for place, texts in contexts(loader.batch(0)).items():
        present = int((loader.context(place) >= 0).sum())
        assert 0 < present < 40
        assert all(texts[:present]) and not any(texts[present:])


def test_no_context_at_all_is_allowed(made):
    batch = Loader(*made, **(OPTIONS | {"context_size": 0})).batch(0)
    assert batch.keys() == {"texts", "keep", "plan_batch"}


# --- ahead of time


@pytest.mark.parametrize(("threads", "prefetch"), [(0, 0), (1, 1), (4, 6), (4, 2), (2, 0)])
@pytest.mark.parametrize(("start", "stop"), [(0, 9), (5, 9), (3, 3)])
def test_iteration_gives_the_batches_in_order_from_any_start(made, threads, prefetch, start, stop):
    loader = Loader(*made, **(OPTIONS | LENGTHS))
    batches = list(loader.iterate(start, stop, threads=threads, prefetch=prefetch))
    assert len(batches) == stop - start
    for step, batch in zip(range(start, stop), batches, strict=True):
        assert_equal(batch, loader.batch(step))


def test_batches_are_the_same_where_grain_is_not_installed(made, monkeypatch):
    loader = Loader(*made, **(OPTIONS | LENGTHS))
    expected = list(loader.iterate(2, 7, threads=2, prefetch=2))
    monkeypatch.setitem(sys.modules, "grain", None)
    batches = list(loader.iterate(2, 7, threads=2, prefetch=2))
    assert len(batches) == 5
    for batch, other in zip(batches, expected, strict=True):
        assert_equal(batch, other)


def test_a_caller_that_stops_early_leaves_no_threads(made):
    loader = Loader(*made, **OPTIONS)
    batches = loader.iterate(0, 1000, threads=2, prefetch=3)
    next(batches)
    workers = [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]
    assert workers
    batches.close()
    for thread in workers:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in workers)


def test_an_error_in_a_thread_reaches_the_caller(made):
    plan, pairs = made
    loader = Loader(plan, pairs, **OPTIONS)
    assert loader.layouts  # chosen by the right plan
    loader.plan = replace(plan, rows=plan.rows + 1000)
    with pytest.raises(IndexError, match="of 28 rows"):
        list(loader.iterate(0, 2, threads=2, prefetch=2))


def test_a_plan_of_other_pairs_is_refused(made, tmp_path):
    plan, pairs = made
    other = tiny_pairs(tmp_path / "other", (14, 9, 3, 2), seed=3)
    expected = rf"{other.fingerprint}.*{pairs.fingerprint}.*--rebuild.*{other.directory}.*prefixes.*tokenizer"
    with pytest.raises(ValueError, match=expected):
        Loader(plan, other, **OPTIONS)


def test_steps_out_of_range_are_named(made):
    loader = Loader(*made, **OPTIONS)
    with pytest.raises(ValueError, match="step ≥ 0, got -1"):
        loader.batch(-1)
    with pytest.raises(ValueError, match="start ≤ stop, got 3 and 2"):
        next(loader.iterate(3, 2, threads=1, prefetch=1))


# --- layouts from one process to the next


@pytest.fixture
def file(tmp_path):
    return tmp_path / "layouts.json"


def test_layouts_are_kept_for_the_next_start(made, file, monkeypatch):
    first = Loader(*made, **(OPTIONS | LENGTHS), layouts_file=file)
    wanted = first.layouts
    monkeypatch.setattr(loader_module, "count_lengths", lambda _: pytest.fail("the plan is gone through again"))
    again = Loader(*made, **(OPTIONS | LENGTHS), layouts_file=file)
    assert again.layouts == wanted
    assert_equal(again.batch(1), first.batch(1))


@pytest.mark.parametrize(
    "change",
    [
        {"chunk_positions": 30},
        {"context_chunk_positions": 20},
        {"slots": 3},
        {"text_lengths": 2},
        {"context_size": 2},
        {"seed": 2},
        {"context_source": "domain"},
    ],
)
def test_layouts_of_other_settings_are_not_taken(made, file, change):
    options = OPTIONS | LENGTHS
    wanted = Loader(*made, **options, layouts_file=file).layouts
    assert Loader(*made, **(options | change), layouts_file=file).layouts == Loader(*made, **(options | change)).layouts
    assert len(json.loads(file.read_text())) == 2
    assert Loader(*made, **options, layouts_file=file).layouts == wanted


@pytest.mark.parametrize("damage", ["", "[]", "altered", '{"x": 3}'])
def test_damaged_layouts_are_computed_again(made, file, caplog, damage):
    wanted = Loader(*made, **OPTIONS, layouts_file=file).layouts
    file.write_text(file.read_text().replace(f"{LONGEST}\n", "64\n") if damage == "altered" else damage)
    assert Loader(*made, **OPTIONS, layouts_file=file).layouts == wanted
    assert ("layouts are computed again" in caplog.text) == (damage != '{"x": 3}')
    assert Loader(*made, **OPTIONS, layouts_file=file).layouts == wanted and len(json.loads(file.read_text())) == 1


def test_layouts_of_another_plan_are_dropped(made, file):
    plan, pairs = made
    other = replace(plan, manifest=plan.manifest | {"fingerprint": "another"})
    for each in (other, plan):
        assert Loader(each, pairs, **OPTIONS, layouts_file=file).layouts
    (entry,) = json.loads(file.read_text()).values()
    assert entry["settings"]["plan"] == plan.fingerprint


def test_a_folder_that_may_not_be_written_is_no_obstacle(made, file, caplog, monkeypatch):
    def full(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr("cde_jax.batching.layout.write_json", full)
    assert Loader(*made, **OPTIONS, layouts_file=file).layouts
    assert "layouts are not kept for the next start: the disk is full" in caplog.text


# --- plan batches that are left out


def test_a_skipped_plan_batch_is_replaced_by_a_later_one_and_no_other_moves(made):
    plan, _ = made
    plain, skipping = Loader(*made, **OPTIONS), Loader(*made, **OPTIONS, skip=(1, 3, 4))
    places = lambda loader: [loader.batch(step)["plan_batch"].tolist() for step in range(3)]  # noqa: E731
    assert len(plan) == 6
    assert places(plain) == [[0, 1], [2, 3], [4, 5]]
    assert places(skipping) == [[0, 5], [2, 5], [0, 5]]
    assert skipping.layouts == plain.layouts


@pytest.mark.parametrize(("skip", "message"), [((2, 99), r"names \[99\].*0 to 5"), ((0, 2, 4), "could stand for")])
def test_plan_batches_that_cannot_be_skipped_are_named(made, skip, message):
    with pytest.raises(ValueError, match=rf"train\.skip_batches .*{message}"):
        Loader(*made, **OPTIONS, skip=skip)
