"""A flow and data with a known free-energy difference: isotropic Gaussians on either side, u = x² / 2 + c."""

import numpy as np

from boltznce.analysis.bar import TwoSidedFreeEnergyDifference, two_sided_free_energy_difference

KNOWN = 3.0
FRAMES = ("independent", "weighted", "walkers", "resampled")


def estimate(
    rng: np.random.Generator,
    frames: str,
    dim: int = 20,
    mean: float = 0.3,
    std: float = 1.3,
    n_draws: int = 2000,
    n_exact: int = 150,
    n_frames: int = 150,
) -> TwoSidedFreeEnergyDifference:
    """ΔF from ``n_exact`` likelihoods of draws and of ``frames`` of one kind on each side.

    The flow is N(mean, std²) in every direction, on the other side a little narrower.
    """
    n_state = rng.binomial(n_draws, 0.4)
    subset = np.concatenate([np.arange(n_exact), n_state + np.arange(n_exact)])
    sides = [
        _side(rng, frames, dim, mean, narrow * std, n_exact, n_frames, offset)
        for narrow, offset in ((1.0, KNOWN + np.log(0.4)), (0.95, np.log(0.6)))
    ]
    of_draws, of_frames, log_weights, groups = (np.concatenate(parts) for parts in zip(*sides, strict=True))
    groups[len(sides[0][3]) :] += n_frames
    place = np.repeat([1.0, -1.0], [len(side[1]) for side in sides])
    return two_sided_free_energy_difference(
        np.where(np.arange(n_draws) < n_state, 1.0, -1.0),
        subset,
        of_draws,
        place,
        of_frames,
        frames_log_weights=log_weights,
        groups=groups,
    )


def _side(rng, frames, dim, mean, std, n_exact, n_frames, offset):
    def log_ratio(x):
        return (x**2 / 2 - ((x - mean) / std) ** 2 / 2 - np.log(std)).sum(axis=1) + offset

    y, groups = rng.normal(size=(n_frames, dim)), np.arange(n_frames)
    log_weights = np.zeros(n_frames)
    if frames == "weighted":  # from a distribution that is broader in one direction
        y[:, 0] *= 1.5
        log_weights = y[:, 0] ** 2 / 2 * (1.5**-2 - 1)
    elif frames == "resampled":  # out of three times as many, by weight: some come more than once
        pool = rng.normal(size=(3 * n_frames, dim))
        pool[:, 0] *= 2.0
        weights = np.exp(pool[:, 0] ** 2 / 2 * (2.0**-2 - 1))
        groups, repeats = np.unique(rng.choice(len(pool), n_frames, p=weights / weights.sum()), return_counts=True)
        y, log_weights, groups = pool[groups], np.log(repeats), np.arange(len(groups))
    elif frames == "walkers":  # five frames each, correlated
        groups = np.repeat(np.arange(n_frames // 5), 5)
        for k in np.flatnonzero(np.arange(n_frames) % 5):
            y[k] = 0.8 * y[k - 1] + 0.6 * y[k]
    return log_ratio(rng.normal(mean, std, (n_exact, dim))), log_ratio(y), log_weights, groups
