"""A flow and data with known populations: isotropic Gaussians in each of two or four states, u = x² / 2 + c."""

import numpy as np

from boltznce.analysis.bar import (
    TwoSidedFreeEnergyDifference,
    TwoSidedStates,
    two_sided_free_energy_difference,
    two_sided_states,
)

KNOWN = 3.0
KNOWN_OF_FOUR = np.array([0.60, 0.25, 0.10, 0.05])
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


def estimate_of_four(
    rng: np.random.Generator,
    frames: str,
    dim: int = 20,
    mean: float = 0.3,
    n_draws: int = 2000,
    n_exact: int = 150,
    n_frames: int = 150,
    **changed: np.ndarray,
) -> TwoSidedStates:
    """Populations from ``n_exact`` likelihoods of draws and of ``frames`` of one kind in each of four states.

    The flow is N(mean, std²) in every direction, of another width in each. Walkers go through all states, and what
    they have in common they have in all.
    """
    own = np.array([0.3, 0.3, 0.2, 0.2])
    states = rng.choice(4, n_draws, p=own)
    subset = np.concatenate([np.flatnonzero(states == s)[:n_exact] for s in range(4)])
    common = rng.normal(size=(n_frames // 5, dim)) if frames == "walkers" else None
    sides = [
        _side(rng, frames, dim, mean, std, n_exact, n_frames, np.log(own[s] / KNOWN_OF_FOUR[s]), common)
        for s, std in enumerate((1.3, 1.25, 1.2, 1.35))
    ]
    of_draws, of_frames, log_weights, groups = (np.concatenate(parts) for parts in zip(*sides, strict=True))
    place = np.repeat(np.arange(4), [len(side[1]) for side in sides])
    if common is None:
        groups += n_frames * place
    given = {"frames_log_weights": log_weights, "groups": groups} | changed
    return two_sided_states(states, subset, of_draws, place, of_frames, **given)


def _side(rng, frames, dim, mean, std, n_exact, n_frames, offset, common=None):
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
    elif common is not None:  # five frames of each walker, correlated
        groups = np.repeat(np.arange(n_frames // 5), 5)
        y = 0.8 * common[groups] + 0.6 * y
    elif frames == "walkers":  # five frames each, correlated
        groups = np.repeat(np.arange(n_frames // 5), 5)
        for k in np.flatnonzero(np.arange(n_frames) % 5):
            y[k] = 0.8 * y[k - 1] + 0.6 * y[k]
    return log_ratio(rng.normal(mean, std, (n_exact, dim))), log_ratio(y), log_weights, groups
