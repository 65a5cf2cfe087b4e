"""Coordinates and states of the user's own: by mdtraj, by known answers in the plane, and wrong ones."""

import json
import math
import sys
from types import ModuleType

import mdtraj
import numpy as np
import pytest
import torch
import yaml

import boltznce as bz
from boltznce import settings
from boltznce.analysis.free_energy import free_energy_difference
from boltznce.config import compose
from boltznce.data.dataset import mode_balanced_indices
from boltznce.data.jobs import biases_of
from boltznce.errors import UserError
from boltznce.methods.free_energy import write_free_energy
from boltznce.methods.preflight import preflight
from boltznce.states import State, between
from boltznce.trust import register

CHAIN = "ACE-RFIM-NME"


@pytest.fixture(scope="module")
def peptide():
    return bz.load_system(CHAIN)


@pytest.fixture(scope="module")
def x(peptide):
    rng = np.random.default_rng(0)
    return (peptide.positions.numpy() + rng.normal(0, 0.04, (50, peptide.n_atoms, 3))).astype(np.float32)


@pytest.fixture(scope="module")
def drawn():
    """Exact draws of eight Gaussians, seven of which weigh as one, and their weights."""
    system = bz.load_system("gaussians8_unequal")
    flow = bz.load_system("gaussians8")
    x = flow.sample(20_000, torch.Generator().manual_seed(0))
    log_q = flow.log_prob(x).numpy()
    return system, bz.WeightedSamples(x.numpy(), system.energy(x).double().numpy(), log_q, meta={"likelihood": "exact"})


# ---- against mdtraj -------------------------------------------------------------------------------------------------


def test_geometry_is_mdtrajs(peptide, x):
    frames = mdtraj.Trajectory(x, peptide.topology)
    for kind, atoms, compute in (
        ("distance", [3, 40], mdtraj.compute_distances),
        ("angle", [3, 9, 40], mdtraj.compute_angles),
        ("dihedral", [3, 9, 12, 40], mdtraj.compute_dihedrals),
    ):
        values = peptide.coordinate(x, {kind: atoms})
        np.testing.assert_allclose(values, compute(frames, [atoms], periodic=False)[:, 0], atol=2e-4)
        assert peptide.coordinate(torch.from_numpy(x), {kind: atoms}).numpy() == pytest.approx(values, abs=1e-6)
        named = [[peptide.topology.atom(k).residue.resSeq, peptide.topology.atom(k).name] for k in atoms]
        np.testing.assert_array_equal(peptide.coordinate(x, {kind: named}), values)


@pytest.mark.parametrize("name", ["phi", "psi", "omega", "chi1", "chi2", "chi3", "chi4", "chi5"])
def test_torsions_of_residues_are_mdtrajs(name, peptide, x):
    """By the numbers of their residues, ω by that before its bond; mdtraj leaves out the ω of caps."""
    quadruples, angles = getattr(mdtraj, f"compute_{name}")(mdtraj.Trajectory(x, peptide.topology), periodic=False)
    assert len(quadruples) == {"phi": 4, "psi": 4, "omega": 3, "chi1": 4, "chi2": 4, "chi3": 2}.get(name, 1)
    for atoms, values in zip(quadruples, angles.T, strict=True):
        number = peptide.topology.atom(atoms[1]).residue.resSeq
        ours = peptide.coordinate_of(f"{name}_{number}")
        assert ours.atoms == tuple(atoms)
        assert ours.periodic
        np.testing.assert_allclose(ours(x), values, atol=1e-4)
        np.testing.assert_array_equal(peptide.dihedral(x, f"{name}_{number}"), ours(x))
    if name.startswith("chi"):
        assert peptide.coordinate_of(name).atoms == tuple(quadruples[0])
        with pytest.raises(UserError, match="chi1_2"):
            peptide.coordinate_of(f"{name}_1")  # a cap


