"""The annealing's parts against arithmetic, and a double well annealed from one temperature to a third of it."""

import itertools
import logging
import math

import numpy as np
import pytest
import torch

from boltznce.annealing import fill_buffer, forget_buffer, forward_kl, reverse_kl, reverse_kl_along_paths, soften, temperature_ladder
from boltznce.errors import UserError
from boltznce.flows.box import BoxCoordinates
from boltznce.flows.spline_flow import SplineFlow


def test_published_ladder():
    ladder = temperature_ladder(1200, 300, 9)
    published = [1200, 1028.69, 881.84, 755.95, 648.04, 555.52, 476.22, 408.24, 349.96, 300, 300]
    assert len(ladder) == 10
    for (hot, cold), expected in zip(ladder, itertools.pairwise(published), strict=True):
        assert (hot, cold) == pytest.approx(expected, abs=0.01)
    assert temperature_ladder(30, 1, 7)[-1] == (1, 1)
    assert temperature_ladder(4, 1, 2, repeat_last=0, repeat_first=2) == [(4, 4), (4, 4), (4, 2), (2, 1)]
    with pytest.raises(UserError, match="goes down"):
        temperature_ladder(300, 1200, 9)


def test_softened_energies():
    u = torch.tensor([-5.0, 0.0, 1e8, 1e8 + math.e - 1, 1e30, math.inf, math.nan], dtype=torch.float64, requires_grad=True)
    soft = soften(u)
    capped = 1e8 + math.log(1e20)
    torch.testing.assert_close(
        soft, torch.tensor([-5.0, 0.0, 1e8, 1e8 + 1, capped, capped, capped], dtype=torch.float64), rtol=1e-12, atol=0
    )
    soft.sum().backward()
    torch.testing.assert_close(u.grad[:4], torch.tensor([1.0, 1.0, 1.0, 1 / math.e], dtype=torch.float64), rtol=1e-6, atol=0)
    assert (u.grad[4:] == 0).all()


def test_losses():
    log_q, u = torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), torch.tensor([10.0, 900.0, 30.0, math.nan]).double()
    assert reverse_kl(log_q, u, 2)["loss"] == 22.0
    assert reverse_kl(log_q[:3], u[:3])["loss"] == pytest.approx(946 / 3)
    parts = forward_kl(torch.tensor([-1.0, -math.inf, -3.0]))
    assert parts["loss"] == 2.0
    assert parts["outside"] == pytest.approx(1 / 3)


def test_gradient_along_paths_has_the_same_mean_and_no_noise_where_the_generator_is_right():
    """N(m, s²) fitted to N(0, 1): dKL/dm = m and dKL/ds = s - 1/s; at m = 0, s = 1 every draw's gradient is zero."""
    noise = torch.randn(200000, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def gradients(m, s, clip=math.inf, spoiled=0):
        m, s = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (m, s))
        x = m + s * noise

        def log_prob(x):
            return (-0.5 * ((x - m) / s).square() - s.log() - 0.5 * math.log(2 * math.pi)).sum((1, 2))

        def energy(x):
            return torch.cat([math.nan * x[:spoiled].sum((1, 2)), standard(x[spoiled:])])

        parts = reverse_kl_along_paths(x, log_prob, energy, clip)
        return {key: float(value) for key, value in parts.items()}, torch.autograd.grad(parts["loss"], (m, s))

    parts, (of_m, of_s) = gradients(0.5, 1.5)
    assert parts["loss"] == pytest.approx(2 * (0.5 * (0.25 + 1.5**2 - 1) - math.log(1.5)) - math.log(2 * math.pi), abs=0.02)
    assert of_m.item() == pytest.approx(2 * 0.5, abs=0.02)
    assert of_s.item() == pytest.approx(2 * (1.5 - 1 / 1.5), abs=0.02)
    assert parts["shortened"] == 0
    _, right = gradients(0.0, 1.0)
    assert max(abs(gradient) for gradient in right) < 1e-12
    parts, clipped = gradients(0.5, 1.5, clip=1.0, spoiled=10)
    assert parts["shortened"] == pytest.approx(0.5, abs=0.01)
    assert 0 < clipped[1] < of_s


def gaussian(n, generator):
    """Draws of N(0, 2²) in the plane."""
    x = 2 * torch.randn(n, 1, 2, generator=generator)
    return x, -x.double().square().sum((1, 2)) / 8 - math.log(2 * math.pi * 4)


def standard(x):
    return 0.5 * x.square().sum((1, 2))


SETTINGS = {"temperatures": (4.0, 1.0), "n_draws": 20000, "n_buffer": 5000, "clip": 1e-4, "batch_size": 1500}


