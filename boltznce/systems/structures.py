"""Topology and positions of a molecule: from its sequence, a structure file, or objects of OpenMM's."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from openmm import app, unit

from boltznce.errors import UserError
from boltznce.systems.coordinates import as_tensor
from boltznce.systems.peptides import build_peptide, looks_like_sequence

__all__ = ["STRUCTURES", "Structure", "check_structure", "read_structure", "structure_file"]

STRUCTURES = Path(__file__).parent / "structures"
MOST_BYTES = 2**26  # of a structure
LONGEST_BOND = 0.5  # nm, of a structure; real ones have 0.25 at most

Structure = str | Path | tuple[app.Topology, np.ndarray | unit.Quantity]
Found = tuple[app.Topology | None, np.ndarray]


def structure_file(structure: str | Path) -> Path | None:
    """The file that a structure names: a shipped one or one of the user's; None for a sequence and for no file.

    What reads as a sequence is none of the files that happen to lie in the working directory.
    """
    shipped = STRUCTURES / f"{structure}.pdb"
    if shipped.is_file():
        return shipped
    path = Path(structure).expanduser()
    return path if path.is_file() and not looks_like_sequence(str(structure)) else None


def read_structure(structure: Structure) -> Found:
    """Topology, and positions (n_atoms, 3) in nm.

    Args:
        structure: a shipped structure, a peptide's sequence, a file of the PDB's, old (``.pdb``) or new (``.cif``), or
            both themselves. Files of Amber (``.inpcrd``, ``.rst7``), GROMACS (``.gro``) and CHARMM (``.crd``) have
            positions alone, and None for the topology: that is in the file with the forces.
    """
    if isinstance(structure, tuple):
        topology, positions = structure
        if unit.is_quantity(positions):
            positions = positions.value_in_unit(unit.nanometer)  # type: ignore[union-attr]
        positions = as_tensor(positions).double().numpy().reshape(-1, 3)
        check_structure(topology, positions, "The structure")
        return topology, positions
    path = structure_file(structure)
    if path is None:
        if looks_like_sequence(str(structure)):
            return build_peptide(str(structure))
        names = ", ".join(sorted(p.stem for p in STRUCTURES.glob("*.pdb")))
        raise UserError(
            f"There is no structure file {structure}: give the path of a PDB file, one of the shipped structures "
            f"({names}), or the sequence of a peptide, as AK or ACE-AAA-NME."
        )
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path} is too large to be a molecule's structure: give another one.")
    kind, reader = _reader(path)
    try:
        topology, positions, n_given = reader(path)
    except Exception as error:  # OpenMM's readers fail in as many ways as a file can be wrong
        raise UserError(f"{path} cannot be read as {kind} ({error}): export it again.") from error
    positions = np.array(positions.value_in_unit(unit.nanometer), dtype=np.float64)
    if topology is None:
        return None, positions
    if topology.getNumAtoms() != n_given:
        raise UserError(
            f"{path} has {n_given} atoms, of which {topology.getNumAtoms()} have a name of their own in their residue: "
            "give neighbouring residues different numbers or insertion codes, and atoms of one residue different names."
        )
    check_structure(topology, positions, str(path))
    return topology, positions


def check_structure(topology: app.Topology, positions: np.ndarray, source: str) -> None:
    """Raise UserError unless there is a place (n_atoms, 3) in nm for every atom, and no bond is torn."""
    if topology.getNumAtoms() != len(positions):
        raise UserError(
            f"{source} has positions of {len(positions)} atoms, and the molecule has {topology.getNumAtoms()}: give "
            "those of all its atoms, in its order."
        )
    for a, b in topology.bonds():
        if (length := float(np.linalg.norm(positions[a.index] - positions[b.index]))) > LONGEST_BOND:
            raise UserError(
                f"{source} has a bond of {length:.2f} nm between {a.residue.name} {a.residue.id} {a.name} and "
                f"{b.residue.name} {b.residue.id} {b.name}: separate molecules by a TER record, or give all atoms of "
                "the molecule whole."
            )


def _reader(path: Path) -> tuple[str, Callable[[Path], tuple[app.Topology | None, unit.Quantity, int]]]:
    """What a file is in words, and its reader: path -> topology, positions, number of atoms in the file."""
    suffix = path.suffix.lower()
    if suffix in (".cif", ".mmcif", ".pdbx"):
        return "an mmCIF file", _mmcif
    if suffix == ".gro":
        return "a file of GROMACS", lambda path: _positions(app.GromacsGroFile(str(path)))
    if suffix in (".crd", ".cor") and path.read_bytes()[:1] == b"*":
        return "a file of CHARMM", lambda path: (None, app.CharmmCrdFile(str(path)).positions, 0)
    if suffix in (".inpcrd", ".rst7", ".rst", ".restrt", ".crd", ".ncrst"):
        return "a file of Amber", lambda path: _positions(app.AmberInpcrdFile(str(path)))
    return "a PDB file", _pdb


def _positions(file: app.AmberInpcrdFile | app.GromacsGroFile) -> tuple[None, unit.Quantity, int]:
    return None, file.getPositions(asNumpy=True), 0


def _mmcif(path: Path) -> tuple[app.Topology, unit.Quantity, int]:
    file = app.PDBxFile(str(path))
    return file.topology, file.getPositions(asNumpy=True), file.topology.getNumAtoms()


def _pdb(path: Path) -> tuple[app.Topology, unit.Quantity, int]:
    file = app.PDBFile(str(path))
    n_given = count_atoms(path.read_text(encoding="utf-8", errors="replace"))
    return file.topology, file.getPositions(asNumpy=True), n_given


def count_atoms(text: str) -> int:
    """ATOM and HETATM records of a PDB file's first model, one of each that has alternate places."""
    lines = text.split("\nENDMDL")[0].splitlines()
    return sum(line.startswith(("ATOM", "HETATM")) and line[16:17] in (" ", "A", "1", "") for line in lines)
