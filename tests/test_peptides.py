"""Peptides from sequence: every residue at either end and inside, as force fields want it, with life's geometry."""

import collections
import copy
import io
import pickle

import mdtraj
import numpy as np
import openmm
import pytest
import torch
from inputs import Structure
from openmm import app, unit

from boltznce import UserError, load_system
from boltznce.config import build, compose
from boltznce.systems.encodings import encode_atoms
from boltznce.systems.peptides import FORMS, LETTERS, build_peptide, parse_sequence
from boltznce.systems.structures import read_structure

# every residue at either end
PAIRS = [first + last for first, last in zip(LETTERS, LETTERS[7:] + LETTERS[:7], strict=True)]
ALL = f"ACE-{LETTERS}-NME"
CHARGES = {"D": -1, "E": -1, "K": 1, "R": 1}
HEAVY_ATOMS = dict(
    zip("ACDEFGHIKLMNPQRSTVWY", [5, 6, 8, 9, 11, 4, 10, 8, 9, 8, 8, 8, 7, 9, 11, 6, 7, 7, 14, 12], strict=True)
)
# Neighbours by falling CIP priority and the label: with the last behind, the others turn clockwise (R) or not (S).
CIP = {
    "CA": ("N C CB HA", "S"),
    "CYS CA": ("N CB C HA", "R"),
    "ILE CB": ("CA CG1 CG2 HB", "S"),
    "THR CB": ("OG1 CA CG2 HB", "R"),
}


def load(sequence):
    return load_system(sequence, energy_backend="openmm")


def forces(system, kind):
    """Copies of the forces of a kind: they outlive the OpenMM System."""
    openmm_system = system.openmm_system()
    return [copy.deepcopy(force) for force in openmm_system.getForces() if isinstance(force, kind)]


def cip_labels(topology, x):
    """Index of each centre of L-residues -> whether its label is right."""
    labels = {}
    for residue in topology.residues:
        atoms = {atom.name: atom.index for atom in residue.atoms}
        for centre in ("CA", "CB"):
            order, label = CIP.get(f"{residue.name} {centre}") or CIP.get(centre, ("none", ""))
            if all(name in atoms for name in order.split()):
                a, b, c, _ = (x[atoms[name]] - x[atoms[centre]] for name in order.split())
                labels[atoms[centre]] = ("R" if np.dot(a, np.cross(b, c)) < 0 else "S") == label
    return labels


def assert_sound(system, mirrored=()):
    """Minimized: L (but numbers of residues ``mirrored`` D), trans, no strained bond (as of a pierced ring), no contact
    of atoms over three bonds apart."""
    x = system.positions
    assert (system.chirality(x[None]) == 1).all()
    labels = cip_labels(system.topology, x.numpy())
    assert sorted(labels) == [centre for centre, *_ in system.stereocentres]
    for centre, is_l in labels.items():
        assert is_l == (system.topology.atom(centre).residue.index not in mirrored)
    assert all(system.dihedral(x[None], name).abs() > 2.8 for name in system.omegas)
    near = np.eye(system.n_atoms, dtype=bool)
    for a, b in system.bonds:
        near[a, b] = near[b, a] = True
    near = np.linalg.matrix_power(near.astype(int), 3) > 0
    distances = torch.cdist(x, x).numpy()
    assert distances[~near].min() > 0.15
    (bonds,) = forces(system, openmm.HarmonicBondForce)
    for i in range(bonds.getNumBonds()):
        a, b, length, _ = bonds.getBondParameters(i)
        assert abs(distances[a, b] - length.value_in_unit(unit.nanometer)) < 0.005
    assert system.energy(x[None]).isfinite().all()


def total_charge(system):
    (force,) = forces(system, openmm.NonbondedForce)
    return sum(force.getParticleParameters(i)[0].value_in_unit(unit.elementary_charge) for i in range(system.n_atoms))


