"""Sequential Monte Carlo: known normalizers and free energies, laws of its kernel and its resampling, kills."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from scipy.stats import t as student

from boltznce import load_system
from boltznce.analysis.free_energy import choose_subset
from boltznce.errors import UserError
from boltznce.smc import (
    HMC,
    AnnealSettings,
    Kin,
    Path,
    Point,
    anneal,
    conditional_ess,
    corrected_by_ancestors,
    lineages,
    log_normalizer,
    next_beta,
    resample_within,
    systematic,
    with_gradient,
)
from boltznce.systems.fused import energy_and_gradient
from boltznce.units import GAS_CONSTANT


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(dim, mean=0.0, std=1.0):
    """log of a normalized density of x (n, dim), with its gradient."""
    mean, std = torch.as_tensor(mean).expand(dim), torch.as_tensor(std).expand(dim)
    constant = float(std.log().sum()) + 0.5 * dim * math.log(2 * math.pi)
    return with_gradient(lambda x: -0.5 * ((x - mean) / std).square().sum(-1).double() - constant)


def energy(density, log_z=0.0):
    """u = -log density - log_z, so that ∫ exp(-u) is exp(log_z)."""

    def u(x):
        value, gradient = density(x)
        return -value - log_z, -gradient

    return u


def right(x, at=0.0):
    """Label of what lies beyond ``at`` along the first coordinate."""
    return (x[:, 0] > at).long()


def difference(annealed, at=0.0):
    """ΔF of the state beyond ``at``."""
    return annealed.free_energy_difference(np.where(annealed.positions[:, 0] > at, 1.0, -1.0))


EXACT = {"cess": 0.9, "first_cess": 0.9, "n_moves": 1, "step_size": 0.3}  # of a base that may be moved in


# ---- known answers --------------------------------------------------------------------------------------------------


def squeezed(dim, n, seed, n_populations=1, labels=right):
    """From N(0, 1) to a Gaussian moved by one along the first coordinate, narrower along the others; and the truth.

    Its normalizer is e³. In one dimension it is narrower, too, and the state lies beyond 0.9.
    """
    mean, std = torch.zeros(dim), torch.linspace(0.4, 0.8, dim)
    mean[0], std[0] = 1.0, 1.0 if dim > 1 else 0.3
    at = 0.0 if dim > 1 else 0.9
    settings = AnnealSettings(n_populations=n_populations, final_moves=0, **EXACT)
    annealed = anneal(
        torch.randn(n, dim, generator=generator(seed)),
        normal(dim),
        energy(normal(dim, mean, std), 3.0),
        kernel=HMC(n_leapfrog=3),
        settings=settings,
        labels=None if labels is None else lambda x: labels(x, at),
        seed=seed,
    )
    truth = norm.logcdf((at - 1) / float(std[0])) - norm.logsf((at - 1) / float(std[0]))
    return annealed, difference(annealed, at), truth


@pytest.mark.parametrize("n_populations", [1, 20])
@pytest.mark.parametrize(("dim", "n"), [(1, 4000), (10, 2000), (60, 2000)])
def test_gaussian_to_gaussian(dim, n, n_populations):
    annealed, found, truth = squeezed(dim, n, seed=dim, n_populations=n_populations)
    log_z, error = annealed.log_normalizer
    assert 0.003 < error < 0.2
    assert abs(log_z - 3.0) < 3.5 * error
    assert 0.02 < found.std_error < 0.2
    assert abs(found.value - truth) < 3.5 * found.std_error
    weights = np.exp(annealed.log_weights - annealed.log_weights.max())
    mean, var = np.average(annealed.positions, axis=0, weights=weights), np.array([1.0, 0.8])
    assert np.abs(mean[1:]).max(initial=0) < 0.25
    if dim > 1:
        last = annealed.positions[:, -1]
        assert abs(np.average(last**2, weights=weights) / var[1] ** 2 - 1) < 0.2
        assert any(step.resampled for step in annealed.history)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("n_populations", [1, 20])
@pytest.mark.parametrize("dim", [1, 20])
def test_intervals_cover(dim, n_populations):
    """Intervals of 95% hold log Z and ΔF in 90 to 98% of 200 repeats, with resampling."""
    held, resampled = [], 0
    for seed in range(200):
        annealed, found, truth = squeezed(dim, 1000, seed, n_populations)
        log_z, error = annealed.log_normalizer
        reach = student.ppf(0.975, n_populations - 1) if n_populations > 1 else 1.96
        held.append((abs(log_z - 3.0) < reach * error, found.interval[0] < truth < found.interval[1]))
        resampled += any(step.resampled for step in annealed.history)
    shares = np.mean(held, axis=0)
    print(f"dim {dim}, {n_populations} populations: log Z {shares[0]:.3f}, ΔF {shares[1]:.3f}, resampled {resampled}")
    assert resampled > 180
    assert (shares >= 0.90).all()
    assert (shares <= 0.98).all()


TILT, BARRIER = 0.4, 6.0


def double_well(x):
    return BARRIER * (x[:, 0] ** 2 - 1) ** 2 - TILT * x[:, 0] + 0.5 * (x[:, 1:] ** 2).sum(-1)


@pytest.mark.parametrize("labels", [None, right])
def test_double_well(labels):
    left, there = (
        quad(lambda x: math.exp(-BARRIER * (x**2 - 1) ** 2 + TILT * x), *ends)[0] for ends in ((-4, 0), (0, 4))
    )
    start = torch.randn(4000, 3, generator=generator(1))
    annealed = anneal(
        start, normal(3), with_gradient(double_well), settings=AnnealSettings(**EXACT), labels=labels, seed=1
    )
    log_z, error = annealed.log_normalizer
    assert abs(log_z - math.log(left + there) - math.log(2 * math.pi)) < 3 * error < 0.15
    found = difference(annealed)
    assert found.reliable
    assert abs(found.value - math.log(left / there)) < 3 * found.std_error < 0.3
    lines = annealed.lineages(annealed.positions[:, 0] > 0)
    assert min(line.effective for line in lines.values()) > 200


def test_an_exact_base_gives_constant_weights():
    annealed = anneal(
        torch.randn(100, 4, generator=generator()), normal(4), energy(normal(4), 2.5), settings=AnnealSettings(**EXACT)
    )
    assert [step.beta for step in annealed.history] == [1.0]
    np.testing.assert_allclose(annealed.log_weights, 2.5, atol=1e-12)
    np.testing.assert_allclose(annealed.log_normalizer, [2.5, 0.0], atol=1e-9)
    assert annealed.ess == pytest.approx(1.0)


def two_wells(x, std, lie=0.0, share=0.5):
    logs = [math.log(s) - (x - c).square().sum(-1) / (2 * std**2) for s, c in ((share, 3.0), (1 - share, -3.0))]
    return torch.logsumexp(torch.stack(logs), 0) + lie * right(x)


def lied_to(n, m, seed, noise=0.0):
    """Walkers are drawn from q; of them the base says that, and 1.3 kT more in the state, and more or less about there.

    Refined and corrected ΔF, by ``m`` likelihoods; the lie and the truth.
    """
    lie, direction = 1.3, torch.tensor([0.6, 0.8])

    def wrong(x):  # its exponential average is the same in both wells
        return noise * ((x - torch.where(right(x)[:, None] > 0, 3.0, -3.0)) @ direction)

    side = torch.where(torch.rand(n, generator=generator(seed)) < 0.5, 3.0, -3.0)
    start = side[:, None] + torch.randn(n, 2, generator=generator(seed + 1))
    base = with_gradient(lambda x: two_wells(x, 1.0, lie) + wrong(x))
    target = with_gradient(lambda x: -two_wells(x, 0.7, share=0.2))
    annealed = anneal(start, base, target, settings=AnnealSettings(**EXACT), labels=right, seed=seed)
    angle = np.where(annealed.positions[:, 0] > 0, 1.0, -1.0)
    drawn = {"generator": np.random.default_rng(seed), "drawn_by": "weights"}
    subset = choose_subset(angle, annealed.log_weights, m, **drawn)
    places = start[torch.from_numpy(annealed.ancestors[subset])]
    both = base(places)[0].double().numpy(), two_wells(places, 1.0).double().numpy()
    corrected = corrected_by_ancestors(angle, annealed.log_weights, annealed.ancestors, subset, *both)
    return annealed, corrected, lie, math.log(0.8 / 0.2)


def test_a_base_that_lies_by_state_is_found_out():
    annealed, corrected, lie, truth = lied_to(4000, 200, 2)
    refined = difference(annealed)
    assert abs(refined.value - lie - truth) < 3 * refined.std_error < 0.15
    assert corrected.correction_state - corrected.correction_rest == pytest.approx(lie, abs=0.01)  # a few cross
    assert abs(corrected.value - truth) < 3 * corrected.std_error < 0.15
    assert corrected.reliable, corrected


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.4, 0.8])
def test_corrected_intervals_cover(noise):
    found = [lied_to(1500, 300, 10 * k, noise)[1] for k in range(200)]
    truth, held = math.log(4.0), [each.interval[0] < math.log(4.0) < each.interval[1] for each in found]
    assert 0.9 <= np.mean(held) <= 0.99
    assert np.mean([each.value for each in found]) == pytest.approx(truth, abs=0.03)
    spread = np.std([each.value for each in found])
    assert spread / 1.25 < np.mean([each.std_error for each in found]) < 1.6 * spread  # ancestors' is an upper bound


def test_walkers_of_one_ancestor_count_once():
    rng = np.random.default_rng(0)
    angle, d = np.repeat([1.0, -1.0], 300), rng.normal(0.0, 0.5, 600)
    once = corrected_by_ancestors(angle, np.zeros(600), np.arange(600), np.arange(600), d, np.zeros(600))
    four = [np.tile(each, 4) for each in (angle, np.zeros(600), np.arange(600))]
    often = corrected_by_ancestors(*four, np.arange(600), d, np.zeros(600))
    assert (often.value, often.std_error) == pytest.approx((once.value, once.std_error))
    kin = Kin.among([5, 5, 5, 2], np.array([0.0, 0.0, 1.0, -np.inf]), [True, True, False, False])
    np.testing.assert_allclose(kin.log_weights, [-np.inf, 1.0, math.log(2)])
    assert kin.of.tolist() == [2, 2, 1, 0]
    assert kin.first.tolist() == [3, 2, 0]


# ---- the kernel -----------------------------------------------------------------------------------------------------

STD = torch.tensor([[0.5, 1.0, 2.0], [1.0, 0.3, 1.0]])
KERNEL = HMC(masses=torch.tensor([[1.0], [4.0]]), kT=2.5, n_leapfrog=4)


def anisotropic(n, centred=False, dtype=torch.float64):
    """A Gaussian's `Path` (at every β the same), draws of it, and their point."""
    std, x = STD.to(dtype), torch.randn(n, 2, 3, generator=generator(5), dtype=dtype) * STD.to(dtype)
    log_prob = with_gradient(lambda x: -0.5 * (x / std).square().flatten(1).sum(1))
    if centred:  # two atoms at ± r, of which r is a Gaussian
        half = x[:, :1] / math.sqrt(2)
        x = torch.cat([half, -half], 1)
        log_prob = with_gradient(lambda x: -(((x[:, 0] - x[:, 1]) / 2) / std[0]).square().sum(1))
    path = Path(log_prob, energy(log_prob))
    return path, x, path.point(x)


