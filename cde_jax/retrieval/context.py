"""`Context`: a sample of a corpus as the second stage reads it, to keep beside the corpus' index."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cde_jax.data.files import write_file

FORMAT = "cde_jax context 1"


@dataclass(frozen=True, eq=False)  # compared by identity: an embedder keeps what it prepared per object
class Context:
    """Vectors of the sampled context documents, and where they came from. Made by `Embedder.embed_context`.

    Queries and documents must be encoded with the same context for their vectors to be comparable.
    """

    vectors: Float[np.ndarray, "m D"]  # float32, read-only, m ≤ J (times the vectors a document, for imported models)
    seed: int  # of the sample
    corpus_size: int  # how many documents it was drawn from
    weights: str  # fingerprint of the model's weights
    documents: str  # fingerprint of the sampled documents, whatever their order

    def __post_init__(self):
        self.vectors.flags.writeable = False  # what was prepared from them would not follow a change

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; a kill or a full disk leaves the old file or the new one."""
        path = Path(path)
        metadata = {
            "format": FORMAT,
            "seed": str(self.seed),
            "corpus_size": str(self.corpus_size),
            "weights": self.weights,
            "documents": self.documents,
            "sha256": _digest(self.vectors),
        }
        write_file(path, save({"vectors": np.ascontiguousarray(self.vectors, np.float32)}, metadata))

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
                vectors = file.get_tensor("vectors") if metadata.get("format") == FORMAT else None
        except SafetensorError as error:
            raise ValueError(
                f"{path}: not readable as safetensors ({error}): truncated or altered; embed the context again"
            ) from None
        if vectors is None:
            raise ValueError(
                f"{path}: expected format {FORMAT!r}, got {metadata.get('format')!r}: not written by Context.save"
            )
        if _digest(vectors) != metadata["sha256"]:
            raise ValueError(
                f"{path}: expected sha256 {metadata['sha256']} of the vectors, got {_digest(vectors)}: the file "
                f"was altered; embed the context again"
            )
        return cls(
            vectors,
            int(metadata["seed"]),
            int(metadata["corpus_size"]),
            metadata["weights"],
            metadata["documents"],
        )


def _digest(vectors: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(vectors, np.float32)).hexdigest()
