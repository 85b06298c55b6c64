"""Chunk sizes by memory: the largest that fits is found, by what the compiler says of the real step."""

import functools
import logging

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from tiny_batches import chunk_shapes
from tiny_models import contextual_config

from cde_jax.config import Train
from cde_jax.models.contextual import ContextualEncoder
from cde_jax.training import sharding
from cde_jax.training.accounting import device_limit, largest_chunk, program_bytes
from cde_jax.training.step import init_state, make_train_step

GIB = 2**30


@given(limit=st.integers(10, 5000), texts=st.integers(1, 600))
def test_the_chunk_is_the_first_half_that_fits(limit, texts):
    needs = lambda chunk: 7 * chunk + 3  # noqa: E731
    chunk = largest_chunk(needs, limit, texts)
    assert needs(chunk) <= limit
    halves = [texts >> i for i in range(texts.bit_length())]
    assert chunk == next(half for half in halves if needs(half) <= limit)


def test_what_was_chosen_is_said(caplog):
    with caplog.at_level(logging.INFO):
        assert largest_chunk(lambda chunk: chunk * GIB, 3 * GIB, 8) == 2
    assert "chunks of 2 texts: the step needs 2.00 of 3.00 GiB; chunks of 4 would need 4.00" in caplog.text


def test_a_step_that_never_fits_is_an_error_that_says_what_to_do():
    tried = []
    with pytest.raises(ValueError, match=r"even one text at a time .* 5\.00 GiB, and there are 4\.00.*model\.remat"):
        largest_chunk(lambda chunk: tried.append(chunk) or 5 * GIB, 4 * GIB, 9)
    assert tried == [9, 4, 2, 1]
    with pytest.raises(ValueError, match="at least one text"):
        largest_chunk(lambda chunk: 0, 1, 0)


def test_a_device_that_does_not_say_its_memory_needs_a_number():
    device = jax.devices()[0]
    with pytest.raises(ValueError, match=r"cpu does not say .* train\.memory_gib"):
        device_limit(device)
    assert device_limit(device, 1.5) == 1.5 * GIB


def test_a_device_leaves_a_tenth_of_its_memory_free():
    class Gpu:  # the one thing that a CPU cannot show
        device_kind = "GPU"

        def memory_stats(self):
            return {"bytes_limit": 10 * GIB}

    assert device_limit.__wrapped__(Gpu()) == 9 * GIB


def test_a_programs_bytes_are_its_arguments_results_and_temporaries():
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    size = 256 * 256 * 4
    assert program_bytes(jax.jit(lambda x, y: x @ y).lower(x, x).compile()) == 3 * size
    in_place = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
    assert program_bytes(in_place) == size
    assert program_bytes(jax.jit(lambda x: jnp.sin(x) @ x.T @ x).lower(x).compile()) >= 3 * size


@functools.cache
def step_bytes(chunk: int) -> int:
    """Of the compiled training step of a small model with a long batch, from shapes alone."""
    texts, length = 64, 128
    config = contextual_config("isolated", encoder={"layers": 1, "width": 32, "mlp_width": 64})
    optimizer = optax.sgd(1.0)
    graph, params = nnx.split(nnx.eval_shape(lambda: ContextualEncoder(config, rngs=nnx.Rngs(0))), nnx.Param)
    zeros = lambda: nnx.merge(graph, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params))  # noqa: E731
    state = jax.eval_shape(lambda: init_state(zeros(), optimizer)[1])
    batch = {
        "texts": chunk_shapes(2 * texts, (2 * texts // chunk, chunk, length)),
        "context": chunk_shapes(8, (1, 8, length)),
        "keep": jax.ShapeDtypeStruct((1, texts, texts), jnp.bool_),
    }
    step = make_train_step(graph, optimizer, lambda step: 1.0, Train(), sharding.make_mesh((1, 1)))
    return program_bytes(step.lower(state, batch, jax.eval_shape(lambda: jax.random.key(0))).compile())


def test_the_chunk_of_a_real_step_is_the_largest_that_fits():
    whole, half = step_bytes(64), step_bytes(32)
    assert half < 0.7 * whole
    assert largest_chunk(step_bytes, half, 64) == 32
    assert largest_chunk(step_bytes, whole, 64) == 64
