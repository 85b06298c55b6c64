"""The embedded default data: docstrings of installed packages, read with `ast`; nothing read is imported.

query = first paragraph of a docstring, document = qualified name and the rest, domain = top-level package.
Private functions and classes are read too: their docstrings are as real, and a sixth of the pairs.
"""

import ast
import gc
import importlib.machinery
import importlib.metadata
import logging
import platform
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from cde_jax.data.pairs import InputLog, Pair
from cde_jax.data.shards import MapTasks
from cde_jax.data.sources.beir import EvaluationSet
from cde_jax.data.tokens import as_list, text_key

QUERY_WORDS = 3  # words (two letters in a row) that a query has at least …
REST_WORDS = 8  # … and the rest of its document
BLOCK = 64  # files that are parsed by one task
PARALLEL_FILES = 2000  # from these on by other processes, which take a second to start
READER_VERSION = 1  # part of the identity: raise it when the same packages give other pairs than before
# Tests, and copies of other packages: their text is in no user's documentation, or there twice.
_SKIPPED = {
    *("tests", "test", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "__pycache__"),
    *("_vendor", "_vendored", "vendored", "vendor", "externals", "third_party"),
}
_WORD = re.compile(r"[^\W\d_]{2,}")
_UNDERLINE = re.compile(r"\s*([-=~^*#_`'\"+.])\1{2,}\s*")
# A section of parameters, results and so on ends the first paragraph even without a blank line before it.
_SECTION = re.compile(
    r"\s*(?:(?:keyword )?arg(?:ument)?s|(?:other )?param(?:eter)?s|returns?|raises?|yields?|attributes|"
    r"(?:example )?usage|examples?|notes?|references|see also|warn(?:ing)?s?|methods|inputs?|outputs?)\s*(?::|$)"
    r"|\s*:(?:param|type|returns?|rtype|raises|arg|ivar|cvar|keyword)\b"
    r"|\s*@(?:param|return|type|rtype)\b|\s*(?:>>>|```|\.\. )|\s*\w+ \(`",
    re.IGNORECASE,
)
_logger = logging.getLogger(__name__)


# The packages of `core_packages`, by import name: what was required, directly or not, when the demo was measured. The
# list is fixed, so that a change of our requirements does not change the demo's pairs.
_CORE = """
PIL absl aiofiles annotated_doc annotated_types anyio array_record attr attrs bm25s certifi charset_normalizer click
cloudpickle contourpy cycler dateutil docstring_parser einops etils faiss filelock flax flaxlib_src fontTools fsspec
google grain h11 hf_xet httpcore2 httpx2 huggingface_hub humanize idna immutabledict jax jaxlib jaxtyping joblib
kiwisolver markdown_it matplotlib mdurl ml_collections ml_dtypes mpl_toolkits msgpack narwhals numpy opt_einsum optax
orbax packaging portpicker prometheus_client promise psutil pyarrow pydantic pydantic_core pygments pylab pyparsing
pytrec_eval regex requests rich safetensors scipy shellingham simple_parsing simplejson six sklearn tensorboardX
tensorflow_datasets tensorflow_metadata tensorstore termcolor threadpoolctl tokenizers toml tqdm transformers tree
treescope truststore typer typing_extensions typing_inspection tzdata urllib3 uvloop wadler_lindig wrapt yaml zipp
"""


def core_packages() -> tuple[str, ...]:
    """Import names of the packages that the demo reads, as far as they are installed; a warning names the others."""
    names = _CORE.split()
    if missing := [name for name in names if _spec(name) is None]:
        advice = "not installed, so their docstrings are not read (pip install 'cde_jax[demo]' has them): %s"
        _logger.warning(advice, ", ".join(missing))
    return tuple(name for name in names if name not in missing)


def installed_packages() -> tuple[str, ...]:
    """Sorted import names of every installed distribution but this one."""
    names = set(importlib.metadata.packages_distributions()) - _SKIPPED - {"cde_jax"}
    return tuple(sorted(n for n in names if n.isidentifier() and not n.startswith("_") and _spec(n) is not None))


