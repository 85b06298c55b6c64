"""The stage before training: source → pairs → tokens → surrogate vectors → batch plan.

Each part is a folder that appears whole or not at all. One that is there and fits the configuration is kept; one that
does not fit is an error, or with `rebuild` made again, and so is what depends on it.
"""

import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cde_jax.batching import surrogate
from cde_jax.batching.build import build_plan, check_sizes
from cde_jax.batching.plan import BatchPlan
from cde_jax.batching.vectors import Loaded, Texts, texts_fingerprint, vectors_fingerprint, write_vectors
from cde_jax.config import Config
from cde_jax.data import parts, shards
from cde_jax.data.files import NewFolder, fingerprint
from cde_jax.data.pairs import InputLog, Pair, Rules, clean, write_pairs
from cde_jax.data.sources import beir, docstrings, huggingface, jsonl
from cde_jax.data.store import Store
from cde_jax.data.tokens import Tokenizer
from cde_jax.retrieval.embedder import Embedder
from cde_jax.stages import assemble, train
from cde_jax.stages import workdir as work
from cde_jax.stages.engines import open_engine

log = logging.getLogger(__name__)

# From these on local tasks run in other processes, which take seconds to start:
PARALLEL_BYTES = 2**23  # of the source's files
PARALLEL_PAIRS = 20_000


class Source(NamedTuple):
    """Where pairs come from: `read(log=…)` yields them anew at each call."""

    read: Callable[..., Iterator[Pair]]
    inputs: dict[str, Any]  # what is read, by content: a changed file or package makes other pairs
    prefixes: Mapping[str, tuple[str, str]]  # of queries and documents, of the domains that have their own
    counts: Counter[str]  # of what reading and cleaning leave out
    parts: Callable[[InputLog], list[parts.Read]] | None  # what `read` yields, part by part, where it has parts
    size: int  # bytes of its files, where it has parts


class _Vectors(NamedTuple):
    """Vectors of a surrogate: the first ones of a run arrange pairs, the last ones find negatives."""

    folder: str
    surrogate: str
    identity: dict[str, Any]  # what the manifest of their store has: texts, settings, fingerprint


def open_source(config: Config, workdir: Path) -> Source:
    """The source that the config names. Raises ValueError for inputs and models that are not there; writes nothing.

    Models whose work is done (vectors, tokenizer of the work directory) need not be there any more.
    """
    d, b, prefixes, counts = config.data, config.batching, {}, Counter()
    read_parts, files = None, []
    if not (workdir / work.VECTORS).exists():
        surrogate.check_surrogate(b.surrogate, b.surrogate_prompts)
    if not (b.filter_is_surrogate or (workdir / work.FILTER_VECTORS).exists()):
        surrogate.check_surrogate(b.filter_surrogate or b.surrogate, b.filter_prompts)
    if d.tokenizer != "wordpiece" and not (workdir / work.TOKENIZER).exists():
        _check_vocabulary(config, Tokenizer.load(d.tokenizer).vocab_size)
    if d.source == "jsonl":
        read, inputs = partial(jsonl.read_pairs, d.paths), jsonl.identity(d.paths)
        read_parts, files = partial(jsonl.parts, d.paths), jsonl.find(d.paths).values()
    elif d.source == "huggingface":
        read, inputs = partial(huggingface.read_pairs, d.paths, d.columns), huggingface.identity(d.paths)
    elif d.source == "tfds":
        try:
            from cde_jax.data.sources import collections, tfds_pairs  # takes seconds to import
        except ImportError as error:
            raise ImportError(f"data.source 'tfds' needs an extra: pip install 'cde_jax[tfds]' ({error})") from None

        read = partial(tfds_pairs.read_pairs, d.collections, d.paths[0], workdir / work.COLLECTIONS)
        inputs, prefixes = tfds_pairs.identity(d.collections, d.paths[0]), collections.prefixes(d.collections)
        cache = (workdir / work.COLLECTIONS).absolute()
        read_parts = partial(tfds_pairs.parts, d.collections, d.paths[0], cache)
        files = tfds_pairs.files_of(d.collections, d.paths[0])
    else:
        packages = docstrings.core_packages() if d.packages == "core" else docstrings.installed_packages()
        if missing := sorted(set(d.held_out) - set(packages)):
            raise ValueError(f"data.held_out names {missing}, which are not among the {d.packages} packages {packages}")
        read = partial(docstrings.read_pairs, packages, standard_library=d.standard_library, counts=counts)
        inputs = docstrings.identity(packages, d.standard_library)
    return Source(read, inputs, prefixes, counts, read_parts, sum(file.stat().st_size for file in files))


