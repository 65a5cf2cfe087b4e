"""The energy-based model against a density that is known: a mixture of two Gaussians of unequal weight in the plane."""

import math

import pytest
import torch
from lightning_fabric import Fabric

from boltznce.ebm import EnergyBasedModel, _reflect
from boltznce.errors import UserError
from boltznce.networks.mlp import MLPEnergy
from boltznce.training import FitSettings, fit

CENTRES = torch.tensor([[-1.0, 0.0], [1.0, 0.5]])
WEIGHTS = torch.tensor([0.8, 0.2])
WIDTH = 0.25


def sample(n, generator):
    mode = torch.multinomial(WEIGHTS, n, replacement=True, generator=generator)
    return (CENTRES[mode] + WIDTH * torch.randn(n, 2, generator=generator)).unsqueeze(1)


def log_density(x, t=0.0):
    """Of the trigonometric interpolant at time t: each mode stays Gaussian."""
    alpha, sigma = math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t)
    variance = (alpha * WIDTH) ** 2 + sigma**2
    squares = (x - alpha * CENTRES).square().sum(-1) / variance
    return torch.logsumexp(WEIGHTS.log() - squares / 2, dim=-1) - math.log(2 * math.pi * variance)


class ExactEnergy(torch.nn.Module):
    def forward(self, x, t, features=None):
        alpha, sigma = torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
        variance = ((alpha * WIDTH) ** 2 + sigma**2).unsqueeze(-1)
        squares = (x - alpha.reshape(-1, 1, 1) * CENTRES).square().sum(-1) / variance
        return (torch.logsumexp(WEIGHTS.log() - squares / 2, dim=-1) - torch.log(variance.squeeze(-1))).reshape(-1)


def train(tmp_path, steps=700, **kwargs):
    torch.manual_seed(0)
    ebm = EnergyBasedModel(MLPEnergy(1, 2, 64, 1), 1, 2, centred=False, **kwargs)
    settings = FitSettings(steps=steps, lr=5e-3, ema_decay=0.99, validate_every=0, checkpoint_every=10**6)
    fit(
        ebm,
        lambda m, k, g: m.loss(sample(512, g), g),
        settings,
        tmp_path,
        fabric=Fabric(accelerator="cpu", devices=1),
        seed=0,
        name="ebm",
    )
    return ebm


def test_trained_with_both_losses_it_recovers_density_and_mode_weights(tmp_path):
    ebm = train(tmp_path, time_power=2.0, nce_width=0.1)
    x = sample(4000, torch.Generator().manual_seed(1))
    error = ebm.log_prob_in_batches(x).float() - log_density(x)
    assert error.std() < 0.15
    # the error of the modes' relative weight, in kT, which score matching alone does not see
    left = x[:, 0, 0] < 0
    assert abs(error[left].mean() - error[~left].mean()) < 0.15


def test_the_exact_density_minimizes_both_losses():
    ebm = EnergyBasedModel(ExactEnergy(), 1, 2, centred=False).eval()

    def losses(model):
        return model.loss(sample(20000, torch.Generator().manual_seed(2)), torch.Generator().manual_seed(3))

    class Tilted(ExactEnergy):
        """Off by a factor in time, which only NCE can see, or by a slope in space."""

        def __init__(self, time, space):
            super().__init__()
            self.time, self.space = time, space

        def forward(self, x, t, features=None):
            return super().forward(x, t) + self.time * t + self.space * x[:, 0, 0]

    best = losses(ebm)
    in_time = losses(EnergyBasedModel(Tilted(5.0, 0.0), 1, 2, centred=False).eval())
    in_space = losses(EnergyBasedModel(Tilted(0.0, 0.5), 1, 2, centred=False).eval())
    torch.testing.assert_close(in_time["score"], best["score"])
    assert in_time["nce"] > best["nce"]
    assert in_space["score"] > best["score"] + 0.01


def test_spreading_times_does_not_bias_the_classification():
    """With times u^p the exact energy must still be where the NCE loss has no slope in a term c(t)."""
    for power in (1.0, 2.0):
        ebm = EnergyBasedModel(ExactEnergy(), 1, 2, centred=False, objective="nce", time_power=power, nce_width=0.1)
        scale = torch.zeros((), requires_grad=True)
        exact = ebm.network.forward
        ebm.network.forward = lambda x, t, features=None, exact=exact, scale=scale: exact(x, t) + scale * 10 * (t - 0.5)
        slopes = []
        for seed in range(10):
            loss = ebm.loss(
                sample(20000, torch.Generator().manual_seed(seed)), torch.Generator().manual_seed(seed + 99)
            )["nce"]
            slopes.append(torch.autograd.grad(loss, scale)[0])
        slopes = torch.stack(slopes)
        assert abs(slopes.mean()) < 4 * slopes.std() / math.sqrt(len(slopes))


