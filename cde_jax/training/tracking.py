"""Weights & Biases, where a run's configuration and metrics can go beside metrics.jsonl (`train.wandb`)."""

import json
import secrets
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path


def wandb_writer(project: str, workdir: Path, start: int, exit: ExitStack) -> Callable[[int, dict[str, float]], None]:
    """A function that logs the values of a step to a run of `project`, which ends with `exit`.

    Its id is kept in wandb.json: training that goes on from step `start` > 0 goes on with the same run. WANDB_MODE and
    the other variables of the library apply; offline, files are written to `workdir`/wandb for `wandb sync`.
    Raises ValueError where the library cannot start.
    """
    import wandb

    file, config = workdir / "wandb.json", workdir / "config.json"
    if not (start and file.exists()):
        file.write_text(json.dumps({"id": secrets.token_hex(8)}))
    options = {"id": json.loads(file.read_text())["id"], "resume": "allow", "dir": workdir, "name": workdir.name}
    if config.exists():
        options["config"] = json.loads(config.read_text())
    try:
        run = exit.enter_context(wandb.init(project=project, **options))  # an error marks it as failed
    except wandb.errors.Error as error:
        raise ValueError(
            f"Weights & Biases did not start: {error}. Run `wandb login`, set WANDB_MODE=offline, or leave train.wandb "
            "empty"
        ) from error
    return lambda step, values: run.log(values, step=step)
