"""Free-energy differences, with uncertainties; all in kT.

A state is an open interval of a coordinate, the rest is everything else: ΔF = -log( P(state) / P(rest) ). Coordinates
are angles, and intervals lie on the circle, but for half lines: (0, inf) is a state of any coordinate. Any other state
is a mask of who is in it, which takes the place of the coordinate's values.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import logsumexp

from boltznce.analysis.bootstrap import bootstrap_counts, checked_samples, normal_spread, numbered, with_interval
from boltznce.analysis.pareto import pareto_k, tail_share
from boltznce.analysis.weights import effective_sample_size, normalized_weights
from boltznce.errors import UserError
from boltznce.settings import require
from boltznce.states import between, in_interval

__all__ = [
    "UNKNOWN_BIAS",
    "CorrectedFreeEnergyDifference",
    "FreeEnergyDifference",
    "choose_subset",
    "corrected_free_energy_difference",
    "ebm_bias",
    "free_energy_difference",
    "judged_by_exact",
    "stratified_free_energy_difference",
    "stratum_log_weights",
]

_FEWEST_EFFECTIVE = 30.0
_FEWEST_UNITS = 10.0  # walkers or blocks of time that either side's weight is spread over
_LARGEST_PARETO_K = 0.7
_LARGEST_K_OF_SQUARES = 1.0  # above, their mean does not exist
_LARGEST_TAIL_OF_VARIANCE = 0.5  # which is a quarter of the interval's width
UNKNOWN_BIAS = "no exact likelihoods measure the error of the EBM"
_ONE_SIDED = "a side without weight, or without exact likelihoods: the free-energy difference is unknown"


@dataclass(frozen=True, repr=False)
class FreeEnergyDifference:
    """ΔF in kT with its ``std_error`` and ``interval``.

    ``ess_*`` are effective *numbers* of samples on either side, correlation in time left aside. A side that was never
    seen leaves ``value`` at +inf (no state) or -inf (no rest), ``std_error`` at NaN, ``interval`` at None, and a
    ``message``. ``reliable``: both effective numbers are at least 30, and both Pareto-k at most 0.7 or their tail's
    share (`tail_share`, which a wrong tail changes the free energy by) smaller than the standard error; where samples
    come from walkers or blocks of time, either side's weight is spread over at least 10 of these, too.
    """

    value: float
    std_error: float
    interval: tuple[float, float] | None
    n_state: int
    n_rest: int
    ess_state: float
    ess_rest: float
    pareto_k_state: float
    pareto_k_rest: float
    tail_state: float
    tail_rest: float
    reliable: bool
    message: str

    def __repr__(self) -> str:
        value = f"ΔF = {self.value:.2f}" + (f" ± {self.std_error:.2f} kT" if self.interval else " kT")
        return with_interval(value, self.interval, ".2f", self.reliable, self.message)


@dataclass(frozen=True, repr=False)
class CorrectedFreeEnergyDifference(FreeEnergyDifference):
    """ΔF in kT of exact weights, from EBM weights and exact likelihoods of a subset; ``interval`` is the *total* one.

    ``correction_*`` are log<exp(E - log q)> (up to the constant of the EBM, which cancels between them), and
    ``correction_error`` is the standard error of their difference. ``n_*`` count likelihoods, ``pareto_k_*`` and
    ``tail_*`` are those of exp(E - log q), ``ess_*`` effective numbers: the lesser of that of exp(E - log q) and that
    of the exact weights, each as drawn or as a log-normal with the spread of its upper half would have it, whose
    largest values may not have been met. If it is not ``reliable``, ``interval`` should not be believed, whatever it
    says.
    """

    correction_state: float
    correction_rest: float
    correction_error: float


def free_energy_difference(
    angle: np.ndarray,
    log_weights: np.ndarray | None = None,
    state: tuple[float, float] = (0.0, 2.0),
    n_bootstrap: int = 1000,
    walkers: np.ndarray | None = None,
    seed: int = 0,
    confidence: float = 0.95,
    versus: np.ndarray | tuple[float, float] | None = None,
) -> FreeEnergyDifference:
    """-log( P(state) / P(rest) ) in kT for ``angle`` (n,) in radians and unnormalized ``log_weights`` (n,).

    In place of angles a mask (n,) says who is in the state. ``versus`` is another state in place of the rest: an
    interval, or a mask (n,); samples in neither do not count.

    Without ``log_weights`` all weights are equal. The percentile interval is that of a bootstrap over independent
    samples. Frames of a simulation are none: ``walkers`` (n,) tells by a number each which of G independent walkers, or
    blocks of time (`convergence.time_blocks`), they are of. With the weights W_g of walker g in state and rest,
    ``variance = G/(G-1) Σ_g (W_g,rest / W_rest - W_g,state / W_state)²``, and the interval takes a t quantile for as
    many walkers as the weight of either side is spread over, (Σ W_g)² / Σ W_g². Raises UserError for angles that are
    not finite or not in radians, NaN weights, and settings that make no sense.

    >>> free_energy_difference(np.repeat([1.0, -1.5], [100, 300]))  # a quarter in the state: log 3
    ΔF = 1.10 ± 0.11 kT [0.90, 1.32]
    >>> round(free_energy_difference([1.0, -1.0, -1.0], np.log([1.0, 2.0, 3.0])).value, 3)
    1.609
    >>> distance = np.repeat([0.3, 0.6, 0.9], [100, 200, 700])
    >>> free_energy_difference(distance < 0.4, versus=(distance > 0.5) & (distance < 0.7))
    ΔF = 0.69 ± 0.12 kT [0.48, 0.93]
    """
    require(state=state, n_bootstrap=n_bootstrap, seed=seed, confidence=confidence)
    angle, log_weights = checked_samples(angle, log_weights)
    inside = in_interval(angle, state)
    if versus is not None:
        other: Any = versus
        kept = between(inside, other if np.asarray(other).dtype == bool else in_interval(angle, other))
        options: dict[str, Any] = {"n_bootstrap": n_bootstrap, "seed": seed, "confidence": confidence}
        walkers = None if walkers is None else np.asarray(walkers)[kept]
        return free_energy_difference(inside[kept], log_weights[kept], walkers=walkers, **options)
    sides = _sides(log_weights, inside)
    known = _diagnostics("state", log_weights[inside]) | _diagnostics("rest", log_weights[~inside])
    value = float(_minus_log_ratio(sides.sum(axis=0)))
    if not np.isfinite(value):
        message = f"no sample with a weight above zero lies in the {'state' if value > 0 else 'rest'}: "
        message += "the free-energy difference is unknown"
        return FreeEnergyDifference(value, float("nan"), None, **known, reliable=False, message=message)
    if walkers is None:
        counts = bootstrap_counts(len(sides), n_bootstrap, np.random.default_rng(seed))
        replicates = np.concatenate([_minus_log_ratio(rows @ sides) for rows in counts])
        std_error, percentiles = _spread(replicates, confidence)
        return FreeEnergyDifference(value, std_error, percentiles, **known, **_judge(std_error, known))
    units = numbered(walkers, len(angle))
    shares = np.stack([np.bincount(units, side) for side in sides.T]) / sides.sum(axis=0)[:, None]
    numbers, n_units = 1.0 / np.square(shares).sum(axis=1), shares.shape[1]
    variance = n_units * np.square(shares[1] - shares[0]).sum() / (n_units - 1) if n_units > 1 else np.nan
    std_error, interval = normal_spread(value, variance, numbers.min(), confidence)
    few = [
        f"{number:.1f} walkers or blocks of time hold the {name}'s weight (at least {_FEWEST_UNITS:.0f} are needed)"
        for name, number in zip(("state", "rest"), numbers, strict=True)
        if not number >= _FEWEST_UNITS
    ]
    return FreeEnergyDifference(value, std_error, interval, **known, **_judge(std_error, known, few))


def choose_subset(
    angle: np.ndarray,
    log_weights: np.ndarray,
    n: int,
    generator: np.random.Generator,
    state: tuple[float, float] = (0.0, 2.0),
    drawn_by: str = "uniform",
) -> np.ndarray:
    """Indices of samples whose exact likelihood is worth computing: ``n // 2`` in the state and as many in the rest.

    ``"uniform"``: at random, without repeats (fewer where a side holds fewer); also right for
    ``metrics.likelihood_agreement``, and for the exact ΔF of the subset alone (`stratified_free_energy_difference`).
    ``"weights"``: with replacement in proportion to the weights, for the correction
    (`corrected_free_energy_difference`); repeats need one likelihood.
    """
    require("subset", n=n, state=state)
    if drawn_by not in ("uniform", "weights"):
        raise UserError(f"Unknown way to draw a subset {drawn_by!r}: choose uniform or weights.")
    angle, log_weights = checked_samples(angle, log_weights)
    inside, chosen = in_interval(angle, state), []
    for side in (np.flatnonzero(inside), np.flatnonzero(~inside)):
        if drawn_by == "uniform":
            chosen.append(generator.choice(side, size=min(n // 2, len(side)), replace=False))
            continue
        side = side[np.isfinite(log_weights[side])]
        if len(side):
            chosen.append(generator.choice(side, size=n // 2, p=normalized_weights(log_weights[side])))
    return np.concatenate(chosen).astype(np.int64)


def stratum_log_weights(angle: np.ndarray, subset: np.ndarray, state: tuple[float, float] = (0.0, 2.0)) -> np.ndarray:
    """log(N_s / m_s) (m,): how many of the samples, angles (n,), each member of a uniform ``subset`` (m,) stands for.

    A subset with as many samples in the state as in the rest has lost the flow's own populations; these, added to its
    exact log weights, bring them back for averages and ESS.
    """
    inside = in_interval(angle, state)
    subset = np.asarray(subset, dtype=np.int64)
    with np.errstate(divide="ignore"):  # a side without members has no one to stand for it
        sides = [np.log(side.sum()) - np.log(side[subset].sum()) for side in (inside, ~inside)]
    return np.where(inside[subset], *sides)


def stratified_free_energy_difference(
    angle: np.ndarray,
    log_weights: np.ndarray,
    subset: np.ndarray,
    state: tuple[float, float] = (0.0, 2.0),
    confidence: float = 0.95,
) -> FreeEnergyDifference:
    """ΔF in kT of samples, angles (n,), by the ``log_weights`` (m,) of a uniform ``subset`` (m,) of either side.

    With N_s samples on side s, m_s of them in the subset, ``ΔF = -log(W_state / W_rest)``, ``W_s = N_s ⟨w⟩_s``; its
    variance is the sum over both sides of ``relvar(w) / m_s + 1 / N_s``: populations are those of all samples, and the
    counts m_s, which were set, have no noise. The interval takes a t quantile for the least effective number.

    >>> angle = np.repeat([1.0, -1.5], [100, 300])
    >>> stratified_free_energy_difference(angle, np.zeros(80), np.r_[0:40, 100:140])
    ΔF = 1.10 ± 0.12 kT [0.87, 1.33]
    """
    require(state=state, confidence=confidence)
    angle, _ = checked_samples(angle, None)
    subset, log_weights = np.asarray(subset, dtype=np.int64), np.asarray(log_weights, dtype=np.float64)
    if log_weights.shape != subset.shape:
        raise UserError("An exact free-energy difference needs a log weight for each index of the subset.")
    known: dict[str, Any] = {}
    log_sums, variance = [], 0.0
    for name, side in _two_sides(angle, state):
        w = log_weights[side[subset]]
        known |= _diagnostics(name, w)
        if np.isfinite(w).any():
            log_mean, its_variance = _log_mean_exp(w)
            log_sums.append(np.log(side.sum()) + log_mean)
            variance += its_variance + 1.0 / side.sum()
    if len(log_sums) < 2:
        return FreeEnergyDifference(np.nan, np.nan, None, **known, reliable=False, message=_ONE_SIDED)
    value = float(log_sums[1] - log_sums[0])
    number = min(known["ess_state"], known["ess_rest"])
    std_error, interval = normal_spread(value, variance, number, confidence)
    return FreeEnergyDifference(value, std_error, interval, **known, **_judge(std_error, known))


def corrected_free_energy_difference(
    angle: np.ndarray,
    log_weights: np.ndarray,
    subset: np.ndarray,
    ebm_log_prob: np.ndarray,
    exact_log_prob: np.ndarray,
    state: tuple[float, float] = (0.0, 2.0),
    confidence: float = 0.95,
) -> CorrectedFreeEnergyDifference:
    """ΔF in kT of the exact weights, from EBM ``log_weights`` (n,) and both log-likelihoods (m,) of a ``subset``.

    The exact weight of a sample is its EBM weight times exp(d), d = E - log q. So with W_s the EBM weight of side s,
    ``ΔF = -log(W_state / W_rest) - (D_state - D_rest)``, where D_s is the log of the mean of exp(d) over the ``subset``
    (m,), indices that `choose_subset` drew on each side in proportion to the weights, with repeats.

    The variance behind the *total* interval is the sum over both sides of ``relvar(e^d) / m_s + ⟨w̃ e^2d⟩ / ⟨e^d⟩²``,
    means over the m_s draws, w̃ the EBM's weights that sum to one over the side: the noise of the draws by weight, and
    one over the effective number of the exact weights among all samples of the side. (The weights and exp(d) are not
    independent: w exp(d) may be far more even than either.) The interval takes a t quantile for the least effective
    number. It does not know about a tail of exp(d) that the subset did not meet: hence ``reliable``, which also wants
    the sum of w̃ e^2d to have a Pareto-k of 1 at most, or a tail that is less than half of the variance. Raises
    UserError for likelihoods that are missing or not finite.

    >>> angle = np.repeat([1.0, -1.5], [100, 300])
    >>> error = np.where(angle > 0, 0.5, 0.0)  # of the EBM, too high in the state
    >>> corrected = corrected_free_energy_difference(angle, np.zeros(400), np.arange(400), error, np.zeros(400))
    >>> corrected.correction_state, round(float(corrected.value - np.log(3.0)), 6)
    (0.5, -0.5)
    """
    require(state=state, confidence=confidence)
    angle, log_weights = checked_samples(angle, log_weights)
    subset = np.asarray(subset, dtype=np.int64)
    error = np.asarray(ebm_log_prob, dtype=np.float64) - np.asarray(exact_log_prob, dtype=np.float64)
    if error.shape != subset.shape or not np.isfinite(error).all():
        raise UserError("The correction needs finite EBM and exact log-likelihoods for each index of the subset.")
    known: dict[str, Any] = {}
    doubts, sides = [], []
    for name, side in _two_sides(angle, state):
        d, drawn = error[side[subset]], subset[side[subset]]
        once = np.unique(drawn, return_index=True)[1]
        known |= _diagnostics(name, d[once])
        if not len(d) or not np.isfinite(log_weights[side]).any():
            unknown = dict.fromkeys(("correction_state", "correction_rest", "correction_error"), np.nan)
            known = _diagnostics("state", d[:0]) | _diagnostics("rest", d[:0]) | known | unknown
            return CorrectedFreeEnergyDifference(np.nan, np.nan, None, **known, reliable=False, message=_ONE_SIDED)
        log_sum, (log_mean, of_draws) = logsumexp(log_weights[side]), _log_mean_exp(d)
        squares = log_weights[drawn] - log_sum + 2.0 * (d - log_mean)
        of_weights = float(np.exp(squares).mean())
        known[f"ess_{name}"] = min(len(d) / _cautious_mean(2.0 * (d - log_mean)), 1.0 / _cautious_mean(squares))
        k, tail = pareto_k(squares[once]), tail_share(squares[once]) * of_weights / (of_draws + of_weights)
        if k > _LARGEST_K_OF_SQUARES and tail > _LARGEST_TAIL_OF_VARIANCE:
            doubts.append(f"Pareto-k {k:.2f} of squared weights in the {name}, whose tail is most of the variance")
        sides.append((log_sum, log_mean, of_draws, of_weights))
    log_sums, corrections, of_draws, of_weights = np.transpose(sides).tolist()
    value = (log_sums[1] + corrections[1]) - (log_sums[0] + corrections[0])
    variance, number = sum(of_draws) + sum(of_weights), min(known["ess_state"], known["ess_rest"])
    std_error, interval = normal_spread(value, variance, number, confidence)
    known |= _judge(std_error, known, doubts) | {"correction_error": float(np.sqrt(sum(of_draws)))}
    known |= {"correction_state": corrections[0], "correction_rest": corrections[1]}
    return CorrectedFreeEnergyDifference(value, std_error, interval, **known)


def ebm_bias(ebm: FreeEnergyDifference, exact: FreeEnergyDifference) -> tuple[float, float]:
    """By how much ΔF of an EBM's weights is off, Δ_state - Δ_rest in kT, and the standard error of that.

    Δ_s = log⟨exp(E - log q)⟩ under the EBM's weights. ``exact`` is the corrected ΔF or that of a uniform subset.
    """
    error = exact.correction_error if isinstance(exact, CorrectedFreeEnergyDifference) else exact.std_error
    return ebm.value - exact.value, error


def judged_by_exact(ebm: FreeEnergyDifference, exact: FreeEnergyDifference | None = None) -> FreeEnergyDifference:
    """``ebm``, reliable only where its interval's half-width is more than its `ebm_bias` with two standard errors.

    The interval of an EBM's weights knows nothing of the EBM's error; without ``exact``, or where that is not reliable,
    no one does.
    """
    if ebm.interval is None:
        return ebm
    if exact is None:
        reason = UNKNOWN_BIAS
    elif not exact.reliable:
        reason = "too little is known of the error of the EBM"
    else:
        (bias, error), (low, high) = ebm_bias(ebm, exact), ebm.interval
        if abs(bias) + 2.0 * error <= (high - low) / 2.0:
            return ebm
        reason = (
            f"the EBM is off by {bias:.2f} ± {error:.2f} kT between state and rest, which may be more than the interval"
        )
    return replace(ebm, reliable=False, message="; ".join(filter(None, (ebm.message, reason))))


def _sides(log_weights: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Normalized weights (n, 2) of the state and of the rest, zero on the other side."""
    return normalized_weights(log_weights)[:, None] * np.stack([inside, ~inside], axis=1)


