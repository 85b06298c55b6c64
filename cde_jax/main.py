"""The command that prepares, trains, evaluates and exports.

python -m cde_jax.main --config=configs/NAME.py[:variant] --workdir=DIR [--stage=…] [--config.train.steps=…]
"""

import logging
import sys
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, e.g. configs/demo.py:isolated,clustered")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where every artefact goes, and is looked for")
_STAGE = flags.DEFINE_string("stage", "all", "all, prepare, train, evaluate or export")
_REBUILD = flags.DEFINE_bool("rebuild", False, "Make store and plan again; checkpoints are moved aside")


def main(argv: list[str]) -> None:
    """Run the stages; a mistake of the user is told in words, without a traceback."""
    from cde_jax.stages import run as stages

    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}: every setting is a flag, --config.SECTION.KEY=VALUE")
    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax tells each of its steps, and warns of saves without a score
    absl_logging.get_absl_handler().setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.getLogger("cde_jax").setLevel(logging.INFO)
    try:
        for text in stages.run(_CONFIG.value, Path(_WORKDIR.value), _STAGE.value, rebuild=_REBUILD.value):
            print(text, flush=True)
    except (ValueError, OSError, FloatingPointError) as error:
        logging.getLogger("cde_jax").debug("the traceback", exc_info=True)
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
