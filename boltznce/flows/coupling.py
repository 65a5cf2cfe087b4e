"""Which data point is paired with which prior point: at random, by optimal transport, by Kabsch alignment, or both.

Rows that are unlike molecules, told apart by ``index`` (batch,), are never exchanged; padded atoms, all zeros, change
no distance. None of them changes the prior's marginal: samples are reordered or data are rotated (Tong et al. 2024,
arXiv 2302.00482; Klein et al. 2023, arXiv 2306.15030).
"""

import abc
from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from boltznce.errors import UserError

__all__ = [
    "COUPLINGS",
    "Coupling",
    "independent",
    "kabsch",
    "make_coupling",
    "optimal_transport",
    "optimal_transport_kabsch",
]

Pairing = Callable[..., tuple[Tensor, Tensor]]


class Coupling(abc.ABC):
    """One of your own, which a config names by its ``_target_``; called as the functions of this module are."""

    @abc.abstractmethod
    def __call__(self, x0: Tensor, x1: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data and prior points, (batch, n, dim) in scaled units, as pairs of the same shapes."""


def independent(x0: Tensor, x1: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The pairs as they are."""
    return x0, x1


def optimal_transport(x0: Tensor, x1: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Reorder ``x0`` to the least sum of squared distances to ``x1``, both (batch, n, dim), by exact assignment."""
    if index is not None:
        x0 = x0.clone()
        for molecule in index.unique():
            rows = torch.nonzero(index == molecule).flatten()
            x0[rows] = optimal_transport(x0[rows], x1[rows])[0]
        return x0, x1
    cost = torch.cdist(x1.flatten(1), x0.flatten(1)).square()
    _, columns = linear_sum_assignment(cost.cpu().numpy())
    return x0[torch.as_tensor(columns, device=x0.device)], x1


def kabsch(x0: Tensor, x1: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Turn each ``x0`` by the proper rotation that brings it closest to its ``x1`` (both (batch, n, 3), mean-free)."""
    return x0 @ rotation_onto(x0, x1), x1


def optimal_transport_kabsch(x0: Tensor, x1: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Optimal transport first, then the alignment of each pair."""
    return kabsch(*optimal_transport(x0, x1, index))


def rotation_onto(x0: Tensor, x1: Tensor) -> Tensor:
    """R (batch, 3, 3), det R = +1, that minimizes ‖x0 R - x1‖² (Kabsch 1976)."""
    u, _, vt = torch.linalg.svd(x0.transpose(-1, -2) @ x1)
    sign = torch.ones(u.shape[:-1], dtype=u.dtype, device=u.device)
    sign[:, -1] = torch.det(u) * torch.det(vt)
    return (u * sign.unsqueeze(-2)) @ vt


COUPLINGS: dict[str, Pairing] = {
    "independent": independent,
    "ot": optimal_transport,
    "kabsch": kabsch,
    "ot_kabsch": optimal_transport_kabsch,
}


def make_coupling(coupling: str | Coupling) -> Pairing:
    """The coupling of that name, or the one given; raises UserError that lists the known ones."""
    if isinstance(coupling, Coupling):
        return coupling
    if coupling not in COUPLINGS:
        raise UserError(f"Unknown coupling '{coupling}': choose one of {', '.join(COUPLINGS)}.")
    return COUPLINGS[coupling]