def test_every_residue_has_the_side_chain_torsions_of_mdtraj():
    for sequence in ("ARNDC", "EQGHI", "LKMFP", "STWYV"):
        system = bz.load_system(f"ACE-{sequence}-NME")
        frames = mdtraj.Trajectory(system.positions[None].numpy(), system.topology)
        for k in range(1, 6):
            theirs = {tuple(atoms) for atoms in getattr(mdtraj, f"compute_chi{k}")(frames)[0]}
            numbers = range(2, 2 + len(sequence))
            ours = {system._of_residues.get(f"chi{k}_{number}") for number in numbers} - {None}
            assert ours == theirs, (sequence, k)


def test_they_stay_where_a_molecule_moves_and_turns(peptide, x):
    rng = np.random.default_rng(1)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    turned = x.astype(np.float64) @ (rotation * np.linalg.det(rotation)) + rng.normal(size=3)
    for given, mirrored in (
        ({"distance": [0, 9]}, 1),
        ({"angle": [0, 9, 5]}, 1),
        ("chi1_2", -1),
        ({"linear": [[1, "phi"], [-1, "psi"]]}, -1),
    ):
        values = peptide.coordinate(x.astype(np.float64), given)
        np.testing.assert_allclose(peptide.coordinate(turned, given), values, atol=1e-9)
        np.testing.assert_allclose(peptide.coordinate(-x, given), mirrored * values, atol=1e-4)


def test_sums_of_angles_go_round_the_circle(peptide, x):
    both = peptide.coordinate_of({"linear": [[2, "phi"], [-1, "psi"]]})
    assert (both.periodic, both.unit, both.name) == (True, "rad", "2 φ − ψ")
    expected = 2 * peptide.dihedral(x, "phi") - peptide.dihedral(x, "psi")
    np.testing.assert_allclose(np.exp(1j * both(x)), np.exp(1j * expected), atol=1e-5)
    assert (np.abs(both(x)) <= np.pi + 1e-6).all()
    line = peptide.coordinate_of({"linear": [[0.5, {"distance": [0, 9]}], [2.0, {"distance": [1, 9]}]]})
    assert (line.periodic, line.unit) == (False, "nm")
    assert peptide.coordinate_of({"linear": [[1.0, {"distance": [0, 9]}], [2.0, {"angle": [1, 9, 3]}]]}).unit == ""


def test_functions_get_arrays_and_return_numbers(peptide, x):
    def extent(positions):
        assert isinstance(positions, np.ndarray)
        return np.ptp(positions[:, :, 0], axis=1)

    np.testing.assert_allclose(peptide.coordinate(x, extent), np.ptp(x[:, :, 0], axis=1))
    of_tensor = peptide.coordinate(torch.from_numpy(x), extent)
    assert isinstance(of_tensor, torch.Tensor)
    assert peptide.in_state(torch.from_numpy(x), lambda positions: positions[:, 0, 0] > 0).dtype == torch.bool
    turning = bz.Coordinate("mine", lambda positions: positions[:, 0, 0], "rad", periodic=True)
    assert peptide.coordinate_of(turning) is turning
    with pytest.raises(UserError, match="a number for each of 50"):
        peptide.coordinate(x, lambda positions: positions[0])


# ---- wrong ones -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("chi", "choose one of phi"),
        ({"distance": [0]}, "must be a coordinate"),
        ({"distance": [0, 0]}, "must be a coordinate"),
        ({"distance": [0, -1]}, "must be a coordinate"),
        ({"distance": [0, 1.5]}, "must be a coordinate"),
        ({"length": [0, 1]}, "must be a coordinate"),
        ({"distance": [0, 1], "angle": [0, 1, 2]}, "must be a coordinate"),
        ({"distance": [0, 1000]}, "no atom 1000"),
        ({"distance": [[2, "CA"], [2, "XX"]]}, "that residue has N"),
        ({"distance": [[2, "CA"], [70, "CA"]]}, r"its residues are 1 \(ACE\)"),
        ({"linear": []}, "must be a coordinate"),
        ({"linear": [["phi", 1]]}, "must be a coordinate"),
        ({"linear": [[0.5, "phi"], [1, "psi"]]}, "whole multiples"),
        ({"linear": [[1, "phi"], [1, {"distance": [0, 5]}]]}, "whole multiples"),
        ({"_target_": "nowhere.function"}, "cannot be imported"),
        ({"_target_": "boltznce.config.build"}, "function of your own"),
        ({"_target_": "mine.function", "colour": "red"}, "must be a coordinate"),
        (3, "must be a coordinate"),
    ],
)
def test_wrong_coordinates(given, message, peptide):
    with pytest.raises(UserError, match=message):
        peptide.coordinate_of(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["phi", [0, 115]], "degrees"),
        (["phi", [2, 0]], "low below high"),
        ([{"distance": [0, 5]}, [0.5, 0.2]], "low below high"),
        ([["phi", [0, 2]], ["chi", [0, 2]]], "no dihedral 'chi'"),
        ([["phi", [0, 2]], ["psi", [0, 115]]], "degrees"),
        ([], "must be a coordinate and its interval"),
        ("phi", "must be a coordinate and its interval"),
        ([["phi", "psi"], [0, 2]], "must be a coordinate and its interval"),
    ],
)
def test_wrong_states(given, message, peptide):
    with pytest.raises(UserError, match=message):
        peptide.state_of(given)


