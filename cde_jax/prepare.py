"""The stage before training: source → pairs → tokens → surrogate vectors → batch plan.

Each part is a folder that appears whole or not at all. One that is there and belongs to the same settings is kept;
one that belongs to others is an error, unless it is to be rebuilt.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cde_jax.batching import surrogate
from cde_jax.batching.build import build_plan
from cde_jax.batching.plan import BatchPlan
from cde_jax.config import Config
from cde_jax.data.files import fingerprint
from cde_jax.data.pairs import Pair, clean, write_pairs
from cde_jax.data.sources import beir, docstrings, jsonl
from cde_jax.data.store import Store
from cde_jax.data.tokens import Tokenizer

log = logging.getLogger(__name__)

PAIRS, VECTORS, LSA, TOKENIZER, SETS = (
    f"store/{name}" for name in ("pairs", "vectors", "lsa", "tokenizer", "evaluation")
)
PLAN = "plan"
Encode = Callable[[list[str]], Any]  # texts → vectors [n, D]


def prepare(config: Config, workdir: Path, *, rebuild: bool = False, checkpoint: Encode | None = None) -> str:
    """Make or keep `store/` and `plan/`; returns a report as text.

    `checkpoint` is the surrogate where `batching.surrogate` is "checkpoint:DIR": our own encoder as a function.
    """
    pairs = _pairs(config, workdir, rebuild)
    vectors = _vectors(config, workdir, pairs, rebuild, checkpoint)
    plan = _plan(config, workdir, pairs, vectors, rebuild)
    return report(pairs, plan)


def plan_settings(config: Config) -> dict[str, Any]:
    """The keywords of `build_plan`, which the plan's manifest repeats."""
    b = config.batching
    return {
        "batch_size": b.batch_size,
        "method": b.method,
        "cluster_size": b.cluster_size,
        "cluster_dimensions": b.cluster_dimensions,
        "cluster_rows": b.cluster_rows,
        "iterations": b.iterations,
        "tries": b.tries,
        "packing": b.packing,
        "epochs": b.epochs,
        "domain_weights": b.domain_weights,
        "hard_negatives": b.hard_negatives,
        "mine_first": b.mine_first,
        "mine_last": b.mine_last,
        "mine_margin": b.mine_margin,
        "margin": b.filter_margin,
        "seed": config.seed,
    }


def load_plan(config: Config, workdir: Path) -> tuple[Store, BatchPlan]:
    """The pairs and the plan of this work directory, checked against each other and the config."""
    pairs = Store.open(workdir / PAIRS, kind="pairs")
    plan = BatchPlan.load(workdir / PLAN)
    plan.verify(pairs.fingerprint, plan_settings(config))
    return pairs, plan


def evaluation_sets(config: Config, workdir: Path) -> list[beir.EvaluationSet]:
    """The held-out packages that `prepare` wrote, and the folders that the config names."""
    held_out = config.data.held_out if config.data.source == "docstrings" else ()
    folders = [workdir / SETS / name for name in held_out] + [Path(path) for path in config.data.evaluation]
    return [beir.read(folder) for folder in folders]


def report(pairs: Store, plan: BatchPlan) -> str:
    """What was prepared: the domains, and how hard the batches are."""
    domains = sorted(pairs.manifest["domains"], key=lambda domain: -domain["pairs"])
    lines = [f"{pairs.manifest['pairs']} pairs in {len(domains)} domains, {len(plan)} plan batches", ""]
    lines += [f"{domain['pairs']:>8}  {domain['name']}" for domain in domains[:20]]
    lines += [f"{sum(d['pairs'] for d in domains[20:]):>8}  in {len(domains) - 20} more"] if len(domains) > 20 else []
    lines += ["", "difficulty (mean surrogate cosine) and masks:"]
    lines += [f"  {name}: {value}" for name, value in plan.manifest["difficulty"].items()]
    return "\n".join(lines)


