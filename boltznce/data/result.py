"""What a simulation says of a state: its free energy, a profile, a surface, and how far parts of it agree."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from boltznce.analysis.free_energy import free_energy_difference
from boltznce.analysis.profiles import free_energy_profile
from boltznce.analysis.weights import effective_sample_size
from boltznce.states import State, in_interval, patterns

__all__ = ["SimulationResult", "of_walkers", "transitions"]

Estimate = tuple[float, float]  # with its standard error
FEWEST_TRANSITIONS = 1.0  # a walker, between state and rest


@dataclasses.dataclass(frozen=True)
class SimulationResult:
    """Free energies (kT) along a dihedral (rad), with standard errors.

    Attributes:
        delta_f, delta_f_error: -log(P(state) / P(rest)).
        centres: (n_bins,); ``profile``: (n_bins,), minimum 0, NaN where nothing was seen; ``profile_error``: (n_bins,),
            of the difference from the minimum, or of -log p where walkers are independent.
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
) -> SimulationResult:
    """What weighted frames (n,) of many walkers say, with standard errors by what they differ from walker to walker.

    Args:
        coordinates: (n,) each, by name, that of the state among them: angles in rad, or with ``limits``.
        log_weights: (n,), of one mean in every repeat.
        window, time, repeat: (n,), number of the walker in its repeat, ps, number of the repeat; in order of time.
        pairs: names of coordinates that belong together; the surface is that of the state's pair, and the first of
            every pair has a ΔF and a place in the patterns of ``populations``.
        n_parts: stretches of time that are also analysed by themselves.
    """
    weights, own = np.exp(log_weights), state.coordinate
    walker = np.unique(np.stack([repeat, window]), axis=1, return_inverse=True)[1].ravel()
    firsts = [pair[0] for pair in pairs]
    own_pair = next((pair for pair in pairs if own in pair and len(pair) == 2), None)
    inside = {
        name: in_interval(coordinates[name], state.interval, periodic=name not in limits) for name in {own, *firsts}
    }
    known = {name: free_energy_difference(mask, log_weights, walkers=walker) for name, mask in inside.items()}
    profile = free_energy_profile(coordinates[own], log_weights, n_bins, walkers=walker, limits=limits.get(own))
    part = np.minimum((time / time.max() * n_parts - 1e-9).astype(int), n_parts - 1)
    number = np.unique(repeat, return_inverse=True)[1] * n_parts + part
    with np.errstate(divide="ignore"):
        sides = [np.log(np.bincount(number, weights * side)) for side in (~inside[own], inside[own])]
    return SimulationResult(
        known[own].value,
        known[own].std_error,
        profile.centres,
        profile.free_energy,
        profile.std_error,
        parts=(sides[0] - sides[1]).reshape(-1, n_parts),
        checks={
            "transitions a walker": transitions(coordinates[own], walker, state, limits.get(own)) / (walker.max() + 1),
            "effective share of frames": effective_sample_size(log_weights),
        },
        **_surface(own_pair, coordinates, weights, n_bins),
        others={name: (known[name].value, known[name].std_error) for name in firsts if name != own},
        populations=_populations([inside[name] for name in firsts], weights, walker) if len(firsts) > 1 else {},
    )


def transitions(values: np.ndarray, walker: np.ndarray, state: State, limits: tuple[float, float] | None = None) -> int:
    """How often walkers went from the middle half of the state to that of the rest or back; frames in order of time.

    ``limits``: of a coordinate that is no angle.
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


def _surface(
    pair: Sequence[str] | None, coordinates: Mapping[str, np.ndarray], weights: np.ndarray, n_bins: int
) -> dict:
    """Over a pair of angles, on half as many bins as a profile has."""
    if pair is None:
        return {}
    edges = np.linspace(-np.pi, np.pi, n_bins // 2 + 1)
    with np.errstate(divide="ignore"):
        x, y = (coordinates[name] for name in pair)
        f = -np.log(np.histogram2d(x, y, bins=[edges, edges], weights=weights)[0])
    return {"surface": np.where(np.isfinite(f), f - f.min(), np.nan), "surface_of": tuple(pair)}


def _populations(inside: Sequence[np.ndarray], weights: np.ndarray, walker: np.ndarray) -> dict[str, Estimate]:
    """Of every pattern that is seen; errors of a ratio of sums over independent walkers."""
    names, number = np.unique(patterns(inside), return_inverse=True)
    n_walkers = walker.max() + 1
    flat = walker * len(names) + number
    table = np.bincount(flat, weights, minlength=n_walkers * len(names)).reshape(n_walkers, -1) / weights.sum()
    p = table.sum(0)
    errors = np.sqrt(n_walkers / (n_walkers - 1) * np.square(table - p * table.sum(1, keepdims=True)).sum(0))
    return {name: (float(value), float(error)) for name, value, error in zip(names.tolist(), p, errors, strict=True)}