@pytest.mark.parametrize("centred", [False, True])
def test_the_kernel_leaves_its_density_and_is_in_detailed_balance(centred):
    path, x, point = anisotropic(40_000, centred)
    kernel = HMC(KERNEL.masses, KERNEL.kT, 3, centred)
    moved, probability = kernel.move(path, point, 0.4, 0.35, generator(1))
    y = moved.positions
    assert 0.5 < float(probability.mean()) < 0.97
    assert float((y != x).flatten(1).any(1).float().mean()) == pytest.approx(float(probability.mean()), abs=0.02)
    if centred:
        assert float(y.sum(1).abs().max()) < 1e-12
    scale = (x.square().mean(0)).sqrt()
    for power in (1, 2, 3, 4):
        change = ((y / scale) ** power - (x / scale) ** power).mean(0)
        assert float(change.abs().max()) < 4 * math.sqrt({1: 2, 2: 4, 3: 30, 4: 192}[power] / len(x))
    a, b = (x / scale).flatten(1), (y / scale).flatten(1)
    for f, g in ((torch.tanh, lambda t: (t > 1).double()), (torch.exp, torch.sin)):
        there, back = f(a) * g(b), g(a) * f(b)
        off = (there - back).mean(0) / ((there - back).std(0) / math.sqrt(len(x)))
        assert float(off.abs().max()) < 4
    again = path.point(y)  # what is kept is what would be computed
    assert torch.allclose(again.u, moved.u)
    assert torch.equal(again.u_gradient, moved.u_gradient)


