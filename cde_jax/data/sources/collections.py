"""The one table of published training collections: format, files, prefixes and objective of each set.

The lists, prefixes and columns are those of the paper's training configurations (arXiv 2410.02525, section 5): the
sets of Nomic Embed (arXiv 2402.01613; 29 unsupervised, 10 supervised) and those of BGE (`cfli/bge-full-data`);
MS MARCO's passages and the BEIR sets that have a training split come beside them. Files keep the names under which
they are published, below one folder: a Nomic set lies in the folder of its bucket, a BGE set in a copy of its
repository, a BEIR set in its unpacked archive.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cde_jax.data.files import given_path
from cde_jax.data.texts import as_list

PREFIXES = ("search_query", "search_document", "classification", "clustering")
_SEARCH = ("search_query", "search_document")
_CLASS = ("classification", "classification")
_TOPIC = ("clustering", "clustering")


@dataclass(frozen=True)
class Collection:
    """One set. `files` are paths below the folder, `{}` the shard's number, `*` whatever the publisher put there.

    `columns` name the query, the document and, where the objective is "triplet", the hard negatives of a line.
    """

    format: str  # a key of formats.READERS
    files: tuple[str, ...]
    query_prefix: str
    document_prefix: str
    objective: str = "paired"  # or "triplet": with hard negatives
    columns: tuple[str, ...] = ()
    shards: int = 0  # how many the publisher names; 0: the files' own names tell


_PAIRED = ("query", "document")
# set: (folder in its bucket, shards, prefixes, columns)
_NOMIC_UNSUPERVISED = {
    "reddit_title_body": ("reddit_full", 667, _TOPIC, ("title", "body")),
    "amazon_reviews": ("amazon_reviews_full", 394, _CLASS, _PAIRED),
    "paq": ("paq_full", 539, _SEARCH, _PAIRED),
    "s2orc_citation_titles": ("s2orc_citation_title_full", 78, _TOPIC, ("query", "pos")),
    "s2orc_title_abstract": ("s2orc_title_abstract_full", 361, _TOPIC, _PAIRED),
    "s2orc_abstract_citation": ("s2orc_abstract_citation_full", 77, _TOPIC, ("query", "pos")),
    "s2orc_abstract_body": ("s2orc_abstract_body_index_filtered", 72, _TOPIC, _PAIRED),
    "wikianswers": ("wikianswers_full", 101, _CLASS, _PAIRED),
    "wikipedia": ("wiki_title_body_full", 62, _CLASS, ("title", "text")),
    "gooaq": ("gooaq_full", 13, _SEARCH, _PAIRED),
    "codesearch": ("codesearch_full", 9, _TOPIC, _PAIRED),
    "yahoo_title_answer": ("yahoo_title_answer_full", 3, _SEARCH, _PAIRED),
    "agnews": ("agnews_full", 5, _CLASS, _PAIRED),
    "amazonqa": ("amazon_qa_full", 3, _SEARCH, ("query", "pos")),
    "yahoo_qa": ("yahoo_qa_full", 2, _SEARCH, _PAIRED),
    "yahoo_title_question": ("yahoo_title_question_full", 3, _SEARCH, _PAIRED),
    "ccnews": ("ccnews_full", 4, _CLASS, _PAIRED),
    "npr": ("npr_full", 4, _CLASS, _PAIRED),
    "eli5": ("eli5_full", 2, _SEARCH, _PAIRED),
    "cnn": ("cnn_full", 3, _CLASS, _PAIRED),
    "stackexchange_duplicate_questions": ("stackexchange_question_question_full", 1, _TOPIC, _PAIRED),
    "stackexchange_title_body": ("stackexchange_title_body_full", 1, _TOPIC, _PAIRED),
    "stackexchange_body_body": ("stackexchange_body_body_full", 1, _TOPIC, _PAIRED),
    "sentence_compression": ("sentence_compression_full", 2, _CLASS, _PAIRED),
    "wikihow": ("wikihow_full", 1, _CLASS, _PAIRED),
    "altlex": ("altlex_full", 1, _CLASS, _PAIRED),
    "quora": ("quora_full", 1, _CLASS, _PAIRED),
    "simplewiki": ("simplewiki_full", 1, _CLASS, _PAIRED),
    "squad": ("squad_full", 1, _SEARCH, _PAIRED),
}
_TRIPLET = ("query", "document", "negatives")
_NOMIC_SUPERVISED = {
    "msmarco": ("msmarco_distillation_simlm_rescored_reranked_min15", 5, _SEARCH, _TRIPLET),
    "nq_triples": ("nq_cocondensor_hn_mine_reranked_min15", 1, _SEARCH, _TRIPLET),
    "nli_triplets": ("nli_simcse_50negs_fixed", 3, _CLASS, _TRIPLET),
    "reddit": ("reddit_triples", 2, _TOPIC, _TRIPLET),
    "medi_wiki": ("medi_sts_wiki_rephrasal", 1, _CLASS, ("query", "pos", "neg")),
    "medi_stackexchange": ("medi_sts_stackexchange_dupe", 1, _CLASS, ("query", "pos", "neg")),
    "medi_flickr": ("medi_sts_flickr_sampled", 1, _CLASS, ("query", "pos", "neg")),
    "medi_supernli": ("medi_supernli_sampled", 1, _CLASS, ("query", "pos", "neg")),
    "hotpot": ("hotpotqa_hn_mine_shuffled", 2, _SEARCH, _TRIPLET),
    "fever": ("fever_hn_mine", 2, _SEARCH, _TRIPLET),
}
_BGE = {
    "amazon_counterfactual_classification": _CLASS,
    "amazon_reviews_classification": _CLASS,
    "arguana": _SEARCH,
    "arxiv_title": _TOPIC,
    "arXiv_abstract": _TOPIC,
    "banking_classification": _CLASS,
    "biorxiv_abstract": _TOPIC,
    "biorxiv_title": _TOPIC,
    "eli5": _SEARCH,
    "emotion_classification": _CLASS,
    "fever": _SEARCH,
    "fiqa": _SEARCH,
    "hotpotqa": _SEARCH,
    "imdb_classification": _CLASS,
    "medrxiv_abstract": _TOPIC,
    "medrxiv_title": _TOPIC,
    "mtop_intent_classification": _CLASS,
    "msmarco_document": _SEARCH,
    "msmarco_passage": _SEARCH,
    "nli": _CLASS,
    "nq": _SEARCH,
    "quora": ("search_query", "search_query"),
    "reddit_clustering": _TOPIC,
    "reddit_clusteringP2P": _TOPIC,
    "scidocsrr": _SEARCH,
    "squad": _SEARCH,
    "stack_exchange_clustering": _TOPIC,
    "stack_exchange_clusteringP2P": _TOPIC,
    "stack_overflow_dup_questions": _CLASS,
    "toxic_conversations_classification": _CLASS,
    "trivial": _SEARCH,  # TriviaQA, under the publisher's name
    "tweet_sentiment_extraction_classification": _CLASS,
    "twenty_news_groups": _TOPIC,
}
_MSMARCO = ("msmarco/collection.tsv", "msmarco/queries.train.tsv")
_BEIR = ("fever", "fiqa", "hotpotqa", "msmarco", "nfcorpus", "nq-train", "scifact")  # those with qrels/train.tsv


def _table() -> dict[str, Collection]:
    table = {}
    for group, sets in (("nomic-unsupervised", _NOMIC_UNSUPERVISED), ("nomic-supervised", _NOMIC_SUPERVISED)):
        for name, (folder, shards, prefixes, columns) in sets.items():
            objective = "triplet" if len(columns) == 3 else "paired"
            bucket = "contrastive-index-filtered" if folder.endswith("_full") else "contrastive"
            files = (f"{bucket}/{folder}/shard-{{:05d}}.jsonl.gz",)
            table[f"{group}/{name}"] = Collection("nomic", files, *prefixes, objective, columns, shards)
    for name, prefixes in _BGE.items():
        files = (f"bge-full-data/data/{name}-*-of-*.parquet",)
        table[f"bge/{name}"] = Collection("bge", files, *prefixes, "triplet", ("query", "pos", "neg"))
    table["msmarco/msmarco"] = Collection("msmarco", (*_MSMARCO, "msmarco/qrels.train.tsv"), *_SEARCH)
    table["msmarco-hard-negatives/msmarco"] = Collection(
        "msmarco-hard-negatives", (*_MSMARCO, "msmarco/msmarco-hard-negatives.jsonl.gz"), *_SEARCH, "triplet"
    )
    for name in _BEIR:
        files = (f"beir/{name}/corpus.jsonl", f"beir/{name}/queries.jsonl", f"beir/{name}/qrels/train.tsv")
        table[f"beir/{name}"] = Collection("beir", files, *_SEARCH)
    return table


COLLECTIONS = _table()  # "group/set" → Collection


def select(names: Iterable[str]) -> dict[str, Collection]:
    """The collections that the names stand for, each once, in order: "group/set", or "group" for all its sets.

    No names, or one that is not in the table, is a ValueError that offers the nearest.
    """
    names = as_list(names, "collections")
    if not names:
        raise ValueError(
            f"expected names of collections, got none; known are {', '.join(groups())}, or one set of them"
        )
    chosen: dict[str, Collection] = {}
    for name in names:
        found = {full: each for full, each in COLLECTIONS.items() if name in (full, full.split("/")[0])}
        if not found:
            raise ValueError(f"unknown collection {name!r}; {_nearest(name)}")
        chosen |= found
    return chosen


def groups() -> list[str]:
    """The first parts of the names, in the table's order."""
    return list(dict.fromkeys(full.split("/")[0] for full in COLLECTIONS))


