"""The pair table: duplicates dropped and counted, every text stored, fingerprints that mean something."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cde_jax.data.pairs import Pair, clean, text_key, write_pairs
from cde_jax.data.store import Store
from cde_jax.data.tokens import Tokenizer

PAIRS = [
    Pair("b", "mean of an array", "numpy.mean the average of it", ("numpy.sum adds up", "numpy.max largest")),
    Pair("a", "sum of numbers", "math.fsum accurate sum"),
    Pair("b", "largest of all", "builtins.max largest item é", ("numpy.SUM adds up.", "x")),
]
SETTINGS = {
    "query_prefix": "search: ",
    "document_prefix": "text: ",
    "query_length": 8,
    "document_length": 12,
    "source": {"kind": "here"},
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([text for pair in PAIRS for text in (pair.query, pair.document, "search text")] * 5, 80)


def test_equal_texts_differ_in_case_space_and_punctuation_only():
    same = ["Foo_bar: baz", "foo bar baz", " FOO  bar\nbaz. ", "`foo` (bar) baz", "ｆoo bar baz"]
    assert len({text_key(text) for text in same}) == 1
    different = ["foo bar", "foobar baz", "C", "C++", "कि", "की", "!", "?", ""]
    assert len({text_key(text) for text in [*same, *different]}) == 1 + len(different)
    assert text_key("a=b") == text_key("a = b")


@given(st.text())
def test_keys_fit_64_bits_and_do_not_change(text):
    assert 0 <= text_key(text) < 1 << 64
    assert text_key(text) == text_key(text.upper().lower() if text.isascii() else text)


def test_duplicates_are_dropped_and_counted():
    pairs = [
        Pair("a", "one", "first text"),
        Pair("a", "One.", "First  text!"),  # both equal
        Pair("b", "two", "first text"),  # the document was there
        Pair("b", "one", "other text", ("Other text", "wrong")),  # the query was there: allowed
    ]
    counts = {}
    assert list(clean(pairs, counts)) == [pairs[0], pairs[3]._replace(negatives=("wrong",))]
    assert counts == {
        "read": 4,
        "duplicate pairs": 1,
        "duplicate documents": 1,
        "negatives equal to the positive": 1,
        "kept": 2,
    }
    counts = {}
    assert len(list(clean(pairs, counts, unique_documents=False))) == 3
    assert counts["duplicate documents"] == 0


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (Pair("a", " ", "text"), "pair 1 of domain 'a' has no text as its query .*'text'"),
        (Pair("a", "q", ""), "pair 1 of domain 'a' has no text as its document .*'q'"),
        (Pair("a", "q", "d", ("",)), "pair 1 of domain 'a' has a hard negative without text"),
    ],
)
def test_a_pair_without_text_is_named(pair, message, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message):
        list(clean([PAIRS[0], pair], {}))
    with pytest.raises(ValueError, match=message):
        write_pairs(tmp_path / "pairs", [PAIRS[0], pair], tokenizer, **SETTINGS)
    with pytest.raises(ValueError, match="expected pairs, there are none"):
        write_pairs(tmp_path / "pairs", [], tokenizer, **SETTINGS)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("block", [1, 2, 4096])
def test_every_text_is_stored_with_its_tokens_keys_and_negatives(tokenizer, tmp_path, monkeypatch, block):
    monkeypatch.setattr("cde_jax.data.pairs._BLOCK", block)
    write_pairs(tmp_path / "pairs", iter(PAIRS), tokenizer, counts={"read": 5}, **SETTINGS)
    store = Store.open(tmp_path / "pairs", kind="pairs")
    queries = [pair.query for pair in PAIRS]
    documents = [*(pair.document for pair in PAIRS), "numpy.sum adds up", "numpy.max largest", "x"]
    for name, texts, prefix, length in (("query", queries, "search: ", 8), ("document", documents, "text: ", 12)):
        ragged, tokens = store.ragged(f"{name}_text"), store.ragged(f"{name}_tokens")
        assert [ragged.text(i) for i in range(ragged.count())] == texts
        expected = tokenizer.encode([prefix + text for text in texts], length)
        assert tokens.values.dtype == np.uint16
        assert [tokens.row(i).tolist() for i in range(tokens.count())] == [row.tolist() for row in expected]
        assert store.array(f"{name}_key").tolist() == [text_key(text) for text in texts]
    assert [store.ragged("negatives").row(i).tolist() for i in range(3)] == [[3, 4], [], [3, 5]]
    assert store.array("domain").tolist() == [0, 1, 0]
    manifest = store.manifest
    assert manifest["domains"] == [{"name": "b", "pairs": 2}, {"name": "a", "pairs": 1}]
    assert (manifest["pairs"], manifest["documents"], manifest["counts"]) == (3, 6, {"read": 5})
    assert manifest["source"] == {"kind": "here"} and manifest["tokenizer"] == tokenizer.fingerprint
    full = [len(row) for row in tokenizer.encode(["search: " + query for query in queries], 100)]
    statistics = manifest["tokens"]["query"]
    assert statistics["p50"] == sorted(full)[1]
    assert statistics["truncated"] == round(sum(length > 8 for length in full) / 3, 4) > 0


def test_the_fingerprint_follows_pairs_order_and_settings(tokenizer, tmp_path):
    def written(pairs, **changes):
        return write_pairs(tmp_path / "pairs", pairs, tokenizer, **(SETTINGS | changes)).fingerprint

    first = written(PAIRS)
    assert written(PAIRS, source={"kind": "elsewhere"}) == first
    others = [
        written(PAIRS[::-1]),
        written(PAIRS[:2]),
        written([PAIRS[0]._replace(negatives=()), *PAIRS[1:]]),
        written(PAIRS, query_prefix=""),
        written(PAIRS, document_length=9),
    ]
    assert len({first, *others}) == 6


def test_data_needs_no_device_library():
    code = (
        "import sys; import cde_jax.data.pairs, cde_jax.data.sources.docstrings\n"
        "print([name for name in ('jax', 'flax', 'torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
