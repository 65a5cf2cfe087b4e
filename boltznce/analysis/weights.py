"""Importance weights: their formula, their normalization, and how many samples they are worth."""

import math

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Tensor

from boltznce.errors import UserError

__all__ = ["effective_sample_size", "guard", "log_importance_weights", "normalized_weights"]


def log_importance_weights(energy: np.ndarray, log_prob: np.ndarray) -> np.ndarray:
    """log w = -u - log q (n,), float64; zeros (equal weights) where ``log_prob`` is all NaN: no likelihood is known."""
    energy, log_prob = np.asarray(energy, dtype=np.float64), np.asarray(log_prob, dtype=np.float64)
    return np.zeros_like(energy) if np.isnan(log_prob).all() else -energy - log_prob


def guard(energy: Tensor, log_prob: Tensor) -> tuple[Tensor, Tensor, int]:
    """Energies and log q (n,), float64, and how many are not finite in one of them: these weigh nothing.

    That is, they get u = inf and log q = 0.
    """
    fine = energy.isfinite() & log_prob.isfinite()
    return torch.where(fine, energy.double(), math.inf), torch.where(fine, log_prob.double(), 0.0), int((~fine).sum())


def normalized_weights(log_weights: np.ndarray) -> np.ndarray:
    """Weights (n,) that sum to one, from unnormalized log weights; the one place where this is done.

    ``-inf`` (an infinite energy) becomes 0. Raises UserError for NaN, ``+inf``, or nothing finite.
    """
    log_weights = np.asarray(log_weights, dtype=np.float64)
    n, bad = len(log_weights), np.isnan(log_weights) | (log_weights == np.inf)
    if bad.any():
        raise UserError(
            f"{bad.sum()} of {n} log weights are NaN or +inf: drop samples whose energy or likelihood is not a number."
        )
    if not np.isfinite(log_weights).any():
        raise UserError(f"None of {n} samples has a finite weight: there are none, or all their energies are infinite.")
    return np.exp(log_weights - logsumexp(log_weights))


def effective_sample_size(log_weights: np.ndarray) -> float:
    """Relative effective sample size (Σw)² / (n Σw²), in (0, 1] (Kish).

    >>> round(effective_sample_size([7.0, 7.0, 7.0, -np.inf]), 6)
    0.75
    """
    weights = normalized_weights(log_weights)
    return min(1.0, float(1.0 / (len(weights) * np.square(weights).sum())))
