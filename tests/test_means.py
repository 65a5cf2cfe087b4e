"""Averages of observables: known ones, what intervals cover, and what is told of those not to be relied on."""

import numpy as np
import pytest

import boltznce as bz
from boltznce.analysis.means import weighted_mean
from boltznce.errors import UserError

N_REPEATS = 300


def test_by_hand():
    found = weighted_mean([1.0, 2.0, 4.0], np.log([1.0, 2.0, 1.0]))
    assert found.value == pytest.approx(9 / 4)
    squares = np.square(np.array([0.25, 0.5, 0.25]) * (np.array([1.0, 2.0, 4.0]) - 9 / 4)).sum()
    assert found.std_error == pytest.approx(np.sqrt(1.5 * squares))
    assert not found.reliable


def test_equal_weights_have_the_usual_error():
    values = np.random.default_rng(0).normal(size=1000)
    found = weighted_mean(values)
    assert (found.value, found.std_error) == pytest.approx((values.mean(), values.std(ddof=1) / np.sqrt(1000)))
    assert found.reliable
    again = weighted_mean(np.repeat(values, 3), None, np.repeat(np.arange(1000), 3))
    assert (again.value, again.std_error) == pytest.approx((found.value, found.std_error))


@pytest.mark.parametrize("kind", ["number", "square", "population"])
@pytest.mark.parametrize("ancestors", [False, True])
def test_intervals_cover_the_truth(kind, ancestors):
    """Draws of N(0.25, 1) weighted to N(0, 1); with ancestors, eight walkers that have hardly left each draw.

    Of a skewed observable (a square) 400 samples cover a little less: 92% of 1000 repeats.
    """
    observable, truth = {
        "number": (lambda x: x, 0.0),
        "square": (lambda x: x**2, 1.0),
        "population": (lambda x: x > 1.0, 0.158655),
    }[kind]
    hits, naive, n_told = 0, 0, 0
    for seed in range(N_REPEATS):
        rng = np.random.default_rng(seed)
        x, walkers = rng.normal(0.25, 1.0, 400), None
        log_weights = -(x**2) / 2 + (x - 0.25) ** 2 / 2
        if ancestors:  # by moves that leave N(0, 1) alone, and forget little
            walkers, log_weights = np.repeat(np.arange(400), 8), np.repeat(log_weights, 8)
            x = 0.9 * np.repeat(x, 8) + np.sqrt(1 - 0.81) * rng.normal(size=3200)
        found = weighted_mean(observable(x), log_weights, walkers)
        hits += found.interval[0] < truth < found.interval[1]
        n_told += found.reliable
        alone = weighted_mean(observable(x), log_weights)
        naive += alone.interval[0] < truth < alone.interval[1]
    assert (0.88 if kind == "square" else 0.91) * N_REPEATS <= hits <= 0.985 * N_REPEATS
    assert n_told > 0.75 * N_REPEATS
    assert naive < 0.8 * N_REPEATS if ancestors else naive == hits


def test_what_cannot_be_relied_on_says_so():
    rng = np.random.default_rng(0)
    x = rng.normal(size=1000)
    few = weighted_mean(x, 6 * x)
    assert "effective samples" in few.message
    heavy = weighted_mean(np.abs(rng.standard_cauchy(5000)))
    assert "Pareto-k" in heavy.message or "effective" in heavy.message
    for mask in (np.zeros(1000, dtype=bool), np.ones(1000, dtype=bool)):
        assert "of the samples are in the state" in weighted_mean(mask, x).message
    rare = weighted_mean(np.arange(10_000) < 3)
    assert not rare.reliable
    assert weighted_mean(np.arange(10_000) < 100).reliable
    constant = weighted_mean(np.full(100, 2.0), x[:100])
    assert (constant.value, constant.reliable) == (pytest.approx(2.0), True)
    one = weighted_mean(x, None, np.zeros(1000))
    assert (one.interval, one.reliable) == (None, False)


def test_values_without_weight_may_be_infinite_and_others_may_not():
    assert weighted_mean([1.0, 3.0, np.inf], [0.0, 0.0, -np.inf]).value == 2.0
    with pytest.raises(UserError, match="finite"):
        weighted_mean([1.0, np.inf])
    with pytest.raises(UserError, match="at least one"):
        weighted_mean([])
    with pytest.raises(UserError, match="walkers"):
        weighted_mean([1.0, 2.0], walkers=np.zeros(3))


def test_of_samples(monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 1, 2))
    given = {"energy": (x**2).sum((1, 2)) / 2, "log_prob": -(x**2).sum((1, 2)) / 2}
    samples = bz.WeightedSamples(x, **given, meta={"likelihood": "exact"}, ancestors=np.arange(600) // 2)
    found = samples.mean(lambda x: x[:, 0, 0])
    assert found == samples.mean(x[:, 0, 0]) == weighted_mean(x[:, 0, 0], samples.log_weights, samples.ancestors)
    assert found.reliable
    by_ebm = bz.WeightedSamples(x, **given, meta={"likelihood": "ebm"}).mean(lambda x: x[:, 0, 0])
    assert "EBM" in by_ebm.message
    assert "not reliable" in repr(by_ebm)
