"""The table of published collections: complete, legal, and clear about what is not in it or not in the folder."""

from collections import Counter
from dataclasses import asdict

import pytest
from tiny_published import SETS, nomic_paired

from cde_jax.data.files import fingerprint
from cde_jax.data.sources import collections, tfds_pairs
from cde_jax.data.sources.collections import COLLECTIONS, PREFIXES


def groups() -> Counter:
    return Counter(name.split("/")[0] for name in COLLECTIONS)


def test_the_table_has_every_set_of_every_group():
    assert groups() == {
        "nomic-unsupervised": 29,
        "nomic-supervised": 10,
        "bge": 33,
        "msmarco": 1,
        "msmarco-hard-negatives": 1,
        "beir": 7,
    }
    assert tuple(groups()) == collections.GROUPS


def test_every_entry_is_legal():
    files = set()
    for name, each in COLLECTIONS.items():
        assert name.count("/") == 1, name
        assert {each.query_prefix, each.document_prefix} <= set(PREFIXES), name
        # A search has two sides; the other tasks compare texts of one kind.
        search = each.query_prefix.startswith("search")
        assert search == each.document_prefix.startswith("search"), name
        assert search or each.query_prefix == each.document_prefix, name
        assert len(each.columns) in (0, 2, 3), name
        assert not files & {each.files}, name
        files.add(each.files)


@pytest.mark.parametrize(
    ("group", "tasks"),
    [
        # As counted in the published configurations.
        ("nomic-unsupervised", {"clustering": 9, "classification": 12, "search_query": 8}),
        ("nomic-supervised", {"search_query": 4, "classification": 5, "clustering": 1}),
        ("bge", {"classification": 10, "search_query": 12, "clustering": 11}),
    ],
)
def test_each_group_has_the_prefixes_of_its_publisher(group, tasks):
    assert Counter(each.query_prefix for each in collections.select([group]).values()) == tasks


def test_the_table_says_what_the_publishers_do():
    """A digest of the table: every file, prefix and column of it was compared with the published configurations."""
    files = {name: len(each.files) for name, each in COLLECTIONS.items()}
    assert sum(files[name] for name in files if name.startswith("nomic-unsupervised/")) == 2412
    assert sum(files[name] for name in files if name.startswith("nomic-supervised/")) == 19
    assert files["nomic-unsupervised/reddit_title_body"] == 667 and files["nomic-supervised/msmarco"] == 5
    assert {each.columns for name, each in COLLECTIONS.items() if name.startswith("bge/")} == {("query", "pos", "neg")}
    digest = "191786e504fada7ca7713e00bfd651087bd93c055dec684933b2c893507af518"
    assert fingerprint({name: asdict(each) for name, each in COLLECTIONS.items()}) == digest


def test_each_format_has_a_reader_and_a_set_in_the_tests():
    used = {each.format for each in COLLECTIONS.values()}
    assert used == set(tfds_pairs.READERS) == {COLLECTIONS[name].format for name in SETS}


def test_a_group_stands_for_its_sets_and_names_are_taken_once_in_order():
    assert len(collections.select(["nomic-unsupervised"])) == 29
    names = ["bge/nq", "nomic-unsupervised/squad", "bge/nq"]
    assert list(collections.select(names)) == ["bge/nq", "nomic-unsupervised/squad"]
    assert len(collections.select(["nomic-unsupervised/squad", "nomic-unsupervised"])) == 29


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reddit_title_body", "did you mean nomic-unsupervised/reddit_title_body?"),
        ("nomic-unsupervised/redit_title_body", "did you mean nomic-unsupervised/reddit_title_body"),
        ("nomic-unsupervized", "did you mean nomic-unsupervised"),
        ("arguanna", "did you mean bge/arguana"),
        ("zzz", "known are nomic-unsupervised, nomic-supervised, bge, msmarco"),
    ],
)
def test_an_unknown_name_offers_the_nearest(name, message):
    with pytest.raises(ValueError, match=f"unknown collection '{name}'; {message}".replace("?", r"\?")):
        collections.select([name])


def test_no_names_is_an_error():
    with pytest.raises(ValueError, match="expected names of collections, got none"):
        collections.select([])


def test_prefixes_come_by_domain_in_the_form_that_stands_before_a_text():
    found = collections.prefixes(["nomic-unsupervised/paq", "bge/quora", "nomic-supervised/medi_wiki"])
    assert found == {
        "paq": ("search_query: ", "search_document: "),
        "quora": ("search_query: ", "search_query: "),
        "medi_wiki": ("classification: ", "classification: "),
    }


def test_two_sets_of_one_name_are_two_domains():
    names = ["nomic-unsupervised/quora", "bge/quora", "bge/nq"]
    assert list(collections.domains(names).values()) == ["nomic-unsupervised/quora", "bge/quora", "nq"]
    found = collections.prefixes(names)
    assert found["nomic-unsupervised/quora"] != found["bge/quora"]


def test_missing_shards_are_named(tmp_path):
    nomic_paired(tmp_path)
    paths = collections.find("nomic-unsupervised/wikipedia", tmp_path)
    assert len(paths) == 62 and paths == sorted(paths)
    for i in (3, 40):
        paths[i].unlink()
    with pytest.raises(ValueError, match=r"2 of its 62 files are not in .*shard-00003\.jsonl\.gz, .*shard-00040\.js"):
        collections.find("nomic-unsupervised/wikipedia", tmp_path)
    with pytest.raises(ValueError, match=r"62 of its 62 files .*, .*, .*, .*, .*shard-00004.* and 57 more; fetch them"):
        collections.find("nomic-unsupervised/wikipedia", tmp_path / "nowhere")


def test_missing_parquet_shards_are_told_from_the_others_names(tmp_path):
    SETS["bge/fever"](tmp_path)
    first, second = collections.find("bge/fever", tmp_path)
    first.unlink()
    with pytest.raises(ValueError, match=r"1 of its 2 files .*data/fever-00000-of-00002\.parquet"):
        collections.find("bge/fever", tmp_path)
    second.rename(second.with_name("fever-00001-of-00003.parquet"))
    with pytest.raises(ValueError, match=r"2 of its 3 files"):
        collections.find("bge/fever", tmp_path)
    first.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="found files of 2 different numberings"):
        collections.find("bge/fever", tmp_path)
    with pytest.raises(ValueError, match=r"expected .*data/nq-\*-of-\*\.parquet, found none; fetch the set"):
        collections.find("bge/nq", tmp_path)


def test_an_empty_file_is_named(tmp_path):
    SETS["msmarco/msmarco"](tmp_path)
    (tmp_path / "msmarco/qrels.train.tsv").write_bytes(b"")
    with pytest.raises(ValueError, match=r"qrels\.train\.tsv: the file is empty"):
        collections.find("msmarco/msmarco", tmp_path)
