"""The mesh and every PartitionSpec: the G plan batches of a step are split over the devices, parameters are copied."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Shaped

_DATA = "data"


def make_mesh(count: int = 0, batches_per_step: int = 0) -> Mesh:
    """The first `count` devices (0: all) along the one data axis; ValueError if they cannot share G evenly."""
    devices = jax.devices()
    if count > len(devices):
        raise ValueError(f"train.devices asks for {count}, there are {len(devices)} devices; lower it, or 0 for all")
    if batches_per_step % (size := count or len(devices)):
        raise ValueError(
            f"train.batches_per_step is {batches_per_step}, which cannot be shared evenly by {size} devices: a plan "
            f"batch stays on one device; choose a multiple of {size}"
        )
    return Mesh(np.asarray(devices[:size]), (_DATA,))


def local_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """These devices, or all of this process, along the one data axis."""
    return Mesh(np.asarray(devices or jax.local_devices()), (_DATA,))


def shard_batch(mesh: Mesh, batch: dict[str, Any]) -> dict[str, Any]:
    """Put `[G, …]` arrays on the devices, G split."""
    return jax.device_put(batch, NamedSharding(mesh, P(_DATA)))


def prefetch_to_device(mesh: Mesh, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """`shard_batch` of each batch in order, started one batch early: copied while the step before still runs."""
    sharded = (shard_batch(mesh, batch) for batch in batches)
    return (batch for batch, _ in pairwise(chain(sharded, [None])))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Copy a tree of arrays to every device."""
    return jax.device_put(tree, NamedSharding(mesh, P()))


def on_each_device(mesh: Mesh, function: Callable, copied: int, split: int) -> Callable:
    """`function` run by each device on all of its first `copied` arguments and its part of the other `split` ones.

    It must return what is equal on all devices, by the two functions below; nothing else is communicated.
    """
    specs = (P(),) * copied + (P(_DATA),) * split
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)


def map_rows(mesh: Mesh, function: Callable, copied: int, split: int) -> Callable:
    """A function of rows, run by each device on all of its first `copied` arguments and its rows of the `split` others.

    It communicates nothing. The result has the rows of all devices, in order.
    """
    specs = (P(),) * copied + (P(_DATA),) * split
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P(_DATA), check_vma=False)


def mean_over_devices(tree: Any) -> Any:
    """Mean of each array over the devices; for use inside `on_each_device`."""
    return jax.lax.pmean(tree, _DATA)


def gather_over_devices(x: Shaped[Array, "g *rest"]) -> Shaped[Array, "G *rest"]:
    """Concatenate every device's array along axis 0, in device order; for use inside `on_each_device`."""
    return jax.lax.all_gather(x, _DATA, tiled=True)


def first_row(rows: int) -> Int[Array, ""]:
    """Index of this device's first row among the rows of all, each holding `rows`."""
    return jax.lax.axis_index(_DATA) * rows
