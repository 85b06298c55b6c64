"""Closed forms that fit frozen vectors to a corpus without labels: one JSON line a form, NDCG@10 in points.

    python benchmarks/closed_forms.py --evaluation SETS --vectors VECTORS     (VECTORS: see benchmarks/vectors.py)

Each form is fitted twice: on 512 documents and pseudo queries of the corpus (`corpus`), and with real queries in place
of the pseudo queries, each half of a set's queries by the other half (`queries`). Forms: mean subtraction;
all-but-the-top (Mu & Viswanath, 1702.01417); whitening to equal variances (BERT-whitening, 2103.15316); soft-ZCA
(2411.17538); Ledoit–Wolf and OAS shrinkage before whitening (scikit-learn); spectral powers (2603.19339); the library's
`whitening`; nearest-neighbour normalisation (NNN, 2410.24114); inverted softmax (QB-Norm, 2112.12777); Rocchio
feedback; smoothing of documents over their neighbours. `gain` is against the vectors as they are, with a paired 95 %
interval, queries resampled within sets.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import evaluation_sets
import numpy as np
from harness import emit
from jaxtyping import Float
from scipy.special import logsumexp
from sklearn.covariance import OAS, LedoitWolf

from cde_jax.adapters.whitening import MEAN_FRACTION, SAMPLE_SIZE, whitening
from cde_jax.data.sources.beir import EvaluationSet
from cde_jax.data.store import unit_rows
from cde_jax.evaluation.compare import bootstrap
from cde_jax.evaluation.metrics import ndcg_per_query
from cde_jax.retrieval.index import as_run, search

Vectors = Float[np.ndarray, "n D"]
# (queries, documents, sample of queries, sample of documents) → queries, documents, a score to add to each document
Form = Callable[[Vectors, Vectors, Vectors, Vectors], tuple[Vectors, Vectors, Float[np.ndarray, " m"] | float]]


def linear(queries, documents, sample_queries, sample_documents, *, matrix, fraction=MEAN_FRACTION):
    """Subtract a fraction of both means, then multiply by the matrix that `matrix` gives for a sample of both."""
    means = sample_queries.mean(axis=0), sample_documents.mean(axis=0)
    centered = np.concatenate([sample_queries - means[0], sample_documents - means[1]])
    transform = matrix(centered.astype(np.float64)).astype(np.float32)
    sides = zip((queries, documents), means, strict=True)
    return *(unit_rows((vectors - fraction * mean) @ transform) for vectors, mean in sides), 0.0


def spectrum(centered, *, scale, covariance=None):
    """A symmetric matrix: the covariance with `scale` applied to its eigenvalues, the largest last."""
    c = centered.T @ centered / len(centered) if covariance is None else covariance().fit(centered).covariance_
    values, directions = np.linalg.eigh(c)
    return directions * scale(np.maximum(values, 1e-9)) @ directions.T


def library(queries, documents, sample_queries, sample_documents, *, strength, asked=False):
    """`cde_jax.whitening`; asked: the mean of queries is that of the ones that are scored, which needs no labels."""
    fitted = whitening(sample_queries, sample_documents, strength)
    if asked:
        fitted = fitted._replace(query_mean=queries.mean(axis=0))
    return fitted.transform_queries(queries), fitted.transform_documents(documents), 0.0


def nearest_neighbour_normalisation(queries, documents, sample_queries, _, *, neighbours, fraction):
    """From each document's scores a fraction of its mean score with its nearest sampled queries is subtracted."""
    scores = np.sort(documents @ sample_queries.T, axis=1)[:, -neighbours:]
    return queries, documents, -fraction * scores.mean(axis=1)


def inverted_softmax(queries, documents, sample_queries, _, *, temperature):
    """The softmax of a document's scores over the sampled queries, as an additive term."""
    return queries, documents, -temperature * logsumexp(documents @ sample_queries.T / temperature, axis=1)


def rocchio(queries, documents, *_, neighbours, fraction):
    """Each query moves towards the mean of its nearest documents."""
    best = search(queries, documents, neighbours).indices
    return unit_rows((1 - fraction) * queries + fraction * documents[best].mean(axis=1)), documents, 0.0


def smoothing(queries, documents, *_, neighbours, fraction):
    """Each document moves towards the mean of its nearest documents."""
    best = search(documents, documents, neighbours + 1).indices[:, 1:]
    return queries, unit_rows((1 - fraction) * documents + fraction * documents[best].mean(axis=1)), 0.0


def remove_top(values, count):
    """0 for the `count` largest eigenvalues, else 1."""
    return np.arange(len(values)) < len(values) - count


FORMS: dict[str, Form] = {"mean": partial(linear, matrix=lambda x: np.eye(x.shape[1]))}
FORMS["whole mean"] = partial(linear, matrix=lambda x: np.eye(x.shape[1]), fraction=1.0)
for n in (1, 2, 4, 8):
    FORMS[f"all but the top {n}"] = partial(linear, matrix=partial(spectrum, scale=partial(remove_top, count=n)))
