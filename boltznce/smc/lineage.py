"""Where walkers come from, and what that says: how many ancestors an average rests on, and how far it can be off.

Walkers with an ancestor in common are not independent, and their ESS after resampling does not know it. All averages
here take the ancestors' sums of weights, which are.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple, Self

import numpy as np
from scipy.special import logsumexp

from boltznce.analysis.free_energy import (
    CorrectedFreeEnergyDifference,
    FreeEnergyDifference,
    corrected_free_energy_difference,
    free_energy_difference,
)
from boltznce.analysis.weights import normalized_weights
from boltznce.states import in_interval

__all__ = [
    "Kin",
    "Lineage",
    "corrected_by_ancestors",
    "lineages",
    "log_normalizer",
    "refined_free_energy_difference",
]

FEWEST_ANCESTORS = 30.0  # effective ones on a side: with 20 of them 88% of the intervals of 95% held the truth


class Lineage(NamedTuple):
    """Of one state: its walkers, how many ancestors these have, and the effective number of them, (Σ W_a)² / Σ W_a²."""

    walkers: int
    ancestors: int
    effective: float


def lineages(ancestors: np.ndarray, log_weights: np.ndarray, labels: np.ndarray) -> Mapping[int, Lineage]:
    """The `Lineage` of each state, by the ``labels`` (n,) of where the walkers are; those without weight do not count.

    >>> lineages([0, 0, 1, 2, 3], np.array([0.0, 0.0, np.log(2.0), 1.6, -np.inf]), [0, 0, 0, 1, 1])
    {0: Lineage(walkers=3, ancestors=2, effective=2.0), 1: Lineage(walkers=1, ancestors=1, effective=1.0)}
    """
    ancestors, log_weights, labels = np.asarray(ancestors), np.asarray(log_weights, np.float64), np.asarray(labels)
    found = {}
    for label in np.unique(labels):
        members = (labels == label) & np.isfinite(log_weights)
        if not members.any():
            found[int(label)] = Lineage(0, 0, 0.0)
            continue
        sums = _sums(ancestors[members], normalized_weights(log_weights[members]))
        found[int(label)] = Lineage(int(members.sum()), len(sums), float(1.0 / np.square(sums).sum()))
    return found


def log_normalizer(log_weights: np.ndarray, units: np.ndarray, n_units: int) -> tuple[float, float]:
    """log of the mean weight, which is log(∫ exp(-u) / ∫ q̃), and its standard error.

    ``units`` (n,) are the independent ones, numbers below ``n_units``: populations or ancestors, dead ones included.
    With their shares S_u of the weight the variance is G/(G-1) Σ_u (S_u - 1/G)² (Chan & Lai 2013; Lee & Whiteley 2018):
    for ancestors it is an upper bound, see `Annealed.units`.

    >>> value, std_error = log_normalizer(np.zeros(4), np.arange(4), 4)
    >>> float(value), float(std_error)
    (0.0, 0.0)
    """
    shares = np.bincount(units, normalized_weights(log_weights), minlength=n_units)
    variance = np.square(shares - 1.0 / n_units).sum() * n_units / (n_units - 1) if n_units > 1 else math.nan
    return float(logsumexp(log_weights) - np.log(len(log_weights))), float(np.sqrt(variance))


def refined_free_energy_difference(
    angle: np.ndarray,
    log_weights: np.ndarray,
    ancestors: np.ndarray,
    state: tuple[float, float] = (0.0, 2.0),
    confidence: float = 0.95,
    units: np.ndarray | None = None,
) -> FreeEnergyDifference:
    """ΔF in kT of walkers, angles and log weights (n,), whose error knows the ``ancestors`` (n,) that they have.

    Walkers of one ancestor, or of one of the ``units`` (n,), count as one (`free_energy_difference`). ``reliable`` only
    where either side has 30 effective ancestors, too: fewer are what moves that are too few for their step in β leave,
    and there errors are too small. Where the base is not what the walkers were drawn from, the error is the base's
    too: see `corrected_by_ancestors`.
    """
    walkers = ancestors if units is None else units
    found = free_energy_difference(angle, log_weights, state, walkers=walkers, confidence=confidence)
    lines = lineages(ancestors, log_weights, in_interval(angle, state))
    numbers = {name: lines[label].effective if label in lines else 0.0 for label, name in ((1, "state"), (0, "rest"))}
    few = [
        f"{number:.1f} effective ancestors in the {name} (at least {FEWEST_ANCESTORS:.0f} are needed)"
        for name, number in numbers.items()
        if number < FEWEST_ANCESTORS
    ]
    message = "; ".join([*filter(None, [found.message]), *few])
    return dataclasses.replace(found, reliable=not message, message=message)


class Kin(NamedTuple):
    """Walkers of one ancestor on one side, taken together.

    Attributes:
        first: (k,) a walker of each kin; ``of`` (n,): the kin of each walker.
        log_weights: (k,) logs of their sums of weights.
    """

    first: np.ndarray
    of: np.ndarray
    log_weights: np.ndarray

    @classmethod
    def among(cls, ancestors: np.ndarray, log_weights: np.ndarray, inside: np.ndarray) -> Self:
        """By the ancestors, log weights and sides (n,) of the walkers.

        >>> Kin.among([7, 7, 3], np.log([1.0, 2.0, 4.0]), [True, True, False]).log_weights.round(3)
        array([1.386, 1.099])
        """
        pairs = 2 * np.asarray(ancestors, np.int64) + np.asarray(inside, bool)
        _, first, of = np.unique(pairs, return_index=True, return_inverse=True)
        top = float(np.max(log_weights))
        with np.errstate(divide="ignore"):
            return cls(first, of, np.log(np.bincount(of, np.exp(np.asarray(log_weights) - top))) + top)


def corrected_by_ancestors(
    angle: np.ndarray,
    log_weights: np.ndarray,
    ancestors: np.ndarray,
    subset: np.ndarray,
    base_log_prob: np.ndarray,
    exact_log_prob: np.ndarray,
    state: tuple[float, float] = (0.0, 2.0),
    confidence: float = 0.95,
) -> CorrectedFreeEnergyDifference:
    """ΔF in kT of walkers (n,) whose ancestors were drawn from q, and taken for draws of the base q̃.

    Weights exp(d) of the ancestors at the start, d = log q̃ - log q, would have mended everything that follows. The mean
    of exp(d) over final walkers of either side does as well: ``ΔF = ΔF_refined - (D_state - D_rest)``. It is the
    correction of EBM weights (`corrected_free_energy_difference`, whose fields and doubts these are), with ancestors
    for samples, each with the sum of its walkers' weights.

    Args:
        subset: (m,) indices of walkers, drawn by weight in either side (`choose_subset`).
        base_log_prob, exact_log_prob: (m,) log q̃, up to a constant, and log q at their ancestors' places.
    """
    kin = Kin.among(ancestors, log_weights, in_interval(np.asarray(angle), state))
    angle, subset = np.asarray(angle)[kin.first], kin.of[np.asarray(subset, np.int64)]
    both = base_log_prob, exact_log_prob
    return corrected_free_energy_difference(angle, kin.log_weights, subset, *both, state, confidence)


def _sums(units: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sums of ``values`` over each of the units that occur."""
    return np.bincount(np.unique(units, return_inverse=True)[1], values)