def test_points_in_the_plane_have_no_atoms():
    system = bz.load_system("gaussians8")
    with pytest.raises(UserError, match="has no atoms for a distance"):
        system.coordinate_of({"distance": [0, 1]})


# ---- states ---------------------------------------------------------------------------------------------------------


def test_states_of_every_kind(peptide, x):
    d, phi = peptide.coordinate(x, {"distance": [0, 9]}), peptide.dihedral(x, "phi")
    middle = float(np.median(d))
    side = [{"distance": [0, 9]}, [0.0, middle]]
    np.testing.assert_array_equal(peptide.in_state(x, side), d < middle)
    both = [side, ["phi", [-2.0, -1.2]]]
    inside = (d < middle) & (phi > -2.0) & (phi < -1.2)
    np.testing.assert_array_equal(peptide.in_state(x, both), inside)
    np.testing.assert_array_equal(peptide.in_state(x, State.of(both)), inside)
    np.testing.assert_array_equal(peptide.in_state(x, lambda positions: d < middle), d < middle)
    np.testing.assert_array_equal(peptide.in_state(x, lambda positions: 1.0 * (d < middle)), d < middle)
    words = peptide.state_in_words([[{"distance": [0, 9]}, [0.1, 0.5]], ["phi", [-2.0, -1.2]]])
    assert words == "0.1 < distance 0 9 < 0.5 nm and -2 < φ < -1.2 rad"
    assert State.of(State.of(both)).setting == [[side[0], [0.0, middle]], ["phi", [-2.0, -1.2]]]
    assert peptide.state_of(State.of(both).setting) == State.of(both)
    with pytest.raises(UserError, match="cannot be saved"):
        _ = State.of(lambda positions: d < middle).setting


BOXES = (
    [["x", [0.5, 1.5]], ["y", [-0.4, 0.35]]],
    [["x", [-0.4, 0.4]], ["y", [-1.5, -0.5]]],
    [{"linear": [[0.3, "x"], [1.0, "y"]]}, [-0.5, 0.6]],
    ["x", [-0.9, 0.9]],
    lambda x: np.linalg.norm(x[:, 0] - [1.0, 0.0], axis=-1),
)


def exact(system, state, versus=None):
    """ΔF by sums over the cells of a fine grid."""
    cells = system.grid(1000)
    p = np.exp(-system.energy(cells).double().numpy())
    inside = system.in_state(cells, state).numpy()
    other = ~inside if versus is None else system.in_state(cells, versus).numpy()
    return float(np.log(p[other].sum() / p[inside].sum()))


@pytest.mark.parametrize("state", BOXES)
def test_free_energies_of_any_state_are_the_exact_ones(state, drawn):
    system, samples = drawn
    known = exact(system, state)
    found = free_energy_difference(system.in_state(samples.positions, state), samples.log_weights, n_bootstrap=200)
    assert found.value == pytest.approx(known, abs=4 * found.std_error)
    assert 0 < found.std_error < 0.1
    system.state, own = system.state_of(state), system.state
    try:
        assert system.reference()["delta_f"]["value"] == pytest.approx(known, abs=0.02)
    finally:
        system.state = own


