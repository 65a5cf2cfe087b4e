"""Free energies of states from both sides: draws of a flow and frames of data, exact log q of both, by Bennett's BAR.

Weights of draws alone have heavy tails where the flow lacks what the data have; here every sum is one of numbers
between 0 and 1, and frames show what is lacking.
"""

from collections.abc import Collection, Mapping
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

__all__ = [
    "TwoSidedFreeEnergyDifference",
    "TwoSidedStates",
    "two_sided_free_energy_difference",
    "two_sided_states",
]

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
    Of a side of many states these are of all its draws and frames together, each state weighing its population; and
    it is not reliable where states of it that lack draws hold more of its frames than the standard error.
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


@dataclass(frozen=True)
class TwoSidedStates:
    """What draws and frames say of K disjoint states, and of what any of them make up together (`two_sided_states`).

    Attributes:
        labels: (K,) of the states.
        log_weights: (K,) logs of P_q(s) exp(-f_s), populations up to a factor; NaN of a state that lacks draws or
            frames.
        variances: (K,) of these by draws, which states have not in common.
        groups: (K, G), the part of each group of frames in their errors; ``held``: in the weight of the state's frames.
        n: (K,) exact likelihoods; ``draws``: of draws; ``ess_draws``: effective ones in BAR's sum over these.
        overlap, missed: (K,), see `TwoSidedFreeEnergyDifference`.
        frames: (K,) shares of the frames' weight, which count only where a state lacks draws.
    """

    labels: np.ndarray
    log_weights: np.ndarray
    variances: np.ndarray
    groups: np.ndarray
    held: np.ndarray
    n: np.ndarray
    draws: np.ndarray
    ess_draws: np.ndarray
    overlap: np.ndarray
    missed: np.ndarray
    frames: np.ndarray

    @property
    def populations(self) -> np.ndarray:
        """(K,) that sum to one; NaN of states that lack draws or frames, on all but which they are conditional."""
        return np.where(np.isnan(self.log_weights), np.nan, np.exp(self.log_weights - self._log_sum(self._known)))

    def difference(
        self, state: Collection, rest: Collection | None = None, confidence: float = 0.95
    ) -> TwoSidedFreeEnergyDifference:
        """ΔF = -log( P(state) / P(rest) ) in kT of two sets of labels; ``rest``: by default, all others.

        With C the covariances of log P_s and P_s the shares in the own set, the variance is g C g, g = -P_s in the
        state and P_s in the rest.
        """
        inside = np.isin(self.labels, list(state))
        sides = {"state": inside, "rest": ~inside if rest is None else np.isin(self.labels, list(rest))}
        value = self._log_sum(sides["rest"]) - self._log_sum(sides["state"])
        error, interval = float("nan"), None
        known: dict[str, Any] = {}
        lost: dict[str, float] = {}
        shares = {name: self._shares(side) for name, side in sides.items()}
        if np.isfinite(value):
            gradient = shares["rest"] - shares["state"]
            some = gradient != 0
            of_groups = np.square(gradient[some] @ self.groups[some]).sum()
            error = float(np.sqrt(np.square(gradient[some]) @ self.variances[some] + of_groups))
            reach = norm.ppf(0.5 + confidence / 2) * error
            interval = (value - reach, value + reach)
        for name, side in sides.items():
            known |= {f"n_{name}": int(self.n[side].sum())} | self._diagnostics(name, shares[name])
            held = self.frames[side].sum()
            lost[name] = float(self.frames[side & ~self._known].sum() / held) if held else 0.0
        reasons = _reasons(known, {name: share for name, share in lost.items() if share > error})
        value = value if np.isfinite(value) else float("nan")
        return TwoSidedFreeEnergyDifference(
            value, error, interval, **known, reliable=not reasons, message="; ".join(reasons)
        )

    @property
    def _known(self) -> np.ndarray:
        return np.isfinite(self.log_weights)

    def _log_sum(self, side: np.ndarray) -> float:
        """Of the states that are known, log of the sum of their populations; -inf of none."""
        known = self.log_weights[side & self._known]
        return float(logsumexp(known)) if len(known) else -np.inf

    def _shares(self, side: np.ndarray) -> np.ndarray:
        """(K,) populations in a set of states, zero of others."""
        some = side & self._known
        shares = np.zeros(len(side))
        shares[some] = np.exp(self.log_weights[some] - self._log_sum(side))
        return shares

    def _diagnostics(self, name: str, shares: np.ndarray) -> dict[str, float]:
        some = shares > 0
        if not some.any():
            return {f"{key}_{name}": 0.0 for key in ("seen", "ess", "overlap")} | {f"missed_{name}": float("nan")}
        shares, held = shares[some], self.held[some]
        numbers = {
            key: 1.0 / max((np.square(shares) / of_draws[some]).sum(), np.square(shares @ of_groups).sum())
            for key, of_draws, of_groups in (
                ("seen", self.draws, held),
                ("ess", self.ess_draws, held + self.groups[some]),
            )
        }
        means = {key: shares @ getattr(self, key)[some] for key in ("overlap", "missed")}
        return {f"{key}_{name}": float(value) for key, value in (numbers | means).items()}


