"""What a step counts on texts in chunks: model FLOPs and padding follow the texts, empty chunks cost nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import TRAIN, build, copy, model, sgd
from tiny_batches import G, in_layout, joined, plain_batch, step_batch

from cde_jax.config import Train
from cde_jax.training.accounting import encoding_flops, step_counts, step_flops, text_sizes


@pytest.fixture(scope="module")
def metrics():
    """Of a step on each of three batches, by one compiled program."""
    state, _, run = build((8, 1), *sgd(), TRAIN)
    return [jax.device_get(run(copy(state), step_batch(step))[1]) for step in range(3)]


def test_model_flops_follow_the_texts_not_their_chunks(metrics):
    for step, values in enumerate(metrics):
        plain = plain_batch(step)
        sizes, context = joined(plain, "mask").sum(axis=2), plain["context_mask"].sum(axis=2)
        batch = jax.tree.map(jnp.asarray, in_layout(plain))
        for name, expected in (("texts", sizes), ("context", context)):
            np.testing.assert_array_equal(text_sizes(batch[name]["mask"], batch[name]["place"]), expected)
        expected = step_flops(model().config, sizes, context, scores=plain["keep"].size)
        np.testing.assert_allclose(values["flops"], expected, rtol=1e-5)
        first_stage = encoding_flops(model().config.first_stage, context)
        frozen = step_counts(model().config, batch, Train(first_stage_rate=0.0))["flops"]
        np.testing.assert_allclose(frozen, expected - 2 * first_stage, rtol=1e-5)
        shared = step_counts(model().config, batch, Train(share_negatives=True))["flops"]
        of_scores = 3 * 2 * plain["keep"].size * model().config.second_stage.width
        np.testing.assert_allclose(shared, expected + (G - 1) * of_scores, rtol=1e-5)


def test_padding_is_counted_as_it_is_computed(metrics):
    for step, values in enumerate(metrics):
        plain, batch = plain_batch(step), step_batch(step)
        tokens = sum(int(plain[f"{kind}_mask"].sum()) for kind in ("query", "document", "context"))
        chunks = [x for name in ("texts", "context") for m in batch[name]["mask"] for x in m.reshape(-1, *m.shape[2:])]
        in_use = sum(chunk.size for chunk in chunks if chunk.any())
        assert (int(values["tokens"]), int(values["computed_tokens"])) == (tokens, in_use)
        assert tokens < in_use < sum(chunk.size for chunk in chunks)
