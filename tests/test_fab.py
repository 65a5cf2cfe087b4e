"""FAB: annealing beyond the target, replay by weight, and what a flow learns of it."""

import itertools
import math

import numpy as np
import pytest
import torch
from runs import run_in

import boltznce as bz
from boltznce.checkpoint import load_weights
from boltznce.config import compose
from boltznce.errors import UserError
from boltznce.fab import ReplayBuffer, alpha_divergence, anneal_beyond
from boltznce.methods import fab
from boltznce.methods.spline_models import make_spline_flow
from boltznce.methods.workspace import Workspace, make_fabric
from boltznce.run_folder import RunFolder
from boltznce.smc import HMC, Path, with_gradient

Q_STD, P_MEAN, P_STD = 1.0, 0.8, 0.7


def log_normal(x, mean, std):
    return (-0.5 * ((x.double() - mean) / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))).sum(-1)


def gaussian_path():
    """From N(0, 1) to N(0.8, 0.7²)."""
    q, p = (lambda x: log_normal(x, 0.0, Q_STD)), (lambda x: -log_normal(x, P_MEAN, P_STD))
    return Path(with_gradient(q), with_gradient(p), beyond=True)


def integral():
    """∫ p²/q and the mean and standard deviation of the normalized p²/q, by completing the square."""
    precision = 2 / P_STD**2 - 1 / Q_STD**2
    mean = 2 * P_MEAN / P_STD**2 / precision
    exponent = -(P_MEAN**2) / P_STD**2 + 0.5 * precision * mean**2
    return Q_STD / (P_STD**2 * math.sqrt(precision)) * math.exp(exponent), mean, precision**-0.5


@pytest.mark.parametrize(("k", "n_moves"), [(0, 1), (1, 1), (8, 2)])
def test_annealed_weights_integrate_to_the_second_moment(k, n_moves):
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(40_000, 1, generator=generator)
    point, log_weights, acceptances = anneal_beyond(
        gaussian_path(), x, [0.3] * k, kernel=HMC(n_leapfrog=4), n_moves=n_moves, generator=generator
    )
    truth, mean, std = integral()
    weights = log_weights.exp()
    error = float(weights.std() / len(weights) ** 0.5)
    assert abs(float(weights.mean()) - truth) < 4 * error < 0.2 * truth
    shares = weights / weights.sum()
    assert float(shares @ point.positions[:, 0].double()) == pytest.approx(mean, abs=0.05)
    assert float(shares @ (point.positions[:, 0].double() - mean) ** 2) ** 0.5 == pytest.approx(std, abs=0.05)
    assert acceptances.shape == (k,)
    assert ((acceptances > 0.9) & (acceptances <= 1)).all()


def test_moves_lower_the_variance_of_the_weights():
    relative = {}
    for k in (0, 8):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(20_000, 1, generator=generator)
        moves = {"kernel": HMC(n_leapfrog=4), "n_moves": 2, "generator": generator}
        _, log_weights, _ = anneal_beyond(gaussian_path(), x, [0.3] * k, **moves)
        relative[k] = float(log_weights.exp().var() / log_weights.exp().mean() ** 2)
    assert relative[8] < 0.3 * relative[0]


