import numpy as np
import pytest

from boltznce.analysis.metrics import (
    between_halves,
    energy_cut,
    energy_w2,
    held_out_likelihood,
    likelihood_agreement,
    share_above,
    torsion_kl,
    torsion_kl_of_halves,
    torus_w2,
)
from boltznce.errors import UserError


def test_energy_w2_of_gaussians():
    """W2(N(0,1), N(1,1)) = 1 and W2(N(0,1), N(0,2^2)) = 1."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=200_000)
    assert energy_w2(x, generator.normal(size=150_000) + 1.0) == pytest.approx(1.0, abs=0.02)
    assert energy_w2(x, 2.0 * generator.normal(size=150_000)) == pytest.approx(1.0, abs=0.02)
    assert between_halves(energy_w2, x) < 0.02


def test_energy_w2_small_cases_by_hand():
    assert energy_w2([0.0, 3.0], [0.0, 3.0], [1.0, 3.0], [3.0, 1.0]) == pytest.approx(np.sqrt(0.5 * 9.0))
    assert energy_w2([0.0, 1.0, 2.0], [1.0]) == pytest.approx(np.sqrt(2 / 3))
    repeated = np.repeat([0.5, 2.0, 7.0], [1, 2, 3])
    assert energy_w2([0.5, 2.0, 7.0], repeated, [1, 2, 3]) == pytest.approx(0.0, abs=1e-6)


def test_energies_above_the_cut_are_left_out():
    u = np.array([0.0, 1.0, 1e9, np.inf])
    assert energy_w2(u, [0.0, 1.0], cut=50.0) == 0.0
    assert share_above(u, 50.0) == 0.5
    assert share_above(u, 50.0, weights=np.array([3.0, 3.0, 1.0, 1.0])) == 0.25
    assert energy_cut(np.zeros(100)) == 50.0
    with pytest.raises(UserError, match="finite"):
        energy_w2(u, u)
    with pytest.raises(UserError, match="above the cut"):
        energy_w2([100.0], [0.0], cut=50.0)


def test_torus_w2_wraps_around():
    generator = np.random.default_rng(0)
    left, right = np.full((200, 2), -np.pi + 0.05), np.full((200, 2), np.pi - 0.05)
    assert torus_w2(left, right, generator=generator).mean == pytest.approx(np.sqrt(2) * 0.1)
    assert torus_w2(left + 2 * np.pi, left, generator=generator).mean == pytest.approx(0.0, abs=1e-6)
    opposite = left + np.array([np.pi, 0.0])
    assert torus_w2(left, opposite, generator=generator).mean == pytest.approx(np.pi)


def test_torus_w2_of_shifted_points_and_weights():
    generator = np.random.default_rng(1)
    a = generator.normal(scale=0.2, size=(3000, 2))
    distance = torus_w2(a, a + np.array([0.7, 0.0]), n_points=800, n_subsets=3, generator=generator)
    assert distance.n_points == 800
    assert distance.mean == pytest.approx(0.7, abs=0.06)
    assert distance.std > 0.0
    b = np.concatenate([a, a + np.array([2.0, 0.0])])
    weights = np.repeat([1.0, 0.0], 3000)
    weighted = torus_w2(a, b, w2=weights, n_points=500, n_subsets=2, generator=generator).mean
    unweighted = torus_w2(a, b, n_points=500, n_subsets=2, generator=generator).mean
    floor = between_halves(torus_w2, a, n_points=500, n_subsets=2, generator=generator).mean
    assert weighted < 2.0 * floor < 0.3
    assert unweighted == pytest.approx(np.sqrt(0.5) * 2.0, abs=0.2)


def test_torsion_kl():
    """Uniform on a quarter of the torus against uniform on all of it: log 4."""
    generator = np.random.default_rng(0)
    everywhere = generator.uniform(-np.pi, np.pi, size=(400_000, 2))
    quarter = generator.uniform(-np.pi, 0.0, size=(400_000, 2))
    assert torsion_kl(quarter, everywhere, n_bins=16) == pytest.approx(np.log(4.0), abs=0.01)
    inside = (everywhere < 0.0).all(axis=1).astype(float)
    assert torsion_kl(everywhere, quarter, w1=inside, n_bins=16) == pytest.approx(0.0, abs=0.01)
    assert np.isfinite(torsion_kl(everywhere, quarter, n_bins=16))


def test_torsion_kl_of_halves():
    """Against the uniform, a quarter of the torus has log 4 more; its halves differ by noise, (occupied bins) / n."""
    generator = np.random.default_rng(0)
    n = 200_000
    quarter = generator.uniform(-np.pi, 0.0, size=(n, 2))
    everywhere = generator.uniform(-np.pi, np.pi, size=(4 * n, 2))
    first = np.arange(n) % 2 == 0
    assert torsion_kl_of_halves(quarter, None, first, everywhere, n_bins=16) == pytest.approx(np.log(4.0), abs=0.01)
    floor = torsion_kl_of_halves(quarter, None, first, n_bins=32)
    assert floor == pytest.approx(0.5 * 256 * (2 / n + 2 / n), rel=0.2)
    equal = generator.uniform(-np.pi, 0.0, size=(4 * n, 2))
    for weights in (
        None,
        generator.exponential(size=4 * n),
    ):  # right samples, however many and however weighted, stand at the floor
        assert torsion_kl_of_halves(quarter, None, first, equal, weights, n_bins=32) == pytest.approx(floor, rel=0.2)
    steep = np.exp(2 * quarter[:, 0])  # weights that go with the place, as those of umbrella sampling
    right = quarter[generator.choice(n, size=n, p=steep / steep.sum())]
    floor = torsion_kl_of_halves(quarter, steep, first, n_bins=32)
    assert torsion_kl_of_halves(quarter, steep, first, right, n_bins=32) == pytest.approx(floor, rel=0.15)
    rare = np.where(quarter[:, 0] < -1.0, 3.0, 1.0)
    resampled = quarter[generator.choice(n, size=n, p=rare / rare.sum())]
    assert torsion_kl_of_halves(quarter, rare, first, resampled, n_bins=16) < 0.01
    assert torsion_kl_of_halves(quarter, rare, first, quarter, n_bins=16) > 0.05
    assert torsion_kl_of_halves(quarter, None, first, quarter, rare, n_bins=16) > 0.05


def test_torsion_kl_names_its_smoothing():
    """One bin each, not the same: a share s of the uniform is all that either sees of the other."""
    a, b, s = np.full((10, 2), -3.0), np.full((1000, 2), 3.0), 1e-3
    high, low = 1 - s + s / 100, s / 100
    expected = high * np.log(high / low) + low * np.log(low / high)
    assert torsion_kl(a, b, n_bins=10, uniform_share=s) == pytest.approx(expected, rel=1e-9)


def test_held_out_likelihood_by_hand():
    found = held_out_likelihood(np.array([-1.0, -3.0, -np.inf, -np.inf]), np.log([3.0, 1.0, 2.0, 2.0]))
    assert found.nll == pytest.approx(1.5)
    assert (found.n, found.n_outside) == (4, 2)
    assert found.share_outside == pytest.approx(0.5)
    assert found.std_error == pytest.approx(np.sqrt((0.75 * 0.5) ** 2 + (0.25 * 1.5) ** 2))
    assert held_out_likelihood(np.full(2, -np.inf)).nll == np.inf


def test_held_out_likelihood_of_a_gaussian_is_its_entropy():
    x = np.random.default_rng(0).normal(size=100_000)
    found = held_out_likelihood(-0.5 * x**2 - 0.5 * np.log(2 * np.pi))
    assert found.nll == pytest.approx(0.5 * np.log(2 * np.pi * np.e), abs=4 * found.std_error)
    assert found.std_error == pytest.approx(np.sqrt(0.5 / 100_000), rel=0.05)
    shifted = held_out_likelihood(-0.5 * x**2, 0.5 * x)  # weights exp(x / 2) make it N(1/2, 1)
    assert shifted.nll == pytest.approx(0.5 * (1 + 0.25), abs=4 * shifted.std_error)


def test_likelihood_agreement():
    generator = np.random.default_rng(0)
    exact = generator.normal(scale=5.0, size=2000)
    inside = np.arange(2000) < 500
    ebm = 100.0 + exact + generator.normal(size=2000) * np.where(inside, 2.0, 1.0)
    agreement = likelihood_agreement(ebm, exact, inside)
    assert agreement.std == pytest.approx(np.sqrt(0.25 * 4.0 + 0.75), abs=4 * agreement.std_error)
    assert 0.01 < agreement.std_error < 0.06
    assert agreement.pearson_r == pytest.approx(5.0 / np.sqrt(25.0 + 1.75), abs=0.01)
    assert agreement.slope == pytest.approx(1.0, abs=0.03)
    assert agreement.per_state["state"]["std"] == pytest.approx(2.0, abs=0.2)
    assert agreement.per_state["rest"]["n"] == 1500
    with pytest.raises(UserError, match="three or more"):
        likelihood_agreement([1.0], [1.0])
