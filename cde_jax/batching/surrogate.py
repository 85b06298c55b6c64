"""The surrogate: a cheap model whose vectors decide what is clustered together and what is a false negative.

`lsa` needs no download: TF-IDF and a truncated SVD. `sentence-transformers:NAME` is any model of that library. An
export of this project is passed as plain functions texts → vectors (paper, section 3.1: "a separate model").
"""

import functools
import importlib.util
import logging
import math
import shutil
from array import array as Array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float16, Float32

from cde_jax.config import SURROGATES
from cde_jax.data import shards
from cde_jax.data.files import digests, fingerprint
from cde_jax.data.store import Ragged, Store, StoreWriter, unit_rows
from cde_jax.data.tokens import as_list

log = logging.getLogger(__name__)

Encode = Callable[[Sequence[str]], Float[np.ndarray, "n D"]]

FIT_TEXTS = 200_000  # the most texts that TF-IDF and SVD are fitted on; more change the vectors little
MAX_WORDS = 50_000  # of the vocabulary, the most frequent
BLOCK = 4096  # texts encoded, and written to a file, at a time
MANY = 16  # vectors of which not all can be zeros
BAR_AFTER = 3.0  # seconds of work before a progress bar shows
LONGEST = 512  # tokens of a text that a sentence-transformers model reads (as in the paper)
BATCH = {"cpu": 32, "other": 128}  # texts that one of those models encodes at a time, by device
LSA_STREAM = 12  # separates this module's random numbers from others of the same seed


class Texts(Sequence[str]):
    """The texts of a pairs store (`query_text`, `document_text`) as a sequence that reads them one by one."""

    def __init__(self, ragged: Ragged):
        self.ragged = ragged

    def __len__(self) -> int:
        return self.ragged.count()

    def __getitem__(self, i):
        return [self.ragged.text(j) for j in range(len(self))[i]] if isinstance(i, slice) else self.ragged.text(i)


class Lsa:
    """Latent semantic analysis: unit vectors from word counts."""

    def __init__(self, words: Sequence[str], idf: Float[np.ndarray, " V"], components: Float[np.ndarray, "D V"]):
        self.words = list(words)
        self.components = np.asarray(components, np.float32)
        self._tfidf = _vectorizer(vocabulary=self.words)
        self._tfidf.idf_ = np.asarray(idf, np.float32)

    def encode(self, texts: Any) -> Float32[np.ndarray, "n D"]:
        """Unit vectors of a list of texts; a text without a known word has zeros."""
        texts = as_list(texts, "texts")
        if not texts:  # scikit-learn refuses none
            return np.zeros((0, len(self.components)), np.float32)
        return unit_rows(self._tfidf.transform(texts) @ self.components.T).astype(np.float32)

    def save(self, directory: str | Path) -> None:
        """Writes arrays and JSON; a kill leaves the old folder or the new one."""
        with StoreWriter(directory, "lsa") as writer:
            writer.append_ragged("words", [np.frombuffer(word.encode(), np.uint8) for word in self.words])
            writer.append("idf", self._tfidf.idf_.astype(np.float32))
            writer.append("components", self.components)
            writer.finish({"width": len(self.components), "words": len(self.words)})

    @classmethod
    def load(cls, directory: str | Path) -> "Lsa":
        """Reads what `save` wrote: the same vectors bit for bit. A broken folder is a ValueError."""
        store = Store.open(directory, kind="lsa")
        return cls(Texts(store.ragged("words")), store.array("idf"), store.array("components"))


