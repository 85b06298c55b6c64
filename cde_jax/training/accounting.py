"""What a step costs: model FLOPs, tokens computed, and the device memory that the size of its chunks decides.

Model FLOPs are those of the matrix products that a step or an encoding needs, however the program computes them: a
multiplication and an addition count as two (Kaplan et al., arXiv 2001.08361, table 1); padding, recomputation in the
backward pass (chunks, `remat`) and elementwise work, about a percent, do not count. A training step has three times the
FLOPs of its forward pass. `sizes` are the tokens of each text, 0 where there is none.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cde_jax.config import AUTO, Train
from cde_jax.models.contextual import BiencoderConfig, ContextualConfig
from cde_jax.models.encoder import EncoderConfig

log = logging.getLogger(__name__)

Sizes = Int[Array | np.ndarray, "..."]
Counts = Float[Array | np.ndarray, "..."]

# Dense bfloat16 TFLOP/s of one device, from its maker's data sheet; by the start of JAX's `device_kind`.
PEAK_TFLOPS = {
    "NVIDIA A100": 312,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H100": 989,
    "NVIDIA H200": 989,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5": 459,
    "TPU v6 lite": 918,
}
STEP_FRACTION = 0.9  # of a device's memory for the step: the rest is for batches being copied
GIB = 2**30
# What a step keeps at most without computing chunks again, as positions · layers · width: the activations of the
# default chunk of accelerators, 8,192 positions, of a base model; 4.5 GB in float32.
KEPT_ACTIVATIONS = 8192 * 12 * 768


def utilisation(
    flops: float, seconds: float, device_kind: str, devices: int = 1, peak: float | int = 0
) -> float | None:
    """Model-FLOPs utilisation of all devices, 0 … 1; `peak` TFLOP/s of one, 0: its maker's. None where unknown."""
    peak = peak or next((tflops for name, tflops in PEAK_TFLOPS.items() if device_kind.startswith(name)), 0)
    return flops / (seconds * devices * peak * 1e12) if peak else None


def step_counts(config: BiencoderConfig | ContextualConfig, batch: dict[str, Any], train: Train) -> dict[str, Array]:
    """Of a step's batch: `tokens` of its texts, `computed_tokens`, padding included (int32), and `flops` (float32)."""
    batches, queries, documents = batch["keep"].shape
    scores = batches * queries * documents * (batches if train.share_negatives else 1)
    scores *= 1 + sum(train.matryoshka) / _width(config)  # of shorter vectors
    chunks = {name: batch[name] for name in ("texts", "context") if name in batch}
    sizes = {name: text_sizes(held["mask"], held["place"]) for name, held in chunks.items()}
    masks = [mask for held in chunks.values() for mask in held["mask"]]  # [G, chunks, c, ℓ] each
    # chunks without a token are skipped
    computed = sum(mask.any(axis=(2, 3)).sum(dtype=jnp.int32) * math.prod(mask.shape[2:]) for mask in masks)
    flops = step_flops(config, **sizes, scores=scores, first_stage_frozen=train.first_stage_rate == 0)
    return {
        "tokens": sum(mask.sum(dtype=jnp.int32) for mask in masks),
        "computed_tokens": computed,
        "flops": jnp.asarray(flops, jnp.float32),
    }


def text_sizes(mask: tuple[Any, ...], place: Int[Array, "G m"]) -> Int[Array, "G m"]:
    """Tokens of each of m texts in chunks, 0 for a missing one. mask: an array [G, chunks, c, ℓ] per length ℓ."""
    sizes = [x.sum(axis=3, dtype=jnp.int32).reshape(len(x), -1) for x in mask]  # [G, chunks·c] each
    return jnp.take_along_axis(jnp.concatenate(sizes, axis=1), place, axis=1)


def step_flops(
    config: BiencoderConfig | ContextualConfig,
    texts: Sizes,
    context: Sizes | None = None,
    *,
    scores: float | int,
    first_stage_frozen: bool = False,
) -> Any:
    """Of training on G plan batches: sizes of their queries and documents [G, m], of their context [G, J].

    `scores`: pairs of a query and a document that are compared, G · B · N. A frozen first stage has no backward pass.
    """
    forward, frozen, slots = 2.0 * scores * _width(config), 0.0, 0
    if isinstance(config, ContextualConfig):
        forward += context_flops(config, context)
        slots = _slots(config, context.shape[-1])
        if first_stage_frozen:
            frozen = encoding_flops(config.first_stage, context)
    return 3 * (forward + encoding_flops(config, texts, slots=slots)) - 2 * frozen


