"""A box in the plane or in space as the unit cube: the coordinates of a spline flow for toy systems."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["BoxCoordinates"]


class BoxCoordinates(nn.Module):
    """The linear map between positions (batch, n, dim) in a box, where all of them are, and the cube (batch, n·dim)."""

    low: Tensor
    size: Tensor
    circular: Tensor

    def __init__(self, n_atoms: int, low: Sequence[float], high: Sequence[float]) -> None:
        super().__init__()
        self.n_atoms, self.dimension = n_atoms, n_atoms * len(low)
        self.register_buffer("low", torch.tensor(low, dtype=torch.float64))
        self.register_buffer("size", torch.tensor(high, dtype=torch.float64) - self.low)
        self.register_buffer("circular", torch.zeros(self.dimension, dtype=torch.bool))

    @property
    def groups(self) -> dict[str, list[int]]:
        """There is one group of coordinates."""
        return {"positions": list(range(self.dimension))}

    def to_unit(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates y (batch, d) and log|dy/dx| (batch,)."""
        y = (positions - self.low.to(positions)) / self.size.to(positions)
        return y.flatten(1), -self._log_volume(y)

    def to_positions(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (batch, n, dim) and log|dx/dy| (batch,)."""
        x = y.unflatten(1, (self.n_atoms, -1)) * self.size.to(y) + self.low.to(y)
        return x, self._log_volume(y)

    def _log_volume(self, y: Tensor) -> Tensor:
        return (self.n_atoms * self.size.log().sum()).to(y).expand(len(y))
