"""Results of the evaluate command: a Parquet file a task with every query's scores, and the means of all tasks."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cde_jax.data.files import write_file
from cde_jax.evaluation.compare import compare
from cde_jax.evaluation.metrics import PerQuery, Scores, text_table

Cells = dict[tuple[str, int | None], PerQuery]  # (kind of context, seed of its sample, None without one) → scores
Summary = dict[str, dict[str, dict[str, Any]]]  # {kind: {measure: {"mean", "spread", "seeds"}}}
SCORES = "scores"  # folder of the Parquet files


def write_scores(path: Path, cells: Cells, identity: str) -> None:
    """A Parquet file with a row a query, kind of context and seed."""
    import pyarrow
    from pyarrow import parquet

    rows = [
        {"context": kind, "seed": seed, "query": query} | scores
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
        cells.setdefault((kind, seed), {})[query] = scores
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
        for measure in next(iter(queries.values())):
            mean = float(np.mean([scores[measure] for scores in queries.values()]))
            result.setdefault(kind, {}).setdefault(measure, {"seeds": {}})["seeds"][str(seed)] = mean
    for measures in result.values():
        for entry in measures.values():
            means = list(entry["seeds"].values())
            entry |= {"mean": float(np.mean(means)), "spread": float(np.std(means, ddof=1)) if means[1:] else None}
    return result


def table(tasks: Mapping[str, Summary], main: Mapping[str, str]) -> str:
    """A row a task, a column a kind of context: the task's main measure, with its spread over seeds."""
    kinds = list(dict.fromkeys(kind for kinds in tasks.values() for kind in kinds))
    rows = [[f"{name}, {main[name]}", *(_cell(row.get(kind, {}).get(main[name])) for kind in kinds)]
            for name, row in tasks.items()]  # fmt: skip
    means = [[row[kind][main[name]]["mean"] for name, row in tasks.items() if kind in row] for kind in kinds]
    whole = [f"{np.mean(column):.4f}" if len(column) == len(tasks) else "–" for column in means]
    return text_table(["task", *kinds], [*rows, ["mean", *whole]])


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "–"
    return f"{entry['mean']:.4f}" + ("" if entry["spread"] is None else f" ± {entry['spread']:.4f}")


def compare_runs(folders: Sequence[Path], kinds: tuple[str, str] | None, measure: str) -> str:
    """A table of paired bootstrap intervals between two runs, for kinds of context of both or for one of each.

    Tasks and seeds are those that both have; a kind without seeds stands beside each seed of the other. Raises
    ValueError where there is nothing to pair.
    """
    runs = [read_run(folder) for folder in folders]
    names = [name for name in runs[0] if name in runs[1] and all(measure in _first(run[name]) for run in runs)]
    sides: list[dict[str, list[int | None]]] = []  # {kind: seeds} of all these tasks
    for run in runs:
        keys = [key for key in run[names[0]] if all(key in run[name] for name in names)] if names else []
        sides.append({kind: [seed for k, seed in keys if k == kind] for kind, _ in keys})
    pairs = [kinds] if kinds else [(kind, kind) for kind in sides[0] if kind in sides[1]]
    rows = []
    for pair in pairs:
        first, second = (side.get(kind, []) for kind, side in zip(pair, sides, strict=True))
        seeds = first if second == [None] else second if first == [None] else [seed for seed in first if seed in second]
        scores = [
            [Scores(0, {name: {kind: _column(run[name], kind, seed, measure)} for name in names}) for seed in seeds]
            for run, kind in zip(runs, pair, strict=True)
        ]
        if seeds:
            c = compare(*scores, *pair)
            over = f"{len(seeds)} seed" + "s" * (len(seeds) > 1)
            row = f"{c.difference:+.4f}", f"{c.low:+.4f} … {c.high:+.4f}", f"{c.wins} of {c.sets}", over
            rows.append([" − ".join(dict.fromkeys(pair)), *row])
    if not rows:
        raise ValueError(
            f"expected {measure} of the same tasks, kinds of context and seeds in {folders[0]} and {folders[1]}, they "
            f"have the tasks {names} and the kinds {list(sides[0])} and {list(sides[1])}: choose among these"
        )
    return text_table([f"{measure}, first − second", "difference", "95 % interval", "tasks won", "over"], rows)


def _column(cells: Cells, kind: str, seed: int | None, measure: str) -> dict[str, float]:
    queries = cells[kind, seed if (kind, seed) in cells else None]
    return {query: scores[measure] for query, scores in queries.items()}


def _first(cells: Cells) -> dict[str, float]:
    return next(iter(next(iter(cells.values())).values()))