def test_a_long_walk_finds_the_density():
    path, x, _ = anisotropic(2000)
    point = path.point(torch.zeros_like(x) + 2.0)
    numbers = generator(2)
    for _ in range(60):
        point, _ = KERNEL.move(path, point, 1.0, 0.3, numbers)
    assert torch.allclose(point.positions.std(0), STD.double(), rtol=0.1)
    assert float((point.positions.mean(0) / STD).abs().max()) < 0.1


@pytest.mark.parametrize("centred", [False, True])
def test_leapfrog_is_reversible(centred):
    path, x, point = anisotropic(50, centred)
    kernel = HMC(KERNEL.masses, KERNEL.kT, 7, centred)
    v = kernel.velocities(x, generator(3))
    step = torch.full((50, 1, 1), 0.3, dtype=x.dtype)
    end, v_end = kernel.leapfrog(path, point, v, 0.3, step)
    assert float((end.positions - x).abs().max()) > 0.5
    back, v_back = kernel.leapfrog(path, end, -v_end, 0.3, step)
    assert torch.allclose(back.positions, x, atol=1e-12)
    assert torch.allclose(v_back, -v, atol=1e-12)


def test_leapfrog_keeps_volume():
    slope = torch.tensor([3.0, 0.5]).double()

    def force(x):
        return x.sum(1), -slope * x

    def flow(z):
        x, v = z.reshape(2, 1, 2)
        point = Point(x, x.sum(1), x.sum(1), -slope * x, slope * x)
        path = Path(force, lambda x: (x.sum(1), slope * x))
        end, v = HMC(torch.tensor([1.0, 4.0]), 2.5, 3).leapfrog(path, point, v, 0.5, torch.full((1, 1), 0.2).double())
        return torch.cat([end.positions.flatten(), v.flatten()])

    jacobian = torch.autograd.functional.jacobian(flow, torch.randn(4, generator=generator(), dtype=torch.float64))
    assert float(torch.linalg.det(jacobian)) == pytest.approx(1.0, abs=1e-9)
    assert float((jacobian - torch.eye(4)).abs().max()) > 0.2


