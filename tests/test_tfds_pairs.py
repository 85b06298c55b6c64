"""Published collections through TFDS: what is read, that it is built once and whole, and what each mistake says."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from tiny_published import SETS, gz_lines, lines, nomic, nomic_triplet

from cde_jax.data.files import read_json
from cde_jax.data.pairs import InputLog
from cde_jax.data.sources import tfds_pairs
from cde_jax.data.sources.collections import find, prefixes

TRIPLETS = "nomic-supervised/medi_wiki"


def read(name: str, root: Path) -> list:
    return list(tfds_pairs.read_pairs([name], root, root / "cache"))


@pytest.mark.parametrize("name", SETS)
def test_a_set_in_its_published_format_becomes_pairs_in_order(tmp_path, name):
    expected = SETS[name](tmp_path)
    assert read(name, tmp_path) == expected
    assert read(name, tmp_path) == expected


def test_several_sets_are_read_in_the_order_of_their_names(tmp_path):
    expected = SETS["beir/scifact"](tmp_path) + SETS[TRIPLETS](tmp_path)
    assert list(tfds_pairs.read_pairs(["beir/scifact", TRIPLETS], tmp_path, tmp_path / "cache")) == expected


def test_the_log_has_the_pairs_of_each_file_or_set(tmp_path):
    names = ["bge/fever", "beir/scifact"]
    for name in names:
        SETS[name](tmp_path)
    log = InputLog()
    for _ in range(2):
        list(tfds_pairs.read_pairs(names, tmp_path, tmp_path / "cache", log))
    scifact = " + ".join(f"beir/scifact/{file}" for file in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv"))
    fever = "bge-full-data/data/fever-0000{}-of-00002.parquet"
    assert log == InputLog({fever.format(0): 2, fever.format(1): 1, scifact: 3})


def test_sets_of_one_name_have_their_full_names_as_domains(tmp_path):
    names = ["msmarco", "msmarco-hard-negatives"]
    count = len(SETS["msmarco/msmarco"](tmp_path)) + len(SETS["msmarco-hard-negatives/msmarco"](tmp_path))
    found = list(tfds_pairs.read_pairs(names, tmp_path, tmp_path / "cache"))
    assert len(found) == count
    assert {pair.domain for pair in found} == set(prefixes(names)) == {f"{name}/msmarco" for name in names}


def test_the_data_set_is_one_that_tfds_reads(tmp_path):
    expected = nomic_triplet(tmp_path)
    builder = tfds_pairs.CollectionPairs(data_dir=tmp_path / "data", config="nomic-supervised.medi_wiki")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=tmp_path))
    source = builder.as_data_source("train")
    assert len(source) == 3 and list(source[2]["negatives"]) == [b"n2", b"n"]
    texts = [(row["query"], row["document"], *row["negatives"]) for row in source]
    assert texts == [tuple(t.encode() for t in (p.query, p.document, *p.negatives)) for p in expected]


def test_the_data_set_is_built_once_and_again_when_a_file_changes(tmp_path):
    expected = nomic_triplet(tmp_path)
    assert read(TRIPLETS, tmp_path) == expected
    built = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.array_record*")}
    assert read(TRIPLETS, tmp_path) == expected
    assert len(built) == 1 and all(path.stat().st_mtime_ns == when for path, when in built.items())
    os.utime(find(TRIPLETS, tmp_path)[0], ns=(0, 10**18))  # another file of the same size
    assert read(TRIPLETS, tmp_path) == expected
    assert all(path.stat().st_mtime_ns != when for path, when in built.items())
    before = tfds_pairs.identity([TRIPLETS], tmp_path)
    nomic(TRIPLETS, [{"query": "new", "pos": "d", "neg": []}], tmp_path)
    assert [pair.query for pair in read(TRIPLETS, tmp_path)] == ["new"]
    assert os.listdir(tmp_path / "cache" / "nomic-supervised") == ["medi_wiki"]
    assert sorted(os.listdir(tmp_path / "cache" / TRIPLETS)) == ["collection_pairs", "source.json"]
    after = tfds_pairs.identity([TRIPLETS], tmp_path)
    assert [key for key in after if after[key] != before[key]] == [
        "contrastive/medi_sts_wiki_rephrasal/shard-00000.jsonl.gz"
    ]


def test_the_same_files_give_the_same_bytes(tmp_path):
    SETS["bge/fever"](tmp_path)
    built = []
    for cache in ("one", "two"):
        list(tfds_pairs.read_pairs(["bge/fever"], tmp_path, tmp_path / cache))
        files = sorted((tmp_path / cache).rglob("*.array_record*"))
        built.append({path.name: path.read_bytes() for path in files})
    assert built[0] == built[1] and len(built[0]) == 2


def test_texts_come_back_as_they_were(tmp_path):
    odd = ["a\0", "  spaces ", "line\nbreak\r\n", "🜲 ünïcödé", "x" * 100_000, "ـ"]
    entries = [{"query": text, "pos": text + "d", "neg": odd[:i]} for i, text in enumerate(odd)]
    nomic(TRIPLETS, entries, tmp_path)
    expected = [(text, text + "d", tuple(odd[:i])) for i, text in enumerate(odd)]
    assert [tuple(pair)[1:] for pair in read(TRIPLETS, tmp_path)] == expected


def test_rows_without_text_are_left_out_and_counted(tmp_path, caplog):
    entries = [
        {"query": "", "pos": "d", "neg": []},
        {"query": "q", "pos": ["d", " ", "e"], "neg": ["", "n"]},
        {"query": "q", "pos": None, "neg": "n"},
    ]
    nomic(TRIPLETS, entries, tmp_path)
    assert [tuple(pair)[1:] for pair in read(TRIPLETS, tmp_path)] == [("q", "d", ("n",)), ("q", "e", ("n",))]
    left_out = {
        "hard negatives without text": 1,
        "rows whose document has no text": 2,
        "rows whose query has no text": 1,
    }
    assert read_json(tmp_path / "cache" / TRIPLETS / "source.json")["left out"] == left_out
    log = InputLog()
    list(tfds_pairs.read_pairs([TRIPLETS], tmp_path, tmp_path / "cache", log))
    assert log.left_out == {TRIPLETS: left_out}
    assert [record.getMessage() for record in caplog.records if record.name == tfds_pairs.__name__] == [
        f"{TRIPLETS}: 2 pairs; left out: {left_out}"
    ]
    nomic(TRIPLETS, entries[:1], tmp_path)
    with pytest.raises(ValueError, match=r"medi_wiki: expected pairs in .*, found none; left out: .*query has no text"):
        read(TRIPLETS, tmp_path)


ALONE = """
import socket, sys
from pathlib import Path
def refuse(*_): raise AssertionError("asked the network")
socket.socket.connect = socket.getaddrinfo = refuse
from cde_jax.data.sources import tfds_pairs
root = Path(sys.argv[1])
assert len(list(tfds_pairs.read_pairs(["msmarco/msmarco"], root, root / "cache"))) == 3
heavy = {"tensorflow", "apache_beam", "jax", "flax", "torch", "pandas", "datasets"} & set(sys.modules)
assert not heavy, heavy
"""


def test_neither_tensorflow_nor_a_network_is_needed(tmp_path):
    SETS["msmarco/msmarco"](tmp_path)
    done = subprocess.run([sys.executable, "-W", "error", "-c", ALONE, tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.usefixtures("usual_gc")
def test_memory_does_not_grow_with_the_rows(tmp_path):
    # One shard of 40 MB: TFDS would keep every example until the shard is written.
    text = "word " * 1000
    nomic(TRIPLETS, [{"query": f"{i}", "pos": text, "neg": [text] * 3} for i in range(2000)], tmp_path)
    tracemalloc.start()
    try:
        count = sum(1 for _ in tfds_pairs.read_pairs([TRIPLETS], tmp_path, tmp_path / "cache"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 2000 and peak < 15_000_000, peak


ENDLESS = """
import itertools, random, sys
from pathlib import Path
from cde_jax.data.sources import tfds_pairs
rows = ((str(i), random.randbytes(10_000).hex(), ()) for i in itertools.count())
tfds_pairs.READERS["nomic"] = lambda *_: rows
root = Path(sys.argv[1])
list(tfds_pairs.read_pairs([sys.argv[2]], root, root / "cache"))
"""


def test_a_kill_while_building_leaves_no_data_set(tmp_path):
    expected = nomic_triplet(tmp_path)
    with subprocess.Popen([sys.executable, "-c", ENDLESS, tmp_path, TRIPLETS]) as process:
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size for path in tmp_path.rglob("*.array_record*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    family = tmp_path / "cache" / "nomic-supervised"
    assert not (family / "medi_wiki").exists() and len(os.listdir(family)) == 1  # the unfinished one
    assert read(TRIPLETS, tmp_path) == expected
    assert os.listdir(family) == ["medi_wiki"]


FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n" + ENDLESS


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path):
    nomic_triplet(tmp_path)
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path, TRIPLETS], capture_output=True, text=True)
    assert "OSError: [Errno 27] File too large: the disk, quota or file-size limit is full" in done.stderr
    assert os.listdir(tmp_path / "cache" / "nomic-supervised") == []


def test_all_files_must_be_there_before_anything_is_built(tmp_path):
    SETS["beir/scifact"](tmp_path)
    for name, message in (
        ("bge/fever", "found none; fetch the set, or correct the folder"),
        ("nomic-supervised/reddit", "2 of its 2 files are not in"),
        ("beir/fever", r"3 of its 3 files .* beir/fever/corpus\.jsonl, beir/fever/queries\.jsonl, beir/fever/qrels"),
        ("bge/fewer", "unknown collection 'bge/fewer'; did you mean bge/fever"),
    ):
        with pytest.raises(ValueError, match=message):
            tfds_pairs.read_pairs(["beir/scifact", name], tmp_path, tmp_path / "cache")
        with pytest.raises(ValueError, match=message):
            tfds_pairs.identity(["beir/scifact", name], tmp_path)
    assert not (tmp_path / "cache").exists()


def cut_archive(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-12])


def cut_line(path: Path) -> None:
    with gzip.open(path, "rt") as file:
        content = file.read()
    with gzip.open(path, "wt") as file:
        file.write(content[: len(content) - 30])


def add(**changes):
    """Appends a line with these changes, None for a key that is taken out."""

    def change(path: Path) -> None:
        with gzip.open(path, "rt") as file:
            entries = [json.loads(line) for line in file]
        gz_lines(path, [*entries, {k: v for k, v in (entries[0] | changes).items() if v is not None}])

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_archive, r"shard-00000\.jsonl\.gz:\d: from here not readable \(Compressed file ended"),
        (cut_line, r"shard-00000\.jsonl\.gz:3: broken JSON"),
        (
            add(pos=None),
            r"shard-00000\.jsonl\.gz:4: expected the key 'pos', found \['metadata', 'neg', 'query', 'score'",
        ),
        (add(neg=None), r":4: expected the key 'neg'"),
        (add(query=7), r":4: expected text as 'query', got int: 7"),
        (add(query=["a", "b"]), r":4: expected one text as the query, got 2"),
        (add(neg=["n", {}]), r":4: expected text as 'hard negatives', got dict"),
        (add(pos="\ud800"), r":4: 'document' is not valid Unicode"),
        (
            add(metadata={"objective": {"paired": [["query", "pos"]], "triplet": []}}),
            r":4: expected the triplet objective with columns \['query', 'pos', 'neg'\], the line's metadata has",
        ),
    ],
)
def test_a_broken_shard_is_named_by_file_and_line_and_leaves_nothing(tmp_path, damage, message):
    nomic_triplet(tmp_path)
    damage(find(TRIPLETS, tmp_path)[0])
    with pytest.raises(ValueError, match=message):
        read(TRIPLETS, tmp_path)
    assert os.listdir(tmp_path / "cache" / "nomic-supervised") == []


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        (
            "msmarco/msmarco",
            "qrels.train.tsv",
            "7\t0\t3\n",
            r"qrels.*:1: expected query id, document id, score in 4 fields",
        ),
        ("msmarco/msmarco", "qrels.train.tsv", "7\t0\t3\tx\n", r":1: expected an integer score, got 'x'"),
        ("msmarco/msmarco", "qrels.train.tsv", "7\t0\t99\t1\n", r"qrels.*:1: names '99', which is not among the 30 of"),
        ("msmarco/msmarco", "qrels.train.tsv", "8\t0\t3\t1\n", r":1: names '8', which is not among the 3 of .*queries"),
        ("msmarco/msmarco", "collection.tsv", "0\ta\n1\tb\n0\tc\n", r"collection\.tsv:3: the id '0' is there twice"),
        ("msmarco/msmarco", "collection.tsv", "\n", r"names '3', which is not among the 0 of .*collection\.tsv"),
        (
            "msmarco/msmarco",
            "collection.tsv",
            "0\ta\n1 b\n",
            r"collection\.tsv:2: expected an id and a text with a tab",
        ),
        (
            "msmarco/msmarco",
            "collection.tsv",
            b"0\ta\n1\t\xff\n",
            r"collection\.tsv:1: from here not readable \('utf-8'",
        ),
        ("beir/scifact", "corpus.jsonl", '{"_id": "x", "text": "t"}\n{"_id": ', r"corpus\.jsonl:2: broken JSON"),
        ("beir/scifact", "corpus.jsonl", '{"id": "x"}', r"corpus\.jsonl:1: expected the key '_id', found \['id'\]"),
        ("beir/scifact", "corpus.jsonl", "[]", r"corpus\.jsonl:1: expected a JSON object, got list"),
        ("beir/scifact", "queries.jsonl", '{"_id": "0"}', r"queries\.jsonl:1: expected .*'text'|names '2'"),
        ("beir/scifact", "qrels/train.tsv", "2\tx\t1\n2\tx\tscore\n", r"train\.tsv:2: expected an integer score"),
    ],
)
def test_broken_tables_are_named_by_file_and_line(tmp_path, name, file, content, message):
    SETS[name](tmp_path)
    path = find(name, tmp_path)[0].parent / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read(name, tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"pos": [3], "neg": {}}, "expected the key 'qid'"),
        ({"qid": 7, "neg": {}}, "expected the key 'pos'"),
        ({"qid": 7, "pos": 3, "neg": {}}, "expected a list as 'pos', got 3"),
        ({"qid": 7, "pos": [3], "neg": [5]}, "expected lists of ids by system as 'neg'"),
        ({"qid": 7, "pos": [3], "neg": {"bm25": 5}}, "expected a list as 'bm25', got 5"),
        ({"qid": 7, "pos": [3], "neg": {"bm25": [{"pid": 5}]}}, "expected the key 'ce-score'"),
        ({"qid": 7, "pos": [3], "neg": {"bm25": [77]}}, "names '77', which is not among the 30"),
    ],
)
def test_broken_hard_negatives_are_named_by_line(tmp_path, entry, message):
    SETS["msmarco-hard-negatives/msmarco"](tmp_path)
    gz_lines(tmp_path / "msmarco/msmarco-hard-negatives.jsonl.gz", [{"qid": 7, "pos": [3], "neg": {}}, entry])
    with pytest.raises(ValueError, match=rf"negatives\.jsonl\.gz:2: {message}"):
        read("msmarco-hard-negatives/msmarco", tmp_path)


def test_broken_parquet_is_named(tmp_path):
    SETS["bge/fever"](tmp_path)
    path = find("bge/fever", tmp_path)[1]
    pq.write_table(pa.table({"query": ["q"], "pos": [["d"]]}), path)
    with pytest.raises(
        ValueError, match=r"fever-00001-of-00002.parquet: expected the columns \['neg'\], found \['query"
    ):
        read("bge/fever", tmp_path)
    pq.write_table(pa.table({"query": ["q", "r"], "pos": [["d"], [None]], "neg": [["n"], []]}), path)
    with pytest.raises(ValueError, match=r"of-00002\.parquet: row 2: expected text as 'document', got NoneType"):
        read("bge/fever", tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"of-00002\.parquet: not readable as Parquet"):
        read("bge/fever", tmp_path)


def test_a_shard_of_which_nothing_is_left_is_passed_over(tmp_path):
    (tmp_path / "bge-full-data/data").mkdir(parents=True)
    for i, query in enumerate(("", "a", "", "b", "c", "")):
        rows = pa.table({"query": [query], "pos": [["d"]], "neg": [["n"]]})
        pq.write_table(rows, tmp_path / f"bge-full-data/data/nq-{i:05d}-of-00006.parquet")
    assert [pair.query for pair in read("bge/nq", tmp_path)] == ["a", "b", "c"]


def test_qrels_without_a_header_line_are_read(tmp_path):
    SETS["beir/scifact"](tmp_path)
    lines(tmp_path / "beir/scifact/qrels/train.tsv", "1\tx\t1")
    assert [(pair.query, pair.document) for pair in read("beir/scifact", tmp_path)] == [("claim 1", "no title")]
