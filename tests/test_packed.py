"""Frames of many molecules in one file: what they say of the molecule stays, and what is made of them is a dataset."""

import dataclasses

import numpy as np
import pytest
import torch

import boltznce as bz
from boltznce import UserError
from boltznce.analysis.weights import normalized_weights
from boltznce.data.dataset import Dataset
from boltznce.data.members import make_data
from boltznce.data.packed import STEP, PackedFrames, pack
from boltznce.systems.conformers import random_conformers
from boltznce.units import GAS_CONSTANT

N = 3000


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Rough conformers of two peptides with uneven weights: systems, their datasets, the file."""
    folder, pairs = tmp_path_factory.mktemp("packed"), []
    for seed, name in enumerate(("AG", "AS")):
        system = bz.load_system(name)
        generator = torch.Generator().manual_seed(seed)
        x = random_conformers(system.positions, system.bonds, N, generator)
        log_weights = 1.5 * system.coordinate(x, "psi").cos() + 0.7 * torch.randn(N, generator=generator)
        meta = {"system": system.identity, "settings": {"method": "replica_exchange"}, "cpu_seconds": 3.0}
        options = {"log_weights": log_weights.numpy(), "window": np.arange(N) % 7, "meta": meta}
        pairs.append((system, Dataset.write(folder / "all" / name, x.numpy(), system.energy(x).numpy(), **options)))
    pack(folder / "few.safetensors", pairs, n_frames=1000)
    return folder, pairs


def populations(system, dataset):
    weights = normalized_weights(dataset.log_weights)
    psi = system.coordinate(np.asarray(dataset.positions), "psi")
    state = system.in_state(np.asarray(dataset.positions))
    return weights @ state, weights[state] @ np.cos(psi[state]), weights[~state] @ np.cos(psi[~state])


def test_frames_keep_their_places_weights_and_origin(packed, tmp_path):
    folder, pairs = packed
    for system, whole in pairs:
        few = PackedFrames(folder / "few.safetensors").unpack(system, tmp_path / system.name)
        assert 300 < len(few) <= 1000
        number = few.time.astype(int)  # the fixture's times
        centred = whole.positions[number] - whole.positions[number].mean(1, keepdims=True)
        assert np.abs(few.positions - centred).max() < 0.51 * STEP
        assert (few.window == number % 7).all()
        assert few.meta["packed_from"] == N
        assert few.meta["cpu_seconds"] == 3.0
        energy = system.energy(torch.from_numpy(np.array(few.positions)).double()).numpy()
        np.testing.assert_allclose(few.energies, energy, rtol=1e-4, atol=1e-3)
        # the state keeps its share, but for frames that rounding puts over its border; averages within are those of
        # 500 draws: 0.03
        a, b = populations(system, whole), populations(system, few)
        assert b[0] == pytest.approx(a[0], abs=3e-3)
        np.testing.assert_allclose(b[1:], a[1:], atol=0.1)
        assert (
            np.abs(
                np.subtract(
                    a[1:], populations(system, dataclasses.replace(whole, log_weights=0 * whole.log_weights))[1:]
                )
            ).max()
            > 0.3
        )  # what no weights would be off by
        # nearly even within each: the ESS of the uneven weights was under 30%
        inside = system.in_state(np.asarray(few.positions))
        for part in (inside, ~inside):
            w = normalized_weights(few.log_weights[part])
            assert 1 / (w @ w) > 0.6 * part.sum()


def test_training_data_are_made_of_them_and_the_rest_is_simulated(packed, tmp_path):
    folder, _ = packed
    family = bz.load_system("dipeptides", selections={"two": {"train": ["AG", "AS"], "test": []}}, selection="two")
    settings = {"method": "replica_exchange"}
    made = make_data(family, tmp_path, simulation=settings, accept="any", packed=folder / "few.safetensors")
    assert sorted(made) == ["AG", "AS"]
    assert made["AG"].meta["packed_from"] == N
    assert (tmp_path / "AS" / "meta.yaml").exists()


def test_another_force_field_is_refused(packed, tmp_path):
    folder, _ = packed
    other = {"selections": {"one": {"train": ["AG"], "test": []}}, "selection": "one", "temperature": 300.0}
    with pytest.raises(UserError, match="temperature"):
        make_data(
            bz.load_system("dipeptides", **other),
            tmp_path,
            simulation={"method": "replica_exchange"},
            accept="any",
            packed=folder / "few.safetensors",
        )


def test_no_file_and_a_damaged_one(packed, tmp_path):
    folder, _ = packed
    with pytest.raises(UserError, match=r"data\.packed"):
        PackedFrames(tmp_path / "none.safetensors")
    content = bytearray((folder / "few.safetensors").read_bytes())
    content[-100] ^= 255
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        PackedFrames(tmp_path / "bad.safetensors")


def test_what_ships_is_of_the_paper_selection_and_never_of_a_test_peptide():
    shipped = PackedFrames("dipeptides")
    family = bz.load_system("dipeptides", selection="paper")
    assert set(shipped.about) <= {*family.sequences["train"], *family.sequences["validation"]}
    assert not set(shipped.about) & {*family.sequences["test"]}
    assert set(bz.load_system("dipeptides", selection="pretrained").sequences["validation"]) <= set(shipped.about)


def test_what_ships_is_at_equilibrium(tmp_path):
    """Equipartition: a carbon's bond to hydrogen, which little else pulls at, holds kT/2 of potential energy."""
    system = bz.load_system("KG")
    frames = PackedFrames("dipeptides").unpack(system, tmp_path / "KG")
    whole = system.openmm_system()  # which its forces do not keep alive
    force = next(f for f in whole.getForces() if type(f).__name__ == "HarmonicBondForce")
    elements, held = [atom.element.symbol for atom in system.topology.atoms], []
    for a, b, length, k in map(force.getBondParameters, range(force.getNumBonds())):
        if {elements[a], elements[b]} == {"C", "H"}:
            r = np.linalg.norm(frames.positions[:, a] - frames.positions[:, b], axis=-1)
            held.append(0.5 * k._value * (r - length._value) ** 2 / (GAS_CONSTANT * system.temperature))
    mean = normalized_weights(frames.log_weights) @ np.mean(held, axis=0)
    assert len(held) > 8
    assert mean == pytest.approx(0.5, abs=0.06)  # of all frames, before they were packed, 0.517
