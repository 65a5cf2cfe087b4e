"""Distances between two sets of samples, and how well one log-likelihood agrees with another."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from scipy.spatial.distance import cdist
from scipy.special import logsumexp

from boltznce.analysis.weights import normalized_weights
from boltznce.errors import UserError

__all__ = [
    "DensityErrors",
    "HeldOutLikelihood",
    "LikelihoodAgreement",
    "SampledDistance",
    "between_halves",
    "density_errors",
    "energy_cut",
    "energy_w2",
    "held_out_likelihood",
    "likelihood_agreement",
    "plane_w2",
    "share_above",
    "torsion_kl",
    "torsion_kl_of_halves",
    "torus_w2",
]

_MOST_PIVOTS = 10_000_000
Distance = TypeVar("Distance")


@dataclass(frozen=True)
class SampledDistance:
    """Wasserstein-2 distance (radians on the torus): ``mean`` and ``std`` over subsets of ``n_points`` each."""

    mean: float
    std: float
    n_points: int


@dataclass(frozen=True)
class LikelihoodAgreement:
    """Spread ``std`` of (EBM - exact) log-likelihood (kT), bootstrap ``std_error``; ``slope`` is of EBM over exact.

    ``per_state`` holds (n, mean, std) of the difference by state; means are up to the EBM's constant, their differences
    are not.
    """

    n: int
    std: float
    std_error: float
    pearson_r: float
    slope: float
    per_state: dict[str, dict[str, float]]


@dataclass(frozen=True)
class DensityErrors:
    """A learned density against the true one on a grid, both normalized on it; KL divergences in nats.

    ``reverse_kl``, KL(learned ‖ true), is infinite where the true density vanishes: then None, and ``leaked_mass``
    tells how much of the learned density lies there. ``mode_weight_error`` is Σ |learned - true| over ``mode_weights``
    (learned, true).
    """

    forward_kl: float
    reverse_kl: float | None
    leaked_mass: float | None
    mode_weight_error: float
    mode_weights: list[tuple[float, float]]


@dataclass(frozen=True)
class HeldOutLikelihood:
    """Negative log-likelihood of held-out data, mean ``nll`` and ``std_error`` over the data inside the domain.

    Of ``n`` frames ``n_outside`` are outside, the ``share_outside`` by weight: to these the generator gives no density
    at all.
    """

    nll: float
    std_error: float
    n: int
    n_outside: int
    share_outside: float


def density_errors(log_p: np.ndarray, log_q: np.ndarray, mode: np.ndarray, support: np.ndarray) -> DensityErrors:
    """Errors of ``log_q`` (learned) against ``log_p`` (true), up to constants, in the cells of a grid, (cells,).

    ``mode`` numbers the mode of each cell and ``support`` is where the true density is above zero; both (cells,).
    """
    log_p, log_q = log_p - logsumexp(log_p[support]), log_q - logsumexp(log_q)
    p, q = np.where(support, np.exp(log_p), 0.0), np.exp(log_q)
    weights = [np.bincount(mode, density, minlength=mode.max() + 1) for density in (q, p)]
    everywhere = bool(support.all())
    return DensityErrors(
        forward_kl=float((p * (log_p - log_q))[support].sum()),
        reverse_kl=float((q * (log_q - log_p)).sum()) if everywhere else None,
        leaked_mass=None if everywhere else float(q[~support].sum()),
        mode_weight_error=float(np.abs(weights[0] - weights[1]).sum()),
        mode_weights=[(float(learned), float(true)) for learned, true in zip(*weights, strict=True)],
    )


def energy_cut(u_md: np.ndarray, quantile: float = 0.9999, margin: float = 50.0) -> float:
    """Energy (kT) above which samples are left out of E-W2: a quantile of the MD energies plus ``margin``."""
    return float(np.quantile(u_md, quantile) + margin)


def share_above(u: np.ndarray, cut: float, weights: np.ndarray | None = None) -> float:
    """Share of (weighted) energies (n,) above ``cut``; infinite and NaN ones count as above."""
    return float(np.average(~(np.asarray(u) <= cut), weights=weights))


def energy_w2(
    u1: np.ndarray, u2: np.ndarray, w1: np.ndarray | None = None, w2: np.ndarray | None = None, cut: float | None = None
) -> float:
    """Exact Wasserstein-2 distance (kT) of energies (n1,) and (n2,): ( ∫ (Q1 - Q2)² dp )^(1/2), weights positive.

    Energies above ``cut`` are left out on both sides (see `energy_cut`, `share_above`); UserError if none is left.
    """
    values1, cdf1 = _sorted_cdf(u1, w1, cut)
    values2, cdf2 = _sorted_cdf(u2, w2, cut)
    levels = np.sort(np.concatenate([cdf1, cdf2]))
    steps = np.diff(levels, prepend=0.0)
    middle = levels - steps / 2.0  # between two levels both quantile functions are constant
    q1 = values1[np.minimum(np.searchsorted(cdf1, middle), len(values1) - 1)]
    q2 = values2[np.minimum(np.searchsorted(cdf2, middle), len(values2) - 1)]
    return float(np.sqrt((steps * (q1 - q2) ** 2).sum()))


def torus_w2(
    angles1: np.ndarray, angles2: np.ndarray, w1: np.ndarray | None = None, w2: np.ndarray | None = None, **subsets: Any
) -> SampledDistance:
    """Wasserstein-2 distance (radians) on the torus of angles (n1, k) and (n2, k), differences wrapped to (-π, π].

    Exact optimal transport between ``n_subsets=5`` pairs of subsets of ``n_points=5000`` (at most n1, n2), drawn by a
    numpy ``generator``: with replacement by weight where weights are given, else without. The value has a floor that
    falls with n_points: compare with `between_halves` at the same n_points. Raises UserError for shapes that do not
    fit. BoltzNCE's code wraps differences modulo π: its figures cannot be compared with these.

    >>> torus_w2(np.full((9, 2), 3.0), np.full((9, 2), [3.0, -3.0]))  # one angle differs by 2 π - 6
    SampledDistance(mean=0.28318..., std=0.0, n_points=9)
    """
    return _sampled_w2(_torus_costs, angles1, angles2, w1, w2, **subsets)


def plane_w2(
    points1: np.ndarray, points2: np.ndarray, w1: np.ndarray | None = None, w2: np.ndarray | None = None, **subsets: Any
) -> SampledDistance:
    """Wasserstein-2 distance of points (n1, k) and (n2, k), by Euclidean distances; otherwise as `torus_w2`."""
    return _sampled_w2(lambda a, b: cdist(a, b, "sqeuclidean"), points1, points2, w1, w2, **subsets)


def between_halves(distance: Callable[..., Distance], values: np.ndarray, **options: Any) -> Distance:
    """The floor of a ``distance``: that between the two halves of one set (n, ...), in order of time.

    >>> between_halves(energy_w2, [0.0, 1.0, 2.0, 3.0])
    2.0
    """
    half = len(values) // 2
    return distance(values[:half], values[half:], **options)


def torsion_kl(
    angles1: np.ndarray,
    angles2: np.ndarray,
    w1: np.ndarray | None = None,
    w2: np.ndarray | None = None,
    n_bins: int = 100,
    uniform_share: float = 1e-4,
) -> float:
    """KL(1 ‖ 2) in nats of histograms of angles (n, k), k of 1 or 2, ``n_bins`` along each: the grid of TA-BG.

    Smoothing: both histograms are mixed with the uniform distribution, of which they take the share ``uniform_share``;
    so an empty bin costs the same whatever the number of samples.
    """
    probabilities, n_cells = [], n_bins ** np.shape(angles1)[1]
    for angles, weights in ((angles1, w1), (angles2, w2)):
        histogram = np.bincount(_cells(angles, n_bins), weights, n_cells)
        probabilities.append((1 - uniform_share) * histogram / histogram.sum() + uniform_share / n_cells)
    p, q = probabilities
    return float((p * np.log(p / q)).sum())


def torsion_kl_of_halves(
    angles: np.ndarray,
    weights: np.ndarray | None,
    first: np.ndarray,
    other_angles: np.ndarray | None = None,
    other_weights: np.ndarray | None = None,
    n_bins: int = 100,
    uniform_share: float = 1e-4,
) -> float:
    """Mean of KL(half ‖ other) over two independent halves of ``angles`` (n, k), ``first`` (n,) the mask of one.

    Without ``other_angles`` the other is the other half: the floor, which is the noise of two histograms. With them it
    is the first so many of them (or all, if they are too few) that their histogram is as noisy as the other half's: so
    the value has the noise of the floor, and the two can be compared. Samples count as independent. ``n_bins`` and
    ``uniform_share`` as in :func:`torsion_kl`.
    """
    weights = np.ones(len(angles)) if weights is None else weights
    halves = [(angles[mask], weights[mask]) for mask in (first, ~first)]
    others = halves[::-1]
    if other_angles is not None:
        samples = other_angles, np.ones(len(other_angles)) if other_weights is None else other_weights
        others = [_as_noisy_as(*half, *samples, n_bins) for half in others]
    pairs = zip(halves, others, strict=True)
    return float(np.mean([torsion_kl(a, b, w_a, w_b, n_bins, uniform_share) for (a, w_a), (b, w_b) in pairs]))


def _as_noisy_as(
    angles: np.ndarray, weights: np.ndarray, other_angles: np.ndarray, other_weights: np.ndarray, n_bins: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first of the others, and their weights: the fewest with a histogram no noisier than that of ``angles``."""
    wanted, cells = _noise(_cells(angles, n_bins), weights), _cells(other_angles, n_bins)
    too_few, n = 0, len(other_angles)
    while n - too_few > 1:
        middle = (too_few + n) // 2
        if _noise(cells[:middle], other_weights[:middle]) > wanted:
            too_few = middle
        else:
            n = middle
    return other_angles[:n], other_weights[:n]


