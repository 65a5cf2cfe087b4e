"""Whether an OpenMM System is one molecule in the canonical ensemble, and of the atoms and bonds of its topology.

Each ``require_...`` raises UserError where what its docstring says is not so; ``names`` is what the message is about.
"""

import re
from collections.abc import Sequence

import openmm
from openmm import app, unit

from boltznce.errors import UserError

__all__ = [
    "misfit",
    "nonbonded_of",
    "not_canonical",
    "require_atoms",
    "require_bonds",
    "require_method",
    "require_radii",
    "total_charge",
]

# elements with a radius of their own in openmm.app.internal.customgbforces; all others would have that of oxygen
WITH_RADIUS = {"H", "D", "C", "N", "O", "F", "Si", "P", "S", "Cl"}


def misfit(forcefield: app.ForceField, topology: app.Topology, files: Sequence[str], error: Exception) -> UserError:
    """Why OpenMM could not make a system: residues without a template, if these are the cause; else its own words."""
    untyped = forcefield.getUnmatchedResidues(topology)
    # patches of termini (charmm36) are tried by createSystem only, whose message names the residue that is left
    if not untyped or "template" not in str(error):
        return UserError(f"The force field {', '.join(files)} does not fit the structure: {error}")
    residues = ", ".join(f"{residue.name} {residue.id} (chain {residue.chain.id})" for residue in untyped)
    return UserError(
        f"The force field {', '.join(files)} has no template for residue {residues}: "
        "check that its atoms, hydrogens and caps are complete and named as in the force field, or use another."
    )


def not_canonical(system: openmm.System) -> str | None:
    """What makes an OpenMM System other than atoms that all move by one energy at constant temperature, if anything."""
    if any(system.isVirtualSite(n) for n in range(system.getNumParticles())):
        return "virtual sites"
    if system.getNumConstraints():
        return "constraints"
    if any(system.getParticleMass(n)._value == 0 for n in range(system.getNumParticles())):
        return "particles without mass"
    names = [type(force).__name__ for force in system.getForces()]
    if unlike := next((name for name in names if re.search("Barostat|Thermostat|Drude", name)), None):
        return unlike
    return "periodic boundaries" if system.usesPeriodicBoundaryConditions() else None


def nonbonded_of(system: openmm.System) -> tuple[str, float | None]:
    """Name of the nonbonded method, and cutoff in nm, of a System without periodic boundaries."""
    for force in system.getForces():
        if isinstance(force, openmm.NonbondedForce) and force.getNonbondedMethod() != force.NoCutoff:
            return "CutoffNonPeriodic", round(force.getCutoffDistance().value_in_unit(unit.nanometer), 9)
    return "NoCutoff", None


def total_charge(system: openmm.System) -> int:
    """Sum of a force field's charges, in e."""
    forces = [force for force in system.getForces() if isinstance(force, openmm.NonbondedForce)]
    charges = [
        force.getParticleParameters(i)[0].value_in_unit(unit.elementary_charge)
        for force in forces
        for i in range(system.getNumParticles())
    ]
    return round(sum(charges))


def require_method(system: openmm.System, names: str, method: str, cutoff_nm: float | None) -> None:
    """A System has the nonbonded method and cutoff that the settings say."""
    own, own_cutoff = nonbonded_of(system)
    if (own, own_cutoff) != (method, cutoff_nm):
        raise UserError(
            f"{names} has another nonbonded method than the settings say: set nonbonded_method={own} and "
            f"cutoff_nm={'null' if own_cutoff is None else f'{own_cutoff:g}'}."
        )


def require_bonds(system: openmm.System, topology: app.Topology, names: str) -> None:
    """A topology has every bond that a System has; pairs about one atom (Urey-Bradley terms) are none."""
    if system.getNumParticles() != topology.getNumAtoms():
        raise UserError(
            f"{names} has {system.getNumParticles()} particles, and the structure {topology.getNumAtoms()} atoms: give "
            "the structure that it was made for."
        )
    atoms, near = list(topology.atoms()), [{n} for n in range(topology.getNumAtoms())]
    for a, b in topology.bonds():
        near[a.index].add(b.index)
        near[b.index].add(a.index)
    for force in (force for force in system.getForces() if isinstance(force, openmm.HarmonicBondForce)):
        for n in range(force.getNumBonds()):
            a, b, *_ = force.getBondParameters(n)
            if not near[a] & near[b]:
                raise UserError(
                    f"The structure has no bond between {_told(atoms[a])} and {_told(atoms[b])}, which {names} has: "
                    "give all bonds, in a PDB file as CONECT records."
                )


def require_atoms(own: app.Topology, given: app.Topology | None, names: str) -> None:
    """Every atom is of an element, and of that which the structure's atom in its place is."""
    if blank := [atom for atom in own.atoms() if atom.element is None]:
        raise UserError(f"{names} does not tell the element of {_told(blank[0])}: give its atomic number.")
    there = list(given.atoms()) if given is not None and given is not own else list(own.atoms())
    pairs = list(zip(there, own.atoms(), strict=False))
    unlike = next(((a, b) for a, b in pairs if a.element is not b.element), None)
    if len(there) != own.getNumAtoms() or unlike:
        which = f" ({_told(unlike[0])}, not {_told(unlike[1])})" if unlike else ""
        raise UserError(
            f"{names} and the structure are not of the same atoms in the same order{which}: export both at once."
        )


def require_radii(system: openmm.System, topology: app.Topology) -> None:
    """An implicit solvent with OpenMM's standard radii has one for every element."""
    if not any(isinstance(force, openmm.CustomGBForce) for force in system.getForces()):
        return
    if unknown := [atom for atom in topology.atoms() if atom.element.symbol not in WITH_RADIUS]:
        raise UserError(
            f"The implicit solvent has no radius for {unknown[0].element.symbol} ({_told(unknown[0])}): give a prmtop, "
            "whose radii are its own, with implicit_solvent, or choose a force field without a solvent."
        )


def _told(atom: app.topology.Atom) -> str:
    return f"{atom.residue.name} {atom.residue.id} {atom.name}"
