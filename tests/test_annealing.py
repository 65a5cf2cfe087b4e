"""The annealing's parts against arithmetic, and a double well annealed from one temperature to a third of it."""

import itertools
import logging
import math

import numpy as np
import pytest
import torch

from boltznce.annealing import (
    fill_buffer,
    forget_buffer,
    forward_kl,
    log_variance,
    path_kl,
    reverse_kl,
    soften,
    temperature_ladder,
)
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
    assert temperature_ladder(4, 1, 2, repeat_between=1) == [(4, 2), (2, 2), (2, 1), (1, 1)]
    assert temperature_ladder(300, 300, 0) == []
    for hot, cold, n_steps in ((300, 1200, 9), (1200, 300, 0), (300, 300, 1)):
        with pytest.raises(UserError, match="goes down"):
            temperature_ladder(hot, cold, n_steps)


def test_softened_energies():
    u = torch.tensor(
        [-5.0, 0.0, 1e8, 1e8 + math.e - 1, 1e30, math.inf, math.nan], dtype=torch.float64, requires_grad=True
    )
    soft = soften(u)
    capped = 1e8 + math.log(1e20)
    torch.testing.assert_close(
        soft, torch.tensor([-5.0, 0.0, 1e8, 1e8 + 1, capped, capped, capped], dtype=torch.float64), rtol=1e-12, atol=0
    )
    soft.sum().backward()
    torch.testing.assert_close(
        u.grad[:4], torch.tensor([1.0, 1.0, 1.0, 1 / math.e], dtype=torch.float64), rtol=1e-6, atol=0
    )
    assert (u.grad[4:] == 0).all()


def test_losses():
    log_q, u = torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), torch.tensor([10.0, 900.0, 30.0, math.nan]).double()
    assert reverse_kl(log_q, u, 2)["loss"] == 22.0
    assert reverse_kl(log_q[:3], u[:3])["loss"] == pytest.approx(946 / 3)
    parts = forward_kl(torch.tensor([-1.0, -math.inf, -3.0]))
    assert parts["loss"] == 2.0
    assert parts["outside"] == pytest.approx(1 / 3)


def test_log_variance_of_gaussians():
    """N(m, s²) fitted to N(0, 1) on its own draws: the gradient is that of KL(q ‖ p), dKL/dm = m, dKL/ds = s - 1/s."""
    noise = torch.randn(400000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def gradients(m, s, x=None, **settings):
        m, s = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (m, s))
        x = (m + s * noise).detach() if x is None else x
        log_q = -0.5 * ((x - m) / s).square() - s.log()
        parts = log_variance(log_q, 0.5 * x.square() + 7.0, **settings)
        return parts, torch.autograd.grad(parts["loss"], (m, s))

    parts, (of_m, of_s) = gradients(0.5, 1.5, clip=math.inf)
    assert of_m.item() == pytest.approx(0.5, abs=0.02)
    assert of_s.item() == pytest.approx(1.5 - 1 / 1.5, abs=0.02)
    # log p - log q = a y² + b y + const of standard normal y, a = (1 - s²) / 2, b = -m s: variance 2 a² + b²
    assert parts["variance"] == pytest.approx(2 * 0.625**2 + 0.75**2, rel=0.02)
    assert parts["outside"] == 0
    _, (cut_m, cut_s) = gradients(0.5, 1.5, clip=1.0)
    assert 0 < cut_m < of_m
    assert 0 < cut_s < of_s
    narrow, covering = (gradients(0.0, 0.8, clip=math.inf, covering=covering)[1][1] for covering in (0.0, 1.0))
    assert covering < narrow < 0  # too narrow: the tails that are missing count more
    for elsewhere in (
        3 * noise,
        noise.square(),
    ):  # nothing is left where the densities agree, wherever the points come from
        parts, right = gradients(0.0, 1.0, x=elsewhere, covering=1.0)
        assert max(abs(gradient) for gradient in right) < 1e-12
        assert parts["variance"] < 1e-20


@pytest.mark.parametrize("covering", [0.0, 2.0])
def test_path_kl_of_gaussians(covering):
    """N(m, s²) fitted to N(0, 1): dKL(q ‖ p) = (m, s - 1/s), dKL(p ‖ q) = (m / s², 1/s - (1 + m²) / s³)."""
    noise = torch.randn(400000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def gradients(m, s, u=lambda x: 0.5 * x.square() + 7.0, **settings):
        mean, scale = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (m, s))
        x = mean + scale * noise
        log_q = -0.5 * ((x - m) / s).square() - math.log(s)
        parts = path_kl(log_q, u(x), covering=covering, **settings)
        gradient = torch.stack(torch.autograd.grad(parts["loss"], (mean, scale)))
        return log_q.detach() + 0.5 * x.detach().square(), gradient, parts

    m, s = 0.3, 1.2
    minus_log_w, found, parts = gradients(m, s, clip=math.inf)
    reverse = torch.tensor([m, s - 1 / s], dtype=torch.float64)
    forward = torch.tensor([m / s**2, 1 / s - (1 + m**2) / s**3], dtype=torch.float64)
    share = covering * minus_log_w.median().exp()
    torch.testing.assert_close(found, (reverse + share * forward) / (1 + covering), atol=5e-3, rtol=0)
    assert parts["variance"] == pytest.approx(2 * ((1 - s**2) / 2) ** 2 + (m * s) ** 2, rel=0.02)
    _, right, parts = gradients(0.0, 1.0)
    assert right.abs().max() < 1e-12  # draw by draw, so without noise
    assert parts["variance"] < 1e-20
    _, broken, _ = gradients(m, s, u=lambda x: torch.where(x > 1, math.inf, 0.5 * x.square()))
    assert broken.isfinite().all()


