"""Rough conformers: what turns and what does not."""

import pytest
import torch

from boltznce import load_system
from boltznce.systems.bond_graph import BondGraph
from boltznce.systems.conformers import JITTER_NM, random_conformers, rotatable_bonds


@pytest.fixture(scope="module")
def system():
    return load_system("YN")


def test_bonds_that_turn(system):
    names = [str(atom) for atom in system.topology.atoms]
    found = {"-".join(sorted((names[a], names[b]))) for a, b, _ in rotatable_bonds(system.bonds, system.n_atoms)}
    assert found == {
        "TYR1-CA-TYR1-N",
        "TYR1-C-TYR1-CA",
        "TYR1-CA-TYR1-CB",
        "TYR1-CB-TYR1-CG",
        "TYR1-CZ-TYR1-OH",
        "ASN2-CA-ASN2-N",
        "ASN2-C-ASN2-CA",
        "ASN2-CA-ASN2-CB",
        "ASN2-CB-ASN2-CG",
    }


def test_conformers_keep_the_molecule_and_turn_its_torsions(system):
    x = random_conformers(system.positions, system.bonds, 2000, torch.Generator().manual_seed(0))
    first, second = torch.tensor(system.bonds).T
    lengths = (x[:, first] - x[:, second]).norm(dim=-1)
    expected = (system.positions[first] - system.positions[second]).norm(dim=-1)
    assert (lengths.mean(0) - expected).abs().max() < 8 * JITTER_NM**2 / 0.1
    assert (lengths.std(0) / (2**0.5 * JITTER_NM) - 1).abs().max() < 0.1
    assert (system.chirality(x) == 1).all()
    for name in ("phi", "psi"):
        angle = system.dihedral(x, name)
        assert torch.polar(torch.ones(len(x)), angle).mean().abs() < 0.1  # uniform; the standard error is 0.016
    omega = system.dihedral(x, "omega1")
    assert (omega.cos() < -0.9).all()
    # nothing is broken: whatever check fails is a clash of far atoms
    contacts = BondGraph.of(system.topology).contacts(x)
    assert contacts[:, first, second].all()
