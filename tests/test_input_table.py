"""Situations of molecules and inputs, each with what is right; what fails is listed. ``pytest -m slow``."""

import numpy as np
import pytest
import torch
from inputs import AMBER, Structure, amide_capped
from openmm import app

from boltznce import UserError, load_system, train_run
from boltznce.methods.views import views_of
from boltznce.systems.conformers import random_conformers
from boltznce.systems.isomers import allowed_conformers, excluded_conformers
from boltznce.topologies import system_pdb

pytestmark = pytest.mark.slow
CHARMM = ("charmm36.xml", "charmm36_2024.xml")
AMBERS = ("amber03.xml", "amber10.xml", "amber96.xml", "amber99sb.xml", "amber99sbildn.xml", "amber99sbnmr.xml")
AMBERS += ("amberfb15.xml", "amber14-all.xml", "amber19-all.xml")


def changed(sequence, *turns):
    structure = Structure.of(sequence)
    for a, b in turns:
        structure = structure.turned(a, b, np.pi)
    return structure


def numbered(sequence, numbers):
    structure = Structure.of(sequence)
    for residue, number in zip(structure.topology.residues, numbers, strict=True):
        residue.resSeq = number
    return structure


def disulfide():
    """Two cysteines, each in a chain of its own, whose sulphurs are bound."""
    half = Structure.of("ACE-C-NME").without("CYS2 HG").renamed(CYS="CYX")
    sulphur, x = half.atom("CYX2 SG").index, half.positions
    outward = (x[sulphur] - x.mean(0)) / np.linalg.norm(x[sulphur] - x.mean(0))
    other = (x - x[sulphur]) @ turn_onto(outward, -outward + 0.01).T + x[sulphur] + 0.205 * outward
    both = Structure(half.topology.join(half.topology), np.concatenate([x, other]))
    atoms = list(both.topology.atoms)
    both.topology.add_bond(atoms[sulphur], atoms[sulphur + len(x)])
    return both


def turn_onto(a, b):
    """The rotation that takes the direction of a to that of b."""
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    axis, c = np.cross(a, b), a @ b
    k = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    return np.eye(3) + k + k @ k / (1 + c)


# name -> structure, symbols of the views, number of peptide bonds that are cis
MOLECULES = {
    "trans": (lambda: Structure.of("ACE-A-NME"), [("φ", "ψ")], 0),
    "cis at the end": (lambda: changed("ACE-A-NME", ("ALA2 C", "NME3 N")), [("φ", "ψ")], 1),
    "cis at the start": (lambda: changed("ACE-A-NME", ("ACE1 C", "ALA2 N")), [("φ", "ψ")], 1),
    "cis proline": (lambda: changed("ACE-AP-NME", ("ALA2 C", "PRO3 N")), [("φ", "ψ"), ("φ2", "ψ2")], 1),
    "cis proline with charged ends": (lambda: changed("AP", ("ALA1 C", "PRO2 N")), [("φ", "ψ")], 1),
    "two cis bonds": (
        lambda: changed("ACE-GG-NME", ("GLY2 C", "GLY3 N"), ("GLY3 C", "NME4 N")),
        [("φ", "ψ"), ("φ2", "ψ2")],
        2,
    ),
    "D-alanine": (lambda: Structure.of("ACE-A-NME").mirrored(), [("φ", "ψ")], 0),
    "D-isoleucine": (lambda: Structure.of("ACE-I-NME").mirrored(), [("φ", "ψ")], 0),
    "D-peptide": (lambda: Structure.of("AVK").mirrored(), [("φ", "ψ2")], 0),
    "amide cap": (amide_capped, [("φ", "ψ")], 0),
    "amide cap, glycine": (lambda: amide_capped("G"), [("φ", "ψ")], 0),
    "amide cap, serine": (lambda: amide_capped("S"), [("φ", "ψ")], 0),
    "caps alone": (lambda: Structure.of("ACE-NME"), [("omega1",)], 0),
    "caps alone, cis": (lambda: changed("ACE-NME", ("ACE1 C", "NME2 N")), [("omega1",)], 1),
    "glycines": (lambda: Structure.of("GG"), [("φ", "ψ")], 0),
    "side-chain amides": (lambda: Structure.of("ACE-NQ-NME"), [("φ", "ψ"), ("φ2", "ψ2")], 0),
    "rings": (lambda: Structure.of("ACE-WHPF-NME"), [(f"φ{k}", f"ψ{k}") for k in ("", 2, 3, 4)], 0),
    "odd numbers": (lambda: numbered("ACE-A-NME", (-5, 0, 9999)), [("φ", "ψ")], 0),
    "one number for all": (lambda: numbered("ACE-AG-NME", (7, 7, 7, 7)), [("φ", "ψ"), ("φ2", "ψ2")], 0),
    "numbers that fall": (lambda: numbered("ACE-A-NME", (3, 2, 1)), [("φ", "ψ")], 0),
    "numbers of five figures": (lambda: numbered("ACE-A-NME", (10000, 10001, 10002)), [("φ", "ψ")], 0),
    "two chains": (lambda: Structure.of("AG").joined(Structure.of("GA")), [("φ", "ψ"), ("φ2", "ψ2")], 0),
    "two molecules of one kind": (
        lambda: Structure.of("ACE-NME").joined(Structure.of("ACE-NME")),
        [("omega1", "omega2")],
        0,
    ),
    "disulfide between chains": (disulfide, [("φ", "ψ"), ("φ2", "ψ2")], 0),
    "a centre at every residue": (lambda: Structure.of("LIVTP"), None, 0),
}


