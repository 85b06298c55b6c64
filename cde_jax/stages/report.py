"""What `prepare` made, for a person: per-domain table, cluster sizes, difficulty, masks and sample clusters.

The same content as text for the terminal, as `report.json`, and as a figure, `report.png`.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np

from cde_jax.batching.plan import BatchPlan
from cde_jax.data.files import write_file, write_json
from cde_jax.data.store import Store

SAMPLE_STREAM = 41  # keeps the choice of clusters apart from the other random numbers of the same seed
SAMPLE_CLUSTERS, SAMPLE_PAIRS = 4, 4  # shown of the plan, and of each cluster
ROWS_SHOWN = 20  # of the table on the terminal; report.json has all
CUT = 88  # characters of a sample text


def content(pairs: Store, plan: BatchPlan) -> dict[str, Any]:
    """Everything there is to say about a plan, ready for JSON; a pure function of the two artefacts."""
    manifest = plan.manifest
    return {
        "plan": plan.fingerprint,
        "pairs": pairs.manifest["pairs"],
        "read": pairs.manifest.get("counts", {}),
        "tokens": pairs.manifest.get("tokens", {}),
        "domains": len(pairs.manifest["domains"]),
        "batches": len(plan),
        "batches_per_epoch": manifest["batches_per_epoch"],
        "batch_size": plan.rows.shape[1],
        "hard_negatives": plan.hard_negatives.shape[2],
        "surrogate": manifest["surrogate"],
        "groups": manifest["groups"],
        "dropped": manifest["dropped"],
        **{key: manifest[key] for key in ("cluster_sizes", "median_cluster_size", "empty_clusters")},
        "difficulty": manifest["difficulty"],
        "sample_clusters": sample_clusters(pairs, plan),
    }


def sample_clusters(pairs: Store, plan: BatchPlan) -> list[dict[str, Any]]:
    """A few clusters as text (as the paper's table 4): drawn by the plan's seed among those with enough pairs."""
    clusters = np.asarray(plan.clusters)
    placed = np.flatnonzero(clusters >= 0)
    sizes = np.bincount(clusters[placed])
    candidates = np.flatnonzero(sizes >= min(SAMPLE_PAIRS, sizes.max(initial=0)))
    random = np.random.default_rng([plan.manifest["settings"]["seed"], SAMPLE_STREAM])
    chosen = np.sort(random.choice(candidates, min(SAMPLE_CLUSTERS, len(candidates)), replace=False))
    queries, documents = pairs.ragged("query_text"), pairs.ragged("document_text")
    domain, names = pairs.array("domain"), [entry["name"] for entry in pairs.manifest["domains"]]
    samples = []
    for cluster in chosen.tolist():
        rows = np.flatnonzero(clusters == cluster)
        shown = np.sort(random.choice(rows, min(SAMPLE_PAIRS, len(rows)), replace=False)).tolist()
        samples.append(
            {
                "cluster": cluster,
                "size": len(rows),
                "domain": ", ".join(sorted({names[domain[row]] for row in shown})),
                "pairs": [{"query": _cut(queries.text(r)), "document": _cut(documents.text(r))} for r in shown],
            }
        )
    return samples


def text(report: dict[str, Any]) -> str:
    """`content` for the terminal."""
    lines = [
        f"{report['pairs']:,} pairs in {report['domains']} domains; {report['batches']:,} plan batches of "
        f"{report['batch_size']}, {report['batches_per_epoch']:,} an epoch",
        *(f"  {name}: {count:,}" for name, count in report["read"].items()),
        "",
        *_table(report),
        "",
        "clusters by size: " + ", ".join(f"{size}: {count}" for size, count in report["cluster_sizes"].items()),
        f"  median of a pair: {report['median_cluster_size']:g}; without pairs: {report['empty_clusters']}",
        "difficulty (mean surrogate cosine) and masks:",
        *(f"  {name.replace('_', ' ')}: {value}" for name, value in report["difficulty"].items()),
        "",
        "sample clusters:",
    ]
    for sample in report["sample_clusters"]:
        lines.append(f"  cluster {sample['cluster']}, {sample['size']} pairs, {sample['domain']}")
        lines += [f"    {pair['query']}  →  {pair['document']}" for pair in sample["pairs"]]
    return "\n".join(lines)


def figure(report: dict[str, Any]) -> bytes:
    """`content` as a PNG: pairs and difficulty by group, cluster sizes, masked share."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a display and without global state
    from matplotlib.figure import Figure

    groups = sorted(report["groups"], key=lambda group: -group["rows"])[:ROWS_SHOWN]
    names = [_cut(group["name"], 28) for group in groups]
    drawn = Figure(figsize=(12, 8), layout="constrained")
    (pairs, sizes), (difficulty, masked) = drawn.subplots(2, 2)
    pairs.barh(names, [group["rows"] for group in groups], color="#4c72b0")
    pairs.set(title=f"pairs by domain ({len(report['groups'])} groups)", xlabel="pairs")
    sizes.bar(list(report["cluster_sizes"]), list(report["cluster_sizes"].values()), color="#55a868")
    sizes.set(title="clusters by size", xlabel="pairs in a cluster", ylabel="clusters")
    sizes.tick_params(axis="x", rotation=45)
    for key, color, label in (
        ("in_batch_negative_similarity", "#c44e52", "in-batch negatives"),
        ("positive_similarity", "#4c72b0", "positives"),
    ):
        difficulty.plot([group["difficulty"][key] for group in groups], names, "o", color=color, label=label)
    if (random := report["difficulty"]["random_pair_similarity"]) is not None:
        difficulty.axvline(random, color="grey", linestyle="--", label="any two pairs")
    difficulty.set(title="difficulty of the batches", xlabel="mean surrogate cosine")
    difficulty.legend()
    masked.barh(names, [100 * (group["masked_share"] or 0) for group in groups], color="#8172b2")
    masked.set(title="masked as false negatives", xlabel="% of a batch's negatives")
    for axes in (pairs, difficulty, masked):
        axes.invert_yaxis()
        axes.tick_params(axis="y", labelsize=7)
    png = io.BytesIO()
    FigureCanvasAgg(drawn).print_png(png, metadata={"Software": None})
    return png.getvalue()


def write(pairs: Store, plan: BatchPlan, workdir: Path) -> str:
    """Write `report.json` and `report.png` into `workdir`; returns the text for the terminal."""
    report = content(pairs, plan)
    write_json(workdir / "report.json", report)
    write_file(workdir / "report.png", figure(report))
    return text(report)


def _table(report: dict[str, Any]) -> list[str]:
    groups = sorted(report["groups"], key=lambda group: -group["rows"])
    width = max([len("domain"), *(len(group["name"]) for group in groups[:ROWS_SHOWN])])
    lines = [
        f"{'domain':<{width}}  {'pairs':>9}  {'clusters':>8}  {'batches':>7}  {'left out':>8}  "
        f"{'negatives':>9}  {'positives':>9}  {'masked':>6}"
    ]
    for group in groups[:ROWS_SHOWN]:
        negative, positive = (group["difficulty"][f"{k}_similarity"] for k in ("in_batch_negative", "positive"))
        masked = group["masked_share"] or 0
        lines.append(
            f"{group['name']:<{width}}  {group['rows']:>9,}  {group['clusters']:>8,}  {group['batches']:>7,}  "
            f"{group['left_out']:>8,}  {_number(negative):>9}  {_number(positive):>9}  {masked:>6.1%}"
        )
    if len(groups) > ROWS_SHOWN:
        lines.append(f"{f'{len(groups) - ROWS_SHOWN} more, in report.json':<{width}}")
    if report["dropped"]["rows"]:
        lines.append(f"left out, too few for a batch: {report['dropped']['rows']:,} pairs")
    return lines


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _cut(text: str, length: int = CUT) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
