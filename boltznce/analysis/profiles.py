"""Free energies along a coordinate and over two, -log of a weighted histogram, with errors; all in kT."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from boltznce.analysis.bootstrap import bootstrap_counts, checked_samples, numbered
from boltznce.analysis.weights import normalized_weights
from boltznce.errors import UserError
from boltznce.settings import require
from boltznce.states import require_radians

__all__ = ["FreeEnergyProfile", "FreeEnergySurface", "free_energy_profile", "free_energy_surface"]

Interval = tuple[float, float]

_TINY = np.finfo(float).tiny
_OFTEN = 0.95  # of the replicates see a bin that has an error: three samples or more; the spread of fewer says nothing


@dataclass(frozen=True)
class FreeEnergyProfile:
    """F in kT at ``centres`` (bins,) on the circle or between limits, minimum zero, NaN in gaps (angles never seen).

    ``std_error`` is that of -log p(angle), p normalized; NaN in gaps and where most bootstrap replicates miss the bin.
    """

    centres: np.ndarray
    free_energy: np.ndarray
    std_error: np.ndarray


@dataclass(frozen=True)
class FreeEnergySurface:
    """F in kT, (bins, bins), over two coordinates with ``centres`` (bins,) each; all else as in `FreeEnergyProfile`."""

    centres: tuple[np.ndarray, np.ndarray]
    free_energy: np.ndarray
    std_error: np.ndarray


def free_energy_profile(
    angle: np.ndarray,
    log_weights: np.ndarray | None = None,
    n_bins: int = 100,
    kappa: float | None = None,
    n_bootstrap: int = 200,
    walkers: np.ndarray | None = None,
    seed: int = 0,
    limits: Interval | None = None,
) -> FreeEnergyProfile:
    """-log p(angle) in kT on ``n_bins`` bins of (-π, π]: a weighted histogram, or with ``kappa`` a kernel estimate.

    The kernel is von Mises' and acts on the bins (keep them narrower than its width 1/√kappa); a bin with nothing seen
    within one width is a gap, and one with fewer than three samples has no standard error. ``limits`` are for a
    coordinate that is no angle: the histogram is that of the samples between them, and takes no kernel. The bootstrap
    is over samples, or over ``walkers`` (n,), as in `free_energy_difference`.

    >>> free_energy_profile([-1.5, 1.5, 1.5, 1.5], n_bins=2, n_bootstrap=20).free_energy.round(3)
    array([1.099, 0.   ])
    """
    require(n_bins=n_bins, n_bootstrap=n_bootstrap, seed=seed, **({} if kappa is None else {"kappa": kappa}))
    angle, log_weights = checked_samples(angle, log_weights)
    if limits is not None and kappa is not None:
        raise UserError("A profile between limits is a histogram: leave out kappa.")
    bins, log_weights, (width, centres) = _binned(angle, log_weights, n_bins, limits)
    offsets = 2.0 * np.pi / n_bins * np.arange(n_bins)
    kernel = np.eye(1, n_bins)[0] if kappa is None else np.exp(kappa * (np.cos(offsets) - 1.0))
    kernel_spectrum = np.fft.rfft(kernel / kernel.sum())
    reach = 0 if kappa is None else int(kappa**-0.5 / width)

    def log_density(histogram: np.ndarray) -> np.ndarray:
        smooth = histogram if kappa is None else np.fft.irfft(np.fft.rfft(histogram) * kernel_spectrum, n_bins)
        seen = np.any([np.roll(histogram > 0.0, shift) for shift in range(-reach, reach + 1)], axis=0)
        return _log_density(smooth, seen, width)

    estimate = _with_errors(bins, n_bins, log_weights, log_density, n_bootstrap, walkers, seed)
    return FreeEnergyProfile(centres, *estimate)


def free_energy_surface(
    points: np.ndarray,
    log_weights: np.ndarray | None = None,
    n_bins: int = 36,
    n_bootstrap: int = 200,
    walkers: np.ndarray | None = None,
    seed: int = 0,
    limits: Sequence[Interval | None] = (None, None),
) -> FreeEnergySurface:
    """-log p in kT of ``points`` (n, 2) on ``n_bins`` x ``n_bins`` bins; all else as in `free_energy_profile`.

    ``limits``: of each coordinate, None where it is an angle.

    >>> points = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [1.0, 1.0]])
    >>> free_energy_surface(points, n_bins=2, n_bootstrap=20).free_energy.round(3)
    array([[0.693,   nan],
           [0.693, 0.   ]])
    """
    require(n_bins=n_bins, n_bootstrap=n_bootstrap, seed=seed)
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise UserError(f"A surface is over two coordinates: give points (n, 2), not {points.shape}.")
    flat, area = np.zeros(len(points), np.int64), 1.0
    kept: Any = log_weights
    centres: list[np.ndarray] = []
    for column, ends in zip(points.T, limits, strict=True):
        bins, kept, (width, middles) = _binned(*checked_samples(column, kept), n_bins, ends)
        flat, area = flat * n_bins + bins, area * width
        centres.append(middles)

    def log_density(histogram: np.ndarray) -> np.ndarray:
        return _log_density(histogram, histogram > 0.0, area)

    estimate = _with_errors(flat, n_bins**2, kept, log_density, n_bootstrap, walkers, seed)
    return FreeEnergySurface((centres[0], centres[1]), *(each.reshape(n_bins, n_bins) for each in estimate))


def _binned(
    values: np.ndarray, log_weights: np.ndarray, n_bins: int, limits: Interval | None
) -> tuple[np.ndarray, np.ndarray, tuple[float, np.ndarray]]:
    """Bin of each value, log weights without those beyond the limits, the bins' width and centres."""
    if limits is None:
        require_radians(values)
    else:
        log_weights = np.where((values >= limits[0]) & (values < limits[1]), log_weights, -np.inf)
    low, high = limits or (-np.pi, np.pi)
    width = (high - low) / n_bins
    bins = np.floor((values - low) / width).astype(np.int64) % n_bins
    return bins, log_weights, (width, low + width * (np.arange(n_bins) + 0.5))


def _log_density(histogram: np.ndarray, seen: np.ndarray, width: float) -> np.ndarray:
    total = max(histogram.sum(), _TINY)  # a replicate may hold nothing that weighs anything
    return np.log(np.where(seen, np.maximum(histogram, _TINY) / (total * width), np.nan))


def _with_errors(
    bins: np.ndarray,
    n_bins: int,
    log_weights: np.ndarray,
    log_density: Callable[[np.ndarray], np.ndarray],
    n_bootstrap: int,
    walkers: np.ndarray | None,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """-``log_density`` of the weighted histogram, minimum zero, and its standard error by bootstrap."""
    weights = normalized_weights(log_weights)
    units = np.arange(len(bins)) if walkers is None else numbered(walkers, len(bins))
    chunks = bootstrap_counts(units.max() + 1, n_bootstrap, np.random.default_rng(seed))
    replicates = np.stack(
        [log_density(np.bincount(bins, weights * row[units], n_bins)) for rows in chunks for row in rows]
    )
    free_energy = -log_density(np.bincount(bins, weights, n_bins))
    often = np.isfinite(replicates).mean(axis=0) > _OFTEN
    often &= np.isfinite(free_energy)
    std_error = np.full(n_bins, np.nan)
    std_error[often] = np.nanstd(replicates[:, often], axis=0, ddof=1)
    return free_energy - np.nanmin(free_energy), std_error
