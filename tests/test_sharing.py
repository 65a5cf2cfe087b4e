"""One network for many molecules: each bound network is what a network of its molecule alone would be."""

import pytest
import torch

from boltznce import load_system
from boltznce.flows.interpolant_flow import InterpolantFlow
from boltznce.flows.solvers import SolverSettings
from boltznce.methods import sharing
from boltznce.methods.sharing import SharedModel
from boltznce.networks.gvp import GVPVectorField
from boltznce.networks.shared_distance import SharedDistanceVectorField
from boltznce.systems.conformers import random_conformers


@pytest.fixture(scope="module")
def molecules():
    return [load_system(name, encoding="numbered") for name in ("AG", "GS")]


@pytest.fixture(autouse=True)
def few_conformers(monkeypatch):
    """Calibration on few rough conformers: what is tested here holds for any number."""
    monkeypatch.setattr(sharing, "N_CONFORMERS", 64)


def scrambled(module, size=0.1, seed=0):
    """Weights that are nowhere zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return module


def field(size=0.1, **settings):
    torch.manual_seed(0)  # whatever ran before
    return scrambled(
        SharedDistanceVectorField(79, **({"width": 16, "n_rounds": 2, "embedding_width": 12} | settings)), size
    )


def flow_of(network, **settings):
    return SharedModel(
        network, InterpolantFlow, {"length_scale": 0.16, "whiten": True, "coupling": "kabsch"} | settings
    )


def test_all_molecules_share_the_parameters_and_all_are_trained(molecules):
    shared = flow_of(field())
    names = {name for name, _ in shared.named_parameters()}
    assert names == {f"network.{name}" for name, _ in field().named_parameters()}
    for molecule in molecules:
        shared.zero_grad()
        x = random_conformers(molecule.positions, molecule.bonds, 8, torch.Generator().manual_seed(1))
        shared(molecule, x, torch.Generator().manual_seed(2)).backward()
        assert all(
            p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in shared.parameters()
        )
    assert set(shared.state_dict()) == names | {
        f"network.{name}" for name, _ in field().named_buffers() if "frequencies" not in name
    }


def test_prior_has_the_spread_of_the_rough_conformers(molecules, monkeypatch):
    monkeypatch.setattr(sharing, "N_CONFORMERS", 1024)
    silent = SharedDistanceVectorField(79, width=4, n_rounds=1, embedding_width=4)  # an untrained network is silent
    shared = SharedModel(silent, InterpolantFlow, {"length_scale": 0.16, "whiten": True})
    molecule = molecules[0]
    monkeypatch.setattr(
        SharedDistanceVectorField, "calibrate", lambda self, positions_at: None
    )  # of the network, which has no part in it
    flow = shared.eval().of(molecule)
    rough = random_conformers(
        molecule.positions, molecule.bonds, 1024, torch.Generator().manual_seed(0)
    )  # what it is calibrated on
    # what is left of the flow is its linear part, whose samples have the covariance that it was calibrated on
    x, _ = flow.sample(1024, torch.Generator().manual_seed(0), solver=SolverSettings("rk4", steps=4))
    for given in (x, rough):
        assert given.mean(1).abs().max() < 1e-5
    ratio = x.square().sum((1, 2)).mean() / (
        rough.square().sum((1, 2)).mean() + 3 * (molecule.n_atoms - 1) * (0.1 * 0.16) ** 2
    )
    assert ratio.item() == pytest.approx(1, abs=0.05)


def test_a_network_without_bind_is_shared_as_it_is(molecules):
    network = scrambled(GVPVectorField(79, n_layers=2, n_scalars=8, n_vectors=4))
    shared = SharedModel(network, InterpolantFlow, {"length_scale": 0.1})
    for molecule in molecules:
        alone = InterpolantFlow(network, molecule.n_atoms, 3, features=molecule.features, length_scale=0.1)
        x = molecule.positions[None].repeat(2, 1, 1)
        one, other = (flow.loss(x, torch.Generator().manual_seed(0)) for flow in (shared.of(molecule), alone))
        torch.testing.assert_close(one, other)