def test_gradient_is_that_of_the_second_moment():
    """Of ∫ p²/q in the mean m of q = N(m, 1), at 0: by draws and weights, and by hand, -(∫ p²/q) ⟨x⟩ of p²/q."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(100_000, 1, generator=generator)
    moves = {"kernel": HMC(n_leapfrog=4), "n_moves": 1, "generator": generator}
    point, log_weights, _ = anneal_beyond(gaussian_path(), x, [0.3] * 4, **moves)
    buffer = ReplayBuffer(len(x), 1)
    buffer.add(0, point.positions, log_weights, point.log_base)
    index = torch.multinomial(buffer.log_weights.exp(), 100_000, replacement=True, generator=generator)
    m = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = alpha_divergence(log_normal(buffer.points[index], m, Q_STD), buffer.log_q[index])
    (slope,) = torch.autograd.grad(loss, m)
    assert float(slope) == pytest.approx(-integral()[1], abs=0.02)  # of the logarithm of the moment


def test_a_correction_is_at_most_so_large_and_has_no_gradient():
    log_q = torch.tensor([0.0, -100.0, -math.inf], requires_grad=True)
    loss = alpha_divergence(log_q, torch.tensor([-1.0, 0.0, 0.0]), most=10.0)
    loss.backward()
    assert log_q.grad.tolist() == pytest.approx([-math.exp(-1) / 3, -10 / 3, 0.0])


# ---- the buffer -----------------------------------------------------------------------------------------------------


def test_places_are_drawn_by_weight():
    buffer = ReplayBuffer(8, 1)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    buffer.add(0, torch.arange(4.0)[:, None], weights.double().log(), torch.zeros(4))
    generator = torch.Generator().manual_seed(0)
    first = np.bincount([int(buffer.draw(1, generator)) for _ in range(4000)], minlength=8) / 4000
    np.testing.assert_allclose(first[:4], weights / 10, atol=0.03)
    assert first[4:].sum() == 0  # empty places
    assert sorted(buffer.draw(4, generator).tolist()) == [0, 1, 2, 3]  # without replacement


def test_new_points_come_in_place_of_the_oldest():
    buffer = ReplayBuffer(4, 1)
    for start in (0, 3):
        buffer.add(start, torch.full((3, 1), float(start)), torch.zeros(3), torch.zeros(3))
    assert buffer.points[:, 0].tolist() == [3.0, 3.0, 0.0, 3.0]


def test_weights_follow_the_flow():
    buffer = ReplayBuffer(3, 1)
    buffer.add(0, torch.zeros(3, 1), torch.tensor([0.0, 1.0, -math.inf]), torch.tensor([-2.0, -2.0, -2.0]))
    buffer.update(torch.tensor([0, 1, 2]), torch.tensor([-3.0, -math.inf, -1.0]))
    assert buffer.log_weights.tolist() == [1.0, 1.0, -math.inf]
    assert buffer.log_q.tolist() == [-3.0, -2.0, -math.inf]  # what weighs nothing is no part of the loss


# ---- the method -----------------------------------------------------------------------------------------------------

TINY = [
    "method=fab",
    "budget=smoke",
    "threads=1",
    "fab={batch_size: 64, min_batches: 2, max_batches: 4, n_updates: 2, fit: {steps: 12, checkpoint_every: 5}}",
    "generator.model={n_pairs: 2, width: 16, depth: 1}",
    "evaluation={n_samples: 400, n_reference: 400, n_bootstrap: 20, n_torus: 50, batch_size: 200}",
]


def sampler_of(*overrides):
    config = compose("train", ["system=gaussians8", *TINY, *overrides])
    system = bz.load_system("gaussians8")
    flow = make_spline_flow(config, system)
    return fab.Sampler(config.fab, system, flow.dimension), flow


def test_when_draws_are_made():
    sampler, flow = sampler_of()
    places = []
    sampler._add = lambda flow, place, generator: places.append(place)
    for step in range(6):
        sampler.fill(flow, step, torch.Generator())
    assert places == [0, 64, 128, 192]
    assert fab.energy_evaluations(sampler.section, 6) == 4 * 64 * (1 + 1 * 1 * 1)


def test_density_on_the_cube_is_that_of_the_system():
    sampler, flow = sampler_of()
    y = torch.rand(50, 2, generator=torch.Generator().manual_seed(0))
    positions, log_volume = flow.coordinates.to_positions(y)
    flow.requires_grad_(False)
    np.testing.assert_allclose(flow.cube_log_prob(y), flow.log_prob(positions) + log_volume, atol=1e-5)
    np.testing.assert_allclose(
        sampler.energy(flow, y), sampler.system.energy(positions) - log_volume, rtol=1e-5, atol=1e-5
    )


def test_step_sizes_follow_the_acceptance():
    sampler, flow = sampler_of("fab.step_size=0.001", "fab.acceptance=0.5")
    for k in range(60):
        sampler.fill(flow, 2 * k, torch.Generator().manual_seed(k))
    assert (sampler.step_sizes > 0.01).all()


def test_a_training_killed_and_gone_on_with_is_the_same(tmp_path, monkeypatch):
    def trained(name):
        (tmp_path / name).mkdir(exist_ok=True)
        config = compose("train", ["system=gaussians8", *TINY])
        folder = RunFolder.create(tmp_path / name, config, config.system.name)
        found = fab.train(Workspace(folder, config, make_fabric("cpu")))
        assert found["energy_evaluations"] == (2 + 5) * 64 * 2
        return load_weights(tmp_path / name / "checkpoints" / "fab.safetensors")[0]

    whole, draw, calls = trained("whole"), ReplayBuffer.draw, itertools.count(1)

    def killed(self, n, generator):
        if next(calls) == 9:
            raise KeyboardInterrupt
        return draw(self, n, generator)

    monkeypatch.setattr(ReplayBuffer, "draw", killed)
    with pytest.raises(KeyboardInterrupt):
        trained("killed")
    monkeypatch.undo()
    assert (tmp_path / "killed" / "checkpoints" / "fab" / "step_0000005" / "memory.safetensors").exists()
    again = trained("killed")
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_a_run_in_the_plane_ends_in_a_report(tmp_path):
    metrics = run_in(tmp_path, ["system=gaussians8", *TINY])
    assert len(metrics["modes"]["exact"]) == 8
    assert metrics["counts"]["energy evaluations, annealed draws"] == (2 + 5) * 64 * 2
    assert bz.load_run(tmp_path).sample(3).log_prob.shape == (3,)


@pytest.mark.slow
def test_a_run_of_a_molecule(tmp_path):
    small = "generator.model={architecture: hierarchical, n_pairs: 2, width: 16, depth: 1}"
    metrics = run_in(tmp_path / "run", ["system=aldp_amber96", *TINY, small, f"data_dir={tmp_path}"])
    assert (metrics["method"], metrics["settings"]["temperatures"]) == ("fab", "300")
    assert metrics["counts"]["energy evaluations, training in all"] == (2 + 5) * 64 * (1 + 2 * 4)
    assert bz.load_run(tmp_path / "run").sample(3).log_prob.shape == (3,)
    assert (tmp_path / "run" / "figures" / "learning_curves.png").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fab.fit.steps=0", "fab.fit.steps=0 trains nothing"),
        ("fab.min_batches=9", "fab.min_batches=9, with which training begins, must fit into fab.max_batches=4"),
        ("system=checkerboard", "checkerboard has no gradient, which method=fab needs"),
    ],
)
def test_settings_that_cannot_work(override, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run_in(tmp_path, ["system=gaussians8", *TINY, override])
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_all_of_eight_modes_are_found(tmp_path):
    """Eight Gaussians by `budget=cpu`: an ESS above 90%."""
    metrics = run_in(tmp_path, ["system=gaussians8", "method=fab", "budget=cpu", "fab.fit.steps=3000", "threads=1"])
    assert metrics["ess"]["exact weights"]["ess"] > 0.9