@pytest.mark.parametrize("case", MOLECULES)
def test_molecules(case, tmp_path):
    made, symbols, n_cis = MOLECULES[case]
    structure = made()
    system = load_system(
        "aldp",
        name="made",
        structure=structure.write(tmp_path / "made.pdb"),
        forcefield=AMBER,
        state=None,
        compile=False,
    )
    assert sorted(map(sorted, system.bonds)) == sorted(sorted((a.index, b.index)) for a, b in structure.topology.bonds)
    views = views_of(system)
    assert symbols is None or [view.symbols for view in views] == symbols
    x = system.positions[None]
    assert (system.chirality(x) == 1).all()
    assert int(sum(float(system.dihedral(x, name).cos()) > 0 for name in system.omegas)) == n_cis
    # the structure itself, and whatever its torsions do, is the molecule: nothing is left out
    rough = random_conformers(system.positions, system.bonds, 20, torch.Generator().manual_seed(0)).numpy()
    for conformers in (x.numpy(), rough):
        assert allowed_conformers(excluded_conformers(system, conformers), len(conformers)).all()
    if system.stereocentres:
        assert not allowed_conformers(excluded_conformers(system, -x.numpy()), 1).any()
    assert np.isfinite(system.energy(x.numpy())).all()
    for view in views:
        points = view.points(rough)
        assert points.shape == (20, len(view.symbols))
        view.draw({"MD": (points, None), "flow": (points, np.zeros(20))})
    (tmp_path / "data.pdb").write_text(system_pdb(system), encoding="utf-8")
    again = load_system(
        "aldp", name="made", structure=str(tmp_path / "data.pdb"), forcefield=AMBER, state=None, compile=False
    )
    assert again.topology == system.topology
    assert sorted(map(sorted, again.bonds)) == sorted(map(sorted, system.bonds))
    assert abs(float(again.energy(x)) - float(system.energy(x))) < 1e-3


@pytest.mark.parametrize("files", [[name] for name in AMBERS], ids=str)
def test_force_fields_give_the_same_energy_by_both_backends(files):
    energies = []
    for backend in ("torch", "openmm"):
        system = load_system("aldp", forcefield=files, energy_backend=backend, n_workers=1)
        energies.append(float(system.energy(system.positions[None].double())))
    assert abs(energies[0] - energies[1]) < 1e-3


@pytest.mark.parametrize("sequence", ["AP", "GG", "KDEHRC", "PP", "MT", "WYFN", "SV", "LQI"])
@pytest.mark.parametrize("name", CHARMM)
def test_charmm_types_peptides_with_ends(name, sequence):
    settings = {"forcefield": [name], "nonbonded_method": "NoCutoff", "cutoff_nm": None}
    try:
        topology = load_system(sequence, energy_backend="openmm").openmm_topology()
        app.ForceField(name).createSystem(topology, nonbondedMethod=app.NoCutoff)
    except ValueError as error:
        with pytest.raises(UserError, match=r"does not fit|no template"):
            load_system(sequence, energy_backend="openmm", **settings)
        pytest.skip(f"OpenMM cannot: {str(error)[:80]}")
    system = load_system(sequence, energy_backend="openmm", n_workers=1, **settings)
    assert np.isfinite(float(system.energy(system.positions[None])))
    with pytest.raises(UserError, match=r"energy_backend=openmm"):
        load_system(sequence, **settings)


@pytest.mark.parametrize("case", ["caps alone", "caps alone, cis", "cis at the end", "amide cap", "D-alanine"])
def test_runs_end_with_a_report(case, tmp_path):
    """From the energy alone, no data, tiny: the report has the views that the molecule has."""
    path = MOLECULES[case][0]().write(tmp_path / "made.pdb")
    tiny = [
        "hot.fit.steps=3",
        "hot.batch_size=32",
        "annealing.fit.steps=3",
        "annealing.n_steps=1",
        "annealing.n_draws=200",
    ]
    tiny += ["evaluation.n_samples=400", "evaluation.n_ladder=50", "evaluation.n_bootstrap=20", "evaluation.n_torus=50"]
    system = ["system=aldp", "system.name=made", f"system.structure={path}", "system.state=null"]
    system += ["system.forcefield=[amber14-all.xml,implicit/obc1.xml]"]
    run = train_run(
        tmp_path / "run", *system, "method=tabg", "budget=smoke", "threads=1", f"data_dir={tmp_path}", *tiny
    )
    text = (run.path / "report.md").read_text(encoding="utf-8")
    assert "structure's own isomer" in text
    figures = {figure.stem for figure in (run.path / "figures").glob("*.png")}
    assert ("torsions" if "caps" in case else "ramachandran") in figures


@pytest.mark.parametrize("method", ["tbg", "boltznce", "tabg", "density", "forward_kl", "fab"])
def test_every_method_trains_in_a_session_in_double_precision(method, tmp_path):
    torch.set_default_dtype(torch.float64)
    try:
        small = ["system=gaussians8", "budget=smoke", "threads=1", f"method={method}", f"data_dir={tmp_path}"]
        few = {
            "tbg": ["flow.fit.steps=3", "evaluation.n_samples=64"],
            "boltznce": ["flow.fit.steps=3", "ebm.fit.steps=3", "samples.n_train=128", "evaluation.n_samples=64"],
            "tabg": ["hot.fit.steps=3", "annealing.fit.steps=3", "evaluation.n_samples=64"],
            "density": ["ebm.fit.steps=3"],
            "forward_kl": ["flow.fit.steps=3", "evaluation.n_samples=64"],
            "fab": ["fab.fit.steps=3", "evaluation.n_samples=64"],
        }[method]
        run = train_run(tmp_path / "run", *small, *few)
        if method != "density":
            assert np.isfinite(run.sample(16).positions).all()
    finally:
        torch.set_default_dtype(torch.float32)
