"""The geometry of one molecule as coordinates: all distances, and signed volumes of bonded quadruples of atoms."""

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

__all__ = ["MolecularGeometry", "bonded_quadruples", "soft_clip"]


def bonded_quadruples(bonds: Sequence[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
    """Chains of four bonded atoms (torsions), and each atom with every three of its neighbours (chirality)."""
    neighbours: dict[int, set[int]] = {}
    for i, j in bonds:
        neighbours.setdefault(i, set()).add(j)
        neighbours.setdefault(j, set()).add(i)
    torsions = [
        (i, j, k, m)
        for j, k in bonds
        for i in sorted(neighbours[j] - {k})
        for m in sorted(neighbours[k] - {j})
        if i != m
    ]
    return torsions + [(i, *three) for i in sorted(neighbours) for three in combinations(sorted(neighbours[i]), 3)]


class MolecularGeometry(nn.Module):
    """Distances of all pairs and signed volumes of some quadruples of n atoms, standardized at each time, and their
    gradients.

    The signed volume of (i, j, k, m) is a·(b×c) with a = x_j - x_i, b = x_k - x_j, c = x_m - x_k; it changes sign in a
    mirror. ``calibrate`` measures mean and spread on a grid of noise levels; between them they are interpolated.

    Gradients are scaled to about one: a distance's is its connecting vector over the mean distance, and so on. With
    ``preconditioned``, what they move atoms by, metric @ gradient, is about one spread of the prior: a far pair then
    pulls little and a bond, along which the prior is narrow, much.
    """

    N_LEVELS = 65
    EPSILON = 1e-6  # under the root of a distance, in squared network units

    incidence: Tensor
    mean: Tensor
    spread: Tensor
    metric: Tensor
    steepness: Tensor

    def __init__(
        self, n_atoms: int, quadruples: Sequence[tuple[int, int, int, int]] = (), preconditioned: bool = False
    ) -> None:
        super().__init__()
        self.preconditioned = preconditioned
        pairs = torch.triu_indices(n_atoms, n_atoms, 1).T
        self.n_pairs, self.n_quadruples = len(pairs), len(quadruples)
        self.n_values = self.n_pairs + self.n_quadruples
        chains = torch.as_tensor(quadruples, dtype=torch.long).reshape(-1, 4)
        edges = torch.cat([pairs] + [chains[:, k : k + 2] for k in range(3)])
        # (atoms, edges): differences and sums over edges as matrix products, fast in every derivative
        one_hot = nn.functional.one_hot(edges, n_atoms).float()
        self.register_buffer("incidence", (one_hot[:, 1] - one_hot[:, 0]).T.contiguous(), persistent=False)
        self.register_buffer("mean", torch.ones(self.N_LEVELS, self.n_values))
        self.register_buffer("spread", torch.ones(self.N_LEVELS, self.n_values))
        self.register_buffer("metric", torch.eye(n_atoms))  # covariance of the atoms in the prior, ⟨x_i·x_j⟩ / 3
        self.register_buffer("steepness", torch.ones(self.N_LEVELS, self.n_values))

    @property
    def levels(self) -> Tensor:
        """The grid of times, cubic so that it is fine near the data."""
        return torch.linspace(0, 1, self.N_LEVELS, device=self.mean.device) ** 3

    @torch.no_grad()
    def calibrate(self, positions_at: Callable[[float], Tensor]) -> None:
        """Measure mean, spread and size of gradients on ``positions_at(t)`` (batch, n, 3) for every t of the grid."""
        prior = positions_at(1.0)
        self.metric.copy_(torch.einsum("bid,bjd->ij", prior, prior) / (3 * len(prior)))
        for k, t in enumerate(self.levels.tolist()):
            values, parts = self.values(positions_at(t))
            self.mean[k] = values.mean(dim=0)
            self.spread[k] = values.std(dim=0).clamp_min(1e-3)
            self.steepness[k] = (
                self._size_of_gradients(parts) if self.preconditioned else self._mean_lengths(self.mean[k], parts)
            )

    def _mean_lengths(self, mean: Tensor, parts: list[Tensor]) -> Tensor:
        areas = torch.stack(parts[1:]).square().sum(dim=-2).mean(dim=(0, 1)) if self.n_quadruples else mean.new_ones(0)
        return torch.cat([mean[: self.n_pairs], areas.sqrt()])

    def _size_of_gradients(self, parts: list[Tensor]) -> Tensor:
        """√⟨∇value·(metric @ ∇value)⟩ (values,) over the batch, gradients as `along_gradients` takes them, unscaled."""
        pairs, *chains = self.incidence.split([self.n_pairs, *[self.n_quadruples] * 3], dim=1)
        squared = [parts[0].square().sum(dim=-2).mean(dim=0) * (pairs * (self.metric @ pairs)).sum(dim=0)]
        if self.n_quadruples:
            squared.append(
                sum(
                    (parts[1 + a] * parts[1 + b]).sum(dim=-2).mean(dim=0)
                    * (chains[a] * (self.metric @ chains[b])).sum(dim=0)
                    for a in range(3)
                    for b in range(3)
                )
            )
        return torch.cat(squared).clamp_min(1e-6).sqrt()

    def values(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Values (batch, values) at ``x`` (batch, n, 3), and what `along_gradients` needs."""
        vectors = x.transpose(-1, -2) @ self.incidence
        pairs = vectors[..., : self.n_pairs]
        distances = torch.sqrt(pairs.square().sum(dim=-2) + self.EPSILON)
        if not self.n_quadruples:
            return distances, [pairs]
        a, b, c = vectors[..., self.n_pairs :].split(self.n_quadruples, dim=-1)
        areas = [_cross(b, c), _cross(c, a), _cross(a, b)]
        return torch.cat([distances, (a * areas[0]).sum(dim=-2)], dim=-1), [pairs, *areas]

    def stiff_gradients(self, x: Tensor) -> Tensor:
        """Gradients (batch, pairs, n, 3) of distances over their spread in the data: long along what is stiff."""
        vectors = self.values(x)[1][0]
        units = (
            vectors
            * torch.rsqrt(vectors.square().sum(dim=-2, keepdim=True) + self.EPSILON)
            / self.spread[0, : self.n_pairs]
        )
        return torch.einsum("bcp,np->bpnc", units, self.incidence[:, : self.n_pairs])

    def along_gradients(self, strengths: Tensor, parts: list[Tensor], steepness: Tensor) -> Tensor:
        """Σ_k strength_k ∇value_k, each gradient scaled to about one: (batch, n, 3), mean-free."""
        strengths = (strengths / steepness).unsqueeze(-2)
        moved = [strengths[..., : self.n_pairs] * parts[0]] + [
            strengths[..., self.n_pairs :] * area for area in parts[1:]
        ]
        return (torch.cat(moved, dim=-1) @ self.incidence.T).transpose(-1, -2)

    def bounded(self, total: Tensor, largest: float) -> Tensor:
        """A covector (batch, n, 3), bent so that metric @ total, what it moves atoms by, is below ``largest``."""
        mean_square = (total * (self.metric @ total)).sum(dim=(-2, -1), keepdim=True) / (3 * len(self.metric))
        return total * torch.rsqrt(1 + mean_square / largest**2)

    def statistics(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, spread and steepness (batch, values) at times ``t`` (batch,)."""
        place = t.clamp(0, 1) ** (1 / 3) * (self.N_LEVELS - 1)
        low = place.floor().clamp(max=self.N_LEVELS - 2)
        share = (place - low).unsqueeze(-1)
        low = low.long()
        tables = (self.mean, self.spread, self.steepness)
        mean, spread, steepness = (torch.lerp(table[low], table[low + 1], share) for table in tables)
        return mean, spread, steepness


def soft_clip(z: Tensor, largest: float = 5.0) -> Tensor:
    """``z`` bent to stay within ±``largest``: far from all data later rounds are not upset, and energies not wild."""
    return z * torch.rsqrt(1 + (z / largest).square())


def _cross(a: Tensor, b: Tensor) -> Tensor:
    """Cross product along the second dimension from the end."""
    (ax, ay, az), (bx, by, bz) = a.unbind(-2), b.unbind(-2)
    return torch.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], dim=-2)
