"""Self-attention of texts that also read context slots: one function, `attend`, over several kernels.

Two patterns (ARCHITECTURE.md, "The model"):

- *joint*: slots and text are one sequence, everything attends to everything (paper, section 4);
- *isolated*: slots attend only among themselves, text attends to slots and text. The slots' keys and values
  are then a function of the context alone, so they come in here as a `prefix` that all texts of a batch share.

All kernels give the same numbers (float32 to 1e-5, bfloat16 to 2e-2 of float32); `pick` says which one runs.
"""

from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.extend.backend import get_backend
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

Kernel = Literal["auto", "xla", "blocks", "cudnn"]

# Logits that the kernel "blocks" has at a time: 4 MB in float32, which stay in the caches of two CPU cores.
BLOCK = 2**20


class Prefix(NamedTuple):
    """Keys and values of the context slots in one layer (or, stacked on axis 0, in all of them)."""

    keys: Float[Array, "*batch P H d"]
    values: Float[Array, "*batch P H d"]


def attend(
    queries: Float[Array, "B T H d"],
    keys: Float[Array, "B S H d"],
    values: Float[Array, "B S H d"],
    mask: Bool[Array, "B S"],
    *,
    prefix: Prefix | None = None,
    bias: Float[Array, " H"] | None = None,
    slots: int = 0,
    kernel: str = "auto",
) -> Float[Array, "B T H d"]:
    """Softmax attention over `prefix` (if any) and the keys whose `mask` is True; logits and softmax in float32.

    Args:
      mask: what a text without a single key reads is finite, but not defined.
      prefix: keys and values shared by the batch, [P, H, d], or one set a text, [B, P, H, d].
      bias: added to the logits from text to slots: to all of `prefix`, or, in a joint sequence, from the tokens
        after the first `slots` to the first `slots`.
      kernel: see `pick`.
    """
    chosen = pick(kernel, queries.dtype, queries.shape[-1])
    if chosen == "cudnn":
        from cde_jax.models.fused import fused  # the other kernels do without it

        return fused(queries, keys, values, mask, prefix, bias, slots)
    form = _blocks if chosen == "blocks" else _plain
    return form(queries, keys, values, mask, prefix, bias, slots)


def pick(kernel: str, dtype: DTypeLike, head_dim: int, platform: str | None = None) -> str:
    """The kernel that runs: "xla", "blocks" or "cudnn"; a ValueError for one that the platform lacks.

    "xla": matrix products of all texts at once. "blocks": the same, a few texts at a time, logits recomputed in the
    backward pass. "cudnn": fused attention on NVIDIA GPUs, logits never in memory; of texts whose padding comes
    last; it has not run on one yet, so by name only. "auto": "blocks" on CPU, else "xla". `platform` is what JAX runs
    on: "cpu", "cuda", "tpu", …; None: this process's.
    """
    platform = platform or ("cuda" if "cuda" in get_backend().platform_version else jax.default_backend())
    if kernel == "auto":
        return "blocks" if platform == "cpu" else "xla"
    lacks = []
    if platform != "cuda":
        lacks.append(f"an NVIDIA GPU, and JAX runs on {platform} here")
    if jnp.dtype(dtype).itemsize != 2:
        lacks.append(f"bfloat16 compute (model.dtype), got {jnp.dtype(dtype).name}")
    if head_dim % 8 or head_dim > 120:
        lacks.append(f"heads of at most 120 features, a multiple of 8, got {head_dim}")
    if kernel not in get_args(Kernel):
        raise ValueError(f"expected an attention kernel of {', '.join(get_args(Kernel))}; got {kernel!r}")
    if kernel == "cudnn" and lacks:
        raise ValueError(f"attention kernel 'cudnn' needs {', and '.join(lacks)}: choose 'auto', 'xla' or 'blocks'")
    return kernel


def _blocks(queries, keys, values, mask, prefix, bias, slots) -> Float[Array, "B T H d"]:
    """A few texts at a time. With all at once, a CPU spends most of its time on getting memory for the logits."""
    texts, length, heads, _ = queries.shape
    read = keys.shape[1] + (0 if prefix is None else prefix.keys.shape[-3])
    size = max(1, min(texts, BLOCK // (heads * length * read)))
    count = -(-texts // size)
    if count == 1:
        return _plain(queries, keys, values, mask, prefix, bias, slots)
    size = -(-texts // count)
    own = prefix is not None and prefix.keys.ndim == 4

    def cut(x):
        x = jnp.pad(x, ((0, count * size - texts), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(count, size, *x.shape[1:])

    @partial(jax.checkpoint, prevent_cse=False)  # nothing to keep apart within a loop
    def block(xs):
        return _plain(*xs[:4], xs[4] if own else prefix, bias, slots)

    of_texts = (queries, keys, values, mask, prefix if own else None)
    blocks = jax.lax.map(block, jax.tree.map(cut, of_texts))  # [count, size, T, H, d]
    return blocks.reshape(-1, *blocks.shape[2:])[:texts]


def _plain(queries, keys, values, mask, prefix, bias, slots) -> Float[Array, "B T H d"]:
    """Softmax over one or two sets of keys without joining them, the prefix read in place.

    Heads go first, so that every product is a batch of plain matrices, and with a shared prefix one per head.
    """
    dtype, lowest = values.dtype, jnp.finfo(jnp.float32).min
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    queries, keys, values = (x.transpose(2, 0, 1, 3) for x in (queries, keys, values))  # [H, B, ·, d]
    queries = queries * queries.shape[-1] ** -0.5
    logits = product("hbtd,hbsd->hbts", queries, keys)
    if slots and bias is not None:
        rows, columns = jnp.arange(queries.shape[2]) >= slots, jnp.arange(keys.shape[2]) < slots
        logits += jnp.where(rows[:, None] & columns, bias[:, None, None, None], 0.0)
    logits = jnp.where(mask[:, None, :], logits, lowest)
    highest = logits.max(axis=-1)
    if prefix is not None:
        slot_keys, slot_values = (jnp.moveaxis(x, -2, 0) for x in prefix)  # [H, *B, P, d]
        p = "hpd" if slot_keys.ndim == 3 else "hbpd"
        of_slots = product(f"hbtd,{p}->hbtp", queries, slot_keys)
        if bias is not None:
            of_slots += bias[:, None, None, None]
        highest = jnp.maximum(highest, of_slots.max(axis=-1))
    highest = jax.lax.stop_gradient(highest)[..., None]  # it cancels
    weights = jnp.exp(logits - highest)
    total = weights.sum(axis=-1)
    read = product("hbts,hbsd->hbtd", weights.astype(dtype), values)
    if prefix is not None:
        weights = jnp.exp(of_slots - highest)
        total += weights.sum(axis=-1)
        read += product(f"hbtp,{p}->hbtd", weights.astype(dtype), slot_values)
    return (read / total[..., None]).astype(dtype).transpose(1, 2, 0, 3)
