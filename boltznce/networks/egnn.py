"""Vector field of an E(n)-equivariant graph network (Satorras et al. 2021, arXiv 2102.09844) on all pairs of atoms.

As transferable Boltzmann generators use it (Klein & Noé 2024, arXiv 2406.14426): attention on messages, bounded steps
along normalized differences, and the velocity is where the atoms end less where they began. Tensors over pairs are
(batch, target, source, ...).
"""

import torch
from torch import Tensor, nn

__all__ = ["EGNNVectorField"]

NORM_FLOOR = 1e-8  # beside a squared distance under the root: an atom's distance to itself then has a derivative


class Layer(nn.Module):
    """Messages m_ij = φ_m(h_i, h_j, d²_ij, d²_ij at the start) times their attention, of the sources j != i.

    x_i += Σ_j (x_i - x_j) / (d_ij + 1) φ_x(m_ij), h_i += φ_h(h_i, Σ_j m_ij); the last layer needs no φ_h.
    """

    def __init__(self, width: int, longest_step: float, attention: bool, last: bool):
        super().__init__()
        self.longest_step = longest_step
        # φ_m's first map, split into what each end and the distances contribute: the ends' are computed once an atom
        self.target, self.source = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.distances = nn.Linear(2, width, bias=False)
        self.message = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.attention = nn.Linear(width, 1) if attention else None
        to_step = nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1, bias=False)
        self.step = nn.Sequential(*to_step)
        nn.init.xavier_uniform_(to_step[-1].weight, gain=0.001)  # steps are small at first
        self.update = None if last else nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, h: Tensor, x: Tensor, start: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """h (batch, n, width), x (batch, n, 3); squared distances at first, ``others``, 1 if j counts (…, n, n, 1)."""
        difference = x.unsqueeze(2) - x.unsqueeze(1)
        squared = difference.square().sum(-1, keepdim=True)
        ends = self.target(h).unsqueeze(2) + self.source(h).unsqueeze(1)
        m = self.message(ends + self.distances(torch.cat([squared, start], dim=-1)))
        if self.attention is not None:
            m = m * torch.sigmoid(self.attention(m))
        m = m * others
        length = self.longest_step * torch.tanh(self.step(m)) * others
        x = x + (difference / ((squared + NORM_FLOOR).sqrt() + 1) * length).sum(2)
        if self.update is not None:
            h = h + self.update(torch.cat([h, m.sum(2)], dim=-1))
        return h, x


class EGNNVectorField(nn.Module):
    """The field of transferable Boltzmann generators: E(3)-equivariant, and equivariant to permutations.

    Args:
        n_features: width F of the atom features.
        n_layers, width: depth and channels.
        coordinate_range: bound of what one source moves an atom by, all layers together, in the flow's scaled units.
        attention: whether each message is weighted by a learned number in (0, 1).
    """

    def __init__(
        self, n_features: int, n_layers: int, width: int, coordinate_range: float = 15.0, attention: bool = True
    ):
        super().__init__()
        self.embedding = nn.Linear(n_features + 1, width)
        step = coordinate_range / n_layers
        self.layers = nn.ModuleList(Layer(width, step, attention, last=i == n_layers - 1) for i in range(n_layers))

    def forward(self, x: Tensor, t: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Velocity (batch, n, 3) at positions x (batch, n, 3) and times t (batch,). It is not mean-free.

        features: (n, F), or (batch, n, F) for unlike molecules; mask: (batch, n), true for the real atoms.
        """
        batch, n, _ = x.shape
        inputs = torch.cat([features.to(x).expand(batch, n, -1), t.reshape(batch, 1, 1).expand(batch, n, 1)], dim=-1)
        others = (1 - torch.eye(n, dtype=x.dtype, device=x.device)).unsqueeze(-1)
        if mask is not None:
            others = others * mask.to(x).reshape(batch, 1, n, 1)
        start = (x.unsqueeze(2) - x.unsqueeze(1)).square().sum(-1, keepdim=True)
        h, y = self.embedding(inputs), x
        for layer in self.layers:
            h, y = layer(h, y, start, others)
        v = y - x
        return v if mask is None else v * mask.to(x).unsqueeze(-1)