def domains(names: Iterable[str]) -> dict[str, str]:
    """ "group/set" → the domain of its pairs: the set's name, or in full where two chosen sets share it."""
    short = {full: full.split("/")[1] for full in select(names)}
    shared = [name for name in short.values() if list(short.values()).count(name) > 1]
    return {full: full if name in shared else name for full, name in short.items()}


def prefixes(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Domain → what stands before every query and every document of it, e.g. ("search_query: ", …)."""
    chosen = select(names)
    return {
        domain: (f"{chosen[full].query_prefix}: ", f"{chosen[full].document_prefix}: ")
        for full, domain in domains(names).items()
    }


def find(name: str, folder: str | Path) -> list[Path]:
    """The files of the set "group/set" below the folder, in order; all that were published must be there."""
    collection, folder = COLLECTIONS[name], given_path(folder, "folder of the collections")
    wanted: list[Path] = []
    for pattern in collection.files:
        if collection.shards:
            wanted += [folder / pattern.format(i) for i in range(collection.shards)]
        elif "*" in pattern:
            wanted += _numbered(name, folder, pattern)
        else:
            wanted.append(folder / pattern)
    missing = [str(path.relative_to(folder)) for path in wanted if not path.is_file()]
    if missing:
        rest = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(
            f"{name}: {len(missing)} of its {len(wanted)} files are not in {folder}: {', '.join(missing[:5])}{rest}; "
            "fetch them, or correct the folder"
        )
    for path in wanted:
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: the file is empty; fetch it again")
    return wanted


def _numbered(name: str, folder: Path, pattern: str) -> list[Path]:
    """All files of a pattern "…-*-of-*…", of which one at least must be there to tell how many they are."""
    totals = {}
    for path in sorted(folder.glob(pattern)):
        if number := re.search(r"-\d+-of-(\d+)\.\w+$", path.name):
            totals[number[1]] = path
    if len(totals) != 1:
        found = f"files of {len(totals)} different numberings" if totals else "none"
        raise ValueError(f"{name}: expected {folder / pattern}, found {found}; fetch the set, or correct the folder")
    total = next(iter(totals))
    numbers = [f"-{i:05d}-of-{total}" for i in range(int(total))]
    return [folder / pattern.replace("-*-of-*", number) for number in numbers]


def _nearest(name: str) -> str:
    known = [*groups(), *COLLECTIONS]
    same_set = [full for full in COLLECTIONS if full.split("/")[1] == name]
    near = same_set or difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if not near:
        near = [full for full in COLLECTIONS if difflib.get_close_matches(name, [full.split("/")[1]], cutoff=0.6)]
    return f"did you mean {' or '.join(near[:3])}?" if near else f"known are {', '.join(groups())}, or one set of them"
