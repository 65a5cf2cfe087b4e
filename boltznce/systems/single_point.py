"""Energies and forces of one conformer after another in float64, as a worker process computes them.

No torch here, and OpenMM and tblite where they are needed only: their imports are what a worker's start takes.
"""

from collections.abc import Sequence

import numpy as np

__all__ = ["OpenMMPoints", "XTBPoints"]

# CODATA 2018 (https://physics.nist.gov/cuu/Constants): Hartree energy 4.3597447222071e-18 J times the Avogadro
# constant; Bohr radius.
HARTREE_KJ_MOL = 4.3597447222071e-18 * 6.02214076e23 / 1000
BOHR_NM = 0.0529177210903


class OpenMMPoints:
    """OpenMM's Reference platform: (n, n_atoms, 3) in nm -> energies (n,) in kJ/mol, forces in kJ/mol/nm.

    A conformer without a finite energy and finite forces (atoms on top of each other, positions that are not finite)
    has energy +inf and no force.

    Args:
        system: openmm.System.
    """

    def __init__(self, system):
        import openmm

        self._context = openmm.Context(
            system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
        )

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        energies, forces = np.full(len(positions), np.inf), np.zeros(positions.shape)
        for n, conformer in enumerate(positions):
            if not np.isfinite(conformer).all():
                continue
            self._context.setPositions(conformer)
            state = self._context.getState(energy=True, forces=True)
            energy, force = state.getPotentialEnergy()._value, state.getForces(asNumpy=True)._value
            if np.isfinite(energy) and np.isfinite(force).all():
                energies[n], forces[n] = energy, force
        return energies, forces


class XTBPoints:
    """GFN2-xTB in ALPB water (Bannwarth et al. 2019, doi 10.1021/acs.jctc.8b01176; Ehlert et al. 2021, doi
    10.1021/acs.jctc.1c00471).

    Positions (n, n_atoms, 3) in nm -> energies (n,) in kJ/mol, forces (n, n_atoms, 3) in kJ/mol/nm, float64. A
    conformer for which tblite finds no solution has energy +inf and no force. Each starts from the same guess, so
    nothing depends on their order.

    Args:
        numbers: atomic numbers.
        charge: total charge in e; all electrons paired.

    Raises tblite's TBLiteRuntimeError for elements that the method does not know.
    """

    def __init__(self, numbers: Sequence[int], charge: int):
        from tblite.interface import Calculator

        apart = np.zeros((len(numbers), 3))
        # Bohr; a calculator wants some positions, and refuses atoms on top of each other
        apart[:, 0] = 10.0 * np.arange(len(numbers))
        self._calculator = Calculator("GFN2-xTB", np.asarray(numbers), apart, charge=float(charge))
        self._calculator.set("verbosity", 0)
        self._calculator.add("alpb-solvation", "water")

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        from tblite.exceptions import TBLiteRuntimeError

        energies, forces = np.full(len(positions), np.inf), np.zeros(positions.shape)
        for n, conformer in enumerate(positions):
            try:
                self._calculator.update(conformer / BOHR_NM)
                result = self._calculator.singlepoint()
            except TBLiteRuntimeError:  # no convergence, coinciding atoms
                continue
            energy, gradient = float(result.get("energy")), result.get("gradient")
            if np.isfinite(energy) and np.isfinite(gradient).all():
                energies[n], forces[n] = energy * HARTREE_KJ_MOL, gradient * (-HARTREE_KJ_MOL / BOHR_NM)
        return energies, forces
