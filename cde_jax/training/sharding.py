"""The mesh and every PartitionSpec.

Parameters and optimiser state are split over the mesh's axis "fsdp" and copied along "data". The G plan batches of a
step are split over all D devices. Where D does not divide G, a plan batch is shared by s = D / gcd(D, G) neighbouring
devices: each encodes its part of the chunks. For that the same devices, in the same order, are seen as a second mesh,
"group" × "member": gcd(D, G) groups of s devices.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Shaped

_DATA, _FSDP, _GROUP, _MEMBER = "data", "fsdp", "group", "member"


def make_mesh(shape: Sequence[int] = (-1, 1), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """These devices (None: of all processes) as (data, fsdp), −1: the rest; ValueError if too few or left over.

    A single process may leave devices unused: (1, 1) is its first device.
    """
    devices = jax.devices() if devices is None else devices
    there, known = len(devices), math.prod(size for size in shape if size != -1)
    data, fsdp = (max(there // known, 1) if size == -1 else size for size in shape)
    used = data * fsdp
    if used > there or (used < there and (-1 in shape or jax.process_count() > 1)):
        raise ValueError(
            f"train.mesh is {tuple(shape)}, {used} devices, and there are {there} in {jax.process_count()} "
            "process(es): choose (data, fsdp) whose product is the number of devices, -1 for the rest"
        )
    return jax.make_mesh((data, fsdp), (_DATA, _FSDP), axis_types=(AxisType.Auto,) * 2, devices=devices[:used])


# --- state


def state_shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of each array of parameters or optimiser state: its largest axis that "fsdp" divides is split."""

    def sharding(leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, P() if (axis := _split_axis(mesh, leaf)) is None else P(*[None] * axis, _FSDP))

    return jax.tree.map(sharding, tree)


def state_shapes(mesh: Mesh, tree: Any) -> Any:
    """What `shard_state` would put on the devices, as shapes and shardings alone."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        state_shardings(mesh, tree),
    )


def _split_axis(mesh: Mesh, leaf: Any) -> int | None:
    size = mesh.shape[_FSDP]
    axes = [axis for axis, length in enumerate(leaf.shape) if size > 1 and length and length % size == 0]
    return max(axes, key=lambda axis: leaf.shape[axis], default=None)


def shard_state(mesh: Mesh, tree: Any) -> Any:
    """Put arrays, the same in all processes, on the devices as `state_shardings` says."""
    return jax.tree.map(put, tree, state_shardings(mesh, tree))


def make_state(mesh: Mesh, make: Callable[[Any], Any], params: Any) -> Any:
    """`make(params)`, each array made on the devices that `state_shardings` puts it on."""
    return jax.jit(make, out_shardings=state_shardings(mesh, jax.eval_shape(make, params)))(params)


def keep_sharding(mesh: Mesh, tree: Any) -> Any:
    """`tree`, sharded as `state_shardings` says; for use in the jitted step."""
    return jax.lax.with_sharding_constraint(tree, state_shardings(mesh, tree))


def copied(mesh: Mesh, tree: Any) -> Any:
    """`tree`, copied to every device; for use in the jitted step."""
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P()))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Copy a tree of arrays, the same in all processes, to every device."""
    return jax.tree.map(lambda leaf: put(leaf, NamedSharding(mesh, P())), tree)


def put(leaf: Any, sharding: Any) -> jax.Array:
    """Put an array, the same in all processes, on the devices of a sharding."""
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def on_host(leaf: Any) -> np.ndarray:
    """An array in this process's memory, gathered where other processes hold parts of it: called by all of them."""
    return np.asarray(leaf if _is_here(leaf) else multihost_utils.process_allgather(leaf, tiled=True))


def _is_here(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated


def any_process(mesh: Mesh, flag: bool) -> Any:
    """Whether `flag` is set in any process; on the devices, computed after the steps that run already."""
    if jax.process_count() == 1:
        return flag
    everywhere = NamedSharding(mesh, P((_DATA, _FSDP)))
    flags = jax.make_array_from_callback((mesh.size,), everywhere, lambda _: np.full(1, flag))
    return jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))(flags)


# --- batches


def devices_per_plan_batch(mesh: Mesh, batches: int) -> int:
    """s, how many devices share a plan batch when a step takes `batches` (G)."""
    return mesh.size // math.gcd(mesh.size, batches)


def plan_batches(mesh: Mesh, batches: int) -> list[int]:
    """Which of a step's G plan batches this process has a part of, ascending."""
    held = _batch_sharding(mesh, batches, P(_GROUP)).addressable_devices_indices_map((batches,)).values()
    return sorted({number for (index,) in held for number in range(batches)[index]})


def shard_batch(mesh: Mesh, batch: dict[str, Any], batches: int | None = None) -> dict[str, Any]:
    """Put a step's arrays on the devices: chunks split over groups and their members, the rest over groups.

    batches: G, where `batch` holds the `plan_batches` of this process only; None: it holds all. "plan_batch" is whole.
    """
    count = len(jax.tree.leaves(batch)[0]) if batches is None else batches
    row = {number: row for row, number in enumerate(plan_batches(mesh, count))}

    def place(spec: P, array: Any) -> jax.Array:
        def part(index: tuple[slice, ...]) -> Any:
            held = range(count)[index[0]]
            return array[(slice(row[held[0]], row[held[-1]] + 1), *index[1:])]

        whole = part if spec else lambda index: array[index]
        shape, sharding = (count, *array.shape[1:]), _batch_sharding(mesh, count, spec)
        return jax.make_array_from_callback(shape, sharding, whole)

    return jax.tree.map(place, _batch_specs(batch), batch, is_leaf=lambda node: isinstance(node, P))


