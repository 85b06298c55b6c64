"""Chunk sizes by memory: the largest that a device holds, by the compiler's analysis of the program."""

import logging
from collections.abc import Callable

import jax

from cde_jax.config import AUTO

log = logging.getLogger(__name__)

STEP_FRACTION = 0.9  # of a device's memory for the step: the rest is for batches being copied
GIB = 2**30


def largest_chunk(needs: Callable[[int], int], limit: int, texts: int) -> int:
    """The largest of `texts`, `texts`/2, …, 1 texts in a chunk whose step needs at most `limit` bytes.

    `needs(chunk)` compiles the step and gives its `program_bytes`; it is called with ever smaller chunks, until one
    fits. Raises ValueError where not even single texts fit.
    """
    if texts < 1:
        raise ValueError(f"expected at least one text in a batch, got {texts}")
    chunk, larger = texts, ""
    while (needed := needs(chunk)) > limit:
        larger = f"; chunks of {chunk} would need {needed / GIB:.2f}"
        if chunk == 1:
            raise ValueError(
                f"even one text at a time the step needs {needed / GIB:.2f} GiB, and there are {limit / GIB:.2f}: "
                f'set model.remat="full", lower data.document_length or batching.batch_size, or take a smaller model'
            )
        chunk //= 2
    log.info("chunks of %d texts: the step needs %.2f of %.2f GiB%s", chunk, needed / GIB, limit / GIB, larger)
    return chunk


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """Device memory that a compiled program needs: arguments, results (those in their place once) and temporaries."""
    memory = compiled.memory_analysis()
    if memory is None:
        raise ValueError("this backend does not say how much memory a program needs: give train.*_chunk as numbers")
    inputs_and_results = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return inputs_and_results + memory.temp_size_in_bytes


def device_limit(device: jax.Device, gib: float = 0.0) -> int:
    """Bytes that a step may need on `device`: `gib`, or (0) 0.9 of its memory; ValueError if unknown (CPU)."""
    memory = (device.memory_stats() or {}).get("bytes_limit", 0)
    if not (gib or memory):
        raise ValueError(
            f"{device.device_kind} does not say how much memory it has, so chunk sizes of {AUTO} (auto) need "
            f"train.memory_gib: set it, or give train.*_chunk as numbers"
        )
    return int(gib * GIB) if gib else int(STEP_FRACTION * memory)
