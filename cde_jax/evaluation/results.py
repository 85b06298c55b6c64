"""Results of the evaluate command: a Parquet file a task with every query's scores, and the means of all tasks."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cde_jax.data.files import write_file
from cde_jax.evaluation.compare import Comparison, compare
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

    Raises ValueError where there is nothing to pair.
    """
    runs = [read_run(folder) for folder in folders]
    names = [name for name in runs[0] if name in runs[1]]
    sides = [_by_kind({name: run[name] for name in names}, measure) for run in runs]
    pairs = [kinds] if kinds else [(kind, kind) for kind in sides[0] if kind in sides[1]]
    if not pairs or any(kind not in side for pair in pairs for kind, side in zip(pair, sides, strict=True)):
        raise ValueError(
            f"expected {measure} of the same tasks and kinds of context in {folders[0]} and {folders[1]}, they have "
            f"the tasks {names} and the kinds {list(sides[0])} and {list(sides[1])}: choose among these"
        )
    rows = []
    for pair in pairs:
        first, second = _same_seeds(*(side[kind] for kind, side in zip(pair, sides, strict=True)))
        c: Comparison = compare(first, second, *pair)
        seeds = f"{len(first)} seed" + "s" * (len(first) > 1)
        rows.append([" − ".join(dict.fromkeys(pair)), f"{c.difference:+.4f}", f"{c.low:+.4f} … {c.high:+.4f}",
                     f"{c.wins} of {c.sets}", seeds])  # fmt: skip
    return text_table([f"{measure}, first − second", "difference", "95 % interval", "tasks won", "over"], rows)


def _by_kind(run: Mapping[str, Cells], measure: str) -> dict[str, dict[int | None, Scores]]:
    """{kind: {seed: scores}} of the tasks that have the measure."""
    sides: dict[str, dict[int | None, Scores]] = {}
    for name, cells in run.items():
        for (kind, seed), queries in cells.items():
            if measure in next(iter(queries.values())):
                scores = sides.setdefault(kind, {}).setdefault(seed, Scores(0, {}))  # the measure has the cutoff
                scores.per_query[name] = {kind: {query: row[measure] for query, row in queries.items()}}
    return sides


def _same_seeds(
    first: Mapping[int | None, Scores], second: Mapping[int | None, Scores]
) -> tuple[list[Scores], list[Scores]]:
    """Scores of the seeds of both; those of a kind without seeds stand beside each seed of the other."""
    for one, other in ((first, second), (second, first)):
        if list(one) == [None] and None not in other:
            paired = list(one.values()) * len(other), list(other.values())
            return paired if one is first else paired[::-1]
    seeds = [seed for seed in first if seed in second]
    return [first[seed] for seed in seeds], [second[seed] for seed in seeds]
