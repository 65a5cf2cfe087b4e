"""Trajectories made elsewhere become datasets: units, order of atoms, solvent, weights, and what is told of them."""

import importlib.util

import mdtraj
import numpy as np
import pytest

import boltznce as bz
from boltznce.config import compose
from boltznce.data.dataset import Dataset
from boltznce.data.members import load_data
from boltznce.data.whole import make_whole, spanning_bonds
from boltznce.errors import UserError
from boltznce.methods.findings import Data, Findings
from boltznce.methods.preflight import preflight
from boltznce.methods.provenance import data_in_words
from boltznce.systems.forcefield import TorchForceField
from boltznce.topologies import from_json, system_pdb, to_json
from boltznce.units import GAS_CONSTANT

N = 30
needs_tables = pytest.mark.skipif(importlib.util.find_spec("tables") is None, reason="PyTables is not installed")
PRECISION = {"dcd": 1e-6, "xtc": 6e-4, "trr": 1e-6, "nc": 1e-6, "pdb": 6e-5, "h5": 1e-6, "npy": 1e-6}  # nm


@pytest.fixture(scope="module")
def system():
    return bz.load_system("aldp")


@pytest.fixture(scope="module")
def frames(system):
    """(N, 22, 3) in nm: the structure, every atom of it displaced by about as much as heat does."""
    rng = np.random.default_rng(0)
    x = system.positions.numpy() + 0.003 * rng.standard_normal((N, system.n_atoms, 3))
    return (x - x.mean(1, keepdims=True)).astype(np.float32)


@pytest.fixture
def pdb(system, tmp_path):
    (path := tmp_path / "aldp.pdb").write_text(system_pdb(system))
    return path


def written(path, topology, x, time=None, **box):
    trajectory = mdtraj.Trajectory(x, topology, time=time, **box)
    if path.suffix == ".npy":
        np.save(path, x)
    else:
        trajectory.save(str(path))
    return path


def imported(tmp_path, system, files, topology, name="data", **settings):
    settings = {"temperature": system.temperature, "progress": False} | settings
    return Dataset.from_trajectory(tmp_path / name, topology, files, system, **settings)


def permuted(topology, order):
    """The topology with its atoms in another order within their residues, by name as before."""
    other, atoms = mdtraj.Topology(), {}
    chain = other.add_chain()
    residues = {r.index: other.add_residue(r.name, chain, r.resSeq) for r in topology.residues}
    for i in order:
        atom = topology.atom(i)
        atoms[i] = other.add_atom(atom.name, atom.element, residues[atom.residue.index])
    for a, b in topology.bonds:
        other.add_bond(atoms[a.index], atoms[b.index])
    return from_json(to_json(other))


def within_residues(topology, seed=1):
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation([a.index for a in residue.atoms]) for residue in topology.residues])


# ---- formats and units ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [e if e != "h5" else pytest.param(e, marks=needs_tables) for e in PRECISION])
def test_positions_and_energies_of_every_format(ending, system, frames, pdb, tmp_path):
    file = written(tmp_path / f"run.{ending}", system.topology, frames, np.arange(N) * 2.5)
    data = imported(tmp_path, system, file, pdb)
    assert np.abs(data.positions - frames).max() < PRECISION[ending]
    np.testing.assert_allclose(data.energies, system.energy(np.asarray(data.positions, dtype=np.float64)), rtol=1e-6)
    timed = ending in ("xtc", "trr", "nc", "h5")
    np.testing.assert_allclose(data.time, np.arange(N) * (2.5 if timed else 1.0))
    assert data.meta["settings"]["time"] == ("ps" if timed else "numbers of frames")
    assert (data.log_weights == 0).all()
    assert data.meta["notes"] == []


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize(("unit", "length_unit"), [(1.0, "nm"), (0.1, "angstrom"), (1 / 30, 1 / 30)])
def test_arrays(flat, unit, length_unit, system, frames, pdb, tmp_path):
    x = (frames / unit).astype(np.float32)
    np.savez(tmp_path / "x.npz", positions=x.reshape(N, -1) if flat else x, step=np.arange(N))
    data = imported(tmp_path, system, tmp_path / "x.npz", pdb, key="positions", length_unit=length_unit)
    assert np.abs(data.positions - frames).max() < 1e-6
    with pytest.raises(UserError, match="has the arrays positions, step: set key="):
        imported(tmp_path, system, tmp_path / "x.npz", pdb, "other")


