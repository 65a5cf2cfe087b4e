"""Splines, couplings and the flow on the cube: log-determinants, normalization on grids, edges, a fit."""

import functools
import math

import pytest
import torch
from torch import nn

import boltznce as bz
from boltznce.errors import UserError
from boltznce.flows.box import BoxCoordinates
from boltznce.flows.internal import InternalCoordinates
from boltznce.flows.spline import rational_quadratic
from boltznce.flows.spline_flow import ARCHITECTURES, SplineFlow, hierarchical, random_masks
from boltznce.systems.stiffness import harmonic_constants


class Cube(nn.Module):
    """Positions that are the cube's own coordinates, some of them on a circle."""

    def __init__(self, n_bounded, n_circular):
        super().__init__()
        self.dimension = n_bounded + n_circular
        self.register_buffer("circular", torch.arange(self.dimension) >= n_bounded)
        thirds = torch.arange(self.dimension).tensor_split(3)
        self.groups = dict(zip(("bonds", "angles", "torsions"), (third.tolist() for third in thirds), strict=True))

    def to_unit(self, positions):
        y = positions.flatten(1)
        return torch.where(self.circular, y - y.floor(), y), torch.zeros(len(y), dtype=y.dtype)

    def to_positions(self, y):
        return y.unsqueeze(1), torch.zeros(len(y), dtype=y.dtype)


def shaken(flow, scale=0.3, seed=0):
    """The flow with random weights in its last layers."""
    generator = torch.Generator().manual_seed(seed)
    for coupling in flow.couplings:
        for parameter in coupling.layers[-1].parameters():
            nn.init.normal_(parameter, std=scale, generator=generator)
    return flow


def small(coordinates, **settings):
    torch.manual_seed(0)
    return SplineFlow(coordinates, **{"n_pairs": 2, "width": 16, "depth": 2} | settings)


@functools.cache
def aldp():
    system = bz.load_system("aldp")
    bonds, angles = harmonic_constants(system.openmm_system())
    core = {atom for atoms in system.dihedrals.values() for atom in atoms}
    coordinates = InternalCoordinates(
        system.positions,
        system.bonds,
        core=core,
        bond_constants=bonds,
        angle_constants=angles,
        stereocentres=system.stereocentres,
        methyl_groups=system.methyl_groups,
    )
    return system, coordinates


# ---- the spline -----------------------------------------------------------------------------------------------------


