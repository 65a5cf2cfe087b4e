"""The reference free energies that ship with the package: one small JSON file a system, of it and its state alone."""

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from boltznce.command_line import command_line
from boltznce.errors import UserError
from boltznce.states import State
from boltznce.systems.coordinates import Coordinate
from boltznce.systems.identity import differences

__all__ = ["REFERENCE_FOLDER", "checked_reference", "find_reference", "load_reference"]

REFERENCE_FOLDER = Path(__file__).parents[1] / "data" / "reference"
KEYS = {"system", "identity", "dihedral", "atoms", "state", "delta_f", "profile", "made_by"}


class _Known(Protocol):
    name: str
    state: State | None

    @property
    def identity(self) -> dict[str, Any]: ...

    def coordinate_of(self, given: Any) -> Coordinate: ...


def find_reference(system: _Known) -> dict[str, Any] | None:
    """The reference that ships under a system's name, if it is of this system, dihedral and state in every entry."""
    path, state = REFERENCE_FOLDER / f"{system.name}.json", system.state
    if not path.is_file() or state is None or state.name is None:
        return None
    reference = load_reference(path)
    asked = {
        "dihedral": state.coordinate,
        "atoms": list(system.coordinate_of(state.coordinate).atoms),
        "state": list(state.interval),
    }
    fits = all(reference[key] == value for key, value in asked.items())
    return reference if fits and not differences(reference["identity"], system.identity) else None


def load_reference(path: Path) -> dict[str, Any]:
    """Read and check a reference file; raises UserError if it is none."""
    remedy = f"make it with {command_line('simulate', 'reference=true')}"
    try:
        return checked_reference(json.loads(Path(path).read_text(encoding="utf-8")), path)
    except FileNotFoundError as error:
        raise UserError(f"There is no reference {path}: {remedy}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no reference file: {remedy}.") from error


def checked_reference(reference: dict, source: object) -> dict:
    """The reference itself; raises UserError, naming its ``source``, if it is none."""
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
        remedy = command_line("simulate", "reference=true")
        raise UserError(f"{source} cannot be a reference: {fault}. Make it with {remedy}.")
    return reference