def test_energy_is_conserved_to_second_order_and_short_steps_are_accepted():
    def error(step_size, n_leapfrog):
        path = Path(with_gradient(lambda x: -double_well(x)), with_gradient(double_well))
        point = path.point(0.8 * torch.randn(400, 2, generator=generator(4), dtype=torch.float64))
        kernel = HMC(n_leapfrog=n_leapfrog)
        v = kernel.velocities(point.positions, generator(5))
        end, v_end = kernel.leapfrog(path, point, v, 0.5, torch.full((400, 1), step_size, dtype=torch.float64))
        change = end.log_prob(0.5) - kernel.kinetic(v_end) - point.log_prob(0.5) + kernel.kinetic(v)
        return float(change.square().mean().sqrt())

    errors = [error(0.08 / 2**k, 10 * 2**k) for k in range(3)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)
    path, _, point = anisotropic(500)
    rates = [float(KERNEL.move(path, point, 1.0, step, generator())[1].mean()) for step in (0.5, 0.2, 0.01)]
    assert rates == sorted(rates)
    assert rates[-1] > 0.9999


def test_velocities_of_walkers_that_stay_mean_free():
    """N(0, kT / m) given that they sum to zero: covariance kT (1/m_i δ_ij - (1/m_i)(1/m_j) / Σ 1/m)."""
    masses = torch.tensor([[1.0], [4.0], [16.0]])
    v = HMC(masses, 2.5, centred=True).velocities(torch.zeros(100_000, 3, 2, dtype=torch.float64), generator())
    assert float(v.sum(1).abs().max()) < 1e-12
    inverse = 1 / masses.double().squeeze(1)
    wanted = 2.5 * (torch.diag(inverse) - torch.outer(inverse, inverse) / inverse.sum())
    found = torch.einsum("nid,njd->ij", v, v) / (2 * len(v))
    assert torch.allclose(found, wanted, atol=0.02)
    free = HMC(masses, 2.5)
    assert float(free.kinetic(free.velocities(torch.zeros(100_000, 3, 2), generator())).mean()) == pytest.approx(
        3, 0.02
    )