def identity(packages: Sequence[str], standard_library: bool) -> dict[str, str]:
    """Package → versions of the distributions that provide it, and the versions of Python (it decides what can be
    parsed) and of this reader: two equal identities give the same pairs.
    """
    owners = importlib.metadata.packages_distributions()
    versions = {"(rules)": str(READER_VERSION), "(python)": platform.python_version()}
    versions["(standard library)"] = "read" if standard_library else "not read"
    for package in sorted(set(packages)):
        names = sorted({re.sub(r"[-_.]+", "-", name).lower() for name in owners.get(package, ())})
        versions[package] = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names) or "unknown"
    return versions


def read_pairs(
    packages: Iterable[str],
    *,
    standard_library: bool,
    counts: MutableMapping[str, int] | None = None,
    log: InputLog | None = None,
    map_tasks: MapTasks = map,
) -> Iterator[Pair]:
    """The pairs of the packages' docstrings, in order of package, file and line.

    A docstring gives a pair if its first paragraph has QUERY_WORDS words and the rest REST_WORDS. Docstrings
    whose query or whose rest was there before are dropped here, for their documents differ by the name (the same
    function under a second one, a method that repeats its parent's text). Read all packages in one call, so that a
    held-out one shares no text with the others. `counts` gains the numbers of files and docstrings by what became of
    them, `log` the pairs of each package, and the files that are not readable. Where there
    are many files, `map_tasks` parses them.

    A package that is not installed is a ValueError, before anything is read.
    """
    names = sorted(set(as_list(packages, "packages")))
    if standard_library:
        names += [name for name in _standard_names() if _spec(name) is not None]
    if not names:
        raise ValueError("expected packages to read, got none; name some or read the standard library")
    files = [(name, _files_of(name)) for name in names]
    return _read(files, {} if counts is None else counts, InputLog() if log is None else log, map_tasks)


def evaluation_set(domain: str, pairs: Iterable[Pair]) -> EvaluationSet:
    """The pairs of one domain as queries, corpus and qrels: each document and each query once.

    A query that belongs to several documents has all of them as relevant.
    """
    queries: dict[int, tuple[str, str]] = {}  # key of the text → id, text
    corpus: dict[int, tuple[str, str]] = {}
    qrels: dict[str, dict[str, int]] = {}
    for pair in pairs:
        if pair.domain == domain:
            query, _ = queries.setdefault(text_key(pair.query), (f"q{len(queries)}", pair.query))
            document, _ = corpus.setdefault(text_key(pair.document), (f"d{len(corpus)}", pair.document))
            qrels.setdefault(query, {})[document] = 1
    if not corpus:
        raise ValueError(f"held-out domain {domain!r} has no pairs; name a package that is installed and read")
    return EvaluationSet(domain, dict(queries.values()), dict(corpus.values()), qrels)


def split_docstring(docstring: str) -> tuple[str, str]:
    """(first paragraph, rest), white space joined; lines that only underline a heading are layout and go.

    A title of one word (a module's own name, mostly) is no paragraph: what follows it is taken.
    """
    lines = [line.strip() for line in docstring.strip().splitlines() if not _UNDERLINE.fullmatch(line)]
    start = 0
    if len(lines) > 2 and not lines[1] and len(lines[0].split()) == 1:
        start = next(i for i in range(1, len(lines)) if lines[i])
    end = start
    while end < len(lines) and lines[end] and not _SECTION.match(lines[end]):
        end += 1
    return " ".join(" ".join(lines[start:end]).split()), " ".join(" ".join(lines[end:]).split())


class _File(NamedTuple):
    """What a file holds: why it is not readable or "", how many docstrings, and of the long ones name, query, rest."""

    problem: str
    docstrings: int
    long: list[tuple[str, str, str]]