def lsa(queries: Any, documents: Any, *, width: int, seed: int) -> Lsa:
    """Fits `Lsa` on lists of queries and documents together (a seeded sample of at most FIT_TEXTS texts).

    Words of one letter are dropped, term counts damped (1 + log). No list of stop words, which would be of one
    language: idf gives them little weight. With fewer words or texts than `width`, the last columns are zeros.

    Raises ValueError for anything but lists of texts, and if there is no word at all.
    """
    from sklearn.decomposition import TruncatedSVD
    from threadpoolctl import threadpool_limits

    sides = {"queries": queries, "documents": documents}
    queries, documents = (side if isinstance(side, Texts) else as_list(side, name) for name, side in sides.items())
    count = len(queries) + len(documents)
    chosen = np.arange(count)
    if count > FIT_TEXTS:
        chosen = np.sort(np.random.default_rng([seed, LSA_STREAM]).choice(count, FIT_TEXTS, replace=False))
    texts = [queries[i] if i < len(queries) else documents[i - len(queries)] for i in chosen.tolist()]
    tfidf = _vectorizer(max_features=MAX_WORDS)
    try:
        counts = tfidf.fit_transform(texts)  # sparse [texts, V]
    except ValueError as error:
        raise ValueError(
            f"expected texts with words to fit the LSA surrogate on, got {count} texts: {error}; give it data with text"
        ) from None
    fitted = min(width, *counts.shape)
    if fitted < width:
        log.warning("LSA: %d texts with %d words fill %d of %d columns", *counts.shape, fitted, width)
    state = int(np.random.SeedSequence([seed, LSA_STREAM]).generate_state(1)[0])
    svd = TruncatedSVD(fitted, algorithm="randomized", random_state=state)
    # One thread rounds the same on any number of cores; a corpus of equal texts has no variance to explain.
    with threadpool_limits(1), np.errstate(invalid="ignore", divide="ignore"):
        svd.fit(counts)
    components = np.pad(svd.components_, ((0, width - fitted), (0, 0)))
    return Lsa(tfidf.get_feature_names_out().tolist(), tfidf.idf_, components)


def _vectorizer(**options: Any) -> Any:
    from scipy import sparse
    from sklearn.feature_extraction.text import TfidfVectorizer

    class Vectorizer(TfidfVectorizer):
        """scikit-learn's, with its loop over words in C: the same matrix in about half the time."""

        def _count_vocab(self, raw_documents, fixed_vocab):
            vocabulary, analyze = self.vocabulary_ if fixed_vocab else defaultdict(), self.build_analyzer()
            words, ends = Array("i"), [0]  # numbers of the words, text after text
            if not fixed_vocab:
                vocabulary.default_factory = vocabulary.__len__
            for text in raw_documents:
                if fixed_vocab:
                    words.extend([i for i in map(vocabulary.get, analyze(text)) if i is not None])
                else:
                    words.extend(map(vocabulary.__getitem__, analyze(text)))
                ends.append(len(words))
            if not vocabulary:
                raise ValueError("no words")
            ones, shape = np.ones(len(words), self.dtype), (len(ends) - 1, len(vocabulary))
            counts = sparse.csr_matrix((ones, np.frombuffer(words, np.intc), ends), shape)
            counts.sum_duplicates()
            return vocabulary if fixed_vocab else dict(vocabulary), counts

    return Vectorizer(lowercase=True, sublinear_tf=True, dtype=np.float32, **options)


def check_surrogate(name: str, prompts: Sequence[str] = ()) -> None:
    """Raises ValueError for a surrogate that cannot be loaded, without loading it.

    An unknown kind, a missing package, a folder without a model, a name that the hub (or its cache) does not have,
    prompts for a model that takes none.
    """
    kind, _, model = name.partition(":")
    problem = ""
    if name != "lsa" and not (kind in ("checkpoint", "sentence-transformers") and model):
        problem = f"expected {SURROGATES}"
    elif prompts and kind != "sentence-transformers":
        problem = f"it takes no prompts, got {tuple(prompts)!r}"
    elif kind == "checkpoint" and not (Path(model) / "config.json").is_file():
        problem = f"expected the folder of an exported model, but {model}/config.json is not there"
    elif kind == "sentence-transformers" and importlib.util.find_spec("sentence_transformers") is None:
        problem = "it needs an extra: pip install 'cde_jax[torch]', or use \"lsa\""
    elif kind == "sentence-transformers":
        problem = _missing_model(model)
    if problem:
        raise ValueError(f"the surrogate {name!r} cannot be used: {problem}; change it in the config")


def _missing_model(model: str) -> str:
    """Why a sentence-transformers model is not there; "" if it is."""
    from huggingface_hub import hf_hub_download

    files, reason = ("modules.json", "config.json"), ""
    if Path(model).exists() or model.startswith(("/", "~", ".")) or model.count("/") > 1:
        there = any((Path(model) / file).is_file() for file in files)
        return "" if there else "expected a folder with modules.json or config.json"
    for repository in (model,) if "/" in model else (f"sentence-transformers/{model}", model):
        for file in files:
            try:
                hf_hub_download(repository, file)
                return ""
            except (OSError, ValueError) as error:  # those of huggingface_hub are either
                reason = f"neither a folder nor on the hub ({str(error).splitlines()[0]})"
    return reason