def test_what_is_not_finite_is_refused_and_weighs_nothing():
    """A wall at x = 1, beyond which the energy is infinite, and draws of no energy."""

    def walled(x):
        u = 0.5 * x.square().sum(1)
        return torch.where(x[:, 0] > 1, torch.where(x[:, 1] > 0, math.nan, math.inf), u), x

    start = torch.randn(4000, 2, generator=generator())
    annealed = anneal(start, normal(2), walled, settings=AnnealSettings(first_cess=0.5, step_size=0.3))
    outside = annealed.positions[:, 0] > 1
    assert np.isneginf(annealed.log_weights[~np.isfinite(annealed.energy)]).all()
    assert np.isneginf(annealed.log_weights[outside]).all()
    assert annealed.log_normalizer[0] == pytest.approx(norm.logcdf(1) + math.log(2 * math.pi), abs=0.03)
    dead = Path(normal(2), walled).point(torch.full((5, 2), 50.0))
    assert all(torch.isneginf(dead.log_prob(beta)).all() for beta in (0.0, 0.5, 1.0))
    stay, probability = HMC().move(Path(normal(2), walled), dead, 0.5, 0.1, generator())
    assert float(probability.max()) == 0
    assert torch.equal(stay.positions, dead.positions)
    with pytest.raises(UserError, match="None of 50 walkers has a finite weight"):
        anneal(torch.full((50, 2), 5.0), normal(2), walled)


# ---- steps, resampling, lineage -------------------------------------------------------------------------------------


def test_the_next_beta_has_its_conditional_ess():
    path = Path(normal(3), energy(normal(3, 1.0, 0.5)))
    point = path.point(torch.randn(3000, 3, generator=generator()))
    log_weights = 0.5 * torch.randn(3000, generator=generator(1)).double()
    for least in (0.5, 0.9, 0.99):
        beta, ess = next_beta(point, log_weights, 0.1, least)
        assert 0.1 < beta < 1
        assert ess == pytest.approx(least, abs=1e-6)
        w = torch.softmax(log_weights, 0)
        v = ((beta - 0.1) * (-point.u - point.log_base)).exp()
        assert float((w @ v) ** 2 / (w @ v**2)) == pytest.approx(least, abs=1e-6)
    assert next_beta(point, log_weights, 0.999, 0.5)[0] == 1.0
    settings = AnnealSettings(first_cess=0.3, cess=0.8)
    steps = anneal(point.positions, path.base, path.target, settings=settings).history
    assert [steps[0].cess, *(step.cess for step in steps[1:-1])] == pytest.approx([0.3, *[0.8] * (len(steps) - 2)])
    assert len(steps) > 2
    assert steps[-1].cess >= 0.8
    # the state that suffers most tells
    groups = right(point.positions)
    beta, _ = next_beta(point, log_weights, 0.1, 0.9, groups)
    v = (beta - 0.1) * (-point.u - point.log_base)
    each = [conditional_ess(log_weights[groups == g], v[groups == g]) for g in (0, 1)]
    assert min(each) == pytest.approx(0.9, abs=1e-6)
    # walkers that no step would keep
    u = torch.where(torch.arange(3000) < 1000, 1e12, point.u)
    lost = Point(point.positions, point.log_base, u, point.base_gradient, point.u_gradient)
    assert next_beta(lost, log_weights, 0.1, 0.9)[0] == pytest.approx(0.101)
    assert next_beta(lost, log_weights, 0.1, 0.9, smallest_step=0.2)[0] == pytest.approx(0.3)


