"""Walkers that the torch energy moves, all in one batch, on any device."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import openmm
import torch
from torch import Tensor

from boltznce.compiling import wants_compiling
from boltznce.data.engine import Job, Unstable
from boltznce.data.plane import PlaneField
from boltznce.data.walkers import Bias, OpenMMWalkers, heavy_hydrogens
from boltznce.systems.forcefield import TorchForceField
from boltznce.systems.fused import energy_and_gradient, fuse
from boltznce.systems.toy import PlaneSystem
from boltznce.units import GAS_CONSTANT

__all__ = ["TorchWalkers"]

RECORDED_STEPS = 50  # at most, in a CUDA graph


class TorchWalkers:
    """`Walkers` with OpenMM's scheme, timestep, masses and bias; OpenMM still prepares their structures.

    float32 is enough: without friction its rounding changes the total energy of alanine dipeptide by 4e-4 kJ/mol, a
    timestep of 2 fs by 0.7. Energies are computed in float64. A continued run gives identical frames on a CPU; on a GPU
    sums have no fixed order.
    """

    def __init__(
        self,
        job: Job,
        system: openmm.System | PlaneSystem,
        temperatures: np.ndarray,
        bias: Bias | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ):
        self.job, self.system, self.temperatures = job, system, temperatures
        self.bias: Any = bias  # what OpenMM prepares structures under are `Restraints`
        self.device = _device(job.repeat)
        self.dtype = dtype
        self.in_plane = isinstance(system, PlaneSystem)
        self.field: PlaneField | TorchForceField
        if self.in_plane:
            self.field, self.masses = PlaneField(system, job.kT), np.full(1, job.kT)
        else:
            self.field = TorchForceField(system, compile=False)  # before a bias becomes part of the system
            self.masses = heavy_hydrogens(system, job.hydrogen_mass)
        masses = self.tensor(self.masses)[:, None]
        self.half_step = 0.5 * job.timestep
        self.kick = job.timestep / masses
        self.kept = math.exp(-job.friction * job.timestep)
        warmth = GAS_CONSTANT * self.tensor(temperatures)[:, None, None]
        self.spread = (-math.expm1(-2 * job.friction * job.timestep) * warmth / masses).sqrt()
        self.generator = torch.Generator(self.device)
        self._heat = torch.ones((), device=self.device, dtype=dtype)
        self._kernel: Any = None
        self._recorded: dict[int, _RecordedSteps] = {}
        self._openmm: OpenMMWalkers | None = None

    def reseed(self, rng: np.random.Generator) -> None:
        self.generator.manual_seed(int(rng.integers(2**63)))

    def heat(self, factor: float) -> None:
        """Go on at so many times the walkers' temperatures."""
        self._heat.fill_(math.sqrt(factor))

    def prepare(
        self, k: int, structure: np.ndarray, rng: np.random.Generator, duration: float = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        if self._openmm is None:
            self._openmm = OpenMMWalkers(self.job, self.system, self.temperatures, self.bias)
            self._openmm.reseed(rng)
        return self._openmm.prepare(k, structure, rng, duration)

    def run(self, positions: np.ndarray, velocities: np.ndarray, duration: float) -> np.ndarray:
        x, v = self.move(self.tensor(positions), self.tensor(velocities), duration)
        energies = self.energies(x)
        positions[:], velocities[:] = x.cpu().numpy(), v.cpu().numpy()
        return energies

    @torch.no_grad()
    def move(self, x: Tensor, v: Tensor, duration: float) -> tuple[Tensor, Tensor]:
        """Positions, mean-free those of a molecule, and velocities after ``duration`` ps, on the walkers' device."""
        bias = () if self.bias is None else tuple(self.tensor(each) for each in self.bias.parameters)
        if self._kernel is None:
            example = (x, v, torch.zeros_like(x), *bias)
            self._kernel = fuse(self.step, *example) if wants_compiling(self.job.compile) else self.step
        n_steps = round(duration / self.job.timestep)
        if self.device.type == "cuda":
            size = math.gcd(n_steps, RECORDED_STEPS)
            if size not in self._recorded:
                self._recorded[size] = _RecordedSteps(self._steps, size, self.generator, x, v, *bias)
            x, v = self._recorded[size](n_steps // size, x, v, *bias)
        else:
            x, v = self._steps(n_steps, x, v, *bias)
        return x if self.in_plane else x - x.mean(1, keepdim=True), v

    def _steps(self, n: int, x: Tensor, v: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(n):
            noise = torch.randn(x.shape, generator=self.generator, device=self.device, dtype=self.dtype)
            x, v = self._kernel(x, v, self._heat * noise, *bias)
        return x, v

    @torch.no_grad()
    def energies(self, x: Tensor) -> np.ndarray:
        """(K,) without bias in kT, float64. Raises Unstable for what is not finite."""
        energies = self.field(x.double()).cpu().numpy() / self.job.kT
        if not np.isfinite(energies).all():
            raise Unstable
        return energies

    def step(self, x: Tensor, v: Tensor, noise: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor]:
        """Kick, half a drift, thermostat, half a drift (Zhang et al. 2019, "LF-Middle"); normal ``noise``."""
        v = v - self.kick * self.gradient(x, *bias)
        x = x + self.half_step * v
        v = self.kept * v + self.spread * noise
        return x + self.half_step * v, v

    def gradient(self, x: Tensor, *bias: Tensor) -> Tensor:
        """Of energy and bias (with its parameters), (K, n_atoms, 3) in kJ/mol/nm."""
        _, gradient = self.field.energy_and_gradient(x)
        if self.bias is None:
            return gradient
        return gradient + energy_and_gradient(lambda y: self.bias.potential(y, *bias), x)[1]

    def tensor(self, values: np.ndarray | Tensor) -> Tensor:
        """On the walkers' device, of their dtype."""
        return torch.as_tensor(values).to(self.device, self.dtype)


class _RecordedSteps:
    """Some steps as one CUDA graph: kernels this small take less time than the host needs to launch them."""

    def __init__(self, steps: Callable, size: int, generator: torch.Generator, *state: Tensor):
        self.state = [each.clone() for each in state]  # positions, velocities, parameters of the bias
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        numbers = generator.get_state()
        with torch.cuda.stream(side):
            steps(2, *self.state)  # what is allocated and tuned at first calls must not be recorded
        torch.cuda.current_stream().wait_stream(side)
        generator.set_state(numbers)
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(generator)
        with torch.cuda.graph(self.graph):
            for kept, new in zip(self.state, steps(size, *self.state), strict=False):
                kept.copy_(new)

    def __call__(self, n: int, *state: Tensor) -> tuple[Tensor, Tensor]:
        """Positions and velocities after ``n`` replays."""
        for kept, given in zip(self.state, state, strict=True):
            kept.copy_(given)
        for _ in range(n):
            self.graph.replay()
        return self.state[0].clone(), self.state[1].clone()


def _device(repeat: int) -> torch.device:
    """Repeats take the GPUs in turn."""
    n = torch.cuda.device_count()
    return torch.device("cuda", repeat % n) if n else torch.device("cpu")
