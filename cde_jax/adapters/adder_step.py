"""The jitted part of fitting an `Adapter`: search of the hardest negatives, the loss and one step."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, Int, Int32

from cde_jax.adapters.adder import Table, adapt
from cde_jax.config import AdapterSettings
from cde_jax.data.store import unit_rows

STREAM = 71  # random stream id
BLOCK, CHUNK = 65_536, 64  # documents scored at a time; those of which only the best is ranked at first
DEVICE_BYTES = 2**32  # of float32 documents kept on the device; a larger corpus is read block by block
QUERIES = 512  # searched at a time
KEY_SCALE = 1.5  # standard deviation of the logits of the lookup at the start
LEARNING_RATES = {"linear": 4e-4, "softmax": 1e-3, "low_rank": 1e-4, "mlp": 1e-4}
NEVER = -1e9  # score of what is no negative
Tables = dict[str, Table | None]  # by side; None: the vectors as they are


class Batch(NamedTuple):
    """Queries of a step; −1 stands where a query has fewer documents than others."""

    queries: Float32[np.ndarray, "B D"]
    trained: Int32[np.ndarray, "B M"]  # positives whose scores are raised
    positives: Int32[np.ndarray, "B E"]  # all of them: no negatives
    candidates: Int32[np.ndarray, "B P"]  # negatives of the last search; P = 0: search the corpus at this step
    vectors: Float32[np.ndarray, "B T D"] | None  # of `trained` and `candidates`; None: the corpus is on the device


class Corpus:
    """Unit rows of the documents in equal blocks: on the device if they fit, else read at every search."""

    def __init__(self, documents: Float[np.ndarray, "n D"]):
        self.documents, self.count = documents, len(documents)
        blocks = -(-self.count // BLOCK)
        self.rows = -(-self.count // (blocks * CHUNK)) * CHUNK  # of a block; zeros fill the last one
        self.starts = range(0, self.count, self.rows)
        fits = 4 * documents.size <= DEVICE_BYTES
        self.resident = jnp.asarray(np.stack([self._block(start) for start in self.starts])) if fits else None

    def gather(self, rows: Int[np.ndarray, "B T"]) -> Float32[np.ndarray, "B T D"]:
        """Unit rows of some documents, from the host."""
        found = np.asarray(self.documents[np.maximum(rows, 0).ravel()], np.float32)
        return unit_rows(found).reshape(*rows.shape, -1)

    def hardest(
        self, tables: Tables, queries: Float32[np.ndarray, "q D"], positives: Int[np.ndarray, "q E"], k: int, form: str
    ) -> Int[np.ndarray, "q k"]:
        """The k documents of greatest cosine under `tables` for each query, exactly, but for its positives; −1: none.

        Never holds more than scores of QUERIES queries and BLOCK documents.
        """
        parts = [slice(i, i + QUERIES) for i in range(0, len(queries), QUERIES)]
        best = [_nothing(len(queries[part]), k) for part in parts]
        for number, start in enumerate(self.starts):
            block = jnp.asarray(self._block(start)) if self.resident is None else self.resident[number]
            for i, part in enumerate(parts):
                best[i] = _search(tables, queries[part], positives[part], block, start, self.count, best[i], form)
        return np.concatenate([np.asarray(rows) for _, rows in best])

    def _block(self, start: int) -> Float32[np.ndarray, "R D"]:
        block = unit_rows(np.asarray(self.documents[start : start + self.rows], np.float32))
        return np.pad(block, ((0, self.rows - len(block)), (0, 0)))


def initial_tables(settings: AdapterSettings, width: int) -> Tables:
    """V is zero, so that training starts from the vectors as they are."""
    random = np.random.default_rng([settings.seed, STREAM])
    tables = {}
    for side in ("query",) if settings.sides == "query" else ("query", "document"):
        if settings.form == "linear":
            tables[side] = {"V": np.zeros((width, width), np.float32)}
            continue
        scale = KEY_SCALE if settings.form == "softmax" else 1.0
        keys = (scale * random.normal(size=(settings.hidden, width))).astype(np.float32)
        zeros = np.zeros((width + 1, settings.hidden), np.float32)
        tables[side] = {"K": keys, "b": zeros[0], "V": zeros[1:]}
    return tables


def optimizer(settings: AdapterSettings) -> optax.GradientTransformation:
    """Adam."""
    return optax.adam(settings.learning_rate or LEARNING_RATES[settings.form])


@partial(jax.jit, static_argnames="settings")
def train_step(
    tables: Tables,
    state: optax.OptState,
    batch: Batch,
    corpus: Float32[Array, "blocks R D"] | None,
    count: Int[Array, ""] | int,
    settings: AdapterSettings,
) -> tuple[Tables, optax.OptState, Float[Array, ""]]:
    """One update against the hardest of the `count` documents under `tables`, or of the batch's candidates."""
    candidates, vectors = batch.candidates, batch.vectors
    if not candidates.shape[1] and settings.negatives != "batch":

        def search(best, start_and_block):
            start, block = start_and_block
            return _merge(tables, batch.queries, batch.positives, block, start, count, best, settings.form), None

        starts = jnp.arange(len(corpus)) * corpus.shape[1]
        candidates = jax.lax.scan(search, _nothing(len(batch.queries), settings.hardest), (starts, corpus))[0][1]
    if vectors is None:
        rows = jnp.concatenate([batch.trained, candidates], axis=1)
        vectors = corpus.reshape(-1, corpus.shape[2])[jnp.maximum(rows, 0)]
    with jax.default_matmul_precision("highest"):  # accelerators would round float32
        loss, gradients = jax.value_and_grad(_loss)(tables, batch, candidates, vectors, settings)
    updates, state = optimizer(settings).update(gradients, state, tables)
    return optax.apply_updates(tables, updates), state, loss


