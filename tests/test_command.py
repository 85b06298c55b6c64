"""The command line: user errors exit with a message, no traceback, before the libraries of the stages are imported."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "def get_config(variant=''):\n    "


def run(*arguments: str, module: str = "cde_jax.main") -> str:
    """The error of a command that must fail."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().rpartition("error: ")[2]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.train.stpes=3", "unknown key `train.stpes`: did you mean `train.steps`?"),
        ("--config.trian.steps=3", "unknown key `trian.steps`: did you mean `train.steps`?"),
        ("--config.xyz=3", "unknown key `xyz`: known keys here: seed, data"),
        ("--config.train.steps=abc", "flag --config.train.steps=abc: invalid literal"),
        ("--config.train.share_negatives=maybe", "flag --config.train.share_negatives=maybe"),
        ("--config.data.paths=('a','b'", "flag --config.data.paths=('a','b'"),
        ("--config.train=3", "flag --config.train=3"),
        ("--stpe=train", "Unknown command line flag 'stpe'"),
        ("prepare", "unknown arguments ['prepare']"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_named(tmp_path, argument, message):
    assert message in run("--config=configs/base.py", f"--workdir={tmp_path / 'work'}", argument)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("content", "variant", "message"),
    [
        (None, "", "No such file or directory"),
        ("def get_config(:", "", "SyntaxError: invalid syntax (config.py, line 1)"),
        ("x = 1", "", "has no attribute 'get_config'"),
        ("import nope", "", "config.py:1: ModuleNotFoundError: No module named 'nope'"),
        (CONFIG + "return undefined", "", "config.py:2: NameError: name 'undefined' is not defined"),
        (CONFIG + "return 3", "", "expected a ConfigDict (of get_config) or a nested dict, got int"),
        (CONFIG + "raise ValueError(f'unknown variant {variant}')", ":x", "ValueError: unknown variant x"),
        ("def get_config(): return 3", ":x", "TypeError: get_config() takes 0 positional arguments but 1 was given"),
    ],
)
def test_what_is_wrong_with_a_config_file_is_named(tmp_path, content, variant, message):
    if content is not None:
        (tmp_path / "config.py").write_text(content)
    assert message in run(f"--config={tmp_path}/config.py{variant}", f"--workdir={tmp_path / 'work'}")


def test_flags_that_are_needed_are_named():
    assert "--config must have a value" in run("--workdir=x")
    assert "--workdir must have a value" in run("--config=configs/base.py")
    assert "--out must have a value" in run("--workdir=x", module="cde_jax.export")


def test_help_lists_the_flags():
    done = subprocess.run([sys.executable, "-m", "cde_jax.main", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert "--workdir" in done.stdout and "--stage" in done.stdout
