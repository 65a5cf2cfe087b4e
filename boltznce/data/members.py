"""A system's datasets: one in a folder for a single system, one a member in folders of their own for a family.

A member's data are in ``folder / system.label(member)``.
"""

import contextlib
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from boltznce.data.dataset import DATASET, Dataset
from boltznce.data.matching import made_here, require_settings, require_system
from boltznce.data.packed import PackedFrames
from boltznce.data.simulate import Plan, plan, run_plans
from boltznce.errors import UserError
from boltznce.folders import claim, only_process
from boltznce.settings import require
from boltznce.systems.base import System
from boltznce.systems.family import PeptideFamily
from boltznce.training import step_generator

__all__ = ["draw_dataset", "load_data", "make_data", "simulate_members", "simulation_settings"]

ACCEPT = ("same", "any")


def make_data(
    system: System | PeptideFamily,
    folder: Path,
    *,
    simulation: Mapping[str, Any] | None,
    n_samples: int | Any = None,
    seed: int = 0,
    accept: str = "same",
    packed: Path | str | None = None,
) -> dict[str, Dataset]:
    """The datasets of all members, by name; those that are not there yet are made first.

    Args:
        packed: a file of thinned frames (`boltznce.data.packed`), which are taken where it has them.
        simulation: settings of `simulate_members`; None draws ``n_samples`` exactly, with ``seed``.
        accept: "same": data that are there must have been made with these settings; "any": however they were made.

    Raises UserError as `simulate_members`, `draw_dataset` and `load_data` do, before anything is made.
    """
    if accept not in ACCEPT:
        raise UserError(f"Unknown data.accept={accept}: choose one of {', '.join(ACCEPT)}.")
    everyone = system.all_members()
    missing = _unfinished(system, everyone, folder)
    for member in missing:
        claim(_place(system, member, folder), DATASET, "another data.folder")
    with only_process(folder, beside=True, wait=True) if missing else contextlib.nullcontext():
        missing = _unfinished(system, everyone, folder)  # another process may have made some
        frames = PackedFrames(packed) if packed and missing else None
        for member in missing:
            if frames is not None and member.name in frames:
                frames.unpack(member.cheap, _place(system, member, folder))
        missing = _unfinished(system, missing, folder)
        there = {member.name: load_data(system, member, folder) for member in everyone if member not in missing}
        compared = [member for member in everyone if accept == "same" and _made_here(there.get(member.name))]
        if simulation is None:
            for member in compared:
                recorded = there[member.name].meta["settings"]
                require_settings(_place(system, member, folder), recorded, _exact_settings(n_samples, seed))
            for member in missing:
                draw_dataset(member, _place(system, member, folder), n_samples, seed)
        else:
            for each in _simulated(system, [*compared, *missing], folder, **simulation).values():
                if each.jobs:
                    each.finish()
    return {member.name: there.get(member.name) or load_data(system, member, folder) for member in everyone}


def simulate_members(
    system: System | PeptideFamily, folder: Path, method: str | None = None, **settings: Any
) -> dict[str, Dataset]:
    """Simulate every member, several at a time, one process for each repeat of each; returns the datasets by name.

    Args:
        method, settings: see `boltznce.data.simulate.simulate`, in place of ``system.simulation``;
            ``settings["test"]``, if given, replaces some of them for members that are nothing but tests.

    A dataset that is there, and was made with these settings, stays; an unfinished one goes on. Raises UserError as
    `plan` does.
    """
    with only_process(folder, beside=True, wait=True):
        plans = _simulated(system, system.all_members(), folder, method, **settings)
        return {name: each.finish() for name, each in plans.items()}


def load_data(system: System | PeptideFamily, member: System, folder: Path) -> Dataset:
    """The dataset of a member; raises UserError if it is missing, damaged or, as far as can be told, of another system.

    Of a member with a proxy it is the proxy's. See `boltznce.data.matching.require_system`.
    """
    place = _place(system, member, folder)
    dataset = Dataset.load(place)
    require_system(place, dataset, member.cheap)
    return dataset


def draw_dataset(system: System, folder: Path, n_samples: int, seed: int = 0) -> Dataset:
    """Write ``n_samples`` exact draws as a dataset to ``folder``; raises UserError for a system that has none."""
    system = system.cheap
    x = system.sample(n_samples, step_generator(seed, "data", 0))
    meta = {
        "system": system.identity,
        "settings": _exact_settings(n_samples, seed),
        "date": date.today().isoformat(),
    }
    return Dataset.write(folder, x.numpy(), system.energy(x).double().numpy(), meta=meta)


def _exact_settings(n_samples: int | None, seed: int) -> dict[str, Any]:
    return {"method": "exact", "n_samples": n_samples, "seed": seed}


def simulation_settings(system: System | PeptideFamily, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `boltznce.data.jobs.jobs_of`: the given ones in place of the system's own."""
    return {"method": "auto", **system.simulation, **given}


def _place(system: System | PeptideFamily, member: System, folder: Path) -> Path:
    return Path(folder) / system.label(member)


def _unfinished(system: System | PeptideFamily, members: Sequence[System], folder: Path) -> list[System]:
    """Members without a dataset."""
    return [member for member in members if not (_place(system, member, folder) / "meta.yaml").exists()]


def _made_here(dataset: Dataset | None) -> bool:
    return dataset is not None and made_here(dataset.meta.get("settings") or {})


def _simulated(
    system: System | PeptideFamily,
    members: Sequence[System],
    folder: Path,
    method: str | None = None,
    *,
    n_processes: int | None = None,
    progress: bool = True,
    test: Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Plan]:
    """The members' simulations by name, run to their end."""
    require(n_processes=n_processes)
    settings = simulation_settings(system, settings | ({"method": method} if method else {}))
    trained = [*system.members("train"), *system.members("validation")]
    plans = {}
    for member in members:
        more = {} if member in trained else test or {}
        plans[member.name] = plan(member, _place(system, member, folder), **{**settings, **more})
    if any(each.jobs for each in plans.values()):
        run_plans(list(plans.values()), n_processes, f"simulation of {system.name}", progress)
    return plans
