"""Hybrid vectors: dense ⊕ lexical in one vector."""

import numpy as np
import pytest

from cde_jax import CorpusStatistics, HybridVectors
from cde_jax.adapters.hybrid import LARGER_WEIGHTS, WEIGHTS, best_choice, choose_weights
from cde_jax.data.store import unit_rows

WORDS = [f"word{letter}{other}" for letter in "abcdefghij" for other in "klmnop"]
D = 8


def texts_of(count: int, seed: int, length: int = 12) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, length)) for _ in range(count)]


def unit(count: int, seed: int, width: int = D) -> np.ndarray:
    return unit_rows(np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32))


CORPUS, QUERIES = texts_of(40, 0), texts_of(10, 1, 3)
DOCUMENT_VECTORS, QUERY_VECTORS = unit(40, 2), unit(10, 3)
STATISTICS = CorpusStatistics.fit(CORPUS)


def fitted(**options) -> HybridVectors:
    return HybridVectors.fit(STATISTICS, DOCUMENT_VECTORS, CORPUS, QUERY_VECTORS, **options)


def bm25() -> np.ndarray:
    return (STATISTICS.query_weights(QUERIES) @ STATISTICS.document_weights(CORPUS).T).toarray()


def scores(hybrid: HybridVectors) -> np.ndarray:
    documents = hybrid.transform_documents(DOCUMENT_VECTORS, CORPUS)
    return hybrid.transform_queries(QUERY_VECTORS, QUERIES) @ documents.T


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)]))


@pytest.mark.parametrize("width", [D + 3, 2 * D, 64])
def test_vectors_have_unit_norm_and_the_width_asked_for(width):
    hybrid = fitted(width=width)
    queries = hybrid.transform_queries(QUERY_VECTORS, QUERIES)
    documents = hybrid.transform_documents(DOCUMENT_VECTORS, CORPUS)
    assert queries.shape == (10, width) and documents.shape == (40, width)
    assert queries.dtype == documents.dtype == np.float32
    for vectors in (queries, documents):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_weight_zero_gives_the_dense_scores():
    expected = QUERY_VECTORS @ DOCUMENT_VECTORS.T
    got = scores(fitted(weight=0.0))
    np.testing.assert_allclose(got / np.abs(got).max(), expected / np.abs(expected).max(), atol=1e-6)


def test_weight_one_gives_bm25_where_the_width_suffices():
    got = scores(fitted(weight=1.0, width=D + 1 + 60, latent_fraction=1.0))  # 60 words, 40 documents: rank 40
    assert correlation(got, bm25()) > 0.9999


def test_random_signs_approach_bm25_with_the_width():
    narrow, wide = (
        correlation(scores(fitted(weight=1.0, width=D + 1 + width, latent_fraction=0.0)), bm25())
        for width in (16, 2048)
    )
    assert 0.3 < narrow < 0.9 and wide > 0.98


def test_learned_directions_are_closer_to_bm25_than_random_ones():
    learned, random = (
        correlation(scores(fitted(weight=1.0, width=D + 1 + 24, latent_fraction=part)), bm25()) for part in (2 / 3, 0.0)
    )
    assert learned > random + 0.1


def test_both_scores_count_in_units_of_their_spread():
    hybrid = fitted(weight=0.3, width=D + 1 + 60, latent_fraction=1.0)
    lexical, dense = bm25(), QUERY_VECTORS @ DOCUMENT_VECTORS.T
    mixed = 0.7 * dense / dense.std() + 0.3 * lexical / lexical.std(axis=1, keepdims=True)
    assert correlation(scores(hybrid), mixed) > 0.9999


def test_words_of_like_vectors_share_weight():
    vectors = dict(zip(WORDS, unit(len(WORDS), 5, 60), strict=True))
    vectors[WORDS[1]] = vectors[WORDS[0]]
    options = {"width": D + 1 + 60, "latent_fraction": 0.0, "weight": 1.0}
    query = [WORDS[0]], np.ones((1, D), np.float32)
    only_synonym = [i for i, text in enumerate(CORPUS) if WORDS[1] in text and WORDS[0] not in text]
    neither = [i for i, text in enumerate(CORPUS) if WORDS[1] not in text and WORDS[0] not in text]
    gaps = []
    for term_vectors in (None, lambda words: np.stack([vectors[word] for word in words])):
        hybrid = fitted(term_vectors=term_vectors, **options)
        documents = hybrid.transform_documents(DOCUMENT_VECTORS, CORPUS)
        row = (hybrid.transform_queries(query[1], query[0]) @ documents.T)[0]
        gaps.append((row[only_synonym].mean() - row[neither].mean()) / row.std())
    assert gaps[1] > gaps[0] + 0.5


