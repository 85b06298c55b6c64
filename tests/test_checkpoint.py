"""Checkpoints with and without Orbax: what is kept, who reads it, and what damage or a full disk leads to."""

import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_models import contextual

from cde_jax.training import sharding
from cde_jax.training.checkpoint import Checkpoints
from cde_jax.training.step import init_state

IDENTITY = {"plan": "p" * 8, "config": "c" * 8}


@pytest.fixture(params=["orbax", "files"])
def writer(request, monkeypatch):
    """What writes checkpoints: Orbax or, where it is not installed, safetensors."""
    if request.param == "files":
        for name in ("orbax", "orbax.checkpoint"):
            monkeypatch.setitem(sys.modules, name, None)
    return request.param


@pytest.fixture(scope="module")
def state():
    return init_state(contextual("isolated", encoder={"layers": 1}), optax.adamw(1e-3))[1]


def at(state, step: int):
    return state._replace(step=jnp.asarray(step), params=jax.tree.map(lambda x: x + step, state.params))


def saved(folder, state, scores: dict[int, float | None]) -> Checkpoints:
    checkpoints = Checkpoints(folder, IDENTITY)
    for step, score in scores.items():
        checkpoints.save(step, at(state, step), score)
    checkpoints.wait()
    return Checkpoints(folder, IDENTITY)


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_the_newest_two_and_the_best_are_kept(writer, state, tmp_path):
    checkpoints = saved(tmp_path, state, {2: 0.3, 4: 0.9, 6: 0.1, 8: 0.9, 10: None, 12: 0.0, 14: -1.0})
    assert checkpoints.steps() == [8, 12, 14] == sorted(map(int, os.listdir(tmp_path)))
    assert (checkpoints.best(), checkpoints.newest()) == (8, 14)  # of equal scores the newer
    for step in checkpoints.steps():
        assert same(checkpoints.restore(step, state), at(state, step))


def test_without_scores_the_newest_is_the_best(writer, state, tmp_path):
    empty = Checkpoints(tmp_path / "none", IDENTITY)
    assert (empty.best(), empty.newest()) == (None, None) and not (tmp_path / "none").exists()
    assert saved(tmp_path, state, {1: None, 2: None}).best() == 2


def test_the_best_is_found_without_orbax(state, tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, state, {2: 0.5, 4: 0.1})
    for name in ("orbax", "orbax.checkpoint"):
        monkeypatch.setitem(sys.modules, name, None)
    assert checkpoints.best() == 2
    with pytest.raises(ValueError, match="written by Orbax: install orbax-checkpoint to read it"):
        checkpoints.restore(2, state)


def test_a_run_may_move_between_machines_with_and_without_orbax(state, tmp_path, monkeypatch):
    with monkeypatch.context() as bare:
        for name in ("orbax", "orbax.checkpoint"):
            bare.setitem(sys.modules, name, None)
        saved(tmp_path, state, {2: 0.5, 4: 0.1})
    checkpoints = saved(tmp_path, state, {6: 0.2})
    assert checkpoints.steps() == [2, 4, 6] and checkpoints.best() == 2
    for step in (2, 4, 6):
        assert same(checkpoints.restore(step, state), at(state, step))


def test_a_state_and_its_weights_alone_are_read_on_other_devices(writer, state, tmp_path):
    eight = sharding.replicate(sharding.make_mesh(), at(state, 3))
    writing = Checkpoints(tmp_path, IDENTITY)
    writing.save(3, eight)
    writing.wait()
    checkpoints = saved(tmp_path, state, {4: None})
    abstract = nnx.split(nnx.eval_shape(lambda: contextual("isolated", encoder={"layers": 1})), nnx.Param)[1]
    for step in (3, 4):  # written from eight devices and from one
        weights = checkpoints.restore_weights(step, abstract)
        assert same(weights, at(state, step).params)
        assert {len(leaf.devices()) for leaf in jax.tree.leaves(weights)} == {1}
        on_eight = checkpoints.restore_weights(step, eight.params)
        assert same(on_eight, weights) and {len(x.devices()) for x in jax.tree.leaves(on_eight)} == {8}
        split = sharding.shard_state(sharding.make_mesh((2, 4)), state)
        whole = checkpoints.restore(step, split)
        assert same(whole, at(state, step))
        for leaf, wanted in zip(jax.tree.leaves(whole.params), jax.tree.leaves(split.params), strict=True):
            assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_weights_are_read_without_the_optimiser(writer, state, tmp_path):
    checkpoints = saved(tmp_path, state, {1: None})
    for path in sorted((tmp_path / "1").rglob("*")):
        if path.relative_to(tmp_path / "1").parts[0].startswith("rest") and path.is_file():
            path.unlink()
    assert same(checkpoints.restore_weights(1, state.params), at(state, 1).params)
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoints.restore(1, state)


