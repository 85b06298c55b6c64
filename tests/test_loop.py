"""The loop: what is written, what is kept, and what a bad number, file or disk leads to."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_batches import whole
from tiny_models import VOCABULARY, biencoder

from cde_jax.config import Train
from cde_jax.training import loop, sharding
from cde_jax.training.accounting import step_flops
from cde_jax.training.checkpoint import Checkpoints
from cde_jax.training.step import init_state, make_train_step, stream

IDENTITY = {"plan": "p" * 8, "config": "c" * 8}
KEY = stream(0, "dropout")


@pytest.fixture(scope="module")
def trainer():
    """A real step of a tiny biencoder, compiled once, and its first state."""
    optimizer = optax.adam(1e-3)
    graph, state = init_state(biencoder(layers=1), optimizer)
    return make_train_step(graph, optimizer, lambda step: 1e-3, Train(), sharding.make_mesh((1, 1))), state


def copy(state):
    return jax.tree.map(lambda x: x.copy(), state)  # a step eats its state


def batches(start, stop):
    for step in range(start, stop):
        ids = jnp.asarray(np.random.default_rng(step).integers(1, VOCABULARY, (1, 8, 3)), jnp.int32)
        texts = whole(ids, jnp.ones((1, 8, 3), bool))
        yield {"texts": texts, "keep": jnp.ones((1, 4, 4), bool), "plan_batch": np.array([100 + step])}


def with_mask(batch, mask):
    """The batch, its texts masked by `mask` [8, 3]."""
    texts = batch["texts"] | {"mask": (jnp.broadcast_to(mask, (1, 1, 8, 3)),)}
    return batch | {"texts": texts}


def go(
    trainer,
    workdir,
    steps=6,
    *,
    checkpoint=2,
    every=1,
    evaluate=None,
    source=batches,
    wrap=lambda step: step,
    **changes,
):
    """Run or resume as `stages.train` does; returns the last state."""
    step, state = trainer
    often = {"log_every": every, "checkpoint_every": checkpoint, "evaluate_every": checkpoint if evaluate else 0}
    checkpoints = Checkpoints(workdir / "checkpoints", IDENTITY)
    try:
        newest = checkpoints.newest()
        state = copy(state) if newest is None else checkpoints.restore(newest, state)
        return loop.run(
            wrap(step),
            state,
            source,
            KEY,
            steps=steps,
            train=Train(**(often | changes)),
            checkpoints=checkpoints,
            workdir=workdir,
            evaluate=evaluate,
        )
    finally:
        checkpoints.wait()


def opened(workdir, identity=None):
    checkpoints = Checkpoints(workdir / "checkpoints", identity or IDENTITY)
    checkpoints.wait()
    return checkpoints


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def kept(workdir):
    return opened(workdir).steps()


# --- what a run leaves


def test_a_run_leaves_metrics_tensorboard_and_its_newest_checkpoints(trainer, tmp_path):
    state = go(trainer, tmp_path)
    assert int(state.step) == 6
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    names = {"step", "loss", "accuracy", "positive", "negative", "masked", "gradient_norm", "learning_rate"}
    speed = {"pairs_per_second", "tflops", "padding", "compilations", "compile_seconds"}
    assert set(lines(tmp_path)[0]) == names | speed
    assert lines(tmp_path)[-1]["loss"] < lines(tmp_path)[0]["loss"] * 1.5
    (events,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    assert b"accuracy" in events.read_bytes()
    assert kept(tmp_path) == [4, 6]
    assert same(opened(tmp_path).restore(6, state), state)


def test_lines_tell_model_flops_by_the_texts_own_lengths(trainer, tmp_path):
    def half_empty(start, stop):
        for step, batch in enumerate(batches(start, stop), start):
            yield with_mask(batch, (np.arange(8) < (8 if step < 2 else 6))[:, None])

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
            mask = np.ones((8, 3), bool)
            mask[:4, -1] = step % 2 == 0  # 4 of the 24 tokens are missing at odd steps
            batch = with_mask(batch, mask)
            if step == 4:
                for name in ("ids", "mask"):
                    (x,) = batch["texts"][name]
                    batch["texts"][name] = (jnp.concatenate([x, jnp.zeros_like(x)], axis=3),)
            yield batch

    go(trainer, tmp_path, 5, every=2, source=wider_in_the_end)
    found = [(line["step"], line["padding"], line["compilations"]) for line in lines(tmp_path)]
    padding = float(f"{4 / 48:.6g}")
    assert found == [(2, padding, 1), (4, padding, 1), (5, 0.5, 2)]


def test_lines_are_written_every_few_steps_and_at_the_end(trainer, tmp_path):
    go(trainer, tmp_path, 5, every=2)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 5]


def test_resuming_repeats_no_line_and_ends_in_the_same_state(trainer, tmp_path):
    whole = go(trainer, tmp_path / "whole", 6)
    go(trainer, tmp_path / "cut", 4)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:  # steps after the checkpoint, and a cut line
        file.write('{"step": 5, "loss": 9.0}\n{"step": 6, "lo')
    state = go(trainer, tmp_path / "cut", 6)
    assert [line["step"] for line in lines(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]
    speed = {"pairs_per_second", "tflops", "compile_seconds"}
    without_speed = [
        [{k: v for k, v in x.items() if k not in speed} for x in lines(tmp_path / d)] for d in ("whole", "cut")
    ]
    assert without_speed[0] == without_speed[1]
    assert same(state, whole)


def test_a_finished_run_is_not_run_again(trainer, tmp_path):
    def none_asked(start, stop):
        assert start == stop
        return iter(())

    first = go(trainer, tmp_path, 4)
    again = go(trainer, tmp_path, 4, source=none_asked)
    assert same(first, again)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_the_best_checkpoint_is_kept_beside_the_newest(trainer, tmp_path):
    scores = {2: 0.3, 4: 0.9, 6: 0.1, 8: 0.2, 10: 0.0}
    go(trainer, tmp_path, 10, evaluate=lambda state: {"score": scores[int(state.step)], "validation_loss": 1.0})
    assert kept(tmp_path) == [4, 8, 10]
    checkpoints = opened(tmp_path)
    assert (checkpoints.best(), checkpoints.newest()) == (4, 10)
    measured = [line for line in lines(tmp_path) if "score" in line]
    assert measured == [{"step": n, "score": score, "validation_loss": 1.0} for n, score in scores.items()]


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
    assert int(go(trainer, tmp_path, 6, checkpoint=0, source=asked_in_the_middle).step) == 3
    assert signal.getsignal(number) == before
    assert kept(tmp_path) == [3]
    assert same(go(trainer, tmp_path, 6), go(trainer, tmp_path / "whole", 6))


def test_batches_are_put_on_the_devices_before_they_are_asked_for():
    mesh, read = sharding.make_mesh((2, 1)), []

    def source():
        for step in range(5):
            read.append(step)
            yield {"rows": np.full((2, 3), step)}

    seen = []
    for batch in sharding.prefetch_to_device(mesh, source()):
        assert len(batch["rows"].sharding.device_set) == 2
        seen.append((int(batch["rows"][0, 0]), len(read)))
    assert seen == [(0, 2), (1, 3), (2, 4), (3, 5), (4, 5)]
    assert len(list(sharding.prefetch_to_device(mesh, [{"rows": np.zeros((2, 3))}]))) == 1


@pytest.mark.parametrize("every", [1, 2, 3])
def test_speed_is_that_of_steps_alone(trainer, tmp_path, monkeypatch, every):
    """On a device that works a second on each step, while the host goes ahead, as accelerators do; in simulated time.

    Compiling the first step takes 50 seconds, an evaluation 500, to start a checkpoint 7, to wait for the last one 90.
    """
    now, finished, names = 0.0, [0.0], iter(range(100))

    def wait_until(second):
        nonlocal now
        now = max(now, second)

    def simulated(step):
        def dispatch(state, batch, key):
            if len(finished) == 1:
                wait_until(now + 50)
            finished.append(max(now, finished[-1]) + 1)
            return step(state, batch, key)

        return dispatch

    def device_get(values):
        wait_until(finished[next(names) + 1])
        return real(values)

    def taking(seconds, function):
        return lambda *arguments: (wait_until(now + seconds), function(*arguments))[1]

    real = jax.device_get
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now, time=time.time))
    monkeypatch.setattr(loop, "jax", SimpleNamespace(device_get=device_get, tree=jax.tree))
    monkeypatch.setattr(Checkpoints, "save", taking(7, Checkpoints.save))
    monkeypatch.setattr(Checkpoints, "wait", taking(90, Checkpoints.wait))
    evaluate = taking(500, lambda state: {"score": 0.0})
    go(trainer, tmp_path, 7, every=every, checkpoint=2, evaluate=evaluate, wrap=simulated)
    trained = [line for line in lines(tmp_path) if "loss" in line]
    assert [line["step"] for line in trained] == sorted({*range(every, 8, every), 7})
    for line in trained:
        assert line["pairs_per_second"] == pytest.approx(4.0)  # of a plan batch, in a second
        assert (line["compilations"], line["compile_seconds"]) == (1, 50.0)


def test_utilisation_is_of_all_devices(trainer, tmp_path):
    mesh = sharding.make_mesh((2, 1))
    optimizer = optax.sgd(1e-3)
    graph, state = init_state(biencoder(layers=1), optimizer)
    step = make_train_step(graph, optimizer, lambda step: 1e-3, Train(), mesh)

    def two(start, stop):
        for batch in batches(start, stop):
            yield sharding.shard_batch(mesh, jax.tree.map(lambda x: np.repeat(x, 2, axis=0), batch))

    state = sharding.replicate(mesh, state)
    go(
        (lambda state, batch, key: step(state, batch, sharding.replicate(mesh, key)), state),
        tmp_path,
        2,
        source=two,
        peak_tflops=1e-3,
    )
    for row in lines(tmp_path):
        np.testing.assert_allclose(row["utilisation"], row["tflops"] * 1e3 / 2, rtol=1e-3)


def test_without_optional_libraries_the_loop_logs_plain_lines(trainer, tmp_path, monkeypatch, caplog):
    for name in ("orbax", "orbax.checkpoint", "tensorboardX.event_file_writer", "tqdm", "rich"):
        monkeypatch.setitem(sys.modules, name, None)
    with caplog.at_level("INFO"):
        state = go(trainer, tmp_path, 4)
    assert "step 4  accuracy" in caplog.text and [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert not (tmp_path / "tensorboard").exists()
    assert same(state, go(trainer, tmp_path, 4))  # restored


def test_tensorboard_hides_what_will_be_run_again(trainer, tmp_path):
    go(trainer, tmp_path, 2)
    before = set((tmp_path / "tensorboard").iterdir())
    time.sleep(1.1)  # event files are named by the second
    go(trainer, tmp_path, 4)
    (new,) = set((tmp_path / "tensorboard").iterdir()) - before
    assert b"\x10\x03" in new.read_bytes()[:120]  # a session that starts at step 3


def test_metrics_go_to_weights_and_biases_and_a_resumed_run_keeps_its_id(tmp_path):
    pytest.importorskip("wandb", reason="wandb (68 MB with what it needs) is not installed: it was not run")
    code = """
        import sys
        from contextlib import ExitStack
        from pathlib import Path
        from cde_jax.training.tracking import wandb_writer
        workdir, start = Path(sys.argv[1]), int(sys.argv[2])
        with ExitStack() as exit:
            write = wandb_writer("tiny", workdir, start, exit)
            for step in (start + 1, start + 2):
                write(step, {"loss": 1.0 / step, "score/sea": 0.5})
    """
    (tmp_path / "config.json").write_text(json.dumps({"config": {"train": {"steps": 1234567}}}))
    identities = []
    for start in (0, 2, 0):
        environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        done = python(code, tmp_path, start, env=environment)
        assert done.returncode == 0, done.stderr
        identities.append(json.loads((tmp_path / "wandb.json").read_text())["id"])
        files = list(tmp_path.glob(f"wandb/offline-run-*-{identities[-1]}/*.wandb"))
        content = b"".join(file.read_bytes() for file in files)
        assert b"score/sea" in content and b"1234567" in content
    assert identities[0] == identities[1] != identities[2]  # the third starts at step 0 again


# --- bad files


@pytest.mark.parametrize("content", ["hello\n", "[1, 2]\n{}\n", '{"loss": 1}\n{"step": 1}\n', "\udcff\n"])
def test_metrics_that_training_did_not_write_are_left_alone(trainer, tmp_path, content):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: expected a line of metrics with its step, got .*move"):
        go(trainer, tmp_path, 2)
    assert file.read_bytes() == content.encode(errors="surrogateescape") and not (tmp_path / "checkpoints").exists()


def test_a_full_disk_leaves_whole_lines_and_the_last_checkpoint(tmp_path):
    code = """
        import resource, sys, json
        from contextlib import ExitStack
        from pathlib import Path
        import jax, jax.numpy as jnp
        sys.path.insert(0, "tests")
        from cde_jax.config import Train
        from cde_jax.training.loop import Metrics
        limit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))
        workdir = Path(sys.argv[1])
        value = jnp.float32(1)
        values = dict.fromkeys(("loss", "accuracy", "gradient_norm", "tokens", "computed_tokens", "flops"), value)
        batch = {"keep": jnp.ones((1, 4, 4), bool), "plan_batch": jnp.zeros(1, int)}
        limit(2000)
        try:
            with ExitStack() as exit:
                metrics = Metrics(workdir, 0, 100, Train(log_every=1), exit)
                for step in range(1, 101):
                    metrics.record(step, values | {"losses": value[None]}, batch)
        except OSError as error:
            print(error)
    """
    done = python(code, tmp_path)
    assert "metrics of step" in done.stdout and "File too large" in done.stdout, done.stderr
    assert "free some space, and the same command goes on" in done.stdout and not done.stderr
    steps = [line["step"] for line in lines(tmp_path)]
    assert steps == list(range(1, len(steps) + 1)) and 3 < len(steps) < 100


def python(code: str, *arguments, env=None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=env,
    )


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
    good = go(trainer, tmp_path / "good", 2)
    with pytest.raises(
        FloatingPointError, match=rf"step {at}: the loss of plan batch \[{99 + at}\] is not finite"
    ) as error:
        go(trainer, tmp_path, 6, wrap=poison(at))
    assert "last good checkpoint is left" in str(error.value)
    assert "a lower --config.train.learning_rate" in str(error.value)
    assert f'--config.train.skip_batches="({99 + at},)"' in str(error.value)
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