def test_terms_that_came_after_the_fit_are_still_found():
    statistics = STATISTICS.update(["zeppelin"])
    hybrid = HybridVectors.fit(
        statistics, DOCUMENT_VECTORS, CORPUS, QUERY_VECTORS, weight=1.0, width=64, latent_fraction=0.5
    )
    documents = hybrid.transform_documents(unit(2, 4), ["zeppelin " + CORPUS[0], CORPUS[0]])
    first, second = (hybrid.transform_queries(unit(1, 5), ["zeppelin"]) @ documents.T)[0]
    assert first > second + 0.1


def test_a_query_without_known_words_keeps_its_dense_part():
    hybrid = fitted()
    vector = hybrid.transform_queries(QUERY_VECTORS[:1], ["zeppelin"])[0]
    np.testing.assert_allclose(vector[:D], QUERY_VECTORS[0], atol=1e-6)
    np.testing.assert_array_equal(vector[D:], 0)


def test_another_weight_leaves_the_documents_as_they_are():
    hybrid = fitted(weight=0.1)
    other = hybrid.with_weight(0.4)
    np.testing.assert_array_equal(*(each.transform_documents(DOCUMENT_VECTORS, CORPUS) for each in (hybrid, other)))
    assert not np.array_equal(*(each.transform_queries(QUERY_VECTORS, QUERIES) for each in (hybrid, other)))


def test_by_default_each_query_has_the_weight_of_its_features():
    hybrid = fitted()
    weights = choose_weights(hybrid.query_features(QUERY_VECTORS, QUERIES))
    assert set(weights.tolist()) <= set(np.float32(WEIGHTS).tolist())
    single = [
        hybrid.with_weight(float(weight)).transform_queries(QUERY_VECTORS[i : i + 1], QUERIES[i : i + 1])[0]
        for i, weight in enumerate(weights)
    ]
    np.testing.assert_allclose(hybrid.transform_queries(QUERY_VECTORS, QUERIES), single, atol=1e-6)


def test_features_are_the_number_of_terms_and_the_agreement_of_both_scores():
    hybrid = fitted(width=D + 1 + 60, latent_fraction=1.0)
    features = hybrid.query_features(QUERY_VECTORS, QUERIES)
    np.testing.assert_allclose(features[:, 0], np.log1p([len(set(query.split())) for query in QUERIES]), rtol=1e-6)
    pairs = zip(QUERY_VECTORS @ DOCUMENT_VECTORS.T, bm25(), strict=True)
    np.testing.assert_allclose(features[:, 1], [np.corrcoef(a, b)[0, 1] for a, b in pairs], atol=1e-3)


def test_the_chosen_weight_is_the_smallest_with_nearly_the_largest_predicted_gain(monkeypatch):
    monkeypatch.setattr(
        "cde_jax.adapters.hybrid.GAIN_MODEL", np.array([[0, 5, 8, 9.1, 10, 9], [0] * 6, [0, 0, 0, 0, 0, 5]])
    )
    np.testing.assert_allclose(choose_weights(np.array([[1.0, 0.0], [1.0, 1.0]])), [0.2, 0.3], rtol=1e-6)
    monkeypatch.setattr("cde_jax.adapters.hybrid.GAIN_MODEL", np.array([[0, -1, -1, -1, -1, -1], [0] * 6, [0] * 6]))
    assert choose_weights(np.array([[1.0, 0.5]])) == 0


