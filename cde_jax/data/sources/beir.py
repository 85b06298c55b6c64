"""Evaluation sets in BEIR's layout: corpus.jsonl, queries.jsonl (plain or .gz) and qrels.

`qrels.tsv` or `qrels/test.tsv` has lines of query id, document id and an integer relevance, tab-separated, with
or without a header line. Only queries that have qrels are kept, as BEIR's own readers do.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from cde_jax.data.files import NewFolder, explained
from cde_jax.data.sources.jsonl import json_lines, text_field, text_lines


@dataclass(frozen=True)
class EvaluationSet:
    """A corpus, queries, and which documents are relevant to which query (relevance > 0)."""

    name: str
    queries: dict[str, str]
    corpus: dict[str, str]
    qrels: dict[str, dict[str, int]]


def read(folder: str | Path) -> EvaluationSet:
    """Read a BEIR folder; a document's text is its title and text joined by a space.

    Raises ValueError with file and line for missing files, broken lines, and qrels that name unknown ids.
    """
    folder = Path(folder)
    corpus = {}
    path = _existing(folder, "corpus.jsonl", "corpus.jsonl.gz")
    for place, entry in json_lines(path):
        title = text_field(entry, "title", place, empty=True) if entry.get("title") is not None else ""
        # Published sets have documents without text; they are part of their corpora, so they stay.
        text = f"{title} {text_field(entry, 'text', place, empty=True)}".strip()
        _insert(corpus, text_field(entry, "_id", place), text, place)
    queries = {}
    path = _existing(folder, "queries.jsonl", "queries.jsonl.gz")
    for place, entry in json_lines(path):
        _insert(queries, text_field(entry, "_id", place), text_field(entry, "text", place), place)
    qrels = _read_qrels(_existing(folder, "qrels.tsv", "qrels/test.tsv"), queries, corpus)
    return EvaluationSet(folder.name, {query: queries[query] for query in qrels}, corpus, qrels)


def write(evaluation_set: EvaluationSet, folder: str | Path) -> None:
    """Write a BEIR folder (qrels in qrels/test.tsv); it appears whole or not at all."""
    lines = {
        "corpus.jsonl": (_line({"_id": k, "title": "", "text": v}) for k, v in evaluation_set.corpus.items()),
        "queries.jsonl": (_line({"_id": k, "text": v}) for k, v in evaluation_set.queries.items()),
        "qrels/test.tsv": (
            f"{query}\t{document}\t{score}\n"
            for query, relevant in {"query-id": {"corpus-id": "score"}, **evaluation_set.qrels}.items()
            for document, score in relevant.items()
        ),
    }
    with NewFolder(folder, marker="corpus.jsonl") as new:
        try:
            (new.path / "qrels").mkdir()
            for name, content in lines.items():
                with open(new.path / name, "w", encoding="utf-8", newline="\n") as file:
                    file.writelines(content)
                    file.flush()
                    os.fsync(file.fileno())
            new.put_in_place()
        except OSError as error:
            raise explained(error, Path(folder)) from error


def _line(entry: dict[str, str]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _existing(folder: Path, *names: str) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder}: expected {' or '.join(names)}, found neither; give a folder in BEIR's layout")


def _insert(texts: dict[str, str], key: str, text: str, place: str) -> None:
    if key in texts:
        raise ValueError(f"{place}: the _id {key!r} was there before; ids must differ")
    texts[key] = text


def _read_qrels(path: Path, queries: dict[str, str], corpus: dict[str, str]) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for place, line in text_lines(path):
        row = line.rstrip("\r\n").split("\t")
        if len(row) != 3:
            raise ValueError(f"{place}: expected query id, document id, score with tabs between, got {row!r:.80}")
        query, document, score = row
        try:
            relevance = int(score)
        except ValueError:
            if place == f"{path}:1":
                continue  # the header line
            raise ValueError(f"{place}: expected an integer score, got {score!r}") from None
        for kind, key, known in (("query", query, queries), ("document", document, corpus)):
            if key not in known:
                raise ValueError(f"{place}: names the {kind} {key!r}, which is not among the {len(known)} read")
        qrels.setdefault(query, {})[document] = relevance
    if not qrels:
        raise ValueError(f"{path}: expected lines of query id, document id and score, found none")
    return qrels
