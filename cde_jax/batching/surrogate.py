"""The surrogate: a cheap model whose vectors decide what is clustered together and what is a false negative.

`lsa` needs no download: TF-IDF and a truncated SVD. `sentence-transformers:NAME` is any model of that library. An
export of this project is passed as plain functions texts → vectors (paper, section 3.1: "a separate model").
"""

import importlib.util
import logging
import math
from array import array as Array
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from cde_jax.batching.vectors import Encode, Texts
from cde_jax.config import SURROGATES
from cde_jax.data.files import digests
from cde_jax.data.store import Store, StoreWriter, unit_rows
from cde_jax.data.tokens import as_list

log = logging.getLogger(__name__)


FIT_TEXTS = 200_000  # the most texts that TF-IDF and SVD are fitted on; more change the vectors little
MAX_WORDS = 50_000  # of the vocabulary, the most frequent
LONGEST = 512  # tokens of a text that a sentence-transformers model reads (as in the paper)
BATCH = {"cpu": 32, "other": 128}  # texts that one of those models encodes at a time, by device
LSA_STREAM = 12  # separates this module's random numbers from others of the same seed


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


def load_lsa(directory: str, fingerprint: str) -> tuple[Encode, Encode]:
    """`Lsa.encode` of a folder, for queries and documents. fingerprint: of the folder, by which `Loaded` knows it."""
    encode = Lsa.load(directory).encode
    return encode, encode