def parameters(n_bins, n, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(n_bins)
    return [scale * torch.randn(k, n, generator=generator, dtype=dtype) for k in (n_bins, n_bins, n_bins + 1)]


@pytest.mark.parametrize("n_bins", [1, 2, 8])
def test_spline_and_its_inverse(n_bins):
    x = torch.linspace(0, 1, 401, dtype=torch.float64)
    tables = parameters(n_bins, 401)
    y, log_slope = rational_quadratic(x, *tables)
    again, log_back = rational_quadratic(y, *tables, inverse=True)
    torch.testing.assert_close(again, x, atol=1e-10, rtol=0)
    torch.testing.assert_close(log_back, -log_slope, atol=1e-8, rtol=0)
    x.requires_grad_()
    y, log_slope = rational_quadratic(x, *tables)
    (slope,) = torch.autograd.grad(y[1:-1].sum(), x)
    torch.testing.assert_close(slope[1:-1].log(), log_slope[1:-1], atol=1e-9, rtol=0)


def test_float32_inverse_is_accurate_at_both_edges():
    """The float64 spline of the float32 inverse is the input again, to the rounding of bins and inputs."""
    tables = parameters(8, 2000, torch.float64, 2.0)
    for y in (torch.logspace(-7, -1, 2000, dtype=torch.float64), 1 - torch.logspace(-7, -1, 2000, dtype=torch.float64)):
        x, _ = rational_quadratic(y.float(), *(table.float() for table in tables), inverse=True)
        again, log_slope = rational_quadratic(x.double(), *tables)
        assert ((again - y.float()).abs() < 1e-6 + 2.4e-7 * log_slope.exp()).all()


@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_are_those_of_finite_differences(inverse):
    x = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    tables = [
        torch.randn(k, 3, 5, generator=torch.Generator().manual_seed(k), dtype=torch.float64, requires_grad=True)
        for k in (4, 4, 5)
    ]
    assert torch.autograd.gradcheck(
        lambda *inputs: rational_quadratic(*inputs, inverse=inverse), (x, *tables), eps=1e-7, atol=1e-5
    )


@pytest.mark.parametrize("n_bins", [1, 8])
def test_one_spline_is_monotonic_from_corner_to_corner_with_a_continuous_slope(n_bins):
    tables = [table[:, :1].expand(-1, 5001) for table in parameters(n_bins, 1)]
    x = torch.linspace(0, 1, 5001, dtype=torch.float64)
    y, log_slope = rational_quadratic(x, *tables)
    assert (y.diff() > 0).all()
    torch.testing.assert_close(y[[0, -1]], x[[0, -1]], atol=1e-12, rtol=0)
    torch.testing.assert_close(
        (log_slope.exp()[:-1] + log_slope.exp()[1:]).sum() / 10000, torch.tensor(1.0).double(), atol=1e-3, rtol=0
    )


def test_zero_parameters_are_the_identity():
    x = torch.rand(7, 50, dtype=torch.float64)
    y, log_slope = rational_quadratic(x, *(torch.zeros(k, 7, 50, dtype=torch.float64) for k in (8, 8, 9)))
    torch.testing.assert_close(y, x, atol=1e-14, rtol=0)
    torch.testing.assert_close(log_slope, torch.zeros_like(x), atol=1e-14, rtol=0)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_float32_at_the_edges_of_bins_and_interval(inverse, scale):
    """Inputs on the edges themselves, at 0 and 1, and neighbouring floats, with bins down to their smallest size."""
    tables = [table.requires_grad_() for table in parameters(8, 40, torch.float32, scale)]
    sizes = 1e-3 + (1 - 8e-3) * tables[1 if inverse else 0].detach().softmax(0)
    edges = torch.cat([torch.zeros(1, 40), sizes.cumsum(0)]).clamp(0, 1)
    for x in (edges, edges.nextafter(torch.tensor(2.0)).clamp(0, 1), edges.nextafter(torch.tensor(-1.0)).clamp(0, 1)):
        x = x.clone().requires_grad_()
        y, log_slope = rational_quadratic(
            x, *(table.unsqueeze(1).expand(-1, 9, -1) for table in tables), inverse=inverse
        )
        assert ((y >= 0) & (y <= 1)).all()
        assert log_slope.isfinite().all()
        gradients = torch.autograd.grad(y.sum() + log_slope.sum(), [x, *tables])
        assert all(gradient.isfinite().all() for gradient in gradients)


# ---- the flow on the cube -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_untrained_flow_is_its_prior(architecture):
    flow = small(Cube(4, 5), architecture=architecture).double()
    y = torch.rand(64, 9, dtype=torch.float64)
    z, log_det = flow._through(y)
    torch.testing.assert_close(z, y, atol=1e-14, rtol=0)
    torch.testing.assert_close(log_det, torch.zeros_like(log_det), atol=1e-12, rtol=0)
    normal = torch.distributions.Normal(*torch.tensor([0.5, 0.1], dtype=torch.float64))
    inside = (normal.cdf(torch.ones(1)) - normal.cdf(torch.zeros(1))).log()
    expected = (normal.log_prob(y[:, :4]) - inside).sum(1)
    torch.testing.assert_close(flow.log_prob(y.unsqueeze(1)), expected)


def test_prior_samples_have_the_priors_moments():
    flow = small(Cube(3, 3))
    y = flow.sample(20000, torch.Generator().manual_seed(0))[0].squeeze(1)
    assert ((y >= 0) & (y <= 1)).all()
    assert y[:, :3].mean().item() == pytest.approx(0.5, abs=0.002)
    assert y[:, :3].std().item() == pytest.approx(0.1, abs=0.001)
    assert y[:, 3:].std().item() == pytest.approx(math.sqrt(1 / 12), abs=0.003)


@pytest.mark.parametrize("settings", [{}, {"architecture": "hierarchical"}, {"prior_std": None}])
def test_fixed_log_prob_of_a_draw_has_the_gradient_of_log_prob(settings):
    flow = shaken(small(Cube(3, 4), **settings), 0.5).double()
    x, log_q = flow.sample_with_fixed_log_prob(64, torch.Generator().manual_seed(1))
    drawn = flow.sample(64, torch.Generator().manual_seed(1))
    torch.testing.assert_close((x, log_q.detach()), drawn, rtol=1e-12, atol=1e-12)
    assert not x.requires_grad
    pull = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gradients = [torch.autograd.grad((pull * of).sum(), list(flow.parameters())) for of in (log_q, flow.log_prob(x))]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("settings", [{}, {"architecture": "hierarchical"}, {"prior_std": None}])
def test_path_log_prob_of_a_draw_has_the_gradient_through_the_positions_alone(settings):
    flow = shaken(small(Cube(3, 4), **settings), 0.5).double()
    weights = list(flow.parameters())
    x, log_q = flow.sample_with_path_log_prob(64, torch.Generator().manual_seed(1))
    again, both = flow.sample_with_log_prob(64, torch.Generator().manual_seed(1))
    torch.testing.assert_close((x, log_q), (again, both), rtol=1e-12, atol=1e-10)
    pull = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    of_points = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad((pull * log_q).sum() + (of_points * x).sum(), weights)
    whole = torch.autograd.grad((pull * both).sum() + (of_points * again).sum(), weights)
    at_fixed_points = torch.autograd.grad((pull * flow.log_prob(x.detach())).sum(), weights)
    for path, total, fixed in zip(found, whole, at_fixed_points, strict=True):
        torch.testing.assert_close(path, total - fixed, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("n_bounded", "n_circular"), [(1, 1), (0, 2)])
def test_density_is_normalized_on_a_grid(n_bounded, n_circular):
    flow = shaken(small(Cube(n_bounded, n_circular), n_pairs=2, width=8), 0.2).double()
    n = 400
    middle = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    grid = torch.cartesian_prod(middle, middle).unsqueeze(1)
    with torch.no_grad():
        density = flow.log_prob(grid).exp()
    assert density.max() > 2 * density.mean()
    assert density.mean().item() == pytest.approx(1, abs=3e-4)


def test_outside_of_the_box_the_density_is_zero_and_gradients_are_finite():
    flow = shaken(small(BoxCoordinates(1, [-2, -1], [2, 3])))
    x = torch.tensor([[[0.0, 0.0]], [[2.1, 0.0]], [[2.0, 3.0]], [[0.0, -1.1]]], requires_grad=True)
    log_q = flow.log_prob(x)
    assert log_q.isneginf().tolist() == [False, True, False, True]
    log_q[log_q.isfinite()].sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in flow.parameters())