def test_a_pickle_is_not_loaded(system, frames, pdb, tmp_path):
    np.save(tmp_path / "x.npy", {"AA": frames}, allow_pickle=True)
    with pytest.raises(UserError, match=r"save the positions alone, by numpy\.save"):
        imported(tmp_path, system, tmp_path / "x.npy", pdb)


@pytest.mark.parametrize(
    ("ending", "factor", "told"),
    [
        ("npy", 10.0, "in Å for nm: set length_unit=angstrom"),
        ("npy", 30.0, "set length_unit=about 0.033, the nm of one unit"),
        ("xtc", 10.0, "10 times as long .* in Å for nm: write it anew in the unit of its format"),
        ("dcd", 0.1, "0.1 times as long .* in nm for Å"),
    ],
)
def test_another_unit_is_told(ending, factor, told, system, frames, pdb, tmp_path):
    file = written(tmp_path / f"run.{ending}", system.topology, (factor * frames).astype(np.float32))
    with pytest.raises(UserError, match=told):
        imported(tmp_path, system, file, pdb)
    assert not (tmp_path / "data").exists()


def test_files_that_cannot_be_read_are_told(system, frames, pdb, tmp_path):
    (tmp_path / "bad.dcd").write_bytes(b"nothing" * 30)
    short = written(tmp_path / "short.xtc", system.topology.subset(range(10)), frames[:, :10])
    (tmp_path / "run.gro").touch()
    good = written(tmp_path / "good.dcd", system.topology, frames)
    for file, topology, told in (
        ("bad.dcd", pdb, "bad.dcd cannot be read"),
        (short, pdb, "has 10 atoms and its topology 22"),
        ("run.gro", pdb, "run.gro is none of .dcd, .xtc"),
        ("none.dcd", pdb, "There is no file .*none.dcd: correct files="),
        (good, None, "good.dcd does not say which atoms it has: set topology="),
        (good, tmp_path / "no.pdb", "There is no file .*no.pdb: correct topology="),
    ):
        with pytest.raises(UserError, match=told):
            imported(tmp_path, system, tmp_path / file, topology)
    with pytest.raises(UserError, match=r"length_unit=angstrom is for \.npy, \.npz"):
        imported(tmp_path, system, good, pdb, length_unit="angstrom")


# ---- atoms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("standard", [False, True])
def test_permuted_atoms_are_put_in_order(standard, system, frames, tmp_path):
    order = within_residues(system.topology)
    topology = permuted(system.topology, order)
    if standard:  # PDB's own names of caps
        for atom in topology.atoms:
            atom.name = {"HH31": "H1", "HH32": "H2", "HH33": "H3"}.get(atom.name, atom.name)
    file = written(tmp_path / "run.pdb", topology, frames[:, order])
    data = imported(tmp_path, system, file, None)
    assert np.abs(data.positions - frames).max() < 1e-4
    assert data.meta["notes"] == ["The atoms of the data were put in the order of aldp, by residue and name."]


def test_an_order_that_names_do_not_tell(system, frames, tmp_path):
    order = within_residues(system.topology)
    topology = permuted(system.topology, order)
    for atom in topology.atoms:
        atom.name = f"{atom.element.symbol}{atom.index}"
    file = written(tmp_path / "run.pdb", topology, frames[:, order])
    with pytest.raises(UserError, match="in another order, and their names do not tell which is which"):
        imported(tmp_path, system, file, None)


def test_names_do_not_matter_where_the_order_is_the_same(system, frames, tmp_path):
    topology = from_json(to_json(system.topology))
    for atom in topology.atoms:
        atom.name = f"{atom.element.symbol}{atom.index}"
    data = imported(tmp_path, system, written(tmp_path / "run.pdb", topology, frames), None)
    assert data.meta["notes"] == []


def test_a_topology_of_another_order_than_the_frames_is_told(system, frames, pdb, tmp_path):
    order = within_residues(system.topology)
    file = written(tmp_path / "run.dcd", system.topology, frames[:, order])
    with pytest.raises(UserError, match=r"begins with 30 of 30 frames whose energies no conformer of aldp has"):
        imported(tmp_path, system, file, pdb)


@pytest.mark.parametrize(
    ("name", "told"), [("KA", "of other bonds between the same elements"), ("ACE-A-NME", "of another molecule than AK")]
)
def test_another_molecule_is_told(name, told, tmp_path):
    other = bz.load_system(name)
    file = written(tmp_path / "run.pdb", other.topology, other.positions.numpy()[None])
    with pytest.raises(UserError, match=told):
        imported(tmp_path, bz.load_system("AK"), file, None)


