"""The stage before training: source → pairs → tokens → surrogate vectors → batch plan.

Each part is a folder that appears whole or not at all. One that is there and fits the configuration is kept; one that
does not fit is an error, or with `rebuild` made again, and so is what depends on it.
"""

import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cde_jax.batching import surrogate
from cde_jax.batching.build import build_plan
from cde_jax.batching.plan import BatchPlan
from cde_jax.config import Config
from cde_jax.data.files import NewFolder
from cde_jax.data.pairs import InputLog, Pair, clean, write_pairs
from cde_jax.data.sources import beir, docstrings, huggingface, jsonl
from cde_jax.data.store import Store
from cde_jax.data.tokens import Tokenizer
from cde_jax.stages.check import check_pairs
from cde_jax.stages.workdir import (
    COLLECTIONS,
    FILTER_VECTORS,
    LSA,
    PAIRS,
    PLAN,
    SETS,
    STORE,
    TOKENIZER,
    VECTORS,
    Prepared,
    check_identity,
    load_tokenizer,
    pairs_settings,
)

log = logging.getLogger(__name__)


class Source(NamedTuple):
    """Where pairs come from: `read(log=…)` yields them anew at each call."""

    read: Callable[..., Iterator[Pair]]
    inputs: dict[str, Any]  # what is read, by content: a changed file or package makes other pairs
    prefixes: Mapping[str, tuple[str, str]]  # of queries and documents, of the domains that have their own
    counts: Counter[str]  # of what reading and cleaning leave out


class _Role(NamedTuple):
    """A surrogate, and where its vectors are: the first role's arrange pairs, the last one's find negatives."""

    folder: str
    name: str
    prompts: tuple[str, ...]  # of queries and documents, or none


def open_source(config: Config, workdir: Path) -> Source:
    """The source that the config names. Raises ValueError for inputs that are not there; writes nothing."""
    d, prefixes = config.data, {}
    counts: Counter[str] = Counter()
    if d.source == "jsonl":
        read, inputs = partial(jsonl.read_pairs, d.paths), jsonl.identity(d.paths)
    elif d.source == "huggingface":
        read, inputs = partial(huggingface.read_pairs, d.paths, d.columns), huggingface.identity(d.paths)
    elif d.source == "tfds":
        from cde_jax.data.sources import collections, tfds_pairs  # takes seconds to import

        read = partial(tfds_pairs.read_pairs, d.collections, d.paths[0], workdir / COLLECTIONS)
        inputs, prefixes = tfds_pairs.identity(d.collections, d.paths[0]), collections.prefixes(d.collections)
    else:
        packages = docstrings.core_packages() if d.packages == "core" else docstrings.installed_packages()
        if missing := sorted(set(d.held_out) - set(packages)):
            raise ValueError(f"data.held_out names {missing}, which are not among the {d.packages} packages {packages}")
        read = partial(docstrings.read_pairs, packages, standard_library=d.standard_library, counts=counts)
        inputs = docstrings.identity(packages, d.standard_library)
    return Source(read, inputs, prefixes, counts)


def prepare(
    config: Config, workdir: Path, source: Source, *, rebuild: bool = False, training: bool = False
) -> Prepared:
    """Keep or make `store/` and `plan/`. Raises ValueError for a part that does not fit, unless it is to be rebuilt.

    training: settings of the training that follows are checked as soon as pairs are counted.
    """
    b, roles = config.batching, _roles(config)
    pairs = _keep_pairs(config, workdir, source, rebuild) or _make_pairs(config, workdir, source)
    tokenizer = load_tokenizer(workdir, pairs)
    check_pairs(config, pairs, training)
    wanted = [_vectors_identity(config, pairs, role) for role in roles]
    kept = [_keep_vectors(workdir, role, each, rebuild) for role, each in zip(roles, wanted, strict=True)]
    plan = _keep_plan(config, workdir, pairs, wanted, rebuild)  # refused before vectors are made, which may take hours
    vectors = [
        store or _make_vectors(config, workdir, pairs, role, identity)
        for store, role, identity in zip(kept, roles, wanted, strict=True)
    ]
    if plan is None:
        log.info("building the batch plan")
        plan = build_plan(workdir / PLAN, pairs, vectors[0], b, config.seed, filter_vectors=vectors[-1])
    return Prepared(pairs, plan, tokenizer)


def _keep_pairs(config: Config, workdir: Path, source: Source, rebuild: bool) -> Store | None:
    identity = {"source": {"settings": pairs_settings(config), "inputs": source.inputs}}
    held_out = config.data.held_out if config.data.source == "docstrings" else ()
    return _keep(workdir, PAIRS, "pairs", identity, rebuild, [TOKENIZER, *(f"{SETS}/{name}" for name in held_out)])


def _make_pairs(config: Config, workdir: Path, source: Source) -> Store:
    d, inputs = config.data, InputLog()
    log.info("reading pairs: %s", d.source)
    read = partial(source.read, log=inputs)
    if d.source == "docstrings":  # a few thousand, read from hundreds of files: once is enough
        everything = list(read())
        for name in d.held_out:
            beir.write(docstrings.evaluation_set(name, everything), workdir / SETS / name)
        read = partial(iter, [pair for pair in everything if pair.domain not in d.held_out])
    if d.tokenizer == "wordpiece":
        tokenizer = Tokenizer.train(_Texts(read), d.vocab_size)
    else:
        tokenizer = Tokenizer.load(d.tokenizer)
    tokenizer.save(workdir / TOKENIZER)
    return write_pairs(
        workdir / PAIRS,
        clean(read(), source.counts, folder=workdir / STORE),
        tokenizer,
        query_prefix=d.query_prefix,
        document_prefix=d.document_prefix,
        prefixes=source.prefixes,
        query_length=d.query_length,
        document_length=d.document_length,
        source={"settings": pairs_settings(config), "inputs": source.inputs},
        counts=source.counts,
        inputs=inputs,
    )


