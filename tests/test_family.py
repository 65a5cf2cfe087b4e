"""Families of peptides: their lists, their members, and their data on disk."""

import numpy as np
import pytest
import torch
import yaml

from boltznce import UserError, load_system
from boltznce.data import many
from boltznce.data.engine import run_job
from boltznce.data.many import is_complete, load_many, simulate_many
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
    assert len(load_system("dipeptides", selection="paper").sequences["train"]) == 200
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
        ({"selections": {"tiny": {"train": ["AZ"]}}}, "Z in 'AZ' is no amino acid"),
    ],
)
def test_bad_lists_are_one_sentence(settings, message):
    with pytest.raises(UserError, match=message):
        family(**settings)


def run_here(plans, *_):
    """`run_plans` without processes, whose start takes far longer than these simulations; those are tested in test_simulate."""
    for each in plans:
        for path in each.job_folders:
            run_job(path, lambda: None)


@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_data_of_many(tmp_path, monkeypatch, processes):
    if not processes:
        monkeypatch.setattr(many, "run_plans", run_here)
    peptides = family()
    folder = tmp_path / "data"
    assert not is_complete(peptides, folder)
    with pytest.raises(UserError, match="no datasets"):
        load_many(peptides, folder)
    made = simulate_many(peptides, folder, engine="torch", test={"duration": 0.2}, **SHORT)
    assert list(made) == ["AG", "GA", "AA"]
    assert [len(data) for data in made.values()] == [10, 10, 20]
    for sequence, data in made.items():
        member = peptides.member(sequence)
        assert np.allclose(member.energy(np_to(data.positions)).numpy(), data.energies, atol=1e-3)
        assert set(data.window) == {0, 1}
        assert (np.bincount(data.window) == len(data) // 2).all()
        # the ladders are independent: no frame of one is near one of the other
        assert np.abs(data.positions[data.window == 0] - data.positions[data.window == 1]).max(axis=(1, 2)).min() > 1e-3
    index = yaml.safe_load((folder / "index.yaml").read_text())["peptides"]
    assert {name: entry["role"] for name, entry in index.items()} == {"AG": "train", "GA": "train", "AA": "test"}
    assert is_complete(peptides, folder)
    assert list(load_many(peptides, folder, ("test",))) == ["AA"]

    # a second call makes nothing anew; another force field or a changed dataset is noticed
    before = (folder / "AG" / "meta.yaml").stat().st_mtime_ns
    simulate_many(peptides, folder, engine="torch", test={"duration": 0.2}, **SHORT)
    assert (folder / "AG" / "meta.yaml").stat().st_mtime_ns == before
    other = family(forcefield=["amber14-all.xml", "implicit/obc2.xml"])
    with pytest.raises(UserError, match="another system or force field"):
        load_many(other, folder)
    with pytest.raises(UserError, match="no data of GG"):
        load_many(family({"tiny": {"train": ["AG", "GG"]}}), folder)
    (folder / "GA" / "meta.yaml").write_text((folder / "AG" / "meta.yaml").read_text().replace("AG", "GA"))
    with pytest.raises(UserError, match="GA"):
        load_many(peptides, folder)


def np_to(positions):
    return torch.from_numpy(np.array(positions)).double()
