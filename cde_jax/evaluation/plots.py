"""A figure as SVG, and its data beside it as CSV; the columns of the data are the labels of the axes."""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cde_jax.data.files import write_file

Row = dict[str, str | int | float]


class Figure(NamedTuple):
    """Rows of data, and which of their columns are drawn how; other columns are in the CSV only."""

    title: str
    rows: list[Row]
    x: str
    y: str
    series: str  # column: one colour a value
    draw: Callable[[Any, "Figure"], None]  # one of the functions below: (axes, figure)
    label: str | None = None  # column: text beside each point

    def by_series(self) -> dict[Any, list[Row]]:
        """The rows of each series, in order of appearance."""
        return {key: [r for r in self.rows if r[self.series] == key] for key in _values(self.rows, self.series)}


def write(figure: Figure, directory: str | Path, name: str) -> Path:
    """Write NAME.csv and NAME.svg into a directory, which is made where needed; returns the SVG's path."""
    if not figure.rows:
        raise ValueError(f"{name}: expected data to draw, got none")
    directory, text = Path(directory), io.StringIO()
    table = csv.DictWriter(text, list(figure.rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(figure.rows)
    directory.mkdir(parents=True, exist_ok=True)
    write_file(directory / f"{name}.csv", text.getvalue().encode())
    write_file(directory / f"{name}.svg", svg(figure))
    return directory / f"{name}.svg"


def svg(figure: Figure) -> bytes:
    """The figure as SVG, its text kept as text; the same bytes for the same data."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas  # draws without a display and without global state

    canvas, drawn = Canvas(figsize=(8, 5), layout="constrained"), io.BytesIO()
    axes = canvas.subplots()
    axes.set(xlabel=figure.x, ylabel=figure.y)
    axes.set_title(figure.title, fontsize=11, wrap=True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.draw(axes, figure)
    if axes.get_legend_handles_labels()[0]:
        canvas.legend(loc="outside right upper", title=figure.series, frameon=False, fontsize=9)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "cde_jax"}):
        canvas.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def lines(axes: Any, figure: Figure) -> None:
    """A line a series through the means at each x, and the range of the rows there as a band."""
    places = sorted({row[figure.x] for row in figure.rows})
    for key, rows in figure.by_series().items():
        at = sorted({row[figure.x] for row in rows})
        values = [[row[figure.y] for row in rows if row[figure.x] == x] for x in at]
        (line,) = axes.plot(at, [np.mean(v) for v in values], "o-", markersize=4, label=key)
        axes.fill_between(at, list(map(min, values)), list(map(max, values)), color=line.get_color(), alpha=0.15)
    if len(places) > 2 and places[-1] > 8 * places[1] > 0:  # doubling: logarithmic, with 0 at its left
        axes.set_xscale("symlog", base=2, linthresh=places[1])
    axes.set_xticks(places, [f"{x:g}" for x in places])


def points(axes: Any, figure: Figure) -> None:
    """A point a row, with its label where the figure has them."""
    for key, rows in figure.by_series().items():
        axes.scatter([r[figure.x] for r in rows], [r[figure.y] for r in rows], s=28, alpha=0.8, label=key)
    for row in figure.rows if figure.label else ():
        place = row[figure.x], row[figure.y]
        axes.annotate(row[figure.label], place, textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.margins(0.12)


def bars(axes: Any, figure: Figure) -> None:
    """A group of bars for each x, a bar a series: the mean of its rows, and their range as a line."""
    groups, series = _values(figure.rows, figure.x), figure.by_series()
    width = 0.8 / len(series)
    for number, (key, rows) in enumerate(series.items()):
        values = [[row[figure.y] for row in rows if row[figure.x] == group] for group in groups]
        means = np.array([np.mean(v) for v in values])
        spread = [means - list(map(min, values)), list(map(max, values)) - means]
        places = np.arange(len(groups)) + (number - (len(series) - 1) / 2) * width
        axes.bar(places, means, width, yerr=spread, error_kw={"linewidth": 0.8}, label=key)
    axes.set_xticks(range(len(groups)), groups, rotation=30, ha="right")


def grid(axes: Any, figure: Figure) -> None:
    """A cell for each x and y with the mean of `series`; coloured by its difference from the cell where x = y."""
    columns, rows = _values(figure.rows, figure.x), _values(figure.rows, figure.y)
    cells = np.array([
        [np.mean([r[figure.series] for r in figure.rows if (r[figure.x], r[figure.y]) == (x, y)]) for x in columns]
        for y in rows
    ])  # fmt: skip
    change = cells - np.array([row[columns.index(y)] for y, row in zip(rows, cells, strict=True)])[:, None]
    limit = max(float(np.abs(change).max()), 1e-3)
    image = axes.imshow(change, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    axes.figure.colorbar(image, label=f"{figure.series}: difference from the set's own context")
    for (i, j), value in np.ndenumerate(cells):
        ink = "white" if abs(change[i, j]) > 0.6 * limit else "black"
        axes.text(j, i, f"{value:.3f}", ha="center", va="center", fontsize=9, color=ink)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), rows)


def _values(rows: Sequence[Row], column: str) -> list[Any]:
    return list(dict.fromkeys(row[column] for row in rows))
