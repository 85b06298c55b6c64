"""The tokenizer: the same everywhere it is loaded, the same from the same texts, clear about a name it cannot get."""

import subprocess
import sys
import time

import huggingface_hub
import numpy as np
import pytest

from cde_jax.data import tokens
from cde_jax.data.files import read_json, write_json
from cde_jax.data.tokens import Tokenizer

TEXTS = [f"Compute the {word} of an array, élément {i}." for i in range(20) for word in ("mean", "sum", "sine")]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 90)


def test_rows_begin_and_end_with_the_special_tokens_and_are_cut_before_the_last(tokenizer):
    cls_id, sep_id = (tokenizer.backend.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    rows, lengths = tokenizer.encode_counted(["The mean", "", "the sum of an array"], 5)
    assert [row.dtype for row in rows] == [np.int32] * 3
    assert all(row[0] == cls_id and row[-1] == sep_id for row in rows)
    assert [len(row) for row in rows] == [min(length, 5) for length in lengths]
    assert lengths[1] == 2 and lengths[2] > 5
    whole = tokenizer.encode(["the sum of an array"], 100)[0]
    np.testing.assert_array_equal(rows[2][:-1], whole[:4])
    assert tokenizer.pad_id == 0 and max(row.max() for row in rows) < tokenizer.vocab_size
    with pytest.raises(ValueError, match="more than the 2 special tokens"):
        tokenizer.encode(["a"], 2)


def test_training_twice_in_other_processes_gives_the_same_vocabulary(tokenizer):
    code = f"from cde_jax.data.tokens import Tokenizer; print(Tokenizer.train({TEXTS!r}, 90).fingerprint)"
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == tokenizer.fingerprint


def test_a_saved_tokenizer_loads_the_same_here_and_in_transformers(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.pad_token_id == tokenizer.pad_id and theirs.mask_token == "[MASK]"
    for text in TEXTS[:3]:
        assert theirs(text)["input_ids"] == again.encode([text], 64)[0].tolist()
        assert theirs(text, truncation=True, max_length=6)["input_ids"] == again.encode([text], 6)[0].tolist()


def test_a_name_on_the_hub_is_read_without_transformers(tokenizer, tmp_path, monkeypatch):
    repository = tmp_path / "models--us--plain"
    tokenizer.save(repository / "snapshots/abc")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it is an ImportError
    assert Tokenizer.load("us/plain").fingerprint == tokenizer.fingerprint
    (repository / "snapshots/abc/tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"'us/plain': the repository has no tokenizer\.json; transformers makes"):
        Tokenizer.load("us/plain")


def test_a_tokenizer_without_its_config_is_read_and_one_without_padding_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.load(tmp_path).specials == tokenizer.specials
    write_json(tmp_path / "tokenizer_config.json", {"pad_token": {"content": "<nothing>"}})
    with pytest.raises(ValueError, match="padding token"):
        Tokenizer.load(tmp_path)


def test_broken_and_unreachable_tokenizers_are_named(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    entries = read_json(tmp_path / "tokenizer.json")
    write_json(tmp_path / "tokenizer.json", entries | {"model": {"type": "?"}})
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match=r"'nobody/nothing-of-the-kind'.*give the path of a folder"):
        Tokenizer.load("nobody/nothing-of-the-kind")


def test_a_vocabulary_smaller_than_the_alphabet_is_refused():
    with pytest.raises(ValueError, match="vocab_size 10"):
        Tokenizer.train(TEXTS, 10)
    with pytest.raises(ValueError, match="texts of 0 different characters"):
        Tokenizer.train([], 100)


def test_texts_that_can_be_read_again_are_not_held_in_memory():
    class Texts:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(["open the file", "close the file"] * 3)

    texts = Texts()
    trained = Tokenizer.train(texts, 60)
    assert texts.passes == 2
    assert trained.fingerprint == Tokenizer.train(iter(["open the file", "close the file"] * 3), 60).fingerprint


def test_overlong_words_are_left_out_of_the_vocabulary_and_take_no_time():
    plain = Tokenizer.train(TEXTS, 90)
    started = time.process_time()
    trained = Tokenizer.train([*TEXTS, "mean" * 75_000, "x" * 1001], 92)
    assert time.process_time() - started < 10  # 35 s when it was part of the training
    assert trained.encode(["mean" * 75_000], 8)[0].tolist() == trained.encode(["[UNK]"], 8)[0].tolist()
    assert set(plain.backend.get_vocab()) - set(trained.backend.get_vocab()) == set()
    assert set(trained.backend.get_vocab()) - set(plain.backend.get_vocab()) == {"x", "##x"}
    assert max(map(len, Tokenizer.train(["y" * 1000] * 9, 40).backend.get_vocab())) == 1000


def test_a_vocabulary_that_hardly_holds_the_alphabet_is_warned_of(caplog):
    Tokenizer.train(["abcdefgh"] * 9, 43)
    assert not caplog.records
    Tokenizer.train(["abcdefgh"] * 9, 41)
    (record,) = caplog.records
    said = "vocab_size 41 is small for these texts: 21 tokens are single characters, 20 are left for words"
    assert record.getMessage().startswith(said) and record.getMessage().endswith("Use 210 or more")


def test_an_absurd_vocabulary_is_refused_before_memory_is_reserved():
    with pytest.raises(ValueError, match="vocab_size 1000000000000: expected at most 16777216"):
        Tokenizer.train(TEXTS, 10**12)


def test_what_is_no_list_of_texts_is_refused(tokenizer):
    for texts in ("one text", {"a", "set"}):
        for call in (lambda: tokenizer.encode(texts, 8), lambda: Tokenizer.train(texts, 90)):  # noqa: B023
            with pytest.raises(ValueError, match="texts: expected a list of texts, got a s"):
                call()


def test_a_tokenizer_that_was_deleted_or_altered_is_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"gone: expected a folder with tokenizer\.json, there is none; it was moved"):
        Tokenizer.load(tmp_path / "gone")
    with pytest.raises(ValueError, match="tokenizer: expected a path, got ''"):
        Tokenizer.load("")
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: expected a JSON object, got list"):
        Tokenizer.load(tmp_path)


def test_truncation_and_padding_kept_in_a_file_do_not_act(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    limited = Tokenizer.load(tmp_path).backend
    limited.enable_truncation(3)
    limited.enable_padding(length=9)
    (tmp_path / "tokenizer.json").write_text(limited.to_str())
    texts = [TEXTS[0], "a"]
    for again, expected in zip(Tokenizer.load(tmp_path).encode(texts, 64), tokenizer.encode(texts, 64), strict=True):
        np.testing.assert_array_equal(again, expected)


def test_the_most_frequent_characters_get_a_token_of_their_own(monkeypatch):
    monkeypatch.setattr(tokens, "_ALPHABET", 2)
    with pytest.raises(ValueError, match="texts of 2 different characters need more than 9"):
        Tokenizer.train(["aaa bb z"], 9)
    vocabulary = Tokenizer.train(["aaa bb z"], 10).backend.get_vocab()
    assert {"a", "b", "##a", "##b"} < set(vocabulary) and "z" not in vocabulary


def test_words_encoded_each_once_give_the_ids_of_whole_texts(tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "_MOST_WORDS", 300)
    odd = "aé ü中\t\n\r\x0b\x1c\x85\u00a0\u3000\u200b\u0301\u0323\ud7a3İß.-A\x00\ufffd"
    random = np.random.default_rng(0)
    mixed = ["".join(random.choice([*odd, "[MASK]", "sum ", "mean"], 30)) for _ in range(200)]
    for text in (mixed, mixed[::-1], TEXTS, [""]):
        whole = [encoding.ids for encoding in tokenizer.backend.encode_batch_fast(text)]
        assert [row.tolist() for row in tokenizer.encode(text, 200)] == whole
    assert tokenizer._words and len(tokenizer._words) <= 300 + 200 * 30
    library = Tokenizer(type(tokenizer.backend).from_str(tokenizer.backend.to_str()), tokenizer.specials)
    library.backend.add_tokens(["two words"])  # which lie on both sides of a space
    assert not Tokenizer(library.backend, tokenizer.specials)._word_by_word
