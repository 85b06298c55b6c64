"""Any number of texts through a program of a few static shapes, and their vectors in the order of the texts."""

from collections import deque
from collections.abc import Callable
from functools import partial

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from cde_jax.data.tokens import Tokenizer
from cde_jax.retrieval.checks import check_tokens
from cde_jax.retrieval.padding import batches, full_batch, padded

BLOCK = 16_384  # texts tokenised at a time
IN_FLIGHT = 2  # batches that the device works on while the next is filled
BAR_AFTER = 3.0  # seconds of work before a progress bar shows


def encode(
    texts: list[str],
    prefix: str,
    lengths: tuple[int, ...],
    run: Callable,
    tokenizer: Tokenizer,
    *,
    slots: int,
    width: int,
    what: str,
    progress: bool,
) -> Float[np.ndarray, "n W"]:
    """Tokenise, batch by length, `run(ids, mask)` → [B, W], and put the rows back in the order of the texts.

    slots: read beside each text, so that batches are smaller; what: the name of the bar, if `progress` shows one.
    Raises ValueError for a text without a token, and for vectors that are not finite.
    """
    vectors = np.empty((len(texts), width), np.float32)
    running: deque = deque()

    def collect() -> int:
        rows, result = running.popleft()
        vectors[rows] = np.asarray(result)[: len(rows)]
        return len(rows)

    bar = tqdm(total=len(texts), desc=what, delay=BAR_AFTER, leave=False, disable=not progress)
    with bar:
        for start in range(0, len(texts), BLOCK):
            block = [prefix + text for text in texts[start : start + BLOCK]]
            tokens = tokenizer.encode(block, lengths[-1])
            sizes = np.array([len(ids) for ids in tokens])
            check_tokens(sizes, start)
            for rows, size, length in batches(sizes, lengths, partial(full_batch, slots=slots)):
                ids, mask = padded([tokens[i] for i in rows], size, length, tokenizer.pad_id)
                running.append((start + rows, run(ids, mask)))
                if len(running) > IN_FLIGHT:
                    bar.update(collect())
        while running:
            bar.update(collect())
    broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(broken):
        raise ValueError(
            f"the model gave NaN or infinity for {len(broken)} of {len(texts)} {what} (first: number "
            f"{broken[0]}): the weights are broken, load a good checkpoint"
        )
    return vectors