def _noise(cells: np.ndarray, weights: np.ndarray) -> float:
    """Twice what the noise of a histogram p adds to a divergence: sum of var(p) / p over its bins, to leading order."""
    sums, squares = np.bincount(cells, weights), np.bincount(cells, np.square(weights))
    occupied = sums > 0
    return float((squares[occupied] / sums[occupied]).sum() / sums.sum()) if occupied.any() else np.inf


def _cells(angles: np.ndarray, n_bins: int) -> np.ndarray:
    """Number of the bin that holds each of the angles (n, k), (n,)."""
    place = (_wrap(np.asarray(angles, dtype=np.float64)) + np.pi) / (2 * np.pi)
    bins = np.minimum((n_bins * place).astype(int), n_bins - 1)
    return bins @ n_bins ** np.arange(bins.shape[1])[::-1]


def held_out_likelihood(log_prob: np.ndarray, log_weights: np.ndarray | None = None) -> HeldOutLikelihood:
    """Likelihood ``log_prob`` (n,), -inf outside the domain, that a generator gives data of some log weights (n,).

    The standard error takes the frames as independent; frames of a simulation are not quite.
    """
    log_prob = np.asarray(log_prob, dtype=np.float64)
    weights = normalized_weights(np.zeros(len(log_prob)) if log_weights is None else log_weights)
    inside = log_prob > -np.inf
    outside: dict[str, Any] = {"n": len(log_prob), "n_outside": int((~inside).sum())}
    outside["share_outside"] = float(weights[~inside].sum())
    if not weights[inside].sum() > 0:
        return HeldOutLikelihood(np.inf, np.nan, **outside)
    w = weights[inside] / weights[inside].sum()
    nll = -float(w @ log_prob[inside])
    return HeldOutLikelihood(nll, float(np.sqrt(np.square(w * (log_prob[inside] + nll)).sum())), **outside)