@pytest.mark.parametrize(("lexical", "expected"), [(True, LARGER_WEIGHTS[-1]), (False, 0.0)])
def test_labels_choose_the_weight_of_what_finds_the_documents(lexical, expected):
    corpus = texts_of(300, 5, 4)
    vectors, rows = unit(300, 6), np.arange(80)
    hybrid = HybridVectors.fit(CorpusStatistics.fit(corpus), vectors, corpus, unit(50, 7), width=D + 1 + 60)
    documents = hybrid.transform_documents(vectors, corpus)
    texts, queries = (corpus[:80], unit(80, 8)) if lexical else (texts_of(80, 9, 4), vectors[:80])
    chosen = hybrid.fit_weight(queries, texts, documents, np.stack([rows, rows], axis=1))
    assert chosen.weight == expected
    few = hybrid.fit_weight(queries, texts, documents, {0: {1: 1}, 1: {0: 1}})  # neither is found
    assert few.weight is None


def test_a_weight_that_is_not_clearly_better_than_one_by_query_is_not_chosen():
    scores = np.array([[0.5, 0.6, 0.4], [0.5, 0.6, 0.4], [0.5, 0.55, 0.4], [0.5, 0.55, 0.4]])
    assert best_choice(scores) == 1
    scores[0, 1], scores[1, 1] = 1.0, 0.1  # the mean is still the greatest
    assert scores[:, 1].mean() > 0.5 and best_choice(scores) == 0


def test_documents_of_very_many_terms_keep_the_norm():
    hybrid = fitted()
    vectors = hybrid.transform_documents(DOCUMENT_VECTORS[:1], [" ".join(WORDS)])
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors), 1, atol=1e-6)


def test_a_sample_of_a_large_corpus_is_enough(monkeypatch, tmp_path):
    monkeypatch.setattr("cde_jax.adapters.hybrid.FIT_DOCUMENTS", 30)
    np.save(tmp_path / "vectors.npy", DOCUMENT_VECTORS.astype(np.float16))
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    hybrid = HybridVectors.fit(STATISTICS, mapped, CORPUS, QUERY_VECTORS, weight=0.3)
    assert len(hybrid.buckets) <= len(WORDS)
    got = hybrid.transform_queries(QUERY_VECTORS, QUERIES) @ hybrid.transform_documents(mapped, CORPUS).T
    assert correlation(got, scores(fitted(weight=0.3))) > 0.8


def test_saved_vectors_are_the_same(tmp_path):
    hybrid = fitted(weight=0.25, seed=3)
    hybrid.save(tmp_path / "a.safetensors")
    loaded = HybridVectors.load(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(scores(loaded), scores(hybrid))
    fitted().save(tmp_path / "b.safetensors")
    assert HybridVectors.load(tmp_path / "b.safetensors").weight is None
    with pytest.raises(ValueError, match="expected the format 'cde_jax corpus statistics 1', got 'cde_jax hybrid"):
        CorpusStatistics.load(tmp_path / "b.safetensors")


def test_one_seed_gives_one_result_and_another_another():
    np.testing.assert_array_equal(scores(fitted(seed=3)), scores(fitted(seed=3)))
    assert not np.array_equal(*(scores(fitted(seed=seed, latent_fraction=0.0, weight=0.5)) for seed in (3, 4)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": D}, "width: expected an integer of 11 or more"),
        ({"weight": 1.5}, "weight: expected a number from 0"),
        ({"seed": -1}, "seed: expected an integer of 0 or more"),
        ({"latent_fraction": 2.0}, "latent_fraction: expected a number from 0 to 1"),
        ({"term_vectors": lambda words: np.ones((1, 4))}, "term_vectors: expected one vector a word, got 1"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fitted(**options)


def test_arrays_and_texts_must_belong_together():
    with pytest.raises(ValueError, match="documents: expected one vector a text, got 40 vectors and 39 texts"):
        HybridVectors.fit(STATISTICS, DOCUMENT_VECTORS, CORPUS[1:], QUERY_VECTORS)
    with pytest.raises(ValueError, match="queries: expected one vector a text, got 10 vectors and 1 texts"):
        fitted().transform_queries(QUERY_VECTORS, ["one"])
    with pytest.raises(ValueError, match="expected vectors of width 8, got 5"):
        fitted().transform_queries(unit(10, 0, 5), QUERIES)
    with pytest.raises(ValueError, match="NaN"):
        fitted().transform_documents(DOCUMENT_VECTORS * np.nan, CORPUS)
