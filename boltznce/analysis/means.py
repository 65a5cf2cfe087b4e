"""Averages of observables over weighted samples, with an interval."""

from dataclasses import dataclass

import numpy as np

from boltznce.analysis.bootstrap import checked_samples, normal_spread, numbered, with_interval
from boltznce.analysis.pareto import pareto_k, tail_share
from boltznce.analysis.weights import normalized_weights
from boltznce.settings import require

__all__ = ["Mean", "weighted_mean"]

FEWEST_EFFECTIVE = 30.0
LARGEST_PARETO_K = 0.7


@dataclass(frozen=True, repr=False)
class Mean:
    """⟨f⟩ with its ``std_error`` and ``interval``, in the unit of f.

    ``ess`` is the effective number of independent samples, or walkers, behind the mean: the lesser of that of their
    weights and that of what each contributes, W |f - ⟨f⟩|. ``pareto_k`` is that of these contributions. ``reliable``:
    ``ess`` is at least 30, and ``pareto_k`` at most 0.7 or its tail's part in the mean smaller than the standard error.
    """

    value: float
    std_error: float
    interval: tuple[float, float] | None
    n: int
    ess: float
    pareto_k: float
    reliable: bool
    message: str

    def __repr__(self) -> str:
        value = f"{self.value:.4g}" + (f" ± {self.std_error:.2g}" if self.interval else "")
        return with_interval(value, self.interval, ".4g", self.reliable, self.message)


def weighted_mean(
    values: np.ndarray,
    log_weights: np.ndarray | None = None,
    walkers: np.ndarray | None = None,
    confidence: float = 0.95,
) -> Mean:
    """⟨f⟩ of ``values`` f (n,), numbers or a mask, by unnormalized ``log_weights`` (n,).

    With the shares W_g of the weight that independent samples have, or ``walkers`` (n,) as in
    `free_energy_difference`, ``variance = G/(G-1) Σ_g (Σ_{i in g} w_i (f_i - ⟨f⟩))²``, that of a ratio of sums; the
    interval takes a t quantile for as many as are behind it. Values without weight may be infinite. The mean of an
    angle says nothing: take its cosine and sine, or a state's mask, whose mean is a population.

    >>> weighted_mean([1.0, 2.0] * 50)
    1.5 ± 0.05 [1.4, 1.6]
    >>> weighted_mean(np.arange(100) < 20)
    0.2 ± 0.04 [0.1197, 0.2803]
    """
    require(confidence=confidence)
    if log_weights is not None and np.shape(values) == np.shape(log_weights):
        # those of no weight may be infinite
        values = np.where(np.isneginf(log_weights), np.zeros_like(values), values)
    values, log_weights = checked_samples(values, log_weights)
    is_mask = values.dtype == bool
    weights = normalized_weights(log_weights)
    units = np.arange(len(values)) if walkers is None else numbered(walkers, len(values))
    seen = values[weights > 0]
    value = float(np.clip(weights @ values, seen.min(), seen.max()))  # of a constant to the last bit
    shares, parts = np.bincount(units, weights), np.bincount(units, weights * (values - value))
    shares, parts = shares[shares > 0], parts[shares > 0]
    variance = np.square(parts).sum() * len(parts) / (len(parts) - 1) if len(parts) > 1 else np.nan
    sizes = np.abs(parts)
    ess = min(_effective(shares), _effective(sizes)) if sizes.any() else _effective(shares)
    spread = normal_spread(value, variance, ess, confidence)
    with np.errstate(divide="ignore"):
        logs = np.log(sizes)
    k, tail = pareto_k(logs), tail_share(logs) * sizes.sum()
    reasons = []
    if is_mask and not sizes.any():
        reasons.append(f"{'all' if value else 'none'} of the samples are in the state: the rest is unknown")
    elif ess < FEWEST_EFFECTIVE:
        reasons.append(f"{ess:.1f} effective samples (at least {FEWEST_EFFECTIVE:.0f} are needed)")
    elif sizes.any() and k > LARGEST_PARETO_K and not tail < spread[0]:
        reasons.append(f"Pareto-k {k:.2f} (at most {LARGEST_PARETO_K} can be trusted)")
    return Mean(value, *spread, len(values), ess, k, not reasons, "; ".join(reasons))


def _effective(parts: np.ndarray) -> float:
    """(Σ p)² / Σ p² of parts that are not negative."""
    return float(np.square(parts.sum()) / np.square(parts).sum())
