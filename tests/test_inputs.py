"""Molecules that are not one capped L-alanine: other isomers, other torsions, other names, other files."""

import copy

import mdtraj
import numpy as np
import openmm
import pytest
import torch
from inputs import AMBER, Structure, amide_capped, atoms_of, bonds_in, formyl_capped
from omegaconf import OmegaConf
from openmm import app

from boltznce import UserError, WeightedSamples, load_system
from boltznce.analysis.samples_io import read_samples
from boltznce.config import compose
from boltznce.data.dataset import Dataset, mode_balanced_indices
from boltznce.methods import ladder, sections
from boltznce.methods.findings import Data, Findings
from boltznce.methods.models import make
from boltznce.methods.spline_models import make_coordinates, make_spline_flow
from boltznce.methods.stages import _check_isomers
from boltznce.methods.views import views_of
from boltznce.states import State
from boltznce.systems.isomers import TURNED, allowed_conformers, excluded_conformers, require_some_left
from boltznce.systems.openmm_checks import not_canonical
from boltznce.systems.peptides import build_peptide
from boltznce.systems.torsions import backbone_dihedrals, turning_dihedrals
from boltznce.topologies import from_json, pdb_text, system_pdb, to_json


@pytest.fixture
def load(tmp_path):
    def made(structure, **settings):
        settings = {"forcefield": AMBER, "state": None, "compile": False} | settings
        return load_system("aldp", name="made", structure=structure.write(tmp_path / "made.pdb"), **settings)

    return made


# ---- the structure's own isomer --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_figures_are_conditional_on_the_structures_own_isomer(load):
    cis = Structure.of("ACE-AP-NME").turned("ALA2 C", "PRO3 N", np.pi)
    system = load(cis)
    assert [round(float(system.dihedral(system.positions[None], name).cos())) for name in system.omegas] == [-1, 1, -1]
    own = torch.cat([system.positions[None], torch.tensor(cis.positions[None]).float()])
    turned = torch.tensor(cis.turned("ALA2 C", "PRO3 N", np.pi).positions[None]).float()
    masks = excluded_conformers(system, torch.cat([own, turned, -own]).numpy())
    assert masks[TURNED].tolist() == [False, False, True, False, False]
    assert masks["inverted stereocentre"].tolist() == [False, False, False, True, True]
    assert system.isomers(turned.numpy()).tolist() == [[1.0, -1.0, 1.0]]
    d_alanine = load(Structure.of("ACE-A-NME").mirrored())
    assert allowed_conformers(excluded_conformers(d_alanine, d_alanine.positions[None].numpy()), 1).all()


def test_where_nothing_is_left_it_is_told_before_training(load, tmp_path, caplog):
    system, cis = load(Structure.of("ACE-A-NME")), Structure.of("ACE-A-NME").turned("ALA2 C", "NME3 N", np.pi)
    both = np.stack([Structure.of("ACE-A-NME").positions, *3 * [cis.positions]]).astype(np.float32)
    data = Dataset.write(tmp_path / "data", both, np.zeros(4), time=np.arange(4.0))
    _check_isomers(system, data, "data")
    assert "Only 25% of the data of made" in caplog.text
    with pytest.raises(UserError, match=r"All 3 frames of the data .*peptide bond turned.*data\.folder"):
        _check_isomers(system, data.take(slice(1, None)), "data")
    nothing = {TURNED: np.array([True, False])}
    assert require_some_left(system, nothing, 2, "samples", "wait", np.array([3.0, 1.0])) == 0.25
    with pytest.raises(UserError, match=r"All 2 samples of made"):
        require_some_left(system, {TURNED: np.ones(2, bool)}, 2, "samples", "train longer")


# ---- torsions --------------------------------------------------------------------------------------------------------

ETHANEDIOL = atoms_of(*"COCOHHHHHH", bonds=[(0, 1), (0, 2), (2, 3), (0, 4), (0, 5), (2, 6), (2, 7), (1, 8), (3, 9)])
BUTANE = atoms_of(
    *"CCCC",
    *"H" * 10,
    bonds=[(0, 1), (1, 2), (2, 3), *zip([0] * 3 + [1] * 2 + [2] * 2 + [3] * 3, range(4, 14), strict=True)],
)
BUTANENITRILE = atoms_of(
    *"CCCCN",
    *"H" * 7,
    bonds=[(0, 1), (1, 2), (2, 3), (3, 4), *zip([0] * 3 + [1] * 2 + [2] * 2, range(5, 12), strict=True)],
)