def context_flops(config: ContextualConfig, sizes: Sizes) -> Any:
    """Of embedding and preparing contexts [*G, J], each once: the first stage and, if isolated, the slots' layers."""
    second, contexts = config.second_stage, int(np.prod(sizes.shape[:-1]))
    slots = _slots(config, sizes.shape[-1])
    once = 2.0 * second.width**2 * (1 + config.soft_prompt)
    if config.context_attention == "isolated":
        once += _layers(second, slots, slots)
    return contexts * once + encoding_flops(config.first_stage, sizes)


def encoding_flops(config: BiencoderConfig | ContextualConfig, sizes: Sizes, *, slots: int | None = None) -> Any:
    """Of a forward pass over texts with `slots` slots (None: as many as the config says).

    Isolated: they are keys only. Joint: they go through every layer with every text.
    """
    tokens, texts, c = sizes.astype(float), (sizes > 0).astype(float), config.encoder
    if isinstance(config, BiencoderConfig):
        head = 2.0 * c.width * (c.width + _width(config)) if config.head else 0.0
        return (_layers(c, tokens, tokens) + texts * head).sum()
    slots = texts * (_slots(config, config.context_size) if slots is None else slots)
    run = tokens + slots if config.context_attention == "joint" else tokens
    return (_layers(c, run, tokens + slots) + texts * 4.0 * c.width**2).sum()


def _layers(encoder: EncoderConfig, tokens: Counts | int, keys: Counts | int) -> Any:
    """All layers over `tokens` tokens of a text, each of which attends to `keys` keys."""
    matrices = encoder.width * (4 * encoder.width + (2 + encoder.gated) * encoder.mlp_width)
    return encoder.layers * tokens * (2.0 * matrices + 4.0 * encoder.width * keys)


def _slots(config: ContextualConfig, documents: int) -> int:
    return documents * config.first_stage.vectors_per_text + config.soft_prompt


def _width(config: BiencoderConfig | ContextualConfig) -> int:
    output_width = config.output_width if isinstance(config, BiencoderConfig) and config.head else None
    return output_width or config.encoder.width


def recomputes_chunks(config: BiencoderConfig | ContextualConfig, batch: dict[str, Any], train: Train) -> bool:
    """Whether the backward pass computes the chunks of a device's `batch` again: a forward pass more, for less memory.

    So it is with chunks of a given size, and where those of the default size would keep more than `KEPT_ACTIVATIONS`
    together. Each also keeps the weights once (`lax.cond` does, which skips empty ones): about `width` positions more.
    """
    if train.document_chunk or train.context_chunk:
        return True
    stages, kept = [(config.encoder, batch["texts"], 0)], 0
    if isinstance(config, ContextualConfig):
        slots = _slots(config, batch["context"]["place"].shape[-1]) if config.context_attention == "joint" else 0
        stages = [(config.encoder, batch["texts"], slots), (config.first_stage.encoder, batch["context"], 0)]
    for encoder, held, slots in stages:
        for batches, chunks, texts, length in (ids.shape for ids in held["ids"]):
            positions = texts * (length + slots) + encoder.width
            kept += batches * chunks * positions * encoder.layers * encoder.width
    return kept > KEPT_ACTIVATIONS


def choose_chunk(
    needs: Callable[[str, int], int], limit: int, remats: Sequence[str], useful: int, texts: int
) -> tuple[str, int]:
    """What the layers compute again in the backward pass, and the number of texts in a chunk, by memory.

    The first of `remats`, least recomputation first, with which a step in chunks of `useful` texts needs at most
    `limit` bytes; the chunk is then doubled, up to all `texts` of a batch, for as long as it fits. Where none of them
    fits, the last one with the largest of `useful`/2, `useful`/4, …, 1 that does. `needs(remat, chunk)` compiles the
    step and gives its `program_bytes`. Raises ValueError where not even single texts fit.
    """
    if not 1 <= useful <= texts:
        raise ValueError(f"expected at least one text in a batch and in a chunk, got {texts} and {useful}")

    def fits(remat: str, chunk: int) -> bool:
        nonlocal needed
        needed = needs(remat, chunk)
        log.info("remat %s, chunks of %d texts: %.2f of %.2f GiB", remat, chunk, needed / GIB, limit / GIB)
        return needed <= limit

    needed = 0
    if (remat := next((remat for remat in remats if fits(remat, useful)), None)) is not None:
        chunk = useful
        while chunk < texts and fits(remat, min(2 * chunk, texts)):
            chunk = min(2 * chunk, texts)
        return remat, chunk
    for chunk in (useful >> halvings for halvings in range(1, useful.bit_length())):
        if fits(remats[-1], chunk):
            return remats[-1], chunk
    raise ValueError(
        f"even one text at a time the step needs {needed / GIB:.2f} GiB, and there are {limit / GIB:.2f}: set "
        f'model.remat="full", lower data.document_length or batching.batch_size, or take a smaller model'
    )


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