def test_two_states_against_each_other_cover_the_exact_difference(drawn):
    """A 95% interval, over draws; the error is that of both populations, whatever lies elsewhere."""
    system, samples = drawn
    known, hits = exact(system, *BOXES[:2]), 0
    inside, other = (system.in_state(samples.positions, box) for box in BOXES[:2])
    for k in range(40):
        part = slice(500 * k, 500 * (k + 1))
        found = free_energy_difference(inside[part], samples.log_weights[part], n_bootstrap=200, versus=other[part])
        hits += found.interval[0] < known < found.interval[1]
    assert hits >= 34
    kept = between(inside, other)
    whole = free_energy_difference(inside, samples.log_weights, versus=other)
    weights = samples.weights
    errors = [np.square(weights[side]).sum() / weights[side].sum() ** 2 for side in (inside, other)]
    assert whole.std_error == pytest.approx(np.sqrt(sum(errors)), rel=0.1)
    assert whole.n_state + whole.n_rest == len(kept)
    with pytest.raises(UserError, match="in both states"):
        free_energy_difference(inside, samples.log_weights, versus=inside)
    angle = np.linspace(-3, 3, 601)
    assert free_energy_difference(angle, versus=(-2.0, 0.0)).value == pytest.approx(0, abs=0.02)


def test_rare_states_of_any_kind_are_made_frequent():
    rng = np.random.default_rng(0)
    inside = rng.random(5000) < 0.05
    state = State.of([["phi", [0, 1]], ["psi", [0, 1]]])
    index = mode_balanced_indices(inside, np.zeros(5000), 5000, rng, state, c="auto")
    assert 0.45 < inside[index].mean() < 0.56
    index = mode_balanced_indices(~inside, np.zeros(5000), 5000, rng, state, c="auto")
    assert 0.45 < inside[index].mean() < 0.56


def test_simulations_are_biased_along_the_state(peptide):
    """Its dihedrals, where no φ and ψ is; else every φ with the ψ beside it."""
    pairs = [["phi", "psi2"], ["phi2", "psi3"], ["phi3", "psi4"], ["phi4", "psi5"]]
    usual = biases_of(bz.load_system(CHAIN))
    assert [first for first, _ in usual] == [first for first, _ in pairs]
    assert biases_of(bz.load_system(CHAIN, state=["chi1_2", [0, 2]])) == [["chi1_2"]]
    assert biases_of(bz.load_system(CHAIN, state=[["chi1_2", [0, 2]], ["chi2_2", [0, 2]]])) == [["chi1_2", "chi2_2"]]
    assert biases_of(bz.load_system(CHAIN, state=[["phi", [0, 2]], ["phi2", [0, 2]]])) == usual
    assert biases_of(bz.load_system(CHAIN, state=[{"distance": [0, 9]}, [0, 2]])) == usual


# ---- the command ----------------------------------------------------------------------------------------------------