def test_torsions_are_found_by_bonds_and_elements():
    plain = Structure.of("ACE-NPQ-NME")
    named = backbone_dihedrals(plain.topology)
    assert list(named) == [f"{a}{b}" for a in ("phi", "psi") for b in ("", 2, 3)] + [f"omega{k}" for k in (1, 2, 3, 4)]
    assert backbone_dihedrals(plain.renamed(residues="LIG", atoms=True).topology) == named
    cut = [k for k, atom in enumerate(plain.topology.atoms) if atom.residue.index > 0]
    assert "phi" in backbone_dihedrals(plain.topology.subset(cut))
    alanine = backbone_dihedrals(Structure.of("ACE-A-NME").topology)
    for capped, omegas in ((amide_capped(), ["omega1"]), (formyl_capped(), ["omega1", "omega2"])):
        found = backbone_dihedrals(capped.topology)
        assert list(found) == ["phi", "psi", *omegas]
        names = [str(capped.topology.atom(k)).partition("-")[2] for k in (*found["phi"], *found["psi"])]
        assert names == ["C", "N", "CA", "C", "N", "CA", "C", "N"]
    assert alanine == {"phi": (4, 6, 8, 14), "psi": (6, 8, 14, 16), "omega1": (0, 4, 6, 8), "omega2": (8, 14, 16, 18)}
    assert turning_dihedrals(ETHANEDIOL) == {"tors1": (2, 0, 1, 8), "tors2": (1, 0, 2, 3), "tors3": (0, 2, 3, 9)}
    assert turning_dihedrals(BUTANE) == {"tors1": (0, 1, 2, 3)}
    assert turning_dihedrals(Structure.of("ACE-NME").topology) == {}
    assert turning_dihedrals(BUTANENITRILE) == {"tors1": (0, 1, 2, 3)}  # not to where C-C≡N is a line


def findings(system, views=None):
    """Jittered minima as draws, with weights, and as data."""
    rng = np.random.default_rng(0)
    x = (system.positions.numpy() + 0.004 * rng.normal(size=(60, system.n_atoms, 3))).astype(np.float32)
    u = system.energy(x).astype(np.float64)
    drawn = WeightedSamples(
        x[:30], u[:30], rng.normal(size=30) - u[:30], meta={"likelihood": "exact", "counts": {"drawn": 30}}
    )
    zeros, order = np.zeros(30), np.arange(30)
    data = Dataset(x[30:], u[30:], zeros, order.astype(float), zeros.astype(int), order % 2, None, {"cpu_seconds": 1.0})
    settings = OmegaConf.create({"n_bootstrap": 20, "n_torus": 30, "tica_lag": None})
    masks = excluded_conformers(system, x[30:])
    of_data = Data(data, data, data, masks, zeros)
    parts = (of_data, {}, None, {"draw": 1e-3}, settings, 0)
    found = Findings(system, views_of(system), drawn, excluded_conformers(system, x[:30]), drawn, *parts)
    return copy.copy(found) if views is None else found


@pytest.mark.slow
@pytest.mark.parametrize("n_torsions", [0, 1, 2])
def test_reports_are_made_of_the_torsions_that_there_are(load, n_torsions):
    """N-methylacetamide with none, its ω, and two torsions of the user's."""
    mine = {"first": [1, 0, 4, 6], "second": [4, 6, 8, 9]} if n_torsions == 2 else {}
    system = load(Structure.of("ACE-NME"), dihedrals=mine)
    assert list(system.dihedrals) == ["omega1", *mine]
    if n_torsions == 0:
        system.dihedrals, system.omegas = {}, []
    found = findings(system)
    assert [len(view.symbols) for view in found.views] == ([n_torsions] if n_torsions else [])
    figures, distances = {}, {}
    for section in (*sections.COMMON, sections.slowest_coordinates, ladder.marginals, ladder.torsion_divergences):
        part = section(found)
        figures |= part.figures
        distances |= part.results.get("distances", {})
    assert {"weights", "energy_histograms"} <= set(figures)
    assert ("torsions" in figures, "marginals" in figures) == (n_torsions > 0, n_torsions == 2)
    assert "E-W2 (kT)" in distances
    assert ("T-W2 (rad)" in distances) == (n_torsions > 0)
    if n_torsions:
        assert 0 < distances["T-W2 (rad)"]["unweighted"].mean < 0.5
    assert make_coordinates(system, OmegaConf.create({"coordinates": {}})).dimension == 30
    assert sections.slow_features(system, np.array(system.positions[None])).shape == (1, 2 * len(system.dihedrals) + 10)