def test_density_in_the_box_is_per_its_volume():
    flow = SplineFlow(BoxCoordinates(1, [-2, -1], [2, 3]), prior_std=None, n_pairs=1, width=8, depth=1)
    x, log_q = flow.sample(100, torch.Generator().manual_seed(0))
    assert x.shape == (100, 1, 2)
    torch.testing.assert_close(log_q, torch.full_like(log_q, -math.log(16)))
    torch.testing.assert_close(flow.log_prob(x), log_q)


def test_nothing_happens_at_the_cut_of_a_circle():
    """Across ±π map, density and influence on other coordinates are continuous: both sides are one point."""
    flow = shaken(small(Cube(2, 4)), 0.5).double()
    y = torch.rand(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    for k in range(2, 6):
        below, above = y.clone(), y.clone()
        below[:, k], above[:, k] = 1 - 1e-12, 1e-12
        with torch.no_grad():
            torch.testing.assert_close(
                flow.log_prob(below.unsqueeze(1)), flow.log_prob(above.unsqueeze(1)), atol=1e-5, rtol=0
            )
            gap = flow._through(below)[0] - flow._through(above)[0]
        gap[:, 2:] -= gap[:, 2:].round()
        assert gap.abs().max() < 1e-6


@pytest.mark.parametrize("inverse", [False, True])
def test_no_coupling_turns_a_circle_as_a_whole(inverse):
    """The point at a coupling's cut stays, whatever the other coordinates are; another cut in every coupling."""
    flow = shaken(small(Cube(2, 4)), 1.0).double()
    moved = []
    for coupling in flow.couplings:
        y = torch.rand(6, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        circles = coupling.transformed[coupling.n_bounded :]
        others = y[circles].clone()
        y[circles] = coupling.cut
        with torch.no_grad():
            torch.testing.assert_close(coupling(y, inverse=inverse)[0][circles], y[circles], atol=1e-12, rtol=0)
            moved.append(
                (coupling(y.index_copy(0, circles, others), inverse=inverse)[0][circles] - others).abs().amax()
            )
    assert torch.stack(moved).min() > 1e-3
    assert len({coupling.cut for coupling in flow.couplings}) == len(flow.couplings)


def test_gradients_are_finite_at_corners_in_float32():
    flow = shaken(small(Cube(3, 3)), 1.0)
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 0.5, 1.0])] * 6).unsqueeze(1).requires_grad_()
    log_q = flow.log_prob(corners)
    assert log_q.isfinite().all()
    log_q.sum().backward()
    assert corners.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in flow.parameters())
    assert all((p.grad != 0).any() for coupling in flow.couplings for p in coupling.layers[-1].parameters())


def test_bad_settings_are_one_sentence():
    for wrong in ({"architecture": "diagonal"}, {"activation": "step"}):
        with pytest.raises(UserError, match="choose one of"):
            small(Cube(2, 2), **wrong)
    with pytest.raises(UserError, match="hierarchical"):
        small(BoxCoordinates(1, [0, 0], [1, 1]), architecture="hierarchical")


