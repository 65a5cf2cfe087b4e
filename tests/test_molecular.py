"""MolecularSystem: conventions, symmetries of the energy, topology, and input that cannot be used."""

import json

import mdtraj
import numpy as np
import pytest
import torch
from openmm import app

from boltznce import UserError, load_system
from boltznce.systems import molecular, reference
from boltznce.systems.reference import load_reference
from boltznce.systems.structures import STRUCTURES


@pytest.fixture(scope="module")
def system():
    return load_system("aldp")


@pytest.fixture(scope="module")
def x(system):
    noise = torch.randn((16, 22, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return system.positions.double() + 0.02 * noise


def test_attributes(system):
    assert (system.name, system.n_atoms, system.dim, system.temperature, system.translation_invariant) == (
        "aldp",
        22,
        3,
        300.0,
        True,
    )
    assert system.positions.shape == (22, 3)
    assert system.positions.dtype == torch.float32
    assert system.dihedrals["phi"] == (4, 6, 8, 14)
    assert system.dihedrals["psi"] == (6, 8, 14, 16)
    assert [system.dihedrals[name] for name in system.omegas] == [(1, 4, 6, 8), (8, 14, 16, 18)]
    assert system.state == ("phi", (0.0, 2.0))
    assert system.methyl_groups == [(0, 2, 3), (11, 12, 13), (19, 20, 21)]
    assert [centre for centre, *_ in system.stereocentres] == [8]
    assert len(system.bonds) == 21
    assert system.openmm_system().getNumConstraints() == 0


def test_features_are_the_classes_of_the_paper(system):
    """Authors' order: CH3 carbon 0, its hydrogens 1-3, ...; hydrogens 1-3 -> 2, 11-13 -> 12, 19-21 -> 20."""
    carbon_first = [1, 0, 2, 3, *range(4, 22)]
    classes = system.features.argmax(dim=1)[carbon_first].tolist()
    assert classes == [0, 2, 2, 2, *range(4, 11), 12, 12, 12, *range(14, 19), 20, 20, 20]
    assert system.features.shape == (22, 21)
    assert (system.features.sum(dim=1) == 1).all()


def test_positions_are_a_minimum(system):
    x = system.positions[None].double().requires_grad_()
    (gradient,) = torch.autograd.grad(system.energy(x).sum(), x)
    assert gradient.square().mean().sqrt() < 10  # kT/nm; thermal forces are near 1000


def test_both_backends_agree(system, x):
    torch.testing.assert_close(
        load_system("aldp", energy_backend="openmm").energy(x), system.energy(x), rtol=1e-9, atol=1e-6
    )


def test_worker_processes_compute_the_same_to_the_last_bit(x):
    batch = x.repeat(20, 1, 1) * torch.linspace(0.99, 1.01, 320)[:, None, None]
    alone, shared = (load_system("aldp", energy_backend="openmm", n_workers=n)._potential for n in (1, 2))
    for here, there in zip(alone.evaluate(batch), shared.evaluate(batch), strict=True):
        assert torch.equal(here, there)
    assert alone.pool.pids == []
    assert len(shared.pool.pids) == 2
    shared.pool.close()
    shared.evaluate(batch[:8])
    assert shared.pool.pids == []  # small batches stay here


def test_energy_is_that_of_the_mirror_image_and_of_turned_methyls(system, x):
    permuted = x.clone()
    for a, b, c in system.methyl_groups:
        permuted[:, [a, b, c]] = x[:, [b, a, c]]
    for moved in (-x, permuted):
        torch.testing.assert_close(system.energy(moved), system.energy(x), rtol=1e-9, atol=1e-7)


def test_chirality_flips_in_the_mirror(system, x):
    small = system.positions + 0.1 * (x.float() - system.positions)
    assert (system.chirality(small) == 1).all()
    assert (system.chirality(-small) == -1).all()
    assert system.chirality(small).shape == (16, 1)
    assert isinstance(system.chirality(small.numpy()), np.ndarray)
    swapped = small.clone()
    swapped[:, [9, 10]] = small[:, [10, 9]]  # HA and CB
    assert (system.chirality(swapped) == -1).all()


def test_dihedrals_agree_with_mdtraj(system, x):
    trajectory = mdtraj.Trajectory(x.numpy(), system.topology)
    for name, compute in (("phi", mdtraj.compute_phi), ("psi", mdtraj.compute_psi)):
        expected = compute(trajectory)[1][:, 0]
        np.testing.assert_allclose(system.dihedral(x.numpy(), name), expected, atol=1e-5)
        torch.testing.assert_close(system.dihedral(x, name).numpy(), system.dihedral(x.numpy(), name))
    assert (system.dihedral(system.positions[None], "omega1").abs() > 2.5).all()
    with pytest.raises(UserError, match="phi, psi"):
        system.dihedral(x, "chi")


def test_topology_can_be_typed_again(system):
    app.ForceField(*system.forcefield).createSystem(system.topology.to_openmm())


def test_reference_only_for_what_it_was_made_for(system, tmp_path, monkeypatch):
    contents = load_reference(reference.REFERENCE_FOLDER / "aldp.json")
    monkeypatch.setattr(reference, "REFERENCE_FOLDER", tmp_path)
    assert system.reference() is None
    (tmp_path / "aldp.json").write_text(json.dumps(contents))
    assert system.reference() == contents
    assert system.at_temperature(400.0).reference() is None
    (tmp_path / "aldp.json").write_text(json.dumps(contents | {"dihedral": "phi", "state": [0.0, 1.0]}))
    assert system.reference() is None


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"energy_backend": "openmm"}, "aldp"),
        ({"forcefield": ["amber96.xml", "amber96_obc.xml"]}, None),
        ({"state": ["phi", [0.0, 1.5]]}, None),
        ({"state": ["psi", [0.0, 2.0]]}, None),
        ({"dihedrals": {"phi": [6, 8, 14, 16]}}, None),
        ({"nonbonded_method": "CutoffNonPeriodic", "cutoff_nm": 2.0}, None),
        ({"structure": "AK", "state": None}, None),
    ],
)
def test_a_shipped_reference_stands_under_what_it_is_of_and_nothing_else(settings, found):
    known = load_system("aldp", **settings).reference()
    assert (known and known["system"]) == found


