"""The tokenizer: the same everywhere it is loaded, the same from the same texts, clear about a name it cannot get."""

import subprocess
import sys

import numpy as np
import pytest

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
    with pytest.raises(ValueError, match="0 characters"):
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
