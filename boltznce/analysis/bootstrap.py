"""What estimates with errors share: checked samples, numbered units, bootstrap counts, intervals by t quantiles."""

from collections.abc import Iterator

import numpy as np
from scipy.special import stdtrit

from boltznce.errors import UserError

__all__ = ["bootstrap_counts", "checked_samples", "normal_spread", "numbered", "with_interval"]

_COUNTS_AT_ONCE = 2**18  # bootstrap counts held in memory, about what a cache holds


def checked_samples(angle: np.ndarray, log_weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Values and log weights, none being equal ones, of at least one sample; UserError for what is not finite.

    Both as float64, but for a mask, which stays one.
    """
    angle = np.asarray(angle)
    angle = angle if angle.dtype == bool else angle.astype(np.float64)
    log_weights = np.zeros(angle.shape) if log_weights is None else np.asarray(log_weights, dtype=np.float64)
    if angle.ndim != 1 or angle.shape != log_weights.shape or len(angle) == 0:
        shapes = f"{angle.shape} and {log_weights.shape}"
        raise UserError(f"Free energies need angles (n,) and log weights (n,) of at least one sample: got {shapes}.")
    if not np.isfinite(angle).all():
        n_bad = (~np.isfinite(angle)).sum()
        raise UserError(f"{n_bad} of {len(angle)} angles are not finite: drop these samples first.")
    return angle, log_weights


def numbered(walkers: np.ndarray, n: int) -> np.ndarray:
    """Walkers (n,) numbered from zero on."""
    if np.shape(walkers) != (n,):
        raise UserError(f"walkers= takes a number for each of {n} samples: got the shape {np.shape(walkers)}.")
    return np.unique(walkers, return_inverse=True)[1]


def bootstrap_counts(n_units: int, n_bootstrap: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """How often each unit is drawn, in chunks (replicates, n_units) that together make ``n_bootstrap`` rows."""
    rows_at_once = max(1, _COUNTS_AT_ONCE // n_units)
    for start in range(0, n_bootstrap, rows_at_once):
        rows = min(rows_at_once, n_bootstrap - start)
        index = generator.integers(0, n_units, size=(rows, n_units)) + n_units * np.arange(rows)[:, None]
        yield np.bincount(index.ravel(), minlength=rows * n_units).reshape(rows, n_units).astype(np.float64)


def normal_spread(
    value: float, variance: float, number: float, confidence: float
) -> tuple[float, tuple[float, float] | None]:
    """The standard error, and the interval by the t quantile of an effective ``number`` of independent parts."""
    if not np.isfinite(variance):
        return float("nan"), None
    std_error = float(np.sqrt(variance))
    reach = float(stdtrit(max(1.0, number - 1.0), (1.0 + confidence) / 2.0)) * std_error
    return std_error, (value - reach, value + reach)


def with_interval(said: str, interval: tuple[float, float] | None, form: str, reliable: bool, message: str) -> str:
    """A value in words, and its interval in this form; or why it is not reliable."""
    if not reliable:
        return f"{said}, not reliable: {message}"
    return f"{said} [{', '.join(format(end, form) for end in interval or ())}]"