@pytest.mark.parametrize("sequence", PAIRS)
def test_dipeptides(sequence):
    system = load(sequence)
    heavy = [sum(atom.element.symbol != "H" for atom in residue.atoms) for residue in system.topology.residues]
    assert heavy == [HEAVY_ATOMS[sequence[0]], HEAVY_ATOMS[sequence[1]] + 1]  # OXT
    assert total_charge(system) == pytest.approx(sum(CHARGES.get(letter, 0) for letter in sequence), abs=1e-3)
    assert [len(system.omegas), list(system.dihedrals)[:2]] == [1, ["phi", "psi"]]
    assert_sound(system)


@pytest.mark.parametrize("sequence", ["ACE-G-NME", "ACE-PIT-NME", "RWDWE", "PP"])
def test_longer_and_capped_chains(sequence):
    system = load(sequence)
    letters, capped = parse_sequence(sequence)
    assert [residue.code for residue in system.topology.residues if residue.code] == letters
    assert total_charge(system) == pytest.approx(sum(CHARGES.get(letter, 0) for letter in letters), abs=1e-3)
    assert len(system.omegas) == len(letters) - 1 + 2 * capped
    assert_sound(system)


FORMS_AND_CHARGES = {"hid": 0, "hie": 0, "hip": 1, "ash": 0, "glh": 0, "lyn": 0, "cym": -1}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_residues_are_those_of_the_force_field(form, tmp_path):
    """By sequence, as L- and as D-residue, and by a PDB file."""
    system = load(f"ACE-A{form}G-NME")
    residue = system.topology.residue(2)
    assert residue.name == form.upper()
    template = app.ForceField("amber14-all.xml")._templates[residue.name]
    assert sorted(atom.name for atom in residue.atoms) == sorted(atom.name for atom in template.atoms)
    assert total_charge(system) == pytest.approx(FORMS_AND_CHARGES[form], abs=1e-3)
    assert_sound(system)
    assert_sound(load(f"ACE-d{form}A-NME"), mirrored=[1])
    x = system.positions.numpy()
    path = Structure(system.topology, x).write(tmp_path / "made.pdb")
    again = load_system(f"ACE-A{form}G-NME", structure=path, energy_backend="openmm")
    assert sorted(map(sorted, again.bonds)) == sorted(map(sorted, system.bonds))
    assert again.energy(x[None]) == pytest.approx(system.energy(x[None]), abs=1e-3)
    assert encode_atoms(mdtraj.Topology.from_openmm(build_peptide(f"A{form}")[0])).shape[1] == 76


@pytest.mark.parametrize("letter", [letter for letter in LETTERS if letter != "G"])
def test_a_d_residue_is_the_mirror_image_of_the_l_residue(letter):
    l_residue, d_residue = (load(f"ACE-{prefix}{letter}-NME") for prefix in ("", "d"))
    (topology, x), (mirrored, y) = (build_peptide(f"ACE-{prefix}{letter}-NME") for prefix in ("", "d"))
    assert mdtraj.Topology.from_openmm(topology) == mdtraj.Topology.from_openmm(mirrored)
    assert not any(cip_labels(d_residue.topology, y).values())
    both = l_residue.energy(np.stack([x, -x, y]))
    np.testing.assert_allclose(both, both[0], rtol=0, atol=1e-3)  # the same atoms, those of a CH2 exchanged
    assert not d_residue.equals(l_residue)
    assert_sound(d_residue, mirrored=[1])


@pytest.mark.parametrize(
    ("sequence", "mirrored"), [("dAK", [0]), ("ACE-AdPIdTdW-NME", [2, 4, 5]), ("RdWDdWdhip", [1, 3, 4])]
)
def test_chains_of_both_hands(sequence, mirrored):
    assert_sound(load(sequence), mirrored)


