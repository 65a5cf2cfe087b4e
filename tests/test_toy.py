"""The systems in the plane against their own densities: normalization, draws, temperature, what is known of them."""

import math

import numpy as np
import pytest
import torch

from boltznce import UserError, free_energy_difference, load_system
from boltznce.systems.toy import DoubleWell, GaussianMixture

NAMES = ("gaussians8", "gaussians8_unequal", "checkerboard", "two_moons", "gaussians40", "mueller_brown", "double_well")
SMOOTH = tuple(name for name in NAMES if name != "checkerboard")
MIXTURES = ("gaussians8", "gaussians8_unequal", "two_moons", "gaussians40")


@pytest.fixture(scope="module")
def systems():
    return {name: load_system(name) for name in NAMES}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_system(systems, name):
    system = systems[name]
    assert (system.name, system.n_atoms, system.dim, system.translation_invariant) == (name, 1, 2, False)
    x = system.sample(100, generator())
    assert x.shape == (100, 1, 2)
    assert x.dtype == torch.float32
    torch.testing.assert_close(system.sample(100, generator()), x)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_densities_are_normalized(systems, name, factor):
    """On another grid than the one that the normalizer comes from, with points of a lattice in place of midpoints."""
    system = systems[name].at_temperature(factor * systems[name].temperature)
    (x0, x1), (y0, y1) = ((2 * low - high, 2 * high - low) for low, high in system.box)  # three times as wide
    n = 630 if name != "checkerboard" else 750
    axes = [low + (high - low) / n * (torch.arange(n, dtype=torch.float64) + 0.5) for low, high in ((x0, x1), (y0, y1))]
    total = sum(system.log_prob(part.unsqueeze(1)).exp().sum() for part in torch.cartesian_prod(*axes).split(60_000))
    assert total * (x1 - x0) * (y1 - y0) / n**2 == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_are_their_own_densities(systems, name):
    assert systems[name].log_normalizer == pytest.approx(0.0, abs=1e-6)


def test_a_gaussian_at_another_temperature_is_a_gaussian():
    """p^(1/T) has the variance T σ²."""
    system = GaussianMixture(
        name="one", means=[[0.3, -0.2]], std=0.5, box=[[-5, 5], [-5, 5]], state=["x", [0.3, math.inf]]
    ).at_temperature(2.0)
    x = torch.randn(200, 1, 2, dtype=torch.float64, generator=generator())
    squares = (x[:, 0] - torch.tensor([0.3, -0.2], dtype=torch.float64)).square().sum(-1)
    torch.testing.assert_close(
        system.log_prob(x), -squares / (2 * 2 * 0.25) - math.log(2 * math.pi * 2 * 0.25), atol=1e-8, rtol=0
    )
    draws = system.sample(100_000, generator())[:, 0]
    torch.testing.assert_close(draws.var(dim=0), torch.full((2,), 0.5), atol=0.01, rtol=0)
    assert system.reference()["delta_f"]["value"] == pytest.approx(0.0, abs=2e-3)  # the border falls into a cell


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_draws_follow_the_density(systems, name, factor):
    """Counts in the cells of a coarse grid by chi-square, at three temperatures."""
    system = systems[name].at_temperature(factor * systems[name].temperature)
    n, bins = 40_000, 20
    draws = system.sample(n, generator(1))[:, 0].numpy()
    edges = [np.linspace(*side, bins + 1) for side in system.box]
    counts = np.histogram2d(draws[:, 0], draws[:, 1], bins=edges)[0]
    fine = system.grid(20 * bins)
    cell = math.prod((high - low) / (20 * bins) for low, high in system.box)
    p = (
        torch.cat([system.log_prob(part) for part in fine.split(40_000)])
        .exp()
        .numpy()
        .reshape(bins, 20, bins, 20)
        .sum(axis=(1, 3))
        * cell
    )
    expected = n * p
    seen = expected > 10
    chi_square = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
    degrees = seen.sum()
    assert abs(chi_square - degrees) < 4.5 * math.sqrt(2 * degrees)
    assert counts[~seen].sum() == pytest.approx(expected[~seen].sum(), abs=5 * math.sqrt(expected[~seen].sum() + 1))


