"""The command that scores a model on retrieval sets and tasks, under each kind of context, and compares two runs.

python -m cde_jax.evaluate --model DIR_OR_NAME --data BEIR_FOLDER... | --tasks NAME... | --benchmark "MTEB(eng, v2)" \
    --context corpus,random,none,whitened --context-seeds 0 1 2 3 4 --random-corpus BEIR_FOLDER --out DIR
python -m cde_jax.evaluate compare DIR_A DIR_B [--context corpus[,none]] [--measure ndcg@10]
"""

import argparse
import logging
import sys
from pathlib import Path

from cde_jax.commands import exit_with_message

KINDS = "corpus, whitened, statistics, random, none"


def _kinds(text: str) -> list[str]:
    return [kind.strip() for kind in text.split(",") if kind.strip()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m cde_jax.evaluate", epilog="Compare two runs: compare DIR_A DIR_B")
    add = parser.add_argument
    add("--model", required=True, help="an export, a directory or a hub name")
    add("--out", required=True, type=Path, help="where results are written; finished tasks there are kept")
    add("--data", nargs="+", default=[], metavar="FOLDER", help="retrieval sets in BEIR's layout")
    add(
        "--first-model",
        metavar="MODEL",
        help="rank only its candidates of --data: bm25, lsa, a sentence-transformers name",
    )
    add("--candidates", type=int, default=1024, metavar="N", help="of --first-model for each query")
    add("--conteb", nargs="+", default=[], metavar="FOLDER", help="sets of ConTEB, documents/ and queries/ as Parquet")
    add("--tasks", nargs="+", default=[], metavar="NAME", help="tasks of MTEB, by name")
    add("--benchmark", metavar="NAME", help='a benchmark of MTEB, for example "MTEB(eng, v2)"')
    add("--context", type=_kinds, default=[], metavar="KIND,…", help=f"{KINDS}; document and late for --conteb")
    add("--context-seeds", nargs="+", type=int, default=[0], metavar="SEED", help="of the context's sample")
    add("--random-corpus", metavar="PATH", help="documents of the context `random`: a BEIR folder or a text a line")
    return parser


def _comparison_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m cde_jax.evaluate compare")
    parser.add_argument("runs", nargs=2, type=Path, metavar="DIR", help="--out of two runs")
    parser.add_argument("--context", type=_kinds, help="of both, or FIRST,SECOND; by default all that both have")
    parser.add_argument("--measure", default="ndcg@10", help="a column of scores/*.parquet")
    return parser


def main(argv: list[str]) -> None:
    """User errors exit with a message, no traceback."""
    logging.basicConfig(format="%(message)s")
    with exit_with_message():
        if argv[:1] == ["compare"]:
            from cde_jax.evaluation.results import compare_runs

            flags = _comparison_parser().parse_args(argv[1:])
            kinds = flags.context and (flags.context[0], flags.context[-1])
            print(compare_runs(flags.runs, kinds, flags.measure))
            return
        flags = vars(_parser().parse_args(argv))
        from cde_jax.stages.benchmark import evaluate

        options = {"kinds": flags.pop("context"), "seeds": flags.pop("context_seeds")}
        for text in evaluate(**flags, **options):
            print(text, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
