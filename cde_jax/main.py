"""The command that prepares, trains, evaluates and exports.

python -m cde_jax.main --config=configs/NAME.py[:variant] --workdir=DIR [--stage=…] [--config.train.steps=…]
"""

import logging
import re
import sys
import traceback
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from cde_jax import deterministic_gpu
from cde_jax.commands import exit_with_message
from cde_jax.config import from_config_dict, is_setting, unknown_setting

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, e.g. configs/demo.py:isolated,clustered")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where every artefact is written to and read from")
_STAGE = flags.DEFINE_string("stage", "all", "all, prepare, train, rank, evaluate or export")
_ENGINE = flags.DEFINE_string("engine", "local", "Who prepares: local (processes of this machine) or ray (a cluster)")
_REBUILD = flags.DEFINE_bool("rebuild", False, "Make again what does not fit; checkpoints are moved aside")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "This is one of several processes: docs/scaling.md")


def parse(argv: list[str]) -> list[str]:
    """Read the flags. User errors on the command line and in the config file exit with a message, no traceback."""
    for argument in argv[1:]:
        if (setting := re.match(r"--?config\.([^=]*)", argument)) and not is_setting(setting[1]):
            sys.exit(f"error: {unknown_setting(setting[1])}")
    try:
        return flags.FLAGS(argv)
    except Exception as error:  # a config file may raise anything
        sys.exit(f"error: {_message(error)}")


def main(argv: list[str]) -> None:
    """Run the stages. User errors exit with a message, no traceback."""
    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax logs each of its steps, and warns of saves without a score
    absl_logging.get_absl_handler().setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.getLogger("cde_jax").setLevel(logging.INFO)
    if len(argv) > 1:
        sys.exit(f"error: unknown arguments {argv[1:]}: every setting is a flag, --config.SECTION.KEY=VALUE")
    with exit_with_message():
        config = from_config_dict(_CONFIG.value)  # checked before JAX is loaded
        if _STAGE.value in ("all", "train"):
            deterministic_gpu()
        if _DISTRIBUTED.value:
            from cde_jax.training import processes

            processes.start()
            if not processes.is_first():
                logging.getLogger("cde_jax").setLevel(logging.WARNING)
        from cde_jax.stages import run

        for text in run.run(config, Path(_WORKDIR.value), _STAGE.value, rebuild=_REBUILD.value, engine=_ENGINE.value):
            print(text, flush=True)


def _message(error: Exception) -> str:
    """What was raised and where; of a traceback that ml_collections put into a message, the last line."""
    text = str(error).strip()
    if "Traceback (most recent call last)" in text:
        text = next(line.strip() for line in reversed(text.splitlines()) if line.strip() and line[0] != " ")
    if isinstance(error, flags.Error | OSError):
        return text
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not re.search(r"^<|site-packages", f.filename)]
    where = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames[1:] else ""  # the first frame is `parse`
    return f"--config: {where}{type(error).__name__}: {text}"


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse)
