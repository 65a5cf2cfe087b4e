"""Flows against known answers: linear velocity fields, whose flows are Gaussian."""

import math

import pytest
import torch

from boltznce.errors import UserError
from boltznce.flows.coupling import COUPLINGS, rotation_onto
from boltznce.flows.divergence import Probes, exact_divergence, hutchinson_divergence
from boltznce.flows.interpolant import INTERPOLANTS, make_interpolant
from boltznce.flows.interpolant_flow import InterpolantFlow
from boltznce.flows.prior import mean_free, subspace_basis
from boltznce.flows.solvers import SolverSettings
from boltznce.networks.mlp import MLPVectorField

SOLVERS = [
    SolverSettings("dopri5", rtol=1e-7, atol=1e-7),
    SolverSettings("rk4", steps=20),
    SolverSettings("heun", steps=200),
    SolverSettings("heun", steps=800, divergence_every=4),
]


class GaussianVelocity(torch.nn.Module):
    """The exact velocity of an interpolant between N(0, s²) data and the standard normal prior, of either kind."""

    def __init__(self, s: float, interpolant: str, endpoint: bool = False) -> None:
        super().__init__()
        self.s, self.interpolant, self.endpoint = s, make_interpolant(interpolant), endpoint

    def forward(self, x, t, features=None):
        path, t = self.interpolant, t.reshape(-1, 1, 1)
        a, b = path.alpha(t) * self.s**2, path.sigma(t)
        variance = path.alpha(t) ** 2 * self.s**2 + b**2
        if self.endpoint:
            return a / variance * x
        return (path.d_alpha(t) * a + path.d_sigma(t) * b) / variance * x


def log_normal(x, s, d):
    return -0.5 * (x.double() / s).square().sum(dim=(-2, -1)) - d * math.log(s * math.sqrt(2 * math.pi))


@pytest.mark.parametrize("interpolant", INTERPOLANTS)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.method)
@pytest.mark.parametrize("centred", [True, False])
def test_exact_likelihood_of_a_gaussian_flow_in_both_directions(interpolant, solver, centred):
    s, scale, n = 0.3, 0.2, 5
    flow = InterpolantFlow(
        GaussianVelocity(s, interpolant), n, 3, length_scale=scale, centred=centred, interpolant=interpolant
    ).double()
    flow.basis = flow.basis.double()
    generator = torch.Generator().manual_seed(0)
    x, log_q = flow.sample(64, generator, solver=solver, likelihood="exact")
    exact = log_normal(x, s * scale, flow.dimension)
    torch.testing.assert_close(log_q, exact, atol=2e-3, rtol=0)
    torch.testing.assert_close(flow.log_prob(x, solver=solver), exact, atol=2e-3, rtol=0)


@pytest.mark.parametrize("interpolant", INTERPOLANTS)
def test_samples_have_the_variance_of_the_data(interpolant):
    s, n = 0.3, 4
    flow = InterpolantFlow(GaussianVelocity(s, interpolant), n, 3, interpolant=interpolant)
    x, _ = flow.sample(4000, torch.Generator().manual_seed(1), solver=SOLVERS[1])
    assert abs(x.mean(dim=1)).max() < 1e-5
    # 4000 · 9 degrees of freedom: the standard error of a variance is 0.75%
    assert (x.square().sum() / (4000 * flow.dimension) / s**2).item() == pytest.approx(1, abs=0.03)


def test_hutchinson_is_unbiased_and_exact_for_an_isotropic_field():
    torch.manual_seed(0)  # whatever ran before
    flow = InterpolantFlow(MLPVectorField(3, 3, 16, 2), 3, 3)
    for parameter in flow.network.mlp.outlet.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(2)
    x = mean_free(torch.randn(8, 3, 3, generator=generator))
    t = torch.full((8,), 0.4)
    _, exact = exact_divergence(lambda y: flow.velocity(y, t), x, flow.basis)
    _, estimate = hutchinson_divergence(lambda y: flow.velocity(y, t), x, Probes(4000, flow.basis, generator)(x))
    torch.testing.assert_close(estimate, exact, atol=0.15, rtol=0.03)


def test_probes_along_the_stiffness_of_a_field_that_relaxes_it_have_no_noise():
    """v = -H x with H = Σ g gᵀ: one probe along H's eigenvectors gives the trace; Cartesian signs do not."""
    n, generator = 4, torch.Generator().manual_seed(4)
    basis = subspace_basis(n, 3, True)
    gradients = torch.randn(6, 20, n, 3, generator=generator, dtype=torch.float64)  # of every sample its own
    on_space = gradients.flatten(2) @ basis.flatten(1).T @ basis.flatten(1)
    stiffness = on_space.mT @ on_space
    x = mean_free(torch.randn(6, n, 3, generator=generator, dtype=torch.float64))

    def field(y):
        return -torch.einsum("bij,bj->bi", stiffness, y.flatten(1)).unflatten(1, (n, 3))

    exact = -stiffness.diagonal(dim1=-2, dim2=-1).sum(-1)
    along = Probes(1, basis, generator, gradients=lambda y: gradients)(x)
    torch.testing.assert_close(along.flatten(2) @ basis.flatten(1).T @ basis.flatten(1), along.flatten(2))
    torch.testing.assert_close(hutchinson_divergence(field, x, along)[1], exact)
    plain = Probes(1, basis, generator)(x)
    assert ((hutchinson_divergence(field, x, plain)[1] - exact).abs() > 1e-3 * exact.abs()).all()