class _Texts:
    """The queries and documents of a source, read anew each time they are gone through."""

    def __init__(self, read: Callable[[], Iterator[Pair]]):
        self.read = read

    def __iter__(self) -> Iterator[str]:
        return (text for pair in self.read() for text in (pair.query, pair.document))


def _roles(config: Config) -> list[_Role]:
    b = config.batching
    roles = [_Role(VECTORS, b.surrogate, b.surrogate_prompts)]
    if not b.filter_is_surrogate:
        roles.append(_Role(FILTER_VECTORS, b.filter_surrogate or b.surrogate, b.filter_prompts))
    return [r if r.name.startswith("sentence-transformers:") else r._replace(prompts=()) for r in roles]


def _vectors_identity(config: Config, pairs: Store, role: _Role) -> dict[str, Any]:
    if role.name == "lsa":
        settings = {"width": config.batching.surrogate_width, "seed": config.seed}
    else:
        settings = {"files": surrogate.identity(role.name), "prompts": role.prompts}
    name = {} if settings.get("files") else {"surrogate": role.name}  # a folder may move: its files are compared
    texts, digest = surrogate.texts_fingerprint(pairs), surrogate.vectors_fingerprint(pairs, role.name, settings)
    return name | {"texts": texts, "settings": settings, "fingerprint": digest}


def _keep_vectors(workdir: Path, role: _Role, identity: dict[str, Any], rebuild: bool) -> Store | None:
    return _keep(workdir, role.folder, "vectors", identity, rebuild, [LSA] if role.name == "lsa" else [])


def _make_vectors(config: Config, workdir: Path, pairs: Store, role: _Role, identity: dict[str, Any]) -> Store:
    """The vectors of all pairs: from the cache where they are there, else by the surrogate."""
    cache = config.batching.vectors_cache
    cached = Path(cache).expanduser() / identity["fingerprint"]
    copies = {workdir / role.folder: cached}
    if role.name == "lsa":
        copies[workdir / LSA] = cached.with_name(f"{cached.name}-lsa")
    if cache and all(folder.exists() for folder in copies.values()):
        log.info("surrogate vectors: %s, from %s", role.name, cached)
        for folder, source in copies.items():
            _copy_store(source, folder)
        return Store.open(workdir / role.folder, kind="vectors")
    log.info("surrogate vectors: %s", role.name)
    settings = identity["settings"]
    encode = _encoders(workdir, pairs, role, settings)
    store = surrogate.write_vectors(workdir / role.folder, pairs, encode, name=role.name, settings=settings)
    for folder, target in copies.items() if cache else ():
        _copy_store(folder, target)
    return store


def _encoders(workdir: Path, pairs: Store, role: _Role, settings: dict[str, Any]) -> Any:
    """The function texts → vectors of a surrogate, or one for queries and one for documents."""
    if role.name == "lsa":
        texts = (surrogate.Texts(pairs.ragged(side)) for side in ("query_text", "document_text"))
        lsa = surrogate.lsa(*texts, **settings)
        lsa.save(workdir / LSA)
        return lsa.encode
    if role.name.startswith("checkpoint:"):
        from cde_jax.retrieval.embedder import Embedder

        embedder = Embedder.from_pretrained(role.name.removeprefix("checkpoint:"), progress=False)
        return embedder.encode_queries, embedder.encode_documents
    return surrogate.sentence_transformer(role.name, role.prompts)


def _copy_store(source: Path, target: Path) -> None:
    """A finished store in another place: hard links, or copies on another file system; whole or not at all."""
    with NewFolder(target, marker="manifest.json") as new:
        for file in source.iterdir():
            try:
                os.link(file, new.path / file.name)
            except OSError:
                shutil.copyfile(file, new.path / file.name)
        new.put_in_place()


def _keep_plan(
    config: Config, workdir: Path, pairs: Store, vectors: list[dict[str, Any]], rebuild: bool
) -> BatchPlan | None:
    if not (workdir / PLAN).exists():
        return None
    try:
        plan = BatchPlan.load(workdir / PLAN)
        used = (vectors[place]["fingerprint"] for place in (0, -1))
        plan.verify(pairs.fingerprint, config.batching.plan_settings(config.seed), *used)
    except ValueError as error:
        if not rebuild:
            raise
        log.warning("the plan is made again: %s", error)
        return None
    log.info("the plan is there and fits: kept")
    return plan


def _keep(
    workdir: Path, name: str, kind: str, identity: dict[str, Any], rebuild: bool, beside: Sequence[str]
) -> Store | None:
    """The store `name`, verified, if it and the folders `beside` it are there and fit; None: to be made."""
    folder = workdir / name
    if not folder.exists():
        return None
    try:
        if missing := [other for other in beside if not (workdir / other).exists()]:
            raise ValueError(f"{folder} is there without {', '.join(missing)}; --rebuild makes it again")
        recorded = Store.open(folder, kind=kind, verify=False).manifest
        check_identity(folder, identity, recorded)
        store = Store.open(folder, kind=kind)
        if kind == "pairs":
            load_tokenizer(workdir, store)
    except ValueError as error:
        if not rebuild:
            raise
        log.warning("%s are made again: %s", kind, error)
        return None
    log.info("%s are there and fit: kept", kind)
    return store
