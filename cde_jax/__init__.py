"""Contextual document embeddings in JAX (Morris & Rush, arXiv 2410.02525).

The names below are what most users hold; they are imported on first use, so that reading data needs no device.
"""

from importlib import import_module

_HOMES = {
    "Embedder": "cde_jax.retrieval.embedder",
    "Context": "cde_jax.retrieval.embedder",
    "beginnings": "cde_jax.adapters.whitening",
    "load_model": "cde_jax.interop.read",
    "whitening": "cde_jax.adapters.whitening",
}
__all__ = ["Context", "Embedder", "beginnings", "load_model", "whitening"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'cde_jax' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
