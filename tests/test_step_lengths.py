"""A step on texts in chunks of several lengths: the same numbers, one program, no work on empty chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_step import KEY, G, collectives, copy, largest_difference, model, sgd, step_batch
from tiny_models import VOCABULARY, biencoder

from cde_jax.batching.lengths import choose_layout, chunked
from cde_jax.training import sharding
from cde_jax.training.accounting import encoding_flops, step_flops
from cde_jax.training.step import (
    StepConfig,
    count_flops,
    count_tokens,
    embed_plan_batch,
    init_state,
    make_train_step,
    text_sizes,
)

LONGEST = 24
DROPOUT = StepConfig(temperature=0.1, sequence_dropout=0.3)


def long_batch(step: int) -> dict[str, np.ndarray]:
    """Like `step_batch`, with documents of up to 24 tokens; a plan batch of only short ones comes now and then."""
    batch, random = step_batch(step), np.random.default_rng([step, 6])
    for name in ("document", "context"):
        count = batch[f"{name}_mask"].shape[1]
        sizes = random.integers(1, LONGEST + 1, (G, count)) >> (random.random((G, 1)) < 0.3) * 2
        batch[f"{name}_ids"] = random.integers(1, VOCABULARY, (G, count, LONGEST)).astype(np.int32)
        batch[f"{name}_mask"] = np.arange(LONGEST) < sizes[..., None]
    batch["context_mask"][:, -1] = False
    return batch


def joined(batch) -> tuple[np.ndarray, np.ndarray]:
    """Queries and documents at one width."""
    short = ((0, 0), (0, 0), (0, LONGEST - batch["query_ids"].shape[2]))
    pairs = ((np.pad(batch[f"query_{kind}"], short), batch[f"document_{kind}"]) for kind in ("ids", "mask"))
    ids, mask = (np.concatenate(pair, axis=1) for pair in pairs)
    return ids, mask


def in_chunks(batches: list[dict]) -> list[dict]:
    """The same batches in the loader's other form."""
    texts = choose_layout(lambda: (sizes for b in batches for sizes in joined(b)[1].sum(axis=2)), 3, 2 * LONGEST)
    context = choose_layout(lambda: (sizes for b in batches for sizes in b["context_mask"].sum(axis=2)), 2, LONGEST)
    assert texts.lengths == (8, 16, 24) and len(context.lengths) == 2
    return [
        {
            "keep": batch["keep"],
            "texts": chunked(*joined(batch), texts),
            "context": chunked(batch["context_ids"], batch["context_mask"], context),
        }
        for batch in batches
    ]


def gradients_and_metrics(devices: int, batches: list[dict]):
    """Of one SGD step for each batch, all from the same parameters; and how many programs were compiled."""
    mesh = sharding.make_mesh(devices)
    graph, first = init_state(model(), sgd()[0])
    first, key = sharding.replicate(mesh, first), sharding.replicate(mesh, KEY)
    step, gradients, metrics = make_train_step(graph, *sgd(), DROPOUT, mesh), [], []
    for batch in batches:
        state, values = step(copy(first), sharding.shard_batch(mesh, batch), key)
        gradients.append(jax.device_get(jax.tree.map(lambda a, b: a - b, first.params, state.params)))
        metrics.append(jax.device_get(values))
    return gradients, metrics, step._cache_size()


@pytest.fixture(scope="module")
def plain():
    batches = [long_batch(step) for step in range(3)]
    return batches, gradients_and_metrics(8, batches)


@pytest.mark.parametrize("devices", [8, 1])
def test_texts_in_chunks_of_several_lengths_give_the_same_losses_and_gradients(plain, devices):
    batches, (gradients, metrics, _) = plain
    got, got_metrics, compiled = gradients_and_metrics(devices, in_chunks(batches))
    assert compiled == 1
    for i in range(len(batches)):
        np.testing.assert_allclose(got_metrics[i]["losses"], metrics[i]["losses"], atol=1e-5, rtol=1e-5)
        size = max(float(np.abs(x).max()) for x in jax.tree.leaves(gradients[i]))
        assert largest_difference(got[i], gradients[i]) <= 1e-5 * size
    assert len({str(m["losses"]) for m in metrics}) == 3  # the batches are not all alike