def two_sided_states(
    states: np.ndarray,
    subset: np.ndarray,
    log_ratio: np.ndarray,
    frames_states: np.ndarray,
    frames_log_ratio: np.ndarray,
    *,
    frames_log_weights: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> TwoSidedStates:
    """Populations of K states by BAR in each of them, between draws of a flow and frames of data: P_q(s) exp(-f_s).

    With P_q the flow's populations and f_s = -log ∫_s exp(-u) / ∫_s q. W = u + log q being the log of the ratio of the
    densities, f_s solves ``sum_draws g = sum_frames (1 - g)``, ``g = 1 / (1 + exp(log(n_draws / n_frames) + W -
    f_s))`` (Bennett 1976, J. Comput. Phys. 22, 245). How many of the frames are in which state does not enter: they may
    come from anything that is at equilibrium in each of them.

    Args:
        states: (n,) labels, numbers or words, of the states that all draws are in, whose counts are P_q.
        subset: (m,) indices of the draws whose log q is known, chosen at random in each state.
        log_ratio: (m,) u + log q of these in kT; log q normalized, or up to one constant for all states and both sets;
            +inf where u is.
        frames_states, frames_log_ratio: (k,) of the frames; -inf where the flow has no density.
        frames_log_weights: (k,) to the Boltzmann distribution; default: frames follow it.
        groups: (k,) numbers of what is independent: a walker, or a block of its time. Default: every frame. Frames
            that were drawn by weight, with repeats, are given once, their log weights the logs of how often.

    Variances are Bennett's, relvar(g) / n of the draws and relvar(1 - g) over groups of frames, which states may share,
    and those of the flow's populations, 1 / n_s. Raises UserError for arrays that do not fit, and for NaN.

    >>> rng = np.random.default_rng(0)
    >>> states = np.repeat(["a", "b"], [300, 700])
    >>> x = np.concatenate([rng.normal(0.5, 1.0, 1000), rng.normal(0.0, 1.0, 1000)])
    >>> u, log_q = x**2 / 2, -((x - 0.5) ** 2) / 2
    >>> found = two_sided_states(states, np.arange(1000), (u + log_q)[:1000], states, (u + log_q)[1000:])
    >>> found.populations.round(2), found.difference(["a"])
    (array([0.3, 0.7]), ΔF = 0.86 ± 0.07 kT [0.72, 1.01])
    """
    states, subset, frames_states = np.asarray(states), np.asarray(subset, dtype=np.int64), np.asarray(frames_states)
    k = len(frames_states)
    log_weights = np.zeros(k) if frames_log_weights is None else np.asarray(frames_log_weights, dtype=np.float64)
    groups = np.arange(k) if groups is None else np.unique(groups, return_inverse=True)[1]
    works = [np.asarray(values, dtype=np.float64) for values in (log_ratio, frames_log_ratio)]
    if works[0].shape != subset.shape or not works[1].shape == log_weights.shape == groups.shape == (k,):
        raise UserError("BAR needs a log ratio for every draw of the subset, and one, a weight and a group a frame.")
    if any(np.isnan(each).any() for each in works) or (works[1] == np.inf).any():
        raise UserError("BAR needs log ratios that are numbers: leave out draws and frames without u or log q.")
    labels, found = np.unique(np.concatenate([states, frames_states])), []
    weighs = np.isfinite(log_weights)
    shares = np.exp(log_weights - (logsumexp(log_weights) if weighs.any() else 0.0))
    for label in labels:
        drawn, frames = states[subset] == label, (frames_states == label) & weighs
        n_groups = int(groups.max(initial=-1)) + 1
        state = _bennett(works[0][drawn], works[1][frames], log_weights[frames], groups[frames], n_groups)
        count = max(1, (states == label).sum())  # of none f is NaN
        state |= {"log_weights": np.log(count) - state.pop("f"), "variances": state["variances"] + 1.0 / count}
        found.append(state | {"n": int(drawn.sum() + frames.sum()), "frames": shares[frames].sum()})
    return TwoSidedStates(labels, **{key: np.array([state[key] for state in found]) for key in found[0]})


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

    ``ΔF = -log( P_q(state) / P_q(rest) ) + f_state - f_rest``: of the interval ``state`` of a coordinate in radians,
    ``angle`` (n,) of all draws and ``frames_angle`` (k,) of the frames. All else as in `two_sided_states`.

    >>> rng = np.random.default_rng(0)
    >>> angle, x = np.repeat([1.0, -1.0], 500), np.concatenate([rng.normal(0.5, 1.0, 1000), rng.normal(0.0, 1.0, 1000)])
    >>> u, log_q = x**2 / 2 + np.tile(np.repeat([3.0, 0.0], 500), 2), -((x - 0.5) ** 2) / 2
    >>> two_sided_free_energy_difference(angle, np.arange(1000), (u + log_q)[:1000], angle, (u + log_q)[1000:])
    ΔF = 3.04 ± 0.07 kT [2.91, 3.17]
    """
    require(state=state, confidence=confidence)
    inside, frames_inside = in_interval(angle, state), in_interval(np.asarray(frames_angle), state)
    weighed = {"frames_log_weights": frames_log_weights, "groups": groups}
    found = two_sided_states(inside, subset, log_ratio, frames_inside, frames_log_ratio, **weighed)
    return found.difference([True], [False], confidence)


def _bennett(
    draws: np.ndarray, frames: np.ndarray, log_weights: np.ndarray, groups: np.ndarray, n_groups: int
) -> dict[str, Any]:
    """f of one state from log ratios W (m,) of draws and (k,) of weighted frames, and diagnostics.

    Errors are the variance of f due to draws, and of each of ``n_groups`` groups of frames its part in the error of f.
    """
    if not np.isfinite(draws).any() or not np.isfinite(frames).any():
        unknown = dict.fromkeys(("f", "variances", "draws", "ess_draws", "overlap", "missed"), float("nan"))
        return unknown | dict.fromkeys(("groups", "held"), np.full(n_groups, np.nan))
    n, weights = len(draws), normalized_weights(log_weights)
    by_group = lambda values: np.bincount(groups, values, n_groups)  # noqa: E731
    n_frames = 1.0 / np.square(by_group(weights)).sum()  # independent ones
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
        "variances": float(np.square(of_draws - 1.0 / n).sum()),
        "groups": by_group(of_frames - weights),
        "held": by_group(weights),
        "draws": n,
        "ess_draws": float(1.0 / np.square(of_draws).sum()),
        "overlap": float(np.exp(means).sum()),
        "missed": float(weights[f - frames > np.log(_MISSED)].sum()),
    }


def _reasons(known: Mapping[str, Any], lost: Mapping[str, float]) -> list[str]:
    """Why the estimate cannot be relied on; ``lost``: shares of the frames that are in states without draws."""
    found = [f"states without draws hold {share:.1%} of the frames in the {name}" for name, share in lost.items()]
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