def test_the_mirror_image_is_told(system, frames, pdb, tmp_path):
    with pytest.raises(UserError, match="another handedness than in aldp"):
        imported(tmp_path, system, written(tmp_path / "run.dcd", system.topology, -frames), pdb)


def test_what_is_no_molecule_or_another_temperature(system, frames, pdb, tmp_path):
    file = written(tmp_path / "run.dcd", system.topology, frames)
    with pytest.raises(UserError, match="gaussians8 is no molecule"):
        imported(tmp_path, bz.load_system("gaussians8"), file, pdb)
    with pytest.raises(UserError, match="dipeptides stands for many"):
        imported(tmp_path, bz.load_system("dipeptides"), file, pdb, temperature=310.0)
    with pytest.raises(UserError, match=r"temperature=310 .* is not that of aldp .300 K.: set system.temperature=310"):
        imported(tmp_path, system, file, pdb, temperature=310.0)


# ---- solvent --------------------------------------------------------------------------------------------------------


def in_water(system, frames, length=2.2):
    """Topology, positions and box of the molecule between waters and an ion, cut by a box that it lies across."""
    water = mdtraj.Topology()
    chain = water.add_chain()
    for _ in range(5):
        residue = water.add_residue("HOH", chain)
        atoms = [water.add_atom(name, mdtraj.element.get_by_symbol(name[0]), residue) for name in ("O", "H1", "H2")]
        water.add_bond(atoms[0], atoms[1])
        water.add_bond(atoms[0], atoms[2])
    water.add_atom("NA", mdtraj.element.sodium, water.add_residue("NA", chain))
    topology = water.join(system.topology).join(water)
    rng = np.random.default_rng(2)
    several = [rng.uniform(0, length, (len(frames), water.n_atoms, 3)) for _ in range(2)]
    x = np.concatenate([several[0], frames, several[1]], axis=1)
    boxes = {"unitcell_lengths": np.full((len(x), 3), length), "unitcell_angles": np.full((len(x), 3), 90.0)}
    return topology, (x % length).astype(np.float32), boxes


@pytest.mark.parametrize("ending", ["dcd", "xtc", "pdb"])
def test_solvent_is_left_out_and_the_molecule_made_whole(ending, system, frames, tmp_path):
    topology, x, box = in_water(system, frames)
    written(top := tmp_path / "top.pdb", topology, x[:1], **{key: value[:1] for key, value in box.items()})
    file = written(tmp_path / f"run.{ending}", topology, x, **box)
    data = imported(tmp_path, system, file, top)
    assert np.abs(data.positions - frames).max() < 1.2e-3
    assert data.meta["atoms_left_out"] == 32
    assert "explicit solvent" in data.meta["notes"][0]
    assert "explicit solvent left out" in data_in_words(data.meta)
    np.savetxt(tmp_path / "energies.txt", np.zeros(N))
    with pytest.raises(UserError, match="energies= are of all atoms"):
        imported(tmp_path, system, file, top, "other", energies=tmp_path / "energies.txt")


def test_a_molecule_that_is_there_twice(system, frames, tmp_path):
    topology = system.topology.join(system.topology)
    file = written(tmp_path / "run.pdb", topology, np.concatenate([frames, frames + 1], axis=1))
    with pytest.raises(UserError, match="the residues of aldp 2 times"):
        imported(tmp_path, system, file, None)


def test_made_whole_in_a_slanted_box():
    rng = np.random.default_rng(3)
    bonds = [(0, 2), (2, 1), (3, 1), (4, 0)]
    steps = spanning_bonds(bonds, 5)
    x = np.zeros((4, 5, 3))
    for placed, moved in steps:
        x[:, moved] = x[:, placed] + 0.2 * rng.standard_normal((4, 3)).clip(-1, 1)
    box = np.tile([[2.0, 0, 0], [0.9, 1.8, 0], [-0.7, 0.6, 1.7]], (4, 1, 1))
    cut = x + rng.integers(-2, 3, (4, 5, 3)) @ box
    whole = make_whole(cut, box, steps)
    np.testing.assert_allclose(whole - whole[:, :1], x - x[:, :1], atol=1e-12)


# ---- what else comes with frames ------------------------------------------------------------------------------------


