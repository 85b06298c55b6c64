"""All kernels of attention against a plain float64 reading, in values and gradients, and which of them runs where."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cde_jax.models import attention, cudnn, encoder
from cde_jax.models.attention import Prefix, attend, attend_cudnn, cudnn_works, kernel_error, largest, select_kernel

TEXTS, LENGTH, SLOTS, HEADS, WIDTH = 5, 6, 4, 2, 8
KERNELS = {
    "xla": partial(attend, kernel="xla"),
    "blocks": partial(attend, kernel="blocks"),
    "cudnn": attend_cudnn,  # with `plain_part` for cuDNN's kernel, which needs a GPU
}
CASES = {
    "text alone": {},
    "shared prefix": {"prefix": 3, "bias": True},
    "shared prefix without bias": {"prefix": 3},
    "a prefix of each text's own": {"prefix": 4, "bias": True},
    "joint": {"slots": SLOTS, "bias": True},
    "joint without bias": {"slots": SLOTS},
}


@pytest.fixture(autouse=True)
def small_blocks_and_plain_parts(monkeypatch):
    """Two texts a block, and a block that is not full; what cuDNN's kernel computes, forward and backward."""
    monkeypatch.setattr(attention, "BLOCK_LOGITS", 2 * HEADS * LENGTH * (LENGTH + SLOTS))
    monkeypatch.setattr(cudnn, "part", plain_part)
    monkeypatch.setattr(cudnn, "part_backward", plain_part_backward)


def part_logits(queries, keys, lengths):
    logits = jnp.einsum("bthd,bshd->bths", queries, keys, preferred_element_type=jnp.float32) * WIDTH**-0.5
    seen = jnp.arange(keys.shape[1]) < (jnp.inf if lengths is None else lengths[:, None, None, None])
    return jnp.where(seen, logits, -jnp.inf)


def plain_part(queries, keys, values, lengths):
    logits = part_logits(queries, keys, lengths)
    output = jnp.einsum("bths,bshd->bthd", jax.nn.softmax(logits), values.astype(jnp.float32))
    return output.astype(queries.dtype), jax.nn.logsumexp(logits, axis=-1)


def plain_part_backward(queries, keys, values, lengths, output, total, cotangent):
    """As cuDNN computes it: from the output and the log-sum-exp that it is given (FlashAttention-2, algorithm 2)."""
    weights = jnp.exp(part_logits(queries, keys, lengths) - total[..., None])  # [B, T, H, S]
    q, k, v, o, do = (x.astype(jnp.float32) for x in (queries, keys, values, output, cotangent))
    of_values = jnp.einsum("bths,bthd->bshd", weights, do)
    of_weights = jnp.einsum("bthd,bshd->bths", do, v) - (do * o).sum(axis=-1)[..., None]
    of_logits = weights * of_weights * WIDTH**-0.5
    of_queries, of_keys = jnp.einsum("bths,bshd->bthd", of_logits, k), jnp.einsum("bths,bthd->bshd", of_logits, q)
    return of_queries.astype(queries.dtype), of_keys.astype(keys.dtype), of_values.astype(values.dtype)


def inputs(case: dict, dtype=jnp.float32) -> dict:
    """Queries, keys and values of texts whose last tokens are padding, and what `case` adds."""
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.normal(0, 1, shape), jnp.float32).astype(dtype)

    given = {name: normal(TEXTS, LENGTH, HEADS, WIDTH) for name in ("queries", "keys", "values")}
    # In a joint sequence slots come first and are never padding.
    sizes = random.integers(case.get("slots", 0) + 1, LENGTH + 1, TEXTS)
    given["mask"] = jnp.asarray(np.arange(LENGTH) < sizes[:, None])
    if "prefix" in case:
        shape = ((TEXTS,) if case["prefix"] == 4 else ()) + (SLOTS, HEADS, WIDTH)
        given["prefix"] = Prefix.of_slots(normal(*shape), normal(*shape))
    if "bias" in case:
        given["bias"] = jnp.asarray([-1.3, 0.8], jnp.float32)
    return given


