"""Compiled programs are kept for the next start: by default, beside no other CPU's, and whatever a kill leaves."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from cde_jax.stages.run import cache_programs

ROOT = Path(__file__).resolve().parents[1]
CODE = """
import jax, logging, sys
logging.basicConfig(level=logging.WARNING)
from cde_jax.stages.run import cache_programs
cache_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
assert jax.jit(lambda x: (x @ x.T).sum())(jax.numpy.ones((3, 4))) == 36
print("hit" if "/jax/compilation_cache/cache_hits" in hits else "miss")
"""


def start(cache: Path, **environment) -> str:
    """Whether a new process found its program in the cache; it says nothing else."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMPILATION", "XLA_FLAGS"))}
    environment = kept | {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.strip()


def test_programs_are_kept_and_what_a_kill_cut_short_is_compiled_again(tmp_path):
    assert start(tmp_path) == "miss"
    programs = list(tmp_path.glob("cde_jax/*/*-cache"))
    assert programs
    for program in programs:  # killed in the middle of writing it: the time that is written after it is missing
        program.write_bytes(program.read_bytes()[:-30])
        program.with_name(program.name.replace("-cache", "-atime")).unlink()
    assert start(tmp_path) == "miss"
    assert start(tmp_path) == "hit"


@pytest.mark.parametrize("told", [{"JAX_COMPILATION_CACHE_DIR": ""}, {"JAX_ENABLE_COMPILATION_CACHE": "0"}])
def test_who_wants_no_cache_has_none(tmp_path, told):
    assert start(tmp_path, **told) == "miss" and not list(tmp_path.iterdir())


def test_the_user_s_own_folder_is_not_touched(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    assert before  # that of the tests
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    cache_programs()
    assert jax.config.jax_compilation_cache_dir == before and not list(tmp_path.iterdir())