def test_weights_bias_and_stride_over_several_files(system, frames, pdb, tmp_path):
    files = [
        written(tmp_path / f"{k}.dcd", system.topology, frames[part])
        for k, part in enumerate(np.split(np.arange(N), [20]))
    ]
    bias = np.random.default_rng(4).uniform(0, 5, N)
    np.savetxt(tmp_path / "bias.txt", bias)
    np.save(tmp_path / "w.npy", bias / (GAS_CONSTANT * 300.0))
    data = imported(tmp_path, system, files, pdb, bias=tmp_path / "bias.txt", stride=3)
    same = imported(tmp_path, system, files, pdb, "same", weights=tmp_path / "w.npy", stride=3)
    kept = np.array([*range(0, 20, 3), *range(20, 30, 3)])
    window, time = np.where(kept < 20, 0, 1), np.where(kept < 20, kept, kept - 20)
    order = np.argsort(time, kind="stable")
    assert np.abs(data.positions - frames[kept[order]]).max() < 1e-6
    np.testing.assert_allclose(data.log_weights, bias[kept[order]] / (GAS_CONSTANT * 300.0))
    np.testing.assert_allclose(same.log_weights, data.log_weights)
    np.testing.assert_array_equal(data.window, window[order])
    np.testing.assert_array_equal(data.time, time[order])
    assert [len(part) for part in data.split(0.4, 0.3, 0.3)] == [6, 3, 2]
    assert "0.dcd; and 1 more, stride 3" in data_in_words(data.meta)


def test_parts_of_one_trajectory_follow_each_other(system, frames, pdb, tmp_path):
    files = [
        written(tmp_path / f"{k}.xtc", system.topology, frames[part], 2.0 * part)
        for k, part in enumerate(np.split(np.arange(N), [20]))
    ]
    data = imported(tmp_path, system, files, pdb)
    np.testing.assert_allclose(data.time, 2.0 * np.arange(N))
    back = written(tmp_path / "back.xtc", system.topology, frames, np.arange(N) % 10)
    assert imported(tmp_path, system, back, pdb, "back").meta["settings"]["time"] == "numbers of frames"


@pytest.mark.parametrize(
    ("setting", "values", "told"),
    [
        ("weights", np.zeros(N - 1), "has 29 numbers, and the trajectories 30 frames"),
        ("bias", np.full(N, np.nan), "has numbers that are not finite"),
        ("weights", np.full(N, -np.inf), "has numbers that are not finite"),
        ("energies", np.zeros(3), "energies=.*has 3 numbers"),
        ("weights", np.zeros((N, 2)), "give one column"),
    ],
)
def test_columns_that_do_not_fit(setting, values, told, system, frames, pdb, tmp_path):
    file = written(tmp_path / "run.dcd", system.topology, frames)
    np.save(tmp_path / "x.npy", values)
    with pytest.raises(UserError, match=told):
        imported(tmp_path, system, file, pdb, **{setting: tmp_path / "x.npy"})
    with pytest.raises(UserError, match="two ways to say the same"):
        imported(tmp_path, system, file, pdb, weights=tmp_path / "x.npy", bias=tmp_path / "x.npy")


def test_energies_are_compared(system, frames, pdb, tmp_path):
    file = written(tmp_path / "run.dcd", system.topology, frames)
    kT, u = GAS_CONSTANT * 300.0, system.energy(frames.astype(np.float64))
    np.save(tmp_path / "same.npy", u * kT)
    np.save(tmp_path / "other.npy", (u + 7.0) * kT)
    assert imported(tmp_path, system, file, pdb, energies=tmp_path / "same.npy").meta["notes"] == []
    (note,) = imported(tmp_path, system, file, pdb, "other", energies=tmp_path / "other.npy").meta["notes"]
    assert "differ from those of aldp by 7 kT" in note


def constrained(system, frames):
    """Frames whose hydrogens are at a fixed distance."""
    x = frames.copy()
    for a, b in system.bonds:
        h, heavy = (a, b) if system.topology.atom(a).element.symbol == "H" else (b, a)
        if system.topology.atom(h).element.symbol == "H":
            arm = x[:, h] - x[:, heavy]
            x[:, h] = x[:, heavy] + 0.105 * arm / np.linalg.norm(arm, axis=-1, keepdims=True)
    return x


