"""The encoder and both attention patterns against a plain float64 reading of them, and what must not matter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import (
    J,
    biencoder,
    contextual,
    contextual_config,
    encoder_config,
    fill,
    tokens,
)

from cde_jax.models.contextual import Biencoder, BiencoderConfig, ContextualConfig, ContextualEncoder, mean_pool
from cde_jax.models.encoder import Encoder, EncoderConfig, as_tokens, linear, norm, select_remat

PATTERNS = ("joint", "isolated")
EXACT = 1e-5  # float32, vectors of size about 1

embed = nnx.jit(lambda model, ids, mask, context=None: model.embed(ids, mask, context))
embed_context = nnx.jit(lambda model, ids, mask: model.embed_context(ids, mask))
prepare_context = nnx.jit(lambda model, context: model.prepare_context(context))


@pytest.fixture(scope="module", params=PATTERNS)
def model(request):
    return contextual(request.param)


@pytest.fixture(scope="module")
def texts():
    return tokens(7, 6)


@pytest.fixture(scope="module")
def context():
    return jnp.asarray(np.random.default_rng(1).normal(0, 1, (J, 16)), jnp.float32)


def difference(a, b) -> float:
    assert a.shape == b.shape
    return float(jnp.abs(a - b).max())


# --- a plain reading of the two patterns: one sequence [slots | text] and a mask of who sees whom, in float64


def layer_norm(x, scale, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12) * scale + bias


def turn(x, positions):
    """Rotary embedding of [S, H, d], one token and one pair of features at a time; position −1 stays as it is."""
    x, half = x.copy(), x.shape[-1] // 2
    for row, position in zip(x, positions, strict=True):
        for i in range(half if position >= 0 else 0):
            angle = position / 1000.0 ** (2 * i / x.shape[-1])
            a, b = row[:, i].copy(), row[:, i + half].copy()
            row[:, i] = a * np.cos(angle) - b * np.sin(angle)
            row[:, i + half] = b * np.cos(angle) + a * np.sin(angle)
    return x


def plain_layers(p, x, sees, positions, bias, slots, heads=2):
    """All layers over one sequence x [S, D]; `sees` [S, S]; returns the states and each layer's keys."""
    x, keys = layer_norm(x, p["norm"]["scale"], p["norm"]["bias"]), []
    for layer in range(len(p["blocks"]["qkv"]["kernel"])):
        block = jax.tree.map(lambda a, layer=layer: a[layer], p["blocks"])
        q, k, v = np.moveaxis((x @ block["qkv"]["kernel"]).reshape(len(x), 3, heads, -1), 1, 0)
        q, k = turn(q, positions), turn(k, positions)
        keys.append(k)
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])
        scores[:, slots:, :slots] += bias[layer][:, None, None]
        weights = np.where(sees, np.exp(scores), 0)
        output = np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), v).reshape(len(x), -1)
        x = layer_norm(x + output @ block["out"]["kernel"], block["norm1"]["scale"], block["norm1"]["bias"])
        value, gate = np.split(x @ block["mlp_in"]["kernel"], 2, axis=-1)
        hidden = value * gate / (1 + np.exp(-gate))
        x = layer_norm(x + hidden @ block["mlp_out"]["kernel"], block["norm2"]["scale"], block["norm2"]["bias"])
    return x, np.stack(keys)


