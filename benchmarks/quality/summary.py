"""What the results say: means and spread, paired differences with their intervals, gains by set."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from cde_jax.data.files import write_json
from quality.arrays import TokenSet
from quality.results import Line, load_queries
from quality.scoring import NONE, OTHER, OTHER_BEGINNINGS, OTHER_QUERIES, SAME, SAME_BEGINNINGS, SAME_QUERIES

BOOTSTRAP_STREAM = 64
DRAWS = 2000
WHITENED = (SAME_BEGINNINGS, OTHER_BEGINNINGS, SAME_QUERIES, OTHER_QUERIES)
KINDS = (SAME, OTHER, NONE, *WHITENED)

Queries = dict[str, dict[str, np.ndarray]]  # {set: {kind: NDCG@10 of each query}}


class Interval(NamedTuple):
    """A mean and the 95 % interval of its bootstrap."""

    mean: float
    low: float
    high: float


def write(
    folder: Path, lines: Sequence[Line], variants: Sequence[str], seeds: Sequence[int], sets: Sequence[TokenSet]
) -> str:
    """Summarise the variants that have results; returns the text and writes it as numbers to summary.json."""
    done = {(line["variant"], line["seed"]) for line in lines}
    runs = {
        name: {seed: load_queries(folder, name, seed) for seed in seeds if (name, seed) in done} for name in variants
    }
    runs = {name: by_seed for name, by_seed in runs.items() if by_seed}
    if not runs:
        return "no results yet"
    content = summarise(runs, {one.name: one.idf_shift for one in sets})
    write_json(folder / "summary.json", content)
    return text(content)


def summarise(runs: Mapping[str, Mapping[int, Queries]], shifts: Mapping[str, float]) -> dict[str, Any]:
    """All numbers of the summary, ready for JSON; the first variant is what the others are compared with."""
    first = next(iter(runs))
    rows, gains = [], {}
    for name, by_seed in runs.items():
        kinds = [kind for kind in KINDS if all(kind in row for queries in by_seed.values() for row in queries.values())]
        for kind in kinds:
            scores = [np.mean([row[kind].mean() for row in queries.values()]) for queries in by_seed.values()]
            row = {"variant": name, "context": kind, "seeds": len(scores), "mean": round(float(np.mean(scores)), 5)}
            row["sd"] = round(float(np.std(scores, ddof=1)), 5) if len(scores) > 1 else None
            of_first = _kind_of(runs[first], kind)
            compared = None if (name, kind) == (first, of_first) else difference(by_seed, kind, runs[first], of_first)
            row["difference"] = compared and [round(value, 5) for value in compared]
            row["sets"] = {
                one: round(float(np.mean([queries[one][kind].mean() for queries in by_seed.values()])), 5)
                for one in shifts
            }
            rows.append(row)
        gains[name] = {one: _gains(by_seed, runs[first], one, kinds) for one in shifts}
    return {"first": first, "rows": rows, "idf_shift": dict(shifts), "gains": gains}


def difference(
    ours: Mapping[int, Queries], kind: str, theirs: Mapping[int, Queries], their_kind: str
) -> Interval | None:
    """Mean over sets of the paired difference of queries, over the seeds that both have; None without any."""
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    names = list(ours[seeds[0]])
    return bootstrap([np.stack([ours[s][n][kind] - theirs[s][n][their_kind] for s in seeds]) for n in names])


def bootstrap(differences: Sequence[Float[np.ndarray, "s _"]], draws: int = DRAWS) -> Interval:
    """The mean over sets of each set's mean, and its 95 % interval: queries drawn in sets, seeds for all sets alike.

    differences: of each set, by seed and query.
    """
    random = np.random.default_rng([BOOTSTRAP_STREAM])
    seeds = len(differences[0])
    of_seeds = random.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds  # [draws, s]
    total = np.zeros(draws)
    for one in differences:
        count = one.shape[1]
        of_queries = random.multinomial(count, np.full(count, 1 / count), draws) / count  # [draws, q]
        total += np.einsum("ds,ds->d", of_seeds, of_queries @ one.T)
    low, high = np.percentile(total / len(differences), [2.5, 97.5])
    return Interval(float(np.mean([one.mean() for one in differences])), float(low), float(high))


def text(content: Mapping[str, Any]) -> str:
    """The summary for the terminal."""
    first, shifts = content["first"], content["idf_shift"]
    width = max(len(row["variant"]) for row in content["rows"])
    lines = [
        f"mean NDCG@10 over {len(shifts)} sets; differences to {first}, same kind of context where it has it, 95 %",
        f"{'variant':<{width}}  {'context':<17}  seeds   mean      sd  difference",
    ]
    for row in content["rows"]:
        sd = "–" if row["sd"] is None else f"{row['sd']:.4f}"
        compared = "–"
        if row["difference"]:
            mean, low, high = row["difference"]
            compared = f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"
        lines.append(
            f"{row['variant']:<{width}}  {row['context']:<17}  {row['seeds']:>5}  {row['mean']:.4f}  {sd:>6}  "
            f"{compared}"
        )
    lines += ["", *_by_set(content["rows"], width)]
    for name, by_set in content["gains"].items():
        if not any(by_set.values()):
            continue
        values = [gain["same − other"] for gain in by_set.values() if "same − other" in gain]
        wins = sum(value > 0 for value in values)
        lines += ["", f"{name}: same above other corpus on {wins} of {len(values)} sets"]
        lines.append(f"  {'set':<16}  IDF shift  same − other  same − none  same − {first}")
        for one in sorted(by_set, key=shifts.__getitem__):
            gain = by_set[one]
            cells = "  ".join(
                f"{gain[key]:>+12.4f}" if key in gain else f"{'–':>12}"
                for key in ("same − other", "same − none", "same − first")
            )
            lines.append(f"  {one:<16}  {shifts[one]:>9.3f}  {cells}")
    return "\n".join(lines)


def _by_set(rows: Sequence[Mapping[str, Any]], width: int) -> list[str]:
    """NDCG@10 of each variant and kind of context, a column a set."""
    names = list(rows[0]["sets"])
    lines = [f"{'NDCG@10':<{width}}  {'context':<17}" + "".join(f"  {name[:10]:>10}" for name in names)]
    for row in rows:
        cells = "".join(f"  {row['sets'][name]:>10.4f}" for name in names)
        lines.append(f"{row['variant']:<{width}}  {row['context']:<17}{cells}")
    return lines


def _gains(by_seed: Mapping[int, Queries], first: Mapping[int, Queries], one: str, kinds: Sequence[str]) -> dict:
    """A set's gains from the right context, mean over seeds: against another, none, and the first variant.

    Whitened by beginnings, where the scores have that: it stands on top of the other channels, and like them needs
    nothing but the corpus.
    """
    pairs = [(same, other) for same, other in ((SAME_BEGINNINGS, OTHER_BEGINNINGS), (SAME, OTHER)) if same in kinds]
    if not pairs:
        return {}
    same, other = pairs[0]
    found = {
        f"same − {short}": np.mean([q[one][same].mean() - q[one][kind].mean() for q in by_seed.values()])
        for short, kind in (("other", other), ("none", NONE))
        if kind in kinds
    }
    if seeds := sorted(set(by_seed) & set(first)):
        kind = _kind_of(first, same)
        found["same − first"] = np.mean([by_seed[s][one][same].mean() - first[s][one][kind].mean() for s in seeds])
    return {name: round(float(value), 5) for name, value in found.items()}


def _kind_of(runs: Mapping[int, Queries], kind: str) -> str:
    """The kind of the first variant that is compared with: the same; "none" where it has not, and of whitening."""
    if kind in WHITENED:
        return NONE
    return kind if all(kind in row for queries in runs.values() for row in queries.values()) else NONE