@pytest.mark.parametrize("n_negatives", [1, 2, 4, 8])
def test_the_best_scale_of_the_exact_density_is_one(n_negatives):
    """One step of Newton from it, in the NCE loss; negatives about the true time itself gave 0.78, 0.63, 0.58."""
    ebm = EnergyBasedModel(ExactEnergy(), 1, 2, centred=False, objective="nce", nce_width=0.1, n_negatives=n_negatives)
    scale, exact = torch.ones((), requires_grad=True), ebm.network.forward
    ebm.network.forward = lambda x, t, features=None: scale * exact(x, t)
    steps = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        (slope,) = torch.autograd.grad(ebm.loss(sample(20000, generator), generator)["nce"], scale, create_graph=True)
        steps.append((slope / torch.autograd.grad(slope, scale)[0]).detach())
    steps = torch.stack(steps)
    assert abs(steps.mean()) < 4 * steps.std() / math.sqrt(len(steps)) < 0.15


def test_regression_onto_noisy_likelihoods_finds_their_mean(tmp_path):
    torch.manual_seed(0)
    ebm = EnergyBasedModel(MLPEnergy(1, 2, 64, 1), 1, 2, centred=False)

    def loss(ebm, step, generator):
        x = sample(512, generator)
        noisy = log_density(x) + 3.0 * torch.randn(len(x), generator=generator) + 7.0
        return {"loss": ebm.regression_loss(x, noisy)}

    settings = FitSettings(steps=500, lr=3e-3, ema_decay=0.99, validate_every=0, checkpoint_every=10**6)
    fit(ebm, loss, settings, tmp_path, fabric=Fabric(accelerator="cpu", devices=1), seed=0, name="ebm")
    x = sample(4000, torch.Generator().manual_seed(1))
    assert (ebm.log_prob_in_batches(x).float() - log_density(x)).std() < 0.25


@pytest.mark.parametrize(("power", "sign"), [(1.0, 0), (0.3, -1), (3.0, 1)])
def test_contrast_is_zero_for_the_density_of_the_samples_alone(power, sign):
    """Walkers in a flatter density spread to where it is low, in a steeper one they gather where it is high."""
    ebm = EnergyBasedModel(ExactEnergy(), 1, 2, centred=False, contrast_weight=1.0)
    exact = ebm.network.forward
    ebm.network.forward = lambda x, t, features=None: power * exact(x, t)
    generator = torch.Generator().manual_seed(0)
    contrasts = torch.stack([ebm.contrast(sample(512, generator), generator) for _ in range(200)])[40:]
    error = contrasts.reshape(8, -1).mean(1).std() / math.sqrt(8)
    assert abs(contrasts.mean()) < 4 * error if sign == 0 else sign * contrasts.mean() > 0.1
    assert 0.05 < ebm.walkers_step < 1.0


def test_contrast_lowers_a_mode_that_no_sample_is_in(tmp_path):
    """Samples stay at one side; the energy has a second mode, of the same height, that walkers find."""

    class Spurious(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.height = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, t, features=None):
            here, there = (-0.5 * ((x[:, 0] - at) ** 2).sum(-1) for at in (0.0, 2.5))
            return torch.logaddexp(here, there + self.height)

    ebm = EnergyBasedModel(Spurious(), 1, 2, centred=False, objective="nce", contrast_weight=1.0)
    optimizer, generator = torch.optim.Adam(ebm.parameters(), lr=0.05), torch.Generator().manual_seed(0)
    for _ in range(120):
        optimizer.zero_grad()
        ebm.loss(torch.randn(512, 1, 2, generator=generator), generator)["contrast"].backward()
        optimizer.step()
    assert ebm.network.height < -2


def test_a_killed_training_goes_on_with_its_walkers(tmp_path):
    class Killed(Exception):
        pass

    def trained(folder, killed_at=None):
        torch.manual_seed(0)
        ebm = EnergyBasedModel(MLPEnergy(1, 2, 16, 1), 1, 2, centred=False, contrast_weight=0.1)

        def loss(ebm, step, generator):
            if step == killed_at:
                raise Killed
            return ebm.loss(sample(32, generator), generator)

        settings = FitSettings(steps=8, validate_every=0, checkpoint_every=2)
        fit(ebm, loss, settings, folder, fabric=Fabric(accelerator="cpu", devices=1), seed=0, name="ebm")
        return ebm.state_dict()

    with pytest.raises(Killed):
        trained(tmp_path / "killed", 5)
    resumed, whole = trained(tmp_path / "killed"), trained(tmp_path / "whole")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert "walkers" in whole


def test_walkers_are_saved_with_the_weights_and_move_in_training_alone():
    ebm = EnergyBasedModel(ExactEnergy(), 1, 2, centred=False, contrast_weight=1.0)
    generator = torch.Generator().manual_seed(0)
    assert "contrast" not in ebm.eval().loss(sample(16, generator), generator)
    assert ebm.walkers.isnan().all()
    assert "contrast" in ebm.train().loss(sample(16, generator), generator)
    assert ebm.state_dict()["walkers"].isfinite().all()
    assert not EnergyBasedModel(ExactEnergy(), 1, 2, centred=False).state_dict()


def test_times_of_negatives_are_reflected():
    torch.testing.assert_close(_reflect(torch.tensor([-0.1, 0.3, 1.2])), torch.tensor([0.1, 0.3, 0.8]))


def test_unknown_objective():
    with pytest.raises(UserError, match="both"):
        EnergyBasedModel(ExactEnergy(), 1, 2, objective="contrastive")
