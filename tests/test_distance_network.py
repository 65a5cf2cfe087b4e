"""Networks on distances: their coordinates and gradients, and the flow's whitening."""

import math

import pytest
import torch

from boltznce.flows.interpolant_flow import InterpolantFlow
from boltznce.flows.prior import mean_free
from boltznce.flows.solvers import SolverSettings
from boltznce.networks.distance import DistanceVectorField
from boltznce.networks.geometry import MolecularGeometry, bonded_quadruples

BONDS = [(0, 1), (1, 2), (1, 3), (1, 4), (4, 5)]
N = 6


def positions(batch=8, seed=0, dtype=torch.float64):
    return mean_free(torch.randn(batch, N, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype))


def randomized(network, size=0.3):
    """Nothing zero: outputs that start at zero would satisfy every symmetry."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    x = positions(256, 5, torch.float32)
    network.calibrate(lambda t: (1 - t) * x + t * positions(256, 6, torch.float32))
    return network.double()


def test_along_gradients_is_the_gradient_of_the_values():
    geometry = MolecularGeometry(N, bonded_quadruples(BONDS)).double()
    x = positions().requires_grad_(True)
    values, parts = geometry.values(x)
    strengths = torch.randn(values.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((values * strengths).sum(), x)
    steepness = torch.ones_like(values)
    steepness[:, : geometry.n_pairs] = values[:, : geometry.n_pairs].detach()
    torch.testing.assert_close(geometry.along_gradients(strengths, parts, steepness), gradient, rtol=1e-5, atol=1e-6)


def test_signed_volumes_of_a_known_tetrahedron_and_its_mirror_image():
    geometry = MolecularGeometry(4, [(0, 1, 2, 3)])
    x = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 2]]])
    assert geometry.values(x)[0][0, -1].item() == pytest.approx(2.0)
    assert geometry.values(-x)[0][0, -1].item() == pytest.approx(-2.0)


def test_quadruples_of_a_branched_chain():
    found = bonded_quadruples(BONDS)
    assert (0, 1, 4, 5) in found
    assert (1, 0, 2, 3) in found
    assert len(found) == 3 + 4  # torsions about 1-4; triples of the four neighbours of atom 1


@pytest.mark.parametrize("chiral", [True, False])
def test_density_of_mirror_images(chiral):
    """q(x) = q(-x) for a network blind to handedness, which mending chirality rests on, and for no other."""
    network = randomized(DistanceVectorField(N, 16, 2, 1, BONDS, chiral), size=0.03)
    flow = InterpolantFlow(network, N, 3).double()
    flow.basis = flow.basis.double()
    x = positions(4)
    solver = SolverSettings("rk4", steps=4)
    difference = (flow.log_prob(x, solver=solver) - flow.log_prob(-x, solver=solver)).abs()
    assert difference.isfinite().all()
    assert (difference.max() > 1e-3) if chiral else (difference.max() < 1e-6)


@pytest.mark.parametrize(("solver", "floor"), [(SolverSettings("rk4", steps=30), 0.0), (SolverSettings("dopri5"), 0.1)])
def test_whitened_flow_is_normalized(solver, floor):
    """With a network that adds nothing it is the Gaussian of the data's covariance, whose density is known.

    The translation has no part in it: one factor √(1 + floor²) an axis more would be 0.0149 in log q.
    """

    class Nothing(torch.nn.Module):
        def forward(self, x, t, features=None):
            return torch.zeros_like(x)

    mix = torch.randn(N, N, generator=torch.Generator().manual_seed(0))
    data = mean_free(mix @ torch.randn(20000, N, 3, generator=torch.Generator().manual_seed(1))) * 0.1
    flow = InterpolantFlow(Nothing(), N, 3, length_scale=0.1, whiten=True, whiten_floor=floor)
    flow.calibrate(data)
    x, log_q = flow.sample(2000, torch.Generator().manual_seed(2), solver=solver, likelihood="exact")
    covariance = torch.einsum("bid,bjd->ij", data.double(), data.double()) / (3 * len(data))
    values, vectors = torch.linalg.eigh(covariance + (0.1 * floor) ** 2 * torch.eye(N))
    coordinates = torch.einsum("bid,ik->bkd", x.double(), vectors[:, 1:])
    exact = (
        -0.5 * (coordinates.square() / values[1:, None]).sum((1, 2)) - 1.5 * torch.log(2 * math.pi * values[1:]).sum()
    )
    torch.testing.assert_close(log_q, exact, atol=0.003, rtol=0)
    torch.testing.assert_close(flow.log_prob(x, solver=solver), exact, atol=0.003, rtol=0)


def test_stiff_gradients_are_those_of_the_standardized_distances():
    network = randomized(DistanceVectorField(N, 16, 2, 1, BONDS, True))
    x = positions(3)
    n_pairs = network.geometry.n_pairs
    # (pairs, batch, n, 3) of the sum over the batch: a distance depends on its own sample only
    jacobian = torch.autograd.functional.jacobian(lambda y: network.geometry.values(y)[0][:, :n_pairs].sum(0), x)
    expected = (jacobian / network.geometry.spread[0, :n_pairs].reshape(-1, 1, 1, 1)).transpose(0, 1)
    torch.testing.assert_close(network.stiff_gradients(x), expected, atol=1e-4, rtol=1e-4)
