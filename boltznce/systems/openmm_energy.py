"""OpenMM's own energy, one conformer at a time: the reference for the torch energy and the fallback where it does not reach."""

import openmm
import torch
from torch import Tensor

__all__ = ["OpenMMEnergy"]


class OpenMMEnergy:
    """Potential energy on OpenMM's Reference platform: positions (batch, n_atoms, 3) in nm -> kJ/mol, (batch,).

    Computed in double precision on the CPU, returned in the dtype and on the device of x; differentiable once.
    """

    def __init__(self, system: openmm.System):
        self.system = system
        self._context = None

    def __call__(self, x: Tensor) -> Tensor:
        return _Energy.apply(x, self)

    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (batch,) in kJ/mol and forces (batch, n_atoms, 3) in kJ/mol/nm, float64."""
        if self._context is None:
            self._context = openmm.Context(self.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
        energies, forces = torch.empty(len(x), dtype=torch.float64), torch.empty(x.shape, dtype=torch.float64)
        for n, conformer in enumerate(x.detach().double().cpu().numpy()):
            self._context.setPositions(conformer)
            state = self._context.getState(energy=True, forces=True)
            energies[n] = state.getPotentialEnergy()._value
            forces[n] = torch.from_numpy(state.getForces(asNumpy=True)._value)
        return energies, forces

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_context": None}  # a Context can be neither pickled nor shared


class _Energy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, energy: OpenMMEnergy) -> Tensor:
        values, forces = energy.evaluate(x)
        ctx.save_for_backward(forces.to(x))
        return values.to(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (forces,) = ctx.saved_tensors
        return -grad[:, None, None] * forces, None