def prepare(
    config: Config,
    workdir: Path,
    source: Source,
    *,
    rebuild: bool = False,
    training: bool = False,
    engine: str = "local",
) -> work.Prepared:
    """Keep or make `store/` and `plan/`. Raises ValueError for a part that does not fit, unless it is to be rebuilt.

    training: settings of the training that follows are checked as soon as pairs are counted. engine: who runs the
    tasks of much work (`engines.py`).
    """
    with open_engine(engine) as run:
        return _prepare(config, workdir, source, rebuild, training, engine, run)


def _prepare(
    config: Config, workdir: Path, source: Source, rebuild: bool, training: bool, engine: str, run: shards.MapTasks
) -> work.Prepared:
    d, b, keep = config.data, config.batching, partial(_keep, rebuild, workdir)
    recorded = work.read_manifest(workdir / work.PAIRS)
    identity = {"settings": work.pairs_settings(config, recorded), "inputs": source.inputs}
    beside = [work.TOKENIZER, *(f"{work.SETS}/{name}" for name in d.held_out if d.source == "docstrings")]
    pairs = keep("pairs are there and fit", work.PAIRS, _load_store, "pairs", {"source": identity}, beside)
    if not pairs:
        in_parts = source.parts and (engine == "ray" or source.size >= PARALLEL_BYTES)
        make = partial(_make_parts if in_parts else _make_pairs, run if in_parts or engine == "local" else map)
        pairs = make(config, workdir, source, identity)
    vocab_size = pairs.manifest["vocab_size"]
    _check_vocabulary(config, vocab_size)
    batches = check_sizes(b, {domain["name"]: domain["pairs"] for domain in pairs.manifest["domains"]})
    if training:
        train.check_steps(config.train, batches)
        if not work.has_checkpoint(workdir) or rebuild:
            assemble.check_initial_encoders(config, vocab_size)

    wanted, stores = _surrogates(config, workdir, pairs), []
    for v in wanted:
        beside = [work.LSA] if v.surrogate == "lsa" else []
        stores.append(keep("vectors are there and fit", v.folder, _load_store, "vectors", v.identity, beside))
    plan = keep("the plan is there and fits", work.PLAN, _load_plan, config, pairs, wanted)
    map_tasks = run if engine == "ray" or pairs.manifest["pairs"] >= PARALLEL_PAIRS else map
    for i, v in enumerate(wanted):  # only now: a plan that does not fit is refused before hours of work
        stores[i] = stores[i] or _make_vectors(b.vectors_cache, workdir, pairs, v, engine, map_tasks)
    if plan is None:
        log.info("building the batch plan")
        options = {"filter_vectors": stores[-1], "map_tasks": map_tasks}
        plan = build_plan(workdir / work.PLAN, pairs, stores[0], b, config.seed, **options)
    return work.Prepared(pairs, plan, work.load_tokenizer(workdir, pairs))


def _keep(rebuild: bool, workdir: Path, fits: str, name: str, load: Callable[..., Any], *identity: Any) -> Any:
    """A part that is there, as `load(workdir, name, *identity)` opens and verifies it; None where it is to be made."""
    if not (workdir / name).exists():
        return None
    try:
        part = load(workdir, name, *identity)
    except ValueError as error:
        if not rebuild:
            raise
        log.warning("%s is made again: %s", name, error)
        return None
    log.info("%s: kept", fits)
    return part


