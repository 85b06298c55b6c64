"""The loop and its checkpoints: what is written, what is kept, and what a bad number, file or disk leads to."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_models import VOCABULARY, biencoder

from cde_jax.training import loop, sharding
from cde_jax.training.accounting import step_flops
from cde_jax.training.checkpoint import Checkpoints
from cde_jax.training.step import StepConfig, init_state, make_train_step, stream

BELONGS = {"plan": "p" * 8, "config": "c" * 8}
KEY = stream(0, "dropout")


@pytest.fixture(scope="module")
def trainer():
    """A real step of a tiny biencoder, compiled once, and its first state."""
    optimizer = optax.adam(1e-3)
    graph, state = init_state(biencoder(layers=1), optimizer)
    return make_train_step(graph, optimizer, lambda step: 1e-3, StepConfig(), sharding.make_mesh(1)), state


def copy(state):
    return jax.tree.map(lambda x: x.copy(), state)  # a step eats its state


def batches(start, stop):
    for step in range(start, stop):
        random, batch = np.random.default_rng(step), {}
        for name in ("query", "document", "context"):
            batch[f"{name}_ids"] = jnp.asarray(random.integers(1, VOCABULARY, (1, 4, 3)), jnp.int32)
            batch[f"{name}_mask"] = jnp.ones((1, 4, 3), bool)
        yield batch | {"keep": jnp.ones((1, 4, 4), bool), "plan_batch": np.array([100 + step])}


def go(
    trainer, workdir, steps=6, *, checkpoint=2, every=1, evaluate=None, source=batches, wrap=lambda step: step, **more
):
    """Run or resume as `stages.train` does; returns the outcome."""
    step, state = trainer
    checkpoints = Checkpoints(workdir / "checkpoints", BELONGS)
    try:
        newest = checkpoints.newest()
        state = copy(state) if newest is None else checkpoints.restore(newest, state)
        return loop.run(
            wrap(step),
            state,
            source,
            KEY,
            steps=steps,
            cadence=loop.Cadence(every, checkpoint, checkpoint if evaluate else 0),
            checkpoints=checkpoints,
            workdir=workdir,
            evaluate=evaluate,
            **more,
        )
    finally:
        checkpoints.close()


def opened(workdir, belongs=None):
    checkpoints = Checkpoints(workdir / "checkpoints", belongs or BELONGS)
    checkpoints.wait()
    return checkpoints


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def kept(workdir):
    return sorted(int(name) for name in os.listdir(workdir / "checkpoints") if name.isdigit())


# --- what a run leaves


def test_a_run_leaves_metrics_tensorboard_and_its_newest_checkpoints(trainer, tmp_path):
    outcome = go(trainer, tmp_path)
    assert outcome.finished and int(outcome.state.step) == 6
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    names = {"step", "loss", "accuracy", "positive", "negative", "masked", "gradient_norm", "learning_rate"}
    assert set(lines(tmp_path)[0]) == names | {"pairs_per_second", "tflops", "padding", "compilations"}
    assert lines(tmp_path)[-1]["loss"] < lines(tmp_path)[0]["loss"] * 1.5
    (events,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    assert b"accuracy" in events.read_bytes()
    assert kept(tmp_path) == [4, 6]
    assert same(opened(tmp_path).restore(6, outcome.state), outcome.state)


def test_lines_tell_model_flops_by_the_texts_own_lengths(trainer, tmp_path):
    def half_empty(start, stop):
        for step, batch in enumerate(batches(start, stop), start):
            yield batch | {"query_mask": batch["query_mask"].at[:, 2:].set(step < 2)}

    go(trainer, tmp_path, steps=4, source=half_empty, peak_tflops=1e-3)
    rows = lines(tmp_path)
    flops = [row["tflops"] / row["pairs_per_second"] for row in rows]  # of a pair, up to what is rounded
    config = nnx.merge(init_state(biencoder(layers=1), optax.adam(1e-3))[0], trainer[1].params).config
    for row, texts in ((rows[1], 8), (rows[3], 6)):
        step = step_flops(config, np.array([3] * texts), scores=16)
        np.testing.assert_allclose(row["tflops"] / row["pairs_per_second"] * 4e12, step, rtol=0.1)
        np.testing.assert_allclose(row["utilisation"], row["tflops"] * 1e3, rtol=0.1)
    assert flops[3] < flops[1]


def test_steps_are_traced_where_it_is_asked_for(trainer, tmp_path, caplog):
    go(trainer, tmp_path / "none", steps=6)
    assert not (tmp_path / "none" / "profile").exists()
    with caplog.at_level("INFO"):
        go(trainer, tmp_path / "two", steps=7, profile_steps=2)
        go(trainer, tmp_path / "short", steps=4, profile_steps=5)
    for run in ("two", "short"):
        assert [file.stat().st_size > 0 for file in (tmp_path / run / "profile").rglob("*.xplane.pb")] == [True]
    assert caplog.text.count("holds the profiler's trace") == 2


def test_lines_tell_the_padding_since_the_line_before_and_the_compilations(trainer, tmp_path):
    def wider_in_the_end(start, stop):
        for step, batch in enumerate(batches(start, stop), start):
            texts = batch["query_mask"].at[:, :, -1].set(step % 2 == 0)  # 4 of the 36 tokens are missing at odd steps
            batch["query_mask"] = texts
            if step == 4:
                for name in ("query_ids", "query_mask"):
                    batch[name] = jnp.concatenate([batch[name], jnp.zeros_like(batch[name])], axis=2)
            yield batch

    go(trainer, tmp_path, 5, every=2, source=wider_in_the_end)
    found = [(line["step"], line["padding"], line["compilations"]) for line in lines(tmp_path)]
    padding = float(f"{4 / 72:.6g}")
    assert found == [(2, padding, 1), (4, padding, 1), (5, 0.25, 2)]


def test_lines_are_written_every_few_steps_and_at_the_end(trainer, tmp_path):
    go(trainer, tmp_path, 5, every=2)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 5]


def test_resuming_repeats_no_line_and_ends_in_the_same_state(trainer, tmp_path):
    whole = go(trainer, tmp_path / "whole", 6)
    go(trainer, tmp_path / "cut", 4)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:  # steps after the checkpoint, and a cut line
        file.write('{"step": 5, "loss": 9.0}\n{"step": 6, "lo')
    outcome = go(trainer, tmp_path / "cut", 6)
    assert [line["step"] for line in lines(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]
    speed = {"pairs_per_second", "tflops"}
    without_speed = [
        [{k: v for k, v in x.items() if k not in speed} for x in lines(tmp_path / d)] for d in ("whole", "cut")
    ]
    assert without_speed[0] == without_speed[1]
    assert same(outcome.state, whole.state)


def test_a_finished_run_is_not_run_again(trainer, tmp_path):
    def none_asked(start, stop):
        assert start == stop
        return iter(())

    first = go(trainer, tmp_path, 4)
    again = go(trainer, tmp_path, 4, source=none_asked)
    assert again.finished and same(first.state, again.state)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_the_best_checkpoint_is_kept_beside_the_newest(trainer, tmp_path):
    scores = {2: 0.3, 4: 0.9, 6: 0.1, 8: 0.2, 10: 0.0}
    go(trainer, tmp_path, 10, evaluate=lambda state: scores[int(state.step)])
    assert kept(tmp_path) == [4, 8, 10]
    checkpoints = opened(tmp_path)
    assert (checkpoints.best(), checkpoints.newest()) == (4, 10)
    assert [line["score"] for line in lines(tmp_path) if "score" in line] == list(scores.values())


def test_without_scores_the_newest_is_the_best(trainer, tmp_path):
    assert (opened(tmp_path).best(), opened(tmp_path).newest()) == (None, None)
    go(trainer, tmp_path, 4)
    assert opened(tmp_path).best() == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_current_step_with_a_checkpoint(trainer, tmp_path, number):
    def asked_in_the_middle(start, stop):
        for batch in batches(start, stop):
            if int(batch["plan_batch"][0]) == 102:
                os.kill(os.getpid(), number)
            yield batch

    before = signal.getsignal(number)
    outcome = go(trainer, tmp_path, 6, checkpoint=0, source=asked_in_the_middle)
    assert not outcome.finished and int(outcome.state.step) == 3
    assert signal.getsignal(number) == before
    assert kept(tmp_path) == [3]
    assert same(go(trainer, tmp_path, 6).state, go(trainer, tmp_path / "whole", 6).state)


def test_batches_are_put_on_the_devices_before_they_are_asked_for():
    mesh, read = sharding.make_mesh(2), []

    def source():
        for step in range(5):
            read.append(step)
            yield {"rows": np.full((2, 3), step)}

    seen = []
    for batch in sharding.shard_ahead(mesh, source()):
        assert len(batch["rows"].sharding.device_set) == 2
        seen.append((int(batch["rows"][0, 0]), len(read)))
    assert seen == [(0, 2), (1, 3), (2, 4), (3, 5), (4, 5)]
    assert len(list(sharding.shard_ahead(mesh, [{"rows": np.zeros((2, 3))}]))) == 1


# --- bad numbers


def poison(at):
    """The step, with a parameter that is no number any more from step `at` on (memory or hardware gone wrong)."""

    def wrap(step):
        def poisoned(state, batch, key):
            if int(state.step) == at - 1:
                state = state._replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
            return step(state, batch, key)

        return poisoned

    return wrap


@pytest.mark.parametrize("at", [3, 4, 6])  # noticed while the next step runs, at a checkpoint, at the end
def test_a_loss_that_is_not_finite_ends_the_run_and_is_never_saved(trainer, tmp_path, at):
    good = go(trainer, tmp_path / "good", 2).state
    with pytest.raises(
        FloatingPointError, match=rf"step {at}: the loss of plan batch \[{99 + at}\] is not finite"
    ) as error:
        go(trainer, tmp_path, 6, wrap=poison(at))
    assert "last good checkpoint is left" in str(error.value) and "lower train.learning_rate" in str(error.value)
    checkpoints = opened(tmp_path)
    last = (at - 1) // 2 * 2
    assert checkpoints.newest() == last
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, at))
    restored = checkpoints.restore(last, good)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(restored))
    if last == 2:
        assert same(restored, good)


def test_a_gradient_that_is_not_finite_ends_the_run(trainer, tmp_path):
    def overflow(step):
        def overflowing(state, batch, key):
            state, values = step(state, batch, key)
            return state, values | {"gradient_norm": jnp.float32(jnp.inf)}

        return overflowing

    with pytest.raises(FloatingPointError, match=r"step 1: the gradient of plan batches \[100\] is not finite.*inf"):
        go(trainer, tmp_path, 4, wrap=overflow)
    assert kept(tmp_path) == []


# --- bad checkpoints


@pytest.fixture(scope="module")
def saved(trainer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return folder, go(trainer, folder, 4).state


def python(code: str, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_damaged_checkpoint_is_never_taken_for_a_good_one(tmp_path):
    # In a process of its own: a read that fails leaves TensorStore threads that complain at any later moment.
    code = """
        import json, shutil, sys
        from pathlib import Path
        import jax.numpy as jnp, numpy as np
        from cde_jax.training.checkpoint import Checkpoints

        def damage(path, how):
            content = bytearray(path.read_bytes())
            if how == "truncated":
                path.write_bytes(content[: len(content) // 2])
            elif how == "altered":
                content[len(content) // 2] ^= 0x10
                path.write_bytes(content)
            else:
                path.unlink()

        def outcome(directory):
            checkpoints = Checkpoints(directory, {"plan": "p"})
            if checkpoints.newest() != 4:
                return f"newest is {checkpoints.newest()}"
            try:
                found = checkpoints.restore(4, state)
            except ValueError as error:
                assert np.array_equal(checkpoints.restore(2, state)["w"], state["w"] - 2)  # as the error promises
                return str(error)
            return "equal" if all(np.array_equal(found[k], state[k]) for k in state) else "different"

        root = Path(sys.argv[1])
        state = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(40, 50)), jnp.float32), "step": jnp.array(4)}
        checkpoints = Checkpoints(root / "good", {"plan": "p"})
        checkpoints.save(2, state | {"w": state["w"] - 2})
        checkpoints.save(4, state)
        checkpoints.close()
        files = sorted(path.relative_to(root / "good") for path in (root / "good" / "4").rglob("*") if path.is_file())
        for how in ("truncated", "altered", "missing"):
            for file in files:
                size = (root / "good" / file).stat().st_size
                shutil.rmtree(root / "bad", ignore_errors=True)
                shutil.copytree(root / "good", root / "bad")
                damage(root / "bad" / file, how)
                print(json.dumps([how, str(file), size, outcome(root / "bad")]), flush=True)
    """
    done = python(code, tmp_path)
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert {how for how, *_ in outcomes} == {"truncated", "altered", "missing"}, done.stderr[-2000:]
    bad = tmp_path / "bad" / "4"
    for how, file, size, outcome in outcomes:
        if outcome not in ("equal", "newest is 2"):  # a file that does not matter, or no checkpoint any more
            assert outcome.startswith(f"checkpoint {bad} "), (how, file, outcome)
            assert f"Nothing was changed. Remove {bad} to go on from the checkpoint before it" in outcome
        if ("/d/" in file and size > 5000) or file.endswith("about/metadata"):  # the arrays and their digest
            assert outcome.startswith("checkpoint "), (how, file, outcome)


def test_a_checkpoint_of_another_run_is_refused_with_both_fingerprints(saved):
    folder, state = saved
    for name in BELONGS:
        other = opened(folder, BELONGS | {name: "other"})
        with pytest.raises(
            ValueError, match=rf"belongs to another {name}: expected fingerprint other, got {BELONGS[name]}"
        ):
            other.restore(4, state)


def test_a_full_disk_says_so_and_leaves_the_checkpoint_before(tmp_path):
    code = """
        import resource, sys
        import jax.numpy as jnp, numpy as np
        from cde_jax.training.checkpoint import Checkpoints
        state = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(50, 1000)), jnp.float32)}
        checkpoints = Checkpoints(sys.argv[1], {"plan": "p"})
        checkpoints.save(1, state)
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            checkpoints.save(2, {"w": state["w"] + 1})
            checkpoints.wait()
        except OSError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        again = Checkpoints(sys.argv[1], {"plan": "p"})
        print(again.newest(), np.array_equal(again.restore(1, state)["w"], state["w"]))
    """
    done = python(code, tmp_path / "checkpoints")
    said, after = done.stdout.splitlines()
    assert f"could not be written to {tmp_path / 'checkpoints'}" in said
    assert "File too large" in said and "free some space" in said and "already there are untouched" in said
    assert after == "1 True", done.stderr
