"""The surrogate: a cheap model whose vectors decide what is clustered together and what is a false negative.

`lsa` needs no download: TF-IDF and a truncated SVD. `sentence-transformers:NAME` is any model of that library. One of
our own checkpoints comes in as plain functions texts → vectors (paper, section 3.1: "a separate model").
"""

import glob
import hashlib
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from cde_jax.data.files import fingerprint
from cde_jax.data.store import Ragged, Store, StoreWriter

log = logging.getLogger(__name__)

Encode = Callable[[Sequence[str]], np.ndarray]  # texts → vectors [n, D]

FIT_TEXTS = 200_000  # the most texts that TF-IDF and SVD are fitted on; more change the vectors little
MAX_WORDS = 50_000  # of the vocabulary, the most frequent
BLOCK = 4096  # texts encoded, and made durable, at a time
BAR_AFTER = 3.0  # seconds of work before a progress bar shows
LONGEST = 512  # tokens of a text that a sentence-transformers model reads (the paper's length)
BATCH = {"cpu": 32, "other": 128}  # texts that one of those models takes at a time, by device
LSA_STREAM = 12  # keeps this module's random numbers apart from those of the other users of the same seed


class Texts(Sequence[str]):
    """The texts of a pairs store (`query_text`, `document_text`) as a sequence that reads them one by one."""

    def __init__(self, ragged: Ragged):
        self.ragged = ragged

    def __len__(self) -> int:
        return self.ragged.count()

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self.ragged.text(j) for j in range(*i.indices(len(self)))]
        return self.ragged.text(i)


class Lsa:
    """Latent semantic analysis: unit vectors from word counts."""

    def __init__(self, words: Sequence[str], idf: Float[np.ndarray, " V"], components: Float[np.ndarray, "width V"]):
        self.words = list(words)
        self.components = np.asarray(components, np.float32)
        self._tfidf = _vectorizer(vocabulary=self.words)
        self._tfidf.idf_ = np.asarray(idf, np.float32)

    @property
    def width(self) -> int:
        """Length of a vector."""
        return len(self.components)

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "n width"]:
        """float32 unit vectors; a text without a known word has zeros."""
        if not len(texts):
            return np.zeros((0, self.width), np.float32)
        vectors = self._tfidf.transform(texts) @ self.components.T
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)

    def save(self, directory: str | Path) -> None:
        """Writes arrays and JSON; a kill leaves the old folder or the new one."""
        letters = [np.frombuffer(word.encode(), np.uint8) for word in self.words]
        with StoreWriter(directory, "lsa") as writer:
            writer.append_ragged("words", letters)
            writer.append("idf", self._tfidf.idf_.astype(np.float32))
            writer.append("components", self.components)
            writer.finish({"width": self.width, "words": len(self.words)})

    @classmethod
    def load(cls, directory: str | Path) -> "Lsa":
        """Reads what `save` wrote: the same vectors bit for bit. A broken folder is a ValueError."""
        store = Store.open(directory, kind="lsa")
        return cls(list(Texts(store.ragged("words"))), store.array("idf"), store.array("components"))


def lsa(queries: Sequence[str], documents: Sequence[str], *, width: int, seed: int) -> Lsa:
    """Fits `Lsa` on queries and documents together (a seeded sample of at most 200,000 texts).

    Words of one letter are dropped, term counts damped (1 + log); no stop word list, which would tie it to a language:
    idf does that work. With fewer words or texts than `width`, the missing columns are zeros.

    Raises ValueError if there is no word at all.
    """
    count = len(queries) + len(documents)
    chosen = np.arange(count)
    if count > FIT_TEXTS:
        chosen = np.sort(np.random.default_rng([seed, LSA_STREAM]).choice(count, FIT_TEXTS, replace=False))
    texts = [queries[i] if i < len(queries) else documents[i - len(queries)] for i in map(int, chosen)]
    tfidf = _vectorizer(max_features=MAX_WORDS)
    try:
        counts = tfidf.fit_transform(texts)
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
    components = np.zeros((width, counts.shape[1]), np.float32)
    components[:fitted] = svd.components_
    return Lsa(tfidf.get_feature_names_out().tolist(), tfidf.idf_, components)


