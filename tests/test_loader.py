"""The loader: `batch(step)` is a function, and Grain only computes it ahead of time."""

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_pairs import tiny_pairs, tiny_plan, tiny_vectors

from cde_jax.batching.loader import Loader

ROOT = Path(__file__).resolve().parents[1]
B, K, LQ, LD = 4, 1, 5, 7
OPTIONS = {
    "batches_per_step": 2,
    "context_size": 3,
    "context_source": "batch",
    "query_length": LQ,
    "document_length": LD,
    "seed": 1,
}


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


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_arrays_have_the_promised_shapes_and_types(made):
    batch = Loader(*made, **OPTIONS).batch(0)
    n = B * (1 + K)
    assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
        "query_ids": ("int32", (2, B, LQ)),
        "query_mask": ("bool", (2, B, LQ)),
        "document_ids": ("int32", (2, n, LD)),
        "document_mask": ("bool", (2, n, LD)),
        "context_ids": ("int32", (2, 3, LD)),
        "context_mask": ("bool", (2, 3, LD)),
        "keep": ("bool", (2, B, n)),
        "plan_batch": ("int32", (2,)),
    }


def test_tokens_are_those_of_the_plan_s_rows(made):
    plan, pairs = made
    batch = Loader(*made, **OPTIONS).batch(1)
    queries, documents = pairs.ragged("query_tokens"), pairs.ragged("document_tokens")
    for g, place in enumerate(batch["plan_batch"]):
        columns = plan.rows[place].tolist() + plan.hard_negatives[place].ravel().tolist()
        for i, row in enumerate(plan.rows[place].tolist()):
            assert batch["query_ids"][g, i][batch["query_mask"][g, i]].tolist() == queries.row(row)[:LQ].tolist()
        for j, document in enumerate(columns):
            kept = batch["document_ids"][g, j][batch["document_mask"][g, j]].tolist()
            assert kept == documents.row(document)[:LD].tolist()
        np.testing.assert_array_equal(batch["keep"][g], plan.keep(int(place)))


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


def test_the_loader_is_imported_without_the_libraries_that_make_plans():
    code = "import sys, cde_jax.batching.loader; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {name.split(".")[0] for name in ran.stdout.split()}
    assert "numpy" in loaded
    assert not loaded & {"faiss", "sklearn", "threadpoolctl", "scipy", "grain", "jax", "tokenizers", "safetensors"}


def test_context_depends_on_seed_and_place_alone(made):
    loader = Loader(*made, **OPTIONS)
    grouped = Loader(*made, **(OPTIONS | {"batches_per_step": 3}))
    wanted = {int(p): c for s in range(3) for p, c in zip(*_places(loader.batch(s)), strict=True)}
    for step in range(2):
        for place, context in zip(*_places(grouped.batch(step)), strict=True):
            np.testing.assert_array_equal(context, wanted[int(place)])
    other = Loader(*made, **(OPTIONS | {"seed": 2}))
    assert any(not np.array_equal(loader.context(p), other.context(p)) for p in range(4))


def _places(batch):
    return batch["plan_batch"], batch["context_ids"]


@pytest.mark.parametrize("source", ["batch", "domain"])
def test_missing_context_documents_are_all_false_rows(made, source):
    loader = Loader(*made, **(OPTIONS | {"context_size": 40, "context_source": source}))
    batch = loader.batch(0)
    for g, place in enumerate(batch["plan_batch"]):
        present = int((loader.context(int(place)) >= 0).sum())
        assert 0 < present < 40
        assert batch["context_mask"][g, :present].any(axis=-1).all()
        assert not batch["context_mask"][g, present:].any()


def test_no_context_at_all_is_allowed(made):
    batch = Loader(*made, **(OPTIONS | {"context_size": 0})).batch(0)
    assert batch["context_ids"].shape == batch["context_mask"].shape == (2, 0, LD)


# --- several lengths

LENGTHS = OPTIONS | {"query_length": 8, "document_length": 10, "text_lengths": 3, "chunk_tokens": 20}


def found_again(held, g):
    """The texts in chunks of plan batch g, as lists of tokens in their order."""
    rows = [
        ids[mask].tolist()
        for many_ids, many_masks in zip(held["ids"], held["mask"], strict=True)
        for chunk in zip(many_ids[g], many_masks[g], strict=True)
        for ids, mask in zip(*chunk, strict=True)
    ]
    return [rows[at] for at in held["place"][g]]


@pytest.mark.parametrize("context_size", [3, 40, 0])
def test_texts_in_chunks_are_those_of_the_plain_batch(made, context_size):
    options = LENGTHS | {"context_size": context_size}
    plain, loader = Loader(*made, **(options | {"text_lengths": 1})), Loader(*made, **options)
    shapes = set()
    for step in range(4):
        expected, batch = plain.batch(step), loader.batch(step)
        shapes.add(str([(x.shape, x.dtype) for x in leaves(batch)]))
        assert batch.keys() == {"keep", "plan_batch", "texts"} | ({"context"} if context_size else set())
        for name in ("keep", "plan_batch"):
            np.testing.assert_array_equal(batch[name], expected[name])
        for g in range(2):
            tokens = {
                name: [
                    i[m].tolist() for i, m in zip(expected[f"{name}_ids"][g], expected[f"{name}_mask"][g], strict=True)
                ]
                for name in ("query", "document", "context")
            }
            assert found_again(batch["texts"], g) == tokens["query"] + tokens["document"]
            if context_size:
                assert found_again(batch["context"], g) == tokens["context"]
    assert len(shapes) == 1
    assert loader.layouts["texts"].lengths[0] == 8