def _loss(
    tables: Tables,
    batch: Batch,
    candidates: Int[Array, "B P"],
    vectors: Float[Array, "B T D"],
    settings: AdapterSettings,
) -> Float[Array, ""]:
    """Mean over queries of the mean over each one's positives."""
    queries = adapt(tables["query"], batch.queries, settings.form, jnp)
    vectors = adapt(tables.get("document"), vectors, settings.form, jnp)
    scores = jnp.einsum("bd,btd->bt", queries, vectors)
    known = batch.trained.shape[1]
    positive, negative = scores[:, :known], jnp.where(candidates >= 0, scores[:, known:], NEVER)
    if candidates.shape[1] > settings.hardest:
        negative = jax.lax.top_k(negative, settings.hardest)[0]
    if settings.negatives != "global":
        relevant = (batch.positives[:, :, None] == batch.trained[None, None, :, 0]).any(axis=1)  # [B, B]
        others = jnp.where(relevant, NEVER, queries @ vectors[:, 0].T)
        negative = others if settings.negatives == "batch" else jnp.concatenate([negative, others], axis=1)
    if settings.loss == "margin":
        losses = jnp.maximum(0, settings.margin - positive + negative.max(axis=1, keepdims=True))
    else:
        negative = jax.nn.logsumexp(negative / settings.temperature, axis=1, keepdims=True)
        losses = jax.nn.softplus(negative - positive / settings.temperature)
    mask = batch.trained >= 0
    return (jnp.where(mask, losses, 0).sum(axis=1) / mask.sum(axis=1)).mean()


def _nothing(count: int, k: int) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    return jnp.full((count, k), -jnp.inf), jnp.full((count, k), -1, jnp.int32)


def _merge(tables, queries, positives, block, start, count, best, form):
    """Scores and rows of the best k so far → those with a block of documents, whose first row is `start`."""
    queries = adapt(tables["query"], queries, form, jnp)
    documents = adapt(tables.get("document"), block, form, jnp)
    size, (batch, k) = len(documents), best[0].shape
    scores = jnp.matmul(documents, queries.T, precision=jax.lax.Precision.HIGHEST)  # on CPU 3 times as fast as [B, R]
    scores = jnp.where((start + jnp.arange(size) < count)[:, None], scores, -jnp.inf)
    place = jnp.where((positives >= start) & (positives < start + size), positives - start, size)
    columns = jnp.arange(batch)[:, None]
    scores = scores.at[place, columns].set(-jnp.inf, mode="drop")
    chunk = CHUNK if size // CHUNK >= k else 1  # the best k are in the k chunks with the best maxima
    chunks = scores.reshape(-1, chunk, batch)
    _, places = jax.lax.top_k(chunks.max(axis=1).T, min(k, len(chunks)))
    scores = chunks[places, :, columns].reshape(batch, -1)  # [B, k · chunk]
    rows = (start + places[..., None] * chunk + jnp.arange(chunk)).reshape(batch, -1)
    scores, order = jax.lax.top_k(jnp.concatenate([best[0], scores], axis=1), k)
    rows = jnp.take_along_axis(jnp.concatenate([best[1], rows], axis=1), order, axis=1)
    return scores, jnp.where(scores > -jnp.inf, rows, -1)


_search = partial(jax.jit, static_argnames="form")(_merge)
