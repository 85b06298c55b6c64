"""What is measured on the development sets while a model trains: NDCG@k, and the contrastive loss of their pairs."""

import importlib.util
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from cde_jax.data.sources.beir import EvaluationSet
from cde_jax.evaluation.beir import encode_set, rank_by_vectors
from cde_jax.evaluation.metrics import ndcg
from cde_jax.retrieval.embedder import Embedder
from cde_jax.training.losses import info_nce

SCORE = "score"  # by which the best checkpoint is kept


def can_score() -> bool:
    """Whether pytrec_eval is installed, which NDCG needs."""
    return importlib.util.find_spec("pytrec_eval") is not None


def validate(
    embedder: Embedder, sets: Sequence[EvaluationSet], seed: int, k: int, batch_size: int, temperature: float
) -> dict[str, float]:
    """{"score/NAME": NDCG@k, "validation_loss/NAME": `pair_loss`} of each set, and their means over the sets.

    A contextual model has context from each set's own corpus. Without pytrec_eval there are no scores.
    """
    measured: dict[str, dict[str, float]] = {SCORE: {}, "validation_loss": {}}
    for dataset in sets:
        vectors = encode_set(embedder, dataset, seed)
        measured["validation_loss"][dataset.name] = pair_loss(dataset, *vectors, batch_size, temperature)
        if can_score():
            measured[SCORE][dataset.name] = ndcg(rank_by_vectors(dataset, *vectors, k), dataset.qrels, k)
    means = {name: float(np.mean(list(values.values()))) for name, values in measured.items() if values}
    return means | {f"{name}/{of}": value for name, values in measured.items() for of, value in values.items()}


def pair_loss(
    dataset: EvaluationSet,
    queries: Float[np.ndarray, "q D"],
    documents: Float[np.ndarray, "n D"],
    batch_size: int,
    temperature: float,
) -> float:
    """Mean contrastive loss of a set's pairs: each query and its most relevant document (of equal ones the first).

    Queries are taken in order in batches of `batch_size`; the rest of a set that fills at least one is left out.
    Documents of the batch that are judged relevant to a query are no negatives of it.
    """
    rows = {document: row for row, document in enumerate(dataset.corpus)}
    relevant = [{d: grade for d, grade in dataset.qrels[query].items() if grade > 0} for query in dataset.queries]
    pairs = [(number, max(grades, key=grades.get)) for number, grades in enumerate(relevant) if grades]
    size, losses = min(batch_size, len(pairs)), []
    for first in range(0, len(pairs) - size + 1, size) if size else ():
        numbers, own = zip(*pairs[first : first + size], strict=True)
        keep = np.array([[document not in relevant[number] for document in own] for number in numbers])
        of_pairs = documents[[rows[document] for document in own]]
        losses.append(float(info_nce(queries[list(numbers)], of_pairs, keep, temperature)[0]))
    return float(np.mean(losses)) if losses else float("nan")
