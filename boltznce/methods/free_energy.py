"""Free energy of any folder of weighted samples: a difference, a profile, a figure and a table."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from boltznce.analysis.free_energy import (
    FreeEnergyProfile,
    free_energy_difference,
    free_energy_profile,
    judged_by_exact,
)
from boltznce.analysis.plotting import plot_profiles
from boltznce.analysis.report import summary_table, write_report
from boltznce.analysis.reweighting import WeightedSamples
from boltznce.data.matching import require_samples
from boltznce.errors import UserError
from boltznce.folders import Kind, claim, hold
from boltznce.io import atomic_file
from boltznce.settings import require
from boltznce.smc import refined_free_energy_difference
from boltznce.states import State
from boltznce.systems.base import System

__all__ = ["reference_difference", "reference_profile", "write_free_energy"]

FREE_ENERGY = Kind("a free energy", "profile.json", frozenset({"centres", "free_energy", "std_error"}))


def write_free_energy(
    system: System,
    samples_folder: Path,
    output: Path,
    *,
    coordinate: str | None = None,
    state: tuple[float, float] | None = None,
    n_bins: int = 72,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> str:
    """Write ``metrics.json``, ``report.md``, the profile and its figure to ``output``; return the table.

    ``coordinate`` (for molecules a dihedral) and ``state`` (radians) default to the system's. Raises UserError where
    neither says which, for samples of another system, for an output that holds anything else, and where another
    process writes it.
    """
    require("free_energy", coordinate=coordinate, state=state, n_bins=n_bins, n_bootstrap=n_bootstrap, seed=seed)
    own = system.state or (None, None)
    coordinate, interval = coordinate or own[0], state or own[1]
    if coordinate is None or interval is None:
        raise UserError(
            f"{system.name} names no state: give coordinate= (a dihedral such as phi) and state=[low,high] in radians."
        )
    state = State.of((coordinate, interval))
    limits = system.coordinate_range(coordinate)
    claim(output, FREE_ENERGY, "another output")
    samples = WeightedSamples.load(samples_folder)
    require_samples(samples_folder, samples, system)
    held = hold(output)
    angle = system.coordinate(np.asarray(samples.positions), coordinate)
    refined, given = samples.ancestors is not None, (angle, samples.log_weights)
    profile = free_energy_profile(*given, n_bins, walkers=samples.ancestors, seed=seed, limits=limits)
    reference = system.reference() if state == own else None
    options = {"state": state.interval, "n_bootstrap": n_bootstrap, "seed": seed}
    if refined:
        weighted = refined_free_energy_difference(*given, samples.ancestors, state.interval)
    else:
        weighted = free_energy_difference(*given, **options)
    likelihood = samples.meta.get("likelihood")
    row = "refined" if refined else f"{likelihood or 'weighted'} weights"
    free_energy = {row: judged_by_exact(weighted) if likelihood == "ebm" else weighted}
    if not refined:
        free_energy["unweighted"] = free_energy_difference(angle, None, **options)
    if reference is not None:
        free_energy["reference"] = reference_difference(reference)
    results = {
        "system": system.name,
        "state": state.in_words(),
        "free_energy": free_energy,
        "ess": {"weights": {"ess": samples.ess, "pareto_k": samples.pareto_k, "n": len(samples)}},
    }
    options = {"angle_name": coordinate, "limits": limits}
    figure = plot_profiles(
        {"refined" if refined else "weighted": profile}, reference_profile(reference), state.interval, **options
    )
    columns = {key: [None if np.isnan(v) else float(v) for v in values] for key, values in asdict(profile).items()}
    with atomic_file(output / "profile.json") as path:  # first: by it the folder is known as ours
        path.write_text(json.dumps(columns, indent=1) + "\n", encoding="utf-8")
    write_report(output, results, {"profile": figure})
    held.release()
    return f"{summary_table(results)}\n\nReport: {output / 'report.md'}"


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
