"""Atom encodings for many peptides, as in transferable Boltzmann generators (Klein & Noé 2024, arXiv 2406.14426).

One-hot blocks in a fixed order, which trained weights depend on: never reorder, only append.

- ``elements``: element (H, C, N, O, S).
- ``backbone``: element (5), but N, CA, C and O of each residue a class of their own (4 for each of ``n_places``).
- ``full``: place of the residue in the chain (``n_places``), residue type (20, by three letters), atom class (54).
- ``numbered``: place of the residue as seen from the last and from the first, 2 d / (1 + d) for d residues between (2),
  then as ``full``, then the number of the atom among those of its class and residue (3): every atom differs from every
  other, as networks on named distances want it, in a chain of any length. Of a dipeptide's residues the places are
  those of ``full``. The first three encodings are the papers', this one is not.

The atom class is the atom's name with equivalent atoms merged. A heavy atom has its Amber name, but both oxygens of Asp
(and that of Asn) are OD and those of Glu (and Gln) OE. A hydrogen is H and what follows the element in its heavy atom's
name: all on CB are HB, all on CG2 HG2, those on N, H1 to H3 of the ammonium group too, H; that of Thr's OG1 is HG as in
Ser. Over the 20 residues with both ends this gives exactly the 54 of `ATOM_CLASSES`, the classes and the order of the
papers.
"""

from collections import Counter

import mdtraj
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from boltznce.errors import UserError

__all__ = ["ATOM_CLASSES", "ENCODINGS", "RESIDUE_TYPES", "atom_class_names", "encode_atoms"]

ENCODINGS = ("elements", "backbone", "full", "numbered")
ELEMENTS = ("H", "C", "N", "O", "S")
BACKBONE = ("N", "CA", "C", "O")
N_NUMBERS = 3
_RESIDUES = "ALA ARG ASN ASP CYS GLN GLU GLY HIS ILE LEU LYS MET PHE PRO SER THR TRP TYR VAL"
RESIDUE_TYPES = tuple(_RESIDUES.split())
_CLASSES = """
C CA CB CD CD1 CD2 CE CE1 CE2 CE3 CG CG1 CG2 CH2 CZ CZ2 CZ3
H HA HB HD HD1 HD2 HE HE1 HE2 HE3 HG HG1 HG2 HH HH1 HH2 HZ HZ2 HZ3
N ND1 ND2 NE NE1 NE2 NH1 NH2 NZ
O OD OE OG OG1 OH OXT
SD SG
"""
ATOM_CLASSES = tuple(_CLASSES.split())
MERGED = {"OD1": "OD", "OD2": "OD", "OE1": "OE", "OE2": "OE"}
HYDROGEN_OF = {"OG1": "HG"}  # where it is not H and the heavy atom's name from the second letter on
VARIANTS = {
    "HID": "HIS",
    "HIE": "HIS",
    "HIP": "HIS",
    "CYX": "CYS",
    "CYM": "CYS",
    "ASH": "ASP",
    "GLH": "GLU",
    "LYN": "LYS",
}


def encode_atoms(topology: mdtraj.Topology, encoding: str = "full", n_places: int = 2) -> Tensor:
    """(n_atoms, width) float32: width 5, 4 n_places + 5, n_places + 74 or 79, in the order above.

    Raises UserError for an unknown encoding, a chain longer than ``n_places`` (``backbone``, ``full``), and residues
    (caps) and atoms without a class.
    """
    if encoding not in ENCODINGS:
        raise UserError(f"Unknown atom encoding {encoding!r}: choose one of {', '.join(ENCODINGS)}.")
    elements = _one_hot([atom.element.symbol for atom in topology.atoms], ELEMENTS, "element")
    if encoding == "elements":
        return elements
    if encoding == "backbone":
        _check_length(topology, n_places)
        labels = [
            f"{atom.residue.index} {atom.name}" if atom.name in BACKBONE else atom.element.symbol
            for atom in topology.atoms
        ]
        return _one_hot(labels, (*ELEMENTS, *(f"{i} {name}" for i in range(n_places) for name in BACKBONE)), "name")
    names = atom_class_names(topology)
    types = _one_hot(
        [VARIANTS.get(atom.residue.name, atom.residue.name) for atom in topology.atoms], RESIDUE_TYPES, "residue"
    )
    classes = _one_hot(names, ATOM_CLASSES, "atom class")
    residues = torch.tensor([atom.residue.index for atom in topology.atoms])
    if encoding == "full":
        _check_length(topology, n_places)
        return torch.cat([one_hot(residues, n_places).float(), types, classes], dim=1)
    apart = torch.stack([topology.n_residues - 1 - residues, residues], dim=1)
    seen: Counter[tuple[int, str]] = Counter()
    numbers = []
    for atom, name in zip(topology.atoms, names, strict=True):
        numbers.append(seen[atom.residue.index, name])
        seen[atom.residue.index, name] += 1
    return torch.cat([2 * apart / (1 + apart), types, classes, one_hot(torch.tensor(numbers), N_NUMBERS)], dim=1)


def _check_length(topology: mdtraj.Topology, n_places: int) -> None:
    if topology.n_residues > n_places:
        raise UserError(f"The encoding has places for {n_places} residues, not {topology.n_residues}: raise n_places.")


def atom_class_names(topology: mdtraj.Topology) -> list[str]:
    """Name of each atom's class, by the rule of this module."""
    bearer = {}
    for a, b in topology.bonds:
        bearer[a.index], bearer[b.index] = b, a  # what is overwritten is of heavy atoms, which have no bearer
    return [
        HYDROGEN_OF.get(bearer[atom.index].name, "H" + bearer[atom.index].name[1:])
        if atom.element.symbol == "H"
        else MERGED.get(atom.name, atom.name)
        for atom in topology.atoms
    ]


def _one_hot(labels: list[str], known: tuple[str, ...], what: str) -> Tensor:
    if unknown := sorted(set(labels) - set(known)):
        raise UserError(
            f"The atom encoding has no {what} {', '.join(unknown)}: it is for uncapped peptides of the 20 amino acids; "
            "leave encoding unset for any other molecule."
        )
    return one_hot(torch.tensor([known.index(label) for label in labels]), len(known)).float()
