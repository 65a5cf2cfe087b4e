"""Free energy of any folder of weighted samples: a difference, a profile, a figure and a table."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from boltznce.analysis.free_energy import FreeEnergyProfile, free_energy_difference, free_energy_profile
from boltznce.analysis.plotting import plot_profiles
from boltznce.analysis.report import summary_table, write_report
from boltznce.analysis.reweighting import WeightedSamples
from boltznce.errors import UserError
from boltznce.systems.base import System

__all__ = ["reference_profile", "write_free_energy"]


def write_free_energy(
    system: System,
    samples_folder: Path,
    output: Path,
    *,
    dihedral: str | None = None,
    state: tuple[float, float] | None = None,
    n_bins: int = 72,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> str:
    """Write ``metrics.json``, ``report.md``, ``figures/profile.png`` and ``profile.json`` to ``output``; return the table.

    ``dihedral`` and ``state`` (radians) default to the system's. Raises UserError where neither says which.
    """
    own_dihedral, own_state = system.state or (None, None)
    dihedral, state = dihedral or own_dihedral, state or own_state
    if dihedral is None or state is None:
        raise UserError(f"{system.name} names no state: give dihedral= and state=[low,high] in radians.")
    samples = WeightedSamples.load(samples_folder)
    angle = system.dihedral(np.asarray(samples.positions), dihedral)
    profile = free_energy_profile(angle, samples.log_weights, n_bins, seed=seed)
    reference = system.reference() if (dihedral, state) == (own_dihedral, own_state) else None
    options = {"state": state, "n_bootstrap": n_bootstrap, "seed": seed}
    free_energy = {
        samples.meta.get("likelihood", "weighted") + " weights": free_energy_difference(angle, samples.log_weights, **options),
        "unweighted": free_energy_difference(angle, None, **options),
    }
    if reference is not None:
        free_energy["reference"] = reference_difference(reference)
    results = {
        "system": system.name,
        "state": f"{state[0]:g} < {dihedral} < {state[1]:g} rad",
        "free_energy": free_energy,
        "ess": {"weights": {"ess": samples.ess, "pareto_k": samples.pareto_k, "n": len(samples)}},
    }
    figure = plot_profiles({"weighted": profile}, reference_profile(reference), state, angle_name=dihedral)
    write_report(output, results, {"profile": figure})
    columns = {key: [None if np.isnan(v) else float(v) for v in values] for key, values in asdict(profile).items()}
    (output / "profile.json").write_text(json.dumps(columns, indent=1) + "\n")
    return f"{summary_table(results)}\n\nReport: {output / 'report.md'}"


def reference_difference(reference: dict) -> dict:
    """ΔF of a shipped reference as a row of the report's table."""
    value, error = (reference["delta_f"][key] for key in ("value", "std_error"))
    return {"value": value, "std_error": error, "interval": (value - 1.96 * error, value + 1.96 * error)}


def reference_profile(reference: dict | None) -> FreeEnergyProfile | None:
    """The profile of a shipped reference; None without one."""
    if reference is None:
        return None
    return FreeEnergyProfile(*(np.array(reference["profile"][key], dtype=np.float64) for key in ("phi", "f", "std_error")))
