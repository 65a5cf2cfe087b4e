"""Structures that are not one capped L-alanine: made from sequences, changed, written as PDB files."""

import io

import mdtraj
import numpy as np
from openmm import app

from boltznce.systems.peptides import build_peptide
from boltznce.topologies import from_json, pdb_text, to_json

AMBER = ["amber14-all.xml", "implicit/obc1.xml"]


class Structure:
    """Topology (mdtraj's, editable), positions (n, 3) in nm."""

    def __init__(self, topology, positions):
        self.topology, self.positions = topology, np.array(positions)

    @classmethod
    def of(cls, sequence):
        topology, positions = build_peptide(sequence)
        return cls(mdtraj.Topology.from_openmm(topology), positions)

    def atom(self, name):
        """``"NME3 CH3"``: residue's name and number, and the atom's name."""
        residue, atom = name.split()
        return next(a for a in self.topology.atoms if (str(a.residue), a.name) == (residue, atom))

    def text(self, ids=None):
        return pdb_text(self.topology, self.positions, ids)

    def write(self, path, ids=None):
        path.write_text(self.text(ids), encoding="utf-8")
        return str(path)

    def without(self, *names):
        """Less the atoms of these names."""
        gone = {self.atom(name).index for name in names}
        kept = [i for i in range(self.topology.n_atoms) if i not in gone]
        return Structure(self.topology.subset(kept), self.positions[kept])

    def renamed(self, **names):
        """Residues and atoms by other names; ``ALL`` numbers the atoms of every residue, ``LIG`` its name."""
        other = Structure(from_json(to_json(self.topology)), self.positions)  # mdtraj's copy keeps the old atoms' bonds
        for residue in other.topology.residues:
            residue.name = names.get(residue.name, names.get("residues", residue.name))
            if "atoms" in names:
                for number, atom in enumerate(residue.atoms):
                    atom.name = f"{atom.element.symbol}{number}"
        return other

    def turned(self, a, b, angle):
        """The side of b turned about the bond between a and b by an angle (rad)."""
        i, j = self.atom(a).index, self.atom(b).index
        moved, frontier = {j}, [j]
        while frontier:
            here = frontier.pop()
            for one, two in self.topology.bonds:
                for k, l in ((one.index, two.index), (two.index, one.index)):  # noqa: E741
                    if k == here and l not in moved and {k, l} != {i, j}:
                        moved.add(l)
                        frontier.append(l)
        x, moved = self.positions.copy(), sorted(moved - {j})
        axis = (x[j] - x[i]) / np.linalg.norm(x[j] - x[i])
        arm = x[moved] - x[j]
        along = (arm @ axis)[:, None] * axis
        x[moved] = x[j] + along + (arm - along) * np.cos(angle) + np.cross(axis, arm) * np.sin(angle)
        return Structure(self.topology, x)

    def mirrored(self):
        return Structure(self.topology, -self.positions)

    def joined(self, other, apart=1.0):
        """This and another one in one file, in chains of their own."""
        shift = np.array([apart + np.ptp(self.positions[:, 0]), 0, 0])
        return Structure(self.topology.join(other.topology), np.concatenate([self.positions, other.positions + shift]))


def amide_capped(letter="A"):
    """ACE-X-NH2 as amber names it: NHE with two hydrogens on N."""
    made = Structure.of(f"ACE-{letter}-NME")
    carbon, nitrogen = made.atom("NME3 CH3"), made.atom("NME3 N")
    x = made.positions
    x[carbon.index] = x[nitrogen.index] + 0.101 / 0.146 * (x[carbon.index] - x[nitrogen.index])
    made = made.without("NME3 HH31", "NME3 HH32", "NME3 HH33")
    for atom in made.topology.residue(2).atoms:
        atom.name = {"N": "N", "H": "HN1", "CH3": "HN2"}[atom.name]
        if atom.name == "HN2":
            atom.element = mdtraj.element.hydrogen
    made.topology.residue(2).name = "NHE"
    return made


def formyl_capped():
    """HCO-A-NH-CH3: its acetyl group's methyl is a hydrogen."""
    made = Structure.of("ACE-A-NME").without("ACE1 HH31", "ACE1 HH32", "ACE1 HH33")
    made.atom("ACE1 CH3").element = mdtraj.element.hydrogen
    made.topology.residue(0).name = "FOR"
    return made


def atoms_of(*atoms, bonds):
    """A topology of one residue, by element symbols and bonded pairs."""
    topology = mdtraj.Topology()
    residue = topology.add_residue("LIG", topology.add_chain())
    made = [topology.add_atom(f"{s}{k}", mdtraj.element.get_by_symbol(s), residue) for k, s in enumerate(atoms)]
    for a, b in bonds:
        topology.add_bond(made[a], made[b])
    return topology


def bonds_in(text):
    """Bonds and residues' sizes that OpenMM reads in a PDB file."""
    topology = app.PDBFile(io.StringIO(text)).topology
    bonds = {frozenset((a.index, b.index)) for a, b in topology.bonds()}
    return bonds, [len(list(residue.atoms())) for residue in topology.residues()]
