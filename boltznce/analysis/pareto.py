"""How heavy the tail of the importance weights is: the shape k of a generalized Pareto distribution."""

import numpy as np

__all__ = ["fit_generalized_pareto", "pareto_k"]

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
    rate = np.divide(-theta, k, out=np.full(n_grid, 1.0 / x.mean()), where=k != 0.0)  # theta = 0 is the exponential distribution
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
    n = len(log_weights)
    n_tail = int(np.ceil(min(0.2 * n, 3.0 * np.sqrt(n))))
    if n_tail < _FEWEST_TAIL_POINTS:
        return float("nan")
    largest = np.sort(np.partition(log_weights, n - n_tail - 1)[n - n_tail - 1 :])
    cutoff, tail = largest[0], largest[1:]
    tail = tail[tail > cutoff]
    if len(tail) == 0:
        return float("-inf")
    if len(tail) < _FEWEST_TAIL_POINTS:
        return float("nan")
    excess = np.exp(tail - tail[-1]) - np.exp(cutoff - tail[-1])
    return fit_generalized_pareto(np.maximum(excess, _SMALLEST_EXCESS))
