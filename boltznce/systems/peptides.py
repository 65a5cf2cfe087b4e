"""Peptides from their sequence: atoms, bonds and an ideal structure, zwitterionic or capped.

Every heavy atom is placed from three others by a bond length, an angle and a dihedral (natural extension reference
frame, Parsons et al., J. Comput. Chem. 26, 1063, 2005), every hydrogen by the geometry of its heavy atom. Lengths and
angles are rounded from Engh & Huber, Acta Cryst. A47, 392 (1991); ``MolecularSystem.positions`` is then the force
field's minimum. Nothing is random, as hydrogens are in OpenMM's Modeller: the two of a CH2 keep their stereochemical
names.
"""

import logging
import re
from typing import NamedTuple

import numpy as np
from openmm import app

from boltznce.errors import UserError

log = logging.getLogger(__name__)

__all__ = ["FORMS", "LETTERS", "build_peptide", "looks_like_sequence", "parse_sequence"]


class Residue(NamedTuple):
    """A residue beyond N, CA, C and O.

    name: three letters; residues that ionize are in their form at pH 7, histidine with its hydrogen on NE2.
    side_chain: ``ATOM length angle dihedral`` (nm, degrees), bonded to the atom listed before it, or to that in
        ``ATOM-OTHER``; angle and dihedral are those with the next two atoms on the way to N. CB is implied for all but
        glycine.
    hydrogens: named after the heavy atom that they are on.
    rings: bonds that close rings.
    hand: 1 of an L-residue, -1 of a D-residue, in which every dihedral has the other sign.
    """

    name: str
    side_chain: str
    hydrogens: str
    rings: str = ""
    hand: int = 1