def _load_store(workdir: Path, name: str, kind: str, identity: dict[str, Any], beside: Sequence[str]) -> Store:
    if missing := [other for other in beside if not (workdir / other).exists()]:
        raise ValueError(f"{workdir / name} is there without {', '.join(missing)}; --rebuild makes it again")
    work.check_identity(workdir / name, identity, Store.open(workdir / name, kind=kind, verify=False).manifest)
    store = Store.open(workdir / name, kind=kind)
    if kind == "pairs":
        work.load_tokenizer(workdir, store)
    return store


def _load_plan(workdir: Path, name: str, config: Config, pairs: Store, vectors: Sequence[_Vectors]) -> BatchPlan:
    plan, fingerprints = BatchPlan.load(workdir / name), [vectors[i].identity["fingerprint"] for i in (0, -1)]
    plan.verify(pairs.fingerprint, config.batching.plan_settings(config.seed), *fingerprints)
    return plan


def _check_vocabulary(config: Config, tokens: int) -> None:
    if 0 < config.model.vocab_size < tokens:
        raise ValueError(
            f"the tokenizer has {tokens} tokens, `model.vocab_size` is {config.model.vocab_size}: raise it, or set it "
            "to 0 for as many as the tokenizer has"
        )


def _make_pairs(run: shards.MapTasks, config: Config, workdir: Path, source: Source, identity: dict[str, Any]) -> Store:
    """The table of pairs, read at once; `run` parses docstrings, of packages that other machines may not have."""
    d, inputs = config.data, InputLog()
    log.info("reading pairs: %s", d.source)
    read = partial(source.read, log=inputs)
    if d.source == "docstrings":  # a few thousand, read from hundreds of files: once is enough
        everything = list(read(map_tasks=run))
        for name in d.held_out:
            beir.write(docstrings.evaluation_set(name, everything), workdir / work.SETS / name)
        read = partial(iter, [pair for pair in everything if pair.domain not in d.held_out])
    wordpiece = d.tokenizer == "wordpiece"
    tokenizer = Tokenizer.train(_Texts(read), d.vocab_size) if wordpiece else Tokenizer.load(d.tokenizer)
    tokenizer.save(workdir / work.TOKENIZER)
    return write_pairs(
        workdir / work.PAIRS,
        clean(read(), source.counts, folder=workdir / work.STORE),
        tokenizer,
        query_prefix=d.query_prefix,
        document_prefix=d.document_prefix,
        prefixes=source.prefixes,
        query_length=d.query_length,
        document_length=d.document_length,
        source=identity,
        counts=source.counts,
        inputs=inputs,
    )


def _make_parts(run: shards.MapTasks, config: Config, workdir: Path, source: Source, identity: dict[str, Any]) -> Store:
    """As `_make_pairs`, part by part of a source that has parts; shards that are there are kept."""
    d, inputs, folder = config.data, InputLog(), (workdir / work.PAIRS).absolute().with_name(".pairs.shards")
    log.info("reading pairs: %s", d.source)
    paths = parts.read_parts(folder, source.parts(inputs), identity["inputs"], run)
    if d.tokenizer != "wordpiece":
        tokenizer = Tokenizer.load(d.tokenizer)
    else:
        trained = folder / f"wordpiece-{fingerprint([identity['inputs'], d.vocab_size])}"
        if not (trained / "tokenizer_config.json").exists():  # the last file that is written
            Tokenizer.train(parts.Texts(paths), d.vocab_size).save(trained)
        tokenizer = Tokenizer.load(trained)
    target = (workdir / work.TOKENIZER).absolute()
    tokenizer.save(target)
    prefix, lengths = (d.query_prefix, d.document_prefix), (d.query_length, d.document_length)
    rules = Rules(tokenizer, prefix, dict(source.prefixes), lengths)
    options = {"source": identity, "counts": source.counts, "inputs": inputs, "map_tasks": run}
    store = parts.write_parts(workdir / work.PAIRS, folder, paths, target, rules, **options)
    shutil.rmtree(folder)
    return store


class _Texts:
    """The queries and documents of a source, read anew each time they are gone through."""

    def __init__(self, read: Callable[[], Iterator[Pair]]):
        self.read = read

    def __iter__(self) -> Iterator[str]:
        return (text for pair in self.read() for text in (pair.query, pair.document))


