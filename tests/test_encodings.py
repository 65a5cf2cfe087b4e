"""Atom encodings: the 54 classes of the papers, from every residue in both ends of a chain."""

import mdtraj
import pytest
import torch

from boltznce import UserError, load_system
from boltznce.systems.encodings import ATOM_CLASSES, ELEMENTS, RESIDUE_TYPES, atom_class_names, encode_atoms
from boltznce.systems.peptides import LETTERS, build_peptide


def topology(sequence):
    return mdtraj.Topology.from_openmm(build_peptide(sequence)[0])


@pytest.fixture(scope="module")
def chains():
    """Each residue at the start, inside and at the end of a chain."""
    return [topology(letter + other + letter) for letter in LETTERS for other in LETTERS if other in (letter, "G")]


def test_exactly_the_54_classes_come_out(chains):
    found = {name for chain in chains for name in atom_class_names(chain)}
    assert found == set(ATOM_CLASSES)
    assert len(ATOM_CLASSES) == len(set(ATOM_CLASSES)) == 54
    assert list(ATOM_CLASSES) == sorted(ATOM_CLASSES)
    assert len(RESIDUE_TYPES) == 20


def test_classes_are_those_of_the_published_rule(chains):
    """A hydrogen's last digit is dropped but on rings, and the digit of OD and OE."""
    for chain in chains:
        for atom, name in zip(chain.atoms, atom_class_names(chain), strict=True):
            expected = atom.name
            ring = atom.residue.name in ("HIS", "PHE", "TRP", "TYR") and expected[:2] in ("HD", "HE", "HZ", "HH")
            if (expected[0] == "H" and expected[-1] in "123" and not ring) or expected[:2] in ("OD", "OE"):
                expected = expected[:-1]
            assert name == expected, atom


def test_full_has_one_place_residue_and_class_for_each_atom():
    chain = topology("KS")
    features = encode_atoms(chain)
    assert features.shape == (chain.n_atoms, 76)
    place, residue, name = features.split([2, 20, 54], dim=1)
    for block in (place, residue, name):
        assert (block.sum(dim=1) == 1).all()
    for i, atom in enumerate(chain.atoms):
        assert place[i].argmax() == atom.residue.index
        assert RESIDUE_TYPES[residue[i].argmax()] == atom.residue.name
        assert ATOM_CLASSES[name[i].argmax()] == atom_class_names(chain)[i]
    assert encode_atoms(topology("AAA"), n_places=4).shape[1] == 78


def test_elements_and_backbone():
    chain = topology("MC")
    elements = encode_atoms(chain, "elements")
    assert [ELEMENTS[k] for k in elements.argmax(dim=1)] == [atom.element.symbol for atom in chain.atoms]
    # the published one has 13 classes: N, CA, C and O of both residues are not elements but themselves
    backbone = encode_atoms(chain, "backbone")
    assert backbone.shape == (chain.n_atoms, 13)
    assert (backbone.sum(dim=1) == 1).all()
    special = [str(atom) for atom, row in zip(chain.atoms, backbone[:, 5:], strict=True) if row.any()]
    assert special == ["MET1-N", "MET1-CA", "MET1-C", "MET1-O", "CYS2-N", "CYS2-CA", "CYS2-C", "CYS2-O"]
    assert [row.argmax().item() for row in backbone[:, 5:] if row.any()] == list(range(8))
    ordinary = backbone[:, 5:].sum(dim=1) == 0
    torch.testing.assert_close(backbone[ordinary, :5], elements[ordinary])


def test_numbered_tells_every_atom_apart(chains):
    for chain in [*chains, topology("AAAAAA")]:
        numbered = encode_atoms(chain, "numbered")
        torch.testing.assert_close(numbered[:, 2:-3], encode_atoms(chain, n_places=6)[:, 6:])
        assert len(numbered.unique(dim=0)) == chain.n_atoms


def test_numbered_places_are_seen_from_both_ends():
    torch.testing.assert_close(encode_atoms(topology("KS"), "numbered")[:, :-3], encode_atoms(topology("KS")))
    chain = topology("GGGG")
    places = encode_atoms(chain, "numbered")[[atom.index for atom in chain.atoms if atom.name == "CA"], :2]
    torch.testing.assert_close(places, torch.tensor([[3 / 2, 0], [4 / 3, 1], [1, 4 / 3], [0, 3 / 2]]))


def test_a_system_takes_the_encoding_by_a_setting():
    torch.testing.assert_close(load_system("GA", encoding="full").features, encode_atoms(topology("GA")))
    assert load_system("GA").features.shape[1] != 76


def test_what_cannot_be_encoded_is_told():
    with pytest.raises(UserError, match="residue ACE, NME"):
        encode_atoms(topology("ACE-A-NME"))
    with pytest.raises(UserError, match="n_places"):
        encode_atoms(topology("AAA"))
    with pytest.raises(UserError, match="choose one of"):
        encode_atoms(topology("AA"), "all")