def sentence_transformer(spec: str, prompts: Sequence[str] = (), dtype: str = "auto") -> tuple[Encode, Encode]:
    """The functions (queries → unit vectors, documents → unit vectors) of "sentence-transformers:NAME".

    prompts: put before queries and documents; (): those that are saved with the model, if any. Give them where the
    model's card says that they are part of the text (nomic-embed-text-v1: "search_query: ", "search_document: "). Texts
    are cut to 512 tokens. dtype: "auto", as saved, or "bfloat16". Runs on the device that the library chooses. Raises
    ValueError as `check_surrogate`.
    """
    check_surrogate(spec, prompts)
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(spec.partition(":")[2])
    if dtype == "bfloat16":
        model.bfloat16()
    if LONGEST < (model.max_seq_length or 0) < math.inf:  # some models have no limit, and take none
        model.max_seq_length = LONGEST
    batch_size = BATCH["cpu" if model.device.type == "cpu" else "other"]
    options = {"batch_size": batch_size, "normalize_embeddings": True, "show_progress_bar": False}
    query_prompt, document_prompt = prompts or (None, None)
    return (
        lambda texts: model.encode_query(list(texts), prompt=query_prompt, **options),
        lambda texts: model.encode_document(list(texts), prompt=document_prompt, **options),
    )


def gpus() -> int:
    """NVIDIA GPUs of this machine that PyTorch sees; 0 without PyTorch."""
    if importlib.util.find_spec("torch") is None:
        return 0
    import torch

    return torch.cuda.device_count()


def identity(spec: str) -> dict[str, str]:
    """File name → sha256 of a surrogate that is a folder ("KIND:DIR"), for the settings of its vectors; else {}."""
    folder = spec.partition(":")[2]
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file()) if folder else []
    return digests(files, Path(folder))


def texts_fingerprint(pairs: Store) -> str:
    """Digest of the query and document texts of a pairs store, whatever their tokens, prefixes, domains or folder."""
    arrays = pairs.manifest["arrays"].items()
    return fingerprint({name: array["sha256"] for name, array in arrays if "_text." in name})


def vectors_fingerprint(pairs: Store, name: str, settings: dict[str, Any]) -> str:
    """The fingerprint that `write_vectors` gives its store, from texts, model and settings, before anything is encoded.

    A model in a folder is known by its files (`identity`, as settings["files"]), wherever the folder is.
    """
    model = name.partition(":")[0] if settings.get("files") else name
    return fingerprint({"kind": "vectors", "texts": texts_fingerprint(pairs), "surrogate": model, "settings": settings})


class Loaded(NamedTuple):
    """One of the functions that `load` gives, for queries (0) or documents (1); each process loads them once.

    It can be sent to another process, which the model itself cannot.
    """

    load: Callable[..., tuple[Encode, Encode]]
    arguments: tuple[Any, ...]
    side: int

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "n D"]:
        """Vectors of the texts."""
        return _load(self.load, self.arguments)[self.side](texts)


@functools.lru_cache(maxsize=1)
def _load(load: Callable[..., tuple[Encode, Encode]], arguments: tuple[Any, ...]) -> tuple[Encode, Encode]:
    return load(*arguments)


def load_lsa(directory: str, fingerprint: str) -> tuple[Encode, Encode]:
    """`Lsa.encode` of a folder, for queries and documents. fingerprint: of the folder, by which `Loaded` knows it."""
    encode = Lsa.load(directory).encode
    return encode, encode


class _Block(NamedTuple):
    """Consecutive texts of one side of a pairs store, and the store that gets their vectors."""

    path: Path
    digest: str
    pairs: Path
    text: str  # array of the pairs store
    rows: range
    encode: Encode
    what: str
    width: int


def _write_block(block: _Block) -> int:
    """Encode a block unless it is there; returns how many texts were encoded."""
    if block.path.exists():
        return 0
    texts = Texts(Store.open(block.pairs, verify=False).ragged(block.text))
    with StoreWriter(block.path, "block") as writer:
        writer.append("vectors", _encode(block.encode, texts, block.what, block.rows, block.width))
        writer.finish({"fingerprint": block.digest})
    return len(block.rows)


