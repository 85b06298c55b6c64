"""The surrogate: LSA that can be stored without pickle, and vectors that are checked before they are kept."""

import numpy as np
import pytest
from tiny_pairs import bag_of_words, tiny_pairs
from tokenizers import Tokenizer, models, pre_tokenizers

from cde_jax.batching import surrogate
from cde_jax.batching.surrogate import Lsa, Texts, lsa, sentence_transformer, vectors_fingerprint, write_vectors

QUERIES = ["read a csv file", "write json to disk", "where the cat sat", "open a file", "plot a graph of nodes"]
DOCUMENTS = ["csv: parses a file", "json: dumps to disk", "the dog and the cat sat", "opens files", "graph and nodes"]


def fit(width=4, seed=0):
    return lsa(QUERIES, DOCUMENTS, width=width, seed=seed)


def test_vectors_are_units_and_nearest_to_the_text_on_the_same_matter():
    model = fit(8)
    queries, documents = model.encode(QUERIES), model.encode(DOCUMENTS)
    assert queries.dtype == np.float32 and queries.shape == (5, 8)
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-6)
    nearest = (queries @ documents.T).argmax(axis=1)
    assert nearest[[0, 1, 2, 4]].tolist() == [0, 1, 2, 4]


def test_a_text_without_known_words_has_zeros():
    np.testing.assert_array_equal(fit().encode(["", "zzz !", "?"]), np.zeros((3, 4), np.float32))
    assert fit().encode([]).shape == (0, 4)


def test_fitting_is_repeatable():
    np.testing.assert_array_equal(fit(seed=3).encode(QUERIES), fit(seed=3).encode(QUERIES))


def test_saved_and_loaded_gives_equal_vectors_without_pickle(tmp_path):
    model = fit()
    model.save(tmp_path / "lsa")
    loaded = Lsa.load(tmp_path / "lsa")
    np.testing.assert_array_equal(loaded.encode(QUERIES + DOCUMENTS), model.encode(QUERIES + DOCUMENTS))
    assert {path.suffix for path in (tmp_path / "lsa").iterdir()} == {".bin", ".json"}


def test_fewer_words_than_columns_leaves_zeros_in_the_rest(caplog):
    vectors = fit(width=64).encode(QUERIES)
    assert vectors.shape == (5, 64) and np.isfinite(vectors).all()
    assert "of 64 columns" in caplog.text


def test_texts_without_words_are_refused():
    with pytest.raises(ValueError, match=r"expected texts with words .* got 2 texts"):
        lsa(["!"], ["?"], width=4, seed=0)


def test_a_large_corpus_is_fitted_on_a_seeded_sample(monkeypatch):
    monkeypatch.setattr(surrogate, "FIT_TEXTS", 3)
    first, again = fit(), fit()
    assert len(first.words) < len(fit_words(QUERIES + DOCUMENTS))
    assert first.words == again.words


def fit_words(texts):
    return {word for text in texts for word in text.replace(":", "").split() if len(word) > 1}


@pytest.mark.parametrize("spec", ["word2vec", "sentence-transformers:", "checkpoint:runs/a"])
def test_an_unknown_model_is_named(spec):
    with pytest.raises(ValueError, match=f'"sentence-transformers:NAME" or "checkpoint:DIR", got {spec!r}'):
        sentence_transformer(spec)


@pytest.mark.slow  # imports torch
def test_a_sentence_transformer_gives_unit_vectors(tmp_path):
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    from sentence_transformers import SentenceTransformer

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "read": 1, "file": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    SentenceTransformer(modules=[modules.StaticEmbedding(words, embedding_dim=6)], device="cpu").save(str(tmp_path))
    vectors = sentence_transformer(f"sentence-transformers:{tmp_path}")(["read file", "file"])
    assert vectors.dtype == np.float32 and vectors.shape == (2, 6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_vectors_are_written_block_by_block(tmp_path, monkeypatch):
    pairs = tiny_pairs(tmp_path / "pairs")
    monkeypatch.setattr(surrogate, "BLOCK", 5)
    sizes = []

    def encode(texts):
        sizes.append(len(texts))
        return bag_of_words(texts)

    store = write_vectors(tmp_path / "vectors", pairs, encode, name="words", settings={"width": 13})
    assert max(sizes) == 5
    for array, text in (("queries", "query_text"), ("documents", "document_text")):
        expected = bag_of_words(list(Texts(pairs.ragged(text)))).astype(np.float16)
        np.testing.assert_array_equal(store.array(array), expected)
    assert len(store.array("queries")) == 36 and len(store.array("documents")) == 42
    assert store.manifest["pairs"] == pairs.fingerprint and store.manifest["surrogate"] == "words"
    assert store.fingerprint == vectors_fingerprint(pairs.fingerprint, "words", {"width": 13})
    assert store.fingerprint != vectors_fingerprint(pairs.fingerprint, "words", {"width": 14})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda v: np.where(np.arange(len(v))[:, None] == 2, np.nan, v), "1 vectors have NaN.*number 2"),
        (lambda v: v * 1e6, "float16 range"),
        (lambda v: v[:-1], r"expected vectors of shape \[\d+, (width|13)\], got"),
        (lambda v: v[:, : 5 if len(v) == 36 else None], r"documents from row 0: expected .*, 5\], got \[42, 13\]"),
    ],
)
def test_broken_vectors_are_refused_and_leave_nothing(tmp_path, spoil, message):
    pairs = tiny_pairs(tmp_path / "pairs")
    with pytest.raises(ValueError, match=message):
        write_vectors(tmp_path / "vectors", pairs, lambda t: spoil(bag_of_words(t)), name="words", settings={})
    assert [path.name for path in tmp_path.iterdir()] == ["pairs"]


def test_texts_read_from_a_store_are_the_texts(tmp_path):
    texts = Texts(tiny_pairs(tmp_path / "pairs").ragged("query_text"))
    assert len(texts) == 36 and texts[3] == texts[2:5][1] == list(texts)[3]
    with pytest.raises(IndexError):
        texts[36]
