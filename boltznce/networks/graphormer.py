"""Energy network: a transformer over atoms, attention biased by distances (Graphormer, arXiv:2203.04810)."""

import math

import torch
from torch import Tensor, nn

from boltznce.errors import UserError

__all__ = ["GraphormerEnergy"]

# Å, added to each component of a difference vector: an atom's distance to itself then has a derivative, and energies
# are invariant to rotations as far as distances may change by 2e-5 Å
DISTANCE_EPS = 1e-5
WIDTH_EPS = 1e-5  # added to the width of a Gaussian


def two_layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))


class PairKernels(nn.Module):
    """Normalized Gaussians of an affine function of the distance, learned for each ordered pair of atom types."""

    def __init__(self, n_types: int, n_kernels: int):
        super().__init__()
        self.n_types = n_types
        self.scale = nn.Parameter(torch.ones(n_types * n_types))
        self.shift = nn.Parameter(torch.zeros(n_types * n_types))
        self.means = nn.Parameter(3 * torch.rand(n_kernels))
        self.widths = nn.Parameter(3 * torch.rand(n_kernels))

    def forward(self, x: Tensor, types: Tensor) -> Tensor:
        """(batch, n, n, n_kernels) of positions (batch, n, 3), types ([batch,] n); the second index is attended to."""
        distance = (x.unsqueeze(1) - x.unsqueeze(2) + DISTANCE_EPS).square().sum(-1).sqrt()
        pair = types.unsqueeze(-1) * self.n_types + types.unsqueeze(-2)
        width = self.widths.abs() + WIDTH_EPS
        z = ((self.scale[pair] * distance + self.shift[pair]).unsqueeze(-1) - self.means) / width
        return torch.exp(-0.5 * z.square()) / (math.sqrt(2 * math.pi) * width)


class Layer(nn.Module):
    """Pre-norm transformer layer with an additive attention bias.

    Attention is spelled out because the fused kernels have no second derivative, which score matching needs.
    """

    def __init__(self, width: int, ffn_width: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = two_layers(width, ffn_width, width)

    def forward(self, h: Tensor, bias: Tensor) -> Tensor:
        """h (batch, n, width), bias (batch, heads, n, n) -> (batch, n, width)."""
        batch, n, width = h.shape
        q, k, v = self.qkv(self.attention_norm(h)).view(batch, n, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias, dim=-1)
        h = h + self.out((weights @ v).transpose(1, 2).reshape(batch, n, width))
        return h + self.ffn(self.ffn_norm(h))


class GraphormerEnergy(nn.Module):
    """The EBM of BoltzNCE: log p_t(x) up to a constant, invariant to rigid motions, mirroring and permutations.

    Args:
        n_features: width of the atom features.
        n_types: the last this many features are a one-hot encoding of the atom's type, for which pairs have their own
            distance scales; the atom's embedding is the sum over all its features. Default: all, the features are the
            types.
        n_layers, width, ffn_width, n_heads: the transformer; ``width`` is a multiple of ``n_heads``.
        n_kernels: Gaussians of a distance.
    """

    def __init__(
        self,
        n_features: int,
        n_layers: int,
        width: int,
        ffn_width: int,
        n_heads: int,
        n_kernels: int,
        n_types: int | None = None,
    ):
        super().__init__()
        if width % n_heads:
            raise UserError(f"width={width} of a Graphormer must be a multiple of n_heads={n_heads}.")
        self.n_types = n_types or n_features
        self.type_embedding = nn.Embedding(n_features, width)
        self.time_embedding = two_layers(1, 1, width)
        self.kernels = PairKernels(self.n_types, n_kernels)
        self.kernels_to_node = nn.Linear(n_kernels, width)
        self.kernels_to_bias = two_layers(n_kernels, n_kernels, n_heads)
        self.layers = nn.ModuleList(Layer(width, ffn_width, n_heads) for _ in range(n_layers))
        self.final_norm = nn.LayerNorm(width)
        self.head = two_layers(width, width, 1)

    def forward(self, x: Tensor, t: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Energy (batch,) at positions x (batch, n, 3) in scaled units and times t (batch,).

        features: (n, F), or (batch, n, F) for unlike molecules; mask: (batch, n), true for the real atoms.
        """
        types = features[..., -self.n_types :].argmax(-1)
        kernels = self.kernels(x, types)
        if mask is not None:
            kernels = kernels * mask.to(x).reshape(len(x), 1, -1, 1)
        time = self.time_embedding(t.view(-1, 1, 1))
        h = self._embed(features, types) + self.kernels_to_node(kernels.sum(-2)) + time
        bias = self.kernels_to_bias(kernels).permute(0, 3, 1, 2)
        if mask is not None:
            bias = bias.masked_fill(~mask.reshape(len(x), 1, 1, -1), -torch.inf)
        for layer in self.layers:
            h = layer(h, bias)
        energy = self.head(self.final_norm(h))
        if mask is not None:
            energy = energy * mask.to(x).unsqueeze(-1)
        return energy.sum((-1, -2))

    def _embed(self, features: Tensor, types: Tensor) -> Tensor:
        """Embedding (..., n, width) of the atoms' features."""
        if self.n_types == self.type_embedding.num_embeddings:
            return self.type_embedding(types)
        return features.to(self.type_embedding.weight) @ self.type_embedding.weight