def plain(queries, keys, values, mask, prefix=None, bias=None, slots=0):
    """One text, head and token at a time, in float64."""
    queries, keys, values = (np.asarray(x, np.float64) for x in (queries, keys, values))
    output = np.zeros_like(queries)
    for b, t, h in np.ndindex(queries.shape[:3]):
        k, v, seen = keys[b, :, h], values[b, :, h], np.asarray(mask[b])
        added = np.where((np.arange(len(k)) < slots) & (t >= slots), 0 if bias is None else float(bias[h]), 0.0)
        if prefix is not None:
            pk, pv = (np.asarray(x, np.float64) for x in prefix.by_slot())
            pk, pv = (pk[b, :, h], pv[b, :, h]) if pk.ndim == 4 else (pk[:, h], pv[:, h])
            k, v = np.concatenate([pk, k]), np.concatenate([pv, v])
            seen = np.concatenate([np.ones(len(pk), bool), seen])
            added = np.concatenate([np.full(len(pk), 0 if bias is None else float(bias[h])), added])
        weights = np.where(seen, np.exp(k @ queries[b, t, h] / np.sqrt(k.shape[-1]) + added), 0)
        output[b, t, h] = weights @ v / weights.sum()
    return output


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_is_softmax_attention_over_slots_and_text(kernel, case):
    given, slots = inputs(CASES[case]), CASES[case].get("slots", 0)
    output = jax.jit(partial(KERNELS[kernel], slots=slots))(**given)
    np.testing.assert_allclose(output, plain(**given, slots=slots), atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_in_bfloat16_is_close_to_float32(kernel, case):
    given, slots = inputs(CASES[case], jnp.bfloat16), CASES[case].get("slots", 0)
    output = jax.jit(partial(KERNELS[kernel], slots=slots))(**given)
    assert output.dtype == jnp.bfloat16
    np.testing.assert_allclose(output.astype(jnp.float32), plain(**given, slots=slots), atol=2e-2, rtol=0)


def gradients(kernel, case: dict, dtype=jnp.float32):
    """Of everything that is differentiable, under random cotangents; padding's queries pull at nothing."""
    given = inputs(case, dtype)
    mask = given.pop("mask")
    pull = jnp.asarray(np.random.default_rng(1).normal(0, 1, given["queries"].shape), jnp.float32)
    pull *= mask[..., None, None]

    def loss(given):
        output = kernel(mask=mask, slots=case.get("slots", 0), **given)
        return (output.astype(jnp.float32) * pull).sum()

    return jax.jit(jax.grad(loss))(given)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", ["blocks", "cudnn"])
def test_every_kernel_has_the_gradients_of_the_plain_one(kernel, case):
    expected, got = (gradients(KERNELS[name], CASES[case]) for name in ("xla", kernel))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(got), strict=True):
        assert float(jnp.abs(a).max()) > 1e-2, f"{path}: no gradient flows here, so nothing was compared"
        np.testing.assert_allclose(b, a, atol=1e-5, rtol=1e-5, err_msg=str(path))


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_in_bfloat16_are_close_to_those_in_float32(kernel):
    case = CASES["shared prefix"]
    rounded = inputs(case, jnp.bfloat16)
    expected = gradients(KERNELS["xla"], case)
    got = gradients(KERNELS[kernel], case, jnp.bfloat16)
    assert got["bias"].dtype == jnp.float32 and rounded["queries"].dtype == jnp.bfloat16
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(got), strict=True):
        size = float(jnp.abs(a).max())
        np.testing.assert_allclose(b.astype(jnp.float32), a, atol=2e-2 * size, err_msg=str(path))


def test_the_gradient_of_the_plain_kernel_is_the_slope():
    given = inputs(CASES["shared prefix"])
    output = lambda bias: float(attend(**(given | {"bias": given["bias"] + bias}), kernel="xla").sum())  # noqa: E731
    slope = jax.grad(lambda bias: attend(**(given | {"bias": bias}), kernel="xla").sum())(given["bias"]).sum()
    np.testing.assert_allclose(slope, (output(1e-2) - output(-1e-2)) / 2e-2, rtol=1e-2)