def test_probes_are_drawn_anew_unless_fixed():
    basis, x = subspace_basis(4, 3, True), torch.zeros(5, 4, 3, dtype=torch.float64)
    fresh, fixed = (Probes(2, basis, torch.Generator().manual_seed(0), fixed=fixed) for fixed in (False, True))
    assert fresh(x).shape == (2, 5, 4, 3)
    assert not torch.equal(fresh(x), fresh(x))
    assert torch.equal(fixed(x), fixed(x))


def test_trace_on_the_subspace_equals_the_full_trace_of_a_translation_invariant_field():
    torch.manual_seed(0)
    flow = InterpolantFlow(MLPVectorField(4, 3, 16, 2), 4, 3)
    t = torch.full((5,), 0.3)
    x = mean_free(torch.randn(5, 4, 3))

    def raw(y):
        return flow.network(mean_free(y), t)

    _, full = exact_divergence(raw, x, torch.eye(12).reshape(12, 4, 3))
    _, projected = exact_divergence(lambda y: flow.velocity(y, t), x, flow.basis)
    torch.testing.assert_close(projected, full, atol=1e-5, rtol=1e-5)


def test_subspace_basis_is_orthonormal_and_mean_free():
    basis = subspace_basis(6, 3, True)
    assert basis.shape == (15, 6, 3)
    torch.testing.assert_close(basis.flatten(1) @ basis.flatten(1).T, torch.eye(15, dtype=torch.float64))
    assert basis.mean(dim=1).abs().max() < 1e-12


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_conversions_agree_with_the_gaussian_closed_forms(name):
    path, s = make_interpolant(name), 0.5
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    x = torch.randn(7, 3, 2, dtype=torch.float64)
    v = GaussianVelocity(s, name)(x, t)
    x0 = GaussianVelocity(s, name, endpoint=True)(x, t)
    torch.testing.assert_close(path.velocity_from_endpoint(x, x0, t), v)
    # derivatives of the schedule
    t.requires_grad_(True)
    for function, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        (slope,) = torch.autograd.grad(function(t).sum(), t)
        torch.testing.assert_close(derivative(t.detach()), slope)


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_unclipped_endpoint_loss_is_velocity_matching(name):
    s, n = 0.5, 3
    x = torch.randn(256, n, 3) * s
    kwargs = {"interpolant": name, "t_min": 0.01}
    by_velocity = InterpolantFlow(GaussianVelocity(0.8, name), n, 3, **kwargs)
    by_endpoint = InterpolantFlow(GaussianVelocity(0.8, name, endpoint=True), n, 3, objective="endpoint", **kwargs)
    one = by_velocity.loss(x, torch.Generator().manual_seed(0))
    other = by_endpoint.loss(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=0)


def test_couplings_keep_the_samples_and_shorten_the_paths():
    generator = torch.Generator().manual_seed(0)
    x0, x1 = (mean_free(torch.randn(64, 5, 3, generator=generator)) for _ in range(2))
    length = {}
    for name, couple in COUPLINGS.items():
        a, b = couple(x0, x1)
        torch.testing.assert_close(b, x1)
        # the multiset of data points is kept up to rotations: compare sorted radii
        torch.testing.assert_close(a.norm(dim=(-2, -1)).sort()[0], x0.norm(dim=(-2, -1)).sort()[0])
        length[name] = (a - b).square().sum().item()
    assert length["ot_kabsch"] < length["ot"] < length["independent"]
    assert length["kabsch"] < length["independent"]


def test_kabsch_finds_a_known_rotation_and_never_reflects():
    generator = torch.Generator().manual_seed(0)
    x = mean_free(torch.randn(32, 6, 3, generator=generator))
    rotation = torch.linalg.qr(torch.randn(32, 3, 3, generator=generator))[0]
    rotation = rotation * torch.det(rotation).reshape(-1, 1, 1)
    torch.testing.assert_close(rotation_onto(x, x @ rotation), rotation, atol=1e-4, rtol=1e-4)
    assert torch.allclose(torch.det(rotation_onto(x, -x)), torch.ones(32), atol=1e-4)


def test_bad_settings_are_one_sentence():
    network = GaussianVelocity(1.0, "linear")
    for kwargs in (
        {"coupling": "nearest"},
        {"interpolant": "cubic"},
        {"objective": "noise"},
        {"objective": "endpoint"},
    ):
        with pytest.raises(UserError):
            InterpolantFlow(network, 3, 3, **kwargs)
    with pytest.raises(UserError, match="dopri5"):
        SolverSettings("euler")
    with pytest.raises(UserError, match="hutchinson"):
        InterpolantFlow(network, 3, 3).log_prob(torch.zeros(1, 3, 3), method="guess")