def test_architectures():
    groups = {"bonds": [0, 1, 2, 3, 4], "angles": [5, 6, 7, 8], "torsions": [9, 10, 11]}
    generator = torch.Generator().manual_seed(0)
    pairs = random_masks(groups, 8, generator)
    assert len(pairs) == 16
    assert all(sorted(a + b) == list(range(12)) and abs(len(a) - len(b)) <= 1 for a, b in pairs)
    splits = hierarchical(groups, 8, generator)
    assert len(splits) == 18  # 3 pairs; 2 of (all, pair); 2 of (all, pair)
    kinds = {k: name for name, group in groups.items() for k in group}
    for transformed, given in splits:
        (kind,) = {kinds[k] for k in transformed}
        assert not set(transformed) & set(given)
        above = {"torsions": {"torsions"}, "angles": {"angles", "torsions"}, "bonds": set(groups)}[kind]
        assert {kinds[k] for k in given} <= above


def test_forward_kl_fit_reaches_the_entropy_of_a_known_density():
    """On circle x interval: cross entropy falls from the prior's to within 0.03 nats of the target's entropy."""
    generator = torch.Generator().manual_seed(0)
    n = 20000
    angle = torch.distributions.VonMises(torch.tensor(math.pi - 0.2), torch.tensor(6.0))
    torch.manual_seed(0)
    torsion = angle.sample((n,))
    place = 0.5 + 0.12 * torsion.cos() + 0.03 * torch.randn(n, generator=generator)
    x = torch.stack([place, torsion / (2 * math.pi)], -1).unsqueeze(1)
    log_p = (
        angle.log_prob(torsion)
        + math.log(2 * math.pi)
        + torch.distributions.Normal(0.5 + 0.12 * torsion.cos(), 0.03).log_prob(place)
    )
    flow = small(Cube(1, 1), n_pairs=2, width=32, depth=2)
    start = -flow.log_prob(x).mean() + log_p.mean()
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 150)
        loss = -flow.log_prob(x[torch.randint(n, (256,), generator=generator)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        kl = (log_p - flow.log_prob(x)).mean()
    assert start > 1
    assert -0.01 < kl < 0.03


# ---- with a molecule ------------------------------------------------------------------------------------------------


def test_molecular_samples_have_their_density_back_and_their_hand():
    system, coordinates = aldp()
    flow = shaken(small(coordinates, width=32), 0.1).double()
    x, log_q = flow.sample(64, torch.Generator().manual_seed(0))
    assert x.shape == (64, 22, 3)
    assert (system.chirality(x) == 1).all()
    torch.testing.assert_close(flow.log_prob(x), log_q, atol=1e-6, rtol=0)
    assert flow.log_prob(-x).isneginf().all()


def test_molecular_density_with_the_energy_gives_the_boltzmann_weights_of_a_harmonic_molecule():
    """Water-like, three harmonic terms: weights exp(-u - log q) of the untrained flow have the exact integral."""
    x = torch.tensor([[0.0, 0.06, 0.0], [0.0, 0.0, 0.0], [0.09, -0.02, 0.0]])
    coordinates = InternalCoordinates(
        x, [(0, 1), (1, 2)], bond_constants={(0, 1): 3e5, (1, 2): 3e5}, angle_constants={(0, 1, 2): 400.0}
    )
    flow = small(coordinates, n_pairs=1).double()
    kt = 0.00831446261815324 * 1200
    bonds, theta = coordinates.centre[:2], coordinates.centre[2]

    def energy(x):
        first, second = x[:, 0] - x[:, 1], x[:, 2] - x[:, 1]
        b1, b2 = first.norm(dim=1), second.norm(dim=1)
        angle = torch.acos((first * second).sum(1) / b1 / b2)
        return (1.5e5 * ((b1 - bonds[0]) ** 2 + (b2 - bonds[1]) ** 2) + 200 * (angle - theta) ** 2) / kt

    x, log_q = flow.sample(200000, torch.Generator().manual_seed(0))
    estimate = (-energy(x) - log_q).exp()
    q = [
        torch.linspace(-0.5, 0.5, 20001, dtype=torch.float64) * w + c
        for w, c in zip(coordinates.width, coordinates.centre, strict=True)
    ]
    exact = 1.0
    for values, centre, k, volume in zip(
        q, coordinates.centre, (3e5, 3e5, 400.0), (q[0] ** 2, q[1] ** 2, q[2].sin()), strict=True
    ):
        exact = exact * torch.trapezoid(volume * torch.exp(-0.5 * k * (values - centre) ** 2 / kt), values)
    error = estimate.std() / math.sqrt(len(estimate))
    assert abs(estimate.mean() - exact) < 4 * error
    assert error < 0.001 * exact


def test_reverse_kl_gradient_reaches_every_parameter_through_the_energy():
    system, coordinates = aldp()
    flow = small(coordinates, width=32)
    x, log_q = flow.sample_with_log_prob(32, torch.Generator().manual_seed(0))
    u = system.at_temperature(1200).energy(x).double()
    (log_q + u.clamp_max(1e4)).mean().backward()
    assert all(p.grad.isfinite().all() for p in flow.parameters())
