"""The command that draws one figure of an export, as SVG with its data beside it as CSV.

python -m cde_jax.figures NAME --model EXPORT --data BEIR_FOLDER... --out DIR [--workdir DIR...] [--seeds 3]
"""

import argparse
import sys
from pathlib import Path

from cde_jax.commands import exit_with_message


def main(argv: list[str]) -> None:
    """User errors exit with a message, no traceback."""
    from cde_jax.evaluation.figures import FIGURES, make

    parser = argparse.ArgumentParser("python -m cde_jax.figures")
    add = parser.add_argument
    add("name", help=", ".join(FIGURES))
    add("--model", help="an export, a directory or a hub name")
    add("--data", nargs="+", default=[], metavar="FOLDER", help="retrieval sets in BEIR's layout")
    add(
        "--workdir",
        nargs="+",
        default=[],
        metavar="DIR",
        help="of runs: for difficulty, and training data of idf-shift",
    )
    add("--out", required=True, type=Path, help="where NAME.svg and NAME.csv are written")
    add("--seeds", type=int, default=3, help="samples of context documents")
    a = parser.parse_args(argv)
    with exit_with_message():
        figure, path = make(a.name, a.out, a.model, a.data, a.workdir, a.seeds)
        print(f"{figure.title}\n{path}")


if __name__ == "__main__":
    main(sys.argv[1:])
