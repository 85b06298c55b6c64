"""Docstrings, JSON lines and BEIR folders: what is read, in which order, and what each mistake says."""

import gzip
import json
import os
import pickle
import sys

import pytest

from cde_jax.data import files
from cde_jax.data.pairs import InputLog, Pair, clean
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
    counts, log = {}, InputLog()
    pairs = list(docstrings.read_pairs(["single", package], standard_library=False, counts=counts, log=log))
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
    assert log.pairs == {"little": 6, "single": 1}
    assert (
        list(log.skipped) == ["little.broken (broken.py)"] and "SyntaxError" in log.skipped["little.broken (broken.py)"]
    )
    assert package not in sys.modules
    assert pairs == list(docstrings.read_pairs([package, "single", package], standard_library=False))


def test_many_files_are_parsed_by_tasks_to_the_same_pairs(package, monkeypatch):
    asked = []

    def in_processes(function, tasks):  # which get and give pickles
        asked.extend(tasks)
        return (pickle.loads(pickle.dumps(function(task))) for task in pickle.loads(pickle.dumps(asked)))

    monkeypatch.setattr(docstrings, "BLOCK", 2)
    expected = list(docstrings.read_pairs([package, "single"], standard_library=False, map_tasks=in_processes))
    assert not asked
    monkeypatch.setattr(docstrings, "PARALLEL_FILES", 5)
    assert list(docstrings.read_pairs([package, "single"], standard_library=False, map_tasks=in_processes)) == expected
    assert [len(block) for block in asked] == [2, 2, 1]


def test_which_files_definitions_and_lengths_count(tmp_path, monkeypatch):
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]  # what the rest of a docstring needs
    short = f'"""Three words here.\n\n{" ".join(words[:7])} 8 """'
    names = ("test_a", "a_test", "conftest", "b")
    files = {f"sub/{name}.py": f'"""From the file {name}.\n\n{name} {REST}"""' for name in names}
    files |= {
        "__init__.py": f'"""Two words.\n\n{REST}"""\ntry:\n    pass\nexcept E:\n    pass\nelse:\n    def f(): {short}\n'
        f'if X:\n    pass\nelse:\n    def g(): """Just three words.\n\n{" ".join(words)}"""\n',
    }
    for name, text in files.items():
        path = tmp_path / "cases" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    counts = {}
    pairs = list(docstrings.read_pairs(["cases"], standard_library=False, counts=counts))
    assert [pair.query for pair in pairs] == ["Just three words.", "From the file b."]
    assert (counts["files"], counts["docstrings"], counts["too short"]) == (2, 4, 2)


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
    with pytest.raises(ValueError, match="packages: expected a list of texts, got a single one, 'numpy'"):
        docstrings.read_pairs("numpy", standard_library=False)


def test_the_core_packages_are_a_fixed_list_of_those_installed(monkeypatch, caplog):
    core = docstrings.core_packages()
    assert list(core) == sorted(set(core))
    assert {"numpy", "scipy", "sklearn", "jax", "transformers", "urllib3", "faiss"} <= set(core)
    assert not {"torch", "pytest", "beartype", "hypothesis", "ruff", "cde_jax"} & set(core)
    assert set(core) | {"pytest"} <= set(docstrings.installed_packages())
    # Neither requirements nor distributions decide: `faiss` may come from faiss-cpu or faiss-gpu, and not be required.
    monkeypatch.setattr("importlib.metadata.distributions", lambda: iter(()))
    monkeypatch.setattr("importlib.metadata.requires", None)
    monkeypatch.setattr("importlib.metadata.distribution", None)
    assert docstrings.core_packages() == core
    spec = docstrings._spec
    monkeypatch.setattr(docstrings, "_spec", lambda name: None if name == "faiss" else spec(name))
    caplog.clear()
    assert docstrings.core_packages() == tuple(name for name in core if name != "faiss")
    assert "faiss" in caplog.text and "numpy" not in caplog.text


def test_the_identity_of_packages_is_their_versions():
    identity = docstrings.identity(["numpy", "sklearn"], False)
    assert identity["sklearn"].startswith("scikit-learn 1.")
    assert identity != docstrings.identity(["numpy", "sklearn"], True)


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
    read = docstrings.read_pairs(docstrings.core_packages(), standard_library=False)
    pairs = list(clean(read, {}, folder=tmp_path))
    assert len(pairs) >= 15_000
    assert len({pair.domain for pair in pairs}) >= 20


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


FIRST = {"query": "q1", "document": "d1", "negatives": ["n"], "id": 3}
SECOND = {"query": "q2", "document": "d2", "domain": "law"}


