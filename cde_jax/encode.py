"""The command that encodes files of documents or queries into Parquet files of vectors, here or on a Ray cluster.

python -m cde_jax.encode --model DIR --context corpus.safetensors --input 'corpus/*.parquet' --output vectors/
"""

import argparse
import logging
import sys
from pathlib import Path

from cde_jax.commands import exit_with_message


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m cde_jax.encode")
    add = parser.add_argument
    add("--model", required=True, help="an export, a directory or a hub name")
    add("--input", required=True, nargs="+", metavar="PATTERN", help="Parquet or JSON lines with id, text and title")
    add("--output", required=True, type=Path, metavar="FOLDER", help="a file for each input; finished ones are kept")
    add("--context", type=Path, metavar="FILE", help="what Context.save wrote; without it null slots, or a biencoder")
    add("--adapter", type=Path, metavar="FILE", help="what `python -m cde_jax.adapt` wrote")
    add("--side", choices=("documents", "queries"), default="documents", help="which prefix and length texts have")
    add("--dtype", choices=("float32", "float16", "int8", "binary"), default="float32", help="of the vectors")
    add("--dimensions", type=int, help="keep the first N, where the model was trained so (train.matryoshka)")
    add("--engine", choices=("local", "ray"), default="local", help="this process, or a model in each actor of Ray")
    return parser


def main(argv: list[str]) -> None:
    """User errors exit with a message, no traceback."""
    logging.basicConfig(format="%(message)s")
    flags = vars(_parser().parse_args(argv))
    with exit_with_message():
        from cde_jax.stages.encode import encode

        for line in encode(flags.pop("input"), flags.pop("output"), engine=flags.pop("engine"), **flags):
            print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
