"""GFN2-xTB: tblite's own numbers, failures that are told, and no simulation by OpenMM."""

import importlib.util
import logging
import pickle

import numpy as np
import pytest
import torch
from known import REST, STATE, conformers

from boltznce import UserError, load_system
from boltznce.data.dataset import Dataset
from boltznce.data.members import load_data
from boltznce.data.simulate import simulate
from boltznce.methods.proxy import FromProxy, refine_frames
from boltznce.systems import semiempirical
from boltznce.systems.identity import differences
from boltznce.systems.semiempirical import XTBEnergy
from boltznce.systems.single_point import BOHR_NM, HARTREE_KJ_MOL

HAS_TBLITE = importlib.util.find_spec("tblite") is not None
needs_tblite = pytest.mark.skipif(not HAS_TBLITE, reason="tblite is not installed")
WATER = torch.tensor([[0.0, 0.0, 0.0], [0.096, 0.0, 0.0], [-0.024, 0.093, 0.0]], dtype=torch.float64)


@pytest.fixture(scope="module")
def system():
    return load_system("aldp_xtb", n_workers=2)


@pytest.fixture(scope="module")
def x(system):
    noise = torch.randn((24, 22, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return system.positions.double() + 0.004 * noise


def single_point(numbers, conformer, charge=0):
    """Hartree and Hartree/Bohr from tblite itself, with a calculator of its own."""
    from tblite.interface import Calculator

    calculator = Calculator("GFN2-xTB", np.array(numbers), conformer.numpy() / BOHR_NM, charge=charge)
    calculator.set("verbosity", 0)
    calculator.add("alpb-solvation", "water")
    result = calculator.singlepoint()
    return float(result.get("energy")), result.get("gradient")


def test_units():
    assert HARTREE_KJ_MOL == pytest.approx(2625.4996394799, rel=1e-12)


@needs_tblite
def test_energy_is_that_of_tblite_in_the_order_of_the_batch(system, x):
    energies, forces = system._potential.evaluate(x)
    numbers = [atom.element.atomic_number for atom in system.topology.atoms]
    for n in (0, 9, 23):
        energy, gradient = single_point(numbers, x[n])
        assert energies[n].item() == pytest.approx(energy * HARTREE_KJ_MOL, rel=1e-12)
        torch.testing.assert_close(
            forces[n], torch.from_numpy(-gradient * HARTREE_KJ_MOL / BOHR_NM), rtol=1e-6, atol=1e-4
        )
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    shuffled, shuffled_forces = system._potential.evaluate(x[order])
    assert torch.equal(shuffled, energies[order])
    assert torch.equal(shuffled_forces, forces[order])
    reduced = energies / (0.00831446261815324 * 300)
    torch.testing.assert_close(system.energy(x), reduced)
    torch.testing.assert_close(system.at_temperature(600.0).energy(x), reduced / 2)


@needs_tblite
def test_dtype_charge_and_pickling(system, x):
    given = x[:1].float().requires_grad_()
    energy = system.energy(given)
    (gradient,) = torch.autograd.grad(energy.sum(), given)
    assert energy.dtype == gradient.dtype == torch.float32
    assert system.energy(x[:0]).shape == (0,)
    assert torch.equal(pickle.loads(pickle.dumps(system)).energy(x[:1]), system.energy(x[:1]))
    assert system._potential.charge == 0
    hydronium = torch.cat([WATER, torch.tensor([[-0.03, -0.05, 0.08]], dtype=torch.float64)])
    (energy,) = XTBEnergy([8, 1, 1, 1], charge=1, n_workers=1)(hydronium[None]).tolist()
    assert energy == pytest.approx(single_point([8, 1, 1, 1], hydronium, charge=1)[0] * HARTREE_KJ_MOL, rel=1e-10)


@needs_tblite
def test_failures_have_infinite_energy_and_are_counted(caplog):
    potential = XTBEnergy([8, 1, 1], n_workers=1)
    coinciding = WATER[[0, 0, 2]]
    x = torch.stack(
        [WATER, coinciding, WATER * torch.nan, 3 * WATER, WATER]
    ).requires_grad_()  # 3 * WATER: no convergence
    with caplog.at_level(logging.WARNING):
        energy = potential(x)
    (gradient,) = torch.autograd.grad(energy.sum(), x)
    assert torch.isposinf(energy).tolist() == [False, True, True, True, False]
    assert (gradient[1:4] == 0).all()
    assert (gradient[0] != 0).any()
    assert energy[4] == energy[0]  # failures leave nothing behind
    assert potential.n_failures == 3
    assert [record.message for record in caplog.records] == [
        "GFN2-xTB found no solution for 3 of 5 conformers: their energy is +inf."
    ]
    potential(WATER[None])
    assert potential.n_failures == 3


@needs_tblite
def test_elements_that_the_method_does_not_know_are_an_error():
    with pytest.raises(Exception, match=r"(?i)element|parameter|not supported|no support"):
        XTBEnergy([103, 1], n_workers=1)(torch.tensor([[[0.0, 0, 0], [0.2, 0, 0]]]))


@needs_tblite
def test_it_is_another_system_than_the_force_fields(system, tmp_path):
    assert system.reference() is None
    assert load_system("aldp", energy_backend="xtb").reference() is None
    assert system.state == ("phi", (0.0, 2.0))
    assert len(system.bonds) == 21
    assert not differences(load_system("aldp").identity, system.proxy.identity)
    assert system.at_temperature(600.0).proxy.temperature == 600.0
    assert load_system("aldp").proxy is None


@needs_tblite
def test_what_is_simulated_is_the_proxy(system, tmp_path):
    few = {"duration": 4.0, "equilibration": 0.5, "segment_length": 4.0, "n_repeats": 1, "engine": "openmm"}
    data = simulate(system, tmp_path / "set", "langevin", **few, progress=False)
    assert data.meta["system"] == system.proxy.identity
    assert len(load_data(system, system, tmp_path / "set")) == 4


@needs_tblite
def test_frames_of_the_force_field_are_annealed_to_it(system, tmp_path):
    x = conformers()[[STATE, REST]].repeat(2, 1, 1)
    x = (x + 0.002 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)).float()
    frames = Dataset.write(tmp_path / "frames", x.numpy(), system.proxy.energy(x).numpy(), window=np.arange(4))
    few = {"cess": 0.1, "first_cess": 0.1, "max_steps": 2, "step_size": 0.0005, "n_walkers": 4, "n_fit": 4}
    refined = refine_frames(system, frames, FromProxy(**few), seed=0, folder=tmp_path / "refined")
    np.testing.assert_allclose(refined.energies, system.energy(refined.positions), atol=0.02)
    assert refined.meta["system"] == system.identity
    assert set(refined.meta["refinement"]["gradients"]) == {"proxy", "system"}


def test_missing_tblite_names_the_remedy(monkeypatch):
    monkeypatch.setattr(semiempirical.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "boltznce\[xtb\]"'):
        load_system("aldp_xtb")
