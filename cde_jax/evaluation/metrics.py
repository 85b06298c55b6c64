"""Retrieval measures of every query, by pytrec_eval, and the results of an evaluation."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np

from cde_jax.data.sources.beir import EvaluationSet

Run = Mapping[str, Mapping[str, float]]  # {query id: {document id: score}}, as pytrec_eval has it
Qrels = Mapping[str, Mapping[str, int]]  # {query id: {document id: relevance}}
Rankings = dict[str, dict[str, Run]]  # {set: {kind: run}}; plain JSON
Means = Mapping[str, Mapping[str, float]]  # {set: {kind: NDCG@k}}
PerQuery = dict[str, dict[str, float]]  # {query id: {measure: score}}
DEPTH = 100  # documents ranked for each query, where these measures are reported

# Our name → pytrec_eval's; "mrr" is of all that are ranked.
MEASURES = {f"ndcg@{k}": f"ndcg_cut_{k}" for k in (1, 3, 5, 10)} | {
    "mrr": "recip_rank",
    "map@100": "map_cut_100",
    "recall@10": "recall_10",
    "recall@100": "recall_100",
}


@dataclass(frozen=True)
class Scores:
    """NDCG@k of every query, by evaluation set and kind of context (or name of a baseline)."""

    k: int
    per_query: dict[str, dict[str, dict[str, float]]]  # {set: {kind: {query id: NDCG@k}}}

    @property
    def means(self) -> dict[str, dict[str, float]]:
        """{set: {kind: mean over queries}}."""
        return {
            name: {kind: float(np.mean(list(queries.values()))) for kind, queries in kinds.items()}
            for name, kinds in self.per_query.items()
        }

    def merged(self, other: "Scores") -> "Scores":
        """With the kinds of `other` after these, set by set."""
        if other.k != self.k:
            raise ValueError(f"expected scores of one cutoff, got NDCG@{self.k} and NDCG@{other.k}")
        names = dict.fromkeys([*self.per_query, *other.per_query])
        return Scores(self.k, {n: self.per_query.get(n, {}) | other.per_query.get(n, {}) for n in names})

    def to_json(self) -> dict[str, Any]:
        """A form for `write_json`, which `from_json` reads."""
        return {"metric": f"ndcg@{self.k}", "per_query": self.per_query}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Scores":
        """What `to_json` wrote."""
        return cls(int(content["metric"].removeprefix("ndcg@")), content["per_query"])


def measures_per_query(run: Run, qrels: Qrels, measures: Mapping[str, str] = MEASURES) -> PerQuery:
    """Measures of each query that has a relevant document, in the order of `qrels`; 0 without documents in `run`.

    measures: name in the result → pytrec_eval's, as in `MEASURES`. Equal scores are ranked as trec_eval does, by
    document id, greatest first. Raises ValueError if there is no query.
    """
    import pytrec_eval  # not on a bare accelerator image, which only ranks

    relevant = {query: dict(grades) for query, grades in qrels.items() if any(g > 0 for g in grades.values())}
    if not relevant:
        raise ValueError(f"expected qrels with a relevant document, none of the {len(qrels)} queries has one")
    evaluator = pytrec_eval.RelevanceEvaluator(relevant, {re.sub(r"_(?=\d+$)", ".", m) for m in measures.values()})
    scores = evaluator.evaluate({query: dict(run[query]) for query in relevant if run.get(query)})
    return {q: {name: float(scores.get(q, {}).get(m, 0.0)) for name, m in measures.items()} for q in relevant}


def ndcg_per_query(run: Run, qrels: Qrels, k: int = 10) -> dict[str, float]:
    """NDCG@k of each query, as `measures_per_query`."""
    scores = measures_per_query(run, qrels, {"ndcg": f"ndcg_cut_{k}"})
    return {query: measures["ndcg"] for query, measures in scores.items()}


def ndcg(run: Run, qrels: Qrels, k: int = 10) -> float:
    """The mean of `ndcg_per_query`."""
    return float(np.mean(list(ndcg_per_query(run, qrels, k).values())))


def score_rankings(rankings: Rankings, sets: Sequence[EvaluationSet], k: int = 10) -> Scores:
    """NDCG@k of rankings with at least k documents a query, by the qrels of the sets of those names."""
    qrels = {dataset.name: dataset.qrels for dataset in sets}
    return Scores(k, {
        name: {kind: ndcg_per_query(run, qrels[name], k) for kind, run in runs.items()}
        for name, runs in rankings.items()
    })  # fmt: skip


def mean_over_sets(means: Means) -> dict[str, float]:
    """The mean over sets of every kind that all sets have."""
    rows = list(means.values())
    return {kind: float(np.mean([row[kind] for row in rows])) for kind in rows[0] if all(kind in row for row in rows)}


def table(means: Means, title: str = "NDCG@10") -> str:
    """A text table: a row a set, a column a kind, a last row of means; "–" where there is no score."""
    kinds = list(dict.fromkeys(kind for row in means.values() for kind in row))
    rows = [*means.items(), ("mean", mean_over_sets(means))]
    cells = [[name, *(f"{row[kind]:.3f}" if kind in row else "–" for kind in kinds)] for name, row in rows]
    return text_table([title, *kinds], cells)


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with the first column left, the others right aligned."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    rich_table = Table(box=box.MARKDOWN)
    for number, name in enumerate(header):
        rich_table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        rich_table.add_row(*row)
    console = Console(file=StringIO(), width=10_000, markup=False, emoji=False, highlight=False, color_system=None)
    console.print(rich_table)
    return console.file.getvalue().strip()
