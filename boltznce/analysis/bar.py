"""A free-energy difference from both sides: draws of a flow and frames of data, exact log q of both, by Bennett's BAR.

Weights of draws alone have heavy tails where the flow lacks what the data have; here every sum is one of numbers
between 0 and 1, and frames show what is lacking.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_expit, logsumexp
from scipy.stats import norm

from boltznce.analysis.free_energy import FreeEnergyDifference
from boltznce.analysis.weights import normalized_weights
from boltznce.errors import UserError
from boltznce.settings import require
from boltznce.states import in_interval

__all__ = ["TwoSidedFreeEnergyDifference", "two_sided_free_energy_difference"]

_FEWEST_SEEN = 30.0  # draws, and groups of frames
_FEWEST_EFFECTIVE = 10.0  # in sums of numbers below one, which have no tail
_LEAST_OVERLAP = 0.03
_MISSED = 100.0  # p / q beyond which a flow does not cover a frame


@dataclass(frozen=True, repr=False)
class TwoSidedFreeEnergyDifference:
    """ΔF in kT with its *total* ``std_error`` and normal ``interval``; NaN and None where a side lacks either set.

    Of each side (``*_state``, ``*_rest``): ``n`` exact likelihoods; ``seen``, the smaller of the number of draws and
    the effective one (Kish) of groups of frames; ``ess``, the same of the summands of BAR's two sums; ``overlap``, 1
    where flow and data are the same and 0 where they have nothing in common (1 less the second eigenvalue of MBAR's
    overlap matrix); ``missed``, the share of the frames at which the flow has less than a hundredth of their density.
    ``reliable``: on both sides 30 are seen, ``ess`` is 10 and the overlap 0.03, or more; ``message`` says what is not.
    """

    value: float
    std_error: float
    interval: tuple[float, float] | None
    n_state: int
    n_rest: int
    seen_state: float
    seen_rest: float
    ess_state: float
    ess_rest: float
    overlap_state: float
    overlap_rest: float
    missed_state: float
    missed_rest: float
    reliable: bool
    message: str

    __repr__ = FreeEnergyDifference.__repr__


def two_sided_free_energy_difference(
    angle: np.ndarray,
    subset: np.ndarray,
    log_ratio: np.ndarray,
    frames_angle: np.ndarray,
    frames_log_ratio: np.ndarray,
    *,
    frames_log_weights: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    state: tuple[float, float] = (0.0, 2.0),
    confidence: float = 0.95,
) -> TwoSidedFreeEnergyDifference:
    """ΔF = -log( P(state) / P(rest) ) in kT by BAR in each state, between draws of a flow and frames of data.

    With P_q the flow's populations and f_s = -log ∫_s exp(-u) / ∫_s q, ``ΔF = -log( P_q(state) / P_q(rest) ) +
    f_state - f_rest``. W = u + log q being the log of the ratio of the densities, f_s solves ``sum_draws g = sum_frames
    (1 - g)``, ``g = 1 / (1 + exp(log(n_draws / n_frames) + W - f_s))`` (Bennett 1976, J. Comput. Phys. 22, 245). How
    many of the frames are in the state does not enter: they may come from anything that is at equilibrium on each side.

    Args:
        angle: (n,) the coordinate, in radians, of all draws, whose populations count.
        subset: (m,) indices of the draws whose log q is known, chosen at random on each side.
        log_ratio: (m,) u + log q of these in kT; log q normalized, or up to one constant for both sides and sets;
            +inf where u is.
        frames_angle, frames_log_ratio: (k,) of the frames; -inf where the flow has no density.
        frames_log_weights: (k,) to the Boltzmann distribution; default: frames follow it.
        groups: (k,) numbers of what is independent: a walker, or a block of its time. Default: every frame. Frames
            that were drawn by weight, with repeats, are given once, their log weights the logs of how often.

    Variances are Bennett's, relvar(g) / n of the draws and relvar(1 - g) over groups of frames, and those of the
    populations, 1 / n_state + 1 / n_rest. Raises UserError for arrays that do not fit, and for NaN.

    >>> rng = np.random.default_rng(0)
    >>> angle, x = np.repeat([1.0, -1.0], 500), np.concatenate([rng.normal(0.5, 1.0, 1000), rng.normal(0.0, 1.0, 1000)])
    >>> u, log_q = x**2 / 2 + np.tile(np.repeat([3.0, 0.0], 500), 2), -((x - 0.5) ** 2) / 2
    >>> two_sided_free_energy_difference(angle, np.arange(1000), (u + log_q)[:1000], angle, (u + log_q)[1000:])
    ΔF = 3.04 ± 0.07 kT [2.91, 3.17]
    """
    require(state=state, confidence=confidence)
    angle, subset = np.asarray(angle, dtype=np.float64), np.asarray(subset, dtype=np.int64)
    k = len(frames_angle)
    log_weights = np.zeros(k) if frames_log_weights is None else np.asarray(frames_log_weights, dtype=np.float64)
    groups = np.arange(k) if groups is None else np.unique(groups, return_inverse=True)[1]
    works = [np.asarray(values, dtype=np.float64) for values in (log_ratio, frames_log_ratio)]
    if works[0].shape != subset.shape or not works[1].shape == log_weights.shape == groups.shape == (k,):
        raise UserError("BAR needs a log ratio for every draw of the subset, and one, a weight and a group a frame.")
    if any(np.isnan(each).any() for each in works) or (works[1] == np.inf).any():
        raise UserError("BAR needs log ratios that are numbers: leave out draws and frames without u or log q.")
    inside, frames_inside = in_interval(angle, state), in_interval(np.asarray(frames_angle), state)
    sides, known = [], {}
    for name, mine, ours in (("state", inside, frames_inside), ("rest", ~inside, ~frames_inside)):
        drawn, frames = mine[subset], ours & np.isfinite(log_weights)
        n = int(drawn.sum() + frames.sum())
        side = _bennett(works[0][drawn], works[1][frames], log_weights[frames], groups[frames], k)
        sides.append(side)
        known |= {f"n_{name}": n} | {f"{key}_{name}": side[key] for key in ("seen", "ess", "overlap", "missed")}
    with np.errstate(divide="ignore"):
        counts = np.array([inside.sum(), (~inside).sum()], dtype=np.float64)
        value = float(np.log(counts[1]) - np.log(counts[0]) + sides[0]["f"] - sides[1]["f"])
        of_draws, of_groups = sides[0]["variance"] + sides[1]["variance"], sides[0]["groups"] - sides[1]["groups"]
        error = float(np.sqrt(of_draws + np.square(of_groups).sum() + (1 / counts).sum()))
    reasons = _reasons(known)
    if not np.isfinite(value):
        value, error = float("nan"), float("nan")
    reach = norm.ppf(0.5 + confidence / 2) * error
    interval = (value - reach, value + reach) if np.isfinite(error) else None
    return TwoSidedFreeEnergyDifference(
        value, error, interval, **known, reliable=not reasons, message="; ".join(reasons)
    )


def _bennett(
    draws: np.ndarray, frames: np.ndarray, log_weights: np.ndarray, groups: np.ndarray, n_groups: int
) -> dict[str, Any]:
    """f of one side from log ratios W (m,) of draws and (k,) of weighted frames, and diagnostics.

    Errors are the variance of f due to draws, and of each of ``n_groups`` groups of frames its part in the error of f.
    """
    if not np.isfinite(draws).any() or not np.isfinite(frames).any():
        unknown = dict.fromkeys(("f", "variance", "groups", "missed"), float("nan"))
        return unknown | dict.fromkeys(("seen", "ess", "overlap"), 0.0)
    n, weights = len(draws), normalized_weights(log_weights)
    by_group = lambda values: np.bincount(groups, values, n_groups)  # noqa: E731
    n_frames = 1.0 / np.square(by_group(weights)).sum()
    m = np.log(n / n_frames)

    def logs(f: float) -> tuple[np.ndarray, np.ndarray]:
        """Of every draw's share in the mean of g, and of every frame's in the mean of 1 - g."""
        with np.errstate(divide="ignore"):
            return log_expit(f - m - draws) - np.log(n), log_expit(m + frames - f) + np.log(weights)

    def excess(f: float) -> float:
        of_draws, of_frames = map(logsumexp, logs(f))
        return of_draws - of_frames + m

    known = np.isfinite(frames)
    nearest, heaviest = draws.min(), frames[known][weights[known].argmax()]
    low = min(nearest, heaviest) + np.log(weights[known].max()) - 100.0  # where nothing of the draws counts, and above
    f = brentq(excess, low + m, max(nearest, frames[known].max()) + 100.0 + m, maxiter=1000)  # nothing of the frames
    means = [logsumexp(each) for each in logs(f)]
    of_draws, of_frames = (np.exp(each - mean) for each, mean in zip(logs(f), means, strict=True))
    return {
        "f": f,
        "variance": float(np.square(of_draws - 1.0 / n).sum()),
        "groups": by_group(of_frames - weights),
        "seen": float(min(n, n_frames)),
        "ess": float(1.0 / max(np.square(of_draws).sum(), np.square(by_group(of_frames)).sum())),
        "overlap": float(np.exp(means).sum()),
        "missed": float(weights[f - frames > np.log(_MISSED)].sum()),
    }


def _reasons(known: Mapping[str, Any]) -> list[str]:
    """Why the estimate cannot be relied on."""
    found = []
    for name in ("state", "rest"):
        seen, number, overlap = (known[f"{key}_{name}"] for key in ("seen", "ess", "overlap"))
        if seen < _FEWEST_SEEN:
            found.append(f"{seen:.1f} draws or independent frames in the {name} (at least 30 are needed)")
        elif number < _FEWEST_EFFECTIVE or overlap < _LEAST_OVERLAP:
            found.append(
                f"draws and frames in the {name} overlap by {overlap:.3f}, with {number:.1f} of them in common (at "
                "least 0.03 and 10 are needed)"
            )
    return found
