"""Which context documents moved a margin: the gradient is right, and deleting what it names is better than chance."""

import dataclasses

import numpy as np
import pytest
from tiny_models import J
from tiny_retrieval import embedder, evaluation_set

from cde_jax.evaluation.attribution import LITTLE, context_rows, deletion_test, effects
from cde_jax.retrieval.embedder import Context

SEA = evaluation_set("sea", 16)
CORPUS, QUERIES = list(SEA.corpus.values()), list(SEA.queries.values())
TRIPLES = [(query, document, CORPUS[i - 1]) for i, (query, document) in enumerate(zip(QUERIES, CORPUS, strict=True))]


def margin(ours, context, query, document, other):
    q, d = ours.encode_queries([query], context)[0], ours.encode_documents([document, other], context)
    return float(q @ (d[0] - d[1]))


@pytest.mark.parametrize(("attention", "corpus"), [("joint", CORPUS), ("isolated", CORPUS), ("isolated", CORPUS[:3])])
def test_an_effect_is_the_slope_towards_the_mean_of_the_context(attention, corpus):
    ours = embedder(attention)
    context, step = ours.embed_context(corpus), 0.05
    found = effects(ours, context, *TRIPLES[0])
    assert len(found) == min(J, len(corpus))
    for document in range(len(found)):
        ends = []
        for sign in (1, -1):
            vectors = context.vectors.copy()
            vectors[document] += sign * step * (context.vectors.mean(axis=0) - vectors[document])
            moved = Context(vectors, 0, 0, context.weights, "")
            ends.append(margin(ours, moved, *TRIPLES[0]))
        assert (ends[1] - ends[0]) / (2 * step) == pytest.approx(found[document], abs=2e-4)


def test_the_effect_on_a_score_is_the_difference_of_a_margin():
    ours = embedder()
    context, (query, document, other) = ours.embed_context(CORPUS), TRIPLES[0]
    difference = effects(ours, context, query, document) - effects(ours, context, query, other)
    np.testing.assert_allclose(effects(ours, context, query, document, other), difference, atol=1e-5)


def test_effects_come_in_the_order_of_the_sampled_rows():
    ours = embedder()
    context = ours.embed_context(CORPUS, seed=5)
    rows = context_rows(ours, context)
    for row, vector in zip(rows, context.vectors, strict=True):
        np.testing.assert_allclose(ours.embed_context([CORPUS[row]] * J).vectors[0], vector, atol=1e-5)


@pytest.mark.parametrize("attention", ["joint", "isolated"])
def test_deleting_what_is_named_beats_chance_where_slots_matter(attention):
    ours = embedder(attention, context_size=12, slot_bias=None)
    found = deletion_test(ours, ours.embed_context(CORPUS), TRIPLES)
    assert found.counts == [1, 2, 4, 8] and found.attributed.shape == found.random.shape == (16, 4)
    assert found.same > LITTLE and found.gain[1] > 0 and "is better than chance" in found.verdict
    assert (found.attributed.mean(axis=0) > found.random.mean(axis=0)).all()


def test_the_falls_are_those_of_the_embedder_with_null_slots():
    ours = embedder()
    context = ours.embed_context(CORPUS)
    found = deletion_test(ours, context, TRIPLES[:1])
    best = effects(ours, context, *TRIPLES[0]).argmax()
    without = Context(np.delete(context.vectors, best, axis=0), 0, 0, context.weights, "")
    fall = margin(ours, context, *TRIPLES[0]) - margin(ours, without, *TRIPLES[0])
    assert found.attributed[0, 0] == pytest.approx(fall, abs=1e-5)


def test_it_says_so_where_slots_hardly_matter():
    ours = embedder(slot_bias=0.0)
    model = ours.model
    model.slot_bias[...] = np.full_like(model.slot_bias[...], -20.0)
    deaf = type(ours)(model, ours.tokenizer, ours.settings, progress=False)
    found = deletion_test(deaf, deaf.embed_context(CORPUS), TRIPLES)
    assert max(found.same, found.none) < LITTLE and "hardly matter" in found.verdict


def test_bad_input_is_named():
    ours = embedder()
    context = ours.embed_context(CORPUS)
    with pytest.raises(ValueError, match="a biencoder reads no context"):
        effects(embedder("biencoder"), context, *TRIPLES[0])
    whitened = dataclasses.replace(ours.embed_context(CORPUS, queries=QUERIES))
    with pytest.raises(ValueError, match="without queries and statistics"):
        effects(ours, whitened, *TRIPLES[0])
    with pytest.raises(ValueError, match="expected queries"):
        deletion_test(ours, context, [])
