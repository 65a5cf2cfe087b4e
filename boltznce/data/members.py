"""A system's datasets: one in a folder for a single system, one a member in folders of their own for a family.

A member's data are in ``folder / system.label(member)``.
"""

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from boltznce.data.dataset import DATASET, Dataset
from boltznce.data.simulate import plan, run_plans
from boltznce.errors import UserError
from boltznce.folders import claim, only_process
from boltznce.systems.base import System
from boltznce.systems.family import PeptideFamily
from boltznce.training import step_generator

__all__ = ["draw_dataset", "load_data", "make_data", "simulate_members"]


def make_data(
    system: System | PeptideFamily,
    folder: Path,
    *,
    simulation: Mapping[str, Any] | None,
    n_samples: int | None = None,
    seed: int = 0,
) -> dict[str, Dataset]:
    """The datasets of all members, by name; those that are not there yet are made first.

    Args:
        simulation: settings of `simulate_members`; None draws ``n_samples`` exactly, with ``seed``.

    Raises UserError as `simulate_members`, `draw_dataset` and `load_data` do.
    """
    for member in _unfinished(system, system.all_members(), folder):
        claim(_place(system, member, folder), DATASET, "another data.folder")
    if _unfinished(system, system.all_members(), folder):
        with only_process(folder, beside=True, wait=True):  # which may have made them
            missing = _unfinished(system, system.all_members(), folder)
            if simulation is not None and missing:
                _simulate(system, missing, folder, **simulation)
            for member in missing if simulation is None else ():
                draw_dataset(member, _place(system, member, folder), n_samples, seed)
    return {member.name: load_data(system, member, folder) for member in system.all_members()}


def simulate_members(
    system: System | PeptideFamily, folder: Path, method: str | None = None, **settings: Any
) -> dict[str, Dataset]:
    """Simulate every member, several at a time, one process for each repeat of each; returns the datasets by name.

    Args:
        method, settings: see `boltznce.data.simulate.simulate`, in place of ``system.simulation``;
            ``settings["test"]``, if given, replaces some of them for members that are nothing but tests.

    A dataset that is there is left alone, an unfinished one goes on. Raises UserError as `plan` does.
    """
    with only_process(folder, beside=True, wait=True):
        return _simulate(system, system.all_members(), folder, method, **settings)


def load_data(system: System | PeptideFamily, member: System, folder: Path) -> Dataset:
    """The dataset of a member; raises UserError if it is missing, damaged or of another system or force field."""
    place = _place(system, member, folder)
    dataset = Dataset.load(place)
    made_of = dataset.meta.get("system", {})
    same = all(made_of.get(key, value) == value for key, value in member.identity.items())
    if not same or dataset.positions.shape[1:] != (member.n_atoms, member.dim):
        raise UserError(
            f"{place} holds data of another system or force field ({made_of.get('name')}, not {member.name}): set "
            "data.folder to another folder; data are made there if it does not exist."
        )
    return dataset


def draw_dataset(system: System, folder: Path, n_samples: int, seed: int = 0) -> Dataset:
    """Write ``n_samples`` exact draws as a dataset to ``folder``; raises UserError for a system that has none."""
    x = system.sample(n_samples, step_generator(seed, "data", 0))
    meta = {
        "system": system.identity,
        "settings": {"method": "exact", "n_samples": n_samples, "seed": seed},
        "date": date.today().isoformat(),
    }
    return Dataset.write(folder, x.numpy(), system.energy(x).double().numpy(), meta=meta)


def _place(system: System | PeptideFamily, member: System, folder: Path) -> Path:
    return Path(folder) / system.label(member)


def _unfinished(system: System | PeptideFamily, members: Sequence[System], folder: Path) -> list[System]:
    """Members without a dataset."""
    return [member for member in members if not (_place(system, member, folder) / "meta.yaml").exists()]


def _simulate(
    system: System | PeptideFamily,
    members: Sequence[System],
    folder: Path,
    method: str | None = None,
    *,
    n_processes: int | None = None,
    progress: bool = True,
    test: Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Dataset]:
    settings = {"method": "umbrella", **system.simulation, **settings, **({"method": method} if method else {})}
    trained = [*system.members("train"), *system.members("validation")]
    plans = {}
    for member in members:
        more = {} if member in trained else test or {}
        plans[member.name] = plan(member, _place(system, member, folder), **{**settings, **more})
    run_plans(list(plans.values()), n_processes, f"{settings['method']} {system.name}", progress)
    return {name: each.finish() for name, each in plans.items()}
