"""Model FLOPs: those of the matrix products that a step or an encoding needs, however the program computes them.

A multiplication and an addition count as two (Kaplan et al., arXiv 2001.08361, table 1). Padding, recomputation in the
backward pass (chunks, `remat`) and elementwise work, about a percent, do not count. A training step has three times the
FLOPs of its forward pass. `sizes` are the tokens of each text, 0 where there is none.
"""

from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from cde_jax.models.contextual import BiencoderConfig, ContextualConfig
from cde_jax.models.encoder import EncoderConfig

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


def utilisation(
    flops: float, seconds: float, device_kind: str, devices: int = 1, peak: float | int = 0
) -> float | None:
    """Model-FLOPs utilisation of all devices, 0 … 1; `peak` TFLOP/s of one, 0: its maker's. None where unknown."""
    peak = peak or next((tflops for name, tflops in PEAK_TFLOPS.items() if device_kind.startswith(name)), 0)
    return flops / (seconds * devices * peak * 1e12) if peak else None


def step_flops(
    config: BiencoderConfig | ContextualConfig,
    texts: Sizes,
    context: Sizes | None = None,
    *,
    scores: int,
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
    tokens, texts = sizes.astype(float), (sizes > 0).astype(float)
    if isinstance(config, BiencoderConfig):
        c = config.encoder
        head = 2.0 * c.width * (c.width + (config.output_width or c.width)) if config.head else 0.0
        return (_layers(c, tokens, tokens) + texts * head).sum()
    c = config.second_stage
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
    if isinstance(config, ContextualConfig):
        return config.second_stage.width
    return (config.head and config.output_width) or config.encoder.width
