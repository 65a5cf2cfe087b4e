"""Whether intervals hold the truth as often as they say: synthetic data whose free-energy difference is known.

Each case is repeated 1,000 times where it is marked slow, and a few times in the default suite.
"""

from typing import NamedTuple

import numpy as np
import pytest

from boltznce.analysis.convergence import time_blocks
from boltznce.analysis.free_energy import (
    FreeEnergyDifference,
    choose_subset,
    corrected_free_energy_difference,
    free_energy_difference,
    judged_by_exact,
    stratified_free_energy_difference,
)

N_SLOW = 1000


class Coverage(NamedTuple):
    """Of repeats of a case.

    Attributes:
        reliable: share of the repeats that are; ``hits``: of these, the share whose interval holds the truth.
        width: median of the standard errors of those, over the spread of their values.
    """

    reliable: float
    hits: float
    width: float

    @classmethod
    def of(cls, rows: list[FreeEnergyDifference], truth: float) -> "Coverage":
        fine = [row for row in rows if row.reliable]
        hits = [row.interval[0] < truth < row.interval[1] for row in fine]
        spread = np.std([row.value for row in fine]) if len(fine) > 1 else np.nan
        return cls(
            len(fine) / len(rows),
            float(np.mean(hits or [np.nan])),
            np.median([r.std_error for r in fine or rows]) / spread,
        )


class Draws(NamedTuple):
    """Of a flow, a ``share`` of them in the state; ``error`` is that of the EBM, E - log q."""

    angle: np.ndarray
    log_weights: np.ndarray  # exact
    error: np.ndarray

    @property
    def ebm_log_weights(self) -> np.ndarray:
        return self.log_weights - self.error


def drawn(
    generator: np.random.Generator, n: int, share: float, spread: float, errors: tuple[float, float], with_weights: bool
) -> Draws:
    """Draws with log-normal weights; the EBM's error has a standard deviation in the state and one in the rest.

    It goes with the exact weights, or is independent of them. The free-energy difference of exact weights is
    log((1 - share) / share) but where errors that go with the weights differ: then it is less by half the difference of
    their variances.
    """
    inside = generator.random(n) < share
    error = np.where(inside, *errors) * generator.normal(size=n)
    log_weights = spread * generator.normal(size=n) + with_weights * error
    return Draws(np.where(inside, 1.0, -1.5), log_weights, error)


def corrected(draws: Draws, n: int, generator: np.random.Generator) -> FreeEnergyDifference:
    subset = choose_subset(draws.angle, draws.ebm_log_weights, n, generator, drawn_by="weights")
    both = draws.error[subset], np.zeros(len(subset))
    return corrected_free_energy_difference(draws.angle, draws.ebm_log_weights, subset, *both)


def chain(generator: np.random.Generator, n: int, memory: float, share: float = 0.3) -> np.ndarray:
    """Whether frames (n,) are in the state, where the correlation between them falls as exp(-t / memory)."""
    renewed = np.where(generator.random(n) > np.exp(-1.0 / memory), np.arange(n), 0)
    return (generator.random(n) < share)[np.maximum.accumulate(renewed)]


SETTINGS = {  # n, share in the state, spread of log weights, likelihoods
    "default": (12_000, 0.5, 0.5, 4000),
    "rare state": (12_000, 0.2, 0.5, 4000),
    "few samples": (3000, 0.2, 1.0, 3000),
}


def total(n_repeats: int, setting: str, sigma: float, with_weights: bool) -> Coverage:
    n, share, spread, n_likelihoods = SETTINGS[setting]
    generator, rows = np.random.default_rng(0), []
    for _ in range(n_repeats):
        draws = drawn(generator, n, share, spread, (sigma, sigma), with_weights)
        rows.append(corrected(draws, n_likelihoods, generator))
    found = Coverage.of(rows, np.log(1 / share - 1))
    print(setting, sigma, with_weights, found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("sigma", [0.6, 1.0, 1.65, 2.4])
@pytest.mark.parametrize("setting", SETTINGS)
def test_total_interval(setting, sigma, with_weights):
    found = total(N_SLOW, setting, sigma, with_weights)
    if sigma <= 1:
        assert found.reliable >= 0.8, found
    if found.reliable > 0.02:  # of fewer than 20 repeats no share can be told
        assert 0.92 <= found.hits <= 0.98, found
        assert 0.75 <= found.width <= 1.25, found


@pytest.mark.parametrize(("sigma", "with_weights"), [(0.6, True), (1.0, False)])
def test_total_interval_in_brief(sigma, with_weights):
    found = total(100, "few samples", sigma, with_weights)
    assert found.reliable > 0.7
    assert 0.85 <= found.hits
    assert 0.75 <= found.width <= 1.3


def series(n_repeats: int, memory: float, share: float) -> Coverage:
    generator, rows = np.random.default_rng(0), []
    for _ in range(n_repeats):
        inside = chain(generator, 4000, memory, share)
        rows.append(free_energy_difference(np.where(inside, 1.0, -1.5), walkers=time_blocks(inside)))
    found = Coverage.of(rows, np.log(1 / share - 1))
    print(memory, share, found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 0.3])
@pytest.mark.parametrize("memory", [1.0, 10.0, 50.0])
def test_correlated_series(memory, share):
    found = series(N_SLOW, memory, share)
    if memory <= 10:
        assert found.reliable >= 0.8, found
        assert 0.90 <= found.hits <= 0.98, found
    else:
        assert found.reliable < 0.05 or 0.90 <= found.hits <= 0.98, found


@pytest.mark.parametrize(("memory", "reliable"), [(10.0, True), (50.0, False)])
def test_correlated_series_in_brief(memory, reliable):
    found = series(150, memory, 0.5)
    assert (found.reliable >= 0.8) if reliable else (found.reliable < 0.1)
    assert found.hits > 0.87 or not reliable


def of_ebm(n_repeats: int, errors: tuple[float, float], with_weights: bool, exact_row: bool) -> float:
    """Of the cases in which the interval of an EBM's weights misses, the share that is called reliable."""
    generator, missed, called = np.random.default_rng(0), 0, 0
    truth = -with_weights * (errors[0] ** 2 - errors[1] ** 2) / 2
    for _ in range(n_repeats):
        draws = drawn(generator, 6000, 0.5, 0.5, errors, with_weights)
        ebm = free_energy_difference(draws.angle, draws.ebm_log_weights, n_bootstrap=40)
        if exact_row:
            subset = choose_subset(draws.angle, draws.log_weights, 1000, generator)
            by = stratified_free_energy_difference(draws.angle, draws.log_weights[subset], subset)
        else:
            by = corrected(draws, 1000, generator)
        if not ebm.interval[0] < truth < ebm.interval[1]:
            missed += 1
            called += judged_by_exact(ebm, by).reliable
    assert missed > 0.2 * n_repeats
    print(errors, with_weights, exact_row, missed, called)
    return called / missed


ERRING = [((1.2, 1.6), False), ((1.2, 1.6), True), ((0.6, 0.4), False), ((0.6, 0.4), True)]


@pytest.mark.slow
@pytest.mark.parametrize("exact_row", [False, True])
@pytest.mark.parametrize(("errors", "with_weights"), ERRING)
def test_an_ebm_that_errs_by_state_is_not_called_reliable(errors, with_weights, exact_row):
    assert of_ebm(N_SLOW, errors, with_weights, exact_row) <= 0.05


def test_an_ebm_that_errs_by_state_is_not_called_reliable_in_brief():
    assert of_ebm(40, (1.2, 1.6), False, False) <= 0.05