_PHENYL = "CG .151 114 -65, CD1 .139 120 90, CE1 .139 120 180, CZ .139 120 0"
RESIDUES = {
    "A": Residue("ALA", "", "H HA HB1 HB2 HB3"),
    "C": Residue("CYS", "SG .181 114 -65", "H HA HB2 HB3 HG"),
    "D": Residue("ASP", "CG .152 113 -65, OD1 .125 118 0, OD2-CG .125 118 180", "H HA HB2 HB3"),
    "E": Residue(
        "GLU", "CG .152 114 -65, CD .152 113 180, OE1 .125 118 0, OE2-CD .125 118 180", "H HA HB2 HB3 HG2 HG3"
    ),
    "F": Residue("PHE", f"{_PHENYL}, CE2 .139 120 0, CD2 .139 120 0", "H HA HB2 HB3 HD1 HE1 HZ HE2 HD2", "CD2-CG"),
    "G": Residue("GLY", "", "H HA2 HA3"),
    "H": Residue(
        "HIS",
        "CG .150 114 -65, ND1 .138 123 -75, CE1 .132 107 180, NE2 .134 110 0, CD2 .137 108 0",
        "H HA HB2 HB3 HE1 HE2 HD2",
        "CD2-CG",
    ),
    "I": Residue(
        "ILE",
        "CG2 .152 111 175, CG1-CB .153 111 -65, CD1 .151 114 170",
        "H HA HB HG12 HG13 HG21 HG22 HG23 HD11 HD12 HD13",
    ),
    "K": Residue(
        "LYS",
        "CG .152 114 -65, CD .152 111 180, CE .152 111 180, NZ .149 112 180",
        "H HA HB2 HB3 HG2 HG3 HD2 HD3 HE2 HE3 HZ1 HZ2 HZ3",
    ),
    "L": Residue(
        "LEU", "CG .153 116 -65, CD1 .152 111 175, CD2-CG .152 111 -63", "H HA HB2 HB3 HG HD11 HD12 HD13 HD21 HD22 HD23"
    ),
    "M": Residue("MET", "CG .152 114 -65, SD .180 113 180, CE .179 101 180", "H HA HB2 HB3 HG2 HG3 HE1 HE2 HE3"),
    "N": Residue("ASN", "CG .152 113 -65, OD1 .123 121 -20, ND2-CG .133 116 160", "H HA HB2 HB3 HD21 HD22"),
    "P": Residue("PRO", "CG .149 105 30, CD .150 105 -36", "HA HB2 HB3 HG2 HG3 HD2 HD3", "CD-N"),
    "Q": Residue(
        "GLN", "CG .152 114 -65, CD .152 113 180, OE1 .123 121 0, NE2-CD .133 116 180", "H HA HB2 HB3 HG2 HG3 HE21 HE22"
    ),
    "R": Residue(
        "ARG",
        "CG .152 114 -65, CD .152 111 180, NE .146 112 180, CZ .133 124 180, NH1 .133 120 0, NH2-CZ .133 120 180",
        "H HA HB2 HB3 HG2 HG3 HD2 HD3 HE HH11 HH12 HH21 HH22",
    ),
    "S": Residue("SER", "OG .142 111 -65", "H HA HB2 HB3 HG"),
    "T": Residue("THR", "CG2 .152 111 175, OG1-CB .143 109 -65", "H HA HB HG1 HG21 HG22 HG23"),
    "V": Residue("VAL", "CG1 .152 111 175, CG2-CB .152 111 -63", "H HA HB HG11 HG12 HG13 HG21 HG22 HG23"),
    "W": Residue(
        "TRP",
        "CG .150 114 -65, CD1 .137 127 90, NE1 .137 110 180, CE2 .137 109 0, CZ2 .139 130 180, CH2 .137 117 180, "
        "CZ3 .140 122 0, CE3 .138 121 0, CD2 .140 119 0",
        "H HA HB2 HB3 HD1 HE1 HZ2 HH2 HZ3 HE3",
        "CD2-CG CD2-CE2",
    ),
    "Y": Residue(
        "TYR",
        f"{_PHENYL}, OH .137 120 180, CE2-CZ .139 120 0, CD2 .139 120 0",
        "H HA HB2 HB3 HD1 HE1 HH HE2 HD2",
        "CD2-CG",
    ),
}
LETTERS = "".join(RESIDUES)
RESIDUES |= {  # in other forms than at pH 7, by Amber's names
    "hid": RESIDUES["H"]._replace(name="HID", hydrogens="H HA HB2 HB3 HD1 HE1 HD2"),
    "hie": RESIDUES["H"]._replace(name="HIE"),
    "hip": RESIDUES["H"]._replace(name="HIP", hydrogens="H HA HB2 HB3 HD1 HE1 HE2 HD2"),
    "ash": RESIDUES["D"]._replace(name="ASH", hydrogens="H HA HB2 HB3 HD2"),
    "glh": RESIDUES["E"]._replace(name="GLH", hydrogens="H HA HB2 HB3 HG2 HG3 HE2"),
    "lyn": RESIDUES["K"]._replace(name="LYN", hydrogens="H HA HB2 HB3 HG2 HG3 HD2 HD3 HE2 HE3 HZ2 HZ3"),
    "cym": RESIDUES["C"]._replace(name="CYM", hydrogens="H HA HB2 HB3"),
}
FORMS = tuple(name for name in RESIDUES if name not in LETTERS)
RESIDUE = rf"d?(?:[A-Z]|{'|'.join(FORMS)}|cyx)"
CAPS = {"ACE": Residue("ACE", "", "HH31 HH32 HH33"), "NME": Residue("NME", "", "H HH31 HH32 HH33")}
CAPS_ALONE = "ACE-NME"  # N-methylacetamide
# those that read as sequences too
THREE_LETTER_CODES = {
    residue.name: letter for letter, residue in RESIDUES.items() if set(residue.name) <= set(RESIDUES)
}
CAP_ATOMS = {"ACE": {"CA": "CH3", "C": "C", "O": "O"}, "NME": {"N": "N", "CA": "CH3"}}  # what a cap keeps of a residue

PSI = 145.0  # with phi = -65 a polyproline helix, in which side chains do not meet
BACKBONE = {"N": (0.133, 117, PSI), "CA": (0.146, 122, 180), "C": (0.1525, 111, -65)}  # each from the three before it
BETA_CARBON = (0.153, 110.5, -122)  # from C, N and CA; the sign makes an L-residue
OXYGENS = {"O": (0.123, 120.5, PSI + 180), "OXT": (0.125, 117, PSI)}  # from N, CA and C
HYDROGEN_DISTANCE = {"C": 0.109, "N": 0.101, "O": 0.097, "S": 0.134}
TETRAHEDRAL = 109.5

Array = np.ndarray


def looks_like_sequence(text: str) -> bool:
    """Whether a name is meant as a sequence, right or wrong: residues, perhaps with a cap; or caps alone."""
    return text == CAPS_ALONE or re.fullmatch(rf"(ACE-)?(?:{RESIDUE})+(-NME)?", text) is not None