def plain_embed(model, ids, mask, context):
    """Vector of one text, and the slots' keys of every layer."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    dense = lambda name, x: x @ p[name]["kernel"] + p[name]["bias"]  # noqa: E731
    prompt = dense("prompt_out", np.maximum(dense("prompt_in", np.ones(16)), 0)).reshape(-1, 16)
    slots = np.concatenate([np.asarray(context, np.float64), prompt])
    ids = np.asarray(ids)[np.asarray(mask)]  # no padding at all
    text = p["encoder"]["word"]["embedding"][ids] + p["encoder"]["token_type"]["embedding"][0]
    is_slot = np.arange(len(slots) + len(text)) < len(slots)
    sees = np.ones((len(is_slot), len(is_slot)), bool)
    if model.config.context_attention == "isolated":
        sees = ~is_slot[:, None] | is_slot[None]
    positions = np.concatenate([np.full(len(slots), -1), np.arange(len(text))])
    states, keys = plain_layers(
        p["encoder"], np.concatenate([slots, text]), sees, positions, p["slot_bias"], len(slots)
    )
    vector = states[len(slots) :].mean(0)
    return vector + dense("project_out", np.maximum(dense("project_in", vector), 0)), keys[:, : len(slots)]


def test_both_patterns_are_one_sequence_with_a_mask_of_who_sees_whom(model, texts, context):
    vectors = np.asarray(embed(model, *texts, context))
    plain = np.stack([plain_embed(model, ids, mask, context)[0] for ids, mask in zip(*texts, strict=True)])
    np.testing.assert_allclose(vectors, plain, atol=EXACT, rtol=0)


def test_isolated_slots_are_a_function_of_the_context_alone_and_joint_slots_are_not(texts, context):
    (ids, mask), model = texts, contextual("isolated")
    first, second = (plain_embed(model, ids[i], mask[i], context)[1] for i in (0, 1))
    np.testing.assert_array_equal(first, second)
    keys, _ = prepare_context(model, context).prefix.by_slot()
    np.testing.assert_allclose(keys, first, atol=EXACT, rtol=0)
    first, second = (plain_embed(contextual("joint"), ids[i], mask[i], context)[1] for i in (0, 1))
    assert np.abs(first[0] - second[0]).max() == 0  # the first layer reads nothing but the slot itself
    assert np.abs(first[1] - second[1]).max() > 1e-2
    assert prepare_context(contextual("joint"), context).prefix is None


# --- what must not matter


def test_the_order_of_context_documents_does_not_matter(model, texts):
    ids, mask = tokens(J, 6, seed=3)
    order = np.random.default_rng(0).permutation(J)
    one, other = embed_context(model, ids, mask), embed_context(model, ids[order], mask[order])
    assert difference(one[order], other) <= EXACT
    vectors = embed(model, *texts, one)
    assert difference(vectors, embed(model, *texts, other)) <= EXACT
    assert difference(vectors, embed(model, *texts, one.at[0].set(one[1]))) > 1e-3  # but its documents do


def test_a_context_of_its_own_for_each_text_reads_as_a_shared_one(model, texts, context):
    shared = embed(model, *texts, context)
    own = jnp.broadcast_to(context, (7, *context.shape))
    assert difference(shared, embed(model, *texts, own)) <= EXACT
    mixed = embed(model, *texts, own.at[1:].set(0.5))
    assert difference(shared[:1], mixed[:1]) <= EXACT
    assert difference(shared[1:], mixed[1:]) > 1e-3


def test_a_prepared_context_reads_as_the_raw_one(model, texts, context):
    cache = prepare_context(model, context)
    assert cache.slots.shape == (J + 2, 16)
    assert difference(embed(model, *texts, context), embed(model, *texts, cache)) <= EXACT


def test_numpy_ids_and_masks_of_ones_and_zeros_are_read_too(model, texts):
    ids, mask = (np.asarray(x, np.int64) for x in texts)
    slots = np.asarray(model.embed_context(ids, mask))
    expected = model.embed(*texts, model.embed_context(*texts))
    np.testing.assert_array_equal(model.embed(ids, mask, slots), expected)


def test_null_slots_stand_in_for_missing_documents(model, texts, context):
    filled = model.prepare_context(context, jnp.arange(J) < 2)
    np.testing.assert_array_equal(filled.slots[:2], context[:2])
    assert (filled.slots[2:J] == model.null[...]).all() and (filled.slots[J:] != model.null[...]).all()
    nothing = model.prepare_context(context, np.zeros(J, bool))
    none = embed(model, *texts, None)
    assert difference(none, embed(model, *texts, nothing)) <= EXACT
    assert difference(none, embed(model, *texts, filled)) > 1e-3
    own = jnp.broadcast_to(context, (7, *context.shape))  # each text's own
    per_text = model.prepare_context(own, jnp.arange(J) < jnp.arange(7)[:, None])
    assert difference(none[:1], embed(model, *texts, per_text)[:1]) <= EXACT
    assert difference(embed(model, *texts, filled)[2:3], embed(model, *texts, per_text)[2:3]) <= EXACT


def test_any_number_of_context_documents_can_be_read(model, texts, context):
    few = embed(model, *texts, context[:2])
    assert few.shape == (7, 16)
    assert difference(few, embed(model, *texts, context)) > 1e-3


def test_a_very_low_slot_bias_closes_the_model_to_its_context(model, texts, context):
    open_to, closed = nnx.clone(model), nnx.clone(model)
    open_to.slot_bias[...] = jnp.zeros_like(model.slot_bias[...])
    closed.slot_bias[...] = jnp.full_like(model.slot_bias[...], -30.0)
    assert difference(embed(closed, *texts, context), embed(closed, *texts, context * -0.7)) <= EXACT
    assert difference(embed(open_to, *texts, context), embed(open_to, *texts, context * -0.7)) > 1e-2


def test_a_new_model_starts_almost_closed_to_its_context():
    made = ContextualEncoder(contextual_config("isolated"), rngs=nnx.Rngs(0))
    assert made.slot_bias.shape == (2, 2) and (made.slot_bias[...] == -5.0).all()
    without = contextual_config("isolated", slot_bias=None)
    assert not hasattr(nnx.eval_shape(lambda: ContextualEncoder(without, rngs=nnx.Rngs(0))), "slot_bias")


@pytest.mark.parametrize("kind", ["biencoder", *PATTERNS])
def test_padding_and_batch_mates_do_not_change_a_vector(kind, texts, context):
    model = biencoder() if kind == "biencoder" else contextual(kind)
    given = () if kind == "biencoder" else (context,)
    ids, mask = texts
    vectors = embed(model, ids, mask, *given)
    i = int(jnp.argmin(mask.sum(axis=1)))  # the shortest
    count = int(mask[i].sum())
    alone = embed(model, ids[i : i + 1, :count], mask[i : i + 1, :count], *given)
    assert difference(vectors[i : i + 1], alone) <= EXACT
    wide_ids, wide_mask = jnp.pad(ids, ((0, 0), (0, 4)), constant_values=9), jnp.pad(mask, ((0, 0), (0, 4)))
    assert difference(vectors, embed(model, wide_ids, wide_mask, *given)) <= EXACT
    assert difference(vectors, embed(model, ids, jnp.ones_like(mask), *given)) > 1e-3


def test_slots_without_a_soft_prompt_are_the_context_alone(texts, context):
    for pattern in PATTERNS:
        model = contextual(pattern, soft_prompt=0)
        cache = prepare_context(model, context)
        np.testing.assert_array_equal(cache.slots, context)
        vectors = embed(model, *texts, cache)
        assert difference(vectors, embed(model, *texts, context[::-1])) <= EXACT
        assert difference(vectors, embed(model, *texts, context * -0.7)) > 1e-3
        assert not {"prompt_in", "prompt_out"} & {path[0] for path, _ in nnx.to_flat_state(nnx.state(model))}
        with pytest.raises(ValueError, match="at least one context document, got none: pass None"):
            model.embed(*texts, context[:0])


# --- recomputation, precision, depth


def plan_vectors(model, texts, documents):
    """Both stages: what a training step does with a plan batch. The last context document is missing."""
    context = model.embed_context(*documents)
    context = model.prepare_context(context, jnp.arange(len(context)) < len(context) - 1)
    return model.embed(*texts, context)


# Each beside "auto", which is "dots" on a CPU.
@pytest.mark.parametrize(("pattern", "remat"), [("joint", "full"), ("isolated", "none")])
def test_recomputed_layers_change_neither_vectors_nor_gradients(pattern, remat, texts):
    documents = tokens(J, 6, seed=3)
    pull = jnp.asarray(np.random.default_rng(2).normal(0, 1, (7, 16)), jnp.float32)

    def loss(model):
        vectors = plan_vectors(model, texts, documents)
        return (vectors * pull).sum(), vectors

    run = nnx.jit(nnx.value_and_grad(loss, has_aux=True))
    (_, whole), expected = run(contextual(pattern))
    (_, vectors), gradients = run(contextual(pattern, encoder={"remat": remat}))
    assert difference(vectors, whole) <= EXACT * float(jnp.abs(whole).max())
    gradients = dict(nnx.to_flat_state(gradients))
    for path, a in nnx.to_flat_state(expected):
        largest = float(jnp.abs(a[...]).max())
        assert largest > 0, f"{path}: no gradient flows here, so nothing was compared"
        assert difference(a[...], gradients[path][...]) <= EXACT * largest, path


@pytest.mark.parametrize("pattern", PATTERNS)
def test_bfloat16_compute_is_close_and_keeps_float32_parameters(pattern, texts):
    # Activations of bfloat16 carry 8 bits: weights as after training (0.05), not the wild ones of the other tests.
    low, high = (contextual(pattern, spread=0.05, encoder={"dtype": d}) for d in ("bfloat16", "float32"))
    assert {p.dtype for p in jax.tree.leaves(nnx.state(low))} == {jnp.dtype("float32")}
    unit = lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    documents = tokens(J, 6, seed=3)
    a, b = (embed(m, *texts, embed_context(m, *documents)) for m in (low, high))
    assert a.dtype == b.dtype == jnp.float32
    assert 1e-5 < difference(unit(a), unit(b)) <= 2e-2


# Means of 300 and deviations of 0.1: in bfloat16, or with the variance as a difference of squares, nothing is left.
FAR = 300 + 0.1 * np.random.default_rng(5).normal(0, 1, (3, 40, 16))


def test_norms_are_in_float32_of_two_passes_whatever_the_compute_type():
    x = jnp.asarray(FAR, jnp.float32)
    for dtype in ("float32", "bfloat16"):
        layer = norm(encoder_config(dtype=dtype, norm_epsilon=1e-3), nnx.Rngs(0))
        expected = np.asarray(x, np.float64)
        variance = expected.var(-1, keepdims=True)
        expected = (expected - expected.mean(-1, keepdims=True)) / np.sqrt(variance + 1e-3)
        assert layer(x).dtype == jnp.float32
        np.testing.assert_allclose(layer(x), expected, atol=2e-3)


def test_pooling_and_the_head_s_output_are_float32():
    hidden, mask = jnp.asarray(FAR / 100, jnp.bfloat16), jnp.arange(40) < jnp.asarray([[40], [7], [0]])
    pooled = mean_pool(hidden, mask)
    exact = np.asarray(hidden, np.float64)
    assert pooled.dtype == jnp.float32 and (pooled[2] == 0).all()  # a text without a token
    np.testing.assert_allclose(pooled[0], exact[0].mean(0), rtol=1e-6)
    np.testing.assert_allclose(pooled[1], exact[1, :7].mean(0), rtol=1e-6)
    first = fill(lambda: Biencoder(BiencoderConfig(encoder_config(dtype="bfloat16"), pooling="cls"), rngs=nnx.Rngs(0)))
    assert first.pool(hidden, mask).dtype == jnp.float32
    np.testing.assert_array_equal(first.pool(hidden, mask), hidden[:, 0])
    headed = BiencoderConfig(encoder_config(dtype="bfloat16"), head=True, output_width=6)
    vectors = fill(lambda: Biencoder(headed, rngs=nnx.Rngs(0))).embed(*tokens(2, 3))
    assert vectors.dtype == jnp.float32 and vectors.shape == (2, 6)


def test_a_residual_head_adds_its_input():
    config = BiencoderConfig(encoder_config(), head=True, residual=True)
    with_residual = fill(lambda: Biencoder(config, rngs=nnx.Rngs(0)))
    without = fill(lambda: Biencoder(BiencoderConfig(encoder_config(), head=True), rngs=nnx.Rngs(0)))
    plain = fill(lambda: Biencoder(BiencoderConfig(encoder_config()), rngs=nnx.Rngs(0)))
    nnx.update(plain.encoder, nnx.state(with_residual.encoder))
    texts = tokens(2, 3)
    assert difference(with_residual.embed(*texts) - without.embed(*texts), plain.embed(*texts)) <= EXACT


def test_compute_is_in_the_configs_type_from_the_embeddings_on():
    config = encoder_config(dtype="bfloat16")
    encoder = fill(lambda: Encoder(config, rngs=nnx.Rngs(0)))
    ids, mask = tokens(2, 3)
    x = encoder.embed_tokens(ids, mask)
    hidden, prefix = encoder.run(x, mask, encoder.angles(encoder.positions(mask)), return_keys_values=True)
    assert {y.dtype for y in (x, hidden, *prefix)} == {jnp.dtype("bfloat16")}
    assert {y.dtype for y in encoder.angles(encoder.positions(mask))} == {jnp.dtype("float32")}
    assert linear(4, 4, config, nnx.Rngs(0))(jnp.ones((2, 4))).dtype == jnp.bfloat16
    joint = contextual("joint", encoder={"dtype": "bfloat16"})
    cache = joint.prepare_context(jnp.ones((J, 16), jnp.bfloat16))
    assert cache.slots.dtype == jnp.float32  # the embedding norm is the first to see them
    assert joint.joint_sequence(x, mask, cache.slots)[0].dtype == jnp.bfloat16
    assert joint.output(jnp.ones((2, 16))).dtype == joint.slot_bias[...].dtype == jnp.float32


def test_defaults_are_those_of_the_paper_and_new_parameters_are_drawn_as_berts():
    encoder = EncoderConfig(vocab_size=2000, width=64, layers=1, heads=2, mlp_width=96)
    assert dataclasses.astuple(encoder)[5:] == (
        "swiglu", "rotary", 2048, 1000.0, 2, False, (False, False), 1e-12, "float32", "auto", "none",
    )  # fmt: skip
    config = ContextualConfig(BiencoderConfig(encoder, head=True), encoder, 512)
    assert (config.context_attention, config.soft_prompt, config.slot_bias, config.null_embedding) == (
        "isolated", 8, -5.0, True,
    )  # fmt: skip
    made = config.build(rngs=nnx.Rngs(0))
    assert isinstance(made, ContextualEncoder) and config.slots == 512
    for kernel in (made.encoder.word.embedding, made.encoder.blocks.qkv.kernel, made.prompt_out.kernel):
        assert 0.017 < float(kernel[...].std()) < 0.018 and float(jnp.abs(kernel[...]).max()) <= 0.04
    assert 0.007 < float(made.null[...].std()) < 0.013
    assert made.prompt_out.kernel.shape == (64, 8 * 64) and made.slot_bias[...].dtype == jnp.float32


def residual_bytes(remat: str) -> int:
    """What the backward pass of an encoder keeps of the forward pass."""
    config = encoder_config(remat=remat, width=64, mlp_width=128)
    encoder = fill(lambda: Encoder(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(encoder, nnx.Param)
    ids, mask = tokens(8, 32)
    run = lambda params: nnx.merge(graph, params)(ids, mask).sum()  # noqa: E731
    kept = jax.eval_shape(lambda params: jax.vjp(run, params)[1], params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))


def test_the_more_is_computed_again_the_less_is_kept():
    kept = {remat: residual_bytes(remat) for remat in ("none", "dots", "full")}
    assert kept["full"] < 0.5 * kept["dots"] < 0.35 * kept["none"]
    assert residual_bytes("auto") == kept["dots"]  # on CPU
    assert [select_remat("auto", platform) for platform in ("cpu", "gpu", "tpu", None)] == [
        "dots",
        "none",
        "none",
        "dots",
    ]
    assert (
        [select_remat(remat, "cpu") for remat in kept] == list(kept) == [select_remat(remat, "tpu") for remat in kept]
    )


def lowered_lines(layers: int) -> int:
    config = contextual_config("isolated", encoder={"layers": layers})
    model = nnx.eval_shape(lambda: ContextualEncoder(config, rngs=nnx.Rngs(0)))
    texts, documents = tokens(4, 6), tokens(J, 6)

    def loss(model):
        return plan_vectors(model, texts, documents).sum()

    return len(nnx.jit(nnx.grad(loss)).lower(model).as_text().splitlines())


def test_the_program_does_not_grow_with_depth():
    shallow, deep = lowered_lines(2), lowered_lines(6)
    assert deep == shallow > 100


# --- errors teach


def test_a_cache_of_another_model_is_refused(texts, context):
    caches = {name: contextual(name).prepare_context(context) for name in PATTERNS}
    with pytest.raises(
        ValueError, match=r"of another model: expected .*'isolated', 16, 2.*got .*'joint', 16\); call prepare"
    ):
        contextual("isolated").embed(*texts, caches["joint"])
    with pytest.raises(ValueError, match=r"of another model: expected .*'joint', 16\), got .*'isolated', 16, 2"):
        contextual("joint").embed(*texts, caches["isolated"])
    for pattern in PATTERNS:
        wide = {"width": 24, "layers": 3, "heads": 3}
        with pytest.raises(ValueError, match=r"of another model: expected .*, 24.* got .*, 16"):
            contextual(pattern, encoder=wide).embed(*texts, caches[pattern])


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match=r"width 16 cannot be split into 3 heads.*multiple"):
        encoder_config(heads=3)
    with pytest.raises(ValueError, match=r"odd number.*even head size"):
        encoder_config(width=6, heads=2)
    assert encoder_config(width=6, heads=2, positions="learned").head_dim == 3
    for changes in ({"head": False}, {"head": True, "output_width": 7}):
        with pytest.raises(ValueError, match=r"a residual needs a head as wide as the encoder \(16\)"):
            BiencoderConfig(encoder_config(), residual=True, **changes)
    narrow = BiencoderConfig(encoder_config(width=8), head=True)
    with pytest.raises(ValueError, match="one width; got 8 and 16"):
        ContextualConfig(narrow, encoder_config(), context_size=J)
    with pytest.raises(ValueError, match="context_size J ≥ 1, got 0; use a Biencoder"):
        contextual_config("isolated", context_size=0)


def test_ids_masks_and_contexts_of_other_shapes_are_refused():
    ids = np.ones((2, 3), np.int32)
    for other in (ids[0], ids[:, :2], ids[None]):
        with pytest.raises(ValueError, match=r"one shape \[texts, tokens\], got \(2, 3\) and \("):
            as_tokens.__wrapped__(ids, other)  # beartype, which only tests have on, would speak first
    for wrong in (np.ones((J, 7), np.float32), np.ones((2, 2, J, 16), np.float32), np.ones(16, np.float32)):
        with pytest.raises(ValueError, match=r"expected a context \[J, 16\] or \[texts, J, 16\], got \["):
            ContextualEncoder.prepare_context.__wrapped__(contextual("joint"), wrong)


def test_a_biencoder_refuses_a_context(texts, context):
    with pytest.raises(ValueError, match="a biencoder reads no context: call embed"):
        # Its signature says None; beartype, which only tests have on, would speak first.
        Biencoder.embed.__wrapped__(biencoder(), *texts, context)


def test_a_model_without_null_embedding_asks_for_a_context(texts):
    with pytest.raises(ValueError, match="no null embedding: give the model a context"):
        contextual("joint", null_embedding=False).embed(*texts)


def test_texts_longer_than_the_learned_positions_are_an_error():
    model = biencoder(positions="learned", max_positions=5)
    ids = jnp.ones((2, 6), jnp.int32)
    with pytest.raises(ValueError, match="texts of 6 tokens need as many learned positions, the model has 5"):
        model.embed(ids, ids)
    assert model.embed(ids[:, :5], ids[:, :5]).shape == (2, model.config.encoder.width)