def test_profiles_and_surfaces_of_saved_samples(drawn, tmp_path):
    system, samples = drawn
    samples.save(tmp_path / "samples")
    options = {"n_bins": 40, "n_bootstrap": 50}

    def write(name, **given):
        table = write_free_energy(system, tmp_path / "samples", tmp_path / name, **given, **options)
        results = json.loads((tmp_path / name / "metrics.json").read_text())
        return table, results, json.loads((tmp_path / name / "profile.json").read_text())

    _, results, profile = write("own")
    assert {"exact weights", "unweighted", "reference"} == set(results["free_energy"])
    assert len(profile["centres"]) == 40
    table, results, profile = write("boxes", coordinate=["x", "y"], state=[[0.5, 1.5], [-0.4, 0.35]], versus=BOXES[1])
    row = results["free_energy"]["exact weights"]
    assert row["value"] == pytest.approx(exact(system, *BOXES[:2]), abs=4 * row["std_error"])
    assert results["state"] == "0.5 < x < 1.5 and -0.4 < y < 0.35 against -0.4 < x < 0.4 and -1.5 < y < -0.5"
    assert "gaussians8_unequal" in table
    f = np.array(profile["free_energy"], dtype=float)
    assert f.shape == (20, 20)
    p = np.exp(-np.nan_to_num(f, nan=np.inf))
    x, y = (np.array(each) for each in profile["centres"])
    assert ((p * x[:, None]).sum() / p.sum(), (p * y).sum() / p.sum()) == pytest.approx(
        np.average(samples.positions[:, 0], axis=0, weights=samples.weights), abs=0.02
    )
    assert (tmp_path / "boxes" / "figures" / "surface.png").exists()
    _, results, _ = write("sum", coordinate=BOXES[2][0], state=[-0.5, 0.6])
    assert results["free_energy"]["exact weights"]["value"] == pytest.approx(exact(system, BOXES[2]), abs=0.2)
    _, results, profile = write("function", state=lambda x: x[:, 0, 0] > 0)
    assert (profile["centres"], list((tmp_path / "function").glob("figures/*"))) == (None, [])
    _, results, profile = write("profile", coordinate="y")  # ΔF of the system's state
    assert results["state"] == system.state_in_words()
    for given, message in (
        ({"coordinate": "x", "state": [[0, 1], [0, 1]]}, "2 intervals"),
        ({"state": [1, 0], "coordinate": "x"}, "low below high"),
        ({"state": BOXES[0], "versus": BOXES[0]}, "both states"),
        ({"coordinate": ["x", "y", "angle"]}, "coordinate="),
    ):
        with pytest.raises(UserError, match=message):
            write("wrong", **given)


def test_a_run_may_have_a_state_of_any_kind():
    for state in (
        "[chi1,[0.0,2.0]]",
        "[[phi,[-2.5,0.0]],[psi,[-2.0,0.8]]]",
        "[{distance:[[2,CA],[3,CA]]},[0.1,0.4]]",
        "[{linear:[[1,phi],[1,psi]]},[0,2]]",
    ):
        config = compose("train", ["system=ACE-AS-NME", "budget=smoke", f"system.state={state}"])
        preflight(config)
    with pytest.raises(UserError, match="kappa and mu"):
        preflight(
            compose(
                "train", ["system=AS", "budget=smoke", "system.state=[[phi,[0,2]],[psi,[0,2]]]", "flow.balance.mu=1"]
            )
        )


def test_settings_of_coordinates_have_rules():
    settings.check({"coordinate": {"distance": [[1, "C"], 5]}}, "free_energy")
    for wrong in ({"distance": [1]}, {"dihedral": [1, 2, 3]}, {"linear": [1, 2]}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            settings.check({"coordinate": wrong}, "free_energy")


def test_functions_that_files_name_are_not_run_unless_they_are_trusted(tmp_path, monkeypatch):
    module = ModuleType("somebodys_functions")
    module.upper = lambda x: x[:, 0, 1] > 0
    module.upper.__module__, module.upper.__qualname__ = "somebodys_functions", "upper"
    monkeypatch.setitem(sys.modules, "somebodys_functions", module)
    contents = {"_target_": "boltznce.systems.toy.DoubleWell", "name": "mine", "barrier": 5.0, "tilt": 0.5}
    contents |= {"stiffness": 4.0, "box": [[-2.1, 2.1], [-2.5, 2.5]]}
    function = {"_target_": "somebodys_functions.upper"}
    for state in (function, [function, [0.5, math.inf]]):
        (path := tmp_path / "mine.yaml").write_text(yaml.safe_dump(contents | {"state": state}))
        with pytest.raises(UserError, match=r"names somebodys_functions.upper.*trust=true"):
            bz.load_system(path)
        system = bz.load_system(path, trust=True)
        assert system.reference()["delta_f"]["value"] == pytest.approx(0, abs=1e-6)  # half of the plane
    monkeypatch.setattr("boltznce.trust._REGISTERED", {})
    register(module.upper)
    assert bz.load_system(path).in_state(np.array([[[0.0, 1.0]], [[0.0, -1.0]]])).tolist() == [True, False]
