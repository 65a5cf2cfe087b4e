"""Coulomb and Lennard-Jones between all pairs of atoms."""

import openmm
import torch
from torch import Tensor

from boltznce.systems.terms.geometry import COULOMB, Geometry, Term, column, columns, cutoff_of, plain, unknown

__all__ = ["Nonbonded"]


class Nonbonded(Term):
    """Σ qᵢqⱼ / (4πε₀ r) + 4ε ((σ/r)¹² - (σ/r)⁶) over all pairs, exceptions with their own parameters.

    With a cutoff, pairs that are no exceptions end there, their Coulomb energy with the reaction field of a dielectric
    ε outside, qᵢqⱼ / (4πε₀) (1/r + k r² - c), k = (ε - 1) / (2ε + 1) / r_c³, c = 3ε / (2ε + 1) / r_c (Tironi et al., J.
    Chem. Phys. 102, 5451 (1995), without salt, as in OpenMM), their Lennard-Jones energy abruptly or with OpenMM's
    switching function.
    """

    def __init__(self, force: openmm.NonbondedForce, n_atoms: int):
        super().__init__()
        if force.getNumParticleParameterOffsets() or force.getNumExceptionParameterOffsets():
            raise unknown("NonbondedForce with parameter offsets")
        self.cutoff = cutoff_of(force)
        q, sigma, epsilon = map(column, columns(force.getParticleParameters, n_atoms))
        charges = q[:, None] * q
        sigmas = 0.5 * (sigma[:, None] + sigma)
        epsilons = (epsilon[:, None] * epsilon).sqrt()
        exception = torch.zeros_like(charges)
        for n in range(force.getNumExceptions()):
            i, j, *parameters = plain(force.getExceptionParameters(n))
            for matrix, value in zip((charges, sigmas, epsilons, exception), (*parameters, 1.0), strict=True):
                matrix[i, j] = matrix[j, i] = value
        # every pair counts half, being there twice, and an atom with itself not at all
        half = 0.5 * (1 - torch.eye(n_atoms, dtype=torch.float64))
        coulomb, attraction = COULOMB * half * charges, 4 * half * epsilons * sigmas**6
        self.table(
            coulomb=coulomb[..., None], attraction=attraction[..., None], repulsion=(attraction * sigmas**6)[..., None]
        )
        if self.cutoff is not None:
            dielectric = force.getReactionFieldDielectric()
            self.curvature = (dielectric - 1) / (2 * dielectric + 1) / self.cutoff**3
            self.shift = 3 * dielectric / (2 * dielectric + 1) / self.cutoff
            self.switch_from = plain([force.getSwitchingDistance()])[0] if force.getUseSwitchingFunction() else None
            self.table(exception=exception[..., None], field=self.coulomb * (1 - exception[..., None]))

    def forward(self, geometry: Geometry) -> Tensor:
        inverse = geometry.inverse_distances
        square = inverse * inverse
        sixth = square * square * square
        coulomb, lennard_jones = self.coulomb * inverse, (self.repulsion * sixth - self.attraction) * sixth
        if self.cutoff is None:
            return (coulomb + lennard_jones).sum((0, 1))
        within = geometry.within(self.cutoff)
        kept = torch.maximum(within, self.exception)
        field = self.field * within * (self.curvature * geometry.squared_distances - self.shift)
        return ((coulomb + lennard_jones * self.switch(geometry)) * kept + field).sum((0, 1))

    def switch(self, geometry: Geometry) -> Tensor | float:
        """1 - 10 t³ + 15 t⁴ - 6 t⁵, t from 0 at the switching distance to 1 at the cutoff (OpenMM user guide)."""
        if self.switch_from is None:
            return 1.0
        t = ((geometry.distances - self.switch_from) / (self.cutoff - self.switch_from)).clamp(0.0, 1.0) * (
            1 - self.exception
        )
        return 1 + t * t * t * (-10 + t * (15 - 6 * t))
