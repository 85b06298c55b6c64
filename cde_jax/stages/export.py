"""The export stage: the trained model as export/, with a card that says how it was made and what was measured."""

import json
import logging
from pathlib import Path

from cde_jax.config import Config
from cde_jax.data.files import read_json
from cde_jax.evaluation import metrics
from cde_jax.retrieval.embedder import Embedder
from cde_jax.stages.evaluate import EVALUATION
from cde_jax.stages.prepare import Prepared

log = logging.getLogger(__name__)

EXPORT = "export"


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


def model_card(config: Config, workdir: Path, prepared: Prepared) -> str:
    """README.md of an export."""
    pairs, plan = prepared.pairs, prepared.plan
    file = workdir / EVALUATION
    results = "Not evaluated."
    if file.exists():
        results = metrics.table(read_json(file)["sets"], f"NDCG@{config.evaluate.cutoff}")
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

## Results
{results}

## Configuration
```json
{json.dumps(config.as_dict(), indent=1)}
```
"""
