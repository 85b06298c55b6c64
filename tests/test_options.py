"""The options of training: each reaches the numbers it is meant for, and off means the numbers without it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_config import changed, refused
from test_loop import batches, copy, go, same
from test_train import BATCH, STEPS, config_with, flat, trained_step
from tiny_batches import in_layout, plain_batch
from tiny_models import biencoder, contextual

from cde_jax.config import TEMPERATURES, Train
from cde_jax.stages import assemble
from cde_jax.training import sharding
from cde_jax.training.checkpoint import Checkpoints
from cde_jax.training.losses import info_nce, matryoshka_info_nce
from cde_jax.training.step import embed_plan_batches, init_state, make_optimizer, make_train_step, stream

OPTIMIZERS = ("adamw", "nadamw", "lamb", "lion", "adafactor", "muon")


def optimizer(**changes):
    return make_optimizer(Train(**({"warmup_steps": 0, "learning_rate": 0.1} | changes)), STEPS)[0]


PARAMS = nnx.State(
    {"blocks": {"kernel": nnx.Param(jnp.linspace(-1, 2, 24).reshape(2, 3, 4)), "bias": nnx.Param(jnp.ones(4))}}
)


def updates(gradients, **changes):
    made = optimizer(**changes)
    return flat(jax.jit(made.update)(gradients, made.init(PARAMS), PARAMS)[0])


# --- schedule and optimisers


def test_the_rate_may_fall_as_a_cosine():
    _, schedule = make_optimizer(Train(learning_rate=0.8, warmup_steps=4, schedule="cosine"), 12)
    rates = [float(schedule(step)) for step in range(13)]
    fall = [0.4 * (1 + math.cos(math.pi * step / 8)) for step in range(9)]
    np.testing.assert_allclose(rates, [0.2, 0.4, 0.6, 0.8, *fall], atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_descends_and_decays_matrices_only(name):
    decayed = updates(jax.tree.map(jnp.zeros_like, PARAMS), optimizer=name, weight_decay=0.5)
    kernel = flat(PARAMS)["blocks", "kernel"]
    assert not decayed["blocks", "bias"].any()
    if name != "lamb":  # whose decay is a part of what its trust ratio scales
        np.testing.assert_allclose(decayed["blocks", "kernel"], -0.1 * 0.5 * kernel, atol=1e-6)
    assert (decayed["blocks", "kernel"] * kernel <= 0).all() and decayed["blocks", "kernel"].any()

    made = optimizer(optimizer=name, weight_decay=0.0, learning_rate=0.05)
    loss = lambda params: sum((x**2).sum() for x in jax.tree.leaves(params))  # noqa: E731

    @jax.jit
    def step(params, state):
        changes, state = made.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, changes), state

    params, state = PARAMS, made.init(PARAMS)
    for _ in range(STEPS):
        params, state = step(params, state)
    assert loss(params) < 0.9 * loss(PARAMS)


def test_muon_orthogonalises_each_layer_s_matrix_by_itself():
    gradients = jax.tree.map(lambda x: jnp.sin(7 * x) + 0.2, PARAMS)
    plain = updates(gradients, optimizer="muon", weight_decay=0.0)["blocks", "kernel"]
    size = np.linalg.svd(plain, compute_uv=False)  # [2, 3]
    assert (size.max(axis=1) < 2 * size.min(axis=1)).all()
    alone = jax.tree.map(lambda x: x.at[1].set(0.0) if x.ndim == 3 else x, gradients)
    np.testing.assert_allclose(
        updates(alone, optimizer="muon", weight_decay=0.0)["blocks", "kernel"][0], plain[0], rtol=0.1
    )


def test_betas_and_epsilon_reach_the_optimiser():
    gradients = jax.tree.map(lambda x: jnp.full_like(x, 0.01), PARAMS)
    default = updates(gradients, weight_decay=0.0)
    explicit = updates(gradients, weight_decay=0.0, betas=(0.9, 0.999), epsilon=1e-8)
    for path, value in default.items():
        np.testing.assert_array_equal(explicit[path], value)
    damped = updates(gradients, weight_decay=0.0, epsilon=0.01)
    np.testing.assert_allclose(damped["blocks", "bias"], default["blocks", "bias"] / 2, rtol=1e-4)
    made = optimizer(betas=(0.8, 0.5))
    state = made.update(gradients, made.init(PARAMS), PARAMS)[1]
    np.testing.assert_allclose(optax.tree.get(state, "mu")["blocks"]["bias"][...], 0.2 * 0.01, rtol=1e-5)
    np.testing.assert_allclose(optax.tree.get(state, "nu")["blocks"]["bias"][...], 0.5 * 0.01**2, rtol=1e-4)
    first = optimizer(optimizer="lion", betas=(0.5, 0.25))
    state = first.update(gradients, first.init(PARAMS), PARAMS)[1]
    np.testing.assert_allclose(optax.tree.get(state, "mu")["blocks"]["bias"][...], 0.75 * 0.01, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "adam"}, "`train.optimizer` must be one of 'adamw', 'nadamw', 'lamb', 'lion'"),
        ({"betas": (0.9,)}, "`train.betas` must be (β₁, β₂) below 1"),
        ({"betas": (0.9, 1.0)}, "`train.betas` must be (β₁, β₂) below 1"),
        ({"betas": (0.9, 0.99), "optimizer": "adafactor"}, "or () for adafactor, got (0.9, 0.99) for adafactor"),
        ({"betas": 0.9}, "`train.betas` must be a tuple of numbers, e.g. (0.9, 0.99), got 0.9"),
        ({"epsilon": 1e-8, "optimizer": "lion"}, "`train.epsilon` must be None for lion"),
        ({"learn_temperature": True, "temperature": 5.0}, "a learned temperature stays within (0.001, 1.0)"),
        ({"matryoshka": (64, 32)}, "`train.matryoshka` must be different sizes in ascending order"),
        ({"matryoshka": (0, 32)}, "`train.matryoshka` must be ≥ 1"),
        ({"matryoshka": ("32",)}, "`train.matryoshka` must be a tuple of whole numbers"),
        ({"matryoshka": (32, 768)}, "`train.matryoshka` (32, 768) must be smaller than `model.width` 768"),
    ],
)
def test_options_that_cannot_be_used_are_named(changes, words):
    assert words in refused(changed(**{f"train__{name}": value for name, value in changes.items()}))


# --- temperature


def test_a_learned_temperature_is_a_parameter_without_weight_decay(tmp_path):
    _, plain, _, fixed = trained_step(temperature=0.5)
    config = config_with(learn_temperature=True, weight_decay=1.0)
    training = assemble.make_training(config, assemble.build_model(config, 50), STEPS)
    batch = sharding.shard_batch(training.mesh, {name: part for name, part in BATCH.items() if name != "context"})
    state, metrics = training.step(training.state, batch, sharding.replicate(training.mesh, stream(0, "dropout")))
    assert metrics["loss"] == fixed["loss"] and metrics["temperature"] == pytest.approx(0.5)
    # Adam's first update is the learning rate, whatever the gradient; nothing but the gradient moves it.
    assert abs(float(state.log_temperature) - math.log(0.5)) == pytest.approx(0.1, rel=1e-3)
    assert flat(state.params).keys() == plain.keys()  # not a weight of the encoder
    checkpoints = Checkpoints(tmp_path, {"plan": "p"})
    checkpoints.save(1, state)
    checkpoints.wait()
    assert same(checkpoints.restore(1, state), state)
    assert flat(checkpoints.restore_weights(1, state.params)).keys() == plain.keys()


@pytest.mark.parametrize(("start", "bound"), [(TEMPERATURES[0], 0), (TEMPERATURES[1], 1)])
def test_a_learned_temperature_stays_within_its_range(start, bound):
    train = Train(learn_temperature=True, temperature=start, learning_rate=1.0, warmup_steps=0)
    made, schedule = make_optimizer(train, STEPS)
    graph, state = init_state(biencoder(layers=1), made, train)
    step = make_train_step(graph, made, schedule, train, sharding.make_mesh((1, 1)))
    batch = next(iter(three_batches()))
    for _ in range(3):
        state, metrics = step(state, batch, stream(0, "dropout"))
        low, high = TEMPERATURES
        assert low * 0.999 <= math.exp(state.log_temperature) <= high * 1.001 and np.isfinite(metrics["loss"])


def three_batches():
    return ({name: part for name, part in batch.items() if name != "plan_batch"} for batch in batches(0, 3))


# --- Matryoshka


def vectors(rows, seed):
    return np.random.default_rng(seed).normal(size=(rows, 8)).astype(np.float32)


def test_the_matryoshka_loss_is_the_mean_over_its_dimensions():
    q, d, keep = vectors(4, 0), vectors(6, 1), np.random.default_rng(2).random((4, 6)) < 0.7
    whole, metrics = info_nce(q, d, keep, 0.1)
    expected = np.mean([info_nce(q[:, :n], d[:, :n], keep, 0.1)[0] for n in (2, 5, 8)])
    loss, same_metrics = matryoshka_info_nce(q, d, keep, 0.1, (2, 5))
    assert loss == pytest.approx(expected, rel=1e-6) and same_metrics == metrics
    assert matryoshka_info_nce(q, d, keep, 0.1)[0] == whole


def test_matryoshka_dimensions_reach_the_loss_and_the_flops():
    *_, plain = trained_step()
    *_, nested = trained_step(matryoshka=(2, 4))
    assert nested["positive"] == plain["positive"] and nested["loss"] != plain["loss"]
    scores = BATCH["keep"].size
    assert float(nested["flops"] - plain["flops"]) == pytest.approx(3 * 2 * scores * (2 + 4), rel=1e-2)


# --- context dropout


def test_context_dropout_makes_the_whole_context_of_a_plan_batch_null():
    batch = jax.tree.map(lambda x: jnp.asarray(x[:1]), in_layout(plain_batch(0), lengths=1))

    @nnx.jit(static_argnums=(2, 3))
    def queries(model, key, context_dropout, sequence_dropout=0.3):
        train = Train(context_dropout=context_dropout, sequence_dropout=sequence_dropout)
        return embed_plan_batches(model, batch, key[None], train)[0]

    model, found = contextual("isolated", encoder={"layers": 1}), set()
    for number in range(8):
        key = jax.random.key(number)
        read, null, half = (queries(model, key, *p) for p in ((0.0,), (0.0, 1.0), (0.5,)))
        dropped = bool(jnp.array_equal(half, null))
        assert dropped or jnp.array_equal(half, read)
        found.add(dropped)
    assert found == {True, False} and not jnp.array_equal(read, null)


# --- the average of the weights


@pytest.fixture(scope="module")
def averaged():
    """A step whose state carries averaged weights and a temperature, and its first state."""
    train = Train(ema_decay=0.5, learn_temperature=True, learning_rate=1e-2, warmup_steps=0)
    made, schedule = make_optimizer(train, 20)
    graph, state = init_state(biencoder(layers=1), made, train)
    return make_train_step(graph, made, schedule, train, sharding.make_mesh((1, 1))), state


def test_the_average_follows_the_parameters(averaged):
    step, state = averaged
    state = copy(state)
    expected = flat(jax.device_get(state.params))
    for number, batch in enumerate(three_batches()):
        state, _ = step(state, batch, stream(0, "dropout"))
        decay = min(0.5, (1 + number) / (10 + number))
        expected = {path: decay * expected[path] + (1 - decay) * value for path, value in flat(state.params).items()}
    for path, value in flat(state.weights).items():
        np.testing.assert_allclose(value, expected[path], atol=1e-6)
    assert not same(state.weights, state.params)


def test_a_run_with_an_average_resumes_byte_equal_and_restores_it_as_the_weights(averaged, tmp_path):
    whole = go(averaged, tmp_path / "whole", 4)
    go(averaged, tmp_path / "cut", 2)
    assert same(go(averaged, tmp_path / "cut", 4), whole)
    checkpoints = Checkpoints(tmp_path / "cut/checkpoints", {"plan": "p" * 8, "config": "c" * 8})
    assert same(checkpoints.restore_weights(4, whole.params), whole.average)


def test_without_an_average_the_parameters_are_the_weights(averaged):
    plain = dataclasses.replace(Train(), ema_decay=0.0)
    _, state = init_state(biencoder(layers=1), optax.sgd(0.1), plain)
    assert state.average is None and state.weights is state.params


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_options_give_the_same_numbers_on_a_mesh(name):
    train = Train(ema_decay=0.5, learn_temperature=True, optimizer=name, learning_rate=1e-2, warmup_steps=0)
    ends = []
    for shape in ((1, 1), (1, 2)):
        mesh = sharding.make_mesh(shape)
        made, schedule = make_optimizer(train, 20)
        graph, state = init_state(biencoder(layers=1), made, train)
        state, key = sharding.shard_state(mesh, state), sharding.replicate(mesh, stream(0, "dropout"))
        step = make_train_step(graph, made, schedule, train, mesh)
        for _ in range(2):
            batch = {part: BATCH[part] for part in ("texts", "keep")}
            state, _ = step(state, sharding.shard_batch(mesh, batch), key)
        ends.append(jax.device_get((state.average, state.log_temperature)))
    for alone, shared in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(shared, alone, atol=1e-5)