def parse_sequence(sequence: str) -> tuple[list[str], bool]:
    """The residues of a peptide such as ``AK`` or ``ACE-AdAhip-NME``, and whether it is capped.

    >>> parse_sequence("ACE-AdAhip-NME")
    (['A', 'dA', 'hip'], True)

    ``ACE-NME``, the caps alone, has none. Capital letters are one-letter codes always, also where
    they are the three-letter code of one residue (``ACE-ALA-NME`` is Ala-Leu-Ala); `build_peptide` then warns.

    Raises UserError for anything else, naming what is wrong with it.
    """
    if sequence == CAPS_ALONE:
        return [], True
    capped, ends = sequence.startswith("ACE-"), sequence.endswith("-NME")
    inside = sequence.removeprefix("ACE-").removesuffix("-NME")
    residues = re.findall(f"{RESIDUE}|.", inside)
    names = [residue.removeprefix("d") for residue in residues]
    if "cyx" in names:
        raise UserError(
            f"{sequence!r} does not tell which cyx are bound to each other: give a PDB file with the bridge."
        )
    if unknown := sorted(set(names) - set(RESIDUES)):
        raise UserError(
            f"{', '.join(unknown)} in {sequence!r} is no amino acid: letters of a sequence are {LETTERS}, and forms "
            f"{', '.join(FORMS)}."
        )
    if "dG" in residues:
        raise UserError(f"{sequence!r} has a D-glycine, which there is not: write G.")
    if capped != ends:
        raise UserError(f"{sequence!r} has one cap: give both, ACE-{inside}-NME, or none.")
    if len(residues) < 2 - capped:
        raise UserError(f"{sequence!r} is too short: give two residues, as AK, or one between caps, as ACE-A-NME.")
    return residues, capped


def build_peptide(sequence: str) -> tuple[app.Topology, Array]:
    """Topology and ideal structure of a peptide with trans peptide bonds.

    Args:
        sequence: one-letter codes. ``AK`` has charged ends (NH3+, COO-), ``ACE-AAA-NME`` is capped, ``ACE-NME`` is the
            caps alone. Asp and Glu are negative, Lys and Arg positive, His has its hydrogen on NE2, Cys is reduced;
            other forms are three small letters, Amber's name: ``hid``, ``hie``, ``hip``, ``ash``, ``glh``, ``lyn``,
            ``cym`` (``AhipA``). A ``d`` makes the next residue a D-residue (``ACE-dA-NME``, ``dhipA``).

    Returns:
        The topology, with all bonds, Amber's atom names and each heavy atom before its hydrogens; the positions,
        (n_atoms, 3) in nm, float64, an extended chain, not minimized.

    Raises UserError for what is no sequence.
    """
    residues, capped = parse_sequence(sequence)
    if (letters := "".join(residues)) in THREE_LETTER_CODES:
        read = "-".join(RESIDUES[letter].name.capitalize() for letter in letters)
        alone = f"ACE-{THREE_LETTER_CODES[letters]}-NME"
        log.warning(
            "%s is read as %s, by one-letter codes; the residue %s alone is %s.", sequence, read, letters, alone
        )
    chain = _chain(residues, capped)
    heavy: dict[tuple[int, str], Array] = {}  # an atom is (place of its residue in the chain, name)
    bonds = []
    for i, (residue, backbone) in enumerate(zip(chain, _backbone(chain), strict=True)):
        positions, pairs = _heavy_atoms(residue, *backbone, end=i == len(chain) - 1)
        heavy |= {(i, name): position for name, position in positions.items()}
        bonds += [((i, a), (i, b)) for a, b in pairs]
    bonds += [((i, "C"), (i + 1, "N")) for i in range(len(chain) - 1)]

    x, to_hydrogens = {}, []
    for atom, position in heavy.items():
        x[atom] = position
        hydrogens = [
            (atom[0], name) for name in chain[atom[0]].hydrogens.split() if _bearer(name, atom[0], heavy) == atom
        ]
        x |= zip(hydrogens, _place_hydrogens(atom, len(hydrogens), heavy, bonds), strict=True)
        to_hydrogens += [(atom, hydrogen) for hydrogen in hydrogens]

    topology = app.Topology()
    molecule = topology.addChain()
    made = [topology.addResidue(residue.name, molecule) for residue in chain]
    atoms = {(i, name): topology.addAtom(name, app.Element.getBySymbol(name[0]), made[i]) for i, name in x}
    for a, b in bonds + to_hydrogens:
        topology.addBond(atoms[a], atoms[b])
    return topology, np.array(list(x.values()))


def _chain(residues: list[str], capped: bool) -> list[Residue]:
    """The residues with their caps, or with the first one's ammonium group."""
    chain = [RESIDUES[name.removeprefix("d")]._replace(hand=-1 if name[0] == "d" else 1) for name in residues]
    if capped:
        return [CAPS["ACE"], *chain, CAPS["NME"]]
    first = chain[0]
    ammonium = "H2 H3" if first.name == "PRO" else "H1 H2 H3"
    return [first._replace(hydrogens=f"{ammonium} {first.hydrogens.removeprefix('H ')}"), *chain[1:]]


