"""An OpenMM System of a molecule from what describes its forces: OpenMM's files, or those of Amber, CHARMM, GROMACS."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import openmm
from openmm import app, unit
from openmm.app.internal import customgbforces

from boltznce.errors import UserError
from boltznce.systems.force_field_files import kind_of, shipped_file
from boltznce.systems.openmm_checks import (
    misfit,
    nonbonded_of,
    not_canonical,
    require_atoms,
    require_bonds,
    require_method,
    require_radii,
)

__all__ = ["build_openmm_system"]

Made = tuple[openmm.System, app.Topology]


def build_openmm_system(
    forcefield: Sequence[str] | openmm.System,
    topology: app.Topology | None,
    nonbonded_method: str,
    cutoff_nm: float | None,
    implicit_solvent: str | None = None,
) -> Made:
    """An OpenMM System with every degree of freedom (no constraints, no removal of the centre-of-mass motion), and the
    topology that its atoms have.

    Args:
        forcefield: OpenMM's force-field files, a serialized System, or itself, Amber's prmtop, GROMACS's top, or a PSF
            and parameter files of CHARMM's.
        topology: of the structure; None where that has positions alone. Files of Amber, CHARMM and GROMACS have theirs.
        implicit_solvent: HCT, OBC1, OBC2, GBn or GBn2, to be added to what has none: with the radii of a prmtop, else
            OpenMM's standard ones, as from ``implicit/obc2.xml``; with its surface term.

    Raises UserError for files that cannot be read or do not fit, and for what is no molecule in the canonical ensemble.
    """
    if (cutoff_nm is None) != (nonbonded_method == "NoCutoff"):
        raise UserError("nonbonded_method=CutoffNonPeriodic needs cutoff_nm, and NoCutoff takes none.")
    kinds = ["System"] if isinstance(forcefield, openmm.System) else list(map(kind_of, forcefield))
    kind = next((kind for kind in ("CHARMM", "Amber", "GROMACS", "System") if kind in kinds), "OpenMM")
    names = "The System" if isinstance(forcefield, openmm.System) else f"The force field {', '.join(forcefield)}"
    if kind in ("Amber", "GROMACS", "System") and len(kinds) > 1:
        raise UserError(f"{names} has a file that is a whole one, of {kind}'s kind: leave the others out.")
    if topology is None and kind in ("OpenMM", "System"):
        raise UserError(f"{names} needs a structure that has elements and bonds: give a PDB or mmCIF file.")
    method, cutoff = getattr(app, nonbonded_method), {}
    if cutoff_nm is not None:
        cutoff = {"nonbondedCutoff": cutoff_nm * unit.nanometer}
    settings = {"nonbondedMethod": method, "constraints": None, "rigidWater": False, "removeCMMotion": False, **cutoff}
    try:
        system, own = _READERS[kind](forcefield, topology, settings, implicit_solvent)
    except UserError:
        raise
    except Exception as error:  # OpenMM's readers fail in as many ways as a file can be wrong
        raise UserError(f"{names} cannot be loaded, or does not fit ({error}).") from error
    if what := not_canonical(system):
        hint = " (constraints=None, rigidWater=False, nonbondedMethod=NoCutoff)" if kind == "System" else ""
        raise UserError(
            f"{names} gives the molecule {what}, which is not simulated here: choose one without{hint}, for one "
            "molecule of real atoms at constant temperature."
        )
    if kind == "System":
        require_method(system, names, nonbonded_method, cutoff_nm)
        require_bonds(system, own, names)
    require_atoms(own, topology, names)
    if implicit_solvent is not None and kind != "Amber":
        _add_generalized_born(system, own, implicit_solvent, names)
    radii_of_its_own = kind == "Amber" or (kind == "System" and implicit_solvent is None)
    if not radii_of_its_own:
        require_radii(system, own)
    return system, own


# ---- readers: forcefield, the structure's topology, settings of createSystem, implicit solvent -> what is made ------


def _of_openmm(files: Sequence[str], topology: app.Topology, settings: Mapping[str, Any], solvent: None) -> Made:
    try:
        forcefield = app.ForceField(*(str(shipped_file(file) or file) for file in files))
    except Exception as error:
        raise UserError(f"The force field {', '.join(files)} cannot be loaded ({error}).") from error
    try:
        return forcefield.createSystem(topology, **settings), topology
    except Exception as error:
        raise misfit(forcefield, topology, files, error) from error


def _of_system(
    given: Sequence[str] | openmm.System, topology: app.Topology, settings: Mapping[str, Any], solvent: None
) -> Made:
    if isinstance(given, openmm.System):
        system = openmm.XmlSerializer.clone(given)
    else:
        root = ElementTree.parse(Path(given[0]).expanduser()).getroot()
        # OpenMM would unpickle its function, and so run what the file says
        if any(element.get("type") == "PythonForce" for element in root.iter()):
            raise UserError(f"{given[0]} has a PythonForce, which is not read from files: leave it out.")
        system = openmm.XmlSerializer.deserialize(ElementTree.tostring(root, encoding="unicode"))
    for number in reversed(range(system.getNumForces())):
        if isinstance(system.getForce(number), openmm.CMMotionRemover):
            system.removeForce(number)
    return system, topology


def _of_amber(
    files: Sequence[str], topology: app.Topology | None, settings: Mapping[str, Any], solvent: str | None
) -> Made:
    made = app.AmberPrmtopFile(str(Path(files[0]).expanduser()))
    if made.topology.getPeriodicBoxVectors() is not None:
        raise UserError(
            f"{files[0]} is of a periodic box, which is not simulated here: strip box and water (cpptraj: strip :WAT, "
            "box nobox), and choose implicit_solvent."
        )
    radii = made._prmtop._raw_data.get("RADII", [])
    if solvent is not None and not any(float(radius) > 0 for radius in radii):
        raise UserError(
            f"{files[0]} has no radii for implicit_solvent={solvent}: set them (tleap: set default PBradii mbondi3), "
            "or set implicit_solvent=null, a vacuum."
        )
    return made.createSystem(implicitSolvent=solvent and getattr(app, solvent), **settings), made.topology


def _of_charmm(
    files: Sequence[str], topology: app.Topology | None, settings: Mapping[str, Any], solvent: str | None
) -> Made:
    psf = next(file for file in files if kind_of(file) == "CHARMM")
    made = app.CharmmPsfFile(str(Path(psf).expanduser()))
    parameters = app.CharmmParameterSet(*(str(Path(file).expanduser()) for file in files if file != psf))
    return made.createSystem(parameters, **settings), made.topology


def _of_gromacs(
    files: Sequence[str], topology: app.Topology | None, settings: Mapping[str, Any], solvent: str | None
) -> Made:
    made = app.GromacsTopFile(str(Path(files[0]).expanduser()))
    return made.createSystem(**settings), made.topology


_READERS: dict[str, Callable[..., Made]] = {
    "OpenMM": _of_openmm,
    "System": _of_system,
    "Amber": _of_amber,
    "CHARMM": _of_charmm,
    "GROMACS": _of_gromacs,
}


def _add_generalized_born(system: openmm.System, topology: app.Topology, model: str, names: str) -> None:
    """As ``implicit/*.xml`` do: OpenMM's standard radii, and the charges that there are."""
    if any(isinstance(force, openmm.GBSAOBCForce | openmm.CustomGBForce) for force in system.getForces()):
        raise UserError(f"{names} has an implicit solvent already: set implicit_solvent=null.")
    nonbonded = next((force for force in system.getForces() if isinstance(force, openmm.NonbondedForce)), None)
    if nonbonded is None:
        raise UserError(f"{names} has no charges, which implicit_solvent={model} needs: set it to null.")
    _, cutoff_nm = nonbonded_of(system)
    born = getattr(customgbforces, f"GBSA{model}Force")(SA="ACE", cutoff=cutoff_nm)
    try:
        for atom, parameters in enumerate(born.getStandardParameters(topology)):
            born.addParticle([nonbonded.getParticleParameters(atom)[0], *parameters])
        born.finalize()
    except ValueError as error:  # of GBn and GBn2, which know radii of 1 to 2 Å
        raise UserError(f"{names} is not for implicit_solvent={model} ({error}): choose OBC2, or null.") from error
    born.setNonbondedMethod(nonbonded.getNonbondedMethod())
    if cutoff_nm is not None:
        born.setCutoffDistance(cutoff_nm)
    nonbonded.setReactionFieldDielectric(1.0)
    system.addForce(born)