def test_a_residue_is_seen_by_its_own_torsions():
    views = views_of(load_system("AAA", energy_backend="openmm"))
    assert [view.symbols for view in views] == [("φ", "ψ2")]  # of the only residue that has both
    assert [view.symbols for view in views_of(load_system("AK", energy_backend="openmm"))] == [("φ", "ψ")]


@pytest.mark.parametrize("interval", [(0.0, 2.0), (2.5, 4.0), (3.3, 4.5), (-3.8, -2.6), (1.0, 1.3), (-2.5, 2.0)])
def test_balancing_makes_any_state_frequent(interval):
    rng, state = np.random.default_rng(0), State.of(("phi", interval))
    angle = rng.uniform(-np.pi, np.pi, 40_000)
    rare = ~state.contains(angle) if state.width > np.pi else state.contains(angle)
    log_weights = np.where(rare, np.log(0.05), 0.0)
    index = mode_balanced_indices(angle, log_weights, 20_000, rng, state, c="auto")
    assert 0.3 < rare[index].mean() < 0.8
    if interval == (0.0, 2.0):  # of the papers
        again = mode_balanced_indices(angle, log_weights, 500, np.random.default_rng(1), state, "auto", 10.0, 1.0)
        same = mode_balanced_indices(angle, log_weights, 500, np.random.default_rng(1), state, "auto")
        assert np.array_equal(again, same)


# ---- force fields ----------------------------------------------------------------------------------------------------


def test_what_openmm_types_by_patches_is_not_refused(monkeypatch):
    """As the ends of charmm36's peptides, see test_input_table.py: these have no template, but a patch of one."""
    monkeypatch.setattr(app.ForceField, "getUnmatchedResidues", lambda self, topology: list(topology.residues()))
    assert load_system("aldp").n_atoms == 22


@pytest.mark.parametrize("backend", ["torch", "openmm"])
def test_what_has_no_energy_has_plus_infinity(backend):
    system = load_system("aldp", energy_backend=backend, n_workers=1)
    x = system.positions.double().repeat(5, 1, 1)
    x[1, 3] = torch.nan
    x[2, 7] = torch.inf
    x[3, 20] = x[3, 0]
    x.requires_grad_()
    u = system.energy(x)
    (gradient,) = torch.autograd.grad(u[[0, 4]].sum() + u[1:3].sum(), x)
    assert torch.isposinf(u[1:3]).all()
    assert (u[3] > 1e12) | torch.isposinf(u[3])  # no weight either way
    assert u[[0, 4]].isfinite().all()
    assert gradient.isfinite().all()
    assert (gradient[1:3] == 0).all()
    assert torch.equal(u.isnan(), torch.zeros(5, dtype=torch.bool))
    assert np.isposinf(system.energy(x.detach()[1:2].float())).all()


def with_force(force):
    system = openmm.System()
    for _ in range(3):
        system.addParticle(1.0)
    if force is not None:
        system.addForce(force)
    return system


def test_what_is_no_canonical_ensemble_of_atoms_is_named():
    assert not_canonical(with_force(openmm.CMAPTorsionForce())) is None
    assert not_canonical(with_force(openmm.MonteCarloBarostat(1.0, 300.0))) == "MonteCarloBarostat"
    assert not_canonical(with_force(openmm.AndersenThermostat(300.0, 1.0))) == "AndersenThermostat"
    assert not_canonical(with_force(openmm.DrudeForce())) == "DrudeForce"
    system = with_force(None)
    system.setVirtualSite(2, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5))
    assert not_canonical(system) == "virtual sites"
    system = with_force(None)
    system.addConstraint(0, 1, 0.1)
    assert not_canonical(system) == "constraints"
    system = with_force(None)
    system.setParticleMass(0, 0.0)
    assert not_canonical(system) == "particles without mass"


