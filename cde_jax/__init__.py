"""Contextual document embeddings in JAX (Morris & Rush, arXiv 2410.02525).

The names below are what most users hold; they are imported on first use, so that reading data needs no device.
"""

import os
import re
import sys
import warnings
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

_MODULES = {
    "Adapter": "cde_jax.adapters.adder",
    "Embedder": "cde_jax.retrieval.embedder",
    "Context": "cde_jax.retrieval.embedder",
    "CorpusStatistics": "cde_jax.adapters.statistics",
    "HybridVectors": "cde_jax.adapters.hybrid",
    "Whitening": "cde_jax.adapters.whitening",
    "pseudo_queries": "cde_jax.adapters.whitening",
    "load_model": "cde_jax.interop.read",
    "whitening": "cde_jax.adapters.whitening",
}
__all__ = [
    "Adapter",
    "Context",
    "CorpusStatistics",
    "Embedder",
    "HybridVectors",
    "Whitening",
    "load_model",
    "pseudo_queries",
    "whitening",
]

_YNN_FLAG = "--xla_cpu_experimental_ynn_fusion_type"

_GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm60_plugin", "jax_rocm7_plugin")


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'cde_jax' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_MODULES[name]), name)


def _disable_ynn_fusions() -> None:
    """Turn off XLA's YNNPACK fusions on CPU, unless the user has set that flag.

    In jaxlib 0.10.2 and 0.11 they give silently wrong rows of some jitted reductions (jax-ml/jax#39103) and
    segmentation faults (#40412, #39257). XLA reads its flags when the first backend is made, and ends the process at
    one that it does not know.
    """
    flags, jaxlib = os.environ.get("XLA_FLAGS", ""), ""
    with suppress(PackageNotFoundError):
        jaxlib = version("jaxlib")
    if not jaxlib.startswith(("0.10.2", "0.11.")) or _YNN_FLAG in flags:
        return
    os.environ["XLA_FLAGS"] = f"{flags} {_YNN_FLAG}=".strip()
    bridge = sys.modules.get("jax._src.xla_bridge")
    if bridge is not None and "cpu" in getattr(bridge, "_backends", ()):
        warnings.warn(
            "JAX was used before cde_jax was imported, too late to turn off XLA's YNNPACK fusions, which give wrong "
            f"numbers on CPU in this jaxlib: import cde_jax first, or set XLA_FLAGS={_YNN_FLAG}=",
            stacklevel=3,
        )


def deterministic_gpu() -> None:
    """Where JAX has a GPU plugin, have XLA compile programs whose results are the same in every run (docs/speed.md).

    A training that goes on from a checkpoint ends in the same bytes only then: gradients of embeddings are scattered by
    atomic additions otherwise, and kernels are chosen by their measured time. To be called before JAX is used; a choice
    of the user's in XLA_FLAGS stays.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if not any(map(find_spec, _GPU_PLUGINS)) or re.search(
        "xla_gpu_(deterministic|exclude_nondeterministic)_ops", flags
    ):
        return
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()


_disable_ynn_fusions()
