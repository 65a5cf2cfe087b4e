"""Walkers: what moves copies of a molecule on. Methods that exchange know no engine, and an engine no method."""

import dataclasses
import math
from typing import Protocol

import numpy as np
import openmm
import torch
from openmm import unit
from torch import Tensor

from boltznce.data.engine import Job, Unstable, named
from boltznce.errors import UserError
from boltznce.systems.dihedral import dihedral_angle

__all__ = ["ENGINES", "Bias", "OpenMMWalkers", "Restraints", "Walkers", "heavy_hydrogens", "make_walkers"]

ENGINES = {
    "openmm": "boltznce.data.walkers:OpenMMWalkers",
    "torch": "boltznce.data.torch_walkers:TorchWalkers",
}
BIAS_GROUP = 1  # OpenMM force group of everything that is not part of the molecule's own energy
REFERENCE_PLATFORM_MAX_ATOMS = 100  # up to here the Reference platform is the fastest on a CPU
MINIMIZER_TOLERANCE = 10.0  # kJ/mol/nm
MINIMIZER_ITERATIONS = 200


class Bias(Protocol):
    """A potential beside the molecule's own, of which each walker feels its share."""

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """What `potential` depends on, as it is now."""

    def potential(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """(K,) in kJ/mol of the walkers' positions (K, n_atoms, 3), all torch and without branches on values."""


@dataclasses.dataclass(frozen=True)
class Restraints:
    """Walker k feels kappa/2 (wrapped difference of its dihedral from centres[k])²; kJ/mol and rad."""

    atoms: tuple[int, int, int, int]
    kappa: float
    centres: np.ndarray

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (torch.from_numpy(self.centres),)

    def potential(self, x: Tensor, *parameters: Tensor) -> Tensor:
        (centres,) = parameters
        difference = dihedral_angle(torch.stack([x[:, atom] for atom in self.atoms], dim=1)) - centres
        turns = (difference / (2 * math.pi)).round()
        return 0.5 * self.kappa * (difference - 2 * math.pi * turns).square()

    def force(self) -> openmm.CustomTorsionForce:
        """For OpenMM, around the context's parameter ``centre``."""
        force = openmm.CustomTorsionForce("0.5*kappa*d^2; d=min(a, 6.283185307179586-a); a=abs(theta-centre)")
        force.addGlobalParameter("kappa", self.kappa)
        force.addGlobalParameter("centre", 0.0)
        force.addTorsion(*self.atoms, [])
        force.setForceGroup(BIAS_GROUP)
        return force


class Walkers(Protocol):
    """K walkers, each with its temperature (K) and bias; positions and velocities (K, n_atoms, 3) in nm and nm/ps.

    They follow the Langevin middle scheme (Zhang et al., J. Phys. Chem. A 123, 6056 (2019)), whose velocities are those
    of half a step before the positions.
    """

    def __init__(self, job: Job, system: openmm.System, temperatures: np.ndarray, bias: Bias | None = None) -> None: ...

    def reseed(self, rng: np.random.Generator) -> None:
        """Start a random stream that depends on ``rng`` alone."""

    def prepare(
        self, k: int, structure: np.ndarray, rng: np.random.Generator, duration: float = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """A structure (n_atoms, 3) minimized under walker k's bias, and thermal velocities, after ``duration`` ps."""

    def run(self, positions: np.ndarray, velocities: np.ndarray, duration: float) -> np.ndarray:
        """Move all on by ``duration`` ps, in place, mean-free; energies (K,) without bias in the job's kT.

        Raises Unstable for energies that are not finite.
        """


def make_walkers(job: Job, system: openmm.System, temperatures: np.ndarray, bias: Bias | None = None) -> Walkers:
    """The walkers of the job's engine. ``system`` is changed."""
    return named(ENGINES[job.engine])(job, system, temperatures, bias)


def heavy_hydrogens(system: openmm.System, mass: float | None) -> np.ndarray:
    """Give every hydrogen this mass (amu; None: leave them); the masses (n_atoms,) of all."""
    for i in range(system.getNumParticles()):
        if mass is not None and 0.5 < system.getParticleMass(i).value_in_unit(unit.dalton) < 1.5:
            system.setParticleMass(i, mass)
    return np.array([system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(system.getNumParticles())])


class OpenMMWalkers:
    """One OpenMM context that is lent to walker after walker: set positions and velocities, run, take them back."""

    def __init__(self, job: Job, system: openmm.System, temperatures: np.ndarray, bias: Restraints | None = None):
        self.job, self.temperatures, self.bias = job, temperatures, bias
        self.masses = heavy_hydrogens(system, job.hydrogen_mass)
        if bias is not None:
            system.addForce(bias.force())
        self.integrator = openmm.LangevinMiddleIntegrator(job.temperature, job.friction, job.timestep)
        self.integrator.setIntegrationForceGroups({0, BIAS_GROUP})
        self.context = openmm.Context(system, self.integrator, *_platform(job.platform, system.getNumParticles()))

    def reseed(self, rng: np.random.Generator) -> None:
        # The Reference platform reads a seed only when a context is made.
        self.integrator.setRandomNumberSeed(int(rng.integers(1, 2**31 - 1)))
        self.context.reinitialize()

    def prepare(
        self, k: int, structure: np.ndarray, rng: np.random.Generator, duration: float = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        self._lend_to(k)
        self.context.setPositions(structure)
        openmm.LocalEnergyMinimizer.minimize(self.context, MINIMIZER_TOLERANCE, MINIMIZER_ITERATIONS)
        x = self.context.getState(getPositions=True).getPositions(asNumpy=True)._value
        v = rng.standard_normal(x.shape) * np.sqrt(self.job.kT / self.masses)[:, None]
        v = v * np.sqrt(self.temperatures[k] / self.job.temperature)
        return self._move(x, v, duration) if duration else (x, v)

    def run(self, positions: np.ndarray, velocities: np.ndarray, duration: float) -> np.ndarray:
        energies = np.empty(len(positions))
        for k in range(len(positions)):
            self._lend_to(k)
            positions[k], velocities[k] = self._move(positions[k], velocities[k], duration)
            energies[k] = self.context.getState(getEnergy=True, groups={0}).getPotentialEnergy()._value / self.job.kT
        if not np.isfinite(energies).all():
            raise Unstable
        return energies

    def _lend_to(self, k: int) -> None:
        self.integrator.setTemperature(self.temperatures[k])
        if self.bias is not None:
            self.context.setParameter("centre", self.bias.centres[k])

    def _move(self, x: np.ndarray, v: np.ndarray, duration: float) -> tuple[np.ndarray, np.ndarray]:
        self.context.setPositions(x)
        self.context.setVelocities(v)
        self.integrator.step(round(duration / self.job.timestep))
        state = self.context.getState(getPositions=True, getVelocities=True)
        x = state.getPositions(asNumpy=True)._value
        return x - x.mean(0), state.getVelocities(asNumpy=True)._value


def _platform(name: str, n_atoms: int) -> tuple:
    """What to hand to ``openmm.Context``: nothing, for OpenMM's own choice, or a platform and its properties."""
    if name == "auto":
        if n_atoms > REFERENCE_PLATFORM_MAX_ATOMS:
            return ()
        name = "Reference"
    available = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]
    if name not in available:
        raise UserError(f"OpenMM has no platform '{name}' here: choose platform=auto or one of {', '.join(available)}.")
    return (openmm.Platform.getPlatformByName(name), {"Threads": "1"} if name == "CPU" else {})
