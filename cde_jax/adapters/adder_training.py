"""Fitting of an `Adapter`: folds of held-out queries, the loop, its checkpoint, and what was gained."""

import json
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from cde_jax.adapters.adder import Grades, read_arrays, write_arrays
from cde_jax.adapters.adder_step import BLOCK, STREAM, Batch, Corpus, Tables, initial_tables, optimizer, train_step
from cde_jax.config import AdapterSettings

FORMAT = "cde_jax adapter checkpoint 1"
CUTOFFS = (1, 3, 5, 10)
EVALUATIONS = 20  # of the held-out queries in a fit
PATIENCE = 6  # evaluations without a better one, after which a fold ends
FEWEST_HELD_OUT = 6  # queries that can show a gain
MOST_HELD_OUT = 1000  # queries of a fold
CHEAP = 2 * 10**7  # queries × documents up to which every query is held out once
POOL = 4  # times `hardest`: candidates of a query between searches of the corpus
MOST_TRAINED = 32  # positives of a query in the loss, of the highest grades


def fit(
    queries: Float32[np.ndarray, "q D"],
    documents: Float[np.ndarray, "n D"],
    grades: Grades,
    settings: AdapterSettings,
    checkpoint: Path | None,
    progress: bool,
) -> tuple[Tables, dict[str, Any]]:
    """Tables and report of `Adapter.fit`. After one fold its best tables are taken; after more, all queries train."""
    fitting = Fitting(queries, documents, grades, settings, checkpoint, progress)
    curves, folds = fitting.cross_validate()
    means = curves[:, :, -1].mean(axis=1)
    steps = int(means.argmax()) * fitting.every
    report = {
        "ndcg": gains(curves[0], held_out(curves, folds)),
        "held_out": len(folds),
        "queries": len(grades),
        "documents": len(documents),
        "folds": len(fitting.curves),
        "steps": steps,
        "refresh": fitting.refresh,
        "curve": {str(i * fitting.every): round(float(mean), 5) for i, mean in enumerate(means)},
    }
    report["identity"] = steps == 0 or not report["ndcg"]["10"]["low"] > 0
    best = "best"
    if report["folds"] > 1 and not report["identity"]:
        fitting.train(np.arange(len(grades)), None, steps)
        best = "tables"
    return jax.tree.map(np.asarray, fitting.trees[best]), report