def test_virtual_sites_are_refused_under_openmm_too(tmp_path):
    site = tmp_path / "site.xml"
    site.write_text("""<ForceField><Script>
import openmm
sys.setParticleMass(21, 0.0)
sys.setVirtualSite(21, openmm.TwoParticleAverageSite(18, 19, 0.5, 0.5))
</Script></ForceField>""")
    with pytest.raises(UserError, match=r"virtual sites.*choose one without"):
        load_system("aldp", forcefield=["amber99sbildn.xml", str(site)], energy_backend="openmm")


# ---- tensors and arrays ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["aldp", "gaussians8"])
def test_energies_of_arrays_and_lists(name):
    system = load_system(name)
    x = system.positions.double().repeat(2, 1, 1)
    u = system.energy(x)
    for given, dtype in ((x.numpy(), np.float64), (x.float().numpy(), np.float32), (x.tolist(), np.float64)):
        found = system.energy(given)
        assert isinstance(found, np.ndarray)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, u.numpy(), rtol=1e-4)
    frozen = x.numpy().copy()
    frozen.setflags(write=False)
    assert np.array_equal(system.energy(frozen), u.numpy())
    assert system.energy(np.zeros((1, system.n_atoms, system.dim), dtype=int)).dtype == np.float64
    for wrong in (x[0].tolist(), [[1.0], [2.0, 3.0]], "text", None, x.numpy()[0]):
        with pytest.raises(UserError, match=f"{system.n_atoms}, {system.dim}"):
            system.energy(wrong)
    if name == "aldp":
        assert system.dihedral(x.tolist(), "phi").shape == (2,)


def test_a_first_call_without_gradients_spoils_nothing_later():
    with torch.inference_mode():
        system = load_system("AG", compile=False)
        assert np.isfinite(float(system.energy(system.positions[None])))
    x = system.positions[None].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(system.energy(x).sum(), x, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), x)[0].isfinite().all()


@pytest.fixture
def double_session():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_a_session_in_double_precision_changes_nothing(double_session):
    """Whole runs of every method: test_input_table.py."""
    system = load_system("AG", compile=False)
    assert system.energy(system.positions[None]).dtype == torch.float32
    plane, generator = load_system("gaussians8"), torch.Generator().manual_seed(0)
    x = plane.sample(32, generator)
    for name in ("flow", "ebm"):
        model = make(compose("train", ["system=gaussians8", "budget=smoke"]), plane, name)
        model.calibrate(plane, x, generator)
        loss = model.of(plane).loss(x, generator)
        (loss["loss"] if name == "ebm" else loss).backward()
    spline = make_spline_flow(compose("train", ["system=gaussians8", "budget=smoke", "method=tabg"]), plane)
    x_drawn, _ = spline.sample(4, generator)
    assert x_drawn.dtype == torch.float32
    spline.log_prob(x).sum().backward()
    assert torch.get_default_dtype() == torch.float64


# ---- topologies on disk ----------------------------------------------------------------------------------------------


def odd_topology():
    """Two chains of one name, two residues with one number, a name of five letters, bonds that no name implies."""
    topology = mdtraj.Topology()
    for _ in range(2):
        chain = topology.add_chain(chain_id="X")
        for number, name in ((7, "ALA"), (7, "LIGND"), (7, "ALA"), (-3, "GLY")):
            residue = topology.add_residue(name, chain, number, "seg")
            for atom in ("N", "CA", "C"):
                topology.add_atom(atom, mdtraj.element.get_by_symbol(atom[0]), residue)
    atoms = list(topology.atoms)
    for a, b in ((0, 1), (1, 2), (2, 3), (3, 5), (0, 11), (11, 10), (10, 9), (12, 23), (5, 4), (4, 3), (6, 7), (7, 8)):
        topology.add_bond(atoms[a], atoms[b])
    return topology


