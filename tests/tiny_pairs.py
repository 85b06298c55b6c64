"""A tiny pairs store, its vectors and its plan, written straight to disk: batching needs no tokenizer or real text."""

import zlib

import numpy as np

from cde_jax.batching.build import build_plan
from cde_jax.batching.vectors import write_vectors
from cde_jax.config import Batching
from cde_jax.data.files import fingerprint
from cde_jax.data.store import StoreWriter

WORDS = ("file", "open", "graph", "node", "matrix", "sum", "thread", "lock", "socket", "read", "parse", "token")

PLAN = {
    "batch_size": 4,
    "method": "clustered",
    "cluster_size": 6,
    "cluster_dimensions": 0,
    "cluster_rows": 1000,
    "iterations": 10,
    "tries": 2,
    "packing": "tsp",
    "epochs": 2,
    "domain_weights": (),
    "hard_negatives": 2,
    "mine_first": 0,
    "mine_last": 0,
    "mine_margin": 0.0,
    "filter_margin": 0.1,
}


def key(text: str) -> int:
    return zlib.crc32(text.encode()) + 1


def ragged_bytes(texts):
    return [np.frombuffer(text.encode(), np.uint8) for text in texts]


def ragged_tokens(texts):
    return [np.array([2, *(key(w) % 90 + 10 for w in text.split()), 3], np.uint16) for text in texts]


def tiny_pairs(directory, sizes=(20, 13, 3), *, seed=0, equal_texts=True, negatives=True):
    """Pairs of len(sizes) domains, their rows mixed; some queries and some documents have equal texts."""
    random = np.random.default_rng(seed)
    domain = random.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int32)
    n = len(domain)

    def text(kind, i):
        return f"{kind} {i} " + " ".join(random.choice(WORDS, int(random.integers(1, 7))))

    queries = [text("query", i) for i in range(n)]
    documents = [text("document", i) for i in range(n)]
    if equal_texts:  # in each domain
        for number in range(len(sizes)):
            rows = np.flatnonzero(domain == number)
            if len(rows) >= 4:
                queries[rows[1]] = queries[rows[0]]
                documents[rows[3]] = documents[rows[2]]
    extra = [text("negative", i) for i in range(6)] if negatives else []
    listed = [np.zeros(0, np.int64) for _ in range(n)]
    for i in range(0, n if negatives else 0, 2):  # every second pair has one to four
        listed[i] = n + random.choice(6, int(random.integers(1, 5)), replace=False)
    if equal_texts and negatives:  # a "hard negative" with the text of another pair's document for the same query
        first, second = np.flatnonzero(domain == 0)[:2]
        extra[0] = documents[first]
        listed[second] = np.union1d(listed[second], n)
    with StoreWriter(directory, "pairs") as writer:
        writer.append_ragged("query_tokens", ragged_tokens(queries), np.uint16)
        writer.append_ragged("document_tokens", ragged_tokens(documents + extra), np.uint16)
        writer.append_ragged("query_text", ragged_bytes(queries), np.uint8)
        writer.append_ragged("document_text", ragged_bytes(documents + extra), np.uint8)
        writer.append("domain", domain)
        writer.append("query_key", np.array([key(q) for q in queries], np.uint64))
        writer.append("document_key", np.array([key(d) for d in documents + extra], np.uint64))
        writer.append_ragged("negatives", listed, np.int64)
        domains = [{"name": f"domain{i}", "pairs": size} for i, size in enumerate(sizes)]
        content = fingerprint([queries, documents, extra, domain])
        return writer.finish({"fingerprint": content, "pairs": n, "documents": n + len(extra), "domains": domains})


def bag_of_words(texts):
    """Unit vectors of word counts, with a little of the text itself so that no two texts are the same."""
    vectors = np.array([[text.count(word) for word in WORDS] + [key(text) % 97 / 97] for text in texts], np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def bag_of_letters(texts):
    """Another surrogate: counts of letters and digits, not of one length."""
    return np.array([[text.count(letter) for letter in "abcdefghijklmnopqrst0123456789"] for text in texts], np.float32)


def tiny_vectors(directory, pairs, encode=bag_of_words):
    return write_vectors(directory, pairs, encode, name=encode.__name__, settings={})


def tiny_plan(directory, pairs, vectors, filter_vectors=None, seed=7, **changes):
    """The plan by the settings `PLAN` with these changes."""
    return build_plan(directory, pairs, vectors, Batching(**(PLAN | changes)), seed, filter_vectors=filter_vectors)