def _read(
    packages: list[tuple[str, list[tuple[str, Path]]]],
    counts: MutableMapping[str, int],
    log: InputLog,
    map_tasks: MapTasks,
) -> Iterator[Pair]:
    names = ("files", "unreadable files", "docstrings", "too short", "repeated queries", "repeated texts", "pairs")
    counts.update({name: counts.get(name, 0) for name in names})
    queries: set[int] = set()
    texts: set[int] = set()
    everything = [file for _, files in packages for file in files]
    blocks = [everything[start : start + BLOCK] for start in range(0, len(everything), BLOCK)]
    map_tasks = map_tasks if len(everything) >= PARALLEL_FILES else map
    parsed = chain.from_iterable(map_tasks(_parse_files, blocks))
    for domain, files in packages:
        before = counts["pairs"]
        for (module, path), file in zip(files, parsed, strict=False):  # `parsed` goes on with the next package
            counts["files"] += 1
            counts["docstrings"] += file.docstrings
            counts["too short"] += file.docstrings - len(file.long)
            if file.problem:
                counts["unreadable files"] += 1
                log.skip(f"{module} ({path.name})", file.problem)
            for name, query, rest in file.long:
                if (rest_key := text_key(rest)) in texts:
                    counts["repeated texts"] += 1
                elif (query_key := text_key(query)) in queries:
                    counts["repeated queries"] += 1
                else:
                    queries.add(query_key)
                    texts.add(rest_key)
                    counts["pairs"] += 1
                    yield Pair(domain, query, f"{name} {rest}")
        log.finish(domain, counts["pairs"] - before)


def _parse_files(files: Sequence[tuple[str, Path]]) -> list[_File]:
    """The docstrings of (module, path)s, each file by itself."""
    result = []
    for module, path in files:
        try:
            tree = _parse(path)
        except (SyntaxError, ValueError, RecursionError, MemoryError, OSError) as error:
            result.append(_File(f"{type(error).__name__}: {error}", 0, []))
            continue
        docs = [(name, *split_docstring(docstring)) for name, docstring in _docstrings(tree, module)]
        long = [(name, query, rest) for name, query, rest in docs if _is_long(query, rest)]
        result.append(_File("", len(docs), long))
    return result


def _is_long(query: str, rest: str) -> bool:
    return _words(query) >= QUERY_WORDS and _words(rest) >= REST_WORDS


def _words(text: str) -> int:
    return sum(1 for word in text.split() if _WORD.search(word))


def _parse(path: Path) -> ast.Module:
    collecting = gc.isenabled()
    gc.disable()  # a tree is many small objects and no cycle: the collector takes a third of the time for nothing
    try:
        with warnings.catch_warnings(action="ignore"):  # of invalid escapes in other people's strings
            return ast.parse(path.read_bytes())
    finally:
        if collecting:
            gc.enable()


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a module, class or function and of what the former define, in source order."""
    if docstring := ast.get_docstring(node):
        yield name, docstring.encode("utf-8", "ignore").decode()  # a lone surrogate from an escape cannot be stored
    waiting = node.body[::-1] if isinstance(node, ast.Module | ast.ClassDef) else []
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, ast.If | ast.Try):  # definitions under a condition or a guarded import
            waiting += [*inner.body, *inner.orelse][::-1]
        elif isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(inner, f"{name}.{inner.name}")


def _spec(package: str) -> importlib.machinery.ModuleSpec | None:
    return importlib.machinery.PathFinder.find_spec(package)  # looks, does not import


def _files_of(package: str) -> list[tuple[str, Path]]:
    """(module's public name, file), sorted by relative path, without tests and copies of other packages."""
    spec = _spec(package)
    if spec is None:
        raise ValueError(f"package {package!r} is not installed; install it or take it out of the packages to read")
    if spec.submodule_search_locations is None:
        return [(package, Path(spec.origin))] if (spec.origin or "").endswith(".py") else []
    files = []
    for folder in set(spec.submodule_search_locations):  # several for a namespace package
        for path in Path(folder).rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            if not _SKIPPED.intersection(parts) and not re.fullmatch(r"conftest|test_.*|.*_test", parts[-1]):
                # What users call scipy.signal.butter is written in scipy/signal/_filter_design.py.
                public = [part for part in parts if not part.startswith("_")]
                files.append((folder, parts, ".".join([package, *public]), path))
    return [(module, path) for _, _, module, path in sorted(files)]


def _standard_names() -> list[str]:
    return sorted(name for name in sys.stdlib_module_names if not name.startswith("_") and name not in _SKIPPED)
