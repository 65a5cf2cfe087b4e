"""Free-energy differences and profiles along a coordinate, with uncertainties; all in kT.

A state is an open interval of the coordinate, the rest is everything else: dF = -log( P(state) / P(rest) ). Coordinates are angles,
and intervals lie on the circle, but for half lines: (0, inf) is a state of any coordinate.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from boltznce.analysis.pareto import pareto_k, tail_share
from boltznce.analysis.reweighting import effective_sample_size, normalized_weights
from boltznce.errors import UserError
from boltznce.states import in_interval

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


@dataclass(frozen=True)
class FreeEnergyDifference:
    """dF in kT with its bootstrap ``std_error`` and percentile ``interval``.

    ``ess_state`` and ``ess_rest`` are effective *numbers* of samples on either side, correlation in time left aside. A side that was
    never seen leaves ``value`` at +inf (no state) or -inf (no rest), ``std_error`` at NaN, ``interval`` at None, and a ``message``.
    ``reliable``: both effective numbers are at least 30, and both Pareto-k at most 0.7 or their tail's share (`tail_share`, which a wrong
    tail changes the free energy by) smaller than the standard error.
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


@dataclass(frozen=True)
class CorrectedFreeEnergyDifference:
    """dF in kT of exact weights, from EBM weights and exact likelihoods of a subset; ``interval`` is the *total* one.

    ``correction_state`` and ``correction_rest`` are log<exp(E - log q)> (up to the constant of the EBM, which cancels between them);
    ``ess_*`` (effective numbers), ``pareto_k_*`` and ``tail_*`` are the worse of the two sums they are made of. ``reliable`` as for
    FreeEnergyDifference; if it is not, ``interval`` should not be believed, whatever it says.
    """

    value: float
    std_error: float
    interval: tuple[float, float] | None
    correction_state: float
    correction_rest: float
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
    """-log( P(state) / P(rest) ) in kT for ``angle`` (n,) in radians and unnormalized ``log_weights`` (n,), equal weights if None.

    The bootstrap draws samples, or, for a time series, ``n_blocks`` contiguous blocks of it (each much longer than the correlation time).
    Exact likelihoods of all samples need nothing more: give the exact log weights.
    """
    angle, log_weights = _checked(angle, log_weights)
    inside = in_interval(angle, state)
    n_state = int(inside.sum())
    diagnostics = {
        "n_state": n_state,
        "n_rest": len(angle) - n_state,
        "ess_state": _effective_number(log_weights[inside]),
        "ess_rest": _effective_number(log_weights[~inside]),
        "pareto_k_state": pareto_k(log_weights[inside]),
        "pareto_k_rest": pareto_k(log_weights[~inside]),
        "tail_state": tail_share(log_weights[inside]),
        "tail_rest": tail_share(log_weights[~inside]),
    }
    weights = normalized_weights(log_weights)
    sides = np.stack([weights * inside, weights * ~inside], axis=1)
    value = _minus_log_ratio(sides.sum(axis=0))
    if not np.isfinite(value):
        unseen = "state" if value > 0 else "rest"
        message = f"no sample with a weight above zero lies in the {unseen}: the free-energy difference is unknown"
        return FreeEnergyDifference(value, float("nan"), None, **diagnostics, reliable=False, message=message)
    units = sides if n_blocks is None else np.add.reduceat(sides, _block_starts(len(angle), n_blocks))
    generator = np.random.default_rng(seed)
    replicates = np.concatenate(
        [_minus_log_ratio(counts @ units) for counts in _bootstrap_counts(len(units), n_bootstrap, generator)]
    )
    std_error, interval = _spread(replicates, confidence)
    reliable, message = _judge(std_error, **diagnostics)
    return FreeEnergyDifference(value, std_error, interval, **diagnostics, reliable=reliable, message=message)


