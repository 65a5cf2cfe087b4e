"""Energy and vector field of a particle in the plane on Fourier features that fade with the noise.

Noise of size σ blurs a density's Fourier components by exp(-ω²σ²/2), so that is how much of a wave of frequency ω is
shown to the network at time t. What is sharp (a cell's edge) is learned near t = 0 from fast waves, what is smooth at
every t from slow ones. A velocity turns sharply where the noised modes meet, although the density is smooth there: its
waves fade later.
"""

import math

import torch
from torch import Tensor, nn

from boltznce.networks.mlp import TimeEmbedding

__all__ = ["FadingWaves", "FourierEnergy", "FourierVectorField"]

LATEST = 0.99  # later times count as this one: the ratio σ/α has a pole at t = 1


class FadingWaves(nn.Module):
    """Points (batch, 2) and times (batch,) -> (batch, n_features): x and faded sines and cosines along some directions.

    Frequencies are slowest · 2^k in rad per unit of x, k < n_octaves. The noise-to-signal ratio σ/α is taken as
    tan(πt/2), which is that of the trigonometric interpolant and close to that of the linear one. ``fading`` multiplies
    the exponent: at 1 a wave fades as that component of the density does.
    """

    waves: Tensor
    squares: Tensor

    def __init__(self, n_octaves: int, fading: float = 1, n_directions: int = 4, slowest: float = math.pi / 2) -> None:
        super().__init__()
        self.fading = fading
        angles = math.pi / n_directions * torch.arange(n_directions)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        frequencies = slowest * 2.0 ** torch.arange(n_octaves)
        self.register_buffer("waves", (frequencies[:, None, None] * directions).reshape(-1, 2), persistent=False)
        self.register_buffer("squares", self.waves.square().sum(-1), persistent=False)
        self.n_features = 2 + 2 * len(self.waves)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        noise = torch.tan(math.pi / 2 * t.clamp(max=LATEST)).unsqueeze(-1)
        strength = torch.exp(-0.5 * self.fading * noise.square() * self.squares)
        phase = x @ self.waves.T
        return torch.cat([x, strength * phase.sin(), strength * phase.cos()], dim=-1)


class _Trunk(nn.Module):
    """h <- h + silu(W h + time) on `FadingWaves`: (batch, 2), (batch,) -> (batch, n_out), time embedding."""

    def __init__(self, n_out: int, width: int, n_layers: int, n_octaves: int, fading: float) -> None:
        super().__init__()
        self.width = width
        self.time, self.waves = TimeEmbedding(), FadingWaves(n_octaves, fading)
        self.inlet = nn.Linear(self.waves.n_features, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(n_layers))
        self.shift = nn.Linear(64, width * (n_layers + 1))
        self.activation = nn.SiLU()
        self.outlet = nn.Linear(width, n_out)
        with torch.no_grad():
            self.outlet.weight.mul_(0.1)
            self.outlet.bias.zero_()

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        time = self.time(t)
        first, *shifts = self.shift(time).split(self.width, dim=-1)
        h = self.activation(self.inlet(self.waves(x, t)) + first)
        for layer, shift in zip(self.hidden, shifts, strict=True):
            h = h + self.activation(layer(h) + shift)
        return self.outlet(h), time


class FourierVectorField(nn.Module):
    """Velocity (batch, 1, 2)."""

    def __init__(self, width: int = 128, n_layers: int = 3, n_octaves: int = 5, fading: float = 0.2) -> None:
        super().__init__()
        self.trunk = _Trunk(2, width, n_layers, n_octaves, fading)

    def forward(self, x: Tensor, t: Tensor, features: Tensor | None = None) -> Tensor:
        return self.trunk(x.flatten(1), t)[0].view_as(x)


class FourierEnergy(nn.Module):
    """Log-likelihood up to a constant (batch,): a quadratic well, a level that depends on time, and the network."""

    def __init__(self, width: int = 128, n_layers: int = 3, n_octaves: int = 7, fading: float = 1.0) -> None:
        super().__init__()
        self.trunk, self.level = _Trunk(1, width, n_layers, n_octaves, fading), nn.Linear(64, 1)

    def forward(self, x: Tensor, t: Tensor, features: Tensor | None = None) -> Tensor:
        x = x.flatten(1)
        value, time = self.trunk(x, t)
        return (value + self.level(time)).squeeze(-1) - 0.5 * x.square().sum(-1)
