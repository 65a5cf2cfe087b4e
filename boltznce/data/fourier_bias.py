"""A bias on one or two coordinates as a Fourier series, to which Gaussian hills are added."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from boltznce.systems.dihedral import dihedral_angle

__all__ = ["Axis", "BiasGroups", "FourierBias", "number_of_groups"]


@dataclasses.dataclass(frozen=True)
class Axis:
    """A coordinate as the bias sees it: an angle θ, whose cosines and sines are the functions of the series.

    Args:
        atoms: four, of a dihedral; of a point in the plane two numbers (a, b) in their place, a x + b y, or none, its
            polar angle.
        limits: of a coordinate that is no dihedral: θ goes from 0 to π between them, only cosines are used, so that
            hills are reflected at the limits and the bias is flat beyond.
    """

    atoms: tuple
    limits: tuple[float, float] | None = None

    def values(self, x: Tensor) -> Tensor:
        """The coordinate (K,) of positions (K, n_atoms, dim)."""
        if len(self.atoms) < 4:
            a, b = x[:, 0, 0], x[:, 0, 1]
            return self.atoms[0] * a + self.atoms[1] * b if self.atoms else torch.atan2(b, a)
        return dihedral_angle(torch.stack([x[:, atom] for atom in self.atoms], dim=1))

    def functions(self, values: Tensor, n_terms: int) -> Tensor:
        """1, cos θ, … cos nθ, and on the circle sin θ, … sin nθ, of coordinates (K,): (K, terms)."""
        orders = torch.arange(1, n_terms + 1, device=values.device, dtype=values.dtype)
        if self.limits is None:
            angles = values[:, None] * orders
            return torch.cat([torch.ones_like(values[:, None]), angles.cos(), angles.sin()], dim=1)
        low, high = self.limits
        angles = math.pi * ((values - low) / (high - low)).clamp(0.0, 1.0)[:, None] * orders
        return torch.cat([torch.ones_like(values[:, None]), angles.cos()], dim=1)

    def hill(self, width: float, n_terms: int) -> np.ndarray:
        """What a Gaussian hill of height 1 about θ₀ has as coefficients, in units of the functions at θ₀: (terms,)."""
        if self.limits is not None:
            width = math.pi * width / (self.limits[1] - self.limits[0])
        orders = np.arange(n_terms + 1)
        parts = width / math.sqrt(2 * math.pi) * np.where(orders, 2.0, 1.0) * np.exp(-0.5 * (orders * width) ** 2)
        return np.concatenate([parts, parts[1:]]) if self.limits is None else 2 * parts


class FourierBias:
    """V(s) = Σ_ab C_ab f_a(s₁) g_b(s₂) in kT, the functions those of `Axis`; g = 1 where there is one coordinate.

    Attributes:
        coefficients: C, (terms, terms) or (terms, 1), float64.
    """

    def __init__(self, axes: Sequence[Axis], n_terms: int, width: float, kT: float, device: torch.device | str = "cpu"):
        self.axes, self.n_terms, self.kT = tuple(axes), n_terms, kT
        self.hill = [torch.from_numpy(axis.hill(width, n_terms)).to(device) for axis in self.axes]
        self.hill += [torch.ones(1, dtype=torch.float64, device=device)] * (2 - len(self.axes))
        self.coefficients = torch.zeros(len(self.hill[0]), len(self.hill[1]), dtype=torch.float64, device=device)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """What `potential` depends on and the walk may change."""
        return (self.coefficients,)

    def potential(self, x: Tensor, coefficients: Tensor) -> Tensor:
        """The bias (K,) in kJ/mol of positions (K, n_atoms, dim)."""
        return self.kT * self._series([axis.values(x) for axis in self.axes], coefficients)

    def coordinates(self, x: Tensor) -> Tensor:
        """The coordinates (K, d) of positions."""
        return torch.stack([axis.values(x) for axis in self.axes], dim=-1)

    def energy(self, values: Tensor) -> Tensor:
        """V (K,) in kT of coordinates (K, d)."""
        return self._series(values.unbind(-1), self.coefficients.to(values))

    def functions(self, values: Tensor) -> Tensor:
        """What V is the sum of, by coefficient, of coordinates (K, d): (K, terms), float64."""
        left, right = self._functions(values.double().unbind(-1))
        return (left[:, :, None] * right[:, None, :]).flatten(1)

    def add_hills(self, values: Tensor, heights: Tensor) -> None:
        """Add Gaussian hills of these heights (K,) in kT about coordinates (K, d)."""
        left, right = self._functions(values.double().unbind(-1))
        self.coefficients += (self.hill[0] * left).T @ (heights.double()[:, None] * self.hill[1] * right)

    def _series(self, values: Sequence[Tensor], coefficients: Tensor) -> Tensor:
        left, right = self._functions(values)
        return ((left @ coefficients) * right).sum(-1)

    def _functions(self, values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        functions = [axis.functions(each, self.n_terms) for axis, each in zip(self.axes, values, strict=True)]
        return functions[0], functions[1] if len(functions) > 1 else torch.ones_like(functions[0][:, :1])


def number_of_groups(n_biases: int) -> int:
    """One for a single bias; else one for each, and one without."""
    return n_biases + (n_biases > 1)


class BiasGroups:
    """Walkers in groups of one size, in order: each of the first groups under a bias of its own, the last under none.

    One bias alone acts on all walkers.
    """

    def __init__(self, biases: Sequence[FourierBias], n_walkers: int):
        self.biases = tuple(biases)
        self.n_groups = number_of_groups(len(self.biases))
        self.size = n_walkers // self.n_groups

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return tuple(bias.coefficients for bias in self.biases)

    def potential(self, x: Tensor, *coefficients: Tensor) -> Tensor:
        """The bias (K,) in kJ/mol of each walker, positions (K, n_atoms, dim)."""
        parts = x.split(self.size)
        felt = [bias.potential(part, c) for bias, part, c in zip(self.biases, parts, coefficients, strict=False)]
        return torch.cat([*felt, *(x.new_zeros(len(part)) for part in parts[len(felt) :])])

    def energies(self, x: Tensor) -> Tensor:
        """Every group's bias at any positions (K, n_atoms, dim), in kT: (K, n_groups), float64."""
        values = [bias.energy(bias.coordinates(x.double())) for bias in self.biases]
        return torch.stack(values + [torch.zeros_like(values[0])] * (self.n_groups - len(values)), dim=1)
