"""Whitening: what a corpus' vectors have in common is taken from them; what stands in for queries."""

import numpy as np
import pytest

from cde_jax import CorpusStatistics, Whitening, pseudo_queries, whitening
from cde_jax.adapters.whitening import MAX_CHARACTERS, MEAN_FRACTION, SAMPLE_SIZE, STRENGTH


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def of_a_corpus(n=200, width=6, seed=0):
    """Unit vectors around different centres of queries and documents, that differ most along the first axis."""
    random = np.random.default_rng(seed)
    spread = np.array([2.0] + [0.3] * (width - 1))
    return tuple(unit(random.normal(size=(n, width)) * spread + random.normal(size=width)) for _ in range(2))


def test_a_direction_is_shortened_by_its_share_of_the_variance():
    queries, documents = of_a_corpus()
    found = whitening(queries, documents)
    around = np.concatenate([queries - queries.mean(axis=0), documents - documents.mean(axis=0)]).astype(np.float64)
    covariance = around.T @ around
    inverse = np.linalg.inv(found.matrix.astype(np.float64) @ found.matrix)
    np.testing.assert_allclose(inverse, np.eye(6) + STRENGTH * covariance / np.trace(covariance), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.matrix, found.matrix.T, atol=1e-6)


def test_the_defaults_are_those_that_were_measured():
    assert (MEAN_FRACTION, STRENGTH, SAMPLE_SIZE) == (0.75, 16.0, 512)


def test_each_kind_of_text_loses_a_share_of_its_own_centre():
    queries, documents = of_a_corpus()
    found = whitening(queries, documents, strength=0.0)
    for whitened, vectors in ((found.transform_queries, queries), (found.transform_documents, documents)):
        expected = unit(vectors - MEAN_FRACTION * vectors.mean(axis=0))
        np.testing.assert_allclose(whitened(vectors), expected, atol=1e-6)
        assert whitened(vectors).dtype == np.float32


def test_vectors_of_no_spread_and_single_ones_stay_finite_unit_vectors():
    one = unit(np.ones((1, 4)))
    found = whitening(one, -one)
    np.testing.assert_allclose(found.matrix, np.eye(4), atol=1e-6)
    np.testing.assert_allclose(found.transform_queries(one), one, atol=1e-6)
    np.testing.assert_allclose(whitening(one, one).transform_documents(one * 0), -one, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_whitening_does_not_depend_on_the_scale_of_the_spread(scale):
    queries, documents = of_a_corpus()
    wide = [(x - x.mean(axis=0)) * np.float32(scale) for x in (queries, documents)]
    np.testing.assert_allclose(whitening(*wide).matrix, whitening(queries, documents).matrix, atol=1e-4)


@pytest.mark.parametrize(("queries", "documents"), [(0, 3), (3, 0)])
def test_nothing_to_whiten_by_is_an_error(queries, documents):
    vectors = np.ones((3, 4), np.float32)
    with pytest.raises(ValueError, match=f"vectors of queries and documents, got {queries} and {documents}"):
        whitening(vectors[:queries], vectors[:documents])


def test_pseudo_queries_are_the_first_words_of_a_sample():
    names = ["".join(chr(ord("a") + int(digit)) for digit in f"{i:03}") for i in range(SAMPLE_SIZE + 50)]
    corpus = [f"a document named {name} " + "and so on " * 9 for name in names]
    found = pseudo_queries(corpus, seed=1)
    assert len(found) == SAMPLE_SIZE and found == pseudo_queries(corpus, seed=1) != pseudo_queries(corpus, seed=2)
    assert all(text.split() == corpus[names.index(text.split()[3])].split()[:12] for text in found)
    places = [names.index(text.split()[3]) for text in found]
    assert places == sorted(set(places))


def test_pseudo_queries_are_of_plain_words():
    code = 'numpy.linalg.solve(a, b)  """Solves A x = b, for the 2nd time: a well-known (LAPACK) "don’t care" x_1'
    assert pseudo_queries([code]) == ["b Solves A x b for the time a well-known LAPACK don’t"]


def test_pseudo_queries_of_few_short_and_unspaced_texts():
    assert pseudo_queries(["one", "two  words\n", "", "x_1 = 2"]) == ["one", "two words", "", "x_1 = 2"]
    assert pseudo_queries(["字" * 500]) == ["字" * MAX_CHARACTERS]


def test_a_saved_whitening_is_the_same(tmp_path):
    fitted = Whitening.fit(of_a_corpus(20, seed=1)[0], of_a_corpus()[1])
    fitted.save(tmp_path / "whitening.safetensors")
    for loaded, saved in zip(Whitening.load(tmp_path / "whitening.safetensors"), fitted, strict=True):
        np.testing.assert_array_equal(loaded, saved)
    with pytest.raises(ValueError, match="'cde_jax corpus statistics 1', got 'cde_jax whitening 1'"):
        CorpusStatistics.load(tmp_path / "whitening.safetensors")


def test_an_index_of_faiss_can_whiten_what_it_is_given():
    faiss = pytest.importorskip("faiss", reason="FAISS is not installed: its transforms were not run")
    queries, documents = of_a_corpus()
    fitted = Whitening.fit(queries, documents)
    index = faiss.IndexPreTransform(faiss.NormalizationTransform(6), faiss.IndexFlatIP(6))
    shift = faiss.LinearTransform(6, 6, True)  # for documents; queries have another mean, and come whitened
    faiss.copy_array_to_vector(fitted.matrix.ravel(), shift.A)
    faiss.copy_array_to_vector(np.float32(-MEAN_FRACTION) * fitted.document_mean @ fitted.matrix, shift.b)
    shift.is_trained = True
    index.prepend_transform(shift)
    index.add(documents)
    expected = fitted.transform_documents(documents)
    np.testing.assert_allclose(index.index.reconstruct_n(0, len(documents)), expected, atol=1e-6)
