"""Hugging Face data sets and Parquet by path: columns under other names, splits, and what each mistake says."""

import json
import sys
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cde_jax.data.pairs import InputLog, Pair
from cde_jax.data.sources import huggingface

COLUMNS = ("query=question", "document=answer", "negatives=hard", "domain=source")
ROWS = [
    {"question": "q0", "answer": "d0", "hard": ["n0", "n1"], "source": "law"},
    {"question": "q1", "answer": "d1", "hard": [], "source": "art"},
    {"question": "q2", "answer": "d2", "hard": None, "source": "law"},
]
PAIRS = [Pair("law", "q0", "d0", ("n0", "n1")), Pair("art", "q1", "d1"), Pair("law", "q2", "d2")]


def parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture
def repository(tmp_path):
    """A folder as a data set's repository on the Hub has it: Parquet shards by split."""
    parquet(tmp_path / "faq/data/train-00000-of-00002.parquet", ROWS[:2])
    parquet(tmp_path / "faq/data/train-00001-of-00002.parquet", ROWS[2:])
    parquet(tmp_path / "faq/data/test-00000-of-00001.parquet", ROWS[1:2])
    return tmp_path / "faq"


def read(*paths, columns=COLUMNS):
    return list(huggingface.read_pairs([str(path) for path in paths], columns))


def test_parquet_files_are_read_by_name_and_pattern(repository):
    data = repository / "data"
    assert read(data / "train-00001-of-00002.parquet", data / "test-00000-of-00001.parquet") == [PAIRS[2], PAIRS[1]]
    assert read(data / "train-*.parquet") == PAIRS
    assert read(data / "*.parquet") == [PAIRS[1], *PAIRS]


def test_a_folder_is_read_by_split(repository):
    assert read(repository) == PAIRS
    assert read(f"{repository}#test") == [PAIRS[1]]


def test_what_save_to_disk_wrote_is_read(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "more")
    assert read(tmp_path / "one") == read(tmp_path / "more") == PAIRS
    assert read(f"{tmp_path / 'more'}#test") == PAIRS[:1]


def test_a_folder_of_parquet_may_be_named_as_a_file(repository):
    folder = (repository / "data").rename(repository.parent / "faq.parquet")
    assert read(folder) == PAIRS


def test_a_configuration_of_a_folder_is_read_and_part_of_the_domain(tmp_path):
    for name in ("law", "art"):
        (tmp_path / "qa").mkdir(exist_ok=True)
        (tmp_path / f"qa/{name}.jsonl").write_text(json.dumps({"query": f"{name}?", "document": f"{name}!"}) + "\n")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("law", "art"))
    (tmp_path / "qa/README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert read(f"{tmp_path / 'qa'}:art", columns=()) == [Pair("qa:art", "art?", "art!")]
    with pytest.raises(ValueError, match=r"qa:tax: not readable as a data set .*'tax' not found. Available: .*law"):
        read(f"{tmp_path / 'qa'}:tax", columns=())


def test_columns_of_our_names_need_not_be_given(tmp_path):
    rows = [{"query": "q", "document": ["d", "e"], "negatives": "n", "more": 1}]
    path = parquet(tmp_path / "facts-00000-of-00001.parquet", rows)
    assert read(path, columns=()) == [Pair("facts", "q", "d", ("n",)), Pair("facts", "q", "e", ("n",))]
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(rows).save_to_disk(saved)
    assert [pair.domain for pair in read(saved, columns=())] == ["saved", "saved"]


def test_a_pass_can_be_repeated(repository):
    for path in (repository, repository / "data" / "train-*.parquet"):
        assert read(path) == read(path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("query=question",), r"expected the columns \['document'\], found \['question', 'answer', 'hard', 'source'\]"),
        (("query=question", "document=answer", "domain=topic"), r"expected the columns \['topic'\], found"),
        (
            ("question=query",),
            "column 'question=query': expected FIELD=COLUMN, with FIELD once each of query, document",
        ),
        (("query",), "column 'query': expected FIELD=COLUMN"),
        (("query=",), "column 'query=': expected FIELD=COLUMN"),
        (("query=question", "query=answer"), "column 'query=answer': expected FIELD=COLUMN"),
    ],
)
def test_wrong_columns_are_named_before_anything_is_read(repository, columns, message):
    for path in (repository, repository / "data" / "train-*.parquet"):
        with pytest.raises(ValueError, match=message):
            huggingface.read_pairs([str(path)], columns)


def test_rows_without_text_are_left_out_and_logged(tmp_path, caplog):
    rows = [
        {"query": q, "document": d, "domain": "x"} for q, d in (("q", "d"), ("\u200b", "d"), ("q", None), ("q", " "))
    ]
    path = parquet(tmp_path / "set.parquet", rows)
    assert read(path, columns=()) == [Pair("x", "q", "d")]
    assert [record.getMessage() for record in caplog.records] == [
        "set.parquet: 1 pairs; left out: {'rows whose document has no text': 2, 'rows whose query has no text': 1}"
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": 3, "document": "d"}, r"set\.parquet: row 1: expected text as 'query', got int: 3"),
        ({"query": "q", "document": {"text": "d"}}, "row 1: expected text as 'document', got dict"),
        ({"query": "q", "document": "d", "negatives": [["n"]]}, "row 1: expected text as 'hard negatives', got list"),
        ({"query": "q", "document": "d", "domain": 3}, "row 1: expected text as 'domain', got int"),
    ],
)
def test_values_of_other_types_are_named_by_row(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read(parquet(tmp_path / "set.parquet", [row]), columns=())
    with pytest.raises(ValueError, match=message.replace(r"set\.parquet", str(tmp_path))):
        read(tmp_path, columns=())


def test_paths_that_name_nothing_readable_are_errors(tmp_path):
    with pytest.raises(ValueError, match="expected paths of data sets, got none"):
        read()
    with pytest.raises(ValueError, match="expected a path, got ''"):
        read("")
    for paths in ("one.parquet", {"one.parquet", "two.parquet"}):
        with pytest.raises(ValueError, match="paths: expected a list of texts, got a"):
            huggingface.identity(paths)
    with pytest.raises(ValueError, match="columns: expected a list of texts, got a single one, 'query=q'"):
        huggingface.read_pairs(["one.parquet"], "query=q")
    for path in (tmp_path / "none.parquet", tmp_path / "*.parquet"):
        with pytest.raises(ValueError, match="expected Parquet files, found none; correct the path"):
            read(path)
    (tmp_path / "data.csv").write_text("query,document\nq,d\n")
    with pytest.raises(ValueError, match=r"data\.csv: expected a Parquet file; other files are read as a folder"):
        read(tmp_path / "data.csv")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"broken\.parquet: not readable as Parquet"):
        read(tmp_path / "broken.parquet")
    (tmp_path / "gone-0.parquet").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"gone-0\.parquet: not readable as Parquet"):
        read(tmp_path / "gone-*.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: not readable as a data set"):
        read(tmp_path / "empty")


