"""`Context`: vectors of sampled documents of a corpus, to keep beside the corpus' index."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float, Shaped
from safetensors.numpy import save

from cde_jax.adapters.hybrid import HybridVectors
from cde_jax.adapters.inputs import check_vectors, read_tensors
from cde_jax.adapters.whitening import Whitening
from cde_jax.data.files import given_path, write_file
from cde_jax.models.attention import Prefix
from cde_jax.models.contextual import ContextCache

FORMAT = "cde_jax context 1"
_AGAIN = "embed the context again"
_HYBRID = "hybrid."  # prefix of its tensors and metadata
_METADATA = {"seed": int, "corpus_size": int, "weights": str, "documents": str}  # field → type


@dataclass(frozen=True, eq=False)  # compared by identity: embedders keep caches by object
class Context:
    """Vectors of the sampled context documents, and where they came from. Made by `Embedder.embed_context`.

    Queries and documents must be encoded with the same context for their vectors to be comparable.
    """

    # float32, read-only; m ≤ J (times the vectors a document, for imported models), 0 for a biencoder
    vectors: Float[np.ndarray, "m D"]
    seed: int  # of the sample
    corpus_size: int  # number of documents it was drawn from
    weights: str  # fingerprint of the model's weights
    documents: str  # fingerprint of the sampled documents, in any order
    # Input of isolated attention in the embedder's compute dtype, 19 MB in bfloat16 for 512 slots of the base model;
    # None: there is none (joint attention), or it is computed at the first use
    cache: ContextCache | None = None
    whitening: Whitening | None = None  # applied to the vectors of queries and documents; read-only
    hybrid: HybridVectors | None = None  # applied after it; needs the texts

    def __post_init__(self):
        check_vectors("context vectors", self.vectors)
        for array in (self.vectors, *(self.whitening or ())):
            array.flags.writeable = False  # caches computed from them would not change
        if self.cache is not None and self.cache.prefix is None:
            raise ValueError("expected a cache with keys and values; joint attention has none, leave `cache` out")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file atomically; a file of that name is replaced."""
        path = given_path(path)
        if path.is_dir():
            raise ValueError(f"{path}: expected a file name, got a directory; add one, as {path}/context.safetensors")
        tensors, metadata = self._content()
        write_file(path, save(tensors, metadata | {"sha256": digest(tensors, metadata)}))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of all that it holds: vectors under equal ones, of equal weights, are comparable."""
        return digest(*self._content())

    def _content(self) -> tuple[dict[str, Shaped[np.ndarray, "..."]], dict[str, str]]:
        """Tensors and metadata of its file."""
        tensors = {"vectors": np.asarray(self.vectors, np.float32)}
        if self.cache is not None:
            keys, values = self.cache.prefix.by_slot()
            tensors |= {"slots": self.cache.slots, "keys": keys, "values": values}
        if self.whitening is not None:
            tensors |= {f"whitening.{name}": array for name, array in self.whitening._asdict().items()}
        metadata = {"format": FORMAT} | {name: str(getattr(self, name)) for name in _METADATA}
        if self.hybrid is not None:
            arrays, numbers = self.hybrid.to_tensors()
            tensors |= {_HYBRID + name: array for name, array in arrays.items()}
            metadata |= {_HYBRID + name: number for name, number in numbers.items()}
        return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, metadata

    @classmethod
    def load(cls, path: str | Path) -> "Context":
        """Read what `save` wrote. Raises ValueError for a missing, truncated, altered or other file."""
        tensors, metadata = read_tensors(path, FORMAT, _AGAIN)
        expected = metadata.pop("sha256", None)
        if (got := digest(tensors, metadata)) != expected:
            raise ValueError(f"{path}: expected content of sha256 {expected}, got {got}: it was altered; {_AGAIN}")
        fields = {name: kind(metadata[name]) for name, kind in _METADATA.items()}
        if "keys" in tensors:
            fields["cache"] = ContextCache(tensors["slots"], Prefix.of_slots(tensors["keys"], tensors["values"]))
        if "whitening.matrix" in tensors:
            fields["whitening"] = Whitening(**{name: tensors[f"whitening.{name}"] for name in Whitening._fields})
        if _HYBRID + "projection" in tensors:
            parts = (
                {k.removeprefix(_HYBRID): v for k, v in x.items() if k.startswith(_HYBRID)} for x in (tensors, metadata)
            )
            fields["hybrid"] = HybridVectors.from_tensors(*parts)
        return cls(tensors["vectors"], **fields)


def digest(tensors: Mapping[str, Shaped[np.ndarray, "..."]], metadata: Mapping[str, str] | None = None) -> str:
    """sha256 (hex) of all tensors, sorted by name: name, dtype, shape and bytes of each; and of the metadata."""
    sha = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode() if metadata else b"")
    for name, array in sorted(tensors.items()):
        sha.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        sha.update(np.ascontiguousarray(array).view(np.uint8).data)
    return sha.hexdigest()