@pytest.mark.parametrize(
    "files", [("amber14-all.xml", "implicit/obc1.xml"), ("amber99sbildn.xml", "amber99_obc.xml"), ("amber96.xml",)]
)
@pytest.mark.parametrize("sequence", [ALL, LETTERS, LETTERS[::-1], "PP"])
def test_force_fields_type_the_topology(files, sequence):
    """Directly, after mdtraj, and after a PDB file such as a dataset's."""
    forcefield = app.ForceField(*files)
    topology, x = build_peptide(sequence)
    through_mdtraj = mdtraj.Topology.from_openmm(topology).to_openmm()
    file = io.StringIO()
    app.PDBFile.writeFile(topology, x * 10, file, keepIds=True)
    through_pdb = app.PDBFile(io.StringIO(file.getvalue())).topology
    for each in (topology, through_mdtraj, through_pdb):
        assert forcefield.createSystem(each).getNumParticles() == len(x)
        assert each.getNumBonds() == topology.getNumBonds()


def test_names_and_order_are_ambers():
    """Names as in the force field's own templates, with each heavy atom before its hydrogens."""
    templates = app.ForceField("amber14-all.xml")._templates
    for residue in [*build_peptide(ALL)[0].residues(), *build_peptide(LETTERS)[0].residues()]:
        terminal = {"H3": "N", "OXT": "C"}
        names = [atom.name for atom in residue.atoms()]
        prefix = next((terminal[name] for name in names if name in terminal), "")
        template = templates[prefix + residue.name.replace("HIS", "HIE")]
        assert sorted(names) == sorted(atom.name for atom in template.atoms)
        assert [atom.element.symbol for atom in residue.atoms()] == [name[0] for name in names]
    order = [atom.name for atom in build_peptide("SA")[0].atoms()][:11]
    assert order == ["N", "H1", "H2", "H3", "CA", "HA", "CB", "HB2", "HB3", "OG", "HG"]


def test_prochiral_hydrogens():
    """HB2 of most residues and HA2 of glycine are pro-R (Markley et al., Pure Appl. Chem. 70, 117, 1998)."""
    topology, x = build_peptide("ACE-KG-NME")
    atoms = {(atom.residue.name, atom.name): x[atom.index] for atom in topology.atoms()}
    for residue, order in (("LYS", "CB CA CG HB2"), ("GLY", "CA N C HA2")):
        centre, a, b, c = (atoms[residue, name] for name in order.split())
        assert np.dot(a - centre, np.cross(b - centre, c - centre)) < 0


def test_capped_alanine_is_the_shipped_alanine_dipeptide():
    """Its energy is that of the shipped structure's minimum, or of one within a few kT."""
    shipped, built = load_system("aldp"), load_system("aldp", structure="ACE-A-NME")
    assert collections.Counter(a.element for a in built.topology.atoms) == collections.Counter(
        a.element for a in shipped.topology.atoms
    )
    energies = [system.energy(system.positions[None]).item() for system in (shipped, built)]
    assert energies[1] == pytest.approx(energies[0], abs=5.0)


@pytest.mark.parametrize(("name", "letters"), [("tetrapeptide", "AAA"), ("hexapeptide", "AAAAA")])
def test_named_peptides(name, letters):
    system = load_system(name)
    n = len(letters)
    assert (system.name, system.temperature, system.n_atoms) == (name, 300.0, 12 + 10 * n)
    assert system.forcefield == ["amber99sbildn.xml", "amber99_obc.xml"]
    numbers = ["", *range(2, n + 1)]
    expected = [f"{kind}{number}" for kind in ("phi", "psi") for number in numbers] + [
        f"omega{k}" for k in range(1, n + 2)
    ]
    assert list(system.dihedrals) == expected
    assert system.state == ("phi", (0.0, 2.0))
    assert len(system.methyl_groups) == n + 2
    reference = system.reference()
    assert (reference["dihedral"], reference["state"], reference["made_by"]["n_repeats"]) == (
        "phi",
        list(system.state[1]),
        2,
    )
    assert reference["delta_f"]["std_error"] < 0.2
    assert system.at_temperature(310.0).reference() is None
    assert_sound(system)


