"""How heavy the tail of the importance weights is: the shape k of a generalized Pareto distribution."""

import numpy as np

__all__ = ["fit_generalized_pareto", "pareto_k", "tail_share"]

_FEWEST_TAIL_POINTS = 5
_SMALLEST_EXCESS = 1e-290  # keeps ratios of excesses inside the range of float64


def fit_generalized_pareto(excess: np.ndarray) -> float:
    """Shape k of positive ``excess`` (n,), by the empirical-Bayes estimate of Zhang & Stephens (2009).

    The likelihood is profiled over theta = -k/sigma and averaged over a grid of theta; k is then drawn towards 0.5
    with the weight of ten observations (Vehtari et al. 2024, appendix G).
    """
    x = np.sort(np.asarray(excess, dtype=np.float64))
    n = len(x)
    n_grid = 30 + int(np.sqrt(n))
    first_quartile = x[int(n / 4 + 0.5) - 1]
    theta = 1.0 / x[-1] + (1.0 - np.sqrt(n_grid / (np.arange(1, n_grid + 1) - 0.5))) / (3.0 * first_quartile)
    k = np.log1p(-theta[:, None] * x).mean(axis=1)
    rate = np.divide(
        -theta, k, out=np.full(n_grid, 1.0 / x.mean()), where=k != 0.0
    )  # theta = 0 is the exponential distribution
    log_likelihood = n * (np.log(rate) - k - 1.0)
    posterior = np.exp(log_likelihood - log_likelihood.max())
    theta_mean = (theta * posterior).sum() / posterior.sum()
    k_mean = np.log1p(-theta_mean * x).mean()
    return float((n * k_mean + 10 * 0.5) / (n + 10))


def pareto_k(log_weights: np.ndarray) -> float:
    """Pareto-k of unnormalized ``log_weights`` (n,), from the largest min(0.2 n, 3 sqrt(n)) of them (PSIS, Vehtari et al. 2024).

    Above 0.7 means over weights cannot be trusted. ``-inf`` for weights without a tail (all the largest equal);
    ``nan`` where fewer than five weights make the tail, too few to tell.
    """
    log_weights = np.asarray(log_weights, dtype=np.float64)
    if _tail_size(len(log_weights)) < _FEWEST_TAIL_POINTS:
        return float("nan")
    cutoff, tail = _tail(log_weights)
    if len(tail) == 0:
        return float("-inf")
    if len(tail) < _FEWEST_TAIL_POINTS:
        return float("nan")
    excess = np.exp(tail - tail[-1]) - np.exp(cutoff - tail[-1])
    return fit_generalized_pareto(np.maximum(excess, _SMALLEST_EXCESS))


def tail_share(log_weights: np.ndarray) -> float:
    """Share of the sum of weights (n,) that stands above the threshold of the tail that `pareto_k` is fitted to; nan if they are too few.

    How heavy a tail is matters as far as it carries something: k knows no scale, and is as large for weights that are nearly equal.
    """
    log_weights = np.asarray(log_weights, dtype=np.float64)
    if _tail_size(len(log_weights)) < _FEWEST_TAIL_POINTS:
        return float("nan")
    cutoff, tail = _tail(log_weights)
    highest = log_weights.max()
    excess = np.exp(tail - highest) - np.exp(cutoff - highest)
    return float(excess.sum() / np.exp(log_weights - highest).sum())


def _tail_size(n: int) -> int:
    return int(np.ceil(min(0.2 * n, 3.0 * np.sqrt(n))))


def _tail(log_weights: np.ndarray) -> tuple[float, np.ndarray]:
    """The threshold, and the log weights above it, in order."""
    first = len(log_weights) - _tail_size(len(log_weights)) - 1
    largest = np.sort(np.partition(log_weights, first)[first:])
    return largest[0], largest[largest > largest[0]]
