"""The loss against a plain float64 reading of it, and against the numbers of the PyTorch reference."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared

from cde_jax.training.losses import info_nce, normalise

loss_of = jax.jit(info_nce)
gradients_of = jax.jit(jax.grad(lambda q, d, keep, t: info_nce(q, d, keep, t)[0], argnums=(0, 1)))


def plain_loss(queries, documents, keep, temperature) -> float:
    """Query by query: the log odds of the positive against each document that counts."""
    total = 0.0
    for i, query in enumerate(np.asarray(queries, np.float64)):
        cosines = [query @ d / np.linalg.norm(query) / np.linalg.norm(d) for d in np.asarray(documents, np.float64)]
        odds = [np.exp((c - cosines[i]) / temperature) for j, c in enumerate(cosines) if j != i and keep[i, j]]
        total += np.log1p(sum(odds))
    return total / len(queries)


def vectors(batch, hard, seed=0, near=0.8):
    """Queries near their documents, not unit, and a mask that drops about a third of the columns."""
    random = np.random.default_rng([seed, batch, hard])
    documents = random.normal(size=(batch * (1 + hard), 8))
    queries = near * documents[:batch] + random.normal(size=(batch, 8))
    keep = random.random((batch, batch * (1 + hard))) < 0.7
    return jnp.asarray(queries * 3, jnp.float32), jnp.asarray(documents / 2, jnp.float32), keep


@pytest.mark.parametrize(("batch", "hard"), [(1, 0), (1, 3), (5, 0), (5, 2)])
def test_the_loss_is_the_plain_one(batch, hard):
    queries, documents, keep = vectors(batch, hard)
    for mask in (None, jnp.asarray(keep)):
        for temperature in (0.02, 0.5):
            expected = plain_loss(queries, documents, np.ones_like(keep) if mask is None else keep, temperature)
            loss, _ = loss_of(queries, documents, mask, temperature)
            assert loss.dtype == jnp.float32
            np.testing.assert_allclose(float(loss), expected, rtol=2e-5, atol=2e-6)


def test_the_positive_counts_whatever_the_mask_says():
    queries, documents, keep = vectors(5, 2)
    with_it, without = keep | np.eye(5, 15, dtype=bool), keep & ~np.eye(5, 15, dtype=bool)
    (one, seen), (other, unseen) = (loss_of(queries, documents, jnp.asarray(k), 0.1) for k in (with_it, without))
    assert float(one) == float(other) and float(one) > 0
    assert {k: float(v) for k, v in seen.items()} == {k: float(v) for k, v in unseen.items()}
    nothing, metrics = loss_of(queries, documents, jnp.zeros((5, 15), bool), 0.1)
    assert float(nothing) == 0 and float(metrics["accuracy"]) == 1 and float(metrics["masked"]) == 1


def test_a_masked_column_changes_nothing_at_all():
    queries, documents, _ = vectors(5, 2)
    keep = jnp.ones((5, 15), bool).at[:, 7].set(False)
    before = loss_of(queries, documents, keep, 0.1)[0]
    assert float(loss_of(queries, documents.at[7].set(queries[0]), keep, 0.1)[0]) == float(before)
    of_documents = gradients_of(queries, documents, keep, 0.1)[1]
    assert (of_documents[7] == 0).all() and (jnp.abs(of_documents[8]) > 0).all()


def test_a_hard_negative_is_a_column_for_every_query():
    queries, documents, _ = vectors(5, 2)
    losses = [float(loss_of(queries, documents[:count], None, 0.1)[0]) for count in (5, 6, 15)]
    assert losses[0] < losses[1] < losses[2]


def test_gradients_are_those_of_the_plain_loss():
    queries, documents, keep = vectors(5, 2)
    gradients = gradients_of(queries, documents, jnp.asarray(keep), 0.1)
    given, step = [np.asarray(queries, np.float64), np.asarray(documents, np.float64)], 1e-5
    for which, gradient in enumerate(gradients):
        numeric = np.zeros_like(given[which])
        for index in np.ndindex(numeric.shape):
            value = given[which][index]
            given[which][index] = value + step
            above = plain_loss(*given, keep, 0.1)
            given[which][index] = value - step
            numeric[index] = (above - plain_loss(*given, keep, 0.1)) / (2 * step)
            given[which][index] = value
        np.testing.assert_allclose(gradient, numeric, atol=1e-5 * np.abs(numeric).max(), rtol=1e-4)


def test_scores_and_their_gradients_are_multiplied_at_the_highest_precision():
    """At the default one accelerators round float32 to bfloat16 or TF32."""
    queries, documents, _ = vectors(5, 2)
    program = str(jax.make_jaxpr(jax.grad(lambda *x: info_nce(*x, None, 0.1)[0], argnums=(0, 1)))(queries, documents))
    products = program.count("= dot_general[")
    assert products == 3 and program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products


def test_zero_vectors_give_finite_losses_and_gradients():
    queries, documents, keep = vectors(5, 2)
    queries, documents = queries.at[0].set(0), documents.at[1].set(0).at[6].set(0)
    loss, metrics = loss_of(queries, documents, jnp.asarray(keep), 0.02)
    gradients = gradients_of(queries, documents, jnp.asarray(keep), 0.02)
    assert all(jnp.isfinite(x).all() for x in (loss, *metrics.values(), *gradients))
    assert (gradients[0][0] == 0).all() and (gradients[1][6] == 0).all()
    assert (normalise(jnp.zeros((2, 4))) == 0).all()


def test_what_is_not_a_number_shows_in_the_loss():
    queries, documents, keep = vectors(5, 2)
    for bad in (jnp.nan, jnp.inf):
        assert not jnp.isfinite(loss_of(queries.at[0, 0].set(bad), documents, jnp.asarray(keep), 0.02)[0])
        assert not jnp.isfinite(loss_of(queries, documents.at[0, 0].set(bad), jnp.asarray(keep), 0.02)[0])


def test_scale_does_not_matter_and_bfloat16_vectors_are_scored_in_float32():
    queries, documents, _ = vectors(5, 2)
    expected = float(loss_of(queries, documents, None, 0.02)[0])
    # Powers of two lose no digits.
    assert float(loss_of(queries * 2.0**20, documents * 2.0**-20, None, 0.02)[0]) == pytest.approx(expected, rel=1e-6)
    queries, documents = (x.astype(jnp.bfloat16) for x in (queries, documents))
    loss, _ = loss_of(queries, documents, None, 0.02)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(float(loss), plain_loss(queries, documents, np.ones((5, 15)), 0.02), rtol=2e-5)


def test_metrics_say_what_they_are_named():
    queries = jnp.eye(3)[:2]
    documents = jnp.array([[1.0, 0, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0]])
    keep = jnp.array([[True, True, False, True], [True, True, True, True]])
    loss, metrics = loss_of(queries, documents, keep, 1.0)
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        # The first query's positive ties with a negative and counts as found; the second's is not the highest.
        {"accuracy": 0.5, "positive": 0.5, "negative": (1 + 0 + 0 + 0 + 1) / 5, "masked": 1 / 6}
    )
    first, second = np.log1p(np.exp(0) + np.exp(-1)), np.log1p(np.exp(0) + np.exp(0) + np.exp(1))
    assert float(loss) == pytest.approx((first + second) / 2, rel=1e-6)


CASES = (
    "plain",
    "plain_temp20",
    "filter_threshold",
    "filter_above_positive",
    "duplicate_idx_no_hn",
    "hn_in_batch",
    "hn_not_in_batch",
    "hn_in_batch_filter_threshold",
    "hn_in_batch_filter_above_positive",
    "hn_not_in_batch_filter_threshold",
    "hn_in_batch_duplicate_idx",
    "given_mask",
)


def arrays(path) -> dict:
    with np.load(path) as file:
        return dict(file)


def reference_keep(settings: dict, scores, batch: int, hard: int):
    """Which columns the reference counts (loss/NOTES.md): by its filter and its switch for in-batch negatives."""
    owner = np.concatenate([np.arange(batch), np.repeat(np.arange(batch), hard)])  # of each column
    own = owner == np.arange(batch)[:, None]
    threshold, in_batch = settings.get("hn_tune_threshold"), settings.get("use_in_batch_negatives", True)
    drop = np.zeros_like(own)
    if threshold:
        limit = np.diagonal(scores)[:, None] if threshold == 1.0 else threshold
        drop = scores[:, : len(owner)] >= limit
        drop &= ~own if in_batch else True
    return ~(drop if in_batch else drop | ~own) | np.eye(*own.shape, dtype=bool)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_gives_the_same_loss_and_gradients(case):
    folder = shared("golden/loss")
    settings = json.loads((folder / "config.json").read_text())["cases"][case]
    inputs, outputs = arrays(folder / "inputs.npz"), arrays(folder / "outputs.npz")
    if case == "hn_in_batch_duplicate_idx":
        pytest.skip("two positives of weight 1/2 (soft labels); here a query has one, equal texts are masked")
    hard = settings["num_hard_negatives"]
    if case == "given_mask":
        keep = inputs["given_mask/duplicate_labels"] == 0
    else:
        keep = reference_keep(settings, inputs["filter_scores"], 6, hard)
    assert (~keep).sum() == settings["masked_pairs"]
    queries, documents = inputs["e1"], inputs["e2_with_hard_negatives" if hard else "e2_documents"]
    arguments = jnp.asarray(queries), jnp.asarray(documents), jnp.asarray(keep), 1 / settings["temp"]
    np.testing.assert_allclose(loss_of(*arguments)[0], outputs[f"{case}/loss"], atol=2e-5, rtol=0)
    for gradient, name in zip(gradients_of(*arguments), ("grad_e1", "grad_e2"), strict=True):
        np.testing.assert_allclose(gradient, outputs[f"{case}/{name}"], atol=2e-5, rtol=0)
