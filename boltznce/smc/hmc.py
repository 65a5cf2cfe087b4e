"""Hamiltonian Monte Carlo of many walkers at once: a kernel that leaves π_β invariant (Neal 2011)."""

import dataclasses
import math

import torch
from torch import Tensor

from boltznce.errors import UserError
from boltznce.settings import require
from boltznce.smc.path import Path, Point

__all__ = ["HMC", "adapted"]

JITTER = 0.2  # of the step size, walker by walker, so that no orbit closes after the same number of steps for all


@dataclasses.dataclass(frozen=True)
class HMC:
    """Leapfrog trajectories of ``n_leapfrog`` steps, then accepted with probability min(1, exp(H_old - H_new)).

    H = -log π_β + Σ m v² / (2 kT). For molecules x is in nm, t in ps, m in amu and ``kT`` in kJ/mol, which is
    amu nm²/ps²; with ``masses`` and ``kT`` of 1 all is dimensionless, for internal coordinates.

    Attributes:
        masses: broadcastable to positions of one walker: (n_atoms, 1), (dim,) or a number.
        centred: walkers (n, n_atoms, dim) are mean-free and stay so: velocities are drawn under Σ v = 0, forces are
            projected accordingly. Densities need to be right on that subspace alone.
    """

    masses: Tensor | float = 1.0
    kT: float = 1.0
    n_leapfrog: int = 6
    centred: bool = False

    def __post_init__(self) -> None:
        require("smc", n_leapfrog=self.n_leapfrog)
        if not (self.kT > 0 and (torch.as_tensor(self.masses) > 0).all()):
            raise UserError("Hamiltonian moves need positive masses and a positive kT.")

    def velocities(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """v ~ N(0, kT / m) (n, ...), given Σ v = 0 where centred."""
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return self._projected(self._inverse_masses(x).sqrt() * noise)

    def kinetic(self, v: Tensor) -> Tensor:
        """Σ m v² / (2 kT) (n,), float64."""
        return (v.double().square() / self._inverse_masses(v).double()).flatten(1).sum(1) / 2

    def leapfrog(self, path: Path, point: Point, v: Tensor, beta: float, step: Tensor) -> tuple[Point, Tensor]:
        """The points and velocities after ``n_leapfrog`` steps, each of ``step`` (n, 1, ...); reversible (-v)."""
        for i in range(self.n_leapfrog):
            v = v + (0.5 if i == 0 else 1.0) * step * self._acceleration(point, beta)
            point = path.point(point.positions + step * v, beta)
        return point, v + 0.5 * step * self._acceleration(point, beta)

    def move(
        self, path: Path, point: Point, beta: float, step_size: float | Tensor, generator: torch.Generator | None
    ) -> tuple[Point, Tensor]:
        """One move of all walkers, and the acceptance probability (n,) of each; what is not finite is refused."""
        shape = (len(point), *[1] * (point.positions.dim() - 1))
        numbers = torch.rand(2, len(point), generator=generator, device=point.u.device, dtype=torch.float64)
        step = step_size * (1 + JITTER * (2 * numbers[0] - 1)).reshape(shape).to(point.positions)
        v = self.velocities(point.positions, generator)
        end, v_end = self.leapfrog(path, point, v, beta, step)
        gain = end.log_prob(beta) - self.kinetic(v_end) - point.log_prob(beta) + self.kinetic(v)
        probability = gain.clamp(max=0.0).exp().nan_to_num(0.0)
        return end.where(numbers[1] < probability, point), probability

    def _acceleration(self, point: Point, beta: float) -> Tensor:
        return self._projected(self._inverse_masses(point.positions) * point.gradient(beta))

    def _inverse_masses(self, x: Tensor) -> Tensor:
        """kT / m, of the shape of one walker."""
        return (self.kT / torch.as_tensor(self.masses, device=x.device, dtype=x.dtype)).expand(x.shape[1:])

    def _projected(self, v: Tensor) -> Tensor:
        """v - M⁻¹ 1 (1ᵀ M⁻¹ 1)⁻¹ 1ᵀ v: velocities N(0, kT M⁻¹) given that they sum to zero, and forces likewise."""
        if not self.centred:
            return v
        inverse = self._inverse_masses(v)
        return v - inverse / inverse.sum(-2, keepdim=True) * v.sum(-2, keepdim=True)


def adapted(step_size: float, acceptance: float, wanted: float) -> float:
    """The step size after moves that were accepted with this probability: longer where it is above the wanted one.

    To be used for the *next* β only: a step chosen by the moves that it makes would no longer leave π_β invariant.
    """
    return step_size * math.exp(acceptance - wanted)
