"""`Context`: a sample of a corpus as the second stage reads it, to keep beside the corpus' index."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cde_jax.adapters.whitening import Whitening
from cde_jax.data.files import write_file
from cde_jax.models.attention import Prefix
from cde_jax.models.contextual import ContextCache

FORMAT = "cde_jax context 5"
# Centres without a matrix; the other two without centres.
_BEFORE = ("cde_jax context 4", "cde_jax context 3", "cde_jax context 2")
_WITHOUT_CACHE = "cde_jax context 1"  # vectors only, and their digest


@dataclass(frozen=True, eq=False)  # compared by identity: an embedder keeps what it prepared per object
class Context:
    """Vectors of the sampled context documents, and where they came from. Made by `Embedder.embed_context`.

    Queries and documents must be encoded with the same context for their vectors to be comparable.
    """

    # Float32, read-only, m ≤ J (times the vectors a document, for imported models); m = 0 for a biencoder.
    vectors: Float[np.ndarray, "m D"]
    seed: int  # of the sample
    corpus_size: int  # how many documents it was drawn from
    weights: str  # fingerprint of the model's weights
    documents: str  # fingerprint of the sampled documents, whatever their order
    # What isolated attention reads, in the embedder's compute type: 19 MB in bfloat16 for 512 slots of the base model.
    # None for joint attention; without it, it is computed where the context is first used.
    cache: ContextCache | None = None
    # Of queries and documents (`retrieval.whiten`), read-only; None: vectors stay as they are.
    whitening: Whitening | None = None

    def __post_init__(self):
        for array in (self.vectors, *(self.whitening or ())):
            array.flags.writeable = False  # what was prepared from them would not follow a change
        if self.cache is not None and self.cache.prefix is None:
            raise ValueError("expected a cache with keys and values; joint attention has none, leave `cache` out")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; a kill or a full disk leaves the old file or the new one."""
        tensors = {"vectors": np.asarray(self.vectors, np.float32)}
        if self.cache is not None:
            tensors |= {"slots": self.cache.slots, "keys": self.cache.prefix.keys, "values": self.cache.prefix.values}
        if self.whitening is not None:
            tensors |= {f"whitening.{name}": array for name, array in self.whitening._asdict().items()}
        tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        metadata = {
            "format": FORMAT,
            "seed": str(self.seed),
            "corpus_size": str(self.corpus_size),
            "weights": self.weights,
            "documents": self.documents,
        }
        write_file(Path(path), save(tensors, metadata | {"sha256": _digest(tensors, metadata)}))

    @classmethod
    def load(cls, path: str | Path) -> "Context":
        """Read what `save` wrote. Raises ValueError for a missing, truncated, altered or other file.

        Whether it belongs to an embedder's weights is checked where it is used.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: expected a file written by Context.save, there is none")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                ours = metadata.get("format") in (FORMAT, *_BEFORE, _WITHOUT_CACHE)
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())} if ours else {}
        except SafetensorError as error:
            raise ValueError(
                f"{path}: not readable as safetensors ({error}): truncated or altered; embed the context again"
            ) from None
        if not ours:
            raise ValueError(
                f"{path}: expected format {FORMAT!r}, got {metadata.get('format')!r}: not written by Context.save"
            )
        expected = metadata.pop("sha256")
        if (digest := _digest(tensors, metadata)) != expected:
            raise ValueError(
                f"{path}: expected sha256 {expected} of what it holds, got {digest}: the file was altered, or has "
                f"the cache of another context; embed the context again"
            )
        cache = None
        if "keys" in tensors:
            cache = ContextCache(tensors["slots"], Prefix(tensors["keys"], tensors["values"]))
        return cls(
            tensors["vectors"],
            int(metadata["seed"]),
            int(metadata["corpus_size"]),
            metadata["weights"],
            metadata["documents"],
            cache,
            _whitening(tensors),
        )


def _whitening(tensors: dict[str, np.ndarray]) -> Whitening | None:
    """As it was saved; files of before have centres only, and move vectors as they did."""
    if "centres" in tensors:
        return Whitening(*tensors["centres"], np.eye(tensors["centres"].shape[1], dtype=np.float32))
    if "whitening.matrix" not in tensors:
        return None
    return Whitening(**{name: tensors[f"whitening.{name}"] for name in Whitening._fields})


def _digest(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    """sha256 (hex) over all that a file says, so that no part of it can be another context's."""
    if metadata["format"] == _WITHOUT_CACHE:
        return hashlib.sha256(np.ascontiguousarray(tensors["vectors"], np.float32)).hexdigest()
    hashed = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name} {tensor.dtype.name} {tensor.shape}\n".encode())
        hashed.update(np.ascontiguousarray(tensor).view(np.uint8).data)
    return hashed.hexdigest()


def weights_fingerprint(state: Any) -> str:
    """sha256 (hex) over the parameters of a module or state, sorted by path: path, dtype, shape and bytes."""
    hashed = hashlib.sha256()
    parameters = nnx.to_flat_state(nnx.state(state, nnx.Param))
    for path, parameter in sorted((".".join(map(str, path)), leaf) for path, leaf in parameters):
        array = np.ascontiguousarray(parameter[...])
        hashed.update(f"{path} {array.dtype.str} {array.shape}\n".encode())
        hashed.update(array.view(np.uint8).data)
    return hashed.hexdigest()
