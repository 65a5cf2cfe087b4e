"""Free energy of any folder of weighted samples: a difference, a profile or a surface, a figure and a table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from boltznce.analysis.free_energy import free_energy_difference, judged_by_exact
from boltznce.analysis.plotting import plot_profiles, plot_surface
from boltznce.analysis.profiles import (
    FreeEnergyProfile,
    FreeEnergySurface,
    free_energy_profile,
    free_energy_surface,
)
from boltznce.analysis.report import summary_table, write_report
from boltznce.analysis.reweighting import WeightedSamples
from boltznce.data.matching import require_samples
from boltznce.errors import UserError
from boltznce.folders import Kind, claim, hold
from boltznce.io import atomic_file
from boltznce.settings import require
from boltznce.smc import refined_free_energy_difference
from boltznce.states import State, between
from boltznce.systems.base import System
from boltznce.systems.coordinates import Coordinate

__all__ = ["reference_difference", "reference_profile", "write_free_energy"]

FREE_ENERGY = Kind("a free energy", "profile.json", frozenset({"centres", "free_energy", "std_error"}))
FEWER_BINS = 2  # along a coordinate of a surface than of a profile


def write_free_energy(
    system: System,
    samples_folder: Path,
    output: Path,
    *,
    coordinate: Any = None,
    state: Any = None,
    versus: Any = None,
    n_bins: int = 72,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> str:
    """Write ``metrics.json``, ``report.md``, the profile or surface and its figure to ``output``; return the table.

    Args:
        coordinate: of the profile (see `System.coordinate_of`), or two of a surface; default those of the state.
        state: an interval of the coordinate, or one for each of two; or what a system's ``state`` may be (see
            `System.state_of`). Default the system's, whatever the coordinate.
        versus: another state, in place of the rest.

    Raises UserError where neither says which state, for samples of another system, for states that overlap, for an
    output that holds anything else, and where another process writes it.
    """
    given = {"coordinate": coordinate, "state": state, "versus": versus}
    require("free_energy", **given, n_bins=n_bins, n_bootstrap=n_bootstrap, seed=seed)
    chosen = coordinate if isinstance(coordinate, list | tuple) else [coordinate] if coordinate is not None else []
    own = _state_of(system, chosen, state) or system.state
    if own is None:
        raise UserError(
            f"{system.name} names no state: give state= an interval of a coordinate, as coordinate=phi state=[0.0,2.0] "
            "(radians; of distances nm), or a state of its own, as state=[[phi,[0.0,2.0]],[psi,[-2.0,0.8]]]."
        )
    other = _state_of(system, chosen or [side for side, _ in own.sides], versus)
    coordinates = [system.coordinate_of(each) for each in chosen or [side for side, _ in own.sides][:2]]
    claim(output, FREE_ENERGY, "another output")
    samples = WeightedSamples.load(samples_folder)
    require_samples(samples_folder, samples, system)
    held, x = hold(output), np.asarray(samples.positions)
    inside = system.in_state(x, own)
    kept = np.arange(len(x)) if other is None else between(inside, system.in_state(x, other))
    is_own = own == system.state and other is None and coordinates[0].name == own.name
    reference = system.reference() if is_own else None
    words = system.state_in_words(own) + ("" if other is None else f" against {system.state_in_words(other)}")
    results = {
        "system": system.name,
        "state": words,
        "free_energy": _rows(samples[kept], inside[kept], reference, n_bootstrap, seed),
        "ess": {"weights": {"ess": samples.ess, "pareto_k": samples.pareto_k, "n": len(samples)}},
    }
    states = {"state": own} | ({} if other is None else {"other state": other})
    boxes = {name: _box(system, coordinates, each) for name, each in states.items()}
    boxes = {name: box for name, box in boxes.items() if box is not None}
    values = [each(x) for each in coordinates]
    reliable = next(iter(results["free_energy"].values())).reliable
    columns, figures = _of_coordinates(samples, coordinates, values, boxes, reference, n_bins, reliable)
    with atomic_file(output / "profile.json") as path:  # first: by it the folder is known as ours
        path.write_text(json.dumps(columns, indent=1) + "\n", encoding="utf-8")
    write_report(output, results, figures)
    held.release()
    return f"{summary_table(results)}\n\nReport: {output / 'report.md'}"


def _state_of(system: System, coordinates: Sequence[Any], given: Any) -> State | None:
    """What ``state=`` means: intervals are of the coordinates, which are then the system's own where none is given."""
    if given is None:
        return None
    intervals = [given] if _is_interval(given) else given
    if isinstance(given, State) or not (isinstance(given, list | tuple) and all(map(_is_interval, intervals))):
        return system.state_of(given)
    coordinates = coordinates or [side for side, _ in (system.state.sides if system.state else ())]
    if len(intervals) != len(coordinates):
        raise UserError(
            f"state= has {len(intervals)} intervals, and there are {len(coordinates)} coordinates: give coordinate= as "
            "many (names such as phi, or [phi,psi]), or each interval with its coordinate, as [[phi,[0.0,2.0]]]."
        )
    return system.state_of([list(side) for side in zip(coordinates, intervals, strict=True)])


