"""Small files in the true formats of the published collections, one set for every format, and what they hold."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cde_jax.data.pairs import Pair
from cde_jax.data.sources.collections import COLLECTIONS


def gz_lines(path: Path, entries: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)


def lines(path: Path, *content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in content), encoding="utf-8")


def nomic(name: str, entries: list[dict], folder: Path) -> None:
    """The entries over all shards of the set, with the metadata that the publisher writes."""
    collection = COLLECTIONS[name]
    kind = "triplet" if len(collection.columns) == 3 else "paired"
    objective = {"self": [], "paired": [], "triplet": []} | {kind: [list(collection.columns)]}
    entries = [entry | {"metadata": {"objective": objective}} for entry in entries]
    for i, file in enumerate(collection.files):
        gz_lines(folder / file, entries[i :: len(collection.files)])


def nomic_paired(folder: Path) -> list[Pair]:
    entries = [{"title": f"title {i}", "text": f"body {i} ä", "id": i} for i in range(124)]
    nomic("nomic-unsupervised/wikipedia", entries, folder)
    order = [i for shard in range(62) for i in range(shard, 124, 62)]
    return [Pair("wikipedia", f"title {i}", f"body {i} ä") for i in order]


def nomic_triplet(folder: Path) -> list[Pair]:
    entries = [{"query": f"q{i}", "pos": f"d{i}", "neg": [f"n{i}", "n"], "score": 0.5} for i in range(3)]
    nomic("nomic-supervised/medi_wiki", entries, folder)
    return [Pair("medi_wiki", f"q{i}", f"d{i}", (f"n{i}", "n")) for i in range(3)]


def bge(folder: Path) -> list[Pair]:
    data = folder / "bge-full-data" / "data"
    data.mkdir(parents=True)
    schema = pa.schema(
        [("query", pa.string()), ("pos", pa.list_(pa.string())), ("neg", pa.list_(pa.string()))]
        + [(name, pa.list_(pa.float64())) for name in ("pos_scores", "neg_scores")]
        + [("prompt", pa.string()), ("type", pa.string())]
    )
    rest = {"pos_scores": None, "neg_scores": [0.5], "prompt": "Given a claim …", "type": "normal"}
    first = [{"query": "q0", "pos": ["d0", "d0 again"], "neg": ["n0", "n1"]} | rest]
    second = [{"query": "q1", "pos": ["d1"], "neg": []} | rest]
    for i, part in enumerate((first, second)):
        pq.write_table(pa.Table.from_pylist(part, schema), data / f"fever-{i:05d}-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(second, schema), data / "fiqa-00000-of-00001.parquet")  # another set
    return [
        Pair("fever", "q0", "d0", ("n0", "n1")),
        Pair("fever", "q0", "d0 again", ("n0", "n1")),
        Pair("fever", "q1", "d1"),
    ]


def _passages(folder: Path) -> None:
    lines(folder / "msmarco/collection.tsv", *(f"{i}\tpassage {i} ü" for i in range(30)))
    lines(folder / "msmarco/queries.train.tsv", "1185869\twhat is it?", "7\twho?", "9\tunjudged")


def msmarco(folder: Path) -> list[Pair]:
    _passages(folder)
    lines(folder / "msmarco/qrels.train.tsv", "7\t0\t3\t1", "1185869\t0\t0\t1", "1185869\t0\t29\t1", "7\t0\t4\t0")
    wanted = (("who?", 3), ("what is it?", 0), ("what is it?", 29))
    return [Pair("msmarco", query, f"passage {i} ü") for query, i in wanted]


def msmarco_hard_negatives(folder: Path) -> list[Pair]:
    """A line without scores, a line with them (what scores too near the positives goes), a line without positives."""
    _passages(folder)
    scored = {
        "a": [{"pid": 10, "ce-score": 6.01}, *({"pid": 10 + i, "ce-score": 7.0 - i} for i in range(1, 8))],
        "b": [{"pid": 11, "ce-score": 5.0}, *({"pid": 20 + i, "ce-score": -3.0} for i in range(6))],
    }
    entries = [
        {"qid": 7, "pos": [3], "neg": {"bm25": [5, 6], "tas-b": [6, 8]}},
        {"qid": 1185869, "pos": [{"pid": 0, "ce-score": 9.0}, {"pid": 1, "ce-score": 9.5}], "neg": scored},
        {"qid": 9, "pos": [], "neg": {"bm25": [5]}},
    ]
    gz_lines(folder / "msmarco/msmarco-hard-negatives.jsonl.gz", entries)

    def pair(query: str, document: int, *negatives: int) -> Pair:
        return Pair("msmarco", query, f"passage {document} ü", tuple(f"passage {i} ü" for i in negatives))

    few = (*range(11, 16), *range(20, 25))  # 10 scores within 3 of the positive's 9, 11 just not; five of a system
    return [pair("who?", 3, 5, 6, 8), pair("what is it?", 0, *few), pair("what is it?", 1, *few)]


def beir(folder: Path) -> list[Pair]:
    root = folder / "beir/scifact"
    corpus = [{"_id": "4983", "title": "Title", "text": "text of it", "metadata": {}}, {"_id": "x", "text": "no title"}]
    lines(root / "corpus.jsonl", *map(json.dumps, corpus))
    lines(
        root / "queries.jsonl", *(json.dumps({"_id": f"{i}", "text": f"claim {i}", "metadata": {}}) for i in range(3))
    )
    lines(root / "qrels/train.tsv", "query-id\tcorpus-id\tscore", "2\tx\t1", "0\t4983\t2", "0\tx\t0", "0\tx\t1")
    lines(root / "qrels/test.tsv", "query-id\tcorpus-id\tscore", "1\tx\t1")
    title = "Title text of it"
    wanted = (("claim 2", "no title"), ("claim 0", title), ("claim 0", "no title"))
    return [Pair("scifact", query, document) for query, document in wanted]


# set → what writes its files into a folder and returns their pairs
SETS = {
    "nomic-unsupervised/wikipedia": nomic_paired,
    "nomic-supervised/medi_wiki": nomic_triplet,
    "bge/fever": bge,
    "msmarco/msmarco": msmarco,
    "msmarco-hard-negatives/msmarco": msmarco_hard_negatives,
    "beir/scifact": beir,
}
