"""The pair table: duplicates dropped and counted, every text stored, fingerprints that mean something."""

import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cde_jax.data.pairs import InputLog, Pair, clean, write_pairs
from cde_jax.data.store import Store
from cde_jax.data.tokens import Tokenizer, as_list, has_text, text_key

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


def test_duplicates_are_dropped_and_counted(tmp_path):
    pairs = [
        Pair("a", "one", "first text"),
        Pair("a", "One.", "First  text!"),  # both equal
        Pair("b", "two", "first text"),  # shares a document: kept
        Pair("b", "one", "other text", ("Other text", "wrong")),  # shares a query: kept
    ]
    counts = {}
    kept = [pairs[0], pairs[2], pairs[3]._replace(negatives=("wrong",))]
    assert list(clean(pairs, counts, folder=tmp_path)) == kept
    assert counts == {"read": 4, "duplicate pairs": 1, "negatives equal to the positive": 1, "kept": 3}


def cleaned(pairs):
    """`clean` as it is defined, with everything seen in memory."""
    seen, kept = set(), []
    for pair in pairs:
        document = text_key(pair.document)
        both = (text_key(pair.query), document)
        if both not in seen:
            seen.add(both)
            kept.append(pair._replace(negatives=tuple(t for t in pair.negatives if text_key(t) != document)))
    return kept


TEXTS = st.sampled_from(["a", "A!", "b", "c", "d", "a b", "A  b"])
SOME_PAIRS = st.lists(st.builds(Pair, st.sampled_from("xy"), TEXTS, TEXTS, st.lists(TEXTS, max_size=2).map(tuple)))


@settings(deadline=None)
@given(pairs=SOME_PAIRS)
def test_cleaning_through_the_disk_is_cleaning_in_memory(tmp_path_factory, pairs):
    counts, folder = {}, tmp_path_factory.mktemp("clean")
    got = list(clean(iter(pairs), counts, folder=folder))
    kept = cleaned(pairs)
    assert got == kept
    left_out = sum(len(pair.negatives) for pair in first_of_each(pairs)) - sum(len(pair.negatives) for pair in kept)
    assert counts == {
        "read": len(pairs),
        "duplicate pairs": len(pairs) - len(kept),
        "negatives equal to the positive": left_out,
        "kept": len(kept),
    }
    assert os.listdir(folder) == []


def first_of_each(pairs):
    return list({(text_key(p.query), text_key(p.document)): p for p in reversed(pairs)}.values())


@pytest.mark.usefixtures("usual_gc")
def test_memory_of_cleaning_does_not_grow_with_the_pairs(tmp_path):
    def peak(n):
        tracemalloc.start()
        kept = sum(
            1 for _ in clean((Pair("a", f"q{i % (n // 2)}", f"d{i % (n // 2)}") for i in range(n)), {}, folder=tmp_path)
        )
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert kept == n // 2
        return most

    peak(100)  # what is made once: type checkers
    # Less than one Python number a pair; what is left is the 2000 free tuples that Python keeps for itself.
    # SQLite's own memory is not seen here: tests/test_store.py measures it.
    assert peak(9000) - peak(3000) < 24 * 6000


SOME_NEGATIVES = st.lists(
    st.tuples(st.sampled_from("xy"), st.lists(st.sampled_from(["a", "A.", "b", "c", "d e"]), max_size=4)), min_size=1
)


@settings(deadline=None, max_examples=50)
@given(rows=SOME_NEGATIVES, block=st.integers(1, 5))
def test_negatives_are_kept_once_by_prefix_and_pairs_point_to_them(tmp_path_factory, tokenizer, rows, block):
    pairs = [Pair(domain, "q", "d", tuple(negatives)) for domain, negatives in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cde_jax.data.pairs._BLOCK", block)
        prefixes = {"x": ("", "x "), "y": ("", "y ")}
        store = write_pairs(tmp_path_factory.mktemp("new") / "p", pairs, tokenizer, prefixes=prefixes, **SETTINGS)
    expected = {}
    for domain, text in ((domain, text) for domain, negatives in rows for text in negatives):
        expected.setdefault((domain, text_key(text)), text)
    texts, listed = store.ragged("document_text"), store.ragged("negatives")
    assert [texts.text(i) for i in range(len(pairs), texts.count())] == list(expected.values())
    places = {key: i for i, key in enumerate(expected, len(pairs))}
    assert [listed.row(i).tolist() for i in range(len(pairs))] == [
        list(dict.fromkeys(places[domain, text_key(text)] for text in negatives)) for domain, negatives in rows
    ]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (Pair("a", "\u200b\u2060\x07", "text"), "pair 1 of domain 'a' has no text as its query"),
        (Pair("a", "q", "d", ("d2", "\ufeff")), "has no text as its hard negative"),
        (Pair("a", " ", "text"), "pair 1 of domain 'a' has no text as its query .*'text'"),
        (Pair("a", "q", ""), "pair 1 of domain 'a' has no text as its document .*'q'"),
        (Pair("a", "q", "d", ("",)), "pair 1 of domain 'a' has no text as its hard negative"),
    ],
)
def test_a_pair_without_text_is_named(pair, message, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message):
        list(clean([PAIRS[0], pair], {}, folder=tmp_path))
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


