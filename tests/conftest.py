"""Every test runs offline on 8 fake CPU devices, with array shapes checked by beartype."""

import atexit
import gc
import os
import shutil
import tempfile
from importlib.metadata import version

FLAGS = ["--xla_force_host_platform_device_count=8"]
# Compiling takes most of the tests' time: these make it several times faster, and the compiled code slower.
FLAGS += ["--xla_backend_optimization_level=0"]
if version("jax").startswith("0.10."):  # XLA ends the process at a flag that it does not know
    FLAGS += ["--xla_cpu_use_fusion_emitters=false"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # what one process of a run compiled, the others take
    COMPILED = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="cde_jax_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, COMPILED, ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
GC_THRESHOLD = gc.get_threshold()
gc.set_threshold(20_000, 20, 20)  # tracing leaves little garbage: looking for it took a seventh of the time

from pathlib import Path

import pytest
from jaxtyping import install_import_hook

install_import_hook("cde_jax", "beartype.beartype")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared(relative: str) -> Path:
    """A folder of reference data beside the checkout; the test is skipped, and says so, where it is not there."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"../shared/{relative} is not here: the reference numbers were not compared")
    return path


@pytest.fixture
def usual_gc():
    """Python's own frequency of garbage collection, for a test that measures memory."""
    threshold = gc.get_threshold()
    gc.set_threshold(*GC_THRESHOLD)
    yield
    gc.set_threshold(*threshold)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The pairs and evaluation set of `tiny_run`."""
    from tiny_run import write_data

    return write_data(tmp_path_factory.mktemp("data"))
