"""What a simulation says of a state: its free energy, a profile, a surface, and how far parts of it agree."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from boltznce.states import State, in_interval

__all__ = ["SimulationResult", "of_walkers", "transitions"]

Estimate = tuple[float, float]  # with its standard error
FEWEST_TRANSITIONS = 1.0  # a walker, between state and rest


@dataclasses.dataclass(frozen=True)
class SimulationResult:
    """Free energies (kT) along a dihedral (rad), with standard errors.

    Attributes:
        delta_f, delta_f_error: -log(P(state) / P(rest)).
        centres: (n_bins,); ``profile``: (n_bins,), minimum 0, NaN where nothing was seen; ``profile_error``: (n_bins,),
            of the difference from the minimum.
        parts: (n_repeats, n_parts), ΔF of each stretch of time of each repeat by itself.
        checks: figures of whether all was visited, by what they are called.
        surface: (n_bins / 2, n_bins / 2), over the two coordinates of ``surface_of``, minimum 0, NaN where nothing was
            seen.
        others: ΔF of the same interval of other coordinates.
        populations: of each pattern of coordinates inside (+) and outside (-) the interval.
    """

    delta_f: float
    delta_f_error: float
    centres: np.ndarray
    profile: np.ndarray
    profile_error: np.ndarray
    parts: np.ndarray
    checks: Mapping[str, float] = dataclasses.field(default_factory=dict)
    surface: np.ndarray | None = None
    surface_of: tuple[str, ...] = ()
    others: Mapping[str, Estimate] = dataclasses.field(default_factory=dict)
    populations: Mapping[str, Estimate] = dataclasses.field(default_factory=dict)

    @property
    def message(self) -> str:
        """Why ΔF cannot be relied on, if so: walkers that did not go round, or a drift between halves of the time."""
        half = self.parts.shape[1] // 2
        drift = abs(self.parts[:, :half].mean() - self.parts[:, half:].mean())
        if (crossed := self.checks.get("transitions a walker", np.inf)) < FEWEST_TRANSITIONS:
            return f"walkers went between state and rest {crossed:.2g} times each (at least {FEWEST_TRANSITIONS:g})"
        if not np.isfinite(self.delta_f_error) or drift > 4 * 2 * self.delta_f_error:  # a half has √2 of the error
            return f"the first and the second half of the time differ by {drift:.2f} kT"
        return ""

    def summary(self) -> str:
        """ΔF, how far independent parts of the simulation agree, and the checks."""
        half = self.parts.shape[1] // 2
        halves = ", ".join(f"{row[:half].mean():.2f} and {row[half:].mean():.2f}" for row in self.parts)
        told = "".join(f"; {name}: {value:.3g}" for name, value in self.checks.items())
        others = "".join(f"; ΔF of {name} {value:.2f} ± {error:.2f}" for name, (value, error) in self.others.items())
        trusted = f", not reliable: {self.message}" if self.message else ""
        value = f"ΔF = {self.delta_f:.3f} ± {self.delta_f_error:.3f} kT{trusted}"
        return f"{value} (halves of each repeat: {halves}{told}{others})"


def of_walkers(
    coordinates: Mapping[str, np.ndarray],
    log_weights: np.ndarray,
    window: np.ndarray,
    time: np.ndarray,
    repeat: np.ndarray,
    *,
    state: State,
    pairs: Sequence[Sequence[str]] = (),
    limits: Mapping[str, tuple[float, float]] = MappingProxyType({}),
    n_bins: int = 72,
    n_parts: int = 4,
    n_bootstrap: int = 500,
    seed: int = 0,
) -> SimulationResult:
    """What weighted frames (n,) of many walkers say, with standard errors by bootstrap over the walkers.

    Args:
        coordinates: (n,) each, by name, that of the state among them: angles in rad, or with ``limits``.
        log_weights: (n,), of one mean in every repeat.
        window, time, repeat: (n,), number of the walker in its repeat, ps, number of the repeat; in order of time.
        pairs: names of coordinates that belong together; the surface is that of the state's pair, and the first of
            every pair has a ΔF and a place in the patterns of ``populations``.
        n_parts: stretches of time that are also analysed by themselves.
    """
    weights = np.exp(log_weights)
    walker = np.unique(np.stack([repeat, window]), axis=1, return_inverse=True)[1].ravel()
    n_walkers = int(walker.max()) + 1
    counts = np.random.default_rng(seed).multinomial(n_walkers, np.full(n_walkers, 1 / n_walkers), size=n_bootstrap)

    def sums(place: np.ndarray, n: int, chosen: np.ndarray | slice = slice(None)) -> np.ndarray:
        """(n_walkers, n): the weight that each walker has in each of n places."""
        flat = walker[chosen] * n + place[chosen]
        return np.bincount(flat, weights[chosen], minlength=n_walkers * n).reshape(n_walkers, n)

    def estimate(table: np.ndarray, of: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return of(table.sum(0)), np.std(of(counts @ table), axis=0, ddof=1)

    inside = {name: in_interval(values, state.interval).astype(int) for name, values in coordinates.items()}
    ends = {name: limits.get(name, (-np.pi, np.pi)) for name in coordinates}
    bins = {
        name: np.clip(((values - low) / (high - low) * n_bins).astype(int), 0, n_bins - 1)
        for (name, values), (low, high) in zip(coordinates.items(), ends.values(), strict=True)
    }
    own = state.coordinate
    edges = np.linspace(*ends[own], n_bins + 1)
    delta_f = {name: estimate(sums(each, 2), _minus_log_ratio) for name, each in inside.items()}
    profile = sums(bins[own], n_bins)
    lowest = profile.sum(0).argmax()
    shape, error = estimate(profile, lambda p: np.log(p[..., [lowest]]) - np.log(p))
    part = np.minimum((time / time.max() * n_parts - 1e-9).astype(int), n_parts - 1)
    firsts = [pair[0] for pair in pairs]
    return SimulationResult(
        *map(float, delta_f[own]),
        centres=(edges[1:] + edges[:-1]) / 2,
        profile=np.where(np.isfinite(shape), shape, np.nan),
        profile_error=np.where(np.isfinite(error), error, np.nan),
        parts=np.array(
            [
                [_minus_log_ratio(sums(inside[own], 2, (repeat == r) & (part == p)).sum(0)) for p in range(n_parts)]
                for r in np.unique(repeat)
            ]
        ),
        checks={
            "transitions a walker": transitions(coordinates[own], walker, state, limits.get(own)) / n_walkers,
            "effective share of frames": float(weights.sum() ** 2 / (weights**2).sum() / len(weights)),
        },
        **_surface(next((pair for pair in pairs if own in pair and len(pair) == 2), None), bins, weights, n_bins),
        others={name: tuple(map(float, delta_f[name])) for name in firsts if name != own},
        populations=_populations([inside[name] for name in firsts], sums, estimate) if len(firsts) > 1 else {},
    )


def transitions(values: np.ndarray, walker: np.ndarray, state: State, limits: tuple[float, float] | None = None) -> int:
    """How often walkers went from the middle half of the state to that of the rest or back; frames in order of time.

    ``limits``: of a coordinate that is no angle, whose state is a half line.
    """
    low, high = state.interval
    if limits is None:
        intervals = (low, high), (high, low + 2 * np.pi)
    else:
        low, high = max(low, limits[0]), min(high, limits[1])
        intervals = (low, high), (limits[0], low) if low > limits[0] else (high, limits[1])
    core = np.zeros(len(values), dtype=int)
    for side, (start, end) in zip((1, -1), intervals, strict=True):
        inner = values - start - (end - start) / 4
        inner = inner if limits else inner % (2 * np.pi)
        core[(inner >= 0) & (inner < (end - start) / 2)] = side
    order = np.argsort(walker, kind="stable")
    order = order[core[order] != 0]
    same = walker[order][1:] == walker[order][:-1]
    return int((same & (core[order][1:] != core[order][:-1])).sum())


def _minus_log_ratio(sides: np.ndarray) -> np.ndarray:
    """-log(inside / outside) of weights (..., 2): outside, inside."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(sides[..., 0]) - np.log(sides[..., 1])


def _surface(pair: Sequence[str] | None, bins: Mapping[str, np.ndarray], weights: np.ndarray, n_bins: int) -> dict:
    if pair is None:
        return {}
    n = n_bins // 2
    with np.errstate(divide="ignore"):
        f = -np.log(np.bincount(bins[pair[0]] // 2 * n + bins[pair[1]] // 2, weights, minlength=n * n))
    return {"surface": np.where(np.isfinite(f), f - f.min(), np.nan).reshape(n, n), "surface_of": tuple(pair)}


def _populations(inside: Sequence[np.ndarray], sums: Callable, estimate: Callable) -> dict[str, Estimate]:
    n = len(inside)
    values, errors = estimate(
        sums(sum(each << i for i, each in enumerate(inside)), 2**n), lambda p: p / p.sum(-1, keepdims=True)
    )
    patterns = ["".join("+" if number >> i & 1 else "-" for i in range(n)) for number in range(2**n)]
    return {key: (float(p), float(e)) for key, p, e in zip(patterns, values, errors, strict=True) if p > 0}
