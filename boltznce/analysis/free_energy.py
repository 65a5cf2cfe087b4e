"""Free-energy differences and profiles along a coordinate, with uncertainties; all in kT.

A state is an open interval of the coordinate, the rest is everything else: ΔF = -log( P(state) / P(rest) ). Coordinates
are angles, and intervals lie on the circle, but for half lines: (0, inf) is a state of any coordinate.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from boltznce.analysis.pareto import pareto_k, tail_share
from boltznce.analysis.weights import effective_sample_size, normalized_weights
from boltznce.errors import UserError
from boltznce.settings import require
from boltznce.states import in_interval, require_radians

__all__ = [
    "CorrectedFreeEnergyDifference",
    "FreeEnergyDifference",
    "FreeEnergyProfile",
    "choose_subset",
    "corrected_free_energy_difference",
    "free_energy_difference",
    "free_energy_profile",
    "stratum_log_weights",
]

_FEWEST_EFFECTIVE = 30.0
_LARGEST_PARETO_K = 0.7
_COUNTS_AT_ONCE = 2**18  # bootstrap counts held in memory, about what a cache holds


@dataclass(frozen=True, repr=False)
class FreeEnergyDifference:
    """ΔF in kT with its bootstrap ``std_error`` and percentile ``interval``.

    ``ess_*`` are effective *numbers* of samples on either side, correlation in time left aside. A side that was never
    seen leaves ``value`` at +inf (no state) or -inf (no rest), ``std_error`` at NaN, ``interval`` at None, and a
    ``message``. ``reliable``: both effective numbers are at least 30, and both Pareto-k at most 0.7 or their tail's
    share (`tail_share`, which a wrong tail changes the free energy by) smaller than the standard error.
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
        if not self.reliable:
            return f"{value}, not reliable: {self.message}"
        return f"{value} [{', '.join(f'{end:.2f}' for end in self.interval)}]"


@dataclass(frozen=True, repr=False)
class CorrectedFreeEnergyDifference(FreeEnergyDifference):
    """ΔF in kT of exact weights, from EBM weights and exact likelihoods of a subset; ``interval`` is the *total* one.

    ``correction_*`` are log<exp(E - log q)> (up to the constant of the EBM, which cancels between them); ``ess_*``
    (effective numbers), ``pareto_k_*`` and ``tail_*`` are the worse of the two sums they are made of. If it is not
    ``reliable``, ``interval`` should not be believed, whatever it says.
    """

    correction_state: float
    correction_rest: float


@dataclass(frozen=True)
class FreeEnergyProfile:
    """F in kT at ``centres`` (bins,) on the circle or between limits, minimum zero, NaN in gaps (angles never seen).

    ``std_error`` is that of -log p(angle), p normalized; NaN in gaps and where most bootstrap replicates miss the bin.
    """

    centres: np.ndarray
    free_energy: np.ndarray
    std_error: np.ndarray