@pytest.mark.parametrize(("size", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_token_ids_are_stored_in_two_bytes_as_long_as_they_fit(tokenizer, tmp_path, monkeypatch, size, dtype):
    monkeypatch.setattr(Tokenizer, "vocab_size", size)
    assert write_pairs(tmp_path / "pairs", PAIRS, tokenizer, **SETTINGS).array("query_tokens.values").dtype == dtype


def test_length_statistics_are_those_of_all_lengths(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("cde_jax.data.pairs._BLOCK", 2)
    pairs = [Pair("a", "sum " * (i % 5 + 1), "of numbers " * (i + 1)) for i in range(9)]
    manifest = write_pairs(tmp_path / "pairs", pairs, tokenizer, **SETTINGS).manifest
    for name, prefix, limit in (("query", "search: ", 8), ("document", "text: ", 12)):
        texts = [prefix + getattr(pair, name) for pair in pairs]
        lengths = np.array([len(row) for row in tokenizer.encode(texts, 1000)])
        assert manifest["tokens"][name] == {
            "mean": round(lengths.mean(), 2),
            "min": lengths.min(),
            "p50": np.percentile(lengths, 50, method="inverted_cdf"),
            "p95": np.percentile(lengths, 95, method="inverted_cdf"),
            "max": lengths.max(),
            "truncated": round((lengths > limit).mean(), 4),
        }


def test_a_domain_has_prefixes_of_its_own_and_its_negatives_too(tokenizer, tmp_path):
    pairs = [
        Pair("b", "mean", "average", ("x", "sum")),
        Pair("a", "largest", "item", ("X!", "x", "sum")),
        Pair("c", "sum", "array", ("sum", "x")),
    ]
    prefixes = {"a": ("find ", "of "), "none": ("no ", "none ")}
    store = write_pairs(tmp_path / "pairs", pairs, tokenizer, prefixes=prefixes, **SETTINGS)
    texts, tokens, queries = (store.ragged(name) for name in ("document_text", "document_tokens", "query_tokens"))
    documents = [("text: ", "average"), ("of ", "item"), ("text: ", "array")]
    documents += [("text: ", "x"), ("text: ", "sum"), ("of ", "X!"), ("of ", "sum")]
    assert [texts.text(i) for i in range(texts.count())] == [text for _, text in documents]
    encoded = tokenizer.encode([prefix + text for prefix, text in documents], 12)
    assert [tokens.row(i).tolist() for i in range(tokens.count())] == [row.tolist() for row in encoded]
    encoded = tokenizer.encode(["search: mean", "find largest", "search: sum"], 8)
    assert [queries.row(i).tolist() for i in range(3)] == [row.tolist() for row in encoded]
    assert [store.ragged("negatives").row(i).tolist() for i in range(3)] == [[3, 4], [5, 6], [4, 3]]
    assert store.manifest["prefixes"] == {
        "query": "search: ",
        "document": "text: ",
        "domains": {"a": {"query": "find ", "document": "of "}},
    }


def test_long_work_shows_a_bar_and_short_work_none(tokenizer, tmp_path, monkeypatch, capsys):
    def work():
        pairs = clean(PAIRS, {}, folder=tmp_path)
        write_pairs(tmp_path / "pairs", pairs, tokenizer, **SETTINGS)
        return capsys.readouterr()

    assert work() == ("", "")
    monkeypatch.setattr("cde_jax.data.pairs.BAR_AFTER", 0)
    assert all(what in work().err for what in ("tokenizing", "listing hard negatives", "tokenizing hard negatives"))


def test_the_fingerprint_follows_pairs_order_and_settings(tokenizer, tmp_path):
    def written(pairs, **changes):
        return write_pairs(tmp_path / "pairs", pairs, tokenizer, **(SETTINGS | changes)).fingerprint

    first = written(PAIRS)
    assert written(PAIRS, source={"kind": "elsewhere"}) == first
    assert written(PAIRS, counts={"read": 4}, inputs=InputLog({"moved.jsonl": 3}, {"x.csv": "why"})) == first
    others = [
        written(PAIRS[::-1]),
        written(PAIRS[:2]),
        written([PAIRS[0]._replace(negatives=()), *PAIRS[1:]]),
        written(PAIRS, query_prefix=""),
        written(PAIRS, document_length=9),
        written(PAIRS, prefixes={"a": ("ask ", "text: ")}),
        written(PAIRS, prefixes={"a": ("search: ", "ask ")}),
        written(PAIRS, prefixes={"b": ("search: ", "ask ")}),
        written([PAIRS[0], PAIRS[1]._replace(document="math.fsum accurate sun"), PAIRS[2]]),
        written([PAIRS[0]._replace(query="mean of arrays"), *PAIRS[1:]]),
        written([PAIRS[0]._replace(domain="a"), *PAIRS[1:]]),
        written([PAIRS[0]._replace(negatives=PAIRS[0].negatives[::-1]), *PAIRS[1:]]),
        written(PAIRS, query_length=7),
        written(PAIRS, document_prefix="text"),
    ]
    assert len({first, *others}) == 15
    more = Tokenizer.train(["mean of an array"] * 9, 60)
    assert write_pairs(tmp_path / "other", PAIRS, more, **SETTINGS).fingerprint != first
    assert written(PAIRS, prefixes={"c": ("ask ", "")}) == first


def test_the_manifest_lists_what_was_read_and_skipped(tokenizer, tmp_path, caplog):
    log = InputLog()
    log.skip("x.csv", "its name")
    log.skip("x.csv", "its name")
    log.finish("a.jsonl", 3, {"rows without text": 2, "none of these": 0})
    log.finish("a.jsonl", 3, {"rows without text": 2, "none of these": 0})
    assert [record.getMessage() for record in caplog.records] == [
        "x.csv is not read: its name",
        "a.jsonl: 3 pairs; left out: {'rows without text': 2}",
    ]
    store = write_pairs(tmp_path / "pairs", PAIRS, tokenizer, inputs=log, **SETTINGS)
    assert store.manifest["inputs"] == {
        "pairs": {"a.jsonl": 3},
        "skipped": {"x.csv": "its name"},
        "left_out": {"a.jsonl": {"rows without text": 2}},
    }


def test_texts_unknown_to_the_tokenizer_are_warned_of_with_the_number(tokenizer, tmp_path, caplog):
    plain = SETTINGS | {"query_prefix": "", "document_prefix": ""}
    write_pairs(tmp_path / "pairs", [pair._replace(negatives=()) for pair in PAIRS], tokenizer, **plain)
    assert not caplog.records
    write_pairs(tmp_path / "pairs", [Pair("a", "中文", "mean")], tokenizer, **plain)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "50 % of the query tokens, prefix included, are unknown to the tokenizer (2 of 4)"
    )


@pytest.mark.parametrize("text", ["", " \n\t", "\u200b", "\u200d\ufeff\u00ad", "\x00\x1b", "\u2028"])
def test_spaces_control_and_zero_width_characters_are_no_text(text):
    assert not has_text(text)
    assert has_text(text + "!") and has_text("é" + text) and has_text("中")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text", "got a single one, 'one text'; write"),
        (b"bytes", "got a single one"),
        ({"a", "b"}, "got a set, whose order is arbitrary; give a list"),
        ({"a": 1}.keys(), "got a dict_keys, whose order"),
        ({"a": "b"}, "got a dict, whose order"),
        (["a", 3], "got int as item 1: 3"),
        (["a", None], "got NoneType as item 1"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(texts, message):
    with pytest.raises(ValueError, match=f"queries: expected a list of texts, {message}"):
        as_list(texts, "queries")
    assert as_list(iter(["a", "b"]), "queries") == as_list(np.array(["a", "b"]), "queries") == ["a", "b"]


def test_data_needs_no_device_library():
    code = (
        "import sys; import cde_jax.data.pairs; from cde_jax.data.sources import docstrings, huggingface\n"
        "print([name for name in ('jax', 'flax', 'torch', 'transformers', 'faiss') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
