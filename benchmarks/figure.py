"""Figures of results.

    python benchmarks/figure.py runs/demo/evaluation.json OUT.svg          # NDCG by set and kind of context, as bars
    python benchmarks/figure.py runs/table1/comparison.json OUT.png --of clustered-isolated "same corpus" \
        --over random-biencoder none                        # gain by set against IDF shift (paper, figure 8)
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.figure import Figure


def main() -> None:
    """Draw the file by what it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path, help="a .png or .svg file")
    parser.add_argument("--of", nargs=2, metavar=("VARIANT", "KIND"), help="of a comparison.json")
    parser.add_argument("--over", nargs=2, metavar=("VARIANT", "KIND"))
    args = parser.parse_args()
    content = json.loads(args.source.read_text())
    rcParams["svg.hashsalt"] = "cde_jax"  # the same bytes for the same numbers
    figure = gains(content, args.of, args.over) if args.of else bars(content)
    figure.savefig(args.out, dpi=150, metadata={"Date": None} if args.out.suffix == ".svg" else None)


def bars(evaluation: dict[str, Any]) -> Figure:
    """A group of bars for each set and for the mean, a bar for each kind of context."""
    rows = evaluation["sets"] | {"mean": evaluation["mean"]}
    kinds = list(evaluation["mean"])
    width = 0.8 / len(kinds)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    for i, kind in enumerate(kinds):
        places = np.arange(len(rows)) + (i - (len(kinds) - 1) / 2) * width
        axes.bar(places, [row[kind] for row in rows.values()], width, label=kind)
    axes.set_xticks(range(len(rows)), list(rows))
    axes.set_ylabel(evaluation["metric"].upper())
    figure.legend(ncols=(len(kinds) + 1) // 2, loc="outside upper center", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def gains(comparison: dict[str, Any], of: list[str], over: list[str]) -> Figure:
    """Each set's gain of one variant and kind of context over another, against the set's IDF shift."""
    by_set = {(row["variant"], row["kind"]): row["by_set"] for row in comparison["rows"]}
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, shift in comparison["idf_shift"].items():
        gain = by_set[tuple(of)][name] - by_set[tuple(over)][name]
        axes.plot(shift, gain, "o", color="C0")
        axes.annotate(name, (shift, gain), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.margins(x=0.1)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="IDF shift between training data and corpus (nats)")
    axes.set(ylabel=f"NDCG: {of[0]}, {of[1]} − {over[0]}, {over[1]}")
    return figure


if __name__ == "__main__":
    main()
