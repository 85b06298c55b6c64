"""Texts or token ids → vectors, in batches of few static shapes."""

import logging
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, Integer

from cde_jax.data.store import check_finite
from cde_jax.data.tokens import Tokenizer, as_list, has_text

log = logging.getLogger(__name__)

BLOCK = 16_384  # texts tokenized at a time, for each device
IN_FLIGHT = 2  # batches on the devices while the next is padded
PROGRESS_DELAY = 3.0  # seconds of work before a progress bar appears
SHORTEST = 16  # padded lengths are 16, 32, 64, … and the longest allowed
# Tokens in a batch at full speed. The rest of a length goes in small batches: one query is padded to 8 rows on
# accelerators, which compute them as fast as one, and to none on a CPU.
TOKENS_PER_BATCH = {"cpu": 2048, "other": 32_768}
SMALL_BATCHES = {"cpu": (8, 1), "other": (8,)}
LARGEST_BATCH = 1024
# FLOPs of padding that a program for one more padded length has to save in a block of texts: those that fit into the
# time of its compilation, about a second on a CPU (measured); on accelerators an estimate.
PROGRAM_FLOPS = {"cpu": 1.5e11, "other": 5e14}

SURROGATE = re.compile("[\ud800-\udfff]")
Tokens = list[Integer[np.ndarray, "_"]]  # token ids of each text, with prefix and special tokens


def as_texts(texts: Any, name: str, required: bool = False) -> list[str] | Tokens:
    """A list of strings or of token ids (1-d integer arrays); ValueError for anything else.

    Also, if `required`, for no text with a visible character; without, such texts are logged.
    """
    if not isinstance(texts, Iterable) or (isinstance(texts, np.ndarray) and texts.dtype.kind not in "OU"):
        raise ValueError(f"{name}: expected a list of texts, got {type(texts).__name__}: {texts!r:.60}")
    texts = as_list(texts, name, (str, np.ndarray))
    if any(isinstance(text, np.ndarray) for text in texts):
        for i, ids in enumerate(texts):
            if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
                raise ValueError(f"{name}: expected token ids as 1-d integer arrays, got {ids!r:.60} at index {i}")
        return texts
    blank = [i for i, text in enumerate(texts) if not has_text(text)]
    if required and len(blank) == len(texts):
        raise ValueError(f"{name}: expected at least one text, got none among {len(texts)}")
    if invalid := [i for i, text in enumerate(texts) if SURROGATE.search(text)]:
        raise ValueError(f"{name}: expected valid Unicode, got a lone surrogate at index {invalid[0]}; decode it again")
    if blank:
        log.warning("%s: %d texts have no visible character (first: index %d)", name, len(blank), blank[0])
    return texts


def in_blocks(texts: Iterable[Any], devices: int) -> Iterator[list[Any]]:
    """The texts in lists of `BLOCK` for each device, and a shorter last one."""
    texts = iter(texts)
    while block := list(islice(texts, BLOCK * devices)):
        yield block


def checked(blocks: Iterable[list[Any]], name: str) -> Iterator[list[str] | Tokens]:
    """Each block as `as_texts` takes it; its errors say in which block."""
    start = 0
    for block in blocks:
        yield as_texts(block, f"{name} from {start} on" if start else name)
        start += len(block)


def encode(
    blocks: Iterable[list[str] | Tokens],
    prefix: str,
    lengths: Sequence[int],
    embed: Callable[[Int32[np.ndarray, "B L"], Bool[np.ndarray, "B L"]], Float[Array, "B W"]],
    *,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    slots: int = 0,
    devices: int = 1,
    token_flops: float = 0.0,
    width: int,
    name: str,
    total: int | None = None,
    progress: bool,
) -> Iterator[Float[np.ndarray, "n W"]]:
    """Tokenize, embed in batches of similar padded length; yields each block's vectors in the order of its texts.

    The next block is read and tokenized in a thread meanwhile. `slots` stand beside each text, so that batches are
    smaller; batches are for `devices` at once; `token_flops` are those of a token (`batches`); `name` says what the
    texts are, `total` how many, if that is known. Without any text there is one array of no rows. Raises ValueError for
    a text without a token, token ids that do not fit, and vectors with NaN or infinity.
    """
    pad_id = tokenizer.pad_id if tokenizer else 0  # masked: any token will do
    # A batch: its block's vectors, its rows of these, what the device computes, whether it is the block's last.
    running: deque[tuple[Float[np.ndarray, "n W"], Int[np.ndarray, "_"], Float[Array, "B W"], bool]] = deque()
    count = 0

    def collect() -> Iterator[Float[np.ndarray, "n W"]]:
        vectors, rows, result, last = running.popleft()
        vectors[rows] = np.asarray(result)[: len(rows)]
        if bar is not None:
            bar.update(len(rows))
        if last:
            check_finite(name, vectors, advice="the model's weights are not finite, load an earlier checkpoint")
            yield vectors

    tokenized = _tokenized(blocks, prefix, lengths[-1], tokenizer, vocab_size, name)
    if total is None or total > BLOCK * devices:
        tokenized = _ahead(tokenized)
    with _progress_bar(total, name, progress) as bar, closing(tokenized):
        for tokens, sizes in tokenized:
            vectors, done = np.empty((len(tokens), width), np.float32), 0
            for rows, size, length in batches(sizes, lengths, partial(full_batch, slots=slots), devices, token_flops):
                done += len(rows)
                result = embed(*padded([tokens[i] for i in rows], size, length, pad_id))
                running.append((vectors, rows, result, done == len(tokens)))
                if len(running) > IN_FLIGHT:
                    yield from collect()
            count += len(tokens)
        while running:
            yield from collect()
    if not count:
        yield np.empty((0, width), np.float32)


