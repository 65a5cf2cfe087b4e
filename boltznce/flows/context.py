"""What flows and energy-based models have in common: a network in scaled units and the context that it is called in."""

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn

from boltznce.flows.interpolant import make_interpolant
from boltznce.flows.prior import GaussianPrior
from boltznce.modules import copy_with
from boltznce.molecules import Molecules

__all__ = ["ContextModel"]


class ContextModel(nn.Module):
    """``network(x, t, features)`` at positions x / length_scale of one molecule, or, with a mask, of a padded batch.

    Args:
        n_atoms, dim: of the positions (batch, n_atoms, dim).
        features: (n_atoms, F) of one molecule, or (batch, n_atoms, F) of a padded batch.
        mask: (batch, n_atoms) bool, true for the real atoms of a padded batch. Each row then has the space and the
            prior of its own atoms, positions are zero on padded ones, and the network is called as
            ``network(x, t, features, mask)``.
        groups: (batch,) int, equal for rows that are the same molecule; all, if not given.
        centred: whether all lives on the mean-free subspace, of dimension d = dim (n - 1), or on the full space.

    A network may have ``calibrate(positions_at)`` to scale its inputs by interpolants ``positions_at(t)``, like x.
    """

    features: Tensor | Any  # or None, as they are given
    groups: Tensor | Any

    def __init__(
        self,
        network: nn.Module,
        n_atoms: int,
        dim: int,
        *,
        features: Tensor | None,
        mask: Tensor | None,
        groups: Tensor | None = None,
        length_scale: float,
        centred: bool,
        interpolant: str,
    ) -> None:
        super().__init__()
        self.network = network
        self.length_scale = length_scale
        self.interpolant = make_interpolant(interpolant)
        self.prior = GaussianPrior(n_atoms, dim, centred, mask)
        self.register_buffer("features", features)
        self.register_buffer("groups", groups, persistent=False)

    def on(self, molecules: Molecules) -> Self:
        """The same model on a padded batch, for its loss; network and settings are shared."""
        prior = GaussianPrior(molecules.mask.shape[1], self.prior.dim, self.prior.centred, molecules.mask)
        return copy_with(self, prior=prior, features=molecules.features, groups=molecules.index)

    def rows(self, part: slice) -> Self:
        """The same model for some rows of what it was called on: of a padded batch those molecules."""
        mask = self.prior.mask
        if mask is None or part == slice(None):
            return self
        return self.on(Molecules(self.features[part], mask[part], self.groups[part]))

    @property
    def needs_calibration(self) -> bool:
        """Whether ``calibrate`` has anything to measure."""
        return self._measure is not None

    @property
    def _measure(self) -> Callable[[Callable[[float], Tensor]], None] | None:
        return getattr(self.network, "calibrate", None)

    def _call(self, x: Tensor, t: Tensor) -> Tensor:
        """The network at scaled positions."""
        mask = self.prior.mask
        return self.network(x, t, self.features) if mask is None else self.network(x, t, self.features, mask)

    def _scale(self, positions: Tensor) -> Tensor:
        return self.prior.project(positions / self.length_scale)