def write_vectors(
    directory: str | Path,
    pairs: Store,
    encode: Encode | tuple[Encode, Encode],
    *,
    name: str,
    settings: dict[str, Any],
    map_tasks: shards.MapTasks = map,
) -> Store:
    """Encodes every query and document of a pairs store into a store of kind "vectors".

    Arrays: queries float16 [n, D], documents float16 [n + m, D]. `encode` is one function, or one for queries and one
    for documents, `Loaded` where `map_tasks` uses other processes. It gets BLOCK consecutive rows at a time, the
    longest first: always the same texts in the same order, because padding changes the last bits of a vector. Each
    block is a task, kept as a store of its own until all are there: after a kill or an error the same call continues
    with those that are missing. Needs twice the room of the vectors.

    Raises ValueError if `encode` gives vectors that are not finite in float16, not one of the same width for each text,
    or only zeros; OSError if there is no room or no right to write.
    """
    from tqdm import tqdm

    directory, encoders = Path(directory).absolute(), encode if isinstance(encode, tuple) else (encode, encode)
    folder, width = directory.with_name(f".{directory.name}.blocks"), None
    sides: dict[str, tuple[str, Encode, int]] = {}
    for side, text, encoder in zip(("queries", "documents"), ("query_text", "document_text"), encoders, strict=True):
        texts = Texts(pairs.ragged(text))
        # One text: models of two widths are found before anything is written.
        width = _encode(encoder, texts, f"surrogate {name}, {side}", range(1), width).shape[1]
        sides[side] = text, encoder, len(texts)
    metadata = {"fingerprint": vectors_fingerprint(pairs, name, settings), "width": width}
    digest, store = fingerprint(metadata | {"block": BLOCK}), pairs.directory.absolute()

    def blocks() -> Iterator[_Block]:
        for side, (text, encoder, count) in sides.items():
            for start in range(0, count, BLOCK):
                path, rows = folder / f"{side}-{start}", range(start, min(start + BLOCK, count))
                yield _Block(path, digest, store, text, rows, encoder, f"surrogate {name}, {side}", width)

    with StoreWriter(directory, "vectors") as writer:  # opened first: no second process can write this store
        done = sum(len(block.rows) for block in blocks() if shards.is_whole(block.path, "block", digest))
        total = sum(count for *_, count in sides.values())
        if done:
            log.info("vectors of %s: %d of %d texts are there, continuing", name, done, total)
        with tqdm(total=total, initial=done, desc="vectors", unit=" texts", delay=BAR_AFTER, leave=False) as bar:
            for count in map_tasks(_write_block, blocks()):
                bar.update(count)
        for block in blocks():
            array = Store.open(block.path, kind="block", verify=False).array("vectors")
            writer.append(block.path.name.partition("-")[0], array)
        store = writer.finish({"texts": texts_fingerprint(pairs), "surrogate": name, "settings": settings} | metadata)
    shutil.rmtree(folder)
    return store


def _encode(encode: Encode, texts: Texts, what: str, rows: range, width: int | None) -> Float16[np.ndarray, "rows D"]:
    """Vectors of consecutive texts, the longest encoded first; ValueError if they are not what is expected."""
    lengths = np.diff(texts.ragged.offsets[rows.start : rows.stop + 1])  # in bytes
    order = np.argsort(-lengths, kind="stable")
    vectors = np.asarray(encode([texts[rows[i]] for i in order.tolist()]))
    where = f"{what} {rows.start} to {rows.stop - 1}"
    if vectors.ndim != 2 or len(vectors) != len(rows) or width not in (None, vectors.shape[1]):
        expected, got = f"[{len(rows)}, {width or 'width'}]", list(vectors.shape)
        raise ValueError(f"{where}: expected vectors of shape {expected}, got {got}; the surrogate must give these")
    broken = order[~(np.abs(vectors) <= np.finfo(np.float16).max).all(axis=1)]
    if len(broken):
        raise ValueError(
            f"{where}: {len(broken)} vectors have NaN, infinity or numbers above the float16 range (first: row "
            f"{rows.start + broken.min()}); look at that text and the surrogate, or let it give unit vectors"
        )
    if zeros := np.count_nonzero(~vectors.any(axis=1)):
        if zeros == len(rows) >= MANY:
            raise ValueError(f"{where}: expected vectors, got only zeros; look at the surrogate, or use another one")
        log.warning("%s: %d vectors are zeros", where, zeros)
    return vectors.astype(np.float16)[np.argsort(order)]
