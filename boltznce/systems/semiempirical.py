"""GFN2-xTB in implicit water as an energy, by tblite."""

import importlib.util
import logging
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from boltznce.errors import UserError
from boltznce.systems.external import ExternalEnergy, in_workers
from boltznce.systems.single_point import XTBPoints
from boltznce.systems.workers import WORKERS, WorkerPool

__all__ = ["XTBEnergy"]

PIECE = 16  # about 10 ms a conformer: a piece is much longer than its sending, and the last one is not waited for long

log = logging.getLogger(__name__)


class XTBEnergy(ExternalEnergy):
    """GFN2-xTB energy with ALPB water, open-source tblite: positions (batch, n_atoms, 3) in nm -> kJ/mol, (batch,).

    Computed in double precision in worker processes of one thread each, returned in the dtype and on the device of x;
    differentiable once. Energies are total ones, about -86,000 kJ/mol for alanine dipeptide: float32 rounds them to
    0.01 kJ/mol.

    A conformer whose self-consistent solution is not found has energy +inf and gradient zero; each call that meets any
    logs one warning. Such a search takes up to some 100 times as long as one that succeeds.

    Args:
        numbers: atomic numbers, (n_atoms,).
        charge: total charge in e; all electrons are paired.
        n_workers: processes at most; default one a core.

    Attributes:
        n_failures: conformers without a solution so far.

    Raises UserError where tblite is not installed, and on Windows.
    """

    def __init__(self, numbers: Sequence[int], charge: int = 0, n_workers: int | None = None):
        if importlib.util.find_spec("tblite") is None:
            raise UserError('GFN2-xTB needs tblite, which is not installed: pip install "boltznce[xtb]".')
        if not WORKERS:
            raise UserError("GFN2-xTB runs in worker processes, which there are none of on Windows: use WSL there.")
        self.numbers, self.charge = list(numbers), charge
        # Always in workers: the number of threads of tblite is fixed when it is loaded, and here torch has chosen it
        # already.
        self.pool = WorkerPool(partial(XTBPoints, self.numbers, charge), n_workers)
        self.n_failures = 0

    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (batch,) in kJ/mol and forces (batch, n_atoms, 3) in kJ/mol/nm, float64."""
        energies, forces = in_workers(self.pool, x.detach().double().cpu().numpy(), PIECE)
        failed = int((energies == float("inf")).sum())
        if failed:
            self.n_failures += failed
            log.warning(
                "GFN2-xTB found no solution for %d of %d conformers: their energy is +inf.", failed, len(energies)
            )
        return torch.from_numpy(energies), torch.from_numpy(forces)
