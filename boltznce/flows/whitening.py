"""Coordinates in which the covariance of data between atoms is one."""

import torch
from torch import Tensor, nn

__all__ = ["Whitening"]


class Whitening(nn.Module):
    """``matrix @ x`` whitens x (batch, n, dim), ``inverse @ x`` undoes it; both are symmetric, and the identity until
    ``fit``.

    ``floor``: spread that is added, in scaled units, so that no direction is stretched beyond bounds.
    """

    matrix: Tensor
    inverse: Tensor
    log_volume: Tensor  # log|det| of the inverse on the flow's space

    def __init__(self, n_atoms: int, floor: float) -> None:
        super().__init__()
        self.floor = floor
        self.register_buffer("matrix", torch.eye(n_atoms))
        self.register_buffer("inverse", torch.eye(n_atoms))
        self.register_buffer("log_volume", torch.zeros((), dtype=torch.float64))

    def fit(self, x: Tensor, centred: bool) -> None:
        """To the covariance ⟨x_i·x_j⟩ / dim of data (batch, n, dim), float64; ``centred``: they are mean-free."""
        values, vectors = torch.linalg.eigh(torch.einsum("bid,bjd->ij", x, x) / (len(x) * x.shape[-1]))
        if centred:  # the first eigenvalue is that of a common translation, 0, of which the flow's space has none
            values[0] = 1.0
        values = values + self.floor**2
        self.matrix.copy_(vectors * values.rsqrt() @ vectors.T)
        self.inverse.copy_(vectors * values.sqrt() @ vectors.T)
        self.log_volume.fill_(0.5 * x.shape[-1] * values[int(centred) :].log().sum().item())
