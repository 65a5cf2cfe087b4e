"""Whether a dataset is the one that is asked for: of this system, by its record and by its energies, and made so."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from boltznce.data.dataset import Dataset
from boltznce.errors import UserError, first_few
from boltznce.settings import leaves
from boltznce.systems.base import System
from boltznce.systems.identity import FORCE_FIELD, differences
from boltznce.units import GAS_CONSTANT

__all__ = ["changed_settings", "in_words", "made_here", "require_settings", "require_system"]

N_FRAMES = 16  # whose energies are computed anew, spread over the dataset
# Energies of float32 positions, by torch in float32, OpenMM or xTB, agree far better: to 0.005 kT and 1e-6.
TOLERANCE, RELATIVE = 0.02, 1e-5  # kT; of the energy
ASTRONOMIC = 300.0  # kT above the recorded energy


def require_system(place: Path, dataset: Dataset, system: System) -> None:
    """Raise UserError, saying what differs, unless frames and energies are those of the system at its temperature.

    Every entry of the identity that the dataset has is compared; names are not. Then the energies of some frames are
    computed anew, and their handedness looked at: that finds what no record tells, such as lengths in Å.
    """
    recorded = dict(dataset.meta.get("system") or {})
    if "temperature" in (settings := dataset.meta.get("settings") or {}):
        recorded.setdefault("temperature", settings["temperature"])
    told = differences(recorded, system.identity)
    certain = {key: words for key, words in told.items() if key not in FORCE_FIELD}
    shape = dataset.positions.shape[1:]
    if not certain and shape != (system.n_atoms, system.dim):
        certain = {"shape": f"{shape[0]} atoms in {shape[1]} dimensions, not {system.n_atoms} in {system.dim}"}
    if not certain:
        index = np.unique(np.linspace(0, len(dataset) - 1, N_FRAMES).round().astype(int))
        x = torch.from_numpy(np.array(dataset.positions[index])).double()
        if off := _energies_in_words(dataset.energies[index], _energies(system, x), system):
            certain = told or {"energies": off}
        elif (system.chirality(x).mean(dim=0) < 0).any():  # which no energy tells
            certain = {"handedness": "another handedness of a stereocentre in most frames"}
    if certain:
        owner = recorded.get("name")
        named = "" if owner in (None, system.name) else f" ({owner}, not {system.name})"
        raise UserError(
            f"{place} holds data of another system or force field{named}: {' and '.join(certain.values())}. Set "
            "data.folder to another folder; data are made there if it does not exist."
        )


def require_settings(place: Path, recorded: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise UserError, with both values, where data were made with other settings than those asked for.

    Data that no simulation of ours has made, and settings that are not recorded, cannot be compared.
    """
    if changed := changed_settings(recorded, asked):
        raise UserError(
            f"{place} holds data made with other settings ({in_words(changed)}): ask for what is there, choose another "
            "folder (data.folder=; of simulate.py name=), or take the data as they are (data.accept=any)."
        )


def made_here(settings: Mapping[str, Any]) -> bool:
    """Whether recorded settings are those of a simulation or of exact draws of ours, and not of whoever else's."""
    return bool({"duration", "n_samples"} & set(settings))


def changed_settings(recorded: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Setting -> (recorded, asked for) of a simulation or of exact draws, where both are known and differ."""
    if not made_here(recorded):
        return {}
    recorded, asked = ({name.removeprefix("options."): v for name, v in leaves(each)} for each in (recorded, asked))
    if recorded["method"] != asked["method"]:
        return {"method": (recorded["method"], asked["method"])}
    if asked["method"] != "umbrella":
        recorded.pop("dihedral", None)  # written down with the frames, and nothing else
    pairs = {key: (recorded[key], value) for key, value in asked.items() if key in recorded}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def in_words(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Changed settings in words, the first few of them."""
    return first_few([f"{key}: {there}, not {here}" for key, (there, here) in changed.items()])


def _energies(system: System, x: torch.Tensor) -> np.ndarray:
    """Reduced energies (n,), frame by frame: so few are never worth compiling for."""
    with torch.no_grad():
        return torch.cat([system.energy(row.unsqueeze(0)) for row in x]).double().cpu().numpy()


def _energies_in_words(recorded: np.ndarray, here: np.ndarray, system: System) -> str | None:
    """How energies (n,) differ, with the likely reason; None where they agree."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        off = np.abs(here - recorded)
        if (off <= TOLERANCE + RELATIVE * np.abs(recorded)).all():
            return None
        ratio = here / recorded
    median = float(np.median(off))
    words = f"recorded energies are off by {median:.3g} kT (median of {len(off)} frames)"
    if not np.isfinite(here).all() or median > ASTRONOMIC:
        return f"{words}, as if positions were not in nm or atoms in another order"
    if np.ptp(here - recorded) < TOLERANCE + RELATIVE * median:
        return f"{words}, all alike, as if from another zero"
    if np.ptp(ratio) < 1e-3 * abs(ratio.mean()):
        kelvin = f" at {system.temperature * ratio.mean():.4g} {system.temperature_unit}".rstrip()
        unit = ", or in kJ/mol" if abs(ratio.mean() * GAS_CONSTANT * system.temperature - 1) < 0.01 else ""
        return f"{words}, as if they were energies{kelvin}{unit}"
    return f"{words}, as with another force field, cutoff or order of atoms"