def test_a_biencoder_reads_texts_in_chunks_too():
    batch = long_batch(0)
    (held,) = in_chunks([batch])
    one, plain = (jax.tree.map(lambda x: jnp.asarray(x[0]), b) for b in (held, batch))
    del one["context"]

    @nnx.jit(static_argnums=2)
    def embed(model, batch, config):
        return embed_plan_batch(model, batch, KEY, config)

    for got, expected in zip(embed(biencoder(), one, DROPOUT), embed(biencoder(), plain, DROPOUT), strict=True):
        assert got.shape == expected.shape and float(jnp.abs(got - expected).max()) <= 1e-5


def test_devices_talk_once_where_texts_are_in_chunks():
    mesh = sharding.make_mesh(8)
    graph, state = init_state(model(), sgd()[0])
    step = make_train_step(graph, *sgd(), DROPOUT, mesh)
    (batch,) = in_chunks([long_batch(0)])
    state, key = sharding.replicate(mesh, state), sharding.replicate(mesh, KEY)
    hlo = step.lower(state, sharding.shard_batch(mesh, batch), key).compile().as_text()
    inside, outside = collectives(hlo)
    assert not inside and outside
    assert hlo.count(" conditional(") >= 2 * 5  # chunks without a text are skipped, forward and backward


def test_model_flops_follow_the_texts_not_how_they_are_held(plain):
    batches, (_, metrics, _) = plain
    for batch, held, values in zip(batches, in_chunks(batches), metrics, strict=True):
        queries, documents, context = (batch[f"{name}_mask"].sum(axis=2) for name in ("query", "document", "context"))
        sizes = np.concatenate([queries, documents], axis=1)
        np.testing.assert_array_equal(text_sizes(held, "texts"), sizes)
        np.testing.assert_array_equal(text_sizes(held, "context"), context)
        np.testing.assert_array_equal(text_sizes(batch, "texts"), sizes)
        expected = step_flops(model().config, sizes, context, scores=batch["keep"].size)
        np.testing.assert_allclose(values["flops"], expected, rtol=1e-5)
        frozen = count_flops(model(), held, StepConfig(first_stage_rate=0.0))
        first_stage = encoding_flops(model().config.first_stage, context)
        np.testing.assert_allclose(frozen, expected - 2 * first_stage, rtol=1e-5)


def test_padding_is_counted_as_it_is_computed(plain):
    batches, (_, metrics, _) = plain
    kinds = ("query", "document", "context")
    for batch, held, values in zip(batches, in_chunks(batches), metrics, strict=True):
        tokens = sum(int(batch[f"{kind}_mask"].sum()) for kind in kinds)
        whole = sum(batch[f"{kind}_mask"].size for kind in kinds)
        assert {k: int(values[k]) for k in ("tokens", "computed_tokens")} == {
            "tokens": tokens,
            "computed_tokens": whole,
        }
        filled = StepConfig(query_chunk=3, document_chunk=5)  # 4 queries run as 6, 8 documents as 10
        extra = G * (2 * batch["query_mask"].shape[2] + 2 * LONGEST)
        assert int(count_tokens(batch, filled)["computed_tokens"]) == whole + extra
        counted = count_tokens(held, DROPOUT)
        rows = [m.reshape(-1, *m.shape[2:]) for name in ("texts", "context") for m in held[name]["mask"]]
        in_use = sum(chunk.size for chunks in rows for chunk in chunks if chunk.any())
        assert (int(counted["tokens"]), int(counted["computed_tokens"])) == (tokens, in_use)
        assert tokens < in_use < whole