@pytest.mark.parametrize("keys", [1, 32, 33, 65, 520])
def test_the_largest_logit_is_found_by_halves_and_has_no_gradient(keys):
    logits = jnp.asarray(np.random.default_rng(keys).normal(size=(2, 3, 4, keys)), jnp.float32)
    np.testing.assert_array_equal(largest(logits), logits.max(axis=-1))
    assert not jax.grad(lambda x: largest(x).sum())(logits).any()


def test_a_long_context_of_a_low_bias_is_read_in_bfloat16_as_in_float32():
    """The bias of a new model, which bfloat16 alone would round, and slots whose weights are small but many."""
    random = np.random.default_rng(2)
    given = {
        name: jnp.asarray(random.normal(0, 1, (2, LENGTH, HEADS, WIDTH)), jnp.bfloat16)
        for name in ("queries", "keys", "values")
    }
    given["mask"] = jnp.ones((2, LENGTH), bool)
    given["prefix"] = Prefix.of_slots(
        *(jnp.asarray(random.normal(0, 1, (520, HEADS, WIDTH)), jnp.bfloat16) for _ in range(2))
    )
    given["bias"] = jnp.asarray([-5.017, -4.983], jnp.float32)
    expected = plain(**given)
    for name, kernel in KERNELS.items():
        output = kernel(**given)
        np.testing.assert_allclose(output.astype(jnp.float32), expected, atol=1e-2, err_msg=name)
        joined, _ = jax.vjp(lambda queries, kernel=kernel: kernel(**(given | {"queries": queries})), given["queries"])
        np.testing.assert_allclose(joined.astype(jnp.float32), expected, atol=1e-2, err_msg=f"{name}, in training")


def test_a_text_without_keys_is_finite_in_value_and_gradient():
    given = inputs(CASES["text alone"])
    given["mask"] = given["mask"].at[1].set(False)
    for name, kernel in KERNELS.items():
        loss = lambda q, kernel=kernel: kernel(**(given | {"queries": q})).sum()  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(given["queries"])
        assert np.isfinite(value) and np.isfinite(gradient).all(), name


def test_lengths_that_would_misread_a_mask_give_nan():
    given = inputs(CASES["shared prefix"])
    hole = given["mask"].at[0].set(jnp.array([True, False, True, True, True, True]))
    output = KERNELS["cudnn"](**(given | {"mask": hole.at[1].set(True)}))
    assert np.isnan(output[0]).all() and np.isfinite(output[1:]).all()
    assert np.isfinite(KERNELS["xla"](**(given | {"mask": hole}))).all()


# --- which kernel runs


@pytest.mark.parametrize(
    ("kernel", "dtype", "head", "platform", "expected"),
    [
        ("auto", "float32", 64, "cpu", "blocks"),
        ("auto", "bfloat16", 64, "cpu", "blocks"),
        ("cudnn", "bfloat16", 64, "cuda", "cudnn"),
        ("cudnn", "bfloat16", 128, "cuda", "cudnn"),
        ("auto", "float32", 64, "cuda", "xla"),
        ("auto", "bfloat16", 64, "tpu", "xla"),
        ("auto", "bfloat16", 64, "gpu", "xla"),
        ("xla", "bfloat16", 64, "cuda", "xla"),
        ("blocks", "bfloat16", 64, "tpu", "blocks"),
    ],
)
def test_the_kernel_is_picked_by_platform_and_type_and_can_be_overridden(kernel, dtype, head, platform, expected):
    assert select_kernel(kernel, jnp.dtype(dtype), head, platform) == expected