def test_systematic_resampling_is_unbiased():
    weights = torch.tensor([0.02, 0.3, 0.0, 0.13, 0.55]).double()
    offsets = (np.arange(2000) + 0.5) / 2000
    counts = torch.stack([systematic(weights, u).bincount(minlength=5) for u in offsets]).double()
    assert torch.allclose(counts.mean(0), 5 * weights, atol=2e-3)
    assert ((counts - 5 * weights).abs() < 1).all()
    assert (counts[:, 2] == 0).all()
    assert (counts.sum(1) == 5).all()
    assert systematic(torch.tensor([0.0, 1.0, 0.0]), 0.0).tolist() == [1, 1, 1]


def test_states_keep_their_walkers_and_their_totals():
    n, numbers = 3000, generator(7)
    groups = (torch.arange(n) % 100 == 0).long()  # one in a hundred, of e⁻⁸ of the weight
    log_weights = 2 * torch.randn(n, generator=numbers).double() - 8.0 * groups
    values = torch.randn(n, generator=numbers).double() + groups
    index, new, resampled = resample_within(log_weights, groups, numbers)
    assert resampled == 2
    assert (groups[index] == groups).all()  # so the rare state has thirty walkers as before
    for group in (0, 1):
        old_total = log_weights[groups == group].logsumexp(0)
        assert float(new[groups == group].logsumexp(0) - old_total) == pytest.approx(0.0, abs=1e-12)
        assert len(index[groups == group].unique()) > 1
    means = []
    for seed in range(400):
        index, new, _ = resample_within(log_weights, groups, generator(seed))
        means.append(torch.stack([(new.exp() * values[index])[groups == g].sum() for g in (0, 1)]))
    wanted = torch.stack([(log_weights.exp() * values)[groups == g].sum() for g in (0, 1)])
    means = torch.stack(means)
    assert ((means.mean(0) - wanted).abs() < 4 * means.std(0) / math.sqrt(400)).all()
    # even weights are left as they are
    index, new, resampled = resample_within(0.1 * log_weights, groups, numbers)
    assert resampled == 0
    assert torch.equal(index, torch.arange(n))
    assert torch.equal(new, 0.1 * log_weights)


def test_a_rare_state_keeps_its_walkers():
    """Half of the draws in a state of 1e-4 of the weight, behind a barrier: without labels it dies out."""

    def target(x):
        return -torch.logsumexp(torch.stack([-8 * (x - c).square().sum(-1) + f for c, f in ((-3, 0), (3, -9))]), 0)

    def base(x):
        return torch.logsumexp(torch.stack([-0.5 * (x - c).square().sum(-1) for c in (-3, 3)]), 0) - math.log(
            4 * math.pi
        )

    start = torch.randn(2000, 2, generator=generator()) + torch.where(torch.arange(2000) < 1000, 3.0, -3.0)[:, None]
    kept = {}
    for labels in (None, right):
        kept[labels] = anneal(
            start, with_gradient(base), with_gradient(target), labels=labels, settings=AnnealSettings(**EXACT)
        )
    inside = kept[right].positions[:, 0] > 0
    assert inside.sum() == 1000
    assert kept[right].lineages(inside)[1].ancestors > 200
    assert (kept[None].positions[:, 0] > 0).sum() < 20
    found = difference(kept[right])
    assert found.reliable
    assert abs(found.value - 9.0) < 3 * found.std_error < 0.5


def test_lineages_are_counted():
    ancestors, weights = np.array([0, 0, 1, 2, 3, 3]), np.array([1.0, 2.0, 3.0, 4.0, 1.0, 0.0])
    with np.errstate(divide="ignore"):
        found = lineages(ancestors, np.log(weights), np.array([0, 0, 0, 1, 1, 1]))
    assert found[0][:2] == (3, 2)
    assert found[0].effective == pytest.approx(2.0)
    assert found[1][:2] == (2, 2)
    assert found[1].effective == pytest.approx(25 / 17)
    value, error = log_normalizer(np.log(weights[:5]), ancestors[:5], 10)
    shares = np.array([3, 3, 4, 1, *np.zeros(6)]) / 11
    assert value == pytest.approx(math.log(11 / 5))
    assert error == pytest.approx(math.sqrt(10 / 9 * np.square(shares - 0.1).sum()))
    annealed, _, _ = squeezed(60, 400, 0, labels=None)
    assert annealed.history[-1].ancestors == len(np.unique(annealed.ancestors)) < 300
    assert annealed.lineages(np.zeros(400))[0].ancestors == annealed.history[-1].ancestors
    assert annealed.log_normalizer == log_normalizer(annealed.log_weights, annealed.ancestors, 400)  # the dead count


