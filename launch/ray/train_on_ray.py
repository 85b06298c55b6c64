"""Train on a Ray cluster: a worker on each host, which uses all of the host's devices, restarted where one is lost.

    ray job submit --working-dir . -- python launch/ray/train_on_ray.py --hosts=2 --gpus=8 \
        --config=configs/large.py:isolated --workdir=/shared/large
    … --hosts=4 --tpu=TPU-V6E:4x4 …     (a slice of that topology, 4 chips a host)

The other flags are those of `python -m cde_jax.main`, but for --rebuild. Needs the extra [ray], and a workdir that all
hosts can write to.
"""

import logging
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from absl import app, flags

from cde_jax import deterministic_gpu
from cde_jax import main as command
from cde_jax.config import from_config_dict

_HOSTS = flags.DEFINE_integer("hosts", 1, "Hosts, of a worker each", lower_bound=1)
_GPUS = flags.DEFINE_integer("gpus", 0, "GPUs of a host; 0: TPUs, or else CPUs", lower_bound=0)
_TPU = flags.DEFINE_string("tpu", "", "TYPE:TOPOLOGY of a TPU slice, e.g. TPU-V6E:4x4")
RESTARTS = 10


def train(arguments: dict[str, Any]) -> None:
    """What each worker runs; Ray has called `jax.distributed.initialize` before."""
    deterministic_gpu()
    from cde_jax.stages import run
    from cde_jax.training.processes import is_first

    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("cde_jax").setLevel(logging.INFO if is_first() else logging.WARNING)
    for text in run.run(**arguments):
        print(text, flush=True)


def main(argv: list[str]) -> None:
    """Start the workers and wait for them."""
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # else relative paths of the configuration name nothing
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.jax import JaxConfig, JaxTrainer

    given = flags.FLAGS
    config, workdir = from_config_dict(given.config).as_dict(), Path(given.workdir).absolute()
    arguments = {"config": config, "workdir": workdir, "stage": given.stage, "engine": given.engine}
    kind, _, topology = given.tpu.partition(":")
    if topology:
        devices = {"use_tpu": True, "accelerator_type": kind, "topology": topology, "resources_per_worker": {"TPU": 4}}
    elif given.gpus:
        devices = {"use_gpu": True, "resources_per_worker": {"GPU": given.gpus}}
    else:
        devices = {}
    platform = "tpu" if topology else "cuda" if given.gpus else "cpu"
    JaxTrainer(
        train,
        train_loop_config=arguments,
        jax_config=JaxConfig(use_tpu=bool(topology), use_gpu=not topology),  # of CPUs too: else JAX is not initialised
        scaling_config=ScalingConfig(num_workers=given.hosts, placement_strategy="STRICT_SPREAD", **devices),
        run_config=RunConfig(
            storage_path=str(workdir / "ray"),
            worker_runtime_env={"env_vars": {"JAX_PLATFORMS": platform}},
            failure_config=FailureConfig(max_failures=RESTARTS),
        ),
    ).fit()


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=command.parse)
