"""A training step compiled ahead of time for devices that are not here: one JSON line a mesh. Nothing is run.

    python benchmarks/scaling.py [--config configs/large.py:isolated] [--topology h100:8] [--batches 8] [--doublings 6]

Recomputation and chunk are those that training would choose, for the first mesh, by the memory of a device. Memory is
that of one device, as its compiler plans it: `arguments_gib` (state and batch), `temporaries_gib`, `step_gib` (both,
and results that are not in their place). `flops` are the model FLOPs of a step, of all devices. `collectives`: how many
a step has of each kind, and GB that a device sends by them as rings. All texts have the longest length: no
step needs more.

`--topology` is `h100:N` or `h100:HOSTSxN` (with the packages jax-cuda13-pjrt, jax-cuda13-plugin, nvidia-cuda-nvcc), a
TPU slice such as `v5e:2x4` or `v6e:8x8` (with libtpu), or `cpu:N`, fake CPU devices. None needs the hardware. Without a
GPU its compiler cannot try out kernels, and plans no workspace for those that it would choose. The CPU's compiler
computes in float32 what is bfloat16, and fuses less: of its figures only arguments, FLOPs and collectives say something
about accelerators.
"""

import argparse
import dataclasses
import importlib
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=64"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no TPU is here to be asked about

import jax
import jax.numpy as jnp
import numpy as np
from harness import emit
from jax.experimental import topologies

from cde_jax.config import Config, from_config_dict, with_changes
from cde_jax.models import attention, cudnn
from cde_jax.stages.assemble import USEFUL_POSITIONS, model_config, run_slots
from cde_jax.stages.placement import REMATS, lower_step
from cde_jax.training import sharding
from cde_jax.training.accounting import GIB, STEP_FRACTION, choose_chunk, program_bytes, step_flops

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8}
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
COLLECTIVE = re.compile(r" = (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all)(-start)?\((.*)")


def main() -> None:
    """Compile the step on each mesh, and for larger batches if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/large.py:isolated", help="a config file with its variant")
    parser.add_argument("--topology", default="h100:8", help="h100:8, h100:8x8, v5e:2x4, cpu:8, …")
    parser.add_argument("--memory", type=float, default=80.0, help="GB of a device; 0.9 of them are for the step")
    parser.add_argument("--meshes", nargs="+", default=["8x1", "4x2", "2x4", "1x8"], help="DATAxFSDP")
    parser.add_argument("--batches", type=int, default=8, help="G, plan batches of a step; fewer than devices: spread")
    parser.add_argument("--remat", choices=REMATS["other"], help="with --chunk: not as training would choose")
    parser.add_argument("--chunk", type=int, help="texts of the longest length encoded at once")
    parser.add_argument("--queries", type=int, help="B of a plan batch, instead of the config's")
    parser.add_argument("--attention", choices=["xla", "cudnn"], default="xla", help="kernel; cudnn: of H100s only")
    parser.add_argument("--doublings", type=int, default=0, help="twice as large a B so many times, while it fits")
    args = parser.parse_args()
    # Whether the kernel can run is asked of this machine, which has neither the GPU nor cuDNN.
    attention.select_kernel = lambda *_: args.attention
    cudnn.fused.check_cudnn_version = lambda: 91000
    limit = int(STEP_FRACTION * args.memory * 1e9)
    devices, choice = topology_devices(args.topology), (args.remat, args.chunk) if args.chunk else None
    for mesh in args.meshes:
        config = read_config(args.config, mesh, args.batches)
        queries = args.queries or config.batching.batch_size
        remat, chunk = choice = choice or chosen(config, devices, queries, limit)
        for size in (queries << doublings for doublings in range(args.doublings + 1)):
            compiled = compile_step(config, devices, remat, chunk, size)
            line = {"benchmark": "scaling", "mesh": mesh, "queries": size, "remat": remat, "chunk": chunk}
            line |= {name: getattr(args, name) for name in ("config", "topology", "memory", "batches", "attention")}
            line["fits"] = needed(compiled) <= limit
            if compiled:
                line |= measure(config, compiled, size)
            emit(line, "jax", "flax", "libtpu", "jax-cuda13-pjrt")
            if not line["fits"]:
                break


def chosen(config: Config, devices: Sequence[jax.Device], queries: int, limit: int) -> tuple[str, int]:
    """Recomputation and chunk, as training chooses them (`stages.placement.choose_placement`)."""
    useful = -(-USEFUL_POSITIONS // (config.data.document_length + run_slots(config.model)))

    def needs(remat: str, chunk: int) -> float:
        return needed(compile_step(config, devices, remat, chunk, queries))

    return choose_chunk(needs, limit, REMATS["other"], useful, 2 * queries)


def read_config(name: str, mesh: str, batches: int) -> Config:
    """The config file's, as it runs on an accelerator."""
    file, _, variant = name.partition(":")
    config = importlib.import_module(file.removesuffix(".py").replace("/", ".")).get_config(variant)
    changes = {"train.mesh": tuple(map(int, mesh.split("x"))), "train.batches_per_step": batches}
    changes |= {"model.dtype": "bfloat16", "data.paths": ("not read",)}
    return from_config_dict(with_changes(config, changes))