@pytest.fixture
def lines_folder(tmp_path):
    """`data/` with b.jsonl of two pairs and deep/a.jsonl.gz of one."""
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.jsonl").write_text(json.dumps(FIRST) + "\n\n" + json.dumps(SECOND))
    with gzip.open(folder / "deep" / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps({"query": "ä", "document": "d3", "negatives": None}))
    return folder


def test_json_lines_are_read_from_files_folders_and_patterns(lines_folder):
    expected = [Pair("b", "q1", "d1", ("n",)), Pair("law", "q2", "d2")]
    assert list(jsonl.read_pairs(lines_folder / "b.jsonl")) == expected
    expected.append(Pair("a", "ä", "d3"))
    assert list(jsonl.read_pairs(lines_folder)) == expected
    assert list(jsonl.read_pairs([str(lines_folder / "*.jsonl"), lines_folder])) == expected
    assert list(jsonl.read_pairs([str(lines_folder / "**" / "*.jsonl*")])) == expected


def test_files_of_a_folder_are_read_in_the_order_of_their_names(tmp_path, monkeypatch):
    for name in ("c", "a/z", "b", "a/y"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text('{"query": "q", "document": "d"}')
    walk, pattern = os.walk, files.glob
    monkeypatch.setattr(os, "walk", lambda *a, **k: reversed([(p, f[::-1], n[::-1]) for p, f, n in walk(*a, **k)]))
    monkeypatch.setattr(files, "glob", lambda *a, **k: pattern(*a, **k)[::-1])
    assert [pair.domain for pair in jsonl.read_pairs(tmp_path)] == ["y", "z", "b", "c"]
    assert [pair.domain for pair in jsonl.read_pairs(str(tmp_path / "**/*.jsonl"))] == ["y", "z", "b", "c"]


def test_the_identity_of_files_is_their_content_and_order_wherever_they_are(lines_folder, tmp_path):
    before = jsonl.identity([lines_folder])
    assert list(before) == ["b.jsonl", "deep/a.jsonl.gz"]
    assert jsonl.identity(lines_folder / "b.jsonl") == {"b.jsonl": before["b.jsonl"]}
    two = [lines_folder / "b.jsonl", lines_folder / "deep"]
    assert jsonl.identity(two) == {"1:b.jsonl": before["b.jsonl"], "2:a.jsonl.gz": before["deep/a.jsonl.gz"]}
    assert jsonl.identity(two[::-1]) != jsonl.identity(two)  # the pairs come in another order
    assert list(jsonl.identity([lines_folder / "b.jsonl", lines_folder])) == ["1:b.jsonl", "2:deep/a.jsonl.gz"]
    moved = lines_folder.rename(tmp_path / "moved")
    assert jsonl.identity([moved]) == before == jsonl.identity(str(moved / "**" / "*.jsonl*"))
    (moved / "b.jsonl").write_text(json.dumps(SECOND))
    after = jsonl.identity([moved])
    assert [name for name in after if after[name] != before[name]] == ["b.jsonl"]


def test_the_log_has_the_pairs_of_each_file_and_why_others_are_skipped(lines_folder, tmp_path, caplog):
    (lines_folder / "C.JSONL").write_text(json.dumps(SECOND))  # read: the case of the ending does not matter
    (lines_folder / "notes.txt").touch()
    (lines_folder / "more.json").write_text("{}")
    (lines_folder / "linked").symlink_to(tmp_path)
    log = InputLog()
    for _ in range(2):
        assert len(list(jsonl.read_pairs(lines_folder, log))) == 4
    assert log.pairs == {"b.jsonl": 2, "C.JSONL": 1, "deep/a.jsonl.gz": 1}
    assert log.skipped.keys() == {"notes.txt", "more.json", "linked"}
    assert log.skipped["notes.txt"] == "its name does not end in .jsonl or .jsonl.gz"
    assert log.skipped["linked"].startswith("a folder, or a link to one; name it")
    assert sorted(record.args[0] for record in caplog.records) == ["linked", "more.json", "notes.txt"]
    log = InputLog()
    assert len(list(jsonl.read_pairs([lines_folder / "C.JSONL", f"{lines_folder}/[bd]*"], log))) == 3
    assert log.pairs == {"1:C.JSONL": 1, "2:b.jsonl": 2} and list(log.skipped) == ["2:deep"]


def test_a_folder_in_which_nothing_can_be_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"found none \(other files: \['a.json'\]\); correct the path"):
        jsonl.read_pairs(tmp_path)
    (tmp_path / "x.jsonl").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path, f"{tmp_path}/x*"):
        with pytest.raises(ValueError, match=r"x\.jsonl: expected a file, got a link to nothing"):
            jsonl.read_pairs(path)
    (tmp_path / "x.jsonl").unlink()
    (tmp_path / "x.jsonl").write_text('{"query": "q", "document": "d"}')
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may be run by root, who may read everything
    with pytest.raises(ValueError, match=r"x\.jsonl: this process may not read it; change its permissions"):
        jsonl.read_pairs(tmp_path)
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    (tmp_path / "deep").mkdir()
    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(ValueError, match=r"deep: the folder is not readable \(Permission denied"):
        jsonl.read_pairs(tmp_path)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ("", "path: expected a path, got ''; the current folder is '.'"),
        (" ", "expected a path, got ' '"),
        (["a.jsonl", ""], "expected a path, got ''|found none"),
        ("a\0b", "expected a path"),
        ({"a.jsonl", "b.jsonl"}, "paths: expected a list of texts, got a set, whose order is arbitrary"),
    ],
)
def test_what_is_no_path_is_refused(paths, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"query": "q", "document": "d"}')
    with pytest.raises(ValueError, match=message):
        jsonl.read_pairs(paths)
    assert len(list(jsonl.read_pairs("."))) == 1


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
        ('{"query": "\\u200b\\u0000", "document": "d"}', "'query' has no text"),
        ('{"query": "q", "document": "d", "negatives": ["\\ufeff"]}', "'negatives' has no text"),
        ('{"Query": "q", "document": "d"}', "unknown key 'Query'; did you mean 'query'"),
        ('{"query": "q", "document": "d", "Domain": "x"}', "unknown key 'Domain'; did you mean 'domain'"),
        ('{"query": "q", "document": "d", " negatives": ["n"]}', "did you mean 'negatives'"),
        ('{"query": "q", "document": "d", "NEG": ["n"]}', "did you mean 'negatives'"),
        ('{"query": "q", "document": "d", "query": "r"}', "the key 'query' is there twice"),
        ('{"query": "q", "document": "d", "negatives": ""}', "expected a list of texts as 'negatives', got ''"),
        ('{"query": "q", "document": "d", "negatives": 0}', "expected a list of texts as 'negatives', got 0"),
        ('{"query": "q", "document": "d", "negatives": {}}', "expected a list of texts as 'negatives', got {}"),
        ('{"query": "q", "document": "d", "negatives": ["n", 3]}', "expected text as 'negatives', got int"),
        ("[" * 10**5, "broken JSON .*recursion"),
        ('{"query": ' + "1" * 5000 + "}", "broken JSON .*digits"),
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
        ("qrels/test.tsv", "", "test.tsv: expected lines of query id"),
        ("qrels/test.tsv", "q2\td1\tx\nq2\td2\t1\n", "test.tsv:1: expected an integer score, got 'x'"),
        ("qrels/test.tsv", "q2\td1\t1.0\n", "test.tsv:1: expected an integer score, got '1.0'"),
        ("qrels/test.tsv", "q2\td1\t0\nq2\td2\t-1\n", "with scores above 0, found none"),
        ("qrels/test.tsv", "q2\td1\t1\nq2\td1\t1\n", "test.tsv:2: the query 'q2' with the document 'd1' was there"),
        ("queries.jsonl", '{"_id": "q2", "text": "\\u200b"}', "queries.jsonl:1: 'text' has no text"),
        ("queries.jsonl", '{"_id": "q2", "text": "t"}\n' * 2, "queries.jsonl:2: the _id 'q2' was there before"),
        ("corpus.jsonl", '{"_id": "d", "text": null}', "corpus.jsonl:1: expected text as 'text', got NoneType"),
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


def test_a_qrels_link_to_nothing_is_named(tmp_path):
    beir.write(SET, tmp_path / "set")
    (tmp_path / "set/qrels.tsv").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"qrels\.tsv: expected a file, got a link to nothing"):
        beir.read(tmp_path / "set")
    with pytest.raises(ValueError, match="evaluation set: expected a path, got ''"):
        beir.read("")


def test_evaluation_sets_of_one_name_are_refused_before_they_are_read(tmp_path, monkeypatch):
    for name in ("a", "b"):
        beir.write(SET, tmp_path / name)
    assert [found.name for found in beir.read_sets([tmp_path / "a", f"{tmp_path}/b/"])] == ["a", "b"]
    monkeypatch.chdir(tmp_path / "b")
    assert beir.read(".").name == "b"
    with pytest.raises(ValueError, match=r"expected evaluation sets of different names, got 2 of the name 'b': \["):
        beir.read_sets([tmp_path / "a", tmp_path / "nowhere/b", "."])
