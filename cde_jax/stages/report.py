"""What `prepare` made, for the terminal, as `report.json`, and as a figure, `report.png`."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from cde_jax.batching.plan import BatchPlan
from cde_jax.data.files import write_file, write_json
from cde_jax.data.store import Store
from cde_jax.evaluation.metrics import text_table

SAMPLE_STREAM = 41  # random stream id of the choice of sample clusters
SAMPLE_CLUSTERS, SAMPLE_PAIRS = 4, 4  # shown of the plan, and of each cluster
ROWS_SHOWN = 20  # of a table on the terminal; report.json has all
CUT = 88  # characters of a sample text


def content(pairs: Store, plan: BatchPlan) -> dict[str, Any]:
    """The report as JSON; a pure function of the two artefacts."""
    of_pairs = {"inputs": "inputs", "read": "counts", "tokens": "tokens"}
    of_plan = "batches_per_epoch surrogate groups dropped cluster_sizes median_cluster_size empty_clusters difficulty"
    return {
        "plan": plan.fingerprint,
        "pairs": pairs.manifest["pairs"],
        **{name: pairs.manifest.get(key, {}) for name, key in of_pairs.items()},
        "domains": len(pairs.manifest["domains"]),
        "batches": len(plan),
        "batch_size": plan.rows.shape[1],
        "hard_negatives": plan.hard_negatives.shape[2],
        **{name: plan.manifest[name] for name in of_plan.split()},
        "sample_clusters": sample_clusters(pairs, plan),
    }


def sample_clusters(pairs: Store, plan: BatchPlan) -> list[dict[str, Any]]:
    """A few clusters as text (as the paper's table 4): drawn by the plan's seed among those with enough pairs."""
    clusters = np.asarray(plan.clusters)
    sizes = np.bincount(clusters[clusters >= 0])
    candidates = np.flatnonzero(sizes >= min(SAMPLE_PAIRS, sizes.max(initial=0)))
    random = np.random.default_rng([plan.manifest["settings"]["seed"], SAMPLE_STREAM])
    chosen = np.sort(random.choice(candidates, min(SAMPLE_CLUSTERS, len(candidates)), replace=False))
    queries, documents = pairs.ragged("query_text"), pairs.ragged("document_text")
    domain, names = pairs.array("domain"), [entry["name"] for entry in pairs.manifest["domains"]]
    samples = []
    for cluster in chosen.tolist():
        rows = np.flatnonzero(clusters == cluster)
        shown = np.sort(random.choice(rows, min(SAMPLE_PAIRS, len(rows)), replace=False)).tolist()
        texts = [{"query": _cut(queries.text(row)), "document": _cut(documents.text(row))} for row in shown]
        domains = ", ".join(sorted({names[domain[row]] for row in shown}))
        samples.append({"cluster": cluster, "size": len(rows), "domain": domains, "pairs": texts})
    return samples


def text(report: dict[str, Any]) -> str:
    """`content` for the terminal."""
    inputs = report["inputs"]
    files = [f"  {name}: {count:,} pairs" for name, count in inputs.get("pairs", {}).items()]
    skipped = [f"  {name}: not read, {reason}" for name, reason in inputs.get("skipped", {}).items()]
    left_out = [f"  {reason}: {count:,} left out" for reason, count in inputs.get("left_out", {}).items()]
    lines = [
        f"{report['pairs']:,} pairs in {report['domains']} domains; {report['batches']:,} plan batches of "
        f"{report['batch_size']}, {report['batches_per_epoch']:,} an epoch",
        *(line for part in (files, skipped, left_out) for line in [*part[:ROWS_SHOWN], *_more(part)]),
        *(f"  {name}: {count:,}" for name, count in report["read"].items()),
        "",
        _table(report),
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
    pairs.barh(names, [group["rows"] for group in groups])
    pairs.set(title=f"pairs by domain ({len(report['groups'])} groups)", xlabel="pairs")
    sizes.bar(list(report["cluster_sizes"]), list(report["cluster_sizes"].values()))
    sizes.set(title="clusters by size", xlabel="pairs in a cluster", ylabel="clusters")
    sizes.tick_params(axis="x", rotation=45)
    for key, label in (("in_batch_negative_similarity", "in-batch negatives"), ("positive_similarity", "positives")):
        difficulty.plot([group["difficulty"][key] for group in groups], names, "o", label=label)
    if (random := report["difficulty"]["random_pair_similarity"]) is not None:
        difficulty.axvline(random, color="grey", linestyle="--", label="any two pairs")
    difficulty.set(title="difficulty of the batches", xlabel="mean surrogate cosine")
    difficulty.legend()
    masked.barh(names, [100 * (group["masked_share"] or 0) for group in groups])
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


def _table(report: dict[str, Any]) -> str:
    rows, dropped = [], report["dropped"]["rows"]
    for group in sorted(report["groups"], key=lambda group: -group["rows"]):
        counts = [f"{group[name]:,}" for name in ("rows", "clusters", "batches", "left_out")]
        means = [group["difficulty"][f"{kind}_similarity"] for kind in ("in_batch_negative", "positive")]
        means = ["–" if mean is None else f"{mean:.3f}" for mean in means]
        rows.append([group["name"], *counts, *means, f"{group['masked_share'] or 0:.1%}"])
    header = ["domain", "pairs", "clusters", "batches", "left out", "negatives", "positives", "masked"]
    notes = [f"left out, too few for a batch: {dropped:,} pairs"] if dropped else []
    return "\n".join([text_table(header, rows[:ROWS_SHOWN]), *_more(rows), *notes])


def _more(rows: list[Any]) -> list[str]:
    return [f"  {len(rows) - ROWS_SHOWN} more, in report.json"] if len(rows) > ROWS_SHOWN else []


def _cut(text: str, length: int = CUT) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
