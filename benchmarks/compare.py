"""Compare the runs of a sweep: means by set, paired differences to the baseline with 95 % intervals, sets won.

    python benchmarks/compare.py WORKDIR [--variants clustered-* …] [--baseline random-biencoder]

Reads the per-query scores that `--stage=evaluate` left in every work directory of the sweep. Differences are paired by
seed, set and query, over the seeds that both variants have, and are to the same kind of context of the baseline, or to
its "none" where it does not have the kind; the interval resamples queries within sets, and seeds. `IDF shift` is how
far a set is from the training data: the mean |log ratio| of the rates at which a token appears in documents of the
one and of the other, over the tokens of the set's documents (after the paper's figure 8). All numbers are written to
WORKDIR/comparison.json, which `figure.py` draws.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from jaxtyping import Int  # noqa: E402

from cde_jax.data.files import read_json, write_json  # noqa: E402
from cde_jax.data.store import Store  # noqa: E402
from cde_jax.evaluation.beir import NO_CONTEXT, read_tokens  # noqa: E402
from cde_jax.evaluation.compare import compare  # noqa: E402
from cde_jax.evaluation.metrics import Scores, mean_over_sets, text_table  # noqa: E402
from cde_jax.stages.workdir import PAIRS, PER_QUERY, TOKENS  # noqa: E402

BASELINES = ("BM25", "LSA")
SWEEP = "sweep.json"
Runs = Mapping[str, Mapping[int, Scores]]  # {variant: {seed: scores}}


def main() -> None:
    """Print the tables and write comparison.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--variants", nargs="*", default=["*"], help="names or patterns; all if not given")
    parser.add_argument("--baseline", default="", help="the sweep's first variant if not given")
    parser.add_argument("--baseline-kind", default="", help="its kind of context for all differences, e.g. none")
    args = parser.parse_args()
    try:
        runs, baseline = load(args.workdir, args.variants, args.baseline)
        shifts = idf_shifts(args.workdir)
        content = {"baseline": baseline, "idf_shift": shifts, "rows": rows(runs, baseline, args.baseline_kind)}
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    write_json(args.workdir / "comparison.json", content)
    print(text(content))


def load(workdir: Path, patterns: Sequence[str], baseline: str = "") -> tuple[Runs, str]:
    """Scores of the evaluated runs of a sweep, and the baseline's name. Raises ValueError where there are none."""
    runs: dict[str, dict[int, Scores]] = {}
    for name, run in read_json(workdir / SWEEP)["runs"].items():
        baseline, file = baseline or run["variant"], workdir / name / PER_QUERY
        if file.exists() and (run["variant"] == baseline or any(fnmatch(run["variant"], p) for p in patterns)):
            runs.setdefault(run["variant"], {})[run["seed"]] = Scores.from_json(read_json(file))
    if baseline not in runs:
        raise ValueError(f"{workdir}: the baseline {baseline!r} has no {PER_QUERY} yet: run sweep.py --stage=evaluate")
    return runs, baseline


def rows(runs: Runs, baseline: str, baseline_kind: str = "") -> list[dict[str, Any]]:
    """A row of numbers, all NDCG, for each variant and kind of context."""
    found = []
    for variant, by_seed in runs.items():
        for kind in mean_over_sets(next(iter(by_seed.values())).means):
            if kind in BASELINES and variant != baseline:
                continue  # they do not depend on the model
            by_set = [{name: kinds[kind] for name, kinds in scores.means.items()} for scores in by_seed.values()]
            means = [float(np.mean(list(row.values()))) for row in by_set]
            row = {"variant": variant, "kind": kind, "seeds": len(means), "mean": float(np.mean(means))}
            row["sd"] = float(np.std(means, ddof=1)) if len(means) > 1 else None
            row["by_set"] = {name: float(np.mean([row[name] for row in by_set])) for name in by_set[0]}
            seeds = sorted(by_seed.keys() & runs[baseline].keys())
            other = [runs[baseline][seed] for seed in seeds]
            same_kind = variant != baseline and all(kind in kinds for s in other for kinds in s.means.values())
            other_kind = baseline_kind or (kind if same_kind else NO_CONTEXT)
            if other and (variant, kind) != (baseline, other_kind):
                compared = compare([by_seed[seed] for seed in seeds], other, kind, other_kind)
                row |= {"baseline_kind": other_kind, **compared._asdict()}
            found.append(row)
    return found


def idf_shifts(workdir: Path) -> dict[str, float]:
    """{evaluation set: IDF shift}, in nats, of the sets that the sweep's first run holds as tokens."""
    run = workdir / next(iter(read_json(workdir / SWEEP)["runs"]))
    pairs = Store.open(run / PAIRS, kind="pairs", verify=False).ragged("document_tokens")
    training = [pairs.row(i) for i in range(pairs.count())]
    sets = {folder.name: list(read_tokens(folder).corpus.values()) for folder in (run / TOKENS).glob("[!.]*")}
    size = 1 + max(int(row.max()) for rows in (training, *sets.values()) for row in rows if len(row))
    rates = document_rates(training, size)
    return {name: idf_shift(rates, len(training), document_rates(c, size), len(c)) for name, c in sets.items()}


def document_rates(documents: Iterable[Int[np.ndarray, " _"]], vocab_size: int) -> Int[np.ndarray, " V"]:
    """How many documents have each token."""
    counts = np.zeros(vocab_size, np.int64)
    for document in documents:
        counts[np.unique(document)] += 1
    return counts


def idf_shift(training: Int[np.ndarray, " V"], documents: int, corpus: Int[np.ndarray, " V"], others: int) -> float:
    """Mean |IDF in training − IDF in the corpus|, weighted by `corpus`; IDF is log((n + 1) / (count + 1/2))."""
    there, here = np.log((documents + 1) / (training + 0.5)), np.log((others + 1) / (corpus + 0.5))
    return float(np.average(np.abs(there - here), weights=corpus))


def text(content: Mapping[str, Any]) -> str:
    """The tables for the terminal; sets are in the order of their IDF shift."""
    shifts, table = content["idf_shift"], content["rows"]
    names = sorted(table[0]["by_set"], key=lambda name: (shifts.get(name, 0), name))
    shown = [f"{shifts[name]:.3f}" if name in shifts else "–" for name in names]
    summary, by_set = [], [["IDF shift", "", *shown]]
    for row in table:
        difference, wins, sd = "–", "–", "–" if row["sd"] is None else f"{row['sd']:.4f}"
        if "difference" in row:
            to = "" if row["baseline_kind"] == row["kind"] else f" to {row['baseline_kind']}"
            difference = f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]{to}"
            wins = f"{row['wins']} of {row['sets']}"
        summary.append([row["variant"], row["kind"], str(row["seeds"]), f"{row['mean']:.4f}", sd, difference, wins])
        by_set.append([row["variant"], row["kind"], *(f"{row['by_set'][name]:.4f}" for name in names)])
    header = ["variant", "context", "seeds", "mean NDCG", "sd", f"difference to {content['baseline']}", "sets won"]
    return "\n\n".join([text_table(header, summary), text_table(["NDCG", "context", *names], by_set)])


if __name__ == "__main__":
    main()