def _surrogates(config: Config, workdir: Path, pairs: Store) -> list[_Vectors]:
    b, vectors = config.batching, []
    roles = [(work.VECTORS, b.surrogate, b.surrogate_prompts)]
    if not b.filter_is_surrogate:
        roles.append((work.FILTER_VECTORS, b.filter_surrogate or b.surrogate, b.filter_prompts))
    for folder, name, prompts in roles:
        prompts = prompts if name.startswith("sentence-transformers:") else ()
        settings = {"files": surrogate.identity(name), "prompts": prompts}
        if b.surrogate_dtype != "auto" and name.startswith("sentence-transformers:"):
            settings["dtype"] = b.surrogate_dtype
        recorded = work.read_manifest(workdir / folder)
        if not settings["files"] and recorded.get("surrogate") == name:  # its folder may be gone: the vectors are there
            settings["files"] = recorded["settings"].get("files", {})
        if name == "lsa":
            settings = {"width": b.surrogate_width, "seed": config.seed}
        identity = {"texts": texts_fingerprint(pairs), "settings": settings}
        if not settings.get("files"):  # a folder may move: its files are compared
            identity["surrogate"] = name
        identity["fingerprint"] = vectors_fingerprint(pairs, name, settings)
        vectors.append(_Vectors(folder, name, identity))
    return vectors


def _make_vectors(
    cache: str, workdir: Path, pairs: Store, vectors: _Vectors, engine: str, map_tasks: shards.MapTasks
) -> Store:
    """The vectors of all pairs: from the cache where they are there, else by the surrogate."""
    folder, name, identity = workdir / vectors.folder, vectors.surrogate, vectors.identity
    copies = {folder: Path(cache).expanduser() / identity["fingerprint"]}
    if name == "lsa":
        copies[workdir / work.LSA] = copies[folder].with_name(f"{identity['fingerprint']}-lsa")
    if cache and all(copy.exists() for copy in copies.values()):
        log.info("surrogate vectors: %s, from %s", name, copies[folder])
        for target, copy in copies.items():
            _copy_store(copy, target)
        return Store.open(folder, kind="vectors")
    log.info("surrogate vectors: %s", name)
    settings = identity["settings"]
    with ExitStack() as stack:
        if name == "lsa":
            encode = _lsa(workdir, pairs, settings)
        elif name.startswith("checkpoint:"):  # which uses all local devices by itself
            embedder, map_tasks = Embedder.from_pretrained(name.removeprefix("checkpoint:"), progress=False), map
            encode = embedder.encode_queries, embedder.encode_documents
        else:
            arguments, devices = (name, tuple(settings["prompts"]), settings.get("dtype", "auto")), surrogate.gpus()
            encode = tuple(Loaded(surrogate.sentence_transformer, arguments, side) for side in (0, 1))
            if devices > 1 or engine == "ray":
                map_tasks = stack.enter_context(open_engine(engine, devices=devices))
            else:  # PyTorch uses all cores by itself
                map_tasks = map
        store = write_vectors(folder, pairs, encode, name=name, settings=settings, map_tasks=map_tasks)
    for made, copy in copies.items() if cache else ():
        _copy_store(made, copy)
    return store


def _lsa(workdir: Path, pairs: Store, settings: dict[str, Any]) -> tuple[Loaded, Loaded]:
    """The functions of an LSA fitted on the pairs, which is saved."""
    folder = (workdir / work.LSA).absolute()
    texts = (Texts(pairs.ragged(side)) for side in ("query_text", "document_text"))
    surrogate.lsa(*texts, **settings).save(folder)
    arguments = str(folder), Store.open(folder, verify=False).fingerprint
    return tuple(Loaded(surrogate.load_lsa, arguments, side) for side in (0, 1))


def _copy_store(source: Path, target: Path) -> None:
    """A finished store in another place: hard links, or copies on another file system; whole or not at all."""
    with NewFolder(target, marker="manifest.json") as new:
        for file in source.iterdir():
            try:
                os.link(file, new.path / file.name)
            except OSError:
                shutil.copyfile(file, new.path / file.name)
        new.put_in_place()