def test_a_split_that_is_not_there_names_those_that_are(repository, tmp_path):
    with pytest.raises(ValueError, match=r"#dev: not readable as a data set \(.*Available splits: \['train', 'test'\]"):
        read(f"{repository}#dev")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"saved#dev: not readable as a data set \('dev'"):
        read(f"{tmp_path / 'saved'}#dev")


def test_the_hub_without_a_network_is_a_clear_error():
    for act in (read, lambda path: huggingface.identity([path])):
        with pytest.raises(
            ValueError, match=r"org/name: there is no such folder, and the Hub did not answer.*go online"
        ):
            act("org/name:law#test")
        with pytest.raises(ValueError, match="no such file or folder, and it is no name on the Hub"):
            act("a/b/c")


def test_a_data_set_of_the_hub_is_read_at_the_commit_of_its_identity(monkeypatch):
    asked = []
    data = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(huggingface, "_commit", lambda name: f"newest of {name}")
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **options: asked.append((given, options)) or data)
    assert [pair.query for pair in read("org/name:law#test", columns=COLUMNS[:2])] == ["q0", "q1", "q2"]
    options = {"split": "test", "streaming": True, "revision": "newest of org/name"}
    assert asked == [(("org/name", "law"), options)]
    assert huggingface.identity(["org/name:law#test"]) == {"org/name:law#test": "newest of org/name"}


def test_without_the_library_the_error_says_how_to_install_it(repository, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'cde_jax\[huggingface\]', or name Parquet files"):
        read(repository)
    assert read(repository / "data" / "train-*.parquet") == PAIRS


def test_the_identity_is_the_content_wherever_it_is_stored(repository, tmp_path):
    (repository / ".cache/huggingface").mkdir(parents=True)
    (repository / ".cache/huggingface/x.metadata").write_text("a time")  # the Hub's client writes these
    (repository / ".gitattributes").write_text("*.parquet")
    (repository / "data/LICENSE").touch()
    whole = huggingface.identity([str(repository)])
    shards = [f"train-0000{i}-of-00002.parquet" for i in range(2)]
    assert list(whole) == [
        "(data set)",
        "data/LICENSE",
        "data/test-00000-of-00001.parquet",
        *(f"data/{s}" for s in shards),
    ]
    assert whole["(data set)"] == "faq#train"
    before = huggingface.identity([str(repository / "data" / "train-*.parquet")])
    assert before == {name: whole[f"data/{name}"] for name in shards}
    assert huggingface.identity([f"{repository}#test"]) == whole | {"(data set)": "faq#test"}
    assert huggingface.identity([f"{repository}:law"])["(data set)"] == "faq:law#train"
    two = [str(repository / "data" / name) for name in shards]
    assert huggingface.identity(two) != huggingface.identity(two[::-1])
    moved = (tmp_path / "elsewhere").joinpath("faq")
    moved.parent.mkdir()
    repository.rename(moved)
    assert huggingface.identity([str(moved)]) == whole
    parquet(moved / "data/train-00001-of-00002.parquet", ROWS[:1])
    after = huggingface.identity([str(moved / "data" / "train-*.parquet")])
    assert [name for name in after if after[name] != before[name]] == [shards[1]]


def test_the_log_has_the_pairs_of_each_file_and_data_set(repository):
    log = InputLog()
    pattern = str(repository / "data" / "train-*.parquet")
    for _ in range(2):
        list(huggingface.read_pairs([pattern, f"{repository}#test"], COLUMNS, log))
    shards = {"1:train-00000-of-00002.parquet": 2, "1:train-00001-of-00002.parquet": 1}
    assert log == InputLog(shards | {"2:faq#test": 1})


@pytest.mark.usefixtures("usual_gc")
def test_memory_does_not_grow_with_the_rows(tmp_path):
    text = "word " * 1000
    schema = pa.schema([("query", pa.string()), ("document", pa.string())])
    with pq.ParquetWriter(tmp_path / "large.parquet", schema) as writer:
        for i in range(10):
            rows = [{"query": f"{i} {j} {text}", "document": text} for j in range(500)]
            writer.write_table(pa.Table.from_pylist(rows, schema))
    tracemalloc.start()
    allocated = pa.total_allocated_bytes()
    count = most = 0
    try:
        for _ in huggingface.read_pairs([str(tmp_path / "large.parquet")]):
            count += 1
            most = max(most, pa.total_allocated_bytes() - allocated)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 5000 and peak < 10_000_000 and most < 20_000_000, (peak, most)
