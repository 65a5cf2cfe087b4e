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
    exponential = np.full(n_grid, 1.0 / x.mean())  # the rate where theta is 0
    rate = np.divide(-theta, k, out=exponential, where=k != 0.0)
    log_likelihood = n * (np.log(rate) - k - 1.0)
    posterior = np.exp(log_likelihood - log_likelihood.max())
    theta_mean = (theta * posterior).sum() / posterior.sum()
    k_mean = np.log1p(-theta_mean * x).mean()
    return float((n * k_mean + 10 * 0.5) / (n + 10))


def pareto_k(log_weights: np.ndarray) -> float:
    """Pareto-k of unnormalized ``log_weights`` (n,), from the largest min(0.2 n, 3 √n) of them.

    PSIS, Vehtari et al. 2024. Above 0.7 means over weights cannot be trusted. ``-inf`` for weights without a tail (all
    the largest equal); ``nan`` where fewer than five weights make the tail, too few to tell.

    >>> uniform = (np.arange(10_000) + 0.5) / 10_000
    >>> round(pareto_k(-0.9 * np.log(uniform)), 1), pareto_k(np.zeros(1000))  # a tail w^(-1/0.9), and none
    (0.9, -inf)
    """
    excess = _excess(log_weights)
    if excess is None or 0 < len(excess) < _FEWEST_TAIL_POINTS:
        return float("nan")
    return fit_generalized_pareto(np.maximum(excess, _SMALLEST_EXCESS)) if len(excess) else float("-inf")


def tail_share(log_weights: np.ndarray) -> float:
    """Share of the sum of weights (n,) above the threshold of the tail that `pareto_k` is fitted to; nan if too few.

    How heavy a tail is matters as far as it carries something: k knows no scale, and is as large for weights that are
    nearly equal.
    """
    excess = _excess(log_weights)
    return float("nan") if excess is None else float(excess.sum() / np.exp(log_weights - np.max(log_weights)).sum())


def _excess(log_weights: np.ndarray) -> np.ndarray | None:
    """What the weights of the tail have above its threshold, the largest being one; None if the tail is too short."""
    log_weights = np.asarray(log_weights, dtype=np.float64)
    n = len(log_weights)
    n_tail = int(np.ceil(min(0.2 * n, 3.0 * np.sqrt(n))))
    if n_tail < _FEWEST_TAIL_POINTS or not np.isfinite(log_weights).any():
        return None
    largest = np.sort(np.partition(log_weights, n - n_tail - 1)[n - n_tail - 1 :])
    tail = largest[largest > largest[0]]
    return np.exp(tail - largest[-1]) - np.exp(largest[0] - largest[-1])
