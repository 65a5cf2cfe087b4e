"""Models of a config: one network for many molecules, of each what a network of its own would be; or of one alone."""

import pytest
import torch
from omegaconf import OmegaConf

from boltznce import UserError, load_system
from boltznce.config import compose
from boltznce.flows.interpolant_flow import InterpolantFlow
from boltznce.flows.solvers import SolverSettings
from boltznce.methods import models
from boltznce.methods.models import make
from boltznce.networks.shared_distance import SharedDistanceVectorField
from boltznce.systems.conformers import random_conformers

SIZES = {
    "flow": {"width": 16, "n_rounds": 2, "embedding_width": 12},
    "ebm": {"width": 16, "n_blocks": 2, "embedding_width": 12},
}


@pytest.fixture(scope="module")
def family():
    return load_system("dipeptides", selection="two", selections={"two": {"train": ["AG", "GS"]}}, encoding="numbered")


@pytest.fixture(scope="module")
def molecules(family):
    return family.members("train")


@pytest.fixture(scope="module")
def config():
    return compose("train", ["system=dipeptides", "budget=smoke"])


@pytest.fixture(autouse=True)
def few_conformers(monkeypatch):
    """Calibration on few rough conformers: what is tested here holds for any number."""
    monkeypatch.setattr(models, "N_CONFORMERS", 64)


@pytest.fixture
def shared(family, config):
    """Makes the flow or the energy-based model of the family; its weights are nowhere zero."""

    def made(name="flow", size=0.1, **network):
        model = make(OmegaConf.merge(config, {name: {"network": SIZES[name] | network}}), family, name)
        scrambled(model.network, size)
        return model

    return made


def scrambled(module, size=0.1, seed=0):
    """Weights that are nowhere zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return module


def test_all_molecules_share_the_parameters_and_all_are_trained(shared, molecules):
    model = shared()
    names = {name for name, _ in model.named_parameters()}
    assert names == {f"network.{name}" for name, _ in model.network.named_parameters()}
    for molecule in molecules:
        model.zero_grad()
        x = random_conformers(molecule.positions, molecule.bonds, 8, torch.Generator().manual_seed(1))
        model.of(molecule).loss(x, torch.Generator().manual_seed(2)).backward()
        gradients = [p.grad for p in model.parameters()]
        assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in gradients)
    buffers = {f"network.{name}" for name, _ in model.network.named_buffers() if "frequencies" not in name}
    assert set(model.state_dict()) == names | buffers


def test_prior_has_the_spread_of_the_rough_conformers(shared, molecules, monkeypatch):
    monkeypatch.setattr(models, "N_CONFORMERS", 1024)
    # of the network, which has no part in it
    monkeypatch.setattr(SharedDistanceVectorField, "calibrate", lambda self, positions_at: None)
    silent = shared(size=0.0, width=4, n_rounds=1, embedding_width=4)  # an untrained network is silent
    molecule = molecules[0]
    flow = silent.eval().of(molecule)
    generator = torch.Generator().manual_seed(0)
    rough = random_conformers(molecule.positions, molecule.bonds, 1024, generator)  # what it is calibrated on
    # what is left of the flow is its linear part, whose samples have the covariance that it was calibrated on
    x, _ = flow.sample(1024, torch.Generator().manual_seed(0), solver=SolverSettings("rk4", steps=4))
    for given in (x, rough):
        assert given.mean(1).abs().max() < 1e-5
    floor = 3 * (molecule.n_atoms - 1) * (0.1 * 0.16) ** 2
    ratio = x.square().sum((1, 2)).mean() / (rough.square().sum((1, 2)).mean() + floor)
    assert ratio.item() == pytest.approx(1, abs=0.05)


def test_a_network_without_bind_is_shared_as_it_is(family, molecules):
    sizes = ["n_layers=2", "n_scalars=8", "n_vectors=4"]
    words = ["flow.model.whiten=false", "flow.model.length_scale=0.1", "flow.model.coupling=independent"]
    words += [f"flow.network.{size}" for size in sizes]
    config = compose("train", ["system=dipeptides", "budget=paper", "network@flow.network=gvp", *words])
    model = make(config, family, "flow")
    scrambled(model.network)
    settings = OmegaConf.to_container(config.flow.model)
    for molecule in molecules:
        alone = InterpolantFlow(model.network, molecule.n_atoms, 3, features=molecule.features, **settings)
        x = molecule.positions[None].repeat(2, 1, 1)
        one, other = (flow.loss(x, torch.Generator().manual_seed(0)) for flow in (model.of(molecule), alone))
        torch.testing.assert_close(one, other)


def test_scales_of_frames_are_those_of_one_molecule(family, molecules):
    config = compose("train", ["system=AG", "budget=smoke"])
    one, other = molecules
    model = make(config, one, "flow")
    frames = random_conformers(one.positions, one.bonds, 64, torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.calibrate(one, frames, torch.Generator().manual_seed(1))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed  # saved with the weights
    assert changed.isdisjoint(name for name, _ in model.named_parameters())
    again = make(config, one, "flow")
    again.load_state_dict(model.state_dict())
    solver = SolverSettings("heun", steps=2)
    x = [m.of(one).eval().sample(2, torch.Generator().manual_seed(0), solver=solver)[0] for m in (model, again)]
    assert x[0].isfinite().all()
    assert torch.equal(*x)
    with pytest.raises(UserError, match="none of GS: draw AG"):
        model.of(other)
    with pytest.raises(UserError, match=r"set flow\.scales=conformers"):
        make(config, family, "flow")
    config.flow.scales = "guesses"
    with pytest.raises(UserError, match="choose one of frames, conformers"):
        make(config, one, "flow")
