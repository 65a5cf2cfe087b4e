"""Families of peptides: their lists, their members, and their data on disk."""

import numpy as np
import pytest
import torch

from boltznce import UserError, load_system
from boltznce.data import members
from boltznce.data.engine import run_job
from boltznce.data.members import load_data, make_data, simulate_members
from boltznce.systems.family import PeptideFamily

PHYSICS = {
    "forcefield": ["amber14-all.xml", "implicit/obc1.xml"],
    "temperature": 310.0,
    "nonbonded_method": "CutoffNonPeriodic",
    "cutoff_nm": 2.0,
    "state": ["phi", [0.0, 2.0]],
}
LISTS = {"tiny": {"train": ["AG", "GA"], "test": ["AA"]}}
SHORT = {
    "duration": 0.1,
    "n_repeats": 1,
    "frame_interval": 0.02,
    "exchange_interval": 0.02,
    "segment_length": 0.1,
    "equilibration": 0.02,
    "n_replicas": 2,
    "n_ladders": 2,
    "method": "replica_exchange",
    "progress": False,
}


def family(selections=LISTS, selection="tiny", **settings):
    return PeptideFamily("tiny", selection, selections, **(PHYSICS | settings))


def test_shipped_lists_keep_what_is_tested_out_of_training():
    for selection in ("smoke", "cpu", "long", "paper"):
        dipeptides = load_system("dipeptides", selection=selection)
        train, test = (set(dipeptides.sequences[role]) for role in ("train", "test"))
        assert train
        assert test
        assert not train & set(["AC", "ET", "GN", "IM", "KS", "NY", "NF"])
        for place in (0, 1):  # each residue of a test peptide was seen in its place
            assert {sequence[place] for sequence in test} <= {sequence[place] for sequence in train}
    paper = load_system("dipeptides", selection="paper").sequences
    assert len(paper["train"]) == 200
    assert set(paper["test"]) == {"AC", "ET", "GN", "IM", "KS", "NY", "NF", "CA", "SV", "TG", "AS"}
    long = load_system("dipeptides", selection="long").sequences
    assert len(long["train"]) >= 12
    assert sum(sequence[::-1] not in long["train"] for sequence in long["test"]) >= 2


def test_members_are_the_systems_of_their_names():
    dipeptides = load_system("dipeptides")
    member, alone = dipeptides.member("KS"), load_system("KS")
    assert member.identity == alone.identity
    assert (member.temperature, member.state, member.n_atoms) == (alone.temperature, alone.state, alone.n_atoms)
    assert dipeptides.temperature == alone.temperature
    assert member.features.shape == (alone.n_atoms, dipeptides.n_features) == (alone.n_atoms, 76)
    assert dipeptides.member("KS") is member
    # phi is that of the second residue, the first that a chain with a charged end has
    names = {name: [str(member.topology.atom(i)) for i in atoms] for name, atoms in member.dihedrals.items()}
    assert names["phi"] == ["LYS1-C", "SER2-N", "SER2-CA", "SER2-C"]
    assert names["psi"] == ["LYS1-N", "LYS1-CA", "LYS1-C", "SER2-N"]
    x = member.positions[None].double()
    assert (member.energy(x) - alone.energy(x)).abs().item() < 1e-9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"selection": "huge"}, "no selection 'huge': choose one of tiny"),
        ({"selections": {"tiny": {"train": ["AG"], "test": ["AG"]}}}, "both a train and a test"),
        ({"never_trained": ["GA"]}, "GA is kept for tests"),
        ({"selections": {"tiny": {"test": ["AG"]}}}, "no peptides to train on"),
        ({"selections": {"tiny": {"train": ["AG"], "tests": ["GA"]}}}, "Unknown list of peptides tests"),
        ({"colour": "red"}, "no setting colour"),
        ({"selections": {"tiny": {"train": ["AG", "AdA"]}}}, r"D-residue \(dA\).*system=AdA"),
        ({"selections": {"tiny": {"train": ["AZ"]}}}, "Z in 'AZ' is no amino acid"),
    ],
)
def test_bad_lists_are_one_sentence(settings, message):
    with pytest.raises(UserError, match=message):
        family(**settings)