def _two_sides(angle: np.ndarray, state: tuple[float, float]) -> list[tuple[str, np.ndarray]]:
    inside = in_interval(angle, state)
    return [("state", inside), ("rest", ~inside)]


def _minus_log_ratio(sides: np.ndarray) -> np.ndarray:
    """-log(state / rest) of (..., 2) sums of weights; infinite where one of them is zero."""
    with np.errstate(divide="ignore"):
        return np.log(sides[..., 1]) - np.log(sides[..., 0])


def _log_mean_exp(log_terms: np.ndarray) -> tuple[float, float]:
    """Log of the mean of exp(log_terms) (m,), and its variance, relvar / m."""
    m = len(log_terms)
    log_mean = float(logsumexp(log_terms) - np.log(m))
    return log_mean, float(np.exp(log_terms - log_mean).var(ddof=min(1, m - 1)) / m)


def _cautious_mean(log_terms: np.ndarray) -> float:
    """Mean of exp(log_terms) (m,), or that of a log-normal with the spread of their upper half where that is larger."""
    upper_half = np.square(np.maximum(log_terms - np.median(log_terms), 0.0)).mean()  # is half a variance
    return float(max(np.exp(log_terms).mean(), np.exp(np.median(log_terms) + upper_half)))


def _effective_number(log_weights: np.ndarray) -> float:
    return effective_sample_size(log_weights) * len(log_weights) if np.isfinite(log_weights).any() else 0.0


