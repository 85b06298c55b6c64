"""Docstrings, JSON lines and BEIR folders: what is read, in which order, and what each mistake says."""

import gzip
import json
import os
import sys
from functools import partial

import pytest

from cde_jax.data.pairs import Pair, clean
from cde_jax.data.sources import beir, docstrings, jsonl

REST = "Takes one argument and gives back another thing entirely, as written here"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that fails when it is imported, with tests and a broken file inside."""
    files = {
        "__init__.py": f'"""The little package of things.\n\n{REST} number zero."""\nraise RuntimeError("imported")\n',
        "_part/_impl.py": f'''
class Thing(object):
    """A thing to hold.

    Parameters
    ----------
    a : int
        {REST} in the class.
    """

    def method(self):
        """Does it well, with "\\d" inside.
        Args:
          a: {REST} in the method.
        """

    if True:
        def _hidden(self):
            """Hidden but useful helper.

            {REST} in the helper.
            """


def method(self):
    """DOES it well with "\\d" inside!

    {REST} again, with the query of another.
    """


def same():
    """Another summary of it.

    {REST} in the class. Parameters a: int
    """


def short():
    """Only this line of it."""
''',
        "broken.py": "def f(:\n",
        "tests/test_it.py": f'"""Tests are not read.\n\n{REST} in tests."""\n',
        "titled.py": f'"""\nlittle.titled\n=============\n\nThe words after title.\n\n{REST} after a title.\n"""\n',
    }
    for name, text in files.items():
        path = tmp_path / "site" / "little" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "site" / "single.py").write_text(f'"""One file is enough.\n\n{REST} in one file."""\n')
    monkeypatch.syspath_prepend(tmp_path / "site")
    return "little"


def test_docstrings_become_pairs_in_source_order_without_importing(package):
    counts = {}
    pairs = list(docstrings.read_pairs(["single", package], standard_library=False, counts=counts))
    assert pairs == [
        Pair("little", "The little package of things.", f"little {REST} number zero."),
        Pair("little", "A thing to hold.", f"little.Thing Parameters a : int {REST} in the class."),
        Pair("little", 'Does it well, with "\\d" inside.', f"little.Thing.method Args: a: {REST} in the method."),
        Pair("little", "Hidden but useful helper.", f"little.Thing._hidden {REST} in the helper."),
        Pair("little", "Another summary of it.", f"little.same {REST} in the class. Parameters a: int"),
        Pair("little", "The words after title.", f"little.titled {REST} after a title."),
        Pair("single", "One file is enough.", f"single {REST} in one file."),
    ]
    assert counts == {
        "files": 5,
        "unreadable files": 1,
        "docstrings": 9,
        "too short": 1,
        "repeated queries": 1,
        "repeated texts": 0,
        "pairs": 7,
    }
    assert package not in sys.modules
    assert pairs == list(docstrings.read_pairs([package, "single", package], standard_library=False))


def test_a_repeated_rest_is_dropped_across_packages(package, tmp_path):
    other = tmp_path / "site" / "zother.py"
    other.write_text(f'"""Quite another first line.\n\n{REST.upper()} in one file"""\n')
    counts = {}
    pairs = list(docstrings.read_pairs(["single", "zother"], standard_library=False, counts=counts))
    assert [pair.domain for pair in pairs] == ["single"] and counts["repeated texts"] == 1


def test_a_missing_package_is_named_before_anything_is_read():
    with pytest.raises(ValueError, match="'no_such_package' is not installed"):
        docstrings.read_pairs(["numpy", "no_such_package"], standard_library=False)
    with pytest.raises(ValueError, match="expected packages to read"):
        docstrings.read_pairs([], standard_library=False)


def test_the_core_is_the_closure_of_the_requirements_without_extras():
    core = docstrings.core_packages()
    assert list(core) == sorted(set(core))
    assert {"numpy", "scipy", "sklearn", "jax", "transformers", "urllib3"} <= set(core)  # urllib3 is indirect
    assert not {"torch", "pytest", "beartype", "hypothesis", "ruff", "cde_jax"} & set(core)
    assert set(core) | {"pytest"} <= set(docstrings.installed_packages())
    identity = docstrings.identity(["numpy", "sklearn"], False)
    assert identity["sklearn"].startswith("scikit-learn 1.")
    assert identity != docstrings.identity(["numpy", "sklearn"], True)
    with pytest.raises(ValueError, match="is not installed"):
        docstrings.core_packages("no-such-distribution")


def test_one_module_of_the_standard_library_is_a_domain(monkeypatch):
    monkeypatch.setattr(docstrings, "_standard_names", lambda: ["textwrap", "json", "sys"])
    pairs = list(docstrings.read_pairs([], standard_library=True))
    assert {pair.domain for pair in pairs} == {"textwrap", "json"}
    assert any(pair.document.startswith("textwrap.fill ") for pair in pairs)


def test_the_standard_library_is_named_without_its_tests():
    names = docstrings._standard_names()
    assert names == sorted(names) and {"asyncio", "collections", "json"} <= set(names)
    assert not {"test", "idlelib", "_thread"} & set(names)


@pytest.mark.slow
def test_the_core_gives_enough_pairs_and_domains(tmp_path):
    read = partial(docstrings.read_pairs, docstrings.core_packages(), standard_library=False)
    pairs = list(clean(read, {}, folder=tmp_path))
    assert len(pairs) >= 15_000
    assert len({pair.domain for pair in pairs}) >= 20


def test_the_table_of_domains_is_sorted_by_size():
    pairs = [Pair("a", "one two", "three"), Pair("bb", "x y z", "p q"), Pair("bb", "x", "p q")]
    lines = docstrings.domain_table(pairs).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["bb", "2", "3", "2"],
        ["a", "1", "2", "1"],
        ["2", "domains", "3", "2", "2"],
    ]


def test_an_evaluation_set_has_each_text_once_with_all_that_is_relevant():
    pairs = [Pair("a", "q one", "d one"), Pair("b", "q", "d"), Pair("a", "Q one!", "d two"), Pair("a", "q2", "D one")]
    found = docstrings.evaluation_set("a", pairs)
    assert found == beir.EvaluationSet(
        "a",
        {"q0": "q one", "q1": "q2"},
        {"d0": "d one", "d1": "d two"},
        {"q0": {"d0": 1, "d1": 1}, "q1": {"d0": 1}},
    )
    with pytest.raises(ValueError, match="'c' has no pairs"):
        docstrings.evaluation_set("c", pairs)


def test_json_lines_are_read_from_files_folders_and_patterns(tmp_path):
    first = {"query": "q1", "document": "d1", "negatives": ["n"], "id": 3}
    second = {"query": "q2", "document": "d2", "domain": "law"}
    (tmp_path / "b.jsonl").write_text(json.dumps(first) + "\n\n" + json.dumps(second))
    (tmp_path / "deep").mkdir()
    with gzip.open(tmp_path / "deep" / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps({"query": "ä", "document": "d3", "negatives": None}))
    expected = [Pair("b", "q1", "d1", ("n",)), Pair("law", "q2", "d2")]
    assert list(jsonl.read_pairs(tmp_path / "b.jsonl")) == expected
    expected.append(Pair("a", "ä", "d3"))
    assert list(jsonl.read_pairs(tmp_path)) == expected
    assert list(jsonl.read_pairs([str(tmp_path / "*.jsonl"), tmp_path])) == expected
    before = jsonl.identity([tmp_path])
    assert sorted(before) == ["b.jsonl", "deep/a.jsonl.gz"]
    (tmp_path / "b.jsonl").write_text(json.dumps(second))
    after = jsonl.identity([tmp_path])
    assert [name for name in after if after[name] != before[name]] == ["b.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "q", ', "broken JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"query": "q"}', r"expected the key 'document', found \['query'\]"),
        ('{"query": "q", "document": 3}', "expected text as 'document', got int: 3"),
        ('{"query": " ", "document": "d"}', "'query' has no text"),
        ('{"query": "q", "document": "d", "domain": ""}', "'domain' has no text"),
        ('{"query": "q", "document": "d", "negatives": "n"}', "expected a list of texts as 'negatives'"),
        ('{"query": "q", "document": "d", "negatives": [""]}', "'negatives' has no text"),
        ('{"query": "q", "document": "d", "negative": ["n"]}', "did you mean 'negatives'"),
        ('{"query": "\\ud800", "document": "d"}', "'query' is not valid Unicode"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_text('{"query": "q", "document": "d"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"x\.jsonl:3: .*{message}"):
        list(jsonl.read_pairs(tmp_path / "x.jsonl"))


def test_missing_empty_and_unreadable_files_are_named(tmp_path):
    for path in ("none.jsonl", "*.jsonl", "."):
        with pytest.raises(ValueError, match=r"expected \.jsonl or \.jsonl\.gz files, found none"):
            jsonl.read_pairs(tmp_path / path)
    with pytest.raises(ValueError, match="got none"):
        jsonl.read_pairs([])
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl: the file is empty"):
        jsonl.read_pairs(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: .*found no lines"):
        list(jsonl.read_pairs(tmp_path))
    for name, content in (("cut.jsonl.gz", gzip.compress(b'{"a": 1}' * 99)[:-9]), ("latin.jsonl", b"\xe4\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}:1: from here not readable"):
            list(jsonl.read_pairs(tmp_path / name))


SET = beir.EvaluationSet("set", {"q1": "one", "q2": "two"}, {"d1": "a b", "d2": ""}, {"q2": {"d1": 2, "d2": 0}})


def test_a_beir_folder_comes_back_as_written(tmp_path):
    beir.write(SET, tmp_path / "set")
    expected = beir.EvaluationSet("set", {"q2": "two"}, SET.corpus, SET.qrels)  # q1 has no qrels
    assert beir.read(tmp_path / "set") == expected
    beir.write(SET, tmp_path / "set")  # again, over the old one
    assert os.listdir(tmp_path) == ["set"]
    (tmp_path / "set" / "qrels" / "test.tsv").unlink()
    (tmp_path / "set" / "qrels.tsv").write_text("q2\td1\t2\nq2\td2\t0\n")  # no header line
    with open(tmp_path / "set" / "corpus.jsonl") as old, gzip.open(tmp_path / "set" / "corpus.jsonl.gz", "wt") as new:
        new.write(old.read().replace('"title": "", "text": "a b"', '"title": "a", "text": "b"'))
    (tmp_path / "set" / "corpus.jsonl").unlink()
    assert beir.read(tmp_path / "set") == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus.jsonl", None, "expected corpus.jsonl or corpus.jsonl.gz, found neither"),
        ("qrels/test.tsv", None, "expected qrels.tsv or qrels/test.tsv, found neither"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "test.tsv: expected lines of query id"),
        ("qrels/test.tsv", "q2\td1\t1\nq3\td1\t1\n", "test.tsv:2: names the query 'q3'"),
        ("qrels/test.tsv", "q2\td3\t1\n", "test.tsv:1: names the document 'd3'"),
        ("qrels/test.tsv", "q2\td1\t1\nq2\td1\tx\n", "test.tsv:2: expected an integer score, got 'x'"),
        ("qrels/test.tsv", "q2 d1 1\n", "test.tsv:1: expected query id, document id, score"),
        ("queries.jsonl", '{"_id": "q2", "text": "t"}\n{"_id": "q2"', "queries.jsonl:2: broken JSON"),
        ("queries.jsonl", '{"_id": "q2", "text": ""}', "queries.jsonl:1: 'text' has no text"),
        ("corpus.jsonl", '{"_id": "d", "text": ""}\n' * 2, "corpus.jsonl:2: the _id 'd' was there before"),
        ("corpus.jsonl", '{"_id": 1, "text": ""}', "corpus.jsonl:1: expected text as '_id', got int"),
    ],
)
def test_a_bad_beir_folder_is_named(tmp_path, name, content, message):
    beir.write(SET, tmp_path / "set")
    path = tmp_path / "set" / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=message):
        beir.read(tmp_path / "set")
