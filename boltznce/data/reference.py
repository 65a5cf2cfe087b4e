"""A reference free energy from a simulation: its contents, and how they are written."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from boltznce.data import umbrella
from boltznce.data.dataset import Dataset
from boltznce.data.engine import dihedral_angle
from boltznce.data.result import SimulationResult, of_walkers
from boltznce.data.umbrella import ring_of
from boltznce.errors import UserError
from boltznce.folders import file_of_ours
from boltznce.io import atomic_file
from boltznce.systems.isomers import own_isomers
from boltznce.systems.reference import REFERENCE_FOLDER, checked_reference, load_reference

__all__ = [
    "REFERENCE_FOLDER",
    "check_reference_place",
    "load_reference",
    "make_reference",
    "require_reference",
    "result_of",
    "save_reference",
]

METHODS = {
    "umbrella": "umbrella sampling with exchange, MBAR (ring cut at its widest gap), block jackknife",
    "metadynamics": "well-tempered metadynamics, then weights exp(V) under the fixed bias, errors by walkers",
}


ANNEALED = "; of a proxy, some of its frames annealed from it to the system"


def result_of(dataset: Dataset, system, **options) -> SimulationResult:
    """ΔF of the system's state, profile and checks of its dataset, made with a bias.

    ``options`` go to `boltznce.data.umbrella.analyse` or `boltznce.data.result.of_walkers`. Raises UserError for other
    data, and for umbrella windows along another dihedral than the state's.
    """
    settings, state = dataset.meta["settings"], system.state
    if not system.exact:
        require_reference(system, settings["method"], _name_of(system, settings["dihedral"]))
    if settings["method"] == "metadynamics":
        # where walkers were hot a peptide bond may have turned, which never turns back
        own = own_isomers(system, dataset.positions)
        dataset = dataset.take(own)
        pairs = settings["options"]["bias_along"]
        names = {state.coordinate, *itertools.chain(*pairs)}
        coordinates = {name: system.coordinate(np.asarray(dataset.positions), name) for name in sorted(names)}
        options["limits"] = {name: ends for name in names if (ends := system.coordinate_range(name)) is not None}
        columns = (dataset.window, dataset.time, dataset.repeat)
        result = of_walkers(coordinates, dataset.log_weights, *columns, state=state, pairs=pairs, **options)
        change, others = max(dataset.meta["bias_change"]), float(1 - own.mean())
        more = {"late change of the bias (kT)": change, "share of other isomers": others}
        checks = {**result.checks, **more}
        if "refined" in dataset.meta:  # some frames of a walker tell nothing of how often it crossed
            del checks["transitions a walker"]
        return dataclasses.replace(result, checks=checks)
    angle = dihedral_angle(dataset.positions, settings["dihedral"])
    ring = ring_of(settings["options"], settings["temperature"], angle)
    columns = (dataset.window, dataset.time, dataset.repeat)
    return umbrella.analyse(angle, *columns, ring=ring, state=state.interval, **options)


def require_reference(system, sampling: str, dihedral: str | None = None) -> None:
    """Raise UserError where sampling along ``dihedral`` (None: the state's) gives no reference of a state."""
    if system.exact:
        raise UserError(f"{system.name} has an exact reference, on a grid: leave out reference=true.")
    if sampling not in ("umbrella", "metadynamics", "auto"):
        raise UserError("A reference needs a bias along a dihedral: set sampling to umbrella or metadynamics.")
    if system.proxy is not None and sampling == "umbrella":
        raise UserError(f"Frames of the proxy of {system.name} need independent walkers: set sampling=metadynamics.")
    if system.state is not None and system.state.name is None:
        raise UserError(
            "A reference is of an interval of a dihedral that has a name, and the state is "
            f"{system.state_in_words()}: set system.state, as [phi,[0.0,2.0]]."
        )
    if system.state is None:
        raise UserError(f"A reference is of a state, and {system.name} has none: set system.state, as [phi,[0.0,2.0]].")
    if sampling == "umbrella" and dihedral not in (None, system.state.coordinate):
        raise UserError(
            f"The state is one of {system.state.coordinate}, and the simulation along {dihedral}: set system.state to "
            f"one of {dihedral}, or leave settings.dihedral out."
        )


def _name_of(system, atoms: Sequence[int] | None) -> str | None:
    return next((name for name, four in system.dihedrals.items() if list(four) == list(atoms or ())), None)


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
        "atoms": [int(atom) for atom in system.coordinate_of(name).atoms],
        "state": list(state),
        "delta_f": {"value": round(result.delta_f, 4), "std_error": round(result.delta_f_error, 4)},
        "profile": {
            "phi": [round(float(v), 6) for v in result.centres],
            "f": _numbers(result.profile),
            "std_error": _numbers(result.profile_error),
        },
        "made_by": {
            "method": METHODS[settings["method"]] + (ANNEALED if "refinement" in meta else ""),
            "ps_per_walker": meta["ps_per_walker"],
            "n_repeats": settings["n_repeats"],
            **settings["options"],
            **({"proxy": system.proxy.identity} if "refinement" in meta else {}),
            **{key: meta[key] for key in ("refined", "refinement") if key in meta},
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
