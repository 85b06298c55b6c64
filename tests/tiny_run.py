"""A whole run in seconds: generated pairs of four domains, an evaluation set, and the config that uses them.

Also a config file of the main command: `--config=tests/tiny_run.py:FOLDER`, FOLDER being what `write_data` made.
"""

import json
from pathlib import Path

import numpy as np

from configs import base

SIZES = {"sea": 70, "sky": 40, "wood": 10, "salt": 9}  # the last two are smaller than a batch of 16, together larger
SYLLABLES = ("ba", "de", "ki", "lo", "mu", "ra", "se", "ti", "vo", "zu")


def texts(domain: str, count: int, seed: int) -> list[tuple[str, str]]:
    """Queries and documents of a domain: a document is words of the domain, its query some of them."""
    random = np.random.default_rng([seed, *domain.encode()])
    words = ["".join(random.choice(SYLLABLES, 3)) for _ in range(40)] + [domain, "the", "of"]
    documents = [list(random.choice(words, 12)) for _ in range(count)]
    return [(" ".join(d[:4]), " ".join(d)) for d in documents]


def write_data(folder: Path) -> Path:
    """`pairs.jsonl` and the evaluation set `held` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"query": query, "document": document, "domain": domain}
        for domain, count in SIZES.items()
        for query, document in texts(domain, count, seed=0)
    ]
    order = np.random.default_rng(0).permutation(len(rows))
    write_lines(folder / "pairs.jsonl", [rows[i] for i in order])
    held = folder / "held"
    held.mkdir(exist_ok=True)
    pairs = texts("sea", 12, seed=1)
    write_lines(held / "corpus.jsonl", [{"_id": f"d{i}", "text": d} for i, (_, d) in enumerate(pairs)])
    write_lines(held / "queries.jsonl", [{"_id": f"q{i}", "text": q} for i, (q, _) in enumerate(pairs)])
    (held / "qrels.tsv").write_text("".join(f"q{i}\td{i}\t1\n" for i in range(len(pairs))))
    return folder


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def get_config(folder: str):
    """One layer of width 16, batches of 16."""
    c = base.get_config()
    c.data.source = "jsonl"
    c.data.paths = (f"{folder}/pairs.jsonl",)
    c.data.evaluation = (f"{folder}/held",)
    c.data.vocab_size = 150
    c.data.query_length, c.data.document_length = 8, 16
    c.batching.surrogate_width = 8
    c.batching.batch_size, c.batching.cluster_size = 16, 16
    c.batching.iterations, c.batching.tries, c.batching.epochs = 5, 1, 2
    c.batching.threads, c.batching.prefetch = 2, 2
    c.model.context_size, c.model.soft_prompt = 4, 2
    c.model.width, c.model.layers, c.model.heads, c.model.mlp_width = 16, 1, 2, 32
    c.model.max_positions = 32
    c.train.steps, c.train.warmup_steps, c.train.learning_rate = 6, 1, 1e-2
    c.train.mesh, c.train.document_chunk = (1, 1), 8
    c.train.log_every, c.train.checkpoint_every = 1, 2
    return c
