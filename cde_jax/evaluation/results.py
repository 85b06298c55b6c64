"""Results of the evaluate command: a Parquet file a task with every query's scores, and the means of all tasks."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cde_jax.data.files import write_file
from cde_jax.evaluation.compare import Comparison, bootstrap, compare
from cde_jax.evaluation.metrics import PerQuery, Scores, text_table

Cells = dict[tuple[str, int | None], PerQuery]  # (kind of context, seed of its sample, None without one) → scores
Summary = dict[str, dict[str, dict[str, Any]]]  # {kind: {measure: {"mean", "spread", "seeds"}}}
SCORES = "scores"  # folder of the Parquet files
MAIN = ("main_score", "ndcg@10")  # the first as mteb has it, of each task, split and subset


def write_scores(path: Path, cells: Cells, identity: str) -> None:
    """A Parquet file with a row a query, kind of context and seed."""
    import pyarrow
    from pyarrow import parquet

    measures = dict.fromkeys(m for queries in cells.values() for scores in queries.values() for m in scores)
    rows = [
        {"context": kind, "seed": seed, "query": query} | {m: scores.get(m) for m in measures}
        for (kind, seed), queries in cells.items()
        for query, scores in queries.items()
    ]
    table = pyarrow.Table.from_pylist(rows).replace_schema_metadata({"identity": identity})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    write_file(path, buffer.getvalue())


def read_scores(path: Path, identity: str | None = None) -> Cells:
    """What `write_scores` wrote, nothing where there is no file. Raises ValueError for one of another `identity`."""
    import pyarrow
    from pyarrow import parquet

    if not path.is_file():
        return {}
    try:
        table = parquet.read_table(path)
        rows, got = table.to_pylist(), table.schema.metadata[b"identity"].decode()
        keys = [(row.pop("context"), row.pop("seed"), row.pop("query")) for row in rows]
    except (pyarrow.ArrowInvalid, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no scores of this command, or damaged ({error}); move it away") from None
    if identity not in (None, got):
        raise ValueError(
            f"{path}: scores of another model, data or random corpus, expected fingerprint {identity}, it has {got}: "
            "choose another --out, or delete the file"
        )
    cells: Cells = {}
    for (kind, seed, query), scores in zip(keys, rows, strict=True):
        cells.setdefault((kind, seed), {})[query] = {m: score for m, score in scores.items() if score is not None}
    return cells


def read_run(folder: Path) -> dict[str, Cells]:
    """{task: scores} of a folder that the command wrote."""
    tasks = {path.stem: read_scores(path) for path in sorted((folder / SCORES).glob("*.parquet"))}
    if not tasks:
        raise ValueError(f"{folder}: expected results of `python -m cde_jax.evaluate --out`, found no scores/*.parquet")
    return tasks


def summary(cells: Cells) -> Summary:
    """Means over queries, and over seeds their mean and standard deviation ("spread")."""
    result: Summary = {}
    for (kind, seed), queries in cells.items():
        for measure in dict.fromkeys(m for scores in queries.values() for m in scores):
            mean = float(np.mean([scores[measure] for scores in queries.values() if measure in scores]))
            result.setdefault(kind, {}).setdefault(measure, {"seeds": {}})["seeds"][str(seed)] = mean
    for measures in result.values():
        for entry in measures.values():
            means = list(entry["seeds"].values())
            entry |= {"mean": float(np.mean(means)), "spread": float(np.std(means, ddof=1)) if means[1:] else None}
    return result


def table(tasks: Mapping[str, Summary]) -> str:
    """A row a task, a column a kind of context: NDCG@10 or the task's own main score, with its spread over seeds."""
    kinds = list(dict.fromkeys(kind for kinds in tasks.values() for kind in kinds))
    rows, columns = [], {kind: [] for kind in kinds}
    for name, row in tasks.items():
        measure = next((m for m in MAIN for measures in row.values() if m in measures), "–")
        cells = [row[kind][measure] if kind in row else None for kind in kinds]
        rows.append([f"{name}, {measure}", *("–" if cell is None else _number(cell) for cell in cells)])
        for kind, cell in zip(kinds, cells, strict=True):
            columns[kind] += [] if cell is None else [cell["mean"]]
    means = [f"{np.mean(column):.4f}" if len(column) == len(tasks) else "–" for column in columns.values()]
    return text_table(["task", *kinds], [*rows, ["mean", *means]])


def _number(cell: Mapping[str, Any]) -> str:
    return f"{cell['mean']:.4f}" + ("" if cell["spread"] is None else f" ± {cell['spread']:.4f}")


def compare_runs(folders: Sequence[Path], kinds: tuple[str, str] | None, measure: str = MAIN[1]) -> str:
    """A table of paired bootstrap intervals between two runs, for kinds of context of both or for one of each.

    Queries are resampled; with mteb's main scores, which are not by query, tasks are. Only tasks and seeds that both
    have are compared; a kind without seeds stands beside each seed of the other. Raises ValueError where nothing is.
    """
    runs = [read_run(folder) for folder in folders]
    found = [list(dict.fromkeys(kind for cells in run.values() for kind, _ in cells)) for run in runs]
    rows = []
    for pair in [kinds] if kinds else [(kind, kind) for kind in found[0] if kind in found[1]]:
        a, b = (
            {name: _by_seed(cells, kind, measure) for name, cells in run.items()}
            for run, kind in zip(runs, pair, strict=True)
        )
        names = [name for name in a if a[name] and b.get(name)]
        tables = [side[name] for side in (a, b) for name in names]
        seeds = list(dict.fromkeys(seed for t in tables for seed in t if seed is not None)) or [None]
        seeds = [seed for seed in seeds if all(seed in t or None in t for t in tables)]
        scores = [
            [Scores(0, {n: {kind: side[n].get(seed, side[n].get(None))} for n in names}) for seed in seeds]
            for side, kind in zip((a, b), pair, strict=True)
        ]
        if not names or not seeds:
            continue
        c = compare(*scores, *pair)
        if measure == MAIN[0]:
            means = [[first.means, second.means] for first, second in zip(*scores, strict=True)]
            by_task = [[x[name][pair[0]] - y[name][pair[1]] for name in names] for x, y in means]
            c = Comparison(*bootstrap([np.array(by_task)]), c.wins, c.sets)
        row = f"{c.difference:+.4f}", f"{c.low:+.4f} … {c.high:+.4f}", f"{c.wins} of {c.sets}", str(len(seeds))
        rows.append([" − ".join(dict.fromkeys(pair)), *row])
    if not rows:
        raise ValueError(
            f"expected {measure} of the same tasks, kinds of context and seeds in {folders[0]} and {folders[1]}, got "
            f"the tasks {list(runs[0])} and {list(runs[1])}, the kinds {found[0]} and {found[1]}: choose among these"
        )
    return text_table([f"{measure}, first − second", "difference", "95 % interval", "tasks won", "seeds"], rows)


def _by_seed(cells: Cells, kind: str, measure: str) -> dict[int | None, dict[str, float]]:
    """{seed: {query: score}} of the cells that have the measure."""
    seeds = {seed: queries for (k, seed), queries in cells.items() if k == kind}
    tables = {seed: {q: s[measure] for q, s in queries.items() if measure in s} for seed, queries in seeds.items()}
    return {seed: table for seed, table in tables.items() if table}
