"""Evaluation sets in BEIR's layout: corpus.jsonl, queries.jsonl (plain or .gz) and qrels.

`qrels.tsv` or `qrels/test.tsv` has lines of query id, document id and an integer relevance, tab-separated, with
or without a header line. Only queries that have qrels are kept, as BEIR's own readers do.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cde_jax.data.files import NewFolder, given_path, write_file
from cde_jax.data.sources.jsonl import json_lines, text_field, text_lines

_HEADERS = ("score", "relevance", "rel", "label", "grade")  # of the third column


@dataclass(frozen=True)
class EvaluationSet:
    """A corpus, queries, and which documents are relevant to which query (relevance > 0)."""

    name: str
    queries: dict[str, str]
    corpus: dict[str, str]
    qrels: dict[str, dict[str, int]]


def read_sets(folders: Sequence[str | Path]) -> list[EvaluationSet]:
    """Read several BEIR folders. Two of one name, by which results are kept, are a ValueError before any is read."""
    for name in map(_name, folders):
        if len(same := [str(folder) for folder in folders if _name(folder) == name]) > 1:
            raise ValueError(
                f"expected evaluation sets of different names, got {len(same)} of the name {name!r}: {same}; "
                "rename a folder"
            )
    return [read(folder) for folder in folders]


def read(folder: str | Path) -> EvaluationSet:
    """Read a BEIR folder; a document's text is its title and text joined by a space.

    Raises ValueError with file and line for missing files, broken lines, doubled ids, qrels that name unknown ids or
    a pair twice, and for qrels in which nothing is relevant.
    """
    folder = given_path(folder, "evaluation set")
    corpus = dict(_texts(_existing(folder, "corpus.jsonl", "corpus.jsonl.gz"), document))
    queries = dict(_texts(_existing(folder, "queries.jsonl", "queries.jsonl.gz"), _query))
    path = _existing(folder, "qrels.tsv", "qrels/test.tsv")
    qrels: dict[str, dict[str, int]] = {}
    for place, query, identifier, relevance in qrels_lines(path):
        for kind, key, known in (("query", query, queries), ("document", identifier, corpus)):
            if key not in known:
                raise ValueError(f"{place}: names the {kind} {key!r}, which is not among the {len(known)} read")
        if identifier in qrels.setdefault(query, {}):
            pair = f"the query {query!r} with the document {identifier!r}"
            raise ValueError(f"{place}: {pair} was there before; each pair needs one line")
        qrels[query][identifier] = relevance
    if not any(relevance > 0 for relevant in qrels.values() for relevance in relevant.values()):
        raise ValueError(f"{path}: expected lines of query id, document id and score with scores above 0, found none")
    return EvaluationSet(_name(folder), {query: queries[query] for query in qrels}, corpus, qrels)


def _name(folder: str | Path) -> str:
    return Path(os.path.abspath(given_path(folder, "evaluation set"))).name


def _texts(path: Path, parse: Callable[[dict[str, Any], str], tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Id and text of every line; an id that was there before is a ValueError."""
    known = set()
    for place, entry in json_lines(path):
        identifier, text = parse(entry, place)
        if identifier in known:
            raise ValueError(f"{place}: the _id {identifier!r} was there before; ids must differ")
        known.add(identifier)
        yield identifier, text


def document(entry: dict[str, Any], place: str) -> tuple[str, str]:
    """Id and text of a line of corpus.jsonl. Published sets have documents without text, so these are kept."""
    title = text_field(entry, "title", place, empty=True) if entry.get("title") is not None else ""
    return text_field(entry, "_id", place), f"{title} {text_field(entry, 'text', place, empty=True)}".strip()


def _query(entry: dict[str, Any], place: str) -> tuple[str, str]:
    return text_field(entry, "_id", place), text_field(entry, "text", place)


def qrels_lines(path: Path, columns: int = 3) -> Iterator[tuple[str, str, str, int]]:
    """("file:line", query id, document id, relevance) of every line but a header.

    With 4 `columns` (TREC's layout, MS MARCO) the second one is ignored.
    """
    for place, line in text_lines(path):
        row = line.rstrip("\r\n").split("\t")
        if len(row) != columns:
            raise ValueError(
                f"{place}: expected query id, document id, score in {columns} fields with tabs between, got {row!r:.80}"
            )
        if place == f"{path}:1" and row[-1].strip().lower() in _HEADERS:
            continue
        try:
            relevance = int(row[-1])
        except ValueError:
            raise ValueError(f"{place}: expected an integer score, got {row[-1]!r}") from None
        yield place, row[0], row[-2], relevance


def write(evaluation_set: EvaluationSet, folder: str | Path) -> None:
    """Write a BEIR folder (qrels in qrels/test.tsv); it appears whole or not at all."""
    s, header = evaluation_set, {"query-id": {"corpus-id": "score"}}
    lines = {
        "corpus.jsonl": (_line(_id=key, title="", text=text) for key, text in s.corpus.items()),
        "queries.jsonl": (_line(_id=key, text=text) for key, text in s.queries.items()),
        "qrels/test.tsv": (
            f"{query}\t{document}\t{score}\n"
            for query, relevant in (header | s.qrels).items()
            for document, score in relevant.items()
        ),
    }
    with NewFolder(folder, marker="corpus.jsonl") as new:
        for name, content in lines.items():
            write_file(new.path / name, "".join(content).encode())
        new.put_in_place()


def _line(**entry: str) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _existing(folder: Path, *names: str) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
        if (folder / name).is_symlink():
            raise ValueError(f"{folder / name}: expected a file, got a link to nothing; repair it")
    raise ValueError(f"{folder}: expected {' or '.join(names)}, found neither; give a folder in BEIR's layout")
