"""Model FLOPs against those that XLA counts in the program, and what is made of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cde_jax.config import Train
from cde_jax.models.contextual import Biencoder, BiencoderConfig, ContextualConfig, ContextualEncoder
from cde_jax.models.encoder import EncoderConfig
from cde_jax.training import step
from cde_jax.training.accounting import context_flops, encoding_flops, step_flops, utilisation
from cde_jax.training.losses import info_nce

B, N, J, LENGTH = 4, 8, 6, 32
KINDS = ("biencoder", "isolated", "joint")
CLOSE = 0.02  # XLA counts elementwise work too


def config(kind: str, *, layers: int = 2, width: int = 512, heads: int = 8, mlp_width: int = 1024, **changes):
    # The plain kernel: XLA counts the body of a loop once.
    encoder = EncoderConfig(60, width, layers, heads, mlp_width, attention="xla", **changes)
    if kind == "biencoder":
        return BiencoderConfig(encoder)
    return ContextualConfig(BiencoderConfig(encoder, head=True), encoder, J, context_attention=kind)


def abstract(config):
    make = Biencoder if isinstance(config, BiencoderConfig) else ContextualEncoder
    return nnx.split(nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0))), nnx.Param)


def tokens(count: int, length: int = LENGTH):
    return jax.ShapeDtypeStruct((count, length), jnp.int32), jax.ShapeDtypeStruct((count, length), jnp.bool_)


def sizes(*shape: int) -> np.ndarray:
    return np.full(shape, LENGTH)


def counted(function, *arguments) -> float:
    """The FLOPs of a program by XLA, before it is optimised."""
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


@pytest.fixture
def unrolled(monkeypatch):
    monkeypatch.setattr(jax.lax, "scan", partial(jax.lax.scan, unroll=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_needs_the_flops_that_xla_counts(kind, unrolled, monkeypatch):
    shape = config(kind)
    graph, params = abstract(shape)
    monkeypatch.setattr(step, "encode_chunks", lambda encode, ids, mask, _: (encode(ids[0][0], mask[0][0])[None],))
    texts = {"texts": tokens(B + N), "context": tokens(J)}
    as_chunk = lambda x: (jax.ShapeDtypeStruct((1, 1, *x.shape), x.dtype),)  # noqa: E731
    batch = {name: {"ids": as_chunk(ids), "mask": as_chunk(mask)} for name, (ids, mask) in texts.items()}
    batch["keep"] = jax.ShapeDtypeStruct((1, B, N), jnp.bool_)

    def loss(params, batch):
        places = {name: {"place": jnp.arange(count)[None]} for name, count in (("texts", B + N), ("context", J))}
        batch = {name: part | places.get(name, {}) if name in places else part for name, part in batch.items()}
        keys = jax.random.key(0)[None]
        queries, documents = step.embed_plan_batches(nnx.merge(graph, params), batch, keys, Train())
        return info_nce(queries[0], documents[0], None, 0.1)[0]

    expected = counted(jax.value_and_grad(loss), params, batch)
    flops = step_flops(shape, sizes(1, B + N), sizes(1, J), scores=B * N)
    assert flops == pytest.approx(expected, rel=CLOSE)
    assert flops <= expected


@pytest.mark.parametrize("changes", [{"activation": "gelu"}, {"heads": 4, "mlp_width": 2048}])
@pytest.mark.parametrize("kind", KINDS)
def test_encoding_needs_the_flops_that_xla_counts(kind, changes, unrolled):
    shape = config(kind, **changes)
    graph, params = abstract(shape)
    merge = partial(nnx.merge, graph)
    if kind == "biencoder":
        expected = counted(lambda params, *texts: merge(params).embed(*texts), params, *tokens(B))
        assert encoding_flops(shape, sizes(B)) == pytest.approx(expected, rel=CLOSE)
        return
    read = lambda params, *texts: merge(params).prepare_context(merge(params).embed_context(*texts))  # noqa: E731
    assert context_flops(shape, sizes(J)) == pytest.approx(counted(read, params, *tokens(J)), rel=CLOSE)
    cache = jax.eval_shape(read, params, *tokens(J))
    embed = lambda params, cache, *texts: merge(params).embed(*texts, cache)  # noqa: E731
    assert encoding_flops(shape, sizes(B)) == pytest.approx(counted(embed, params, cache, *tokens(B)), rel=CLOSE)


def test_padding_is_not_counted():
    shape = config("isolated")
    short, none = np.array([[5, 9, 3]]), np.array([[0, 5, 0, 9, 3]])
    context = np.array([[4, 0, 2, 0, 0, 7]])
    assert step_flops(shape, short, context, scores=2) == step_flops(shape, none, context, scores=2)
    assert encoding_flops(shape, np.array([5, 9])) == sum(encoding_flops(shape, np.array([n])) for n in (5, 9))
    assert encoding_flops(shape, np.array([9])) < encoding_flops(shape, np.array([10]))


def test_plan_batches_of_a_step_add_up():
    shape = config("joint")
    random = np.random.default_rng(0)
    texts, context = random.integers(1, 20, (3, 7)), random.integers(1, 20, (3, J))
    alone = [step_flops(shape, texts[g : g + 1], context[g : g + 1], scores=10) for g in range(3)]
    assert step_flops(shape, texts, context, scores=30) == pytest.approx(sum(alone))


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_step_counts_the_same(kind):
    shape, random = config(kind), np.random.default_rng(1)
    texts, context = random.integers(0, 512, (2, 300)), random.integers(0, 512, (2, J))
    counting = jax.jit(partial(step_flops, shape, scores=77))
    np.testing.assert_allclose(counting(texts, context), step_flops(shape, texts, context, scores=77), rtol=1e-5)


def test_a_short_query_against_a_large_context_is_thirty_times_cheaper_with_isolated_slots():
    """The base model, as DESIGN counts it: about 4 GFLOP, where the slots go along 132."""
    encoder = EncoderConfig(30528, 768, 12, 12, 3072)
    first = BiencoderConfig(encoder, head=True)
    isolated, joint = (
        encoding_flops(ContextualConfig(first, encoder, 512, context_attention=kind), np.array([16]))
        for kind in ("isolated", "joint")
    )
    assert isolated == pytest.approx(3.9e9, rel=0.05)
    assert joint / isolated == pytest.approx(33, rel=0.05)


def test_utilisation_is_of_the_known_peak_or_the_given_one_or_unknown():
    assert utilisation(98.9e12, 1.0, "NVIDIA H100 80GB HBM3") == pytest.approx(0.1)
    assert utilisation(98.9e12, 1.0, "NVIDIA H200", devices=2) == pytest.approx(0.05)
    assert utilisation(75.6e12, 1.0, "NVIDIA H100 PCIe") == pytest.approx(0.1)
    assert utilisation(19.7e12, 1.0, "TPU v5 lite") == pytest.approx(0.1)
    assert utilisation(45.9e12, 1.0, "TPU v5p") == pytest.approx(0.1)
    assert utilisation(79e12, 0.5, "NVIDIA H200", peak=790) == pytest.approx(0.2)
    assert utilisation(79e12, 0.5, "cpu") is None