def test_bare_sequences_have_the_settings_of_the_dipeptides():
    for sequence in ("AK", "ACE-AAA-NME"):
        system = load(sequence)
        assert (system.name, system.temperature) == (sequence, 310.0)
        assert system.forcefield == ["amber14-all.xml", "implicit/obc1.xml"]
        nonbonded = forces(system, openmm.NonbondedForce) + forces(system, openmm.CustomGBForce)
        assert len(nonbonded) == 2
        for force in nonbonded:
            assert force.getNonbondedMethod() == type(force).CutoffNonPeriodic
            assert force.getCutoffDistance() == 2 * unit.nanometer
        assert system.openmm_system().getNumConstraints() == 0
    assert load_system("AK", temperature=300.0, energy_backend="openmm").temperature == 300.0


def test_default_backend():
    system = load_system("AK")
    x = system.positions[None].double()
    torch.testing.assert_close(system.energy(x), load("AK").energy(x), rtol=1e-6, atol=1e-4)


def test_building_is_deterministic_and_survives_pickling():
    first, second = load("IT"), load("IT")
    again = pickle.loads(pickle.dumps(first))
    for other in (second, again):
        assert torch.equal(first.positions, other.positions)
        assert first.topology == other.topology
        assert first.openmm_topology().getNumBonds() == other.openmm_topology().getNumBonds()
    x = first.positions[None]
    torch.testing.assert_close(again.energy(x), first.energy(x))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("AB", "Unknown system 'AB': B in .* letters of a sequence are ACDEF.*aldp.*hexapeptide"),
        ("AXBZ", "B, X, Z in"),
        ("A", "'A' is too short.*ACE-A-NME"),
        ("ACE-AAA", "one cap: give both, ACE-AAA-NME"),
        ("AAA-NME", "one cap"),
        ("ACE-AXA-NME", "X in"),
        ("AdXA", "X in .*forms hid, hie, hip"),
        ("AdGA", "D-glycine.*write G"),
        ("CcyxAcyx", "bound to each other: give a PDB file"),
        ("ACE-hip", "one cap: give both, ACE-hip-NME"),
        ("hip", "too short"),
        ("Ahi", "Unknown system 'Ahi'"),
        ("ak", "Unknown system 'ak': choose one of aldp.*tetrapeptide.*sequence of a peptide"),
        ("ACE--NME", "Unknown system"),
        ("", "Unknown system"),
    ],
)
def test_what_is_no_sequence(name, message):
    with pytest.raises(UserError, match=message):
        load_system(name)


def test_sequence_on_the_command_line():
    config = compose("simulate", ["system=AK"])
    assert config.system.name == config.system.structure == "AK"
    assert config.name == "AK_metadynamics"
    assert build(config.system, energy_backend="openmm").name == "AK"
    assert compose("simulate", ["system=ACE-AA-NME", "system.temperature=300"]).system.temperature == 300
    mirrored = compose("train", ["system=ACE-dAhip-NME", "budget=smoke"]).system
    assert mirrored.name == mirrored.structure == "ACE-dAhip-NME"
    for word, message in (("system=AB", "B in 'AB'"), ("system=nope", "aldp.*sequence of a peptide")):
        with pytest.raises(UserError, match=message):
            compose("simulate", [word])


def test_a_sequence_is_no_file_that_happens_to_have_its_name(tmp_path, monkeypatch):
    topology, x = build_peptide("ACE-A-NME")
    with open(tmp_path / "AK", "w") as file:
        app.PDBFile.writeFile(topology, x * 10, file)
    monkeypatch.chdir(tmp_path)
    assert read_structure("AK")[0].getNumResidues() == 2
    assert read_structure("./AK")[0].getNumResidues() == 3
    assert read_structure("AAA")[0].getNumResidues() == 3
    with pytest.raises(UserError, match=r"no structure file.*sequence of a peptide"):
        read_structure("missing.pdb")