def test_log_variance_leaves_out_what_is_outside_the_domain():
    log_q = torch.tensor([0.3, -math.inf, -1.0, 0.2, -math.inf], requires_grad=True)
    u = torch.tensor([1.0, 5.0, -2.0, 0.5, 1e30])
    parts = log_variance(log_q, u)
    parts["loss"].backward()
    inside = [0, 2, 3]
    alone = log_q.detach()[inside].requires_grad_()
    log_variance(alone, u[inside])["loss"].backward()
    torch.testing.assert_close(log_q.grad[inside], alone.grad)
    assert (log_q.grad[[1, 4]] == 0).all()
    assert parts["outside"] == pytest.approx(0.4)


def gaussian(n, generator):
    """Draws of N(0, 2²) in the plane."""
    x = 2 * torch.randn(n, 1, 2, generator=generator)
    return x, -x.double().square().sum((1, 2)) / 8 - math.log(2 * math.pi * 4)


def standard(x):
    return 0.5 * x.square().sum((1, 2))


SETTINGS = {"temperatures": (4.0, 1.0), "n_draws": 20000, "clip": 1e-4, "batch_size": 1500}


def fill(folder, draw=gaussian, energy=standard, **settings):
    return fill_buffer(
        draw,
        energy,
        folder,
        generator_of=lambda k: torch.Generator().manual_seed(k),
        **SETTINGS | settings,
    )


def test_buffer_has_the_target_distribution_and_the_known_ess(tmp_path):
    drawn, record = fill(tmp_path / "buffer")
    positions = drawn.resample(5000, np.random.default_rng(0)).positions
    assert positions.std() == pytest.approx(1, abs=0.03)
    # E_q[w]² / E_q[w²] of N(0, 1) over N(0, s²), s² = 4, in each dimension: sqrt(2 s² - 1) / s²
    assert record.ess == pytest.approx(7 / 16, abs=0.01)
    assert record.ess_clipped == drawn.ess >= record.ess
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
    loaded, _ = fill(tmp_path / "again", energy=None)  # nothing is evaluated again
    for other in (again, loaded):
        assert (other.positions == whole.positions).all()
        assert (other.log_weights == whole.log_weights).all()
    assert same == record


def test_a_collapse_is_told_and_bad_energies_weigh_nothing(tmp_path, caplog):
    def spiked(x):
        u = standard(x)
        u[::7] = math.nan
        return torch.where(torch.arange(len(u)) == 3, -50.0, u)

    with caplog.at_level(logging.WARNING):
        drawn, record = fill(tmp_path / "buffer", energy=spiked, n_draws=3000, clip=0.0)
    assert "collapsed" in caplog.text
    assert "annealing.n_steps" in caplog.text
    assert record.not_finite == 2 * 215
    assert len(np.unique(drawn.resample(3000, np.random.default_rng(0)).positions[:, 0, 0])) < 5


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


@pytest.mark.parametrize("objective", ["forward_kl", "log_variance"])
def test_double_well_is_annealed_with_both_wells_in_their_proportion(tmp_path, objective):
    torch.manual_seed(0)
    flow = SplineFlow(BoxCoordinates(1, [-2.5, -2.5], [2.5, 2.5]), n_pairs=2, width=24, depth=2, prior_std=0.2)
    hot = 4.0

    def reverse(generator):
        x, log_q = flow.sample_with_log_prob(256, generator)
        return reverse_kl(log_q, double_well(x) / hot, 2)

    train(flow, reverse, 120, 1e-2, 0)
    records = []
    for k, (at, to) in enumerate(temperature_ladder(hot, 1.0, 2)):
        drawn, record = fill(
            tmp_path / f"{k}",
            draw=flow.sample,
            energy=lambda x, to=to: double_well(x) / to,
            temperatures=(at, to),
            n_draws=8000,
        )
        records.append(record)
        if objective == "forward_kl":
            drawn = drawn.resample(5000, np.random.default_rng(0))
        data, u = torch.from_numpy(np.array(drawn.positions)), torch.from_numpy(drawn.energy)

        def on_buffer(generator, data=data, u=u):
            index = torch.randint(len(data), (256,), generator=generator)
            log_q = flow.log_prob(data[index])
            return forward_kl(log_q) if objective == "forward_kl" else log_variance(log_q, u[index])

        train(flow, on_buffer, 60, 5e-3, k)
    assert all(record.ess > 0.5 for record in records)
    assert records[-1].ess > 0.85  # once more at the last temperature: the flow is nearly there
    _, last = fill(tmp_path / "last", draw=flow.sample, energy=double_well, n_draws=8000)
    assert last.ess > 0.9
    x, _ = flow.sample(20000, torch.Generator().manual_seed(9))
    assert (x[:, 0, 0] < 0).float().mean().item() == pytest.approx(left_share(1.0), abs=0.04)