def peptide(sequence):
    """An mdtraj topology of a capped or zwitterionic chain, from OpenMM's own residue templates."""
    topology = app.Topology()
    chain = topology.addChain()
    templates = app.ForceField("amber14-all.xml")._templates
    previous = None
    for name in sequence:
        template, residue = templates[name], topology.addResidue(name, chain)
        atoms = [topology.addAtom(atom.name, atom.element, residue) for atom in template.atoms]
        for a, b in template.bonds:
            topology.addBond(atoms[a], atoms[b])
        named = {atom.name: atom for atom in atoms}
        if previous is not None:
            topology.addBond(previous, named["N"])
        previous = named.get("C")
    return mdtraj.Topology.from_openmm(topology)


def test_dihedrals_of_longer_chains():
    names = molecular.backbone_dihedrals(peptide(["ACE", "ALA", "ALA", "ALA", "NME"]))
    assert list(names) == ["phi", "phi2", "phi3", "psi", "psi2", "psi3", "omega1", "omega2", "omega3", "omega4"]
    assert list(molecular.backbone_dihedrals(peptide(["NALA", "PRO", "CLYS"]))) == [
        "phi",
        "phi2",
        "psi",
        "psi2",
        "omega1",
        "omega2",
    ]


@pytest.mark.parametrize(
    ("residue", "centres"),
    [("ALA", ["CA"]), ("GLY", []), ("ILE", ["CA", "CB"]), ("THR", ["CA", "CB"]), ("VAL", ["CA"]), ("LEU", ["CA"])],
)
def test_stereocentres_of_residues(residue, centres):
    topology = peptide(["ACE", residue, "NME"])
    assert [topology.atom(centre).name for centre, *_ in molecular.find_stereocentres(topology)] == centres


def test_residue_that_cannot_be_typed_is_named(tmp_path):
    lines = (STRUCTURES / "aldp.pdb").read_text().splitlines()
    path = tmp_path / "broken.pdb"
    path.write_text("\n".join(line for line in lines if line[12:16].strip() != "HB2" and not line.startswith("CONECT")))
    with pytest.raises(UserError, match=r"residue ALA 2 "):
        load_system("aldp", structure=str(path))


def test_missing_or_unreadable_structure(tmp_path):
    with pytest.raises(UserError, match=r"no structure file .*nowhere\.pdb.*aldp"):
        load_system("aldp", structure="nowhere.pdb")
    damaged = tmp_path / "damaged.pdb"
    damaged.write_text("ATOM      1  N   ALA A   1      not a number\n")
    with pytest.raises(UserError, match=r"damaged\.pdb cannot be read"):
        load_system("aldp", structure=damaged)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"forcefield": ["nope.xml"]}, r"nope\.xml"),
        ({"temperature": 0}, "positive"),
        ({"energy_backend": "jax"}, "torch, openmm, xtb"),
        ({"energy_backend": "openmm", "n_workers": 0}, "n_workers"),
        ({"nonbonded_method": "Ewald"}, "NoCutoff"),
        ({"nonbonded_method": "CutoffNonPeriodic"}, "cutoff_nm"),
        ({"state": ["chi", [0.0, 1.0]]}, "phi, psi"),
        ({"state": ["phi", [0, 115]]}, "in radians"),
    ],
)
def test_settings_that_cannot_be_used(settings, message):
    with pytest.raises(UserError, match=message):
        load_system("aldp", **settings)