def _vectorizer(**options: Any) -> TfidfVectorizer:
    return TfidfVectorizer(lowercase=True, sublinear_tf=True, dtype=np.float32, **options)


def sentence_transformer(spec: str, prompts: tuple[str, str] | None = None) -> tuple[Encode, Encode]:
    """The functions (queries → unit vectors, documents → unit vectors) of a sentence-transformers model.

    `spec` is "sentence-transformers:NAME", NAME a model's name or folder. `prompts` are put before queries and
    documents; None: those that are saved with the model, if any. Give them where the model's card asks for them in the
    text (nomic-embed-text-v1: "search_query: ", "search_document: "). Texts are cut to 512 tokens. Runs on the device
    that the library chooses.

    Raises ValueError for another spec, or where the library is not installed.
    """
    kind, _, name = spec.partition(":")
    if kind != "sentence-transformers" or not name:
        raise ValueError(
            f'expected a surrogate "lsa", "sentence-transformers:NAME" or "checkpoint:DIR", got {spec!r}; '
            "change it in the config"
        )
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ValueError(f"the surrogate {spec} needs an extra: pip install 'cde_jax[torch]', or use \"lsa\"") from None
    model = SentenceTransformer(name)
    if LONGEST < (model.max_seq_length or 0) < math.inf:  # some models have no limit, and take none
        model.max_seq_length = LONGEST
    options = {
        "batch_size": BATCH["cpu" if model.device.type == "cpu" else "other"],
        "normalize_embeddings": True,
        "show_progress_bar": False,
    }
    query_prompt, document_prompt = prompts or (None, None)
    return (
        lambda texts: model.encode_query(list(texts), prompt=query_prompt, **options),
        lambda texts: model.encode_document(list(texts), prompt=document_prompt, **options),
    )


