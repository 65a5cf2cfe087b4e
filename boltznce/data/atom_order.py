"""Which atoms of a topology made elsewhere are those of a system, and in which order."""

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import mdtraj
import numpy as np
from mdtraj.core.topology import Residue

from boltznce.errors import UserError
from boltznce.systems.identity import molecule_identity
from boltznce.topologies import pdb_text

__all__ = ["Match", "match_atoms"]


class Match(NamedTuple):
    """``atoms``: (n_atoms,) of the topology, in the system's order; ``n_left_out``: solvent, ions and what else."""

    atoms: np.ndarray
    n_left_out: int
    reordered: bool


def match_atoms(theirs: mdtraj.Topology, system) -> Match:
    """The system's atoms in a topology: by elements and bonds as they stand, else by residue and name.

    Water, ions and other molecules are left out. Raises UserError, with what differs, for another molecule and for an
    order that the names do not tell.
    """
    if not theirs.n_bonds:
        theirs = theirs.copy()
        theirs.create_standard_bonds()
    atoms = _solute(theirs, system)
    own, n_left_out = theirs.subset(atoms), theirs.n_atoms - len(atoms)
    complete = own.n_bonds == len(system.bonds)  # those of residues that mdtraj does not know are missing
    if complete and _fits(own, system, range(len(atoms))):
        return Match(atoms, n_left_out, False)
    order = _by_names(own, system)
    if order is None and _fits(own, system, range(len(atoms))):
        order = np.arange(len(atoms))
    if order is None:
        raise _no_order(own, system, complete)
    return Match(atoms[order], n_left_out, bool((np.diff(order) < 0).any()))


def _solute(theirs: mdtraj.Topology, system) -> np.ndarray:
    """Numbers of the atoms of the system's residues, in order; raises UserError where they are not there once."""
    residues = list(theirs.residues)
    if theirs.n_atoms != system.n_atoms:
        residues = [residue for residue in residues if not residue.is_water and residue.n_atoms > 1]
    if sum(residue.n_atoms for residue in residues) != system.n_atoms:
        wanted, made_of = ([_composition(r) for r in among] for among in (system.topology.residues, residues))
        starts = [k for k in range(len(made_of)) if made_of[k : k + len(wanted)] == wanted]
        if len(starts) > 1:
            raise UserError(
                f"The trajectory has the residues of {system.name} {len(starts)} times: write one with one of them."
            )
        if starts:
            residues = residues[starts[0] : starts[0] + len(wanted)]
    atoms = np.array(sorted(atom.index for residue in residues for atom in residue.atoms), dtype=int)
    there, here = (_formula(topology) for topology in (theirs.subset(atoms), system.topology))
    if there != here:
        raise UserError(
            f"The trajectory is of another molecule than {system.name} ({there or 'no atoms'}, not {here}, without "
            "water and ions): set system= to its molecule, with the same protonation and caps, and all hydrogens."
        )
    return atoms


def _fits(own: mdtraj.Topology, system, new: Sequence[int]) -> bool:
    """Whether elements and bonds are the system's, once every atom has its ``new`` number there."""
    elements, wanted = _elements(own), _elements(system.topology)
    bonds = {frozenset(pair) for pair in system.bonds}
    moved = {frozenset((new[a.index], new[b.index])) for a, b in own.bonds}
    return moved <= bonds and all(elements[k] == wanted[place] for k, place in enumerate(new))


def _by_names(own: mdtraj.Topology, system) -> np.ndarray | None:
    """Numbers (n_atoms,) in ``own`` of the system's atoms; None where names do not tell them apart."""
    for names_of in (_names, _standard_names):
        there, here = names_of(own), names_of(system.topology)
        if len(set(there)) == len(there) and set(there) == set(here):
            new = [here.index(name) for name in there]
            if _fits(own, system, new):
                return np.argsort(new)
    return None


def _no_order(own: mdtraj.Topology, system, complete: bool) -> UserError:
    there, here = (
        molecule_identity(_elements(each), [(a.index, b.index) for a, b in each.bonds], [])["graph"]
        for each in (own, system.topology)
    )
    if complete and there != here:
        return UserError(
            f"The trajectory is of other bonds between the same elements than {system.name}: set system= to its "
            "molecule."
        )
    pairs = zip(own.atoms, system.topology.atoms, strict=True)
    told = next((f"{a} where it has {b}" for a, b in pairs if str(a) != str(b)), "equal names, but other bonds")
    return UserError(
        f"The trajectory has the atoms of {system.name} in another order, and their names do not tell which is which "
        f"({told}): set topology= to a file with the names of residues and atoms that {system.name} has."
    )


def _names(topology: mdtraj.Topology) -> list[tuple[int, str]]:
    """Of every atom, the number of its residue from the first on, and its name."""
    first = min(residue.resSeq for residue in topology.residues)
    return [(atom.residue.resSeq - first, atom.name) for atom in topology.atoms]


def _standard_names(topology: mdtraj.Topology) -> list[tuple[int, str]]:
    """The same in the words of mdtraj, which reads PDB files of many conventions."""
    text = pdb_text(topology, np.zeros((topology.n_atoms, 3)))
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / "topology.pdb").write_text(text, encoding="utf-8")
        read = mdtraj.load_topology(str(path))
    names = _names(read) if read.n_atoms == topology.n_atoms else _names(topology)
    order = [atom.index for residue in topology.residues for atom in residue.atoms]  # as they are written
    return [name for _, name in sorted(zip(order, names, strict=True))]


def _elements(part: mdtraj.Topology | Residue) -> list[str]:
    return [atom.element.symbol if atom.element is not None else "?" for atom in part.atoms]


def _formula(topology: mdtraj.Topology) -> str:
    return molecule_identity(_elements(topology), [], [])["formula"]


def _composition(residue: Residue) -> Counter:
    return Counter(_elements(residue))