def free_energy_difference(
    angle: np.ndarray,
    log_weights: np.ndarray | None = None,
    state: tuple[float, float] = (0.0, 2.0),
    n_bootstrap: int = 1000,
    n_blocks: int | None = None,
    seed: int = 0,
    confidence: float = 0.95,
) -> FreeEnergyDifference:
    """-log( P(state) / P(rest) ) in kT for ``angle`` (n,) in radians and unnormalized ``log_weights`` (n,).

    Without ``log_weights`` all weights are equal. The bootstrap draws samples, or, for a time series, ``n_blocks``
    contiguous blocks of it (each much longer than the correlation time). Raises UserError for angles that are not
    finite or not in radians, NaN weights, and settings that make no sense.

    >>> free_energy_difference(np.repeat([1.0, -1.5], [100, 300]))  # a quarter in the state: log 3
    ΔF = 1.10 ± 0.11 kT [0.90, 1.32]
    >>> round(free_energy_difference([1.0, -1.0, -1.0], np.log([1.0, 2.0, 3.0])).value, 3)
    1.609
    """
    require(state=state, n_bootstrap=n_bootstrap, seed=seed, confidence=confidence)
    angle, log_weights = _checked(angle, log_weights)
    inside = in_interval(angle, state)
    sides = _sides(log_weights, inside)
    known = _diagnostics("state", [log_weights[inside]]) | _diagnostics("rest", [log_weights[~inside]])
    value = float(_minus_log_ratio(sides.sum(axis=0)))
    if not np.isfinite(value):
        message = f"no sample with a weight above zero lies in the {'state' if value > 0 else 'rest'}: "
        message += "the free-energy difference is unknown"
        return FreeEnergyDifference(value, float("nan"), None, **known, reliable=False, message=message)
    units = sides if n_blocks is None else np.add.reduceat(sides, _block_starts(len(angle), n_blocks))
    counts = _bootstrap_counts(len(units), n_bootstrap, np.random.default_rng(seed))
    spread = _spread(np.concatenate([_minus_log_ratio(rows @ units) for rows in counts]), confidence)
    return FreeEnergyDifference(value, *spread, **known, **_judge(spread[0], known))


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
    ``metrics.likelihood_agreement``, and with `stratum_log_weights` for the exact ΔF of the subset alone.
    ``"weights"``: with replacement in proportion to the weights; repeats need one likelihood. It makes the correction
    far more precise where the weights are uneven.
    """
    require("subset", n=n, state=state)
    angle, log_weights = _checked(angle, log_weights)
    uniform, inside, chosen = _is_uniform(drawn_by), in_interval(angle, state), []
    for side in (np.flatnonzero(inside), np.flatnonzero(~inside)):
        if uniform:
            chosen.append(generator.choice(side, size=min(n // 2, len(side)), replace=False))
            continue
        side = side[np.isfinite(log_weights[side])]
        if len(side):
            chosen.append(generator.choice(side, size=n // 2, p=normalized_weights(log_weights[side])))
    return np.concatenate(chosen).astype(np.int64)


def stratum_log_weights(angle: np.ndarray, subset: np.ndarray, state: tuple[float, float] = (0.0, 2.0)) -> np.ndarray:
    """log(N_s / m_s) (m,): how many of the samples, angles (n,), each member of a uniform ``subset`` (m,) stands for.

    A subset with as many samples in the state as in the rest has lost the flow's own populations; these, added to its
    exact log weights, bring them back for `free_energy_difference` and ESS.
    """
    inside = in_interval(angle, state)
    subset = np.asarray(subset, dtype=np.int64)
    with np.errstate(divide="ignore"):  # a side without members has no one to stand for it
        sides = [np.log(side.sum()) - np.log(side[subset].sum()) for side in (inside, ~inside)]
    return np.where(inside[subset], *sides)


def corrected_free_energy_difference(
    angle: np.ndarray,
    log_weights: np.ndarray,
    subset: np.ndarray,
    ebm_log_prob: np.ndarray,
    exact_log_prob: np.ndarray,
    state: tuple[float, float] = (0.0, 2.0),
    drawn_by: str = "uniform",
    n_bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> CorrectedFreeEnergyDifference:
    """ΔF in kT of the exact weights, from EBM ``log_weights`` (n,) and both log-likelihoods (m,) of a ``subset``.

    The exact weight of a sample is its EBM weight times exp(d), d = E - log q. So with W_s the EBM weight of side s,
    ``ΔF = -log(W_state / W_rest) - (D_state - D_rest)``, where ``D_s = log( sum_subset w exp(d) / sum_subset w )``.
    ``subset`` (m,) indexes the samples; within each side it was drawn as ``drawn_by`` says (see `choose_subset`), and
    for ``"weights"`` the sums over it have no factor w, since the draw has it already.

    The *total* interval is the percentile interval of ΔF over joint bootstrap replicates, so it holds the noise of both
    parts. ``uniform``: all n samples are drawn anew, the subset's among them with the same counts, which keeps the
    covariance of the parts (with m = n it is the bootstrap of the exact weights). ``weights``: W_s from all n samples
    drawn anew, D_s from m' draws out of the m, where 1/m' = 1/m + 1/ESS_s: the mean over m draws varies with the draws
    and with the ESS_s effective samples that they came from. Neither knows about a tail of exp(d) that the subset did
    not meet: hence ``reliable``. Raises UserError for likelihoods that are missing or not finite.

    >>> angle = np.repeat([1.0, -1.5], [100, 300])
    >>> error = np.where(angle > 0, 0.5, 0.0)  # of the EBM, too high in the state
    >>> corrected = corrected_free_energy_difference(angle, np.zeros(400), np.arange(400), error, np.zeros(400))
    >>> corrected.correction_state, round(float(corrected.value - np.log(3.0)), 6)
    (0.5, -0.5)
    """
    require(state=state, n_bootstrap=n_bootstrap, seed=seed, confidence=confidence)
    angle, log_weights = _checked(angle, log_weights)
    subset = np.asarray(subset, dtype=np.int64)
    error = np.asarray(ebm_log_prob, dtype=np.float64) - np.asarray(exact_log_prob, dtype=np.float64)
    if error.shape != subset.shape or not np.isfinite(error).all():
        raise UserError("The correction needs finite EBM and exact log-likelihoods for each index of the subset.")
    uniform, inside = _is_uniform(drawn_by), in_interval(angle, state)
    members = [np.flatnonzero(side[subset]) for side in (inside, ~inside)]
    bases = [log_weights[subset[member]] if uniform else np.zeros(len(member)) for member in members]
    terms = [base + error[member] for base, member in zip(bases, members, strict=True)]
    known: dict[str, Any] = {}
    for name, member, *sums in zip(("state", "rest"), members, terms, bases, strict=True):
        _, first, repeats = np.unique(subset[member], return_index=True, return_counts=True)
        known |= _diagnostics(name, [each[first] for each in sums[: 1 + uniform]], repeats)
    sides = _sides(log_weights, inside)
    ebm_value = _minus_log_ratio(sides.sum(axis=0))
    nan = float("nan")
    if not np.isfinite(ebm_value) or any(not np.isfinite(each).any() for each in terms):
        message = "a side without weight, or without exact likelihoods: the corrected free-energy difference is unknown"
        known |= {"reliable": False, "message": message, "correction_state": nan, "correction_rest": nan}
        return CorrectedFreeEnergyDifference(nan, nan, None, **known)

    state_d, rest_d = (float(_log_mean(t, base, np.ones((1, len(t))))[0]) for t, base in zip(terms, bases, strict=True))
    generator, replicates = np.random.default_rng(seed), []
    for counts in _bootstrap_counts(len(angle), n_bootstrap, generator):
        d = []
        for member, t, base, side in zip(members, terms, bases, (inside, ~inside), strict=True):
            subset_counts = counts[:, subset[member]] if uniform else None
            if subset_counts is None:
                m, n_draws = len(member), 1.0 / (1.0 / len(member) + 1.0 / _effective_number(log_weights[side]))
                subset_counts = generator.multinomial(max(1, round(n_draws)), np.full(m, 1.0 / m), size=len(counts))
            d.append(_log_mean(t, base, subset_counts))
        replicates.append(_minus_log_ratio(counts @ sides) - (d[0] - d[1]))
    spread = _spread(np.concatenate(replicates), confidence)
    known |= _judge(spread[0], known) | {"correction_state": state_d, "correction_rest": rest_d}
    return CorrectedFreeEnergyDifference(float(ebm_value - (state_d - rest_d)), *spread, **known)


def free_energy_profile(
    angle: np.ndarray,
    log_weights: np.ndarray | None = None,
    n_bins: int = 100,
    kappa: float | None = None,
    n_bootstrap: int = 200,
    n_blocks: int | None = None,
    seed: int = 0,
    limits: tuple[float, float] | None = None,
) -> FreeEnergyProfile:
    """-log p(angle) in kT on ``n_bins`` bins of (-π, π]: a weighted histogram, or with ``kappa`` a kernel estimate.

    The kernel is von Mises' and acts on the bins (keep them narrower than its width 1/√kappa); a bin with nothing seen
    within one width is a gap, and one with fewer than three samples has no standard error. ``limits`` are for a
    coordinate that is no angle: the histogram is that of the samples between them, and takes no kernel.

    >>> free_energy_profile([-1.5, 1.5, 1.5, 1.5], n_bins=2, n_bootstrap=20).free_energy.round(3)
    array([1.099, 0.   ])
    """
    require(n_bins=n_bins, n_bootstrap=n_bootstrap, seed=seed, **({} if kappa is None else {"kappa": kappa}))
    angle, log_weights = _checked(angle, log_weights)
    if limits is None:
        require_radians(angle)
    else:
        if kappa is not None:
            raise UserError("A profile between limits is a histogram: leave out kappa.")
        log_weights = np.where((angle >= limits[0]) & (angle < limits[1]), log_weights, -np.inf)
    low, high = limits or (-np.pi, np.pi)
    weights = normalized_weights(log_weights)
    width = (high - low) / n_bins
    bins = np.floor((angle - low) / width).astype(np.int64) % n_bins
    offsets = 2.0 * np.pi / n_bins * np.arange(n_bins)
    kernel = np.eye(1, n_bins)[0] if kappa is None else np.exp(kappa * (np.cos(offsets) - 1.0))
    kernel_spectrum = np.fft.rfft(kernel / kernel.sum())
    reach = 0 if kappa is None else int(kappa**-0.5 / width)
    tiny = np.finfo(float).tiny

    def log_density(histogram: np.ndarray) -> np.ndarray:
        smooth = histogram if kappa is None else np.fft.irfft(np.fft.rfft(histogram) * kernel_spectrum, n_bins)
        seen = np.any([np.roll(histogram > 0.0, shift) for shift in range(-reach, reach + 1)], axis=0)
        total = max(histogram.sum(), tiny)  # a replicate may hold nothing that weighs anything
        return np.log(np.where(seen, np.maximum(smooth, tiny) / (total * width), np.nan))

    order = np.arange(len(angle))
    units = order if n_blocks is None else np.searchsorted(_block_starts(len(angle), n_blocks), order, "right") - 1
    chunks = _bootstrap_counts(units[-1] + 1, n_bootstrap, np.random.default_rng(seed))
    replicates = np.stack(
        [log_density(np.bincount(bins, weights * row[units], n_bins)) for rows in chunks for row in rows]
    )
    free_energy = -log_density(np.bincount(bins, weights, n_bins))
    often = np.isfinite(replicates).mean(axis=0) > 0.95  # with three samples or more; the spread of fewer says nothing
    often &= np.isfinite(free_energy)
    std_error = np.full(n_bins, np.nan)
    std_error[often] = np.nanstd(replicates[:, often], axis=0, ddof=1)
    return FreeEnergyProfile(low + width * (np.arange(n_bins) + 0.5), free_energy - np.nanmin(free_energy), std_error)


def _checked(angle: np.ndarray, log_weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    angle = np.asarray(angle, dtype=np.float64)
    log_weights = np.zeros(angle.shape) if log_weights is None else np.asarray(log_weights, dtype=np.float64)
    if angle.ndim != 1 or angle.shape != log_weights.shape or len(angle) == 0:
        shapes = f"{angle.shape} and {log_weights.shape}"
        raise UserError(f"Free energies need angles (n,) and log weights (n,) of at least one sample: got {shapes}.")
    if not np.isfinite(angle).all():
        n_bad = (~np.isfinite(angle)).sum()
        raise UserError(f"{n_bad} of {len(angle)} angles are not finite: drop these samples first.")
    return angle, log_weights


def _is_uniform(drawn_by: str) -> bool:
    if drawn_by not in ("uniform", "weights"):
        raise UserError(f"Unknown way to draw a subset {drawn_by!r}: choose uniform or weights.")
    return drawn_by == "uniform"


def _sides(log_weights: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Normalized weights (n, 2) of the state and of the rest, zero on the other side."""
    return normalized_weights(log_weights)[:, None] * np.stack([inside, ~inside], axis=1)


