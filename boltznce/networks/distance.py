"""Networks on the interatomic distances of one molecule: cheap, and sharp where likelihoods are made, in bonds and
angles.

All n(n-1)/2 distances, and for chiral networks the signed volumes of bonded quadruples, standardized by their mean and
spread at each noise level, feed a residual MLP. A vector field moves atoms along the gradients of these coordinates, so
rotations and translations (and, unless chiral, mirror images) commute with it; an energy is invariant. Every coordinate
has rows of weights, which are parameters here and made from what the atoms are in `networks.shared_distance`. Atoms are
told apart: equal ones are treated as equal only as far as the training data are symmetrized.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from boltznce.networks.geometry import MolecularGeometry, bonded_quadruples, soft_clip
from boltznce.networks.mlp import ResidualBlocks, ResidualMLP, TimeEmbedding

__all__ = ["N_MODES", "N_TIME", "DistanceEnergy", "DistanceVectorField", "EnergyTrunk", "VectorFieldTrunk"]

N_TIME = 64
N_MODES = 128  # of an energy

Layer = Callable[[Tensor], Tensor]


class _OnGeometry(nn.Module, ABC):
    """What networks with a ``geometry`` can do besides their forward pass."""

    geometry: MolecularGeometry
    tells_atoms_apart = True

    @property
    def parity_equivariant(self) -> bool:
        """Whether v(-x) = -v(x), so that the flow makes molecules and mirror images alike."""
        return self.geometry.n_quadruples == 0

    def calibrate(self, positions_at: Callable[[float], Tensor]) -> None:
        """See `MolecularGeometry.calibrate`."""
        self.geometry.calibrate(positions_at)

    def stiff_gradients(self, x: Tensor) -> Tensor:
        """See `MolecularGeometry.stiff_gradients`."""
        return self.geometry.stiff_gradients(x)


class VectorFieldTrunk(_OnGeometry):
    """Σ_k f_k ∇z_k summed over rounds, z the standardized coordinates of an estimate of the noise-free molecule.

    The first round looks at x, each later one at where the sum so far would take it, standardized for half the noise.
    In a round, f = a(t) + b(t) z + MLP(z, h, t), and the hidden state h is handed on. Subclasses have the parts
    ``time``, ``blocks`` (one a round) and ``shrink``.

    ``largest`` bounds the sum after every round, see `MolecularGeometry.bounded`: gradients of distances grow with the
    distance and those of volumes with its square, so that a flow along them can run away, and from round to round the
    estimate, where the network was never trained.
    """

    largest: float | None = None
    time: nn.Module
    blocks: nn.ModuleList
    shrink: nn.Module

    @abstractmethod
    def rows(self, time: Tensor) -> Iterable[tuple[Layer, Layer, Tensor, Tensor]]:
        """Of each round: the map from z (batch, n_values) to the hidden width, the one back, a and b, as z."""

    def forward(self, x: Tensor, t: Tensor, features: Tensor | None = None) -> Tensor:
        """(batch, n, 3), mean-free, at positions x (batch, n, 3) and times t (batch,)."""
        geometry, time, noise = self.geometry, self.time(t), t.reshape(-1, 1, 1)
        rows, shrink = self.rows(time), self.shrink(time)
        total, hidden = torch.zeros_like(x), 0.0
        for k, (block, (inlet, outlet, a, b)) in enumerate(zip(self.blocks, rows, strict=True)):
            estimate = (1 + noise * shrink[:, k].reshape(-1, 1, 1)) * x - noise * (geometry.metric @ total) if k else x
            mean, spread, steepness = geometry.statistics(t * 0.5**k)
            values, parts = geometry.values(estimate)
            z = soft_clip((values - mean) / spread)
            hidden = block(hidden + inlet(z), time)
            strengths = a + b * z + outlet(nn.functional.silu(hidden))
            total = total + geometry.along_gradients(strengths, parts, steepness)
            if self.largest is not None:
                total = geometry.bounded(total, self.largest)
        return total


class EnergyTrunk(_OnGeometry):
    """log q up to a constant: c + Σ_k [a_k z_k - b_k z_k² / 2] - Σ_m s_m (w_m·z)² / 2 + MLP(z, z², t).

    z are the standardized coordinates, w_m the `N_MODES` directions in which they move together; a, b, c and s depend
    on t, all b and s are positive. The MLP sees z soft-clipped, so that far from all data the well is left, which
    confines. It normalizes its hidden states, and without the squares would not see well how far out z is.

    Subclasses have the parts ``time``, ``modes``, which makes s, and ``mlp``, of which all but the inlet is used here.
    """

    time: nn.Module
    modes: nn.Module
    mlp: ResidualMLP

    @abstractmethod
    def rows(self, time: Tensor) -> tuple[Layer, Layer, Tensor, Tensor, Tensor]:
        """The maps from (z, z²) (batch, 2 n_values) to the hidden width and from z to the w_m·z, a and b
        (batch, n_values), and c (batch,).

        This b may have any sign: the stiffness is a first guess plus b, and where that is below the guess a factor
        times the guess.
        """

    def forward(self, x: Tensor, t: Tensor, features: Tensor | None = None) -> Tensor:
        """(batch,) at positions x (batch, n, 3) and times t (batch,)."""
        mean, spread, _ = self.geometry.statistics(t)
        z = (self.geometry.values(x)[0] - mean) / spread
        time = self.time(t)
        inlet, along, a, b, c = self.rows(time)
        guess = 3 * x.shape[-2] / z.shape[-1]  # the coordinates over-count the 3n - 6 degrees of freedom
        stiffness = guess * (1 + nn.functional.elu(b / guess))
        well = (a * z - 0.5 * stiffness * z.square()).sum(-1)
        well = well - 0.5 * (nn.functional.softplus(self.modes(time)) * along(z).square()).sum(-1)
        near = soft_clip(z)
        hidden = self.mlp.blocks(inlet(torch.cat([near, near.square() - 1], dim=-1)), time)
        return well + (self.mlp.outlet(hidden).squeeze(-1) + c)


class DistanceVectorField(VectorFieldTrunk):
    """The vector field of one molecule.

    Args:
        width, n_rounds, n_blocks: hidden width, rounds, and residual blocks a round.
        bonds: pairs of bonded atoms.
        chiral: tell a molecule from its mirror image by signed volumes.
    """

    def __init__(
        self,
        n_atoms: int,
        width: int = 256,
        n_rounds: int = 4,
        n_blocks: int = 1,
        bonds: Sequence[tuple[int, int]] = (),
        chiral: bool = False,
    ) -> None:
        super().__init__()
        self.geometry = MolecularGeometry(n_atoms, bonded_quadruples(bonds) if chiral else ())
        n_values = self.geometry.n_values
        self.time = TimeEmbedding(N_TIME)
        self.inlets = nn.ModuleList(nn.Linear(n_values, width) for _ in range(n_rounds))
        self.blocks = nn.ModuleList(ResidualBlocks(width, N_TIME, n_blocks) for _ in range(n_rounds))
        self.outlets = nn.ModuleList(nn.Linear(width, n_values) for _ in range(n_rounds))
        self.linear = nn.Linear(N_TIME, 2 * n_values * n_rounds)
        self.shrink = nn.Linear(N_TIME, n_rounds)
        # starts at zero: a network that moves atoms at random would be led astray from round to round
        for layer in (self.linear, self.shrink, *self.outlets):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def rows(self, time: Tensor) -> Iterable[tuple[Layer, Layer, Tensor, Tensor]]:
        a_and_b = self.linear(time).split(self.geometry.n_values, dim=-1)
        return zip(self.inlets, self.outlets, a_and_b[::2], a_and_b[1::2], strict=True)


class DistanceEnergy(EnergyTrunk):
    """The energy of one molecule; arguments as of `DistanceVectorField`; ``chiral`` for samples of a chiral flow."""

    def __init__(
        self,
        n_atoms: int,
        width: int = 384,
        n_blocks: int = 4,
        bonds: Sequence[tuple[int, int]] = (),
        chiral: bool = False,
    ) -> None:
        super().__init__()
        self.geometry = MolecularGeometry(n_atoms, bonded_quadruples(bonds) if chiral else ())
        n_values = self.geometry.n_values
        self.time = TimeEmbedding(N_TIME)
        self.mlp = ResidualMLP(2 * n_values, 1, N_TIME, width, n_blocks)
        self.quadratic = nn.Linear(N_TIME, 2 * n_values + 1)
        self.along = nn.Linear(n_values, N_MODES, bias=False)
        self.modes = nn.Linear(N_TIME, N_MODES)
        for layer in (self.quadratic, self.modes):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.along.weight.mul_(0.5)  # modes begin soft

    def rows(self, time: Tensor) -> tuple[Layer, Layer, Tensor, Tensor, Tensor]:
        n = self.geometry.n_values
        a, b, c = self.quadratic(time).split([n, n, 1], dim=-1)
        return self.mlp.inlet, self.along, a, b, c.squeeze(-1)
