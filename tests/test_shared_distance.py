"""Distance networks that molecules share: each bound network is what a network of its molecule alone would be."""

import math

import pytest
import torch

from boltznce import load_system
from boltznce.ebm import EnergyBasedModel
from boltznce.flows.interpolant_flow import InterpolantFlow
from boltznce.flows.solvers import SolverSettings
from boltznce.networks.shared_distance import (
    FAR,
    LARGEST,
    SharedDistanceEnergy,
    SharedDistanceVectorField,
    bonds_between,
)
from boltznce.systems.conformers import random_conformers


@pytest.fixture(scope="module")
def molecules():
    return [load_system(name, encoding="numbered") for name in ("AG", "GS")]


def scrambled(module, size=0.1, seed=0):
    """Weights that are nowhere zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return module


def field(size=0.1, **settings):
    torch.manual_seed(0)  # whatever ran before
    sizes = {"width": 16, "n_rounds": 2, "embedding_width": 12}
    return scrambled(SharedDistanceVectorField(79, **(sizes | settings)), size)


def conformers(molecule, n, seed):
    return random_conformers(molecule.positions, molecule.bonds, n, torch.Generator().manual_seed(seed))


def bound(model, network, molecule, **settings):
    """A model of the network bound to one molecule, calibrated on few conformers, which is enough here."""
    of_molecule = network.bind(molecule.features, molecule.bonds)
    flow = model(of_molecule, molecule.n_atoms, features=molecule.features, length_scale=0.16, **settings)
    flow.calibrate(conformers(molecule, 64, 0), torch.Generator().manual_seed(0))
    return flow


def flow_of(network, molecule):
    return bound(InterpolantFlow, network, molecule, whiten=True, coupling="kabsch")


def rotation():
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    return (q * q.det().sign()).float()


def test_bonds_between_atoms():
    chain = [(0, 1), (1, 2), (2, 3), (5, 4)]
    between = bonds_between(chain, 6)
    assert between[0].tolist() == [0, 1, 2, 3, FAR, FAR]
    assert (between == between.T).all()


@pytest.mark.parametrize("chiral", [True, False])
def test_symmetries(molecules, chiral):
    network = field(chiral=chiral)
    for molecule in molecules:
        flow = flow_of(network, molecule).eval()
        x = conformers(molecule, 8, 1) / 0.16
        t = torch.linspace(0.05, 0.95, 8)
        v = flow.velocity(x, t)
        torch.testing.assert_close(flow.velocity(x @ rotation(), t), v @ rotation(), atol=2e-4, rtol=1e-3)
        mirrored = flow.velocity(-x, t)
        assert torch.allclose(mirrored, -v, atol=1e-3) != chiral
        assert flow.parity_equivariant != chiral
        assert flow.tells_atoms_apart


def test_order_of_the_atoms_does_not_matter(molecules):
    """A molecule whose atoms are listed otherwise has the same network, its rows exchanged."""
    network = field(chiral=False)
    molecule = molecules[1]
    order = torch.randperm(molecule.n_atoms, generator=torch.Generator().manual_seed(0))
    place = order.argsort().tolist()
    other = network.bind(molecule.features[order], [(place[a], place[b]) for a, b in molecule.bonds])
    bound = network.bind(molecule.features, molecule.bonds)
    x = torch.randn(4, molecule.n_atoms, 3, generator=torch.Generator().manual_seed(1))
    t = torch.full((4,), 0.3)
    torch.testing.assert_close(other(x[:, order], t), bound(x, t)[:, order], atol=1e-4, rtol=1e-4)


def test_weights_are_remade_when_parameters_change(molecules):
    network = field()
    flow = flow_of(network, molecules[0]).eval()
    x, t = torch.randn(2, molecules[0].n_atoms, 3), torch.full((2,), 0.5)
    with torch.no_grad():
        before = flow.velocity(x, t)
        assert flow.network.weights()[0] is flow.network.weights()[0]
        network.linear.bias.add_(1.0)
        assert not torch.allclose(flow.velocity(x, t), before)
    # with gradients the same, without what was kept
    torch.testing.assert_close(flow.velocity(x, t).detach(), flow.velocity(x, t).detach())


def test_divergences_are_the_change_of_density_along_the_flow(molecules):
    # The known answer: log|det| of the Jacobian of the map along the flow, by derivatives in every direction, against
    # the integral of the exact divergence. Both follow one path, a piece of it that the solver resolves to 1e-4, so
    # what is left between them is float32.
    flow = flow_of(field(), molecules[0]).eval()
    solver, d, n, begin, end = SolverSettings("rk4", steps=32, grid_power=1), flow.dimension, 24, 0.6, 0.5
    start = flow.prior.sample(1, torch.Generator().manual_seed(0))
    through = lambda x: flow._flow(x, begin, end, solver, "none", 1, None)[0]  # noqa: E731
    with torch.no_grad():
        _, columns = torch.func.jvp(through, (start.repeat(d, 1, 1),), (flow.basis,))
        log_det = torch.linalg.slogdet(torch.einsum("aij,bij->ab", flow.basis, columns).double()).logabsdet.item()
        _, integral = flow._flow(start, begin, end, solver, "exact", 1, None)
        _, draws = flow._flow(
            start.repeat(n, 1, 1), begin, end, solver, "hutchinson", 1, torch.Generator().manual_seed(0)
        )
    of_linear_part = 0.5 * d * math.log((end**2 + (1 - end) ** 2) / (begin**2 + (1 - begin) ** 2))
    assert abs(log_det - of_linear_part) > 1  # the network has its part in it
    assert integral.item() == pytest.approx(log_det, abs=2e-3)
    assert draws.mean().item() == pytest.approx(log_det, abs=4 * draws.std().item() / n**0.5 + 2e-3)
    assert draws.std().item() < 2


@pytest.mark.parametrize("size", [0.1, 10.0])
def test_a_flow_with_any_weights_stays_near(molecules, size):
    """A network that makes no sense for a molecule moves it at most LARGEST prior spreads, whatever its weights."""
    flow = flow_of(field(size), molecules[1]).eval()
    solver, seed = SolverSettings("heun", steps=4), 1
    x, log_q = flow.sample(8, torch.Generator().manual_seed(seed), solver=solver, likelihood="hutchinson")
    start = flow.prior.sample(8, torch.Generator().manual_seed(seed))
    # dx/dt = linear(t) x + w with |w| <= LARGEST: the linear part alone takes a length to itself
    moved = flow._scale(x) - start
    n = 3 * molecules[1].n_atoms
    assert log_q.isfinite().all()
    assert (moved.norm(dim=(1, 2)) > 0.1 * n**0.5).all()
    assert (moved.norm(dim=(1, 2)) < 2 * LARGEST * n**0.5).all()


def test_energy(molecules):
    network = scrambled(SharedDistanceEnergy(79, width=16, n_blocks=2, embedding_width=12))
    for molecule in molecules:
        ebm = bound(EnergyBasedModel, network, molecule)
        x = conformers(molecule, 8, 1)
        energy = ebm.log_prob(x)
        torch.testing.assert_close(ebm.log_prob(x @ rotation()), energy, atol=0.02, rtol=1e-4)
        assert energy.std() > 0.1
        losses = ebm.loss(x, torch.Generator().manual_seed(2))
        losses["loss"].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
        network.zero_grad()
    # a molecule's own level: what the two energies at t = 0 differ by is not fixed by their sizes
    assert math.isfinite(float(energy.detach().mean()))
