"""A residual MLP conditioned on time, and the vector field and energy for systems in the plane made of it."""

import math

import torch
from torch import Tensor, nn

__all__ = ["MLPEnergy", "MLPVectorField", "ResidualBlocks", "ResidualMLP", "TimeEmbedding", "standardize"]


class TimeEmbedding(nn.Module):
    """Sines and cosines of t and, for times near 0, of log(t + 1e-3), then two layers: (batch,) -> (batch, width)."""

    frequencies: Tensor

    def __init__(self, width: int = 64, n_frequencies: int = 8) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi / 2 * 2.0 ** torch.arange(n_frequencies // 2), persistent=False)
        self.hidden = nn.Sequential(nn.Linear(2 * n_frequencies, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, t: Tensor) -> Tensor:
        log_t = torch.log(t + 1e-3) / math.log(1e3)
        phase = torch.stack([t, log_t], dim=-1).unsqueeze(-1) * self.frequencies
        return self.hidden(torch.cat([phase.sin(), phase.cos()], dim=-1).flatten(1))


class ResidualBlocks(nn.Module):
    """Pre-norm residual blocks (batch, width), their normalized inputs scaled and shifted by the time embedding."""

    def __init__(self, width: int, n_time: int, n_blocks: int) -> None:
        super().__init__()
        self.width = width
        self.modulation = nn.Linear(n_time, 2 * width * n_blocks)
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(n_blocks))
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in range(n_blocks))
        self.activation = nn.SiLU()
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        modulations = self.modulation(time).split(2 * self.width, dim=-1)
        for first, second, modulation in zip(self.first, self.second, modulations, strict=True):
            scale, shift = modulation.chunk(2, dim=-1)
            h = h + second(self.activation(first(standardize(h) * (1 + scale) + shift)))
        return h


class ResidualMLP(nn.Module):
    """`ResidualBlocks` between linear layers, the last small at first: (batch, n_in) and time -> (batch, n_out)."""

    def __init__(self, n_in: int, n_out: int, n_time: int, width: int, n_blocks: int) -> None:
        super().__init__()
        self.inlet = nn.Linear(n_in, width)
        self.blocks = ResidualBlocks(width, n_time, n_blocks)
        last = nn.Linear(width, n_out)
        self.outlet = nn.Sequential(nn.SiLU(), last)
        with torch.no_grad():
            last.weight.mul_(0.1)
            last.bias.zero_()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.outlet(self.blocks(self.inlet(x), time))


class MLPVectorField(nn.Module):
    """Velocity (batch, n, dim) of particles without symmetry, for example one in the plane."""

    def __init__(self, n_atoms: int = 1, dim: int = 2, width: int = 256, n_blocks: int = 6) -> None:
        super().__init__()
        self.time = TimeEmbedding()
        self.mlp = ResidualMLP(n_atoms * dim, n_atoms * dim, 64, width, n_blocks)

    def forward(self, x: Tensor, t: Tensor, features: Tensor | None = None) -> Tensor:
        return self.mlp(x.flatten(1), self.time(t)).view_as(x)


class MLPEnergy(nn.Module):
    """Log-likelihood up to a constant (batch,) of particles without symmetry: a quadratic well plus the MLP."""

    def __init__(self, n_atoms: int = 1, dim: int = 2, width: int = 256, n_blocks: int = 6) -> None:
        super().__init__()
        self.time = TimeEmbedding()
        self.mlp = ResidualMLP(n_atoms * dim, 1, 64, width, n_blocks)
        self.level = nn.Linear(64, 1)

    def forward(self, x: Tensor, t: Tensor, features: Tensor | None = None) -> Tensor:
        x, time = x.flatten(1), self.time(t)
        return (self.mlp(x, time) + self.level(time)).squeeze(-1) - 0.5 * x.square().sum(-1)


def standardize(h: Tensor) -> Tensor:
    """Layer normalization without weights, in plain operations: forward-mode and double-backward compile."""
    h = h - h.mean(dim=-1, keepdim=True)
    return h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + 1e-5)
