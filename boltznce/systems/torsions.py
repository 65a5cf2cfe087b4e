"""Which torsions a molecule has, by its bonds and elements: φ, ψ and ω of its peptide bonds, else bonds that turn."""

import mdtraj
from mdtraj.core.topology import Atom

from boltznce.systems.conformers import rotatable_bonds

__all__ = ["backbone_dihedrals", "neighbours", "residue_dihedrals", "turning_dihedrals"]

Four = tuple[int, int, int, int]


def neighbours(topology: mdtraj.Topology) -> list[list[Atom]]:
    """Bonded atoms of every atom, in the order of their indices."""
    bonded: list[list[Atom]] = [[] for _ in topology.atoms]
    for a, b in topology.bonds:
        bonded[a.index].append(b)
        bonded[b.index].append(a)
    return [sorted(atoms, key=lambda atom: atom.index) for atoms in bonded]


def backbone_dihedrals(topology: mdtraj.Topology) -> dict[str, Four]:
    """phi, psi and omega of every peptide bond, caps included, by name in the order of the carbonyl carbons.

    A peptide bond is C(=O)-N; φ is C-N-Cα-C and ψ N-Cα-C-N, with a carbonyl beyond φ's Cα. ω has a carbon on either
    side, of a formyl cap the hydrogen. What atoms and residues are called does not matter.
    """
    bonded = neighbours(topology)

    def of(atom: Atom, element: str) -> list[Atom]:
        return [other for other in bonded[atom.index] if other.element.symbol == element]

    def is_carbonyl(carbon: Atom) -> bool:
        return any(len(bonded[oxygen.index]) == 1 for oxygen in of(carbon, "O")) and len(bonded[carbon.index]) == 3

    def acyls(atom: Atom) -> list[Atom]:
        return [carbon for carbon in of(atom, "C") if is_carbonyl(carbon)]

    def other(atom: Atom | None, among: list[Atom]) -> Atom | None:
        return next((each for each in among if each is not atom), None)

    found: dict[str, list[tuple[Atom, Atom, Atom, Atom]]] = {"phi": [], "psi": [], "omega": []}
    amides = [(c, n) for c in topology.atoms if c.element.symbol == "C" and is_carbonyl(c) for n in of(c, "N")]
    for carbon, nitrogen in amides:
        before = other(None, of(carbon, "C") or of(carbon, "H"))
        # of proline's two carbons that with a carbonyl, which leads on along the chain
        beyond = [each for each in of(nitrogen, "C") if each is not carbon and not is_carbonyl(each)]
        after = next((each for each in beyond if acyls(each)), other(None, beyond))
        if before is None:
            continue
        if after is not None:
            found["omega"].append((before, carbon, nitrogen, after))
            if (end := other(carbon, acyls(after))) is not None:
                found["phi"].append((carbon, nitrogen, after, end))
        if (start := other(nitrogen, of(before, "N"))) is not None:
            found["psi"].append((start, before, carbon, nitrogen))
    return {
        f"{kind}{number}" if kind == "omega" or number > 1 else kind: tuple(atom.index for atom in atoms)
        for kind, quadruples in found.items()
        for number, atoms in enumerate(quadruples, start=1)
    }


def residue_dihedrals(topology: mdtraj.Topology) -> dict[str, Four]:
    """``phi_2``, ``psi_2``, ``omega_2``, ``chi1_2`` ... of residue 2, by residues' numbers, and ``chi1`` of the first.

    φ has the residue's N in the middle, ψ its Cα and ω its C, before the bond to the next residue. Side chains are
    known by the atoms' usual names: N, CA, then B, G, D, E, Z, H along the chain, of two branches number 1. Residues
    that share their number with another are left out.
    """
    found: dict[str, list[Four]] = {}
    atoms = list(topology.atoms)
    for name, four in backbone_dihedrals(topology).items():
        found.setdefault(f"{name.rstrip('0123456789')}_{atoms[four[1]].residue.resSeq}", []).append(four)
    for residue in topology.residues:
        for k, four in enumerate(_side_chain(residue), start=1):
            found.setdefault(f"chi{k}_{residue.resSeq}", []).append(four)
            found.setdefault(f"chi{k}", [four])
    return {name: several[0] for name, several in found.items() if len(several) == 1}


def _side_chain(residue: mdtraj.core.topology.Residue) -> list[Four]:
    """χ1, χ2, ... of a residue; those within an aromatic ring are none."""
    named = {atom.name: atom.index for atom in residue.atoms if atom.element.symbol != "H"}
    chain = [name for name in ("N", "CA") if name in named]
    for letter in "BGDEZH":
        places = [f"{element}{letter}{branch}" for branch in ("", "1") for element in "CNOS"]
        if (place := next((place for place in places if place in named), None)) is None:
            break
        chain.append(place)
    fours = []
    for k in range(len(chain) - 3):
        if k >= 2 and any(name[-1] == "1" for name in chain[k + 1 : k + 3]):
            break
        fours.append(tuple(named[name] for name in chain[k : k + 4]))
    return fours if chain[:2] == ["N", "CA"] else []


def turning_dihedrals(topology: mdtraj.Topology) -> dict[str, Four]:
    """A torsion about every bond that turns, tors1, tors2, ... in the order of their atoms' numbers.

    Bonds that turn are those of `rotatable_bonds`, but not bonds to groups of equivalent hydrogens alone (CH3, NH3+),
    whose turning changes nothing, nor those of a carbon with two neighbours, which are on a line with it. Each torsion
    is between the heavy neighbours with the lowest numbers, or the one hydrogen that there is.
    """
    bonded, atoms = neighbours(topology), list(topology.atoms)

    def end(atom: int, across: int) -> int | None:
        others = [other for other in bonded[atom] if other.index != across]
        if atoms[atom].element.symbol == "C" and len(others) == 1:
            return None
        heavy = [other.index for other in others if other.element.symbol != "H"]
        return heavy[0] if heavy else others[0].index if len(others) == 1 else None

    found = []
    for a, b in sorted(tuple(sorted(bond[:2])) for bond in rotatable_bonds(_pairs(topology), topology.n_atoms)):
        first, last = end(a, b), end(b, a)
        if first is not None and last is not None:
            found.append((first, a, b, last))
    return {f"tors{number}": atoms for number, atoms in enumerate(found, start=1)}


def _pairs(topology: mdtraj.Topology) -> list[tuple[int, int]]:
    return [(a.index, b.index) for a, b in topology.bonds]
