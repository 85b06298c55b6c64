"""A figure of a results directory: each set's gain from the right context against its IDF shift (paper, figure 8).

python benchmarks/quality/figure.py DIR/summary.json out.png [--variant clustered-isolated] [--gain "same − first"]
"""

import argparse
import json
from pathlib import Path


def main() -> None:
    """Draw one variant, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("summary", type=Path)
    parser.add_argument("out", type=Path, help="a .png or .svg file")
    parser.add_argument("--variant", nargs="*", default=[], help="default: all that read context")
    parser.add_argument("--gain", default="same − first", choices=["same − first", "same − other", "same − none"])
    args = parser.parse_args()
    content = json.loads(args.summary.read_text())
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(7, 4.5), layout="constrained")
    axes = drawn.subplots()
    chosen = args.variant or list(content["gains"])
    for name in chosen:
        points = [
            (content["idf_shift"][one], gain[args.gain], one)
            for one, gain in content["gains"][name].items()
            if args.gain in gain
        ]
        if not points:
            continue
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o", label=name)
        for x, y, one in points if len(chosen) == 1 else []:
            axes.annotate(one, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.margins(x=0.1)  # room for the names
    axes.axhline(0, color="grey", linewidth=0.8)
    gain = args.gain.replace("first", content["first"])
    axes.set(xlabel="IDF shift between training data and corpus (nats)", ylabel=f"NDCG@10, {gain}")
    if len(chosen) > 1:
        axes.legend(fontsize=7)
    drawn.savefig(args.out, dpi=150)


if __name__ == "__main__":
    main()
