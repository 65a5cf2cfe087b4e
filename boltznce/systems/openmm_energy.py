"""OpenMM's own energy, one conformer at a time: the reference for the torch energy, and its fallback."""

from functools import partial

import openmm
import torch
from torch import Tensor

from boltznce.systems.external import ExternalEnergy, in_workers
from boltznce.systems.single_point import OpenMMPoints
from boltznce.systems.workers import WORKERS, WorkerPool

__all__ = ["OpenMMEnergy"]

MIN_IN_WORKERS = 256  # below, sending costs more than it gains
PIECE = 512


class OpenMMEnergy(ExternalEnergy):
    """Potential energy on OpenMM's Reference platform: positions (batch, n_atoms, 3) in nm -> kJ/mol, (batch,).

    Computed in double precision on the CPU, returned in the dtype and on the device of x; differentiable once. Batches
    of 256 and more are shared by worker processes where there is more than one core (none on Windows); the values are
    the same to the last bit.

    Args:
        system: openmm.System.
        n_workers: processes at most; default one a core, 1 for none.
    """

    def __init__(self, system: openmm.System, n_workers: int | None = None):
        self.system = system
        self.pool = WorkerPool(partial(OpenMMPoints, system), n_workers)
        self._points: OpenMMPoints | None = None

    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (batch,) in kJ/mol and forces (batch, n_atoms, 3) in kJ/mol/nm, float64."""
        positions = x.detach().double().cpu().numpy()
        if WORKERS and len(positions) >= MIN_IN_WORKERS and self.pool.n_workers > 1:
            energies, forces = in_workers(self.pool, positions, PIECE)
        else:
            self._points = self._points or OpenMMPoints(self.system)
            energies, forces = self._points(positions)
        return torch.from_numpy(energies), torch.from_numpy(forces)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_points": None}  # an OpenMM Context can be neither pickled nor shared
