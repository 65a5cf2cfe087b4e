"""What every term is made of: the geometry of a batch, the base class, and the reading of OpenMM's parameters.

Arrays are laid out with the batch last: coordinates (3, n_atoms, batch), one row a term, pairs (n_atoms, n_atoms,
batch), so that every operation runs over contiguous conformers. All pairs are formed by broadcasting, each twice: that
is less work than gathering half of them, and most of all than scattering their forces. Lengths nm, energies kJ/mol, as
in OpenMM.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import openmm
import torch
from openmm import unit
from torch import Tensor, nn

from boltznce.errors import UserError

__all__ = [
    "COULOMB",
    "TINY",
    "Chained",
    "Geometry",
    "Term",
    "column",
    "columns",
    "cross",
    "cutoff_of",
    "dot",
    "plain",
    "unknown",
]

COULOMB = 138.93545764438198  # kJ mol⁻¹ nm e⁻²: 1 / (4π ε₀), CODATA 2018, as in OpenMM
CLOSEST = 2e-3  # nm; below it pair energies stay constant, which keeps them and their gradients finite in float32
TINY = 1e-20  # added to squared lengths (nm², nm⁴) under a root, whose gradient at zero it keeps finite

Vectors = Tensor | tuple[Tensor, ...]  # x, y and z


class Geometry:
    """Coordinates (3, n_atoms, batch) of conformers (batch, n_atoms, 3) in nm, and what terms share of their distances.

    ``edges``: those of the ``chained`` terms, one below the other, so that a single matrix product serves all.
    """

    def __init__(self, x: Tensor, chained: Sequence["Chained"], edges: Tensor):
        self.xyz = x.permute(2, 1, 0).contiguous()
        vectors = (edges @ self.xyz).split([term.length * term.count for term in chained], dim=1)
        self._vectors = dict(zip(chained, vectors, strict=True))
        self._within: dict[float, Tensor] = {}

    def vectors(self, term: "Chained") -> tuple[Tensor, ...]:
        """Vectors from each atom of a term's chains to the next, as many as a chain has, each (3, n, batch)."""
        return self._vectors[term].unflatten(1, (term.length, term.count)).unbind(1)

    def torsions(self, term: "Chained") -> tuple[Tensor, Tensor]:
        """Cosine and sine of dihedrals (IUPAC sign) of a term's chains of four, each (n, batch).

        Both 0 where three atoms lie on a line.
        """
        a, b, c = self.vectors(term)
        m, n = cross(a, b), cross(b, c)
        scale = (dot(m, m) + TINY).rsqrt() * (dot(n, n) + TINY).rsqrt()
        return dot(m, n) * scale, dot(a, n) * (dot(b, b) + TINY).sqrt() * scale

    @cached_property
    def squared_distances(self) -> Tensor:
        """Of every atom and every other, (n_atoms, n_atoms, batch), nm²; CLOSEST² of an atom and itself."""
        return SquaredDistances.apply(self.xyz)

    @cached_property
    def distances(self) -> Tensor:
        return self.squared_distances.sqrt()

    @cached_property
    def inverse_distances(self) -> Tensor:
        return self.squared_distances.rsqrt()

    def within(self, cutoff: float) -> Tensor:
        """1 for pairs closer than the cutoff, else 0, (n_atoms, n_atoms, batch)."""
        if cutoff not in self._within:
            self._within[cutoff] = (self.squared_distances < cutoff**2).to(self.xyz.dtype)
        return self._within[cutoff]


class SquaredDistances(torch.autograd.Function):
    """r²ᵢⱼ = |xᵢ - xⱼ|², at least CLOSEST².

    If w is an energy's gradient by it, Σⱼ 2 (wᵢⱼ + wⱼᵢ) (xᵢ - xⱼ) is that by xᵢ: one sum for each atom, where autograd
    would keep all terms in memory and sum them twice.
    """

    @staticmethod
    def forward(ctx, xyz: Tensor) -> Tensor:
        d = (xyz.unsqueeze(2) - xyz.unsqueeze(1)).unbind()
        r2 = dot(d, d).clamp(min=CLOSEST**2)
        ctx.save_for_backward(xyz, r2)
        return r2

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        xyz, r2 = ctx.saved_tensors
        weight = (grad + grad.transpose(0, 1)).masked_fill(r2 <= CLOSEST**2, 0.0)
        return torch.stack([2 * (weight * (x.unsqueeze(1) - x.unsqueeze(0))).sum(1) for x in xyz])


def dot(a: Vectors, b: Vectors) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def cross(a: Vectors, b: Vectors) -> Vectors:
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


class Term(nn.Module):
    """One OpenMM force, ``Term(force, n_atoms)``: tables as buffers, ``forward(geometry) -> (batch,)`` in kJ/mol."""

    if TYPE_CHECKING:  # what `table` has registered

        def __getattr__(self, name: str) -> Tensor: ...

    def table(self, **columns: Tensor | tuple) -> None:
        """Register each column, as a tensor, under its name."""
        for name, values in columns.items():
            self.register_buffer(name, torch.as_tensor(values))


class Chained(Term):
    """A term along chains of atoms, which takes its `vectors` from the geometry.

    Args:
        chains: (n, length + 1) atoms. The buffer ``edges`` (length * n, n_atoms) has a row of -1 and +1 for each
            vector, those at the start of the chains first: a matrix product takes the differences and hands back the
            forces, where gathering and scattering rows would take several times as long.
    """

    def __init__(self, chains: Sequence[Sequence[int]], n_atoms: int):
        super().__init__()
        one_hot = torch.nn.functional.one_hot(torch.tensor(chains, dtype=torch.long), n_atoms).double()
        edges = (one_hot[:, 1:] - one_hot[:, :-1]).transpose(0, 1)
        self.length, self.count = edges.shape[:2]
        self.table(edges=edges.flatten(0, 1))


def columns(get: Callable[[int], list], count: int) -> list[tuple]:
    """Parameters of ``count`` particles or terms, one tuple for each parameter, as plain numbers."""
    return list(zip(*(plain(get(n)) for n in range(count)), strict=True))


def plain(parameters: list) -> list:
    """Numbers in OpenMM's unit system (nm, ps, kJ/mol, radian, elementary charge) in place of quantities."""
    return [p.value_in_unit_system(unit.md_unit_system) if unit.is_quantity(p) else p for p in parameters]


def column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def cutoff_of(force: openmm.Force) -> float | None:
    """Cutoff in nm of a force between all pairs, or None."""
    method = force.getNonbondedMethod()
    if method not in (force.NoCutoff, force.CutoffNonPeriodic):
        raise unknown(f"{type(force).__name__} with periodic boundaries")
    return None if method == force.NoCutoff else plain([force.getCutoffDistance()])[0]


def unknown(force: str) -> UserError:
    return UserError(f"The torch energy does not know {force}: set energy_backend=openmm, which does.")
