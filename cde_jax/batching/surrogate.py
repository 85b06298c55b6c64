"""The surrogate: a cheap model whose vectors decide what is clustered together and what is a false negative.

`lsa` needs no download: TF-IDF and a truncated SVD. `sentence-transformers:NAME` is any model of that library. One of
our own checkpoints comes in as a plain function texts → vectors (paper, section 3.1: "a separate model").
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from threadpoolctl import threadpool_limits

from cde_jax.data.store import Ragged, Store, StoreWriter, fingerprint

log = logging.getLogger(__name__)

Encode = Callable[[Sequence[str]], np.ndarray]  # texts → vectors [n, D]

FIT_TEXTS = 200_000  # the most texts that TF-IDF and SVD are fitted on; more change the vectors little
MAX_WORDS = 50_000  # of the vocabulary, the most frequent
BLOCK = 4096  # texts encoded at a time
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


def sentence_transformer(spec: str) -> Encode:
    """The function texts → unit vectors of `spec` = "sentence-transformers:NAME", NAME a model's name or folder.

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

    def encode(texts: Sequence[str]) -> np.ndarray:
        return model.encode(list(texts), normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False)

    return encode


def vectors_fingerprint(pairs_fingerprint: str, name: str, settings: dict[str, Any]) -> str:
    """What `write_vectors` records: known before anything is encoded, so a stage can tell that its store fits."""
    return fingerprint({"kind": "vectors", "pairs": pairs_fingerprint, "surrogate": name, "settings": settings})


def write_vectors(directory: str | Path, store: Store, encode: Encode, *, name: str, settings: dict[str, Any]) -> Store:
    """Encodes every query and document of a pairs store into a store of kind "vectors", block by block.

    Arrays: queries float16 [n, D], documents float16 [n + m, D]. Raises ValueError if `encode` gives vectors that are
    not finite in float16, or not one of the same width for each text.
    """
    texts = {"queries": Texts(store.ragged("query_text")), "documents": Texts(store.ragged("document_text"))}
    width = None
    with StoreWriter(directory, "vectors") as writer:
        for array, all_texts in texts.items():
            for start in range(0, len(all_texts), BLOCK):
                block = all_texts[start : start + BLOCK]
                vectors = np.asarray(encode(block))
                _check(vectors, len(block), width, f"{name}, {array} from row {start}")
                width = vectors.shape[1]
                writer.append(array, vectors.astype(np.float16))
        return writer.finish(
            {
                "fingerprint": vectors_fingerprint(store.fingerprint, name, settings),
                "pairs": store.fingerprint,
                "surrogate": name,
                "settings": settings,
                "width": width,
            }
        )


def _check(vectors: np.ndarray, count: int, width: int | None, where: str) -> None:
    if vectors.ndim != 2 or len(vectors) != count or (width is not None and vectors.shape[1] != width):
        raise ValueError(
            f"{where}: expected vectors of shape [{count}, {width or 'width'}], got {list(vectors.shape)}; the "
            "surrogate must give one vector of the same width for each text"
        )
    largest = np.abs(vectors).max(initial=0)
    if not largest <= np.finfo(np.float16).max:
        broken = np.flatnonzero(~(np.abs(vectors) <= np.finfo(np.float16).max).all(axis=1))
        raise ValueError(
            f"{where}: {len(broken)} vectors have NaN, infinity or numbers above the float16 range (first: number "
            f"{broken[0]} of the block); look at the surrogate, or let it give unit vectors"
        )