def test_few_ancestors_are_not_reliable():
    """Moves that are too few for their step in β leave few ancestors, and errors that are too small."""
    std = torch.tensor([1.0] + [0.25] * 19)
    start = torch.randn(1000, 20, generator=generator(1))
    found = {
        moves: anneal(
            start,
            normal(20),
            energy(normal(20, 0.0, std)),
            kernel=HMC(n_leapfrog=3 * moves),
            settings=AnnealSettings(**EXACT | {"n_moves": moves, "final_moves": 0}),
            labels=right,
        )
        for moves in (1, 2)
    }
    assert not difference(found[1]).reliable
    assert "effective ancestors in the" in difference(found[1]).message
    assert difference(found[2]).reliable, difference(found[2])
    assert not difference(found[2], at=9.0).reliable  # nobody there


def test_populations_share_nothing():
    annealed, _, _ = squeezed(20, 400, 0, n_populations=4, labels=None)
    assert any(step.resampled for step in annealed.history)
    assert (np.bincount(annealed.populations) == 100).all()
    assert (annealed.populations == np.arange(400) % 4).all()
    assert (annealed.units == annealed.populations).all()
    assert "400 walkers" in repr(annealed)


# ---- the whole ------------------------------------------------------------------------------------------------------


def test_chunks_change_nothing_and_all_is_counted():
    start = torch.randn(101, 6, generator=generator())
    asked = []

    def target(x):
        asked.append(len(x))
        return energy(normal(6, 1.0, 0.6))(x)

    found = [anneal(start, normal(6), target, chunk=chunk, settings=AnnealSettings(**EXACT)) for chunk in (None, 17)]
    assert max(asked[len(asked) // 2 :]) == 17
    assert sum(asked) == found[0].counts.target + found[1].counts.target
    np.testing.assert_allclose(found[1].positions, found[0].positions, atol=1e-4)
    np.testing.assert_allclose(found[1].log_weights, found[0].log_weights, atol=1e-4)
    assert found[0].counts == found[1].counts
    n_last = 6 * 101 * HMC().n_leapfrog  # at β = 1 the base is not asked: one move and five more
    assert found[0].counts.base == found[0].counts.target - n_last
    assert found[0].positions.dtype == np.float32
    assert found[0].log_weights.dtype == found[0].energy.dtype == np.float64


class Killed(Exception):
    pass


def test_a_killed_annealing_goes_on_to_the_bit(tmp_path):
    start, left = torch.randn(200, 5, generator=generator()), [10**9]

    def target(x):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return energy(normal(5, 1.0, 0.4))(x)

    def run(folder, **more):
        options = {"settings": AnnealSettings(n_populations=2, **EXACT), "labels": right, "seed": 3} | more
        return anneal(start, normal(5), target, folder=folder, **options)

    whole, kills = run(None), 0
    for lives in (0, 20, 30, 15, 40, 10**9):
        left[0] = lives
        try:
            found = run(tmp_path)
        except Killed:
            kills += 1
    assert kills == 5
    for name in ("positions", "energy", "log_weights", "ancestors"):
        assert np.array_equal(getattr(found, name), getattr(whole, name)), name
    assert found.history == whole.history
    assert found.counts == whole.counts
    assert [path.name for path in tmp_path.iterdir()] == ["annealing.npz"]
    left[0] = 0
    assert np.array_equal(run(tmp_path).positions, whole.positions)  # at its end nothing is asked any more
    for other in ({"seed": 4}, {"settings": AnnealSettings()}, {"kernel": HMC(2.0)}, {"about": "another base"}):
        with pytest.raises(UserError, match="other walkers or settings"):
            run(tmp_path, **other)
    data = (tmp_path / "annealing.npz").read_bytes()
    (tmp_path / "annealing.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="is damaged"):
        run(tmp_path)


def test_the_first_step_size_is_found_before_weights_are_used():
    start = torch.randn(500, 10, generator=generator())
    for guess in (1e-3, 30.0):
        annealed = anneal(
            start, normal(10), energy(normal(10, 1.0, 0.5)), settings=AnnealSettings(cess=0.95, step_size=guess)
        )
        assert all(0.6 < step.acceptance < 1 for step in annealed.history)
        assert annealed.log_normalizer[0] == pytest.approx(0.0, abs=4 * annealed.log_normalizer[1])


def test_two_legs_are_one_way():
    """From the base to one target and from there to another, ancestors and weights carried on."""
    start, middle, end = torch.randn(2000, 4, generator=generator()), normal(4, 0.5, 0.8), normal(4, 1.0, 0.6)
    first = anneal(start, normal(4), energy(middle, 2.0), settings=AnnealSettings(**EXACT))
    second = anneal(
        torch.from_numpy(first.positions),
        lambda x: tuple(-part for part in energy(middle, 2.0)(x)),
        energy(end, 3.0),
        settings=AnnealSettings(**EXACT),
        log_weights=torch.from_numpy(first.log_weights),
        ancestors=torch.from_numpy(first.ancestors),
        seed=1,
    )
    value, error = second.log_normalizer
    assert abs(value - 3.0) < 3.5 * error < 0.3
    assert set(second.ancestors) <= set(first.ancestors)


def test_what_makes_no_sense_is_told():
    x, both = torch.zeros(10, 2), (normal(2), energy(normal(2)))
    for arguments, message in (
        ({"log_weights": torch.full((10,), math.nan)}, "NaN"),
        ({"log_weights": torch.zeros(9)}, "a log weight of each of 10 walkers"),
        ({"ancestors": torch.arange(1, 11)}, "a whole number below 10"),
        ({"settings": AnnealSettings(n_populations=6)}, "at least two walkers in each of 6"),
        ({"seed": -1}, "seed=-1"),
        ({"chunk": 0}, "chunk=0"),
    ):
        with pytest.raises(UserError, match=message):
            anneal(x, *both, **arguments)
    for settings in ({"cess": 1.0}, {"first_cess": 0.0}, {"n_moves": 0}, {"step_size": -1.0}, {"n_populations": 0}):
        with pytest.raises(UserError, match=next(iter(settings))):
            AnnealSettings(**settings)
    with pytest.raises(UserError, match="positive masses"):
        HMC(masses=torch.tensor([1.0, 0.0]))
    with pytest.raises(UserError, match="n_leapfrog"):
        HMC(n_leapfrog=0)


def test_a_molecule():
    """Alanine dipeptide, from a Gaussian about its minimum that is too narrow: to kT/2 in each of its directions."""
    system = load_system("aldp")
    minimum = system.positions - system.positions.mean(0)
    noise = torch.randn(48, 22, 3, generator=generator())
    start = minimum + 0.002 * (noise - noise.mean(1, keepdim=True))
    masses = torch.tensor([max(4.0, atom.element.mass) for atom in system.topology.atoms])[:, None]
    annealed = anneal(
        start,
        with_gradient(lambda x: -0.5 * ((x - minimum) / 0.002).square().sum((1, 2))),
        lambda x: energy_and_gradient(system.energy, x),
        kernel=HMC(masses, GAS_CONSTANT * system.temperature, centred=True),
        settings=AnnealSettings(cess=0.5, first_cess=0.5, n_moves=2, final_moves=10),
    )
    last = annealed.history[-1]
    assert 0.7 < last.acceptance < 1
    assert 5e-4 < last.step_size < 4e-3  # ps
    assert np.abs(annealed.positions.mean(1)).max() < 1e-6
    typical = float(system.energy(minimum[None])) + (3 * 22 - 6) / 2
    assert abs(last.mean_u - typical) < 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    mean, std = torch.ones(5, device="cuda"), torch.full((5,), 0.5, device="cuda")
    start = torch.randn(2000, 5, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    base = with_gradient(lambda x: -0.5 * x.square().sum(1).double())
    target = with_gradient(lambda x: 0.5 * ((x - mean) / std).square().sum(1).double())
    annealed = anneal(start, base, target, settings=AnnealSettings(n_populations=20, **EXACT), labels=right)
    value, error = annealed.log_normalizer
    assert abs(value - 5 * math.log(0.5)) < 4 * error < 0.3
