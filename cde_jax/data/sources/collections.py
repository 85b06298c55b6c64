"""The one table of published training collections: format, files, prefixes and objective of each set.

The lists, prefixes and columns are those of the paper's training configurations (arXiv 2410.02525, section 5): the
sets of Nomic Embed (arXiv 2402.01613; 29 unsupervised, 10 supervised) and those of BGE (`cfli/bge-full-data`);
MS MARCO's passages and the BEIR sets that have a training split come beside them. Files keep their published names,
below one folder: a Nomic set in the folder of its bucket, a BGE set in a copy of its repository, a BEIR set unpacked.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cde_jax.data.files import given_path
from cde_jax.data.tokens import as_list

PREFIXES = ("search_query", "search_document", "classification", "clustering")
_SEARCH = ("search_query", "search_document")
_CLASS = ("classification", "classification")
_TOPIC = ("clustering", "clustering")


@dataclass(frozen=True)
class Collection:
    """One set. `files` are paths below the folder, `*` whatever the publisher put there.

    `columns` name the query, the document and, if there are three, the hard negatives of a line.
    """

    format: str  # a key of tfds_pairs.READERS
    files: tuple[str, ...]
    query_prefix: str
    document_prefix: str
    columns: tuple[str, ...] = ()


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
# Sets by prefixes, under the publisher's names ("trivial" is TriviaQA).
_BGE = {
    _SEARCH: "arguana eli5 fever fiqa hotpotqa msmarco_document msmarco_passage nq scidocsrr squad trivial",
    ("search_query", "search_query"): "quora",
    _CLASS: "amazon_counterfactual_classification amazon_reviews_classification banking_classification "
    "emotion_classification imdb_classification mtop_intent_classification nli stack_overflow_dup_questions "
    "toxic_conversations_classification tweet_sentiment_extraction_classification",
    _TOPIC: "arXiv_abstract arxiv_title biorxiv_abstract biorxiv_title medrxiv_abstract medrxiv_title "
    "reddit_clustering reddit_clusteringP2P stack_exchange_clustering stack_exchange_clusteringP2P twenty_news_groups",
}
_BEIR = ("fever", "fiqa", "hotpotqa", "msmarco", "nfcorpus", "nq-train", "scifact")  # those with qrels/train.tsv


def _table() -> dict[str, Collection]:
    table = {}
    for group, sets in (("nomic-unsupervised", _NOMIC_UNSUPERVISED), ("nomic-supervised", _NOMIC_SUPERVISED)):
        for name, (folder, shards, prefixes, columns) in sets.items():
            bucket = "contrastive-index-filtered" if folder.endswith("_full") else "contrastive"
            files = tuple(f"{bucket}/{folder}/shard-{i:05d}.jsonl.gz" for i in range(shards))
            table[f"{group}/{name}"] = Collection("nomic", files, *prefixes, columns)
    bge = {name: prefixes for prefixes, names in _BGE.items() for name in names.split()}
    for name in sorted(bge, key=str.lower):
        files = (f"bge-full-data/data/{name}-*-of-*.parquet",)
        table[f"bge/{name}"] = Collection("bge", files, *bge[name], ("query", "pos", "neg"))
    for name, pairs in (("msmarco", "qrels.train.tsv"), ("msmarco-hard-negatives", "msmarco-hard-negatives.jsonl.gz")):
        files = tuple(f"msmarco/{file}" for file in ("collection.tsv", "queries.train.tsv", pairs))
        table[f"{name}/msmarco"] = Collection(name, files, *_SEARCH)
    for name in _BEIR:
        files = tuple(f"beir/{name}/{file}" for file in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv"))
        table[f"beir/{name}"] = Collection("beir", files, *_SEARCH)
    return table


COLLECTIONS = _table()  # "group/set" → Collection
GROUPS = tuple(dict.fromkeys(full.split("/")[0] for full in COLLECTIONS))


def select(names: Iterable[str]) -> dict[str, Collection]:
    """The collections that the names stand for, each once, in order: "group/set", or "group" for all its sets.

    No names, or one that is not in the table, is a ValueError that offers the nearest.
    """
    known = f"known are {', '.join(GROUPS)}, or one set of them"
    names = as_list(names, "collections")
    if not names:
        raise ValueError(f"expected names of collections, got none; {known}")
    chosen: dict[str, Collection] = {}
    for name in names:
        named = {full: each for full, each in COLLECTIONS.items() if name in (full, full.split("/")[0])}
        if not named:
            full_names = {full.split("/")[1]: full for full in reversed(COLLECTIONS)}
            near = difflib.get_close_matches(name, [*GROUPS, *COLLECTIONS, *full_names], n=1)
            advice = f"did you mean {full_names.get(near[0], near[0])}?" if near else known
            raise ValueError(f"unknown collection {name!r}; {advice}")
        chosen |= named
    return chosen


def domains(names: Iterable[str]) -> dict[str, str]:
    """ "group/set" → the domain of its pairs: the set's name, or in full where two chosen sets share it."""
    chosen = select(names)
    sets = [full.split("/")[1] for full in chosen]
    return {full: full if sets.count(name) > 1 else name for full, name in zip(chosen, sets, strict=True)}


def prefixes(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Domain → what stands before every query and every document of it, e.g. ("search_query: ", …)."""
    return {
        domain: (f"{COLLECTIONS[full].query_prefix}: ", f"{COLLECTIONS[full].document_prefix}: ")
        for full, domain in domains(names).items()
    }


def find(name: str, folder: str | Path) -> list[Path]:
    """The files of the set "group/set" below the folder, in order; all that were published must be there."""
    folder = given_path(folder, "folder of the collections")
    wanted: list[Path] = []
    for pattern in COLLECTIONS[name].files:
        wanted += _numbered(name, folder, pattern) if "*" in pattern else [folder / pattern]
    if missing := [str(path.relative_to(folder)) for path in wanted if not path.is_file()]:
        rest = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(
            f"{name}: {len(missing)} of its {len(wanted)} files are not in {folder}: {', '.join(missing[:5])}{rest}; "
            "fetch them, or correct the folder"
        )
    if empty := [path for path in wanted if path.stat().st_size == 0]:
        raise ValueError(f"{empty[0]}: the file is empty; fetch it again")
    return wanted


def _numbered(name: str, folder: Path, pattern: str) -> list[Path]:
    """All files of a pattern "…-*-of-*…", of which one at least must be there to tell how many they are."""
    numbers = [re.search(r"-\d+-of-(\d+)\.\w+$", path.name) for path in folder.glob(pattern)]
    totals = {number[1] for number in numbers if number}
    if len(totals) != 1:
        found = f"files of {len(totals)} different numberings" if totals else "none"
        raise ValueError(f"{name}: expected {folder / pattern}, found {found}; fetch the set, or correct the folder")
    (total,) = totals
    return [folder / pattern.replace("-*-of-*", f"-{i:05d}-of-{total}") for i in range(int(total))]
