"""Self-attention of texts that also attend to context slots: one function, `attend`, with three kernels.

*Joint* attention (paper, section 4): slots and text are one sequence. *Isolated* attention: slots attend only among
themselves, text to slots and text; the slots' keys and values are then a function of the context alone, and come in
here as a `prefix` that all texts of a batch share.

All kernels give the same numbers (float32 to 1e-5, bfloat16 to 2e-2 of float32); `select_kernel` says which one runs.
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.backend import get_backend
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Shaped

log = logging.getLogger(__name__)

Kernel = Literal["auto", "xla", "blocks", "cudnn"]
Queries = Float[Array, "B T H d"]
Keys = Float[Array, "B S H d"]
KeyMask = Bool[Array, "B S"]
Bias = Float[Array, " H"]

# Logits that the kernel "blocks" has at a time: 4 MB in float32, which stay in the caches of two CPU cores.
BLOCK_LOGITS = 2**20


class Prefix(NamedTuple):
    """Keys and values of the context slots in one layer (or, stacked on axis 0, in all of them).

    They are laid out for the products with queries and weights, so that no call of `attend` has to transpose them.
    """

    keys: Float[Array | np.ndarray, "*batch H d P"]
    values: Float[Array | np.ndarray, "*batch H P d"]

    @classmethod
    def of_slots(
        cls, keys: Float[Array | np.ndarray, "*batch P H d"], values: Float[Array | np.ndarray, "*batch P H d"]
    ) -> "Prefix":
        """The prefix of keys and values as a layer makes them, slot by slot."""
        return cls(keys.swapaxes(-3, -2).swapaxes(-2, -1), values.swapaxes(-3, -2))

    def by_slot(self) -> tuple[Float[Array | np.ndarray, "*batch P H d"], Float[Array | np.ndarray, "*batch P H d"]]:
        """Keys and values as a layer makes them, slot by slot."""
        return self.keys.swapaxes(-2, -1).swapaxes(-3, -2), self.values.swapaxes(-3, -2)


def attend(
    queries: Queries,
    keys: Keys,
    values: Keys,
    mask: KeyMask,
    *,
    prefix: Prefix | None = None,
    bias: Bias | None = None,
    slots: int = 0,
    kernel: str = "auto",
) -> Queries:
    """Softmax attention over `prefix` (if any) and the keys whose `mask` is True; logits and softmax in float32.

    Args:
      mask: for a text without a single key the result is finite, but not defined.
      prefix: keys and values shared by the batch, [H, d, P] and [H, P, d], or with an axis of texts before these; in
        float32, their gradient is summed in it over calls, and they are rounded to the dtype of `values` for the
        products.
      bias: added to the logits from text to slots: to all of `prefix`, or, in a joint sequence, from the tokens
        after the first `slots` to the first `slots`.
    """
    selected = select_kernel(kernel, queries.dtype, queries.shape[-1])
    function = {"xla": attend_xla, "blocks": attend_blocks, "cudnn": attend_cudnn}[selected]
    return function(queries, keys, values, mask, prefix, bias, slots)


def select_kernel(kernel: str, dtype: DTypeLike, head_dim: int, platform: str | None = None) -> str:
    """The kernel that runs: "xla", "blocks" or "cudnn"; a ValueError for one that the platform lacks.

    "xla": all texts at once. "blocks": a few texts at a time, logits recomputed in the backward pass. "cudnn": fused on
    NVIDIA GPUs, logits never in memory. "auto": "blocks" on CPU; "cudnn" where it can run and `cudnn_works`; else
    "xla". `platform` is what JAX runs on: "cpu", "cuda", "tpu", …; None: this process's.
    """
    platform = platform or ("cuda" if "cuda" in get_backend().platform_version else jax.default_backend())
    if kernel not in get_args(Kernel):
        raise ValueError(f"expected an attention kernel of {', '.join(get_args(Kernel))}; got {kernel!r}")
    dtype = jnp.dtype(dtype)
    needs = {
        f"an NVIDIA GPU, and JAX runs on {platform} here": platform == "cuda",
        f"bfloat16 compute (model.dtype), got {dtype.name}": dtype == jnp.bfloat16,
        f"heads of at most 128 features, a multiple of 8, got {head_dim}": head_dim % 8 == 0 and head_dim <= 128,
    }
    missing = [need for need, met in needs.items() if not met]
    if kernel == "auto":
        if platform == "cpu":
            return "blocks"
        return "cudnn" if not missing and cudnn_works(head_dim) else "xla"
    if kernel == "cudnn" and missing:
        raise ValueError(f"attention kernel 'cudnn' needs {', and '.join(missing)}: choose 'auto', 'xla' or 'blocks'")
    return kernel


@cache
def cudnn_works(head_dim: int) -> bool:
    """Whether cuDNN, tried once on a few texts, gives the numbers and gradients of float32; a warning says why not.

    What it supports depends on GPU, versions and XLA's flags. It runs in a thread of its own: `attend` may be traced.
    """
    try:
        with ThreadPoolExecutor(1) as thread:
            error = thread.submit(kernel_error, attend_cudnn, head_dim=head_dim).result()
        problem = f"it is off by {error:.3f} of the largest number" if not error <= 0.05 else ""
    except Exception as failure:  # whatever JAX, XLA or cuDNN raises
        problem = f"{type(failure).__name__}: {str(failure)[:500]}"
    if problem:
        log.warning("cuDNN's attention does not work here (%s): the kernel 'xla' is used, which is slower", problem)
    return not problem


def kernel_error(
    kernel: Callable[..., Queries],
    *,
    texts: int = 3,
    length: int = 9,
    slots: int = 13,
    heads: int = 2,
    head_dim: int = 64,
) -> float:
    """The largest error of a kernel in bfloat16 with a shared prefix, as a share of the array's largest number.

    Values and gradients are compared with those of `attend_xla` in float32, of the same rounded inputs.
    """
    random, text, prefix = np.random.default_rng(0), (texts, length, heads, head_dim), (slots, heads, head_dim)
    arrays = [jnp.asarray(random.normal(size=shape), jnp.bfloat16) for shape in [text] * 4 + [prefix] * 2]
    pull, bias = arrays.pop(0).astype(jnp.float32), jnp.linspace(-1.0, 0.5, heads)
    mask = jnp.arange(length) < jnp.asarray(random.integers(1, length + 1, (texts, 1)))

    def loss(kernel, arrays, bias):
        output = kernel(*arrays[:3], mask, Prefix.of_slots(*arrays[3:]), bias, 0).astype(jnp.float32)
        output = jnp.where(mask[:, :, None, None], output, 0.0)
        return (output * pull).sum(), output

    def results(kernel, arrays):
        gradients, output = jax.jit(jax.grad(partial(loss, kernel), (0, 1), has_aux=True))(arrays, bias)
        return [x.astype(jnp.float32) for x in jax.tree.leaves((gradients, output))]

    with jax.default_matmul_precision("highest"):
        true = results(attend_xla, [x.astype(jnp.float32) for x in arrays])
    pairs = zip(true, results(kernel, arrays), strict=True)
    return float(np.max([jnp.abs(a - b).max() / jnp.abs(a).max() for a, b in pairs]))  # NaN, if one is


def attend_xla(
    queries: Queries, keys: Keys, values: Keys, mask: KeyMask, prefix: Prefix | None, bias: Bias | None, slots: int
) -> Queries:
    """Softmax over one or two sets of keys without concatenating them, so that a shared prefix is never copied.

    Heads go first, so that every product is a batch of plain matrices, and with a shared prefix one per head.
    """
    dtype, lowest = values.dtype, jnp.finfo(jnp.float32).min
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    queries, keys, values = (x.transpose(2, 0, 1, 3) for x in (queries, keys, values))  # [H, B, T or S, d]
    queries = queries * queries.shape[-1] ** -0.5
    logits = product("hbtd,hbsd->hbts", queries, keys)
    if slots and bias is not None:
        from_text, to_slot = jnp.arange(logits.shape[2]) >= slots, jnp.arange(logits.shape[3]) < slots
        logits += jnp.where(from_text[:, None] & to_slot, bias[:, None, None, None], 0.0)
    logits = jnp.where(mask[:, None, :], logits, lowest)
    highest = largest(logits)  # [H, B, T]
    if prefix is not None:
        slot_keys, slot_values = (x.astype(dtype) for x in prefix)
        h = "h" if slot_keys.ndim == 3 else "bh"
        slot_logits = product(f"hbtd,{h}dp->hbtp", queries, slot_keys)
        shift = 0.0 if bias is None else bias[:, None, None]
        highest = jnp.maximum(highest, largest(slot_logits) + shift)
    weights = jnp.exp(logits - highest[..., None])
    total = weights.sum(axis=-1)
    output = product("hbts,hbsd->hbtd", weights.astype(dtype), values)
    if prefix is not None:
        weights = jnp.exp(slot_logits - (highest - shift)[..., None])
        total += weights.sum(axis=-1)
        output += product(f"hbtp,{h}pd->hbtd", weights.astype(dtype), slot_values)
    return (output / total[..., None]).astype(dtype).transpose(1, 2, 0, 3)  # [B, T, H, d]


def largest(logits: Float[Array, "H B T S"]) -> Float[Array, "H B T"]:
    """The largest of each query's logits, without a gradient: in a softmax it cancels.

    On a CPU half is compared with half until few are left: XLA's reduction over the last axis is not vectorised.
    """

    def by_halves(x: Float[Array, "H B T S"]) -> Float[Array, "H B T"]:
        while (size := x.shape[-1]) > 32:
            half = -(-size // 2)  # of an odd size both halves have the one in the middle
            x = jnp.maximum(x[..., :half], x[..., size - half :])
        return x.max(axis=-1)

    return jax.lax.platform_dependent(jax.lax.stop_gradient(logits), cpu=by_halves, default=partial(jnp.max, axis=-1))


def attend_blocks(
    queries: Queries, keys: Keys, values: Keys, mask: KeyMask, prefix: Prefix | None, bias: Bias | None, slots: int
) -> Queries:
    """`attend_xla` of a few texts at a time: with all at once, a CPU spends most of its time on memory for logits."""
    texts, length, heads, _ = queries.shape
    attended = keys.shape[1] + (0 if prefix is None else prefix.keys.shape[-1])
    count = -(-texts // max(1, min(texts, BLOCK_LOGITS // (heads * length * attended))))
    if count == 1:
        return attend_xla(queries, keys, values, mask, prefix, bias, slots)
    size = -(-texts // count)
    per_text = prefix is not None and prefix.keys.ndim == 4

    def split(x: Shaped[Array, "B ..."]) -> Shaped[Array, "n b ..."]:
        x = jnp.pad(x, ((0, count * size - texts), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(count, size, *x.shape[1:])

    @partial(jax.checkpoint, prevent_cse=False)  # a loop body needs no barrier
    def block(xs: tuple) -> Queries:
        return attend_xla(*xs[:4], xs[4] if per_text else prefix, bias, slots)

    blocks = jax.lax.map(block, jax.tree.map(split, (queries, keys, values, mask, prefix if per_text else None)))
    return blocks.reshape(-1, *blocks.shape[2:])[:texts]  # [count, size, T, H, d] → [B, T, H, d]


def attend_cudnn(
    queries: Queries,
    keys: Keys,
    values: Keys,
    mask: KeyMask,
    prefix: Prefix | None = None,
    bias: Bias | None = None,
    slots: int = 0,
) -> Queries:
    """cuDNN's fused kernel (`models.cudnn`): no logits in memory.

    It takes lengths for a mask: padding elsewhere than at a text's end gives NaN.
    """
    from cde_jax.models.cudnn import attend_parts  # it needs a private module of JAX

    if slots and bias is not None:  # which is of the text's attention to the slots alone
        of_slots = attend_cudnn(queries[:, :slots], keys, values, mask)
        own = Prefix.of_slots(keys[:, :slots], values[:, :slots])
        of_text = attend_cudnn(queries[:, slots:], keys[:, slots:], values[:, slots:], mask[:, slots:], own, bias)
        return jnp.concatenate([of_slots, of_text], axis=1)
    count = mask.sum(axis=1, dtype=jnp.int32)
    padded_at_end = (mask == (jnp.arange(mask.shape[1]) < count[:, None])).all(axis=1)  # [B]
    lengths = jnp.maximum(count, 1)  # a softmax over no key would be NaN
    output = attend_parts(queries, keys, values, lengths, *([] if prefix is None else [*prefix.by_slot(), bias]))
    return jnp.where(padded_at_end[:, None, None, None], output, jnp.nan)