def identity(spec: str) -> dict[str, str]:
    """File name → sha256 of a surrogate that is a folder ("KIND:DIR"); {} for "lsa" and for a name on a hub.

    For the `settings` of `write_vectors`: another model in the same folder then makes other vectors.
    """
    _, _, name = spec.partition(":")
    digests = {}
    for path in sorted(Path(name).rglob("*")) if name else ():
        if path.is_file():
            with open(path, "rb") as file:
                digests[path.relative_to(name).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def vectors_fingerprint(pairs_fingerprint: str, name: str, settings: dict[str, Any]) -> str:
    """What `write_vectors` records: known before anything is encoded, so a stage can tell that its store fits."""
    return fingerprint({"kind": "vectors", "pairs": pairs_fingerprint, "surrogate": name, "settings": settings})


def write_vectors(
    directory: str | Path,
    store: Store,
    encode: Encode | tuple[Encode, Encode],
    *,
    name: str,
    settings: dict[str, Any],
) -> Store:
    """Encodes every query and document of a pairs store into a store of kind "vectors".

    Arrays: queries float16 [n, D], documents float16 [n + m, D]. `encode` is one function, or one for queries and one
    for documents. It gets 4096 consecutive rows at a time, the longest first, so that texts of similar length stand
    together: always the same texts in the same order, because padding moves the last bits of a vector.

    Each block is kept as a store of its own until all are there, so that after a kill or an error the same call goes
    on behind the last one; blocks of other pairs, `name`, `settings` or width are discarded. Needs twice the room of
    the vectors.

    Raises ValueError if `encode` gives vectors that are not finite in float16, or not one of the same width for each
    text; OSError if there is no room or no right to write.
    """
    queries, documents = encode if isinstance(encode, tuple) else (encode, encode)
    sides = [_Side(store, "query", "queries", queries), _Side(store, "document", "documents", documents)]
    width = None
    for side in sides:  # one text each: models of two widths are found before anything is encoded
        width = side.encode(np.zeros(1, np.int64), width, name).shape[1]
    digest = vectors_fingerprint(store.fingerprint, name, settings)
    stem = f".{Path(directory).name}.blocks-"
    blocks = Path(directory).absolute().parent / f"{stem}{fingerprint([digest, width, BLOCK])[:16]}"
    for other in blocks.parent.glob(f"{glob.escape(stem)}*"):
        if other != blocks:
            log.warning("%s: blocks of vectors of other inputs or settings are discarded", other)
            shutil.rmtree(other)
    starts = [(side, start) for side in sides for start in range(0, len(side.texts), BLOCK)]
    folders = [blocks / f"{side.array}-{start:012d}" for side, start in starts]
    sizes = [min(BLOCK, len(side.texts) - start) for side, start in starts]
    whole = [_is_whole(folder) for folder in folders]
    done = int(np.dot(sizes, whole))
    if done:
        log.info("vectors of %s: %d of %d texts are there, going on", name, done, sum(sizes))
    with tqdm(total=sum(sizes), initial=done, desc="vectors", unit=" texts", delay=BAR_AFTER, leave=False) as bar:
        for (side, start), folder, size in compress(zip(starts, folders, sizes, strict=True), np.logical_not(whole)):
            with StoreWriter(folder, "block") as writer:
                writer.append("vectors", side.encode(np.arange(start, start + size), width, name))
                writer.finish()
            bar.update(size)
    with StoreWriter(directory, "vectors") as writer:
        for (side, _), folder in zip(starts, folders, strict=True):
            writer.append(side.array, Store.open(folder, kind="block", verify=False).array("vectors"))
        described = {"pairs": store.fingerprint, "surrogate": name, "settings": settings, "width": width}
        finished = writer.finish({"fingerprint": digest} | described)
    shutil.rmtree(blocks)
    return finished


def _is_whole(block: Path) -> bool:
    """Whether a block was written before; a broken one is discarded."""
    try:
        return block.exists() and bool(Store.open(block, kind="block"))
    except ValueError as error:
        log.warning("a block of vectors is discarded: %s", error)
        shutil.rmtree(block)
        return False


class _Side:
    """The queries or the documents of a pairs store, and what encodes them."""

    def __init__(self, store: Store, name: str, array: str, encode: Encode):
        self.array = array
        self.texts = Texts(store.ragged(f"{name}_text"))
        self._ends = store.ragged(f"{name}_tokens").offsets
        self._encode = encode

    def encode(self, rows: Int[np.ndarray, " n"], width: int | None, name: str) -> np.ndarray:
        """Vectors of consecutive rows, float16 [n, D]; ValueError if they are not what is expected."""
        lengths = np.diff(self._ends[rows[0] : rows[-1] + 2])
        order = np.argsort(-lengths, kind="stable")
        vectors = np.asarray(self._encode([self.texts[i] for i in rows[order].tolist()]))
        where = f"surrogate {name}, {self.array} {rows[0]} to {rows[-1]}"
        if vectors.ndim != 2 or len(vectors) != len(rows) or width not in (None, vectors.shape[1]):
            raise ValueError(
                f"{where}: expected vectors of shape [{len(rows)}, {width or 'width'}], got {list(vectors.shape)}; the "
                "surrogate must give one vector of the same width for each text"
            )
        fits = (np.abs(vectors) <= np.finfo(np.float16).max).all(axis=1)
        if not fits.all():
            broken = np.sort(rows[order[~fits]])
            raise ValueError(
                f"{where}: {len(broken)} vectors have NaN, infinity or numbers above the float16 range (first: row "
                f"{broken[0]} of the pairs); look at that text and the surrogate, or let it give unit vectors"
            )
        in_place = np.empty(vectors.shape, np.float16)
        in_place[order] = vectors
        return in_place