def test_a_kernel_that_the_platform_lacks_is_refused_with_what_it_needs():
    queries = jnp.zeros((1, 2, 1, 8))
    with pytest.raises(
        ValueError, match=r"'cudnn' needs an NVIDIA GPU, and JAX runs on cpu here, and bfloat16.*'auto'"
    ):
        attend(queries, queries, queries, jnp.ones((1, 2), bool), kernel="cudnn")
    for dtype in (jnp.float32, jnp.float16):  # activations beyond 65,504 would become infinite in float16
        with pytest.raises(ValueError, match=rf"needs bfloat16 compute \(model\.dtype\), got {dtype.__name__}: choose"):
            select_kernel("cudnn", dtype, 64, "cuda")
    with pytest.raises(ValueError, match="at most 128 features, a multiple of 8, got 20"):
        select_kernel("cudnn", jnp.bfloat16, 20, "cuda")
    with pytest.raises(ValueError, match="at most 128 features, a multiple of 8, got 136"):
        select_kernel("cudnn", jnp.bfloat16, 136, "cuda")
    with pytest.raises(ValueError, match="expected an attention kernel of auto, xla, blocks, cudnn; got 'flash'"):
        select_kernel("flash", jnp.float32, 64)


def test_auto_takes_cudnn_where_it_works_and_is_right(monkeypatch, caplog):
    monkeypatch.setattr(attention, "cudnn_works", cudnn_works.__wrapped__)  # no result is kept
    assert select_kernel("auto", jnp.bfloat16, WIDTH, "cuda") == "cudnn" and not caplog.text
    assert [select_kernel("auto", *other, "cuda") for other in ((jnp.float32, 8), (jnp.bfloat16, 20))] == ["xla"] * 2
    assert kernel_error(KERNELS["cudnn"], head_dim=WIDTH) < 0.02
    for factor, off in ((2.0, r"off by 1\.\d+"), (jnp.nan, "off by nan")):
        wrong = lambda *x, by=factor: [y * z for y, z in zip(plain_part_backward(*x), (1, by, 1), strict=True)]  # noqa: E731
        monkeypatch.setattr(cudnn, "part_backward", wrong)
        assert select_kernel("auto", jnp.bfloat16, WIDTH, "cuda") == "xla"
        assert re.search(f"does not work here .it is {off} ", caplog.text)
    monkeypatch.undo()
    monkeypatch.setattr(attention, "cudnn_works", cudnn_works.__wrapped__)
    trace = jax.jit(lambda: jnp.zeros(select_kernel("auto", jnp.bfloat16, WIDTH, "cuda") == "xla"))
    assert trace().shape == (1,) and "(RuntimeError: cuDNN is not detected.): the kernel 'xla' is used" in caplog.text


@pytest.mark.parametrize(("case", "calls"), list(zip(CASES, [1, 2, 2, 2, 3, 1], strict=True)))
def test_what_cudnn_is_given_satisfies_jaxs_checks_and_lowers_to_its_calls(case, calls, monkeypatch):
    """As far as there is no GPU: JAX checks types and shapes when it traces, and the program for CUDA can be read."""
    monkeypatch.undo()
    monkeypatch.setattr(cudnn.fused, "check_cudnn_version", lambda: 91000)
    given, slots = inputs(CASES[case], jnp.bfloat16), CASES[case].get("slots", 0)
    mask = given.pop("mask")
    loss = jax.jit(jax.grad(lambda given: attend_cudnn(mask=mask, slots=slots, **given).astype(jnp.float32).sum()))
    program = loss.trace(given).lower(lowering_platforms=("cuda",)).as_text()
    for name in ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"):
        assert program.count(f"@{name}(") == calls
    assert "xf16>" not in program and "ScaleBias" not in program


def test_an_encoder_runs_the_kernel_of_its_config(monkeypatch):
    from tiny_models import encoder_config, fill, tokens

    picked = []
    monkeypatch.setattr(encoder, "attend", lambda *a, kernel, **k: picked.append(kernel) or attend(*a, **k))
    config = encoder_config(attention="blocks")
    fill(lambda: encoder.Encoder(config, rngs=encoder.nnx.Rngs(0)))(*tokens(2, 3))
    assert set(picked) == {"blocks"}