def likelihood_agreement(
    ebm: np.ndarray, exact: np.ndarray, inside: np.ndarray | None = None, n_bootstrap: int = 1000, seed: int = 0
) -> LikelihoodAgreement:
    """Agreement of EBM and exact log-likelihoods (n,) of samples of the flow; ``inside`` (n,) masks the state.

    The spread of the difference is what the weights feel; Pearson's r flatters where the likelihoods themselves vary
    much.
    """
    ebm, exact = np.asarray(ebm, dtype=np.float64), np.asarray(exact, dtype=np.float64)
    n = len(ebm)
    if n < 3 or exact.shape != (n,) or not (np.isfinite(ebm).all() and np.isfinite(exact).all()):
        raise UserError("Likelihoods are compared on three or more samples with finite values of both.")
    difference = ebm - exact
    index = np.random.default_rng(seed).integers(0, n, size=(n_bootstrap, n))
    sides = {} if inside is None else {"state": difference[inside], "rest": difference[~inside]}
    return LikelihoodAgreement(
        n=n,
        std=float(difference.std(ddof=1)),
        std_error=float(difference[index].std(axis=1, ddof=1).std(ddof=1)),
        pearson_r=float(np.corrcoef(ebm, exact)[0, 1]),
        slope=float(np.cov(ebm, exact)[0, 1] / exact.var(ddof=1)),
        per_state={
            name: {"n": len(d), "mean": float(d.mean()), "std": float(d.std(ddof=1))}
            for name, d in sides.items()
            if len(d) > 1
        },
    )


