"""Whether data or samples are those that are asked for: of this system, by record and by energies, and made so."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from boltznce.analysis.reweighting import WeightedSamples
from boltznce.data.dataset import Dataset
from boltznce.errors import UserError, first_few
from boltznce.settings import leaves
from boltznce.systems.base import System
from boltznce.systems.identity import FORCE_FIELD, differences
from boltznce.units import GAS_CONSTANT

__all__ = ["changed_settings", "in_words", "made_here", "require_samples", "require_settings", "require_system"]

N_FRAMES = 32  # whose energies are computed anew, spread over the dataset
# Energies of float32 positions, by torch in float32, OpenMM or xTB, agree far better: to 0.005 kT and 1e-6.
TOLERANCE, RELATIVE = 0.02, 1e-5  # kT; of the energy
RELATIVE_OF_DRAWS = 1e-3  # some of a flow's draws clash
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
        found = _told_by_frames(dataset.positions[index], dataset.energies[index], system, RELATIVE, 0.5)
        certain = told if told and "energies" in found else found
    if certain:
        named = _named(recorded.get("name"), system)
        raise UserError(
            f"{place} holds data of another system or force field{named}: {' and '.join(certain.values())}. Set "
            "data.folder to another folder; data are made there if it does not exist."
        )


def require_samples(place: Path, samples: WeightedSamples, system: System) -> None:
    """Raise UserError, saying what differs, unless weighted samples are of the system at its temperature.

    By the energies of some of the better half of them: those of clashes are rounded.
    """
    shape, wanted = samples.positions.shape[1:], (system.n_atoms, system.dim)
    told = {} if shape == wanted else {"shape": f"{shape[0]} atoms in {shape[1]} dimensions, not {wanted[0]}"}
    order = np.argsort(samples.energy)[: np.isfinite(samples.energy).sum() // 2 + 1]
    if not told and np.isfinite(samples.energy).any():
        index = order[np.unique(np.linspace(0, len(order) - 1, N_FRAMES).round().astype(int))]
        told = _told_by_frames(samples.positions[index], samples.energy[index], system, RELATIVE_OF_DRAWS, 0.99)
    if told:
        named = _named(samples.meta.get("system"), system)
        raise UserError(
            f"{place} holds samples of another system or temperature than the run's{named}: "
            f"{' and '.join(told.values())}. Give samples= of this system, or run= of the run that they are of."
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


def _named(owner: str | None, system: System) -> str:
    return "" if owner in (None, system.name) else f" ({owner}, not {system.name})"


def _told_by_frames(
    positions: np.ndarray, recorded: np.ndarray, system: System, relative: float, share: float
) -> dict[str, str]:
    """What energies (n,) that are computed anew tell; and the handedness, which no energy tells, of a ``share``."""
    x = torch.from_numpy(np.array(positions)).double()
    if off := _energies_in_words(recorded, _energies(system, x), system, relative):
        return {"energies": off}
    if ((system.chirality(x) < 0).double().mean(dim=0) > share).any():
        return {"handedness": f"another handedness of a stereocentre in {'most' if share < 0.9 else 'all'} frames"}
    return {}


def _energies(system: System, x: torch.Tensor) -> np.ndarray:
    """Reduced energies (n,), frame by frame: so few are never worth compiling for."""
    with torch.no_grad():
        return torch.cat([system.energy(row.unsqueeze(0)) for row in x]).double().cpu().numpy()


def _energies_in_words(recorded: np.ndarray, here: np.ndarray, system: System, relative: float) -> str | None:
    """How energies (n,) differ, with the likely reason; None where they agree."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        off = np.abs(here - recorded)
        if (off <= TOLERANCE + relative * np.abs(recorded)).all():
            return None
        ratio = here / recorded
    median = float(np.median(off))
    words = f"recorded energies are off by {median:.3g} kT (median of {len(off)} frames, at most {off.max():.3g})"
    if not np.isfinite(here).all() or median > ASTRONOMIC:
        return f"{words}, as if positions were not in nm or atoms in another order"
    if np.ptp(here - recorded) < TOLERANCE + relative * median:
        return f"{words}, all alike, as if from another zero"
    if np.ptp(ratio) < 1e-3 * abs(ratio.mean()):
        kelvin = f" at {system.temperature * ratio.mean():.4g} {system.temperature_unit}".rstrip()
        unit = ", or in kJ/mol" if abs(ratio.mean() * GAS_CONSTANT * system.temperature - 1) < 0.01 else ""
        return f"{words}, as if they were energies{kelvin}{unit}"
    return f"{words}, as with another force field, cutoff or order of atoms"
