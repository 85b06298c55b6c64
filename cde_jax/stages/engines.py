"""Who runs the tasks of the prepare stage: a pool of processes on this machine, or a Ray cluster.

`open_engine(NAME)` gives the `map_tasks` that `data/shards.py` describes. Both run the same functions with the same
tasks, which name files: on a cluster all machines need the same paths, on a shared file system.
"""

import functools
import importlib.util
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import wait
from typing import Any

from cde_jax.data.shards import MapTasks

ENGINES = ("local", "ray")
AHEAD = 4  # tasks of a worker that are handed out before the first has ended: what bounds memory
RETRIES = 3  # of a Ray task whose worker has died


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_engine(name: str) -> None:
    """Raises ValueError for an engine that is unknown or not installed."""
    if name not in ENGINES:
        raise ValueError(f"--engine: expected {' or '.join(ENGINES)}, got {name!r}")
    if name == "ray" and importlib.util.find_spec("ray") is None:
        raise ValueError("--engine=ray needs an extra: pip install 'cde_jax[ray]', or use --engine=local")


@contextmanager
def open_engine(name: str, *, devices: int = 0) -> Iterator[MapTasks]:
    """A `map_tasks` of the engine "local" or "ray"; its processes start with the first task and end with the block.

    "ray" connects to the cluster of `RAY_ADDRESS`, or starts one on this machine. devices: 0: a worker for each core;
    else the GPUs of this machine, with one worker for each (Ray: for each of the cluster). An error in a task is
    raised as it is.
    """
    check_engine(name)
    with ExitStack() as stack:
        start = functools.cache(lambda: stack.enter_context((_ray if name == "ray" else _pool)(devices)))
        yield lambda function, tasks: _in_order(*start(), function, tasks)


def _in_order(
    submit: Callable[..., Any],
    result: Callable[[Any], Any],
    workers: int,
    function: Callable[[Any], Any],
    tasks: Iterable[Any],
) -> Iterator[Any]:
    """The results in the order of the tasks, of which at most AHEAD · workers are handed out at a time."""
    waiting: deque[Any] = deque()
    for task in tasks:
        waiting.append(submit(function, task))
        if len(waiting) >= AHEAD * workers:
            yield result(waiting.popleft())
    while waiting:
        yield result(waiting.popleft())


@contextmanager
def _pool(devices: int) -> Iterator[tuple[Callable[..., Any], Callable[[Any], Any], int]]:
    """What `_in_order` needs: a function that submits, one that waits for a result, and the number of workers."""
    context = multiprocessing.get_context("forkserver")  # this process has threads, of JAX among others
    workers, numbers = devices or cores(), context.Queue()
    for number in range(devices):
        numbers.put(number)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (numbers if devices else None,))
    try:
        yield pool.submit, lambda future: future.result(), workers
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(numbers: Any) -> None:
    """One thread for each library, or one GPU: there is a worker for each. It ends with the process that started it."""
    if numbers is None:
        os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(numbers.get())
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (wait([parent]), os._exit(1)), daemon=True).start()


@contextmanager
def _ray(devices: int) -> Iterator[tuple[Callable[..., Any], Callable[[Any], Any], int]]:
    """As `_pool`, on a cluster."""
    import ray

    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False, include_dashboard=False)
    kind = "GPU" if devices else "CPU"
    # max_calls 0: a worker with a GPU keeps its model from one task to the next.
    options = {f"num_{kind.lower()}s": 1, "max_retries": RETRIES, "max_calls": 0}
    call = ray.remote(**options)(lambda function, task: function(task))

    def result(reference: Any) -> Any:
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None

    try:
        yield call.remote, result, max(1, int(ray.cluster_resources().get(kind, 1)))
    finally:
        if ours:
            ray.shutdown()