def _sorted_cdf(u: np.ndarray, weights: np.ndarray | None, cut: float | None) -> tuple[np.ndarray, np.ndarray]:
    u = np.asarray(u, dtype=np.float64)
    weights = np.ones(len(u)) if weights is None else np.asarray(weights, dtype=np.float64)
    if cut is not None:
        u, weights = u[u <= cut], weights[u <= cut]
    if len(u) == 0 or weights.sum() <= 0.0:
        raise UserError("No energy is left to compare: all lie above the cut, or have no weight.")
    if not np.isfinite(u).all():
        raise UserError("Some energies are not finite: give a cut (metrics.energy_cut) that leaves them out.")
    order = np.argsort(u)
    cdf = np.cumsum(weights[order])
    return u[order], cdf / cdf[-1]


def _wrap(angle: np.ndarray) -> np.ndarray:
    """Angles brought to (-pi, pi]."""
    return np.pi - np.mod(np.pi - angle, 2.0 * np.pi)


def _sampled_w2(costs, points1, points2, w1, w2, n_points=5000, n_subsets=5, generator=None) -> SampledDistance:
    """( min over permutations of the mean cost )^(1/2) of pairs of subsets; ``costs`` (n, k), (n, k) -> (n, n)."""
    import ot  # three times as fast as scipy's assignment on thousands of points; it takes a second to import

    generator = np.random.default_rng(0) if generator is None else generator
    sides = [np.asarray(points, dtype=np.float64) for points in (points1, points2)]
    n = min(n_points, *map(len, sides))
    if n == 0 or sides[0].ndim != 2 or sides[0].shape[1:] != sides[1].shape[1:]:
        shapes = " and ".join(str(points.shape) for points in sides)
        raise UserError(f"A distance needs angles or points (n, k) on both sides: got {shapes}.")

    def subset(points: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        p = None if weights is None else np.asarray(weights, dtype=np.float64) / np.sum(weights, dtype=np.float64)
        return points[generator.choice(len(points), size=n, replace=p is not None, p=p)]

    uniform, distances = np.full(n, 1.0 / n), []
    for _ in range(n_subsets):
        cost = costs(subset(sides[0], w1), subset(sides[1], w2))
        distances.append(np.sqrt(ot.emd2(uniform, uniform, cost, numItermax=_MOST_PIVOTS)))
    return SampledDistance(float(np.mean(distances)), float(np.std(distances)), n)


def _torus_costs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared wrapped distances."""
    cost = np.zeros((len(a), len(b)))
    for i in range(a.shape[1]):
        distance = np.abs(_wrap(a[:, None, i]) - _wrap(b[None, :, i]))
        cost += np.minimum(distance, 2.0 * np.pi - distance) ** 2
    return cost
