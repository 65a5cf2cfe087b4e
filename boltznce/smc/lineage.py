"""Where walkers come from, and what that says: how many ancestors an average rests on, and how far it can be off.

Walkers with an ancestor in common are not independent, and their ESS after resampling does not know it. All averages
here take the ancestors' sums of weights, which are.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp

from boltznce.analysis.weights import normalized_weights
from boltznce.errors import UserError

__all__ = ["BaseBias", "Lineage", "base_bias", "lineages", "log_normalizer"]


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


class BaseBias(NamedTuple):
    """By how much a base stands too high, D_s = log⟨exp(d)⟩ in state and rest, d = log q̃ - log q, up to a constant.

    Attributes:
        std_error: of D_state - D_rest.
        spread: standard deviations of d in state and rest; above 1.5 kT the averages rest on few.
    """

    state: float
    rest: float
    std_error: float
    spread: tuple[float, float]

    @property
    def value(self) -> float:
        """D_state - D_rest, to be taken off the ΔF of an annealing from this base."""
        return self.state - self.rest


def base_bias(
    difference: np.ndarray,
    inside: np.ndarray,
    log_weights: np.ndarray | None = None,
    units: np.ndarray | None = None,
) -> BaseBias:
    """How much a base's error d = log q̃ - log q (m,) shifts ΔF: D_s = log Σ w exp(d) / Σ w over the state and the rest.

    Walkers start with weight one where exp(d) would be right. Two ways to measure it:

    - over final walkers: ``difference`` at their ancestors, ``inside`` where they are now; ``log_weights`` the final
      ones, or none where they were drawn by weight (`choose_subset(..., drawn_by="weights")`); ``units`` (m,) the
      ancestors.
    - over fresh draws of the generator: with ``log_weights`` β_1 (-u - log q̃), β_1 the first step, made without a move.

    The variance is Σ_a (Σ_{i of a} W_i (exp(d_i - D_s) - 1))² over both sides, W_i summing to one on each side. Raises
    UserError where d is not finite or a side has no weight.

    >>> found = base_bias([0.5, 0.5, 0.0, 0.0], [True, True, False, False])
    >>> round(found.value, 6), found.std_error
    (0.5, 0.0)
    """
    d, inside = np.asarray(difference, dtype=np.float64), np.asarray(inside, dtype=bool)
    log_weights = np.zeros(len(d)) if log_weights is None else np.asarray(log_weights, dtype=np.float64)
    units = np.arange(len(d)) if units is None else np.asarray(units)
    if not np.isfinite(d[np.isfinite(log_weights)]).all():
        raise UserError("The bias of a base needs finite differences log q̃ - log q of all walkers that weigh anything.")
    if not all(np.isfinite(log_weights[side]).any() for side in (inside, ~inside)):
        raise UserError(
            "The bias of a base needs walkers that weigh something in the state and in the rest: draw more."
        )
    means, influence, spread = [], np.zeros(len(d)), []
    for side, sign in ((inside, 1.0), (~inside, -1.0)):
        side = side & np.isfinite(log_weights)
        w = normalized_weights(log_weights[side])
        means.append(float(logsumexp(d[side], b=w)))
        influence[side] = sign * w * np.expm1(d[side] - means[-1])
        spread.append(float(np.sqrt(w @ np.square(d[side] - w @ d[side]))))
    std_error = float(np.sqrt(np.square(_sums(units, influence)).sum()))
    return BaseBias(*means, std_error, (spread[0], spread[1]))


def _sums(units: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sums of ``values`` over each of the units that occur."""
    return np.bincount(np.unique(units, return_inverse=True)[1], values)