FORMS["whitening"] = partial(linear, matrix=partial(spectrum, scale=lambda v: v**-0.5), fraction=1.0)
FORMS["Ledoit-Wolf"] = partial(linear, matrix=partial(spectrum, scale=lambda v: v**-0.5, covariance=LedoitWolf))
FORMS["OAS"] = partial(linear, matrix=partial(spectrum, scale=lambda v: v**-0.5, covariance=OAS))
for x in (0.001, 0.003, 0.01, 0.03):
    FORMS[f"soft-ZCA {x}"] = partial(linear, matrix=partial(spectrum, scale=lambda v, x=x: (v + x) ** -0.5))
for x in (0.1, 0.2, 0.3):
    FORMS[f"power {x}"] = partial(linear, matrix=partial(spectrum, scale=lambda v, x=x: v**-x))
for x in (4.0, 8.0, 16.0, 32.0, 64.0):
    FORMS[f"library {x:.0f}"] = partial(library, strength=x)
FORMS["library 16, mean of queries asked"] = partial(library, strength=16.0, asked=True)
for n in (4, 16, 64):
    FORMS[f"NNN {n} 0.5"] = partial(nearest_neighbour_normalisation, neighbours=n, fraction=0.5)
FORMS["NNN 16 0.75"] = partial(nearest_neighbour_normalisation, neighbours=16, fraction=0.75)
for x in (0.05, 0.1, 0.2):
    FORMS[f"inverted softmax {x}"] = partial(inverted_softmax, temperature=x)
for n in (1, 3, 10):
    FORMS[f"Rocchio {n} 0.2"] = partial(rocchio, neighbours=n, fraction=0.2)
for n in (1, 5, 20):
    FORMS[f"smoothing {n} 0.2"] = partial(smoothing, neighbours=n, fraction=0.2)


def main() -> None:
    """Score every form on every set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluation", nargs="+", required=True, help="BEIR folders, or folders of such")
    parser.add_argument("--vectors", type=Path, required=True, help="directory written by benchmarks/vectors.py")
    parser.add_argument("--queries", type=int, default=0, help="as of benchmarks/vectors.py")
    parser.add_argument("--documents", type=int, default=0, help="as of benchmarks/vectors.py")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS, metavar="FORM", help="by default all")
    args = parser.parse_args()
    sets = evaluation_sets.read(args.evaluation, args.queries, args.documents)
    arrays = [dict(np.load(args.vectors / f"{dataset.name}.npz")) for dataset in sets]
    frozen = [scored(dataset, x["queries"], x["documents"], 0.0) for dataset, x in zip(sets, arrays, strict=True)]
    line = {"benchmark": "closed_forms"}
    emit(line | {"form": "none", "mean": round(float(np.mean([x.mean() for x in frozen])), 2)}, "jax")
    for name, form in ((name, FORMS[name]) for name in args.forms):
        results = {}
        for fitted_on in ("corpus", "queries"):
            scores = [fitted(dataset, x, form, fitted_on) for dataset, x in zip(sets, arrays, strict=True)]
            differences = [a - b for a, b in zip(scores, frozen, strict=True)]
            gain, low, high = bootstrap([each[None] for each in differences])
            by_set = {s.name: round(float(each.mean()), 2) for s, each in zip(sets, differences, strict=True)}
            results[fitted_on] = {"gain": round(gain, 2), "interval": [round(low, 2), round(high, 2)], "sets": by_set}
        emit(line | {"form": name, **results}, "jax")


def fitted(dataset: EvaluationSet, x: dict[str, Vectors], form: Form, fitted_on: str) -> Float[np.ndarray, " q"]:
    """NDCG@10 of each query under a form."""
    random = np.random.default_rng(0)
    sample = x["documents"][random.permutation(len(x["documents"]))[:SAMPLE_SIZE]]
    if fitted_on == "corpus":
        return scored(dataset, *form(x["queries"], x["documents"], x["pseudo_queries"], sample))
    halves = np.array_split(random.permutation(len(x["queries"])), 2)
    scores = np.zeros(len(x["queries"]))
    for rows, others in zip(halves, halves[::-1], strict=True):  # no query has a part in its own transformation
        scores[rows] = scored(dataset, *form(x["queries"], x["documents"], x["queries"][others][:SAMPLE_SIZE], sample))[
            rows
        ]
    return scores


def scored(
    dataset: EvaluationSet, queries: Vectors, documents: Vectors, bias: Float[np.ndarray, " m"] | float
) -> Float[np.ndarray, " q"]:
    """NDCG@10 in points; every query must have a relevant document."""
    ones, added = np.ones((len(queries), 1), np.float32), np.broadcast_to(bias, len(documents))[:, None]
    sides = np.concatenate([queries, ones], axis=1), np.concatenate([documents, added], axis=1, dtype=np.float32)
    run = as_run(list(dataset.queries), list(dataset.corpus), search(*sides, 10))
    return 100 * np.array(list(ndcg_per_query(run, dataset.qrels).values()))


if __name__ == "__main__":
    main()
