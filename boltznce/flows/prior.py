"""The Gaussian prior, on the mean-free subspace for systems without a fixed place."""

import math

import torch
from torch import Tensor

__all__ = ["GaussianPrior", "masked_subspace_basis", "mean_free", "subspace_basis"]


def mean_free(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """``x`` (..., n, dim) with the mean over its particles removed; with ``mask`` (..., n) that of the real ones, the others zero."""
    if mask is None:
        return x - x.mean(dim=-2, keepdim=True)
    real = mask.to(x).unsqueeze(-1)
    return (x - (x * real).sum(dim=-2, keepdim=True) / real.sum(dim=-2, keepdim=True)) * real


def subspace_basis(n: int, dim: int, centred: bool) -> Tensor:
    """Orthonormal basis (d, n, dim), float64, of the space on which the density lives: d = dim (n - 1) if ``centred``, else dim n."""
    if not centred:
        return torch.eye(n * dim, dtype=torch.float64).reshape(-1, n, dim)
    # Helmert vectors: row k contrasts particle k with the mean of those before it
    k = torch.arange(1, n, dtype=torch.float64)
    rows = torch.tril(torch.ones(n - 1, n, dtype=torch.float64))
    rows[torch.arange(n - 1), torch.arange(1, n)] = -k
    rows = rows / torch.sqrt(k * (k + 1)).unsqueeze(-1)
    return torch.einsum("kn,de->kdne", rows, torch.eye(dim, dtype=torch.float64)).reshape(-1, n, dim)


def masked_subspace_basis(mask: Tensor, dim: int, centred: bool) -> Tensor:
    """`subspace_basis` of the real atoms of each row of ``mask`` (batch, n): (d, batch, n, dim), d the largest, zero beyond a row's own."""
    sizes = mask.sum(dim=1).tolist()
    bases = {size: subspace_basis(size, dim, centred).to(mask.device) for size in set(sizes)}
    result = torch.zeros(max(map(len, bases.values())), *mask.shape, dim, dtype=torch.float64, device=mask.device)
    for row, size in enumerate(sizes):
        result[: len(bases[size]), row, mask[row]] = bases[size]
    return result


class GaussianPrior:
    """Standard normal in scaled units on R^(n·dim), or on its mean-free subspace of dimension d = dim (n - 1).

    Every method takes a ``mask`` (batch, n) for padded molecules: each then has the prior of its own real atoms, and zeros elsewhere.
    """

    def __init__(self, n: int, dim: int, centred: bool) -> None:
        self.n, self.dim, self.centred = n, dim, centred
        self.dimension = dim * (n - 1) if centred else dim * n

    def project(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``x`` (batch, n, dim) projected on the space of the prior."""
        if self.centred:
            return mean_free(x, mask)
        return x if mask is None else x * mask.to(x).unsqueeze(-1)

    def noise_like(self, x: Tensor, generator: torch.Generator | None, mask: Tensor | None = None) -> Tensor:
        """Standard normal noise of the shape, dtype and device of ``x``, projected."""
        return self.project(torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device), mask)

    def sample(
        self, n_samples: int, generator: torch.Generator | None, *, mask: Tensor | None = None, device=None, dtype=torch.float32
    ) -> Tensor:
        """(n_samples, n, dim)."""
        n = self.n if mask is None else mask.shape[1]
        return self.noise_like(torch.empty(n_samples, n, self.dim, device=device, dtype=dtype), generator, mask)

    def dimensions(self, mask: Tensor | None = None) -> int | Tensor:
        """d, one number or, with ``mask``, one a row: (batch,)."""
        if mask is None:
            return self.dimension
        return self.dim * (mask.sum(dim=1) - int(self.centred))

    def log_prob(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalized log-density (batch,), float64, on the prior's own space."""
        return -0.5 * x.double().square().sum(dim=(-2, -1)) - 0.5 * self.dimensions(mask) * math.log(2 * math.pi)
