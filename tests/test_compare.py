"""Paired comparison of systems: intervals, wins, what is paired with what."""

import numpy as np
import pytest

from cde_jax.evaluation.compare import bootstrap, compare
from cde_jax.evaluation.metrics import Scores


def scores(kind, k=10, **sets):
    return Scores(k, {name: {kind: dict(zip("abcdefgh", values, strict=False))} for name, values in sets.items()})


def test_the_interval_is_that_of_a_mean():
    random = np.random.default_rng(0)
    differences = [random.normal(0.1, 1.0, (1, n)) for n in (400, 100)]
    mean, low, high = bootstrap(differences)
    assert mean == pytest.approx(np.mean([d.mean() for d in differences]))
    error = np.sqrt(sum(d.var() / d.shape[1] for d in differences)) / 2  # of the mean of two means
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert (low + high) / 2 == pytest.approx(mean, abs=0.2 * error)
    assert bootstrap([np.full((3, 5), 0.25)]) == (0.25, 0.25, 0.25)


def test_the_interval_counts_the_spread_of_seeds():
    by_seed = [np.array([[0.0] * 50, [0.2] * 50])] * 3  # queries agree, seeds do not: both, or either twice
    assert bootstrap(by_seed) == pytest.approx((0.1, 0.0, 0.2))


def test_queries_and_seeds_are_paired_and_sets_count_equally():
    system = [scores("same", x=[0.5, 0.5], y=[0.2]), scores("same", x=[0.7, 0.7], y=[0.2])]
    baseline = [scores("none", x=[0.1, 0.3], y=[0.3]), scores("none", x=[0.4, 0.2], y=[0.3])]
    result = compare(system, baseline, "same", "none")
    assert result.difference == pytest.approx((0.35 - 0.1) / 2) and result.low <= result.difference <= result.high
    assert (result.wins, result.sets) == (1, 2)
    turned = Scores(10, {"y": {"none": {"a": 0.3}}, "x": {"none": {"b": 0.3, "a": 0.1}}})
    assert compare(system[:1], [turned], "same", "none") == compare(system[:1], baseline[:1], "same", "none")
    assert compare(system, system, "same") == (0.0, 0.0, 0.0, 0, 2)


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ([], "as many seeds, one or more, got 1 and 0"),
        ([scores("same", k=5, x=[0.5])], r"one cutoff, got NDCG at \[5, 10\]"),
        ([scores("same", x=[0.5, 0.5])], "same sets and queries .* differ on the set 'x'"),
        ([scores("same", x=[0.5], y=[0.5])], "same sets and queries"),
        ([scores("none", x=[0.5])], "the kinds 'same' and 'same'"),
    ],
)
def test_systems_that_cannot_be_paired_are_an_error(baseline, message):
    with pytest.raises(ValueError, match=message):
        compare([scores("same", x=[0.5])], baseline, "same")
