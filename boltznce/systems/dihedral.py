"""The angle of a dihedral, as torch."""

import torch
from torch import Tensor

__all__ = ["dihedral_angle"]


def dihedral_angle(points: Tensor) -> Tensor:
    """Dihedral of four points (..., 4, dim=3), (...,) in (-π, π], IUPAC sign."""
    b1, b2, b3 = points.diff(dim=-2).unbind(-2)
    m, n = torch.linalg.cross(b1, b2), torch.linalg.cross(b2, b3)
    return torch.atan2((b1 * n).sum(-1) * b2.norm(dim=-1), (m * n).sum(-1))