def test_topologies_of_samples_read_back_as_they_were(tmp_path):
    topology = odd_topology()
    x = np.random.default_rng(0).normal(size=(3, topology.n_atoms, 3)).astype(np.float32)
    WeightedSamples(x, np.zeros(3), np.zeros(3), topology=topology).save(tmp_path / "out")
    for found in (read_samples(tmp_path / "out")["topology"], from_json(to_json(topology))):
        assert found == topology
        described = [
            [(r.name, r.resSeq, r.segment_id, r.chain.chain_id) for r in t.residues] for t in (found, topology)
        ]
        assert described[0] == described[1]
    (tmp_path / "out" / "topology.json").unlink()
    with pytest.raises(UserError, match=r"topology\.json is missing"):
        read_samples(tmp_path / "out")


def test_pdb_files_keep_bonds_and_residues_apart(tmp_path):
    text = pdb_text(odd_topology(), np.random.default_rng(0).normal(size=(24, 3)))
    bonds, sizes = bonds_in(text)
    assert sizes == 8 * [3]
    assert {frozenset(pair) for pair in ((0, 11), (12, 23), (9, 10), (3, 5))} <= bonds
    for sequence in ("KW", "ACE-PHC-NME"):
        system = load_system(sequence, energy_backend="openmm")
        assert bonds_in(system_pdb(system)) == (
            {frozenset(pair) for pair in system.bonds},
            [residue.n_atoms for residue in system.topology.residues],
        )


def test_insertion_codes_and_links_reach_the_dataset(load):
    made = Structure.of("ACE-AA-NME")
    for residue, number in zip(made.topology.residues, (51, 52, 52, 53), strict=True):
        residue.resSeq = number
    system = load(made)
    ids = [(residue.id, residue.insertionCode.strip()) for residue in system.openmm_topology().residues()]
    assert ids == [("51", ""), ("52", ""), ("52", "A"), ("53", "")]
    assert [line[22:27] for line in system_pdb(system).splitlines() if line[12:17] == " O   "] == [
        "  51 ",
        "  52 ",
        "  52A",
    ]


def test_files_that_would_be_read_as_another_molecule_are_refused(tmp_path):
    plain = Structure.of("ACE-AA-NME")
    same = tmp_path / "same.pdb"
    same.write_text(plain.text().replace("ALA A   3", "ALA A   2").replace("ALA 1   3", "ALA 1   2"))
    with pytest.raises(UserError, match=r"same\.pdb has 32 atoms, of which 22"):
        load_system("aldp", structure=str(same))
    apart = Structure.of("ACE-A-NME")
    apart.positions[16:] += 2.0
    with pytest.raises(UserError, match=r"bond of 3\.\d+ nm between ALA 2 C and NME 3 N.*TER"):
        load_system("aldp", structure=apart.write(tmp_path / "apart.pdb"))


# ---- sequences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sequence", "residues"),
    [("ACE-NME", ["ACE", "NME"]), ("NAN", ["ASN", "ALA", "ASN"]), ("ACE-G-NME", ["ACE", "GLY", "NME"])],
)
def test_sequences_that_are_what_they_say(sequence, residues):
    system = load_system(sequence, energy_backend="openmm")
    assert [residue.name for residue in system.topology.residues] == residues
    if sequence == "ACE-NME":
        assert (system.n_atoms, system.state, list(system.dihedrals)) == (12, None, ["omega1"])


@pytest.mark.parametrize(
    "sequence", ["ACE-A", "A-NME", "A", "ak", "ACE-", "-NME", "", "ACE--NME", "AXB", "ACE-A-A-NME", "Ak"]
)
def test_what_is_no_sequence_is_told_in_a_sentence(sequence):
    with pytest.raises(UserError, match="Unknown system"):
        load_system(sequence)


def test_three_letters_are_three_residues_and_it_is_said(caplog):
    topology, _ = build_peptide("ACE-ALA-NME")
    assert [residue.name for residue in topology.residues()] == ["ACE", "ALA", "LEU", "ALA", "NME"]
    assert "read as Ala-Leu-Ala" in caplog.text
    assert "is ACE-A-NME" in caplog.text
