"""The networks on fading Fourier features: what they see at each noise level, and training by every objective."""

import math

import torch

from boltznce.ebm import EnergyBasedModel
from boltznce.networks.fourier import FadingWaves, FourierEnergy


def test_waves_fade_as_noise_blurs_them():
    """E[sin(ω·(x + σ z))] = exp(-ω²σ²/2) sin(ω·x) is what the noise leaves of a wave."""
    waves = FadingWaves(3)
    x, t = torch.tensor([[0.3, -0.2]]), torch.tensor([0.2])
    noise = math.tan(math.pi / 2 * 0.2) * torch.randn(400_000, 2, generator=torch.Generator().manual_seed(0))
    blurred = waves(x + noise, torch.zeros(len(noise))).mean(0)
    torch.testing.assert_close(waves(x, t)[0], blurred, atol=6e-3, rtol=0)
    assert waves.n_features == waves(x, t).shape[1] == 2 + 2 * 3 * 4


def test_only_the_position_is_left_at_the_prior():
    waves = FadingWaves(4)
    x = torch.randn(5, 2)
    features = waves(x, torch.ones(5))
    torch.testing.assert_close(features[:, :2], x)
    assert features[:, 2:].abs().max() < 1e-6


def test_energy_trains_with_every_objective():
    for objective in ("nce", "score", "both"):
        torch.manual_seed(0)
        ebm = EnergyBasedModel(FourierEnergy(32, 2, 4), 1, 2, centred=False, objective=objective)
        ebm.loss(torch.randn(64, 1, 2), torch.Generator().manual_seed(0))["loss"].backward()
        gradients = {name: p.grad for name, p in ebm.named_parameters()}
        if objective == "score":  # a level of each time has no gradient in x
            gradients = {
                name: g for name, g in gradients.items() if "level" not in name and name != "network.trunk.outlet.bias"
            }
        assert all(g is not None and g.isfinite().all() for g in gradients.values())
