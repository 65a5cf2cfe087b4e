"""Populations of states, from free energies of each against all others, with the verdicts of these."""

from dataclasses import dataclass
from typing import Protocol

from scipy.special import expit

__all__ = ["Difference", "Population", "population_of"]


class Difference(Protocol):
    """-log( P / (1 - P) ) in kT, with its standard error and interval."""

    value: float
    std_error: float
    interval: tuple[float, float] | None
    reliable: bool
    message: str


@dataclass(frozen=True)
class Population:
    """P of a state, its standard error and an interval within (0, 1); ``reliable`` as its free energy is."""

    value: float
    std_error: float
    interval: tuple[float, float] | None
    reliable: bool
    message: str


def population_of(difference: Difference) -> Population:
    """P = 1 / (1 + exp(ΔF)) of a state whose ΔF (kT) is that against all others; its error is P (1 - P) of that of ΔF.

    >>> from boltznce.analysis.free_energy import free_energy_difference
    >>> found = population_of(free_energy_difference([1.0] * 100 + [-1.0] * 300))
    >>> round(found.value, 3), round(found.std_error, 2), found.reliable
    (0.25, 0.02, True)
    """
    value = float(expit(-difference.value))
    ends = difference.interval
    interval = ends and (float(expit(-ends[1])), float(expit(-ends[0])))
    error = value * (1.0 - value) * difference.std_error
    return Population(value, error, interval, difference.reliable, difference.message)
