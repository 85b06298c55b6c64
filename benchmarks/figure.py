"""Draw an evaluation.json as bars: python benchmarks/figure.py runs/demo/evaluation.json OUT.svg"""

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from cde_jax.data.files import read_json


def main(source: str, out: str) -> None:
    """One group of bars a set, one bar a kind, the mean last."""
    evaluation = read_json(source)
    rows = evaluation["sets"] | {"mean": evaluation["mean"]}
    kinds = list(evaluation["mean"])
    width = 0.8 / len(kinds)
    plt.rcParams["svg.hashsalt"] = "cde_jax"  # the same file from the same numbers
    figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
    for i, kind in enumerate(kinds):
        places = np.arange(len(rows)) + (i - (len(kinds) - 1) / 2) * width
        axes.bar(places, [row[kind] for row in rows.values()], width, label=kind)
    axes.set_xticks(range(len(rows)), list(rows))
    axes.set_ylabel(evaluation["metric"].upper())
    figure.legend(ncols=(len(kinds) + 1) // 2, loc="outside upper center", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