def _backbone(chain: list[Residue]) -> list[tuple[Array, Array, Array]]:
    """N, CA and C of the residues."""
    points = list(0.1 * np.eye(3))  # three points to start from, where the residue before would be
    before = 1
    for residue in chain:
        for name, (length, angle, dihedral) in BACKBONE.items():
            hand = before if name == "N" else residue.hand  # N is placed by the ψ of the residue before
            a, b, c = points[-3:]
            points.append(_place(a, b, c, length, angle, hand * dihedral))
        before = residue.hand
    return list(zip(points[3::3], points[4::3], points[5::3], strict=True))


def _heavy_atoms(
    residue: Residue, n: Array, ca: Array, c: Array, end: bool
) -> tuple[dict[str, Array], list[tuple[str, str]]]:
    """Name -> position of a residue's heavy atoms, and its bonds, the one nearer to N first; ``end``: with OXT."""
    x, parent = {"N": n, "CA": ca}, {"CA": "N"}

    def place(a: Array, b: Array, c: Array, length: float, angle: float, dihedral: float) -> Array:
        return _place(a, b, c, length, angle, residue.hand * dihedral)

    if "HB" in residue.hydrogens:
        x["CB"], parent["CB"] = place(c, n, ca, *BETA_CARBON), "CA"
    last = "CB"
    for row in filter(None, residue.side_chain.split(", ")):
        bond, *numbers = row.split()
        name, _, other = bond.partition("-")
        b = other or last
        x[name] = place(x[parent[parent[b]]], x[parent[b]], x[b], *map(float, numbers))
        parent[name], last = b, name
    x["C"], parent["C"] = c, "CA"
    for name in ("O", "OXT") if end else ("O",):
        x[name], parent[name] = place(n, ca, c, *OXYGENS[name]), "C"
    bonds = [*parent.items(), *((a, b) for a, _, b in (bond.partition("-") for bond in residue.rings.split()))]
    if (kept := CAP_ATOMS.get(residue.name)) is not None:
        x = {kept[name]: position for name, position in x.items() if name in kept}
        bonds = [(kept[a], kept[b]) for a, b in bonds if a in kept and b in kept]
    return x, bonds


def _bearer(hydrogen: str, i: int, heavy: dict[tuple[int, str], Array]) -> tuple[int, str]:
    """The atom that a hydrogen is on: of its name from the second letter on (HG21 on CG2, H1 on N)."""
    names = [name for place, name in heavy if place == i]  # N, whose name ends at once, is before C and O
    return next((i, name) for stem in (hydrogen[1:], hydrogen[1:-1]) for name in names if name[1:] == stem)


def _place_hydrogens(atom: tuple[int, str], n: int, heavy: dict, bonds: list) -> list[Array]:
    """Positions of a heavy atom's n hydrogens: away from its heavy neighbours, a pair in the order of IUPAC's names."""
    if n == 0:
        return []
    near, *others = [b if a == atom else a for a, b in bonds if atom in (a, b)]
    centre, length = heavy[atom], HYDROGEN_DISTANCE[atom[1][0]]
    if not others:
        beyond = next(heavy[b if a == near else a] for a, b in bonds if near in (a, b) and atom not in (a, b))
        planar = n == 2 and sum(near in bond for bond in bonds) == 3  # amides and guanidinium, not an amine
        angle, fold = (120, 2) if planar else (TETRAHEDRAL, 3 if n > 1 else 1)
        return [_place(beyond, heavy[near], centre, length, angle, 180 + 360 * k / fold) for k in range(1, n + 1)]
    directions = [_unit(heavy[other] - centre) for other in (near, *others)]
    away = -_unit(sum(directions, start=np.zeros(3)))
    if n == 1:
        return [centre + length * away]
    across = _unit(np.cross(directions[0], directions[1]))
    half = np.radians(TETRAHEDRAL / 2)
    return [centre + length * (np.cos(half) * away + sign * np.sin(half) * across) for sign in (-1, 1)]


def _place(a: Array, b: Array, c: Array, length: float, angle: float, dihedral: float) -> Array:
    """The point at ``length`` (nm) from c, with ``angle`` at c to b and ``dihedral`` to a (degrees, IUPAC sign)."""
    angle, dihedral = np.radians(angle), np.radians(dihedral)
    along = _unit(c - b)
    normal = _unit(np.cross(b - a, along))
    inward = np.cross(normal, along)
    return c + length * (
        -np.cos(angle) * along + np.sin(angle) * (np.cos(dihedral) * inward + np.sin(dihedral) * normal)
    )


def _unit(vector: Array) -> Array:
    return vector / np.linalg.norm(vector)