def _pairs(config: Config, workdir: Path, rebuild: bool) -> Store:
    d = config.data
    source = {
        "settings": {k: v for k, v in dataclasses.asdict(d).items() if k != "evaluation"},
        "inputs": _identity(config),
    }
    if _keep(workdir / PAIRS, "pairs", fingerprint(source), lambda m: fingerprint(m["source"]), rebuild):
        return Store.open(workdir / PAIRS, kind="pairs")
    counts: Counter[str] = Counter()
    pairs, held_out = _read(config, counts)
    for name in held_out:
        beir.write(docstrings.evaluation_set(name, held_out[name]), workdir / SETS / name)
    if d.tokenizer == "wordpiece":
        tokenizer = Tokenizer.train((text for pair in pairs() for text in (pair.query, pair.document)), d.vocab_size)
    else:
        tokenizer = Tokenizer.load(d.tokenizer)
    tokenizer.save(workdir / TOKENIZER)
    return write_pairs(
        workdir / PAIRS,
        clean(pairs(), counts, unique_documents=False),
        tokenizer,
        query_prefix=d.query_prefix,
        document_prefix=d.document_prefix,
        query_length=d.query_length,
        document_length=d.document_length,
        source=source,
        counts=counts,
    )


def _packages(config: Config) -> tuple[str, ...]:
    d = config.data
    packages = docstrings.core_packages() if d.packages == "core" else docstrings.installed_packages()
    missing = sorted(set(d.held_out) - set(packages))
    if missing:
        raise ValueError(f"data.held_out names {missing}, which are not among the {d.packages} packages {packages}")
    return packages


def _identity(config: Config) -> dict[str, Any]:
    """What the source's inputs are, without reading them all: a changed file or package makes other pairs."""
    d = config.data
    if d.source == "jsonl":
        return jsonl.identity(d.paths)
    return docstrings.identity(_packages(config), d.standard_library)


def _read(config: Config, counts: Counter) -> tuple[Callable[[], Iterator[Pair]], dict[str, list[Pair]]]:
    """A function that yields the training pairs anew at each call, and the held-out pairs by domain."""
    d = config.data
    if d.source == "jsonl":
        return lambda: jsonl.read_pairs(d.paths), {}
    log.info("reading docstrings")
    everything = list(docstrings.read_pairs(_packages(config), standard_library=d.standard_library, counts=counts))
    log.info("docstrings by domain:\n%s", docstrings.domain_table(everything))
    held_out = {name: [pair for pair in everything if pair.domain == name] for name in d.held_out}
    training = [pair for pair in everything if pair.domain not in held_out]
    return lambda: iter(training), held_out


def _vectors(config: Config, workdir: Path, pairs: Store, rebuild: bool, checkpoint: Encode | None) -> Store:
    b = config.batching
    settings = {"width": b.surrogate_width, "seed": config.seed} if b.surrogate == "lsa" else {}
    expected = surrogate.vectors_fingerprint(pairs.fingerprint, b.surrogate, settings)
    if _keep(workdir / VECTORS, "vectors", expected, lambda m: m["fingerprint"], rebuild):
        return Store.open(workdir / VECTORS, kind="vectors")
    log.info("surrogate vectors: %s", b.surrogate)
    queries, documents = (surrogate.Texts(pairs.ragged(name)) for name in ("query_text", "document_text"))
    if b.surrogate == "lsa":
        lsa = surrogate.lsa(queries, documents, **settings)
        lsa.save(workdir / LSA)
        encode = lsa.encode
    elif b.surrogate.startswith("checkpoint:"):
        encode = checkpoint
    else:
        encode = surrogate.sentence_transformer(b.surrogate)
    return surrogate.write_vectors(workdir / VECTORS, pairs, encode, name=b.surrogate, settings=settings)


def _plan(config: Config, workdir: Path, pairs: Store, vectors: Store, rebuild: bool) -> BatchPlan:
    settings = plan_settings(config)
    if (workdir / PLAN).exists() and not rebuild:
        plan = BatchPlan.load(workdir / PLAN)
        plan.verify(pairs.fingerprint, settings, vectors.fingerprint)
        log.info("the plan is there and fits: kept")
        return plan
    log.info("building the batch plan")
    return build_plan(workdir / PLAN, pairs, vectors, **settings)


def _keep(folder: Path, kind: str, expected: str, found: Callable[[dict], str], rebuild: bool) -> bool:
    """Whether the artefact is there and fits; one that does not fit is an error, or goes if it is to be rebuilt."""
    if rebuild or not folder.exists():  # a new one takes an old one's place when it is whole, not before
        return False
    got = found(Store.open(folder, kind=kind, verify=False).manifest)
    if got != expected:
        raise ValueError(
            f"{folder} was made from other inputs or settings: expected fingerprint {expected}, it has {got}. Choose "
            f"another --workdir, or --rebuild to make it again"
        )
    log.info("%s are there and fit: kept", kind)
    return True
