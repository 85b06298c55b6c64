"""Chunk sizes by memory: the largest that fits is found, by what the compiler says of the real step."""

import logging
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from tiny_batches import chunk_shapes
from tiny_models import contextual_config

from cde_jax.batching.layout import choose_layout, count_lengths
from cde_jax.config import Train
from cde_jax.models.contextual import ContextualEncoder
from cde_jax.training import sharding
from cde_jax.training.accounting import choose_chunk, device_limit, program_bytes
from cde_jax.training.step import init_state, make_train_step

GIB = 2**30


REMATS = {"none": 90, "dots": 30, "full": 7}  # bytes of a text


def needs(remat: str, chunk: int) -> int:
    return REMATS[remat] * chunk + 3


@given(limit=st.integers(10, 20_000), texts=st.integers(1, 600), useful=st.integers(1, 600))
def test_the_least_recomputation_with_a_useful_chunk_is_taken_then_the_largest_chunk(limit, texts, useful):
    useful = min(useful, texts)
    remat, chunk = choose_chunk(needs, limit, list(REMATS), useful, texts)
    assert needs(remat, chunk) <= limit and chunk <= texts
    enough = [name for name in REMATS if needs(name, useful) <= limit]
    assert remat == (enough[0] if enough else "full") and (chunk >= useful) == bool(enough)
    assert chunk == texts or needs(remat, min(2 * chunk, texts) if enough else 2 * chunk + 1) > limit


def test_what_was_tried_is_said(caplog):
    with caplog.at_level(logging.INFO):
        assert choose_chunk(lambda _, chunk: chunk * GIB, 3 * GIB, ["none"], 1, 8) == ("none", 2)
    assert "remat none, chunks of 2 texts: 2.00 of 3.00 GiB" in caplog.text
    assert "remat none, chunks of 4 texts: 4.00 of 3.00 GiB" in caplog.text


def test_a_step_that_never_fits_is_an_error_that_says_what_to_do():
    tried = []
    with pytest.raises(ValueError, match=r"even one text at a time .* 5\.00 GiB, and there are 4\.00.*model\.remat"):
        choose_chunk(lambda *size: tried.append(size) or 5 * GIB, 4 * GIB, ["none", "full"], 9, 20)
    assert tried == [("none", 9), ("full", 9), ("full", 4), ("full", 2), ("full", 1)]
    with pytest.raises(ValueError, match="at least one text"):
        choose_chunk(lambda *_: 0, 1, ["none"], 1, 0)


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


def compiled_bytes(texts: int, *chunks: tuple[int, int, int], attention: str = "isolated", context: int = 8) -> int:
    """Of the compiled training step of a small model, from shapes alone; texts: queries, and as many documents."""
    encoder = {"layers": 1, "width": 32, "mlp_width": 64, "attention": "xla"}
    config = contextual_config(attention, encoder=encoder, context_size=context)
    optimizer = optax.sgd(1.0)
    graph, params = nnx.split(nnx.eval_shape(lambda: ContextualEncoder(config, rngs=nnx.Rngs(0))), nnx.Param)
    zeros = lambda: nnx.merge(graph, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params))  # noqa: E731
    state = jax.eval_shape(lambda: init_state(zeros(), optimizer)[1])
    batch = {
        "texts": chunk_shapes(2 * texts, *chunks),
        "context": chunk_shapes(context, (-(-context // 8), 8, chunks[-1][2])),
        "keep": jax.ShapeDtypeStruct((1, texts, texts), jnp.bool_),
    }
    train = Train(document_chunk=1)  # chunks of a given size, whatever it is, are computed again in the backward pass
    step = make_train_step(graph, optimizer, lambda step: 1.0, train, sharding.make_mesh((1, 1)))
    return program_bytes(step.lower(state, batch, jax.eval_shape(lambda: jax.random.key(0))).compile())


@cache
def step_bytes(chunk: int) -> int:
    return compiled_bytes(64, (128 // chunk, chunk, 128))


@pytest.mark.slow
def test_short_texts_in_joint_attention_need_no_more_memory_than_long_ones():
    """Each drags all slots along, so a chunk holds fewer of them than its tokens alone would allow."""
    slots, longest, counted = 66, 64, count_lengths([np.repeat([8, 64], 64)])

    def needed(counted_slots: int) -> int:
        layout = choose_layout(counted, 2, 4 * (longest + counted_slots), counted_slots)
        return compiled_bytes(64, *zip(*layout[::-1], strict=True), attention="joint", context=64)

    long_texts = compiled_bytes(64, (32, 4, longest), attention="joint", context=64)
    assert needed(slots) < 1.1 * long_texts
    assert needed(0) > 1.5 * long_texts  # tokens only


@pytest.mark.slow
def test_the_chunk_of_a_real_step_is_the_largest_that_fits():
    whole, half = step_bytes(64), step_bytes(32)
    assert half < 0.7 * whole
    for limit, chunk in ((half, 32), (whole, 64)):
        assert choose_chunk(lambda _, chunk: step_bytes(chunk), limit, ["none"], 32, 64) == ("none", chunk)