@pytest.mark.parametrize("name", NAMES)
def test_normalizers_follow_the_temperature(systems, name):
    system = systems[name]
    hot = system.at_temperature(2 * system.temperature)
    assert hot.at_temperature(system.temperature).log_normalizer == pytest.approx(system.log_normalizer)
    if name != "checkerboard":
        # d log Z / d(1/T) = -<U>
        h = 1e-3
        near = [system.at_temperature(system.temperature / (1 + s * h)).log_normalizer for s in (1, -1)]
        mean = system.energy(system.sample(200_000, generator()).double()).mean()
        assert (near[0] - near[1]) / (2 * h) == pytest.approx(-float(mean), abs=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_what_draws_give(systems, name):
    system = systems[name]
    x = system.sample(200_000, generator(2)).numpy()
    coordinate, state = system.state
    found = free_energy_difference(system.coordinate(x, coordinate), None, state, n_bootstrap=50)
    assert found.value == pytest.approx(system.reference()["delta_f"]["value"], abs=4.5 * found.std_error)
    shares = np.bincount(system.mode(torch.from_numpy(x)).numpy(), minlength=len(system.mode_weights)) / len(x)
    np.testing.assert_allclose(shares, system.mode_weights, atol=4.5 * np.sqrt(system.mode_weights.max() / len(x)))


def test_known_free_energies(systems):
    delta_f = {name: system.reference()["delta_f"]["value"] for name, system in systems.items()}
    assert delta_f["gaussians8"] == pytest.approx(0.0, abs=1e-9)  # by symmetry
    # up to the overlap of neighbours
    assert delta_f["gaussians8_unequal"] == pytest.approx(math.log(0.74 / 0.26), abs=1e-3)
    assert delta_f["checkerboard"] == pytest.approx(math.log(1.5), abs=1e-9)  # 20 of 50 cells
    np.testing.assert_allclose(
        systems["gaussians8_unequal"].mode_weights, [0.02, 0.05, 0.08, 0.11, 0.13, 0.15, 0.18, 0.28], atol=2e-4
    )
    well = DoubleWell(
        name="even", barrier=5.0, tilt=0.0, stiffness=4.0, box=[[-2, 2], [-2, 2]], state=["x", [0, math.inf]]
    )
    assert well.reference()["delta_f"]["value"] == pytest.approx(0.0, abs=1e-9)


def test_the_profile_of_a_reference_integrates_to_its_populations(systems):
    reference = systems["double_well"].reference()
    x, f = (np.asarray(reference["profile"][key]) for key in ("phi", "f"))
    p = np.exp(-np.nan_to_num(f, nan=np.inf))
    assert np.log(p[x < 0].sum() / p[x > 0].sum()) == pytest.approx(reference["delta_f"]["value"], abs=1e-6)


def test_mueller_brown_has_its_published_stationary_points(systems):
    known = {
        (-0.558, 1.442): -146.70,
        (0.623, 0.028): -108.17,
        (-0.050, 0.467): -80.77,
        (-0.822, 0.624): -40.66,
        (0.212, 0.293): -72.25,
    }
    x = torch.tensor(list(known), dtype=torch.float64).unsqueeze(1).requires_grad_(True)
    potential = systems["mueller_brown"].potential(x[:, 0])
    np.testing.assert_allclose(potential.detach(), list(known.values()), atol=0.01)
    assert torch.autograd.grad(potential.sum(), x)[0].abs().max() < 1.0  # of a surface with slopes of hundreds


def test_gaussians40_is_the_published_mixture(systems):
    torch.manual_seed(0)
    torch.testing.assert_close(
        systems["gaussians40"].means, ((torch.rand(40, 2) - 0.5) * 2 * 40).double(), atol=1e-4, rtol=0
    )
    assert systems["gaussians40"].std == pytest.approx(math.log(1 + math.e), abs=1e-6)


def test_the_checkerboard_has_no_gradient(systems):
    board = systems["checkerboard"]
    assert not board.differentiable
    x = board.sample(10, generator()).requires_grad_(True)
    with pytest.raises(UserError, match="checkerboard has no gradient"):
        board.energy(x)
    with torch.no_grad():
        assert (board.energy(x) == 0).all()
    assert len(board.mode_weights) == 50
    np.testing.assert_allclose(board.mode_weights, 0.02, atol=1e-12)
    assert board.energy(torch.tensor([[[0.1, 0.5]], [[0.1, 0.1]], [[9.0, 9.0]]])).tolist() == [1e4, 0.0, 1e4]


def test_coordinates(systems):
    system = systems["gaussians8"]
    x = torch.tensor([[[0.0, 2.0]], [[-1.0, 0.0]]])
    torch.testing.assert_close(system.coordinate(x, "angle"), torch.tensor([math.pi / 2, math.pi]))
    np.testing.assert_allclose(system.coordinate(x.numpy(), "diagonal"), [-math.sqrt(2), -math.sqrt(0.5)], rtol=1e-6)
    assert system.coordinate_range("angle") is None
    assert system.coordinate_range("y") == (-1.8, 1.8)
    with pytest.raises(UserError, match="angle, diagonal, x, y"):
        system.coordinate(x, "phi")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gaussians8", {"weights": [1, -1]}, "positive weight"),
        ("checkerboard", {"cell": 0.3}, "multiple"),
        ("double_well", {"temperature": -1}, "positive"),
        ("double_well", {"state": ["x", [1, 0]]}, "low below high"),
        ("double_well", {"state": ["z", [0, 1]]}, "diagonal"),
        ("double_well", {"colour": "red"}, "barrier"),
    ],
)
def test_mistakes(name, settings, message):
    with pytest.raises(UserError, match=message):
        load_system(name, **settings)


def test_data_of_other_settings_have_another_identity(systems):
    assert systems["gaussians8"].identity == load_system("gaussians8").identity
    assert systems["gaussians8"].identity != load_system("gaussians8", std=0.12).identity
