"""An OpenMM System as a batched, differentiable torch function. Lengths nm, energies kJ/mol, as in OpenMM."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openmm
import torch
from torch import Tensor, nn

from boltznce.compiling import wants_compiling
from boltznce.precision import ordinary_tensors
from boltznce.systems import terms
from boltznce.systems.fused import FusedKernels, energy_and_gradient
from boltznce.systems.terms.geometry import Chained, Geometry, Term, unknown

__all__ = ["TorchForceField"]

TERMS = {
    "HarmonicBondForce": terms.HarmonicBonds,
    "HarmonicAngleForce": terms.HarmonicAngles,
    "PeriodicTorsionForce": terms.PeriodicTorsions,
    "RBTorsionForce": terms.RyckaertBellemansTorsions,
    "CMAPTorsionForce": terms.CMAPTorsions,
    "CustomTorsionForce": terms.HarmonicTorsions,
    "NonbondedForce": terms.Nonbonded,
    "GBSAOBCForce": terms.GBSAOBC,
    "CustomGBForce": terms.CustomGB,
}
WITHOUT_ENERGY = ("CMMotionRemover",)
PAIRS_ON_CPU, PAIRS_ON_GPU = 2**18, 2**23  # atoms² times conformers


class TorchForceField(nn.Module):
    """Potential energy of an OpenMM System: positions (batch, n_atoms, 3) in nm -> kJ/mol, (batch,).

    Differentiable any number of times; computed in the dtype and on the device of the positions. Atoms closer than
    ``terms.geometry.CLOSEST`` give a large finite energy and a finite gradient. Where there is none (positions that are
    not finite) the energy is +inf and the gradient zero. A batch goes piece by piece, and forces are computed with
    the energies where positions require a gradient, so that memory does not grow with the batch.

    Args:
        compile: ``true``, ``false`` or ``auto`` (where there is a GPU): fuse all terms by torch.compile, which takes
            half a minute at the first call, see `boltznce.systems.fused`.

    Raises UserError for a force that is not among ``TERMS``, periodic boundaries, constraints and virtual sites.
    """

    @ordinary_tensors()
    def __init__(self, system: openmm.System, compile: str | bool = "auto"):
        super().__init__()
        self.n_atoms = system.getNumParticles()
        if system.getNumConstraints():
            raise unknown("constraints")
        if any(system.isVirtualSite(n) for n in range(self.n_atoms)):
            raise unknown("virtual sites")
        known = nn.ModuleList(term_of(force, self.n_atoms) for force in system.getForces() if not is_empty(force))
        none = torch.zeros(0, self.n_atoms, dtype=torch.float64)
        edges = torch.cat([*(term.edges for term in known if isinstance(term, Chained)), none])
        # A plain dict, not submodules: the float64 tables must survive a .float() of whatever module holds this one.
        self._tables = {(torch.float64, torch.device("cpu")): (known, edges)}
        self._fused = FusedKernels(self._energy) if wants_compiling(compile) else None

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return _EnergyWithGradient.apply(x, self)
        pieces = [self._kernel("energy", piece) for piece in x.split(self.chunk_size(x.device))]
        return infinite_where_undefined(torch.cat(pieces))

    def energy_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (batch,) in kJ/mol and their gradients (batch, n_atoms, 3) in kJ/mol/nm, without a graph.

        Where there are none they are NaN, so that a simulation that explodes cannot go on.
        """
        pieces = [self._kernel("energy_and_gradient", piece) for piece in x.detach().split(self.chunk_size(x.device))]
        energies, gradients = zip(*pieces, strict=True)
        return torch.cat(energies), torch.cat(gradients)

    def chunk_size(self, device: torch.device) -> int:
        """Conformers computed at a time: as many as the caches of a CPU hold, or as occupy a GPU."""
        pairs = PAIRS_ON_CPU if device.type == "cpu" else PAIRS_ON_GPU
        return max(16, 2 ** round(math.log2(pairs / self.n_atoms**2)))

    def _kernel(self, kind: str, x: Tensor) -> Any:
        with full_precision():
            if self._fused is not None:
                return self._fused(kind, x, self.chunk_size(x.device))
            return self._energy(x) if kind == "energy" else energy_and_gradient(self._energy, x)

    def _energy(self, x: Tensor) -> Tensor:
        known, edges = self._terms_like(x)
        geometry = Geometry(x, [term for term in known if isinstance(term, Chained)], edges)
        return sum((term(geometry) for term in known), x.new_zeros(len(x)))

    def _terms_like(self, x: Tensor) -> tuple[nn.ModuleList, Tensor]:
        key = (x.dtype, x.device)
        if key not in self._tables:
            with ordinary_tensors():  # kept for later calls, in which they may need a gradient
                known, edges = self._tables[torch.float64, torch.device("cpu")]
                self._tables[key] = copy.deepcopy(known).to(x.device, x.dtype), edges.to(x.device, x.dtype)
        return self._tables[key]


def infinite_where_undefined(energy: Tensor, gradient: Tensor | None = None) -> Any:
    """Energies (batch,) that are no number as +inf, their gradients (batch, n_atoms, 3), if given, as zero."""
    undefined = energy.isnan()
    if gradient is None:
        return energy.masked_fill(undefined, torch.inf)
    undefined = undefined | ~gradient.isfinite().all(dim=(-2, -1))
    return energy.masked_fill(undefined, torch.inf), gradient.masked_fill(undefined[:, None, None], 0.0)


class _EnergyWithGradient(torch.autograd.Function):
    """Energies with their gradient, piece by piece; higher derivatives go through the terms themselves."""

    @staticmethod
    def forward(ctx, x: Tensor, field: TorchForceField) -> Tensor:
        energy, gradient = infinite_where_undefined(*field.energy_and_gradient(x))
        ctx.save_for_backward(x, gradient)
        ctx.field = field
        return energy

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        x, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the gradient must have one too
            with full_precision():
                (gradient,) = torch.autograd.grad(ctx.field._energy(x).sum(), x, create_graph=True)
        return grad[:, None, None] * gradient, None


@contextmanager
def full_precision() -> Iterator[None]:
    """Matrix products of float32 in float32: TF32 would move atoms by 1e-3 of their coordinates."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)


def term_of(force: openmm.Force, n_atoms: int) -> Term:
    name = type(force).__name__
    if name not in TERMS:
        raise unknown(name)
    if not hasattr(force, "getNonbondedMethod") and force.usesPeriodicBoundaryConditions():
        raise unknown(f"{name} with periodic boundaries")
    return TERMS[name](force, n_atoms)


def is_empty(force: openmm.Force) -> bool:
    """Force fields add a force without terms for, say, the torsions of a molecule that has none."""
    counts = [
        getattr(force, count)() for count in ("getNumBonds", "getNumAngles", "getNumTorsions") if hasattr(force, count)
    ]
    return type(force).__name__ in WITHOUT_ENERGY or counts == [0]
