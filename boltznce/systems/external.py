"""Energies that another program computes, with forces and so a gradient; large batches go to worker processes."""

import abc

import numpy as np
import torch
from torch import Tensor

from boltznce.systems.workers import WorkerPool

__all__ = ["ExternalEnergy", "in_workers"]


class ExternalEnergy(abc.ABC):
    """Potential energy of positions (batch, n_atoms, 3) in nm -> kJ/mol, (batch,).

    Computed in double precision on the CPU, returned in the dtype and on the device of x; differentiable once.
    """

    def __call__(self, x: Tensor) -> Tensor:
        return _Energy.apply(x, self)

    @abc.abstractmethod
    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (batch,) in kJ/mol and forces (batch, n_atoms, 3) in kJ/mol/nm, float64, on the CPU."""


def in_workers(pool: WorkerPool, positions: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Energies and forces of positions (n, n_atoms, 3), in order, in pieces of ``largest`` conformers or fewer."""
    # some pieces a worker, so that all end at about the same time
    size = min(largest, max(1, len(positions) // (4 * pool.n_workers)))
    pieces = np.array_split(positions, max(1, -(-len(positions) // size)))
    energies, forces = zip(*pool.map(pieces), strict=True)
    return np.concatenate(energies), np.concatenate(forces)


class _Energy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, energy: ExternalEnergy) -> Tensor:
        values, forces = energy.evaluate(x)
        ctx.save_for_backward(forces.to(x))
        return values.to(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (forces,) = ctx.saved_tensors
        return -grad[:, None, None] * forces, None