def leaves(batch):
    for name in sorted(batch):
        if isinstance(batch[name], dict):
            yield from leaves(batch[name])
        else:
            yield from [batch[name]] if isinstance(batch[name], np.ndarray) else batch[name]


@pytest.mark.parametrize("how", [{"threads": 2}, {"threads": 0, "workers": 1}])
def test_batches_in_chunks_are_read_ahead_too(made, how):
    loader = Loader(*made, **LENGTHS)
    batches = list(loader.iterate(2, 5, **how, prefetch=2))
    for step, batch in zip(range(2, 5), batches, strict=True):
        expected = Loader(*made, **LENGTHS).batch(step)
        for got, wanted in zip(leaves(batch), leaves(expected), strict=True):
            np.testing.assert_array_equal(got, wanted)


# --- ahead of time


@pytest.mark.parametrize(("threads", "prefetch"), [(0, 0), (1, 1), (4, 6), (4, 2), (2, 0)])
@pytest.mark.parametrize(("start", "stop"), [(0, 9), (5, 9), (3, 3)])
def test_iteration_gives_the_batches_in_order_from_any_start(made, threads, prefetch, start, stop):
    loader = Loader(*made, **OPTIONS)
    batches = list(loader.iterate(start, stop, threads=threads, prefetch=prefetch))
    assert len(batches) == stop - start
    for step, batch in zip(range(start, stop), batches, strict=True):
        assert_equal(batch, loader.batch(step))


@pytest.mark.parametrize(("workers", "source"), [(1, "batch"), (2, "domain")])
def test_processes_give_the_same_batches_in_order(made, workers, source):
    loader = Loader(*made, **(OPTIONS | {"context_source": source}))
    batches = list(loader.iterate(5, 13, threads=0, workers=workers, prefetch=4))
    assert len(batches) == 8
    for step, batch in zip(range(5, 13), batches, strict=True):
        assert_equal(batch, loader.batch(step))


def test_a_process_is_given_the_names_of_files_and_not_their_content(made):
    loader = Loader(*made, **OPTIONS)
    pickled = pickle.dumps(loader)
    assert len(pickled) < 5000 and b"document_tokens.values.bin" in pickled and b"rows.bin" in pickled
    again = pickle.loads(pickled)
    assert isinstance(again.plan.rows.base, np.memmap)
    assert_equal(again.batch(3), loader.batch(3))


def test_arrays_that_no_file_backs_are_given_whole(made):
    plan, pairs = made
    loader = Loader(replace(plan, rows=plan.rows[::-1].copy()), pairs, **OPTIONS)
    again = pickle.loads(pickle.dumps(loader))
    np.testing.assert_array_equal(again.plan.rows, plan.rows[::-1])
    assert_equal(again.batch(3), loader.batch(3))


def test_processes_leave_ctrl_c_to_their_parent_and_end_with_it(made, folder):
    code = """
        import json, multiprocessing, sys
        from cde_jax.batching.loader import Loader
        from cde_jax.batching.plan import BatchPlan
        from cde_jax.data.store import Store

        folder, options = sys.argv[1], json.loads(sys.argv[2])
        loader = Loader(BatchPlan.load(f"{folder}/plan"), Store.open(f"{folder}/pairs"), **options)
        batches = loader.iterate(0, 1000, threads=0, workers=2, prefetch=2)
        next(batches), next(batches)
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        sys.stdin.readline()
        for _ in range(20):
            next(batches)
        print("read on", flush=True)
        sys.stdin.readline()
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(folder), json.dumps(OPTIONS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
    )
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, signal.SIGINT)
    print("go on", file=parent.stdin, flush=True)
    assert parent.stdout.readline() == "read on\n"
    parent.kill()
    parent.communicate(timeout=30)  # the workers hold its output open for as long as they live


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
    loader = Loader(replace(plan, rows=plan.rows + 1000), pairs, **OPTIONS)
    with pytest.raises(IndexError, match="of 28 rows"):
        list(loader.iterate(0, 2, threads=2, prefetch=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches_per_step": 0}, "batches_per_step ≥ 1, got 0"),
        ({"context_size": -1}, "context_size ≥ 0"),
        ({"query_length": 0}, "query_length ≥ 1"),
        ({"text_lengths": 0}, "text_lengths ≥ 1"),
        ({"seed": -1}, "seed ≥ 0"),
        ({"context_source": "corpus"}, "batch or domain, got 'corpus'"),
    ],
)
def test_options_out_of_range_are_named(made, change, message):
    with pytest.raises(ValueError, match=message):
        Loader(*made, **(OPTIONS | change))


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