def measure(config: Config, compiled: jax.stages.Compiled, queries: int) -> dict[str, Any]:
    """Memory, FLOPs and collectives of the step."""
    memory, length = compiled.memory_analysis(), config.data.document_length
    batches, context = config.train.batches_per_step, config.model.context_size
    texts, contexts = np.full((batches, 2 * queries), length), np.full((batches, context), length)
    model = model_config(config.model, config.model.vocab_size, config.model.dtype)
    return {
        "arguments_gib": round(memory.argument_size_in_bytes / GIB, 3),
        "temporaries_gib": round(memory.temp_size_in_bytes / GIB, 3),
        "step_gib": round(program_bytes(compiled) / GIB, 3),
        "flops": float(f"{step_flops(model, texts, contexts, scores=batches * queries**2):.4g}"),
        "collectives": collectives(compiled.as_text()),
    }


def compile_step(
    config: Config, devices: Sequence[jax.Device], remat: str, chunk: int, queries: int
) -> jax.stages.Compiled | None:
    """The step with B = `queries`; None where the compiler finds that it does not fit its device."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
    batch = abstract_batch(config, devices, queries, chunk)
    try:
        return lower_step(config, config.model.vocab_size, batch, devices).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def needed(compiled: jax.stages.Compiled | None) -> float:
    """Bytes of a device; infinite where the compiler finds that they are too many."""
    return program_bytes(compiled) if compiled else math.inf


def topology_devices(topology: str) -> list[jax.Device]:
    """Devices that programs can be compiled for."""
    kind, _, size = topology.partition(":")
    if kind == "cpu":
        return jax.devices()[: int(size)]
    if kind == "h100":
        slices = "1x" + (size if "x" in size else f"1x{size}")  # networks × hosts × devices of a host
        target = Path(__file__).with_name("h100.txtpb").read_text()
        return topologies.get_topology_desc(slices, "cuda", topology=slices, target_config=target).devices
    return topologies.get_topology_desc(topology, "tpu").devices


def abstract_batch(config: Config, devices: Sequence[jax.Device], queries: int, chunk: int) -> dict[str, Any]:
    """A step's batch as the loader would give it, of one length."""
    batches, length = config.train.batches_per_step, config.data.document_length
    members = sharding.devices_per_plan_batch(sharding.make_mesh(config.train.mesh, devices), batches)
    array = jax.ShapeDtypeStruct

    def texts(count: int) -> dict[str, Any]:
        size = min(chunk, -(-count // members))
        shape = (batches, -(-count // (size * members)) * members, size, length)  # [G, chunks, c, ℓ]
        return {
            "ids": (array(shape, jnp.int32),),
            "mask": (array(shape, bool),),
            "place": array((batches, count), jnp.int32),
        }

    batch = {"texts": texts(2 * queries), "keep": array((batches, queries, queries), bool)}
    context = {"context": texts(config.model.context_size)} if config.model.kind == "contextual" else {}
    return batch | context


def collectives(program: str) -> dict[str, Any]:
    """Number of each kind in an HLO module, and GB that a device sends by them as rings."""
    found, sent = Counter[str](), 0.0
    for shape, name, start, rest in COLLECTIVE.findall(program):
        assert "/while/body" not in rest, f"a collective inside a loop: {rest}"
        sizes = [
            math.prod([BYTES[kind], *map(int, filter(None, axes.split(",")))]) for kind, axes in ARRAY.findall(shape)
        ]
        if start and name != "all-reduce":  # operands, then results
            sizes = sizes[len(sizes) // 2 :]
        if (n := group_size(rest)) > 1:
            found[name] += 1
            whole = sum(sizes) * (n if name == "reduce-scatter" else 1)  # `sizes` are the result's
            sent += whole * (n - 1) / n * (2 if name == "all-reduce" else 1)
    return dict(found) | {"sent_gb": round(sent / 1e9, 3)}


def group_size(attributes: str) -> int:
    """How many devices take part in each group of a collective, by any of the three forms of `replica_groups`."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):  # {{0,1},{2,3}}
        return len(listed[1].split(","))
    if shaped := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):  # [2,4]<=[8]
        return int(shaped[1])
    axes, used = re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", attributes).groups()  # mesh['a'=2,'b'=4] {'b'}
    sizes = dict(re.findall(r"('\w+')=(\d+)", axes))
    return math.prod(int(sizes[axis.strip()]) for axis in used.split(","))


if __name__ == "__main__":
    main()
