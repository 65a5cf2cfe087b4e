"""An OpenMM System as a batched, differentiable torch function. Lengths nm, energies kJ/mol, as in OpenMM."""

import copy

import openmm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from boltznce.systems import terms
from boltznce.systems.terms.geometry import Geometry, Term, pairs_of, unknown

__all__ = ["TorchForceField"]

TERMS = {
    "HarmonicBondForce": terms.HarmonicBonds,
    "HarmonicAngleForce": terms.HarmonicAngles,
    "PeriodicTorsionForce": terms.PeriodicTorsions,
    "RBTorsionForce": terms.RyckaertBellemansTorsions,
    "CMAPTorsionForce": terms.CMAPTorsions,
    "NonbondedForce": terms.Nonbonded,
    "GBSAOBCForce": terms.GBSAOBC,
    "CustomGBForce": terms.CustomGB,
}
WITHOUT_ENERGY = ("CMMotionRemover",)


class TorchForceField(nn.Module):
    """Potential energy of an OpenMM System: positions (batch, n_atoms, 3) in nm -> kJ/mol, (batch,).

    Differentiable any number of times; computed in the dtype and on the device of the positions. Atoms closer than
    ``terms.geometry.CLOSEST`` give a large finite energy and a finite gradient. Batches beyond ``chunk_size`` go piece by
    piece, and their gradients recompute each piece, so that memory does not grow with the batch.

    Raises UserError for a force that is not among ``TERMS``, periodic boundaries, constraints and virtual sites.
    """

    def __init__(self, system: openmm.System, chunk_size: int = 1024):
        super().__init__()
        self.n_atoms = system.getNumParticles()
        self.chunk_size = chunk_size
        if system.getNumConstraints():
            raise unknown("constraints")
        if any(system.isVirtualSite(n) for n in range(self.n_atoms)):
            raise unknown("virtual sites")
        known = nn.ModuleList(term_of(force) for force in system.getForces() if not is_empty(force))
        # A plain dict, not submodules: the float64 tables must survive a .float() of whatever module holds this one.
        self._tables = {(torch.float64, torch.device("cpu")): (pairs_of(self.n_atoms), known)}

    def forward(self, x: Tensor) -> Tensor:
        if len(x) <= self.chunk_size:
            return self._energy(x)
        pieces = x.split(self.chunk_size)
        if torch.is_grad_enabled() and x.requires_grad:
            return torch.cat([checkpoint(self._energy, piece, use_reentrant=False) for piece in pieces])
        return torch.cat([self._energy(piece) for piece in pieces])

    def _energy(self, x: Tensor) -> Tensor:
        pairs, known = self._tables_like(x)
        geometry = Geometry(x, pairs)
        return sum((term(geometry) for term in known), x.new_zeros(len(x)))

    def _tables_like(self, x: Tensor) -> tuple[Tensor, nn.ModuleList]:
        key = (x.dtype, x.device)
        if key not in self._tables:
            pairs, known = self._tables[torch.float64, torch.device("cpu")]
            self._tables[key] = (pairs.to(x.device), copy.deepcopy(known).to(x))
        return self._tables[key]


def term_of(force: openmm.Force) -> Term:
    name = type(force).__name__
    if name not in TERMS:
        raise unknown(name)
    if not hasattr(force, "getNonbondedMethod") and force.usesPeriodicBoundaryConditions():
        raise unknown(f"{name} with periodic boundaries")
    return TERMS[name](force)


def is_empty(force: openmm.Force) -> bool:
    """Force fields add a force without terms for, say, the torsions of a molecule that has none."""
    counts = [getattr(force, count)() for count in ("getNumBonds", "getNumAngles", "getNumTorsions") if hasattr(force, count)]
    return type(force).__name__ in WITHOUT_ENERGY or counts == [0]
