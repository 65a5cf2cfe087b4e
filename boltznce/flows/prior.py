"""The Gaussian prior, on the mean-free subspace for systems without a fixed place."""

import math

import torch
from torch import Tensor, nn

__all__ = ["GaussianPrior", "mean_free", "subspace_basis"]


def mean_free(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """``x`` (..., n, dim) less its mean over particles; with ``mask`` (..., n) over the real ones, the others zero."""
    if mask is None:
        return x - x.mean(dim=-2, keepdim=True)
    real = mask.to(x).unsqueeze(-1)
    return (x - (x * real).sum(dim=-2, keepdim=True) / real.sum(dim=-2, keepdim=True)) * real


def subspace_basis(n: int, dim: int, centred: bool) -> Tensor:
    """Orthonormal basis (d, n, dim), float64, of the space of a density: d = dim (n - 1) if ``centred``, else dim n."""
    if not centred:
        return torch.eye(n * dim, dtype=torch.float64).reshape(-1, n, dim)
    # Helmert vectors: row k contrasts particle k with the mean of those before it
    k = torch.arange(1, n, dtype=torch.float64)
    rows = torch.tril(torch.ones(n - 1, n, dtype=torch.float64))
    rows[torch.arange(n - 1), torch.arange(1, n)] = -k
    rows = rows / torch.sqrt(k * (k + 1)).unsqueeze(-1)
    return torch.einsum("kn,de->kdne", rows, torch.eye(dim, dtype=torch.float64)).reshape(-1, n, dim)


class GaussianPrior(nn.Module):
    """Standard normal in scaled units on R^(n·dim), or where ``centred`` on its mean-free subspace.

    ``mask`` (batch, n): padded molecules; each row has the prior of its own real atoms, and zeros elsewhere.
    """

    mask: Tensor | None

    def __init__(self, n: int, dim: int, centred: bool, mask: Tensor | None = None) -> None:
        super().__init__()
        self.n, self.dim, self.centred = n, dim, centred
        self.register_buffer("mask", mask, persistent=False)

    @property
    def dimensions(self) -> int | Tensor:
        """d, one number, or of padded molecules one a row: (batch,)."""
        return self.dim * ((self.n if self.mask is None else self.mask.sum(dim=1)) - int(self.centred))

    def project(self, x: Tensor) -> Tensor:
        """``x`` (batch, n, dim) projected on the space of the prior."""
        if self.centred:
            return mean_free(x, self.mask)
        return x if self.mask is None else x * self.mask.to(x).unsqueeze(-1)

    def noise_like(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Standard normal noise of the shape, dtype and device of ``x``, projected."""
        return self.project(torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device))

    def sample(self, n_samples: int, generator: torch.Generator | None, *, device=None, dtype=torch.float32) -> Tensor:
        """(n_samples, n, dim)."""
        return self.noise_like(torch.empty(n_samples, self.n, self.dim, device=device, dtype=dtype), generator)

    def log_prob(self, x: Tensor) -> Tensor:
        """Normalized log-density (batch,), float64, on the prior's own space."""
        return -0.5 * x.double().square().sum(dim=(-2, -1)) - 0.5 * self.dimensions * math.log(2 * math.pi)
