"""The export stage: the trained model as export/, with a card that says how it was made and what was measured.

And the export command: a finished run's export copied for others, alone or with the context of one corpus built in.
"""

import json
import logging
from pathlib import Path

from cde_jax.config import Config
from cde_jax.data.sources.jsonl import json_lines, text_field, text_lines
from cde_jax.evaluation import metrics
from cde_jax.retrieval.embedder import Embedder
from cde_jax.stages.evaluate import read_scores
from cde_jax.stages.workdir import EXPORT, TRAINING, Prepared, read_record

log = logging.getLogger(__name__)


def export(config: Config, embedder: Embedder, workdir: Path, prepared: Prepared) -> Path:
    """Write the trained model to export/. An export of the same weights with the same card is kept."""
    folder, card = workdir / EXPORT, model_card(config, workdir, prepared)
    written = folder / "README.md"
    same_card = written.exists() and written.read_text(encoding="utf-8") == card
    if same_card and Embedder.from_pretrained(folder).weights == embedder.weights:
        log.info("the export of this model is there: kept")
        return folder
    embedder.save_pretrained(folder, card=card)
    return folder


def export_run(workdir: Path, out: Path, corpus: Path | None = None, seed: int = 0, onnx: bool = True) -> str:
    """Write `out` from `workdir`/export, with `corpus` as a one-input model for its context; returns what was written.

    Raises ValueError for a run without an export, a seed below 0, and a corpus that cannot be read.
    """
    source = workdir / EXPORT
    if not (source / "config.json").is_file():
        raise ValueError(f"{workdir} has no export/ yet: run `python -m cde_jax.main … --stage=export` first")
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be ≥ 0 and < {2**32}, got {seed}")
    if out.resolve() == source.resolve():
        raise ValueError(f"--out={out} is the export that is read: give another directory")
    texts = None if corpus is None else read_corpus(corpus)
    embedder, readme = Embedder.from_pretrained(source), source / "README.md"
    card = readme.read_text(encoding="utf-8") if readme.is_file() else None
    if texts is None:
        embedder.save_pretrained(out, card=card)
        return f"{out}: the model"
    embedder.export_corpus(embedder.embed_context(texts, seed=seed), out, card=card, onnx=onnx)
    formats = "PyTorch and ONNX" if onnx else "PyTorch"
    return f"{out}: the model with the context of {len(texts)} texts built in, for {formats}"


def read_corpus(path: Path) -> list[str]:
    """The texts of a corpus file: JSON lines (.jsonl, .jsonl.gz) with `text` and perhaps `title`, or a text a line.

    Raises ValueError with file and line for what cannot be read, and for a corpus without texts.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file, expected JSON lines (.jsonl) or a text a line")
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        texts = []
        for place, entry in json_lines(path):
            title = "" if entry.get("title") is None else text_field(entry, "title", place, empty=True)
            texts.append(f"{title} {text_field(entry, 'text', place)}".strip())
        return texts
    texts = [line.rstrip("\r\n") for _, line in text_lines(path)]
    if not texts:
        raise ValueError(f"{path}: expected a text a line, found none")
    return texts


def training_table(workdir: Path) -> str:
    """The schedules that a run was trained by, a row for each change, as a Markdown table."""
    history = (read_record(workdir / TRAINING) or {}).get("history")
    if not history:
        return "Not recorded."
    rows = [[str(value) for value in entry.values()] for entry in history]
    names = [name.replace("_", " ") for name in history[0]]
    return "\n".join(f"| {' | '.join(row)} |" for row in [names, ["---"] * len(names), *rows])


def model_card(config: Config, workdir: Path, prepared: Prepared) -> str:
    """README.md of an export."""
    pairs, plan = prepared.pairs, prepared.plan
    scores = read_scores(workdir)
    results = metrics.table(scores["sets"], f"NDCG@{config.evaluate.cutoff}") if scores else "Not evaluated."
    kind = config.model.kind if config.model.kind == "biencoder" else f"contextual, {config.model.context_attention}"
    return f"""# A cde_jax model ({kind})

Contextual document embeddings (arXiv 2410.02525), trained with cde_jax.

```python
from cde_jax import Embedder, pseudo_queries

embedder = Embedder.from_pretrained("this directory")
context = embedder.embed_context(corpus, queries=pseudo_queries(corpus))  # or some dozens that people ask of it
vectors = embedder.encode_documents(corpus, context)
scores = embedder.encode_queries(queries, context) @ vectors.T
```

## Data
{pairs.manifest["pairs"]} pairs in {len(pairs.manifest["domains"])} domains, source `{config.data.source}`, fingerprint
`{pairs.fingerprint}`; {len(plan)} plan batches of {config.batching.batch_size}.

## Training
{training_table(workdir)}

## Results
{results}

## Configuration
```json
{json.dumps(config.as_dict(), indent=1)}
```
"""
