"""What a report says of where its numbers come from: temperature, energy, data and reference, in words."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from boltznce.data.dataset import Dataset, contents_digest
from boltznce.errors import UserError, first_few
from boltznce.methods.workspace import Workspace
from boltznce.systems.base import System

__all__ = ["data_in_words", "data_notes", "energy_in_words", "provenance", "reference_in_words"]


def provenance(work: Workspace) -> dict[str, str]:
    """Rows of the report's table of settings."""
    member = (work.system.members("test") or work.system.members("train"))[0]
    return {
        "temperature": f"{member.temperature:g} {member.temperature_unit}".rstrip(),
        "energy": energy_in_words(member.identity),
        "data": _data(work),
        "reference": reference_in_words(member),
    }


def energy_in_words(identity: Mapping[str, Any]) -> str:
    """Force field and cutoff of a molecule, parameters of a system in the plane."""
    if "force_field" in identity:
        cutoff = f" {identity['cutoff_nm']:g} nm" if identity.get("cutoff_nm") else ""
        parts = [*identity["force_field"], *([identity["nonbonded"] + cutoff] if "nonbonded" in identity else [])]
        return " + ".join(parts)
    values = [f"{key} {value:g}" for key, value in identity.get("parameters", {}).items() if isinstance(value, float)]
    return ", ".join([identity.get("kind", identity["name"]), *values])


def data_in_words(meta: Mapping[str, Any]) -> str:
    """How a dataset was made, as far as its ``meta.yaml`` tells."""
    settings = meta.get("settings") or {}
    words = [str(settings.get("method", "made in a way not recorded")).replace("_", " ")]
    if "duration" in settings:
        words.append(f"{settings['duration']:g} ps a walker after {settings['equilibration']:g}")
    if "files" in settings:
        words.append(first_few(settings["files"], most=1))
        words += [f"stride {settings['stride']}"] if settings["stride"] > 1 else []
    words += [f"{meta['rigid_bonds']} rigid bonds"] if meta.get("rigid_bonds") else []
    words += ["explicit solvent left out"] if meta.get("atoms_left_out") else []
    if "n_repeats" in settings:
        words.append(f"{settings['n_repeats']} repeats")
    words += [f"{key} {settings[key]}" for key in ("seed",) if key in settings]
    words += [f"{meta['n_frames']} frames", *([str(meta["date"])] if "date" in meta else [])]
    words += [f"digest {contents_digest(meta)}"] if "digests" in meta else []
    return ", ".join(words)


def reference_in_words(system: System) -> str:
    """Where the reference free energy of a system comes from; "none" without one."""
    reference = system.reference()
    if reference is None:
        return "none"
    made_by = reference.get("made_by")
    if made_by is None:
        return "exact, on a grid"
    return f"{made_by['method']}, {made_by['date']}; ships with the package"


def data_notes(work: Workspace) -> list[str]:
    """Sentences that datasets say of themselves, each once: what they differ in from those of a simulation."""
    return list(dict.fromkeys(note for meta in _metas(work).values() for note in meta.get("notes", ())))


def _data(work: Workspace) -> str:
    """Of the first of the datasets, and how many others there are."""
    found = [f"{place}: {data_in_words(meta)}" for place, meta in _metas(work).items()]
    return first_few(found, most=1) or "none"


def _metas(work: Workspace) -> dict[Path, Mapping[str, Any]]:
    """What each dataset of the run says, by its folder."""
    folder, found = work.config.get("data", {}).get("folder"), {}
    for member in work.system.all_members() if folder else ():
        place = Path(folder) / work.system.label(member)
        with contextlib.suppress(UserError):  # there is none, or a damaged one
            found[place] = Dataset.read_meta(place)
    return found