@pytest.mark.parametrize("ending", ["dcd", "xtc"])
def test_constrained_bonds_are_told(ending, system, frames, pdb, tmp_path):
    file = written(tmp_path / f"run.{ending}", system.topology, constrained(system, frames))
    data = imported(tmp_path, system, file, pdb)
    assert data.meta["rigid_bonds"] == 12
    findings = Findings(system, [], None, {}, None, Data(data, data, data, {}, data.log_weights), {}, None, {}, {}, 0)
    assert findings.frames is findings.md_units is None
    assert data.meta["notes"][0].startswith("12 of 21 bonds of the data, 12 of them of hydrogens, hardly vary")
    assert "12 rigid bonds" in data_in_words(data.meta)


def test_some_frames_that_are_no_conformers_are_left_out(system, frames, pdb, tmp_path):
    x = frames.copy()
    x[3, 0] = np.nan
    x[[7, 8], 4] = x[[7, 8], 5] + 1e-4
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "w.npy", np.arange(N, dtype=float))
    data = imported(tmp_path, system, tmp_path / "x.npy", pdb, weights=tmp_path / "w.npy")
    kept = np.delete(np.arange(N), [3, 7, 8])
    np.testing.assert_array_equal(data.log_weights, kept)
    assert data.meta["frames_left_out"] == 3
    assert data.meta["notes"] == ["3 of 30 frames were left out of the data: their energies are no conformer's."]


# ---- the dataset in use ---------------------------------------------------------------------------------------------


def test_training_takes_it_as_it_is(system, frames, pdb, tmp_path):
    """Up to the data stage, with the settings that a simulation would have; and no file of its own stays behind."""
    file = written(tmp_path / "run.dcd", system.topology, np.concatenate([frames] * 4))
    data = imported(tmp_path, system, file, pdb, "sets/aldp")
    findings = Findings(system, [], None, {}, None, Data(data, data, data, {}, data.log_weights), {}, None, {}, {}, 0)
    assert len(findings.frames.energies) == len(findings.md_units) == 4 * N
    assert sorted(path.name for path in (tmp_path / "sets").iterdir()) == ["aldp"]
    assert len(load_data(system, system, tmp_path / "sets" / "aldp")) == 4 * N
    preflight(compose("train", ["system=aldp", "budget=smoke", f"data.folder={tmp_path / 'sets' / 'aldp'}"]))
    assert Data(data, data, data, {}, data.log_weights).is_time_series
    with pytest.raises(UserError, match=r"There is a dataset in .* already"):
        imported(tmp_path, system, file, pdb, "sets/aldp")
    hot = ["system=aldp", "budget=smoke", f"data.folder={tmp_path / 'sets' / 'aldp'}", "system.temperature=400"]
    with pytest.raises(UserError, match="another temperature"):
        preflight(compose("train", hot))


def test_a_failure_leaves_nothing(system, frames, pdb, tmp_path, monkeypatch):
    file = written(tmp_path / "run.dcd", system.topology, frames)
    (folder := tmp_path / "sets").mkdir()
    monkeypatch.setattr(TorchForceField, "__call__", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
    with pytest.raises(RuntimeError, match="no memory"):
        imported(tmp_path, system, file, pdb, "sets/aldp")
    assert list(folder.iterdir()) == []


def test_many_frames_are_read_some_at_a_time(system, frames, pdb, tmp_path, monkeypatch):
    monkeypatch.setattr("boltznce.data.trajectory.MOST_FRAMES", 7)
    file = written(tmp_path / "run.xtc", system.topology, frames, np.arange(N) * 2.0)
    data = imported(tmp_path, system, file, pdb, stride=4)
    assert np.abs(data.positions - frames[::4]).max() < 1e-3
    np.testing.assert_allclose(data.time, 8.0 * np.arange(8))


def test_the_command(system, frames, tmp_path, forks):
    (tmp_path / "aldp.pdb").write_text(system_pdb(system))
    for name in ("a", "b c"):
        written(tmp_path / f"{name}.xtc", system.topology, frames, np.arange(N) * 1.0)
    words = ["system=aldp", "topology=aldp.pdb", "files=['a.xtc','b c.xtc']", "temperature=300"]
    child = forks.run("import", *words, cwd=tmp_path)
    assert child.status == 0, child.output
    assert "60 frames of aldp in data/aldp_imported: data.folder=data/aldp_imported trains on them" in child.output
    child = forks.run("import", "system=aldp", "files=b c.xtc", "temperature=300", "name=x", cwd=tmp_path)
    assert child.status == 2
    assert "b c.xtc does not say which atoms it has: set topology=" in child.told[0]
    child = forks.run("import", "files=a.xtc", "topology=aldp.pdb", cwd=tmp_path)
    assert child.told == ["Error: temperature= is missing: add temperature=... to the command line."]
