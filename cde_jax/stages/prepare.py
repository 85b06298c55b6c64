"""The stage before training: source → pairs → tokens → surrogate vectors → batch plan.

Each part is a folder that appears whole or not at all. One that is there and belongs to the same settings is kept;
one that belongs to others is an error, unless it is to be rebuilt.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from cde_jax.batching import surrogate
from cde_jax.batching.build import build_plan
from cde_jax.batching.plan import BatchPlan
from cde_jax.config import Config, evaluation_name, flatten
from cde_jax.data.files import fingerprint
from cde_jax.data.pairs import InputLog, Pair, clean, write_pairs
from cde_jax.data.sources import beir, docstrings, huggingface, jsonl
from cde_jax.data.store import Store
from cde_jax.data.tokens import Tokenizer

log = logging.getLogger(__name__)

STORE = "store"
PAIRS, VECTORS, FILTER_VECTORS, LSA, TOKENIZER, COLLECTIONS, SETS = (
    f"{STORE}/{name}"
    for name in ("pairs", "vectors", "filter_vectors", "lsa", "tokenizer", "collections", "evaluation")
)
PLAN = "plan"
Encoders = tuple[surrogate.Encode, surrogate.Encode]  # of queries, of documents


class Prepared(NamedTuple):
    """What the stages after `prepare` read; opened and verified once in a run."""

    pairs: Store
    plan: BatchPlan
    tokenizer: Tokenizer


def prepare(
    config: Config, workdir: Path, *, rebuild: bool = False, checkpoint: Callable[[str], Encoders] | None = None
) -> Prepared:
    """Make or keep `store/` and `plan/`.

    `checkpoint` gives the encoders of one of our own models by its directory, for a surrogate "checkpoint:DIR".
    """
    b = config.batching
    pairs = _pairs(config, workdir, rebuild)
    vectors = _vectors(config, workdir / VECTORS, pairs, b.surrogate, b.surrogate_prompts, rebuild, checkpoint)
    filter_vectors = vectors
    if _has_filter(config):
        name, prompts = b.filter_surrogate or b.surrogate, b.filter_prompts
        filter_vectors = _vectors(config, workdir / FILTER_VECTORS, pairs, name, prompts, rebuild, checkpoint)
    plan = _plan(config, workdir, pairs, vectors, filter_vectors, rebuild)
    return Prepared(pairs, plan, _tokenizer(workdir, pairs))


def load_prepared(config: Config, workdir: Path) -> Prepared:
    """What `prepare` left in a work directory, checked against each other and the config."""
    pairs = Store.open(workdir / PAIRS, kind="pairs")
    tokenizer = _tokenizer(workdir, pairs)
    plan = BatchPlan.load(workdir / PLAN)
    plan.verify(pairs.fingerprint, config.batching.plan_settings(config.seed))
    return Prepared(pairs, plan, tokenizer)


def _tokenizer(workdir: Path, pairs: Store) -> Tokenizer:
    tokenizer = Tokenizer.load(workdir / TOKENIZER)
    if tokenizer.fingerprint != pairs.manifest["tokenizer"]:
        raise ValueError(
            f"{workdir / PAIRS} was made with another tokenizer: expected fingerprint {tokenizer.fingerprint}, that of "
            f"{workdir / TOKENIZER}, it has {pairs.manifest['tokenizer']}; run --stage=prepare --rebuild"
        )
    return tokenizer


def evaluation_sets(config: Config, workdir: Path, names: Sequence[str] | None = None) -> list[beir.EvaluationSet]:
    """The held-out packages that `prepare` wrote, and the folders that the config names; all, or those of `names`."""
    held_out = config.data.held_out if config.data.source == "docstrings" else ()
    folders = {name: workdir / SETS / name for name in held_out}
    folders |= {evaluation_name(path): Path(path) for path in config.data.evaluation}
    return [beir.read(folder) for name, folder in folders.items() if names is None or name in names]


class _Source(NamedTuple):
    """Where pairs come from: `read` yields them anew at each call; `prefixes` by domain, where they have their own."""

    read: Callable[[], Iterator[Pair]]
    identity: Callable[[], dict[str, Any]]  # what the inputs are: a changed file or package makes other pairs
    prefixes: Mapping[str, tuple[str, str]] = MappingProxyType({})


def _source(config: Config, workdir: Path, counts: Counter[str], inputs: InputLog) -> _Source:
    d = config.data
    if d.source == "jsonl":
        return _Source(lambda: jsonl.read_pairs(d.paths, inputs), lambda: jsonl.identity(d.paths))
    if d.source == "huggingface":
        return _Source(
            lambda: huggingface.read_pairs(d.paths, d.columns, inputs), lambda: huggingface.identity(d.paths)
        )
    if d.source == "tfds":
        from cde_jax.data.sources import tfds_pairs  # takes seconds to import

        names, folder, cache = d.collections, Path(d.paths[0]), workdir / COLLECTIONS
        return _Source(
            lambda: tfds_pairs.read_pairs(names, folder, cache, inputs),
            lambda: tfds_pairs.identity(names, folder),
            tfds_pairs.prefixes(names),
        )
    packages = _packages(config)
    return _Source(
        lambda: _docstrings(config, packages, workdir, counts, inputs),
        lambda: docstrings.identity(packages, d.standard_library),
    )


def _packages(config: Config) -> tuple[str, ...]:
    d = config.data
    packages = docstrings.core_packages() if d.packages == "core" else docstrings.installed_packages()
    missing = sorted(set(d.held_out) - set(packages))
    if missing:
        raise ValueError(f"data.held_out names {missing}, which are not among the {d.packages} packages {packages}")
    return packages


def _docstrings(
    config: Config, packages: tuple[str, ...], workdir: Path, counts: Counter[str], inputs: InputLog
) -> Iterator[Pair]:
    """The training pairs; the held-out packages become evaluation sets."""
    d = config.data
    log.info("reading docstrings")
    everything = list(docstrings.read_pairs(packages, standard_library=d.standard_library, counts=counts, log=inputs))
    for name in d.held_out:
        beir.write(docstrings.evaluation_set(name, everything), workdir / SETS / name)
    return iter([pair for pair in everything if pair.domain not in d.held_out])


def _pairs(config: Config, workdir: Path, rebuild: bool) -> Store:
    d = config.data
    counts: Counter[str] = Counter()
    inputs = InputLog()
    source = _source(config, workdir, counts, inputs)
    about = {
        "settings": {k: v for k, v in dataclasses.asdict(d).items() if k != "evaluation"},
        "inputs": source.identity(),
    }
    if _keep(workdir / PAIRS, "pairs", about, lambda manifest: manifest["source"], rebuild):
        return Store.open(workdir / PAIRS, kind="pairs")
    if d.source == "docstrings":  # a few thousand, read from hundreds of files: once is enough
        training = list(source.read())
        source = source._replace(read=lambda: iter(training))
    if d.tokenizer == "wordpiece":
        tokenizer = Tokenizer.train(_Texts(source.read), d.vocab_size)
    else:
        tokenizer = Tokenizer.load(d.tokenizer)
    tokenizer.save(workdir / TOKENIZER)
    return write_pairs(
        workdir / PAIRS,
        clean(source.read, counts, folder=workdir / STORE),
        tokenizer,
        query_prefix=d.query_prefix,
        document_prefix=d.document_prefix,
        prefixes=source.prefixes,
        query_length=d.query_length,
        document_length=d.document_length,
        source=about,
        counts=counts,
        inputs=inputs,
    )


class _Texts:
    """The queries and documents of a source, read anew each time they are gone through."""

    def __init__(self, read: Callable[[], Iterator[Pair]]):
        self.read = read

    def __iter__(self) -> Iterator[str]:
        return (text for pair in self.read() for text in (pair.query, pair.document))


def _has_filter(config: Config) -> bool:
    """Whether another surrogate than that of the clusters decides what is a false negative."""
    b = config.batching
    return bool(b.filter_surrogate or b.filter_prompts) and (
        (b.filter_surrogate or b.surrogate, b.filter_prompts) != (b.surrogate, b.surrogate_prompts)
    )


def _vectors(
    config: Config,
    folder: Path,
    pairs: Store,
    name: str,
    prompts: tuple[str, ...],
    rebuild: bool,
    checkpoint: Callable[[str], Encoders] | None,
) -> Store:
    """The vectors of all pairs by the surrogate `name`, made or kept."""
    if name == "lsa":
        settings = {"width": config.batching.surrogate_width, "seed": config.seed}
    else:
        settings = {"files": surrogate.identity(name), "prompts": prompts}
    about = {"texts": surrogate.texts_fingerprint(pairs), "surrogate": name, "settings": settings}
    if _keep(folder, "vectors", about, lambda manifest: {key: manifest[key] for key in about}, rebuild):
        return Store.open(folder, kind="vectors")
    log.info("surrogate vectors: %s", name)
    if name == "lsa":
        texts = (surrogate.Texts(pairs.ragged(side)) for side in ("query_text", "document_text"))
        lsa = surrogate.lsa(*texts, **settings)
        lsa.save(folder.parent / Path(LSA).name)
        encode = lsa.encode
    elif name.startswith("checkpoint:"):
        encode = checkpoint(name.removeprefix("checkpoint:"))
    else:
        encode = surrogate.sentence_transformer(name, prompts)
    return surrogate.write_vectors(folder, pairs, encode, name=name, settings=settings)


def _plan(
    config: Config, workdir: Path, pairs: Store, vectors: Store, filter_vectors: Store, rebuild: bool
) -> BatchPlan:
    if (workdir / PLAN).exists() and not rebuild:
        plan = BatchPlan.load(workdir / PLAN)
        plan.verify(
            pairs.fingerprint,
            config.batching.plan_settings(config.seed),
            vectors.fingerprint,
            filter_vectors.fingerprint,
        )
        log.info("the plan is there and fits: kept")
        return plan
    log.info("building the batch plan")
    return build_plan(workdir / PLAN, pairs, vectors, config.batching, config.seed, filter_vectors=filter_vectors)


def _keep(folder: Path, kind: str, about: dict, found: Callable[[dict], dict], rebuild: bool) -> bool:
    """Whether the artefact is there and fits; one that does not fit is an error, or goes if it is to be rebuilt."""
    if rebuild or not folder.exists():  # a new one takes an old one's place when it is whole, not before
        return False
    ours, theirs = about, found(Store.open(folder, kind=kind, verify=False).manifest)
    expected, got = fingerprint(ours), fingerprint(theirs)
    if got != expected:
        ours, theirs = flatten(ours), flatten(theirs)
        keys = [key for key in {**ours, **theirs} if fingerprint(ours.get(key, "")) != fingerprint(theirs.get(key, ""))]
        different = ", ".join(f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} now" for key in keys[:5])
        raise ValueError(
            f"{folder} was made from other inputs or settings: expected fingerprint {expected}, it has {got} "
            f"({different}). Choose another --workdir, or --rebuild to make it again"
        )
    log.info("%s are there and fit: kept", kind)
    return True
