"""Several processes that train one model: start, barrier, broadcast from process 0, and errors that end all of them.

Process 0 alone writes (except for checkpoints' arrays) and does what is not training; all read the same work directory,
on a file system that they share. Each function here is called by all processes, in the same order.
"""

import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax._src import distributed  # its client has no public name; Orbax takes it from here too

_COUNTER = itertools.count()
LONGEST_WAIT = 30 * 86400  # seconds that processes wait for each other while all of them live
# Seconds after which a process that no longer answers counts as dead, and that the last ones wait at exit
HEARTBEAT = 30


def start() -> None:
    """Connect to the other processes, before JAX is used; raises ValueError where it is not known who they are.

    SLURM, Open MPI, GKE and Cloud TPU tell JAX; elsewhere the environment says it: JAX_COORDINATOR_ADDRESS
    (HOST:PORT of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    count, index = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            num_processes=count and int(count),
            process_id=index and int(index),
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--distributed: {error} Start it under SLURM, GKE or Cloud TPU, or set JAX_COORDINATOR_ADDRESS (HOST:PORT "
            "of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID (0, 1, …) in each process"
        ) from error


def is_first() -> bool:
    """Whether this is process 0, which writes; always so in a run of one process."""
    return jax.process_index() == 0


@contextmanager
def barrier() -> Iterator[None]:
    """All processes wait for each other at the end of the body; where it fails in one, the others raise ValueError.

    They wait at a barrier of JAX's coordination service, for days if need be: devices would not wait so long.
    """
    failed, name = True, f"cde_jax/{next(_COUNTER)}"
    try:
        yield
        failed = False
    finally:
        if client := distributed.global_state.client:
            if failed:
                client.key_value_set(f"{name}/{jax.process_index()}", "failed")
            client.wait_at_barrier(name, LONGEST_WAIT * 1000)
    if client and client.key_value_dir_get(name):
        raise ValueError("another process stopped with an error: its message says why")


def broadcast(value: Any) -> Any:
    """Process 0's value, of JSON types."""
    if not (client := distributed.global_state.client):
        return value
    key = f"cde_jax/{next(_COUNTER)}"
    if is_first():
        client.key_value_set(key, json.dumps(value))
    return json.loads(client.blocking_key_value_get(key, LONGEST_WAIT * 1000))


@contextmanager
def explain_lost_processes() -> Iterator[None]:
    """Say what it means when devices of other processes stop answering. Raises OSError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise OSError(
            f"process {jax.process_index()} lost the others ({str(error).splitlines()[0][:200]}): one of them ended. "
            "Its message says why; the same command, in all processes, goes on from the newest checkpoint"
        ) from error
