"""Datasets of many molecules: a folder with one dataset for each, and an index that tells them from others."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from boltznce.data.dataset import Dataset
from boltznce.data.simulate import plan, run_plans
from boltznce.errors import UserError
from boltznce.io import atomic_file, file_digest
from boltznce.systems.family import PeptideFamily

__all__ = ["is_complete", "load_many", "simulate_many"]

INDEX = "index.yaml"


def simulate_many(
    family: PeptideFamily,
    folder: Path,
    method: str | None = None,
    *,
    n_processes: int | None = None,
    progress: bool = True,
    **settings,
) -> dict[str, Dataset]:
    """Simulate every peptide of a family, several at a time, one process for each repeat of each; returns sequence -> dataset.

    Args:
        folder: gets ``<sequence>/`` for each, and ``index.yaml``: sequence -> role, atoms, frames, digest of its ``meta.yaml``.
        method, settings: see `boltznce.data.simulate.plan`, in place of ``family.simulation``; ``settings["test"]``, if given, replaces
            some of them for test peptides.

    Peptides whose dataset is there are left alone, the unfinished ones of a killed call go on. Raises UserError as `plan` does.
    """
    folder, for_test = Path(folder), settings.pop("test", None) or {}
    settings = family.simulation | settings
    own_method = settings.pop("method", "replica_exchange")
    method = method or own_method
    plans = {
        sequence: plan(family.member(sequence), folder / sequence, method, **(settings | for_test if role == "test" else settings))
        for role, sequences in family.sequences.items()
        for sequence in sequences
    }
    run_plans(list(plans.values()), n_processes, f"{method} {family.name}", progress)
    datasets = {sequence: each.finish() for sequence, each in plans.items()}
    _write_index(family, folder, datasets)
    return datasets


def load_many(family: PeptideFamily, folder: Path, roles: tuple[str, ...] = ("train", "validation", "test")) -> dict[str, Dataset]:
    """The datasets of a family's peptides; raises UserError for what is missing, damaged, changed since, or of another force field."""
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise UserError(f"There are no datasets in {folder} (no {INDEX}): make them with scripts/simulate.py, or correct the path.")
    try:
        index = dict(yaml.safe_load((folder / INDEX).read_text())["peptides"])
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / INDEX} is damaged: run scripts/simulate.py again, which writes it anew.") from error
    datasets = {}
    for role in roles:
        for sequence in family.sequences[role]:
            if sequence not in index:
                raise UserError(f"{folder} has no data of {sequence}: run scripts/simulate.py with this list of peptides.")
            dataset = Dataset.load(folder / sequence)
            if file_digest(folder / sequence / "meta.yaml") != index[sequence]["digest"]:
                raise UserError(f"{folder / sequence} is not what {INDEX} says: delete it and run scripts/simulate.py again.")
            member = family.member(sequence)
            if dataset.meta.get("system") != member.identity:
                raise UserError(f"{folder / sequence} holds data of another system or force field: set data.folder to another folder.")
            datasets[sequence] = dataset
    return datasets


def is_complete(family: PeptideFamily, folder: Path) -> bool:
    """Whether the folder has an index with all peptides of the family."""
    path = Path(folder) / INDEX
    return path.is_file() and set(family.all_sequences) <= set((yaml.safe_load(path.read_text()) or {}).get("peptides", {}))


def _write_index(family: PeptideFamily, folder: Path, datasets: Mapping[str, Dataset]) -> None:
    entries = {
        sequence: {
            "role": role,
            "n_atoms": int(datasets[sequence].positions.shape[1]),
            "n_frames": len(datasets[sequence]),
            "digest": file_digest(folder / sequence / "meta.yaml"),
        }
        for role, sequences in family.sequences.items()
        for sequence in sequences
    }
    with atomic_file(folder / INDEX) as path:
        path.write_text(yaml.safe_dump({"family": family.name, "selection": family.selection, "peptides": entries}, sort_keys=False))
