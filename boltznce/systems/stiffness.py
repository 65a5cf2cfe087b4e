"""Harmonic force constants of a force field, by their atoms."""

import openmm

__all__ = ["harmonic_constants"]


def harmonic_constants(system: openmm.System) -> tuple[dict[tuple[int, int], float], dict[tuple[int, int, int], float]]:
    """Bonds -> kJ/mol/nm² and angles -> kJ/mol/rad², k of ½ k (q - q₀)²; terms on the same atoms are added."""
    bonds: dict[tuple[int, int], float] = {}
    angles: dict[tuple[int, int, int], float] = {}
    for force in system.getForces():
        if isinstance(force, openmm.HarmonicBondForce):
            for n in range(force.getNumBonds()):
                i, j, _, k = force.getBondParameters(n)
                bonds[i, j] = bonds.get((i, j), 0.0) + k._value
        elif isinstance(force, openmm.HarmonicAngleForce):
            for n in range(force.getNumAngles()):
                i, j, k, _, stiffness = force.getAngleParameters(n)
                angles[i, j, k] = angles.get((i, j, k), 0.0) + stiffness._value
    return bonds, angles