def choose_subset(
    angle: np.ndarray,
    log_weights: np.ndarray,
    n: int,
    generator: np.random.Generator,
    state: tuple[float, float] = (0.0, 2.0),
    drawn_by: str = "uniform",
) -> np.ndarray:
    """Indices of samples whose exact likelihood is worth computing: ``n // 2`` in the state and as many in the rest.

    ``"uniform"``: at random, without repeats (fewer where a side holds fewer); also right for ``metrics.likelihood_agreement``, and
    with :func:`stratum_log_weights` for the exact dF of the subset alone.
    ``"weights"``: with replacement in proportion to the weights; repeats need one likelihood. It makes the correction far more precise
    where the weights are uneven.
    """
    angle, log_weights = _checked(angle, log_weights)
    inside = in_interval(angle, state)
    chosen = []
    for side in (np.flatnonzero(inside), np.flatnonzero(~inside)):
        if drawn_by == "uniform":
            chosen.append(generator.choice(side, size=min(n // 2, len(side)), replace=False))
        elif drawn_by == "weights":
            side = side[np.isfinite(log_weights[side])]
            if len(side):
                chosen.append(generator.choice(side, size=n // 2, p=normalized_weights(log_weights[side])))
        else:
            raise UserError(f"Unknown way to draw a subset {drawn_by!r}: choose uniform or weights.")
    return np.concatenate(chosen).astype(np.int64)


def stratum_log_weights(angle: np.ndarray, subset: np.ndarray, state: tuple[float, float] = (0.0, 2.0)) -> np.ndarray:
    """log(N_s / m_s) (m,): how many of the samples, angles (n,), each member of a uniform ``subset`` (m,) stands for.

    A subset with as many samples in the state as in the rest has lost the flow's own populations; these, added to its exact log weights,
    bring them back for :func:`free_energy_difference` and ESS.
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
    """dF in kT of the exact weights, from EBM ``log_weights`` (n,) of all samples and both log-likelihoods (m,) of a ``subset``.

    The exact weight of a sample is its EBM weight times exp(d), d = E - log q. So with W_s the EBM weight of side s,
    ``dF = -log(W_state / W_rest) - (D_state - D_rest)``, where ``D_s = log( sum_subset w exp(d) / sum_subset w )``.
    ``subset`` (m,) indexes the samples; within each side it was drawn as ``drawn_by`` says (see :func:`choose_subset`),
    and for ``"weights"`` the sums over it have no factor w, since the draw has it already.

    The *total* interval is the percentile interval of dF over joint bootstrap replicates, so it holds the noise of both parts.
    ``uniform``: all n samples are drawn anew, the subset's among them with the same counts, which keeps the covariance of the parts (with
    m = n it is the bootstrap of the exact weights). ``weights``: W_s from all n samples drawn anew, D_s from m' draws out of the m, where
    1/m' = 1/m + 1/ESS_s: the mean over m draws varies with the draws and with the ESS_s effective samples that they came from.
    Neither knows about a tail of exp(d) that the subset did not meet: hence ``reliable``.
    """
    angle, log_weights = _checked(angle, log_weights)
    subset = np.asarray(subset, dtype=np.int64)
    error = np.asarray(ebm_log_prob, dtype=np.float64) - np.asarray(exact_log_prob, dtype=np.float64)
    if error.shape != subset.shape or not np.isfinite(error).all():
        raise UserError(
            "The correction needs one finite EBM and one finite exact log-likelihood for each index of the subset."
        )
    if drawn_by not in ("uniform", "weights"):
        raise UserError(f"Unknown way to draw a subset {drawn_by!r}: choose uniform or weights.")
    inside = in_interval(angle, state)
    members = [np.flatnonzero(side[subset]) for side in (inside, ~inside)]
    bases = [log_weights[subset[member]] if drawn_by == "uniform" else np.zeros(len(member)) for member in members]
    terms = [base + error[member] for base, member in zip(bases, members, strict=True)]
    effective, tails, shares = [], [], []
    for member, term, base in zip(members, terms, bases, strict=True):
        _, first, repeats = np.unique(subset[member], return_index=True, return_counts=True)
        sums = (term, base) if drawn_by == "uniform" else (term,)
        per_sample = [summands[first] + np.log(repeats) for summands in sums]
        effective.append(min(_effective_number(summands) for summands in per_sample))
        # the tail is that of the summands themselves: how often each was drawn makes steps of whole numbers, which have no tail
        tails.append(float(np.max([pareto_k(summands[first]) for summands in sums])))  # NaN, unknown, wins
        shares.append(float(np.max([tail_share(summands[first]) for summands in sums])))
    diagnostics = {
        "n_state": len(np.unique(subset[members[0]])),
        "n_rest": len(np.unique(subset[members[1]])),
        "ess_state": effective[0],
        "ess_rest": effective[1],
        "pareto_k_state": tails[0],
        "pareto_k_rest": tails[1],
        "tail_state": shares[0],
        "tail_rest": shares[1],
    }
    weights = normalized_weights(log_weights)
    sides = np.stack([weights * inside, weights * ~inside], axis=1)
    ebm_value = _minus_log_ratio(sides.sum(axis=0))
    if not np.isfinite(ebm_value) or any(not np.isfinite(t).any() for t in terms):
        message = "a side without weight, or without exact likelihoods: the corrected free-energy difference is unknown"
        nan = float("nan")
        return CorrectedFreeEnergyDifference(nan, nan, None, nan, nan, **diagnostics, reliable=False, message=message)

    corrections = [_log_mean(t, base, np.ones((1, len(t))))[0] for t, base in zip(terms, bases, strict=True)]
    generator = np.random.default_rng(seed)
    replicates = []
    for counts in _bootstrap_counts(len(angle), n_bootstrap, generator):
        delta = []
        for member, t, base, side in zip(members, terms, bases, (inside, ~inside), strict=True):
            if drawn_by == "uniform":
                subset_counts = counts[:, subset[member]]
            else:
                n_draws = 1.0 / (1.0 / len(member) + 1.0 / _effective_number(log_weights[side]))
                subset_counts = generator.multinomial(
                    max(1, round(n_draws)), np.full(len(member), 1.0 / len(member)), size=len(counts)
                )
            delta.append(_log_mean(t, base, subset_counts))
        replicates.append(_minus_log_ratio(counts @ sides) - (delta[0] - delta[1]))
    std_error, interval = _spread(np.concatenate(replicates), confidence)
    reliable, message = _judge(std_error, **diagnostics)
    value = ebm_value - (corrections[0] - corrections[1])
    return CorrectedFreeEnergyDifference(
        float(value),
        std_error,
        interval,
        float(corrections[0]),
        float(corrections[1]),
        **diagnostics,
        reliable=reliable,
        message=message,
    )


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
    """-log p(angle) in kT on ``n_bins`` bins of (-pi, pi]: a weighted histogram, or with ``kappa`` a von Mises kernel estimate.

    The kernel acts on the bins (keep them narrower than its width 1/sqrt(kappa)); a bin with nothing seen within one width is a gap, and
    one with fewer than three samples has no standard error.
    ``limits`` are for a coordinate that is no angle: the histogram is that of the samples between them, and takes no kernel.
    """
    angle, log_weights = _checked(angle, log_weights)
    if limits is not None:
        if kappa is not None:
            raise UserError("A profile between limits is a histogram: leave out kappa.")
        log_weights = np.where((angle >= limits[0]) & (angle < limits[1]), log_weights, -np.inf)
    low, high = (-np.pi, np.pi) if limits is None else limits
    weights = normalized_weights(log_weights)
    width = (high - low) / n_bins
    bins = np.floor((angle - low) / width).astype(np.int64) % n_bins
    centres = low + width * (np.arange(n_bins) + 0.5)
    offsets = 2.0 * np.pi / n_bins * np.arange(n_bins)
    kernel = np.eye(1, n_bins)[0] if kappa is None else np.exp(kappa * (np.cos(offsets) - 1.0))
    kernel_spectrum = np.fft.rfft(kernel / kernel.sum())

    def log_density(histogram: np.ndarray) -> np.ndarray:
        smooth = histogram if kappa is None else np.fft.irfft(np.fft.rfft(histogram) * kernel_spectrum, n_bins)
        reach = 0 if kappa is None else int(kappa**-0.5 / width)
        seen = np.any([np.roll(histogram > 0.0, shift) for shift in range(-reach, reach + 1)], axis=0)
        total = max(histogram.sum(), np.finfo(float).tiny)  # a replicate may hold nothing that weighs anything
        return np.log(np.where(seen, np.maximum(smooth, np.finfo(float).tiny) / (total * width), np.nan))

    units = (
        np.arange(len(angle))
        if n_blocks is None
        else np.searchsorted(_block_starts(len(angle), n_blocks), np.arange(len(angle)), "right") - 1
    )
    generator = np.random.default_rng(seed)
    replicates = np.stack(
        [
            log_density(np.bincount(bins, weights * row[units], n_bins))
            for counts in _bootstrap_counts(units[-1] + 1, n_bootstrap, generator)
            for row in counts
        ]
    )
    free_energy = -log_density(np.bincount(bins, weights, n_bins))
    often = np.isfinite(replicates).mean(axis=0) > 0.95  # with three samples or more; the spread of fewer says nothing
    std_error = np.full(n_bins, np.nan)
    std_error[often] = np.nanstd(replicates[:, often], axis=0, ddof=1)
    return FreeEnergyProfile(
        centres, free_energy - np.nanmin(free_energy), np.where(np.isnan(free_energy), np.nan, std_error)
    )


def _checked(angle: np.ndarray, log_weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    angle = np.asarray(angle, dtype=np.float64)
    log_weights = np.zeros(angle.shape) if log_weights is None else np.asarray(log_weights, dtype=np.float64)
    if angle.ndim != 1 or angle.shape != log_weights.shape or len(angle) == 0:
        raise UserError(
            f"Free energies need angles (n,) and log weights (n,) of at least one sample: got {angle.shape} and {log_weights.shape}."
        )
    if not np.isfinite(angle).all():
        raise UserError(
            f"{(~np.isfinite(angle)).sum()} of {len(angle)} angles are not finite: drop these samples first."
        )
    return angle, log_weights


def _block_starts(n: int, n_blocks: int) -> np.ndarray:
    if not 2 <= n_blocks <= n:
        raise UserError(
            f"A bootstrap over blocks needs between 2 and {n} blocks (the number of samples): got {n_blocks}."
        )
    return np.arange(n_blocks) * n // n_blocks


def _bootstrap_counts(n_units: int, n_bootstrap: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """How often each of ``n_units`` is drawn, in chunks (replicates, n_units) that together make ``n_bootstrap`` rows."""
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
    """log( sum c exp(log_terms) / sum c exp(log_base) ) for each row of ``counts`` (rows, m); NaN where a row misses all."""
    term_scale, base_scale = log_terms.max(), log_base.max()
    with np.errstate(divide="ignore", invalid="ignore"):
        numerator = np.log(counts @ np.exp(log_terms - term_scale))
        return numerator - np.log(counts @ np.exp(log_base - base_scale)) + (term_scale - base_scale)


def _effective_number(log_weights: np.ndarray) -> float:
    if not np.isfinite(log_weights).any():
        return 0.0
    return effective_sample_size(log_weights) * len(log_weights)


def _spread(replicates: np.ndarray, confidence: float) -> tuple[float, tuple[float, float]]:
    """Standard deviation of the finite replicates, and the percentile interval of all (which may end at infinity)."""
    finite = replicates[np.isfinite(replicates)]
    tail = (1.0 - confidence) / 2.0
    low, high = np.nanquantile(replicates, [tail, 1.0 - tail], method="inverted_cdf")
    return float(finite.std(ddof=1)) if len(finite) > 1 else float("nan"), (float(low), float(high))


def _judge(
    std_error: float,
    *,
    ess_state: float,
    ess_rest: float,
    pareto_k_state: float,
    pareto_k_rest: float,
    tail_state: float,
    tail_rest: float,
    **_: int,
) -> tuple[bool, str]:
    """Whether both sides have enough effective samples, and tails that are light or carry next to nothing; if not, why."""
    reasons = []
    for name, number, k, tail in (
        ("state", ess_state, pareto_k_state, tail_state),
        ("rest", ess_rest, pareto_k_rest, tail_rest),
    ):
        if number < _FEWEST_EFFECTIVE:
            reasons.append(
                f"{number:.1f} effective samples in the {name} (at least {_FEWEST_EFFECTIVE:.0f} are needed)"
            )
        elif not (k <= _LARGEST_PARETO_K or tail < std_error):
            reasons.append(f"Pareto-k {k:.2f} in the {name} (at most {_LARGEST_PARETO_K} can be trusted)")
    return not reasons, "; ".join(reasons)
