"""The static batch plan: every batch of every epoch, decided before training and written down (paper, section 3.1).

A plan is a store of the arrays below and a readable `manifest.json`: the pairs, surrogates and settings it was made
from, what was merged or left out, and how hard its batches are. `build.build_plan` writes it.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8

from cde_jax.data.files import fingerprint
from cde_jax.data.store import Ragged, Store

ARRAYS = ("rows", "hard_negatives", "groups", "clusters")
STORE_KEYS = ("kind", "format", "arrays", "manifest_sha256")  # of a manifest, the store's own


def compressed(keep: Bool[np.ndarray, "B N"]) -> UInt8[np.ndarray, " bytes"]:
    """A mask as one bit an entry, rows padded to whole bytes, through zlib where that makes it shorter.

    With few entries False this is smaller than a list of their columns, with many it is never larger than the bits.
    """
    bits = np.packbits(keep, axis=-1)
    shorter = zlib.compress(bits, 1)
    return np.frombuffer(shorter, np.uint8) if len(shorter) < bits.size else bits.reshape(-1)


def decompressed(mask: UInt8[np.ndarray, " bytes"], size: int) -> UInt8[np.ndarray, " size"]:
    """The `size` bytes of bits of a mask that `compressed` gave."""
    return mask if len(mask) == size else np.frombuffer(zlib.decompress(mask, bufsize=size), np.uint8)


@dataclass(frozen=True)
class BatchPlan:
    """S batches of B pairs with K hard negatives each, so of N = B(1+K) documents; n pairs in all.

    The documents of batch s are those of the pairs `rows[s]`, then `hard_negatives[s]` query by query.
    """

    rows: Int64[np.ndarray, "S B"]  # pairs
    hard_negatives: Int64[np.ndarray, "S B K"]  # documents
    masks: Ragged  # of each batch, `keep` as `compressed` writes it
    groups: Int32[np.ndarray, " S"]  # index into manifest["groups"] of each batch
    clusters: Int32[np.ndarray, " n"]  # the cluster of each pair, numbered through all groups; −1: in no batch
    manifest: dict[str, Any]

    def __len__(self) -> int:
        """S, the number of batches over all epochs."""
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """Digest of the arrays and of what they were made from."""
        return self.manifest["fingerprint"]

    def keep(self, step: SupportsIndex) -> Bool[np.ndarray, "B N"]:
        """False where a document of batch `step` (0…S−1) must not count as a negative; the positive always counts."""
        if not 0 <= step < len(self):
            raise ValueError(f"expected a plan batch in 0…{len(self) - 1}, got {step}")
        _, batch, hard = self.hard_negatives.shape
        width = -(-batch * (1 + hard) // 8)
        bits = decompressed(self.masks.row(int(step)), batch * width).reshape(batch, width)
        return np.unpackbits(bits, axis=-1, count=batch * (1 + hard)).view(bool)

    def documents(self, step: SupportsIndex) -> Int64[np.ndarray, " N"]:
        """The documents of batch `step` in the order of the columns of `keep`."""
        return np.concatenate([self.rows[step], self.hard_negatives[step].ravel()])

    def verify(
        self,
        pairs_fingerprint: str,
        settings: dict[str, Any],
        vectors_fingerprint: str | None = None,
        filter_fingerprint: str | None = None,
    ) -> None:
        """Raises ValueError if the plan was made from other pairs, settings, or vectors where these are given."""
        made = self.manifest["settings"]
        changed = [key for key in {**made, **settings} if fingerprint(made.get(key)) != fingerprint(settings.get(key))]
        detail = ", ".join(f"{key}: expected {settings.get(key)!r}, got {made.get(key)!r}" for key in changed)
        for name, expected, got in (
            ("pairs", pairs_fingerprint, self.manifest["pairs"]),
            ("settings", fingerprint(settings), fingerprint(made)),
            ("vectors", vectors_fingerprint, self.manifest["vectors"]),
            ("filter vectors", filter_fingerprint, self.manifest["filter_vectors"]),
        ):
            if expected not in (None, got):
                raise ValueError(
                    f"the batch plan was made from other {name}: expected fingerprint {expected}, the plan has {got}"
                    + (f" ({detail})" if name == "settings" else "")
                    + f"; give it the {name} it was made from, or build it again with --rebuild"
                )

    @classmethod
    def load(cls, directory: str | Path) -> "BatchPlan":
        """Opens a plan, memory-mapped. A missing, truncated or altered file is a ValueError that names it."""
        store = Store.open(directory, kind="plan")
        arrays = {name: store.array(name) for name in ARRAYS}
        if "keep_bits" in store.manifest["arrays"]:  # of an earlier version, which compressed no mask
            bits = store.array("keep_bits")  # [S, B, bytes]
            sizes = np.arange(len(bits) + 1, dtype=np.int64) * (bits.size // max(1, len(bits)))
            arrays["masks"] = Ragged(bits.reshape(-1), sizes)
        else:
            arrays["masks"] = store.ragged("masks")
        return cls(**arrays, manifest={k: v for k, v in store.manifest.items() if k not in STORE_KEYS})
