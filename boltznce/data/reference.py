"""The reference free energies that ship with the package: one small JSON file a system."""

import json
from pathlib import Path

import numpy as np

from boltznce.data.umbrella import UmbrellaResult
from boltznce.errors import UserError
from boltznce.folders import file_of_ours
from boltznce.io import atomic_file

__all__ = ["REFERENCE_FOLDER", "check_reference_place", "load_reference", "make_reference", "save_reference"]

REFERENCE_FOLDER = Path(__file__).parent / "reference"
KEYS = {"system", "force_field", "temperature", "dihedral", "state", "delta_f", "profile", "made_by"}


def make_reference(system, meta: dict, result: UmbrellaResult, command: str) -> dict:
    """The contents of a reference file: ΔF and profile in kT, angles in rad, gaps of the profile as null.

    ``meta`` is that of the dataset and ``command`` the one that makes such a reference.
    """
    settings, options = meta["settings"], meta["settings"]["options"]
    name, state = system.state or (None, (0.0, 2.0))
    reference = {
        "system": system.name,
        "force_field": list(system.forcefield),
        "temperature": system.temperature,
        "dihedral": name,
        "state": list(state),
        "delta_f": {"value": round(result.delta_f, 4), "std_error": round(result.delta_f_error, 4)},
        "profile": {
            "phi": [round(float(v), 6) for v in result.centres],
            "f": _numbers(result.profile),
            "std_error": _numbers(result.profile_error),
        },
        "made_by": {
            "method": "umbrella sampling with exchange, MBAR (ring cut at its widest gap), block jackknife",
            "ns_per_window": meta["ps_per_walker"] * settings["n_repeats"] / 1000,
            "n_repeats": settings["n_repeats"],
            "n_windows": options["n_windows"],
            "kappa_kj_mol_rad2": options["kappa"],
            "exchange_interval_ps": options["exchange_interval"],
            **{key: settings[key] for key in ("timestep", "friction", "hydrogen_mass", "seed")},
            "delta_f_of_blocks": [_numbers(row) for row in result.block_delta_f],
            **{key: meta[key] for key in ("versions", "date", "machine")},
            "command": command,
        },
    }
    return _validate(reference, "this result")


def save_reference(reference: dict, path: Path) -> None:
    """Write a reference file, whole or not at all; raises UserError where anything but an older one of it stands."""
    _validate(reference, path)
    check_reference_place(Path(path), reference["system"])
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(reference, indent=1) + "\n", encoding="utf-8")


def check_reference_place(path: Path, system: str) -> None:
    """Raise UserError where a file stands that is no reference of the named system."""
    if path.exists() and not (
        file_of_ours(path, frozenset(KEYS)) and json.loads(path.read_text(encoding="utf-8"))["system"] == system
    ):
        raise UserError(
            f"{path} is no reference of {system}, and nothing of others is overwritten: choose another output."
        )


def load_reference(path: Path) -> dict:
    """Read and check a reference file; raises UserError if it is none."""
    try:
        return _validate(json.loads(Path(path).read_text(encoding="utf-8")), path)
    except FileNotFoundError as error:
        raise UserError(f"There is no reference {path}: make it with scripts/simulate.py reference=true.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no reference file: make it with scripts/simulate.py reference=true.") from error


def _numbers(values: np.ndarray) -> list[float | None]:
    return [round(float(v), 4) if np.isfinite(v) else None for v in values]


def _validate(reference: dict, source: object) -> dict:
    fault = None
    if not isinstance(reference, dict) or KEYS - set(reference):
        fault = "keys are missing"
    elif len({len(reference["profile"].get(key, ())) for key in ("phi", "f", "std_error")}) != 1:
        fault = "the columns of its profile differ in length"
    elif not all(np.isfinite(reference["delta_f"].get(key, np.nan)) for key in ("value", "std_error")):
        fault = (
            "its ΔF or standard error is not a finite number (too short a simulation, or a state that was never seen)"
        )
    if fault:
        raise UserError(f"{source} cannot be a reference: {fault}. Make it by scripts/simulate.py reference=true.")
    return reference