def run_here(plans, *_):
    """`run_plans` without processes, whose start takes longer than these simulations; test_simulate has those."""
    for each in plans:
        for path in each.job_folders:
            run_job(path, lambda: None)


@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_data_of_many(tmp_path, monkeypatch, processes):
    if not processes:
        monkeypatch.setattr(members, "run_plans", run_here)
    peptides = family()
    folder, settings = tmp_path / "data", {"engine": "torch", "test": {"duration": 0.2}, **SHORT}
    with pytest.raises(UserError, match="no dataset"):
        load_data(peptides, peptides.member("AA"), folder)
    made = simulate_members(peptides, folder, **settings)
    assert list(made) == ["AG", "GA", "AA"]
    assert [len(data) for data in made.values()] == [10, 10, 20]
    for sequence, data in made.items():
        member = peptides.member(sequence)
        assert np.allclose(member.energy(np_to(data.positions)).numpy(), data.energies, atol=1e-3)
        assert set(data.window) == {0, 1}
        assert (np.bincount(data.window) == len(data) // 2).all()
        # the ladders are independent: no frame of one is near one of the other
        assert np.abs(data.positions[data.window == 0] - data.positions[data.window == 1]).max(axis=(1, 2)).min() > 1e-3
    assert sorted(path.name for path in folder.iterdir()) == ["AA", "AG", "GA"]
    assert len(load_data(peptides, peptides.member("AA"), folder)) == 20

    # a second call makes nothing anew; another force field or a changed dataset is noticed
    before = (folder / "AG" / "meta.yaml").stat().st_mtime_ns
    simulate_members(peptides, folder, **settings)
    assert list(make_data(peptides, folder, simulation=settings)) == ["AG", "GA", "AA"]
    assert (folder / "AG" / "meta.yaml").stat().st_mtime_ns == before
    other = family(forcefield=["amber14-all.xml", "implicit/obc2.xml"])
    with pytest.raises(UserError, match="another system or force field"):
        load_data(other, other.member("AG"), folder)
    with pytest.raises(UserError, match=r"no dataset in .*GG"):
        load_data(peptides, peptides.member("GG"), folder)
    (folder / "GA" / "meta.yaml").write_text((folder / "AG" / "meta.yaml").read_text().replace("AG", "GA"))
    with pytest.raises(UserError, match="GA"):
        make_data(peptides, folder, simulation=settings)


@pytest.mark.parametrize("alone", [True, False])
def test_data_of_one_and_of_a_family_are_made_alike(tmp_path, monkeypatch, alone):
    """The same frames, in the folder itself or in that of the member's label; what is there is not made again."""
    monkeypatch.setattr(members, "run_plans", run_here)
    peptides = load_system("AG") if alone else family({"tiny": {"train": ["AG"]}})
    made = make_data(peptides, tmp_path, simulation={**SHORT, "engine": "openmm", "test": {"duration": 0.2}})
    assert list(made) == ["AG"]
    assert len(made["AG"]) == 10  # what is trained on is no mere test
    member = peptides.members("train")[0]
    assert (tmp_path / ("" if alone else "AG") / "meta.yaml").is_file()
    first = load_data(peptides, member, tmp_path).positions[0]
    assert first.sum() == pytest.approx(0.0, abs=1e-5)
    monkeypatch.setattr(members, "run_plans", None)
    again = make_data(peptides, tmp_path, simulation={}, accept="any")
    np.testing.assert_array_equal(again["AG"].positions[0], first)


def test_exact_data(tmp_path):
    system = load_system("gaussians8")
    made = make_data(system, tmp_path, simulation=None, n_samples=100, seed=1)
    assert [len(data) for data in made.values()] == [100]
    with pytest.raises(UserError, match="another system"):
        load_data(load_system("gaussians8", std=0.12), load_system("gaussians8", std=0.12), tmp_path)
    with pytest.raises(UserError, match="AG cannot be drawn from exactly"):
        make_data(load_system("AG"), tmp_path / "other", simulation=None, n_samples=100)


def np_to(positions):
    return torch.from_numpy(np.array(positions)).double()