def _block_starts(n: int, n_blocks: int) -> np.ndarray:
    if not 2 <= n_blocks <= n:
        raise UserError(f"A bootstrap over blocks needs 2 to {n} blocks (the number of samples): got {n_blocks}.")
    return np.arange(n_blocks) * n // n_blocks


def _bootstrap_counts(n_units: int, n_bootstrap: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """How often each unit is drawn, in chunks (replicates, n_units) that together make ``n_bootstrap`` rows."""
    rows_at_once = max(1, _COUNTS_AT_ONCE // n_units)
    for start in range(0, n_bootstrap, rows_at_once):
        rows = min(rows_at_once, n_bootstrap - start)
        index = generator.integers(0, n_units, size=(rows, n_units)) + n_units * np.arange(rows)[:, None]
        yield np.bincount(index.ravel(), minlength=rows * n_units).reshape(rows, n_units).astype(np.float64)


def _minus_log_ratio(sides: np.ndarray) -> np.ndarray:
    """-log(state / rest) of (..., 2) sums of weights; infinite where one of them is zero."""
    with np.errstate(divide="ignore"):
        return np.log(sides[..., 1]) - np.log(sides[..., 0])


def _log_mean(log_terms: np.ndarray, log_base: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """log( sum c exp(log_terms) / sum c exp(log_base) ) for each row c of ``counts`` (rows, m), NaN if all zero."""
    term_scale, base_scale = log_terms.max(), log_base.max()
    with np.errstate(divide="ignore", invalid="ignore"):
        numerator = np.log(counts @ np.exp(log_terms - term_scale))
        return numerator - np.log(counts @ np.exp(log_base - base_scale)) + (term_scale - base_scale)


def _effective_number(log_weights: np.ndarray) -> float:
    return effective_sample_size(log_weights) * len(log_weights) if np.isfinite(log_weights).any() else 0.0


def _diagnostics(name: str, sums: Sequence[np.ndarray], repeats: np.ndarray | int = 1) -> dict[str, Any]:
    """How well side ``name`` is known, the worse of ``sums``: their summands' logs (m,), each met so many times.

    The tail is that of the summands themselves: how often each was drawn makes steps of whole numbers, which have no
    tail.
    """
    return {
        f"n_{name}": len(sums[0]),
        f"ess_{name}": min(_effective_number(each + np.log(repeats)) for each in sums),
        f"pareto_k_{name}": float(np.max([pareto_k(each) for each in sums])),  # NaN, unknown, wins
        f"tail_{name}": float(np.max([tail_share(each) for each in sums])),
    }


def _spread(replicates: np.ndarray, confidence: float) -> tuple[float, tuple[float, float]]:
    """Standard deviation of the finite replicates, and the percentile interval of all (which may end at infinity)."""
    finite = replicates[np.isfinite(replicates)]
    tail = (1.0 - confidence) / 2.0
    low, high = np.nanquantile(replicates, [tail, 1.0 - tail], method="inverted_cdf")
    return float(finite.std(ddof=1)) if len(finite) > 1 else float("nan"), (float(low), float(high))


def _judge(std_error: float, known: dict[str, Any]) -> dict[str, Any]:
    """Whether both sides have enough effective samples, and tails that are light or carry nothing; if not, why."""
    reasons = []
    for name in ("state", "rest"):
        number, k, tail = (known[f"{what}_{name}"] for what in ("ess", "pareto_k", "tail"))
        if number < _FEWEST_EFFECTIVE:
            reasons.append(
                f"{number:.1f} effective samples in the {name} (at least {_FEWEST_EFFECTIVE:.0f} are needed)"
            )
        elif not (k <= _LARGEST_PARETO_K or tail < std_error):
            reasons.append(f"Pareto-k {k:.2f} in the {name} (at most {_LARGEST_PARETO_K} can be trusted)")
    return {"reliable": not reasons, "message": "; ".join(reasons)}
