"""A reference free energy from a simulation: its contents, and how they are written."""

import json
from pathlib import Path

import numpy as np

from boltznce.data.result import SimulationResult
from boltznce.errors import UserError
from boltznce.folders import file_of_ours
from boltznce.io import atomic_file
from boltznce.systems.reference import REFERENCE_FOLDER, checked_reference, load_reference

__all__ = [
    "REFERENCE_FOLDER",
    "check_reference_place",
    "load_reference",
    "make_reference",
    "save_reference",
]


METHODS = {
    "umbrella": "umbrella sampling with exchange, MBAR (ring cut at its widest gap), block jackknife",
    "metadynamics": "well-tempered metadynamics, then weights exp(V) under the fixed bias, bootstrap over walkers",
}


def make_reference(system, meta: dict, result: SimulationResult, command: str) -> dict:
    """The contents of a reference file: ΔF, profile and surface in kT, angles in rad, what was never seen as null.

    ``meta`` is that of the dataset and ``command`` the one that makes such a reference.
    """
    if result.message:
        raise UserError(f"This result cannot be a reference: {result.message}. Simulate longer (duration).")
    settings = meta["settings"]
    name, state = system.state
    reference = {
        "system": system.name,
        "identity": system.identity,
        "dihedral": name,
        "atoms": [int(atom) for atom in system.dihedrals[name]],
        "state": list(state),
        "delta_f": {"value": round(result.delta_f, 4), "std_error": round(result.delta_f_error, 4)},
        "profile": {
            "phi": [round(float(v), 6) for v in result.centres],
            "f": _numbers(result.profile),
            "std_error": _numbers(result.profile_error),
        },
        "made_by": {
            "method": METHODS[settings["method"]],
            "ps_per_walker": meta["ps_per_walker"],
            "n_repeats": settings["n_repeats"],
            **settings["options"],
            **{key: settings[key] for key in ("timestep", "friction", "hydrogen_mass", "seed")},
            "delta_f_of_parts": [_numbers(row) for row in result.parts],
            "checks": {key: round(value, 4) for key, value in result.checks.items()},
            **{key: meta[key] for key in ("cpu_seconds", "versions", "date", "machine")},
            "command": command,
        },
    }
    for key, found in (("others", result.others), ("populations", result.populations)):
        if found:
            reference[key] = {
                name: {"value": round(value, 4), "std_error": round(error, 4)} for name, (value, error) in found.items()
            }
    if result.surface is not None:
        reference["surface"] = {
            "coordinates": list(result.surface_of),
            "f": [_numbers(row, 2) for row in result.surface],
        }
    return checked_reference(reference, "this result")


def save_reference(reference: dict, path: Path) -> None:
    """Write a reference file, whole or not at all; raises UserError where anything but an older one of it stands."""
    checked_reference(reference, path)
    check_reference_place(Path(path), reference["system"])
    with atomic_file(path) as temporary:
        lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in reference.items()]
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def check_reference_place(path: Path, system: str) -> None:
    """Raise UserError where a file stands that is no reference of the named system."""
    if path.exists() and not (
        file_of_ours(path, frozenset({"system", "delta_f", "profile"}))
        and json.loads(path.read_text(encoding="utf-8"))["system"] == system
    ):
        raise UserError(
            f"{path} is no reference of {system}, and nothing of others is overwritten: choose another output."
        )


def _numbers(values: np.ndarray, digits: int = 4) -> list[float | None]:
    return [round(float(v), digits) if np.isfinite(v) else None for v in values]