class Fitting:
    """One fit: its arrays, the loop, and its state, all of which a checkpoint holds."""

    def __init__(self, queries, documents, grades, settings, checkpoint=None, progress=False):
        self.settings, self.checkpoint, self.progress = settings, checkpoint, progress
        self.static = replace(settings, seed=0, steps=1, folds=None, refresh=None)  # what the compiled step depends on
        self.corpus, self.queries, self.grades = Corpus(documents), queries[list(grades)], list(grades.values())
        self.positives = _padded([sorted(relevant, key=relevant.get, reverse=True) for relevant in self.grades])
        self.every = max(1, settings.steps // EVALUATIONS)
        self.refresh = settings.refresh or (1 if self.corpus.resident is not None else self.every)
        self.run, self.step = 0, 0  # folds that have ended, steps of this one
        self.curves: list[np.ndarray] = []  # NDCG [evaluations, queries, cutoffs] of each fold
        self._start()
        if checkpoint is not None:
            digest = sha256(json.dumps([repr(settings), self.grades, documents.shape]).encode())
            for array in (queries, documents):
                for start in range(0, len(array), BLOCK):
                    digest.update(np.ascontiguousarray(array[start : start + BLOCK]).data)
            self.identity = digest.hexdigest()
            if checkpoint.exists():
                self._resume()

    def cross_validate(self) -> tuple[Float[np.ndarray, "e h c"], Int[np.ndarray, " h"]]:
        """NDCG of the held-out queries at each evaluation (0: as they are), and their folds.

        A single fold counts as two halves, that `held_out` may choose the step for one by the other.
        """
        settings, count = self.settings, len(self.grades)
        order = np.random.default_rng([settings.seed, STREAM]).permutation(count)
        parts = np.array_split(order, min(round(1 / settings.validation), count))
        folds = settings.folds or (len(parts) if count * self.corpus.count <= CHEAP else 1)
        parts = [part[:MOST_HELD_OUT] for part in parts[:folds]]
        for part in parts[self.run :]:
            self.train(order[~np.isin(order, part)], part, settings.steps)
            self.run, self.step = self.run + 1, 0
        longest = max(map(len, self.curves))
        curves = [np.pad(curve, ((0, longest - len(curve)), (0, 0), (0, 0)), mode="edge") for curve in self.curves]
        numbers = [np.full(len(part), i) for i, part in enumerate(parts)]
        return np.concatenate(curves, axis=1), np.concatenate(numbers) if folds > 1 else np.arange(len(parts[0])) % 2

    def train(self, rows: Int[np.ndarray, " t"], held_out: Int[np.ndarray, " h"] | None, steps: int) -> None:
        """Train on some queries; at each evaluation score the held-out ones and save the state."""
        from tqdm import tqdm

        if self.step == 0:
            self._start()
            if held_out is not None:
                self.curves[self.run :] = [self._scores(held_out)[None]]
        searched, pool = self.step, None
        with tqdm(total=steps, initial=self.step, disable=not self.progress, desc=f"run {self.run + 1}") as bar:
            while self.step < steps and not (held_out is not None and self._since_the_best() >= PATIENCE):
                if self.refresh > 1 and (self.step - searched) % self.refresh == 0:
                    pool = self._search(rows, POOL * self.settings.hardest)
                batch = self._positions(len(rows))
                loss = self._step(rows[batch], None if pool is None else pool[batch])
                self.step += 1
                bar.update()
                if self.step % self.every == 0 or self.step == steps:
                    if not np.isfinite(loss):
                        raise FloatingPointError(f"the loss is {loss} at step {self.step}: lower learning_rate")
                    searched = self.step  # so that a resumed fit searches at the same steps
                    self._evaluate(held_out)

    def _start(self) -> None:
        tables = initial_tables(self.settings, self.queries.shape[1])
        self.trees = {"tables": tables, "optimizer": optimizer(self.settings).init(tables), "best": tables}

    def _evaluate(self, held_out: Int[np.ndarray, " h"] | None) -> None:
        if held_out is not None:
            self.curves[-1] = np.concatenate([self.curves[-1], self._scores(held_out)[None]])
            if self._since_the_best() == 0:
                self.trees["best"] = self.trees["tables"]
        if self.checkpoint is not None:
            arrays = {f"curve {i}": curve for i, curve in enumerate(self.curves)}
            arrays |= {f"leaf {i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(self.trees))}
            content = {"identity": self.identity, "run": self.run, "step": self.step}
            write_arrays(self.checkpoint, arrays, FORMAT, content)

    def _resume(self) -> None:
        arrays, content = read_arrays(self.checkpoint, FORMAT)
        if content["identity"] != self.identity:
            raise ValueError(f"{self.checkpoint}: is of a fit with other vectors, qrels or settings; remove it")
        self.run, self.step, tree = content["run"], content["step"], jax.tree.structure(self.trees)
        self.trees = jax.tree.unflatten(tree, [arrays[f"leaf {i}"] for i in range(tree.num_leaves)])
        self.curves = [arrays[f"curve {i}"] for i in range(len(arrays) - tree.num_leaves)]

    def _since_the_best(self) -> int:
        """Evaluations since the one of the greatest mean NDCG@10."""
        means = self.curves[-1][:, :, -1].mean(axis=1)
        return len(means) - 1 - int(means.argmax())

    def _positions(self, count: int) -> Int[np.ndarray, " B"]:
        """The batch of this step: consecutive places in one random order of `count` queries after another."""
        size = min(self.settings.batch_size, count)
        places = np.arange(self.step * size, (self.step + 1) * size)
        keys = [
            [self.settings.seed, STREAM, self.run, epoch]
            for epoch in range(places[0] // count, places[-1] // count + 1)
        ]
        orders = np.concatenate([np.random.default_rng(key).permutation(count) for key in keys])
        return orders[places - places[0] // count * count]

    def _step(self, rows: Int[np.ndarray, " B"], candidates: Int[np.ndarray, "B P"] | None) -> Float[Array, ""]:
        positives, trees, resident = self.positives[rows], self.trees, self.corpus.resident
        if candidates is None:
            candidates = np.zeros((len(rows), 0), np.int32)
            if resident is None and self.settings.negatives != "batch":
                candidates = self._search(rows, self.settings.hardest)
        trained, vectors = positives[:, :MOST_TRAINED], None
        if resident is None:
            vectors = self.corpus.gather(np.concatenate([trained, candidates], axis=1))
        batch = Batch(self.queries[rows], trained, positives, candidates, vectors)
        trees["tables"], trees["optimizer"], loss = train_step(
            trees["tables"], trees["optimizer"], batch, resident, self.corpus.count, self.static
        )
        return loss

    def _search(self, rows: Int[np.ndarray, " t"], k: int) -> Int[np.ndarray, "t k"]:
        form = self.settings.form
        return self.corpus.hardest(self.trees["tables"], self.queries[rows], self.positives[rows], k, form)

    def _scores(self, rows: Int[np.ndarray, " h"]) -> Float[np.ndarray, "h c"]:
        nothing, form = np.full((len(rows), 1), -1, np.int32), self.settings.form
        found = self.corpus.hardest(self.trees["tables"], self.queries[rows], nothing, CUTOFFS[-1], form)
        return ndcg(found, [self.grades[row] for row in rows])


def ndcg(found: Int[np.ndarray, "q k"], grades: list[Mapping[int, int]]) -> Float[np.ndarray, "q c"]:
    """NDCG at CUTOFFS of ranked document rows, as trec_eval computes it."""
    discount = 1 / np.log2(np.arange(2, CUTOFFS[-1] + 2))
    gain = np.array(
        [[relevant.get(row, 0) for row in rows] for rows, relevant in zip(found.tolist(), grades, strict=True)]
    )
    ideal = [sorted(relevant.values(), reverse=True)[: CUTOFFS[-1]] for relevant in grades]
    ideal = np.array([row + [0] * (CUTOFFS[-1] - len(row)) for row in ideal])
    return (np.cumsum(gain * discount, axis=1) / np.cumsum(ideal * discount, axis=1))[:, np.array(CUTOFFS) - 1]


def held_out(curves: Float[np.ndarray, "e q c"], folds: Int[np.ndarray, " q"]) -> Float[np.ndarray, "q c"]:
    """Each query's NDCG at the step that is best for the queries of other folds.

    A query has no part in the choice by which it is scored: else the gain would be too favourable.
    """
    adapted = np.empty_like(curves[0])
    for fold in np.unique(folds):
        others = folds != fold
        chosen = curves[:, others, -1].mean(axis=1).argmax() if others.any() else 0
        adapted[folds == fold] = curves[chosen, folds == fold]
    return adapted


def gains(frozen: Float[np.ndarray, "q c"], adapted: Float[np.ndarray, "q c"]) -> dict[str, dict[str, float]]:
    """By cutoff: mean NDCG as it was and adapted, the gain and its paired 95 % t interval."""
    from scipy.special import stdtrit

    gain, n = adapted - frozen, len(frozen)
    half = np.inf if n < FEWEST_HELD_OUT else stdtrit(n - 1, 0.975) * gain.std(axis=0, ddof=1) / n**0.5
    means = [array.mean(axis=0) for array in (frozen, adapted, gain)]
    rows = np.stack([*means, np.maximum(-1, means[2] - half), np.minimum(1, means[2] + half)], axis=1).round(5)
    names = ("frozen", "adapted", "gain", "low", "high")
    return {str(k): dict(zip(names, row, strict=True)) for k, row in zip(CUTOFFS, rows.tolist(), strict=True)}


def _padded(rows: list[list[int]]) -> Int32[np.ndarray, "q E"]:
    width = max(map(len, rows))
    return np.array([row + [-1] * (width - len(row)) for row in rows], np.int32)