def _is_interval(given: Any) -> bool:
    return isinstance(given, list | tuple) and len(given) == 2 and all(isinstance(end, Real) for end in given)


def _rows(
    samples: WeightedSamples, inside: np.ndarray, reference: dict | None, n_bootstrap: int, seed: int
) -> dict[str, Any]:
    """ΔF of the samples by their weights, and without."""
    likelihood, refined = samples.meta.get("likelihood"), samples.ancestors is not None
    options = {"n_bootstrap": n_bootstrap, "seed": seed}
    if refined:
        weighted = refined_free_energy_difference(inside, samples.log_weights, samples.ancestors)
    else:
        weighted = free_energy_difference(inside, samples.log_weights, **options)
    row = "refined" if refined else f"{likelihood or 'weighted'} weights"
    rows = {row: judged_by_exact(weighted) if likelihood == "ebm" else weighted}
    if not refined:
        rows["unweighted"] = free_energy_difference(inside, None, **options)
    if reference is not None:
        rows["reference"] = reference_difference(reference)
    return rows


def _of_coordinates(
    samples: WeightedSamples,
    coordinates: Sequence[Coordinate],
    values: Sequence[np.ndarray],
    boxes: Mapping[str, Sequence[tuple]],
    reference: dict | None,
    n_bins: int,
    reliable: bool,
) -> tuple[dict[str, Any], dict[str, Figure]]:
    """Profile or surface in the types of JSON, and its figure; none of a coordinate that is yes or no."""
    given = {"log_weights": samples.log_weights, "walkers": samples.ancestors}
    if any(each.dtype == bool for each in values):
        return dict.fromkeys(("centres", "free_energy", "std_error")), {}
    limits = [each.range_of(column) for each, column in zip(coordinates, values, strict=True)]
    if len(coordinates) == 1:
        (coordinate,), (column,), (ends,) = coordinates, values, limits
        found = free_energy_profile(column, n_bins=n_bins, limits=ends, **given)
        label = "weighted" if samples.ancestors is None else "refined"
        figure = plot_profiles(
            {label: found},
            reference_profile(reference),
            {name: box[0] for name, box in boxes.items()},
            coordinate=coordinate.symbol,
            unit=coordinate.unit,
            limits=ends,
            unreliable=() if reliable else (label,),
        )
        return _plain(found), {"profile": figure}
    points, n_bins = np.stack(values, axis=-1), max(2, n_bins // FEWER_BINS)
    found = free_energy_surface(points, n_bins=n_bins, limits=limits, **given)
    axes = [(each.symbol, each.unit) for each in coordinates]
    return _plain(found), {"surface": plot_surface(found, axes, limits, boxes)}


def _box(system: System, coordinates: Sequence[Coordinate], state: State) -> list[tuple] | None:
    """A state's interval of each coordinate, for figures; None where it is one of others, too."""
    intervals = {system.coordinate_of(given).name: interval for given, interval in state.sides}
    names = [each.name for each in coordinates]
    return [intervals.get(name, (-np.inf, np.inf)) for name in names] if set(intervals) <= set(names) else None


def _plain(found: FreeEnergyProfile | FreeEnergySurface) -> dict[str, Any]:
    """In the types of JSON, gaps as None."""

    def listed(values: Any) -> Any:
        if isinstance(values, np.ndarray | tuple | list):
            return [listed(each) for each in values]
        return None if np.isnan(values) else float(values)

    return {key: listed(values) for key, values in asdict(found).items()}


def reference_difference(reference: dict) -> dict:
    """ΔF of a shipped reference as a row of the report's table."""
    value, error = (reference["delta_f"][key] for key in ("value", "std_error"))
    return {"value": value, "std_error": error, "interval": (value - 1.96 * error, value + 1.96 * error)}


def reference_profile(reference: dict | None) -> FreeEnergyProfile | None:
    """The profile of a shipped reference; None without one."""
    if reference is None:
        return None
    return FreeEnergyProfile(
        *(np.array(reference["profile"][key], dtype=np.float64) for key in ("phi", "f", "std_error"))
    )