def fill(folder, draw=gaussian, energy=standard, **settings):
    return fill_buffer(
        draw,
        energy,
        folder,
        generator_of=lambda k: torch.Generator().manual_seed(k),
        rng=np.random.default_rng(0),
        **SETTINGS | settings,
    )


def test_buffer_has_the_target_distribution_and_the_known_ess(tmp_path):
    positions, record = fill(tmp_path / "buffer")
    assert positions.shape == (5000, 1, 2)
    assert positions.std() == pytest.approx(1, abs=0.03)
    # E_q[w]² / E_q[w²] of N(0, 1) over N(0, s²), s² = 4, in each dimension: sqrt(2 s² - 1) / s²
    assert record.ess == pytest.approx(7 / 16, abs=0.01)
    assert record.ess_clipped >= record.ess
    assert record.energy_evaluations == 20000
    assert (record.drawn_at, record.weighted_to, record.not_finite) == (4.0, 1.0, 0)
    forget_buffer(tmp_path / "buffer")
    assert not list(tmp_path.iterdir())


def test_killed_draws_go_on_and_end_the_same(tmp_path):
    whole, record = fill(tmp_path / "whole")

    def killed(x):
        if killed.calls == 5:
            raise KeyboardInterrupt
        killed.calls += 1
        return standard(x)

    killed.calls = 0
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "again", energy=killed)
    evaluated = []
    again, same = fill(tmp_path / "again", energy=lambda x: (evaluated.append(len(x)), standard(x))[1])
    assert sum(evaluated) == 20000 - 5 * 1500
    assert (again == whole).all()
    assert same == record
    loaded, _ = fill(tmp_path / "again", energy=None)  # nothing is evaluated again
    assert (loaded == whole).all()


def test_a_collapse_is_told_and_bad_energies_weigh_nothing(tmp_path, caplog):
    def spiked(x):
        u = standard(x)
        u[::7] = math.nan
        return torch.where(torch.arange(len(u)) == 3, -50.0, u)

    with caplog.at_level(logging.WARNING):
        positions, record = fill(tmp_path / "buffer", energy=spiked, n_draws=3000, clip=0.0)
    assert "collapsed" in caplog.text
    assert "annealing.n_steps" in caplog.text
    assert record.not_finite == 2 * 215
    assert len(np.unique(positions[:, 0, 0])) < 5


def double_well(x):
    """U = 4 (x² - 1)² + x / 2 + 2 y² (the reduced energy at T = 1)."""
    x, y = x[..., 0, 0], x[..., 0, 1]
    return 4 * (x**2 - 1) ** 2 + x / 2 + 2 * y**2


def left_share(temperature):
    x = torch.linspace(-2.5, 2.5, 5001, dtype=torch.float64)
    p = torch.exp(-(4 * (x**2 - 1) ** 2 + x / 2) / temperature)
    return float(p[x < 0].sum() / p.sum())


def train(flow, loss, steps, lr, seed):
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(flow.parameters(), lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        parts = loss(generator)
        optimizer.zero_grad()
        parts["loss"].backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()


def test_double_well_is_annealed_with_both_wells_in_their_proportion(tmp_path):
    torch.manual_seed(0)
    flow = SplineFlow(BoxCoordinates(1, [-2.5, -2.5], [2.5, 2.5]), n_pairs=2, width=24, depth=2, prior_std=0.2)
    hot = 4.0

    def reverse(generator):
        x, log_q = flow.sample_with_log_prob(256, generator)
        return reverse_kl(log_q, double_well(x) / hot, 2)

    train(flow, reverse, 120, 1e-2, 0)
    records = []
    for k, (at, to) in enumerate(temperature_ladder(hot, 1.0, 2)):
        buffer, record = fill(
            tmp_path / f"{k}", draw=flow.sample, energy=lambda x, to=to: double_well(x) / to, temperatures=(at, to), n_draws=8000
        )
        records.append(record)
        data = torch.from_numpy(np.array(buffer))
        train(flow, lambda g, data=data: forward_kl(flow.log_prob(data[torch.randint(len(data), (256,), generator=g)])), 60, 5e-3, k)
    assert all(record.ess > 0.5 for record in records)
    assert records[-1].ess > 0.85  # once more at the last temperature: the flow is nearly there
    _, last = fill(tmp_path / "last", draw=flow.sample, energy=double_well, n_draws=8000)
    assert last.ess > 0.9
    x, _ = flow.sample(20000, torch.Generator().manual_seed(9))
    assert (x[:, 0, 0] < 0).float().mean().item() == pytest.approx(left_share(1.0), abs=0.04)