def test_what_a_kill_left_half_written_is_removed_by_the_next_save(writer, state, tmp_path):
    for name in ("7.tmp", "8.orbax-checkpoint-tmp"):
        (tmp_path / name / "params").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    assert checkpoints.newest() is None and len(os.listdir(tmp_path)) == 2
    assert saved(tmp_path, state, {7: None}).newest() == 7 and os.listdir(tmp_path) == ["7"]


def test_a_checkpoint_of_another_run_is_refused_with_both_fingerprints(writer, state, tmp_path):
    saved(tmp_path, state, {4: None})
    for name in IDENTITY:
        other = Checkpoints(tmp_path, IDENTITY | {name: "other"})
        for read in (
            lambda other=other: other.restore(4, state),
            lambda other=other: other.restore_weights(4, state.params),
        ):
            with pytest.raises(
                ValueError, match=rf"belongs to another {name}: expected fingerprint other, got {IDENTITY[name]}"
            ):
                read()


def python(code: str, writer: str, *arguments) -> subprocess.CompletedProcess:
    """In a process of its own: a read that fails leaves TensorStore threads that complain at any later moment."""
    without_orbax = "import sys; sys.modules['orbax'] = sys.modules['orbax.checkpoint'] = None\n"
    code = (without_orbax if writer == "files" else "") + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_damaged_checkpoint_is_never_taken_for_a_good_one(writer, tmp_path):
    code = """
        import json, shutil, sys
        from pathlib import Path
        import jax, jax.numpy as jnp, numpy as np
        from cde_jax.training.checkpoint import Checkpoints
        from cde_jax.training.step import TrainState

        def make(step):
            params = {"w": jnp.asarray(np.random.default_rng(step).normal(size=(40, 50)), jnp.float32)}
            return TrainState(jnp.array(step), params, {"mu": params["w"] / 2})

        def same(a, b):
            return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))

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
                restored = checkpoints.restore(4, make(4))
            except ValueError as error:
                assert same(checkpoints.restore(2, make(4)), make(2))  # as the error promises
                return str(error)
            return "equal" if same(restored, make(4)) else "different"

        root = Path(sys.argv[1])
        checkpoints = Checkpoints(root / "good", {"plan": "p"})
        checkpoints.save(2, make(2))
        checkpoints.save(4, make(4))
        checkpoints.wait()
        files = sorted(path.relative_to(root / "good") for path in (root / "good" / "4").rglob("*") if path.is_file())
        for how in ("truncated", "altered", "missing"):
            for file in files:
                size = (root / "good" / file).stat().st_size
                shutil.rmtree(root / "bad", ignore_errors=True)
                shutil.copytree(root / "good", root / "bad")
                damage(root / "bad" / file, how)
                print(json.dumps([how, str(file), size, outcome(root / "bad")]), flush=True)
    """
    done = python(code, writer, tmp_path)
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert {how for how, *_ in outcomes} == {"truncated", "altered", "missing"}, done.stderr[-2000:]
    bad = tmp_path / "bad" / "4"
    for how, file, size, outcome in outcomes:
        if outcome not in ("equal", "newest is 2"):  # a file that does not matter, or no checkpoint any more
            assert outcome.startswith(f"checkpoint {bad} "), (how, file, outcome)
            assert f"Nothing was changed. Remove {bad} to go on from the checkpoint before it" in outcome
        arrays = ("/d/" in file and size > 5000) or file.endswith(".safetensors")
        if arrays or file.endswith("metadata/metadata"):  # the arrays and their digests
            assert outcome.startswith("checkpoint "), (how, file, outcome)


def test_a_full_disk_says_so_and_leaves_the_checkpoint_before(writer, tmp_path):
    code = """
        import resource, sys
        import jax.numpy as jnp, numpy as np
        from cde_jax.training.checkpoint import Checkpoints
        from cde_jax.training.step import TrainState
        params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(50, 1000)), jnp.float32)}
        state = TrainState(jnp.array(1), params, {})
        checkpoints = Checkpoints(sys.argv[1], {"plan": "p"})
        checkpoints.save(1, state)
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            checkpoints.save(2, state)
            checkpoints.wait()
        except OSError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        again = Checkpoints(sys.argv[1], {"plan": "p"})
        print(again.newest(), np.array_equal(again.restore(1, state).params["w"], params["w"]))
    """
    done = python(code, writer, tmp_path / "checkpoints")
    said, after = done.stdout.splitlines()
    assert f"could not be written to {tmp_path / 'checkpoints'}" in said
    assert "File too large" in said and "free some space" in said and "already there are untouched" in said
    assert after == "1 True", done.stderr
