"""What OpenMM says of a batch of conformers, for tests to compare with, and conformers that try an energy hard."""

import openmm
import torch


def distorted(x, size, seed=0):
    return x + size * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


def wild(x):
    """Noise of 0.02 to 0.05 nm; in every second conformer an atom 0.004 to 0.05 nm from one it is not bonded to."""
    size = torch.linspace(0.02, 0.05, len(x), dtype=x.dtype)[:, None, None]
    y = distorted(x, size)
    gap = torch.linspace(0.004, 0.05, len(y[::2]), dtype=x.dtype)[:, None]
    y[::2, -4] = y[::2, 5] + gap * torch.tensor([0.6, 0.0, 0.8], dtype=x.dtype)
    return y


def reference(system, x):
    """Energies and forces of OpenMM."""
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    energies, forces = [], []
    for conformer in x.double().numpy():
        context.setPositions(conformer)
        state = context.getState(energy=True, forces=True)
        energies.append(state.getPotentialEnergy()._value)
        forces.append(torch.from_numpy(state.getForces(asNumpy=True)._value))
    return torch.tensor(energies, dtype=torch.float64), torch.stack(forces)


def alone(system, kept):
    part = openmm.XmlSerializer.clone(system)
    for n in reversed(range(part.getNumForces())):
        if n != kept:
            part.removeForce(n)
    return part


def absolute_terms(system, x):
    """Σ |energy| over the forces of a system, by OpenMM."""
    return sum(reference(alone(system, n), x)[0].abs() for n in range(system.getNumForces()))


def energy_and_force(energy, x):
    x = x.detach().requires_grad_()
    values = energy(x)
    return values.detach(), -torch.autograd.grad(values.sum(), x)[0]


def relative(forces, expected):
    return ((forces.double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max()
