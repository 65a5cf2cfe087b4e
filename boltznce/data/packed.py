"""Frames of many molecules in one small file: thinned to nearly even weights, their positions rounded to 5e-4 nm.

So that a model of many molecules can be trained again without simulating anew. A hydrogen's bond has a spread of 3e-3
nm, to the energy of which rounding adds 0.003 kT. Energies are computed anew when datasets are made of it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from boltznce.analysis.weights import normalized_weights
from boltznce.checkpoint import load_weights, save_weights
from boltznce.data.dataset import Dataset
from boltznce.errors import UserError
from boltznce.smc.resampling import systematic
from boltznce.systems.base import System
from boltznce.systems.isomers import own_isomers
from boltznce.topologies import system_pdb

__all__ = ["PackedFrames", "pack", "packed_path"]

FOLDER = Path(__file__).parent / "frames"  # files that ship, known by their names
STEP = 5e-4  # nm, to which positions are rounded
COLUMNS = ("log_weights", "time", "window", "repeat")


def pack(path: Path, datasets: Sequence[tuple[System, Dataset]], n_frames: int = 500, seed: int = 0) -> None:
    """Write ``n_frames`` of each molecule's frames to ``path``, as many in its state as in the rest.

    They are drawn by weight within each; a frame that is drawn k times is kept once, with k times the weight. Frames of
    other isomers than the structure's are left out.
    """
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for number, (system, dataset) in enumerate(datasets):
        chosen, log_weights = _thinned(system, dataset, n_frames, np.random.default_rng([seed, number]))
        kept = dataset.take(chosen)
        positions = kept.positions - kept.positions.mean(axis=1, keepdims=True)
        columns = {name: getattr(kept, name) for name in COLUMNS} | {"log_weights": log_weights}
        columns["positions"] = np.round(positions / STEP).astype(np.int16)
        tensors |= {f"{system.name}/{name}": torch.from_numpy(np.array(value)) for name, value in columns.items()}
        about[system.name] = dataset.origin | {"packed_from": len(dataset)}
    save_weights(path, tensors, about)


class PackedFrames:
    """The molecules of a file that `pack` wrote: its path, or the name of one that ships.

    Raises UserError if it is damaged, or no such file.
    """

    def __init__(self, path: Path | str) -> None:
        self.tensors, self.about = load_weights(packed_path(path))

    def __contains__(self, name: str) -> bool:
        return name in self.about

    def unpack(self, system: System, folder: Path) -> Dataset:
        """Write the dataset of a molecule to ``folder``."""
        names = (*COLUMNS, "positions")
        columns: dict[str, Any] = {name: self.tensors[f"{system.name}/{name}"].numpy() for name in names}
        positions = columns.pop("positions").astype(np.float32) * np.float32(STEP)
        energies = torch.cat([system.energy(part).double() for part in torch.from_numpy(positions).split(1024)])
        topology = None if system.topology is None else system_pdb(system)
        meta = self.about[system.name]
        return Dataset.write(folder, positions, energies.numpy(), **columns, topology=topology, meta=meta)


def packed_path(path: Path | str) -> Path:
    """The file of packed frames that is meant by its path, or by its name among those that ship; UserError if none."""
    shipped = FOLDER / f"{path}.safetensors"
    found = shipped if shipped.is_file() else Path(path)
    if not found.is_file():
        raise UserError(f"There are no packed frames at {path}: correct data.packed, or set it to null.")
    return found


def _thinned(system: System, dataset: Dataset, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of distinct frames, in order, and their log weights, of mean weight 1."""
    weights = normalized_weights(dataset.log_weights) * own_isomers(system, dataset.positions)
    inside = system.in_state(dataset.positions) if system.state is not None else np.ones(len(weights), dtype=bool)
    parts = [part for part in (np.flatnonzero(inside), np.flatnonzero(~inside)) if weights[part].sum() > 0]
    frames_of, shares_of = [], []
    for part in parts:
        drawn = systematic(torch.from_numpy(weights[part]), rng.random(), n // len(parts)).numpy()
        frames, times = np.unique(part[drawn], return_counts=True)
        frames_of.append(frames)
        shares_of.append(times / times.sum() * weights[part].sum())
    chosen, shares = np.concatenate(frames_of), np.concatenate(shares_of)
    order = np.argsort(chosen)
    return chosen[order], np.log(shares[order] / shares.mean())