def _diagnostics(name: str, log_weights: np.ndarray) -> dict[str, Any]:
    """How well side ``name`` is known by weights, their logs (m,)."""
    return {
        f"n_{name}": len(log_weights),
        f"ess_{name}": _effective_number(log_weights),
        f"pareto_k_{name}": pareto_k(log_weights),
        f"tail_{name}": tail_share(log_weights),
    }


def _spread(replicates: np.ndarray, confidence: float) -> tuple[float, tuple[float, float]]:
    """Standard deviation of the finite replicates, and the percentile interval of all (which may end at infinity)."""
    finite = replicates[np.isfinite(replicates)]
    tail = (1.0 - confidence) / 2.0
    low, high = np.nanquantile(replicates, [tail, 1.0 - tail], method="inverted_cdf")
    return float(finite.std(ddof=1)) if len(finite) > 1 else float("nan"), (float(low), float(high))


def _judge(std_error: float, known: dict[str, Any], doubts: Sequence[str] = ()) -> dict[str, Any]:
    """Whether both sides have enough effective samples, and tails that are light or carry nothing; if not, why."""
    reasons = list(doubts)
    for name in ("state", "rest"):
        number, k, tail = (known[f"{what}_{name}"] for what in ("ess", "pareto_k", "tail"))
        if number < _FEWEST_EFFECTIVE:
            reasons.append(
                f"{number:.1f} effective samples in the {name} (at least {_FEWEST_EFFECTIVE:.0f} are needed)"
            )
        elif not (k <= _LARGEST_PARETO_K or tail < std_error):
            reasons.append(f"Pareto-k {k:.2f} in the {name} (at most {_LARGEST_PARETO_K} can be trusted)")
    return {"reliable": not reasons, "message": "; ".join(reasons)}