def batch_shapes(mesh: Mesh, batch: dict[str, Any], batches: int) -> dict[str, Any]:
    """What `shard_batch` would put on the devices, as shapes and shardings alone."""

    def shape(spec: P, array: np.ndarray) -> jax.ShapeDtypeStruct:
        sharding = _batch_sharding(mesh, batches, spec)
        return jax.ShapeDtypeStruct((batches, *array.shape[1:]), array.dtype, sharding=sharding)

    return jax.tree.map(shape, _batch_specs(batch), batch, is_leaf=lambda node: isinstance(node, P))


def _batch_sharding(mesh: Mesh, batches: int, spec: P) -> NamedSharding:
    return NamedSharding(_groups(mesh, batches), spec)


def _groups(mesh: Mesh, batches: int) -> Mesh:
    return Mesh(mesh.devices.reshape(-1, devices_per_plan_batch(mesh, batches)), (_GROUP, _MEMBER))


def _batch_specs(batch: dict[str, Any]) -> dict[str, Any]:
    def spec(path: tuple[Any, ...], _: Any) -> P:
        names = {getattr(key, "key", None) for key in path}
        return P(_GROUP, _MEMBER) if names & {"ids", "mask"} else P() if "plan_batch" in names else P(_GROUP)

    return jax.tree_util.tree_map_with_path(spec, batch)


def prefetch_to_device(
    mesh: Mesh, batches: Iterable[dict[str, Any]], count: int | None = None
) -> Iterator[dict[str, Any]]:
    """`shard_batch` of each batch in order, started one batch early: copied while the step before still runs."""
    sharded = (shard_batch(mesh, batch, count) for batch in batches)
    return (batch for batch, _ in pairwise(chain(sharded, [None])))


# --- the gradient


def mean_gradient(mesh: Mesh, function: Callable, params: Any, keys: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    """Gradients and metrics of `function(params, keys, batch) → (gradients, metrics)`, averaged over all devices.

    Each device runs it on copied parameters and its part of the batch and keys [G]; what it communicates itself is
    what the functions below do. Every gradient is then reduced once: scattered over "fsdp" where its parameter is
    split, and what is left averaged over "data". Gradients come back as `state_shardings` says, metrics copied.
    """
    everywhere, specs = P((_GROUP, _MEMBER)), (P(), P(_GROUP), _batch_specs(batch))
    groups = _groups(mesh, len(keys))

    def of_device(*arguments: Any) -> Any:
        return jax.tree.map(lambda x: x[None], function(*arguments))

    run = jax.shard_map(of_device, mesh=groups, in_specs=specs, out_specs=everywhere, check_vma=False)
    gradients, metrics = run(params, keys, batch)  # each [D, …], one row per device
    axes = [_split_axis(mesh, leaf) for leaf in jax.tree.leaves(params)]

    def reduce(gradients: Any, metrics: Any) -> Any:
        leaves, tree = jax.tree.flatten(jax.tree.map(lambda x: x[0], gradients))
        scattered = [
            leaf if axis is None else jax.lax.psum_scatter(leaf, _FSDP, scatter_dimension=axis, tiled=True)
            for leaf, axis in zip(leaves, axes, strict=True)
        ]
        summed = [
            jax.lax.psum(leaf, (_DATA, _FSDP) if axis is None else _DATA)
            for leaf, axis in zip(scattered, axes, strict=True)
        ]
        mean = jax.tree.unflatten(tree, [leaf / mesh.size for leaf in summed])
        return mean, jax.lax.pmean(jax.tree.map(lambda x: x[0], metrics), (_DATA, _FSDP))

    out_specs = (jax.tree.map(lambda sharding: sharding.spec, state_shardings(mesh, params)), P())
    every = P((_DATA, _FSDP))
    return jax.shard_map(reduce, mesh=mesh, in_specs=every, out_specs=out_specs, check_vma=False)(gradients, metrics)


def gather_members(tree: Any) -> Any:
    """Concatenate the arrays of a group's members along axis 1; for use inside `mean_gradient`."""
    if jax.lax.axis_size(_MEMBER) == 1:
        return tree
    return jax.tree.map(lambda x: jax.lax.all_gather(x, _MEMBER, axis=1, tiled=True), tree)


def gather_groups(x: Shaped[Array, "g *rest"]) -> Shaped[Array, "G *rest"]:
    """Concatenate the arrays of all groups along axis 0, in order; for use inside `mean_gradient`."""
    return jax.lax.all_gather(x, _GROUP, tiled=True)


def first_row(rows: int) -> Int[Array, ""]:
    """Index of this group's first row among the rows of all groups, each holding `rows`."""
    return jax.lax.axis_index(_GROUP) * rows


# --- encoding


def local_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """These devices, or all of this process, along the one data axis."""
    return Mesh(np.asarray(devices or jax.local_devices()), (_DATA,))


def map_rows(mesh: Mesh, function: Callable, copied: int, split: int) -> Callable:
    """A function of rows, run by each device on all of its first `copied` arguments and its rows of the `split` others.

    It communicates nothing. The result has the rows of all devices, in order.
    """
    specs = (P(),) * copied + (P(_DATA),) * split
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P(_DATA), check_vma=False)