def joined(blocks: Iterable[Float[np.ndarray, "_ W"]], count: int) -> Float[np.ndarray, "n W"]:
    """The `count` rows of one or more blocks; a single block is not copied."""
    vectors, start = None, 0
    for block in blocks:
        if len(block) == count:
            return block
        vectors = np.empty((count, block.shape[1]), block.dtype) if vectors is None else vectors
        vectors[start : start + len(block)] = block
        start += len(block)
    return vectors


def _tokenized(
    blocks: Iterable[list[str] | Tokens],
    prefix: str,
    longest: int,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    name: str,
) -> Iterator[tuple[Tokens, Int[np.ndarray, " n"]]]:
    """The token ids of each block, and how many each text has."""
    start = 0
    for tokens in blocks:
        if tokens and isinstance(tokens[0], str):
            if tokenizer is None:
                raise ValueError(f"{name}: expected token ids, got texts: this embedder has no tokenizer")
            tokens = tokenizer.encode([prefix + text for text in tokens], longest)
        if tokens:
            yield tokens, _check_tokens(tokens, longest, vocab_size, name, start)
        start += len(tokens)


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The items, each made in a thread while the caller works with the one before it."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def _progress_bar(total: int | None, name: str, shown: bool) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:  # a bare accelerator image
        return nullcontext()
    return tqdm(total=total, desc=name, delay=PROGRESS_DELAY, leave=False) if shown else nullcontext()


def _check_tokens(tokens: Tokens, longest: int, vocab_size: int, name: str, start: int) -> Int[np.ndarray, " n"]:
    """Tokens of each text; ValueError for texts of no token or too many, and for ids outside the vocabulary."""
    sizes = np.array([len(ids) for ids in tokens])
    if len(empty := np.flatnonzero(sizes == 0)):
        first = start + empty[0]
        raise ValueError(f"{name}: {len(empty)} texts have no token at all (first: index {first}): leave them out")
    low, high = (extreme(np.concatenate(tokens)) for extreme in (np.min, np.max))
    if sizes.max() > longest or low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name}: expected at most {longest} token ids of 0 to {vocab_size - 1}, got {sizes.max()} of {low} to "
            f"{high}: use the tokenizer and the lengths of this model"
        )
    return sizes


def padded_lengths(longest: int) -> tuple[int, ...]:
    """The padded lengths: 16, 32, 64, … and `longest` itself."""
    doubling = (SHORTEST << i for i in range(longest.bit_length()))
    return (*(n for n in doubling if n < longest), longest)


def _of_platform(settings: dict[str, Any]) -> Any:
    return settings["cpu" if jax.default_backend() == "cpu" else "other"]


def full_batch(length: int, *, slots: int) -> int:
    """The batch size of a padded length: a power of two within the device's tokens per batch."""
    fitting = min(LARGEST_BATCH, _of_platform(TOKENS_PER_BATCH) // (length + slots))
    fitting = max(_of_platform(SMALL_BATCHES)[0], fitting)
    return 1 << (fitting.bit_length() - 1)


def batches(
    sizes: Int[np.ndarray, " n"],
    lengths: Sequence[int],
    full_batch: Callable[[int], int],
    devices: int = 1,
    token_flops: float = 0.0,
) -> Iterator[tuple[Int[np.ndarray, " b"], int, int]]:
    """(rows, batch size, padded length) of each batch: full batches, then small ones for the rest of a length.

    `full_batch` gives the rows of one device, and each of the `devices` gets as many. A rest of more than half a full
    batch is one full batch: its empty rows cost less than many small batches; and so on for those. Full batches of a
    length between two of `lengths` are made where that saves `PROGRAM_FLOPS` of padding.
    """
    rows = np.argsort(sizes, kind="stable")
    for length, longer in with_quarters(lengths):
        if not len(rows):
            return
        *larger, smallest = (n * devices for n in (full_batch(length), *_of_platform(SMALL_BATCHES)))
        count = int(np.searchsorted(sizes[rows], length, side="right"))
        if length < longer:
            count -= count % larger[0]
            if count * (longer - length) * token_flops < _of_platform(PROGRAM_FLOPS) * devices:
                continue
        fitting, rows = rows[:count], rows[count:]
        while len(fitting):
            size = next((n for n in larger if 2 * len(fitting) > n), smallest)
            yield fitting[:size], size, length
            fitting = fitting[size:]


def with_quarters(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """A quarter, half and three quarters of the way to each length but the first, and itself, each with that length.

    Of texts of 5 to 300 words, a quarter of all positions are padding without quarters, and 7 % with them.
    """
    for shorter, length in zip((None, *lengths), lengths, strict=False):
        if shorter is not None:
            yield from ((shorter + (length - shorter) * quarter // 4, length) for quarter in (1, 2, 3))
        yield length, length


def padded(
    tokens: Tokens, size: int, length: int, pad_id: int
) -> tuple[Int32[np.ndarray, "size length"], Bool[np.ndarray, "size length"]]:
    """Ids and mask of a batch; rows beyond the texts repeat the first one, so that no row is empty."""
    rows = tokens + tokens[:1] * (size - len(tokens))
    mask = np.arange(length) < np.array([len(row) for row in rows])[:, None]
    ids = np.full((size, length), pad_id, np.int32)
    ids[mask] = np.concatenate(rows)
    return ids, mask
