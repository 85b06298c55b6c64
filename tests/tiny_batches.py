"""Batches of random tokens: as plain padded arrays, and the same in the loader's layout."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny_models import VOCABULARY

from cde_jax.batching.layout import Layout, choose_layout, count_lengths, to_chunks

G, B, HARD, J, LONGEST = 8, 4, 1, 3, 24
STEPS = 4  # all of one layout


def plain_batch(step: int, count: int = G) -> dict[str, np.ndarray]:
    """Queries of up to 3 tokens, documents of up to 24; a plan batch with short documents only comes now and then."""
    random, batch = np.random.default_rng([step, 5]), {}
    for name, rows, length in (("query", B, 3), ("document", B * (1 + HARD), LONGEST), ("context", J, LONGEST)):
        sizes = random.integers(1, length + 1, (count, rows)) >> (random.random((count, 1)) < 0.3) * (length // 12)
        batch[f"{name}_ids"] = random.integers(1, VOCABULARY, (count, rows, length)).astype(np.int32)
        batch[f"{name}_mask"] = np.arange(length) < np.maximum(sizes, 1)[..., None]
    batch["context_mask"][:, -1] = False  # a corpus smaller than its context
    batch["keep"] = random.random((count, B, B * (1 + HARD))) < 0.8
    return batch


def joined(batch: dict, kind: str) -> np.ndarray:
    """Ids or masks of queries and documents, [G, B + N, 24]."""
    short = ((0, 0), (0, 0), (0, LONGEST - batch[f"query_{kind}"].shape[2]))
    return np.concatenate([np.pad(batch[f"query_{kind}"], short), batch[f"document_{kind}"]], axis=1)


def layouts(lengths: int = 2, count: int = G) -> tuple[Layout, Layout]:
    """Of texts and context documents, with room for every step."""
    batches = [plain_batch(step, count) for step in range(STEPS)]
    texts = choose_layout(count_lengths(joined(b, "mask").sum(axis=2) for b in batches), lengths, 2 * LONGEST)
    context = choose_layout(count_lengths(b["context_mask"].sum(axis=2) for b in batches), -(-lengths // 2), LONGEST)
    return texts, context


def in_layout(batch: dict, lengths: int = 2, devices: int = 1) -> dict:
    """`plain_batch` as the loader holds it, each plan batch shared by `devices`."""
    count = len(batch["keep"])
    texts, context = layouts(lengths, count)
    parts = [
        {
            "texts": to_chunks(joined(batch, "ids")[g], joined(batch, "mask")[g], texts, devices),
            "context": to_chunks(batch["context_ids"][g], batch["context_mask"][g], context, devices),
            "keep": batch["keep"][g],
        }
        for g in range(count)
    ]
    return jax.tree.map(lambda *x: np.stack(x), *parts)


def step_batch(step: int, count: int = G, lengths: int = 2) -> dict:
    """A batch of the training step; all of 0 ≤ step < 4 have the same shapes."""
    return in_layout(plain_batch(step, count), lengths)


def whole(ids, mask) -> dict:
    """Texts [G, m, L] as a single chunk."""
    place = jnp.broadcast_to(jnp.arange(mask.shape[1], dtype=jnp.int32), mask.shape[:2])
    return {"ids": (ids[:, None],), "mask": (mask[:, None],), "place": place}


def chunk_shapes(texts: int, *sizes: tuple[int, int, int]) -> dict:
    """Shapes of the texts of one plan batch, in chunks of these sizes (chunks, texts of a chunk, tokens)."""
    held = {
        name: tuple(jax.ShapeDtypeStruct((1, *size), dtype) for size in sizes)
        for name, dtype in (("ids", jnp.int32), ("mask", jnp.bool_))
    }
    return held | {"place": jax.ShapeDtypeStruct((1, texts), jnp.int32)}
