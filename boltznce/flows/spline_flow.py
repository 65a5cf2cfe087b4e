"""A normalizing flow of rational-quadratic spline couplings on the unit cube of normalized coordinates: exact density.

Couplings on the circle: Rezende et al. 2020 (arXiv 2002.02428). Architectures and priors: TA-BG (arXiv 2501.19077).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from boltznce.compiling import wants_compiling
from boltznce.errors import UserError
from boltznce.flows.box import BoxCoordinates
from boltznce.flows.drawn import log_prob_of_draws, path_log_prob_of_draws
from boltznce.flows.internal import InternalCoordinates
from boltznce.flows.spline import rational_quadratic, rational_quadratic_with_pullback

__all__ = ["ARCHITECTURES", "SplineCoupling", "SplineFlow", "hierarchical", "random_masks"]

Split = tuple[list[int], list[int]]  # coordinates that a coupling transforms, and those that it is conditioned on
Parameters = tuple[Tensor, Tensor, Tensor]  # widths, heights and slopes of a coupling's splines


class SplineFlow(nn.Module):
    """Prior on the unit cube -> couplings -> coordinates -> positions, each step with its inverse and log-determinant.

    The prior is uniform on circular coordinates; on bounded ones the normal of mean ½ and ``prior_std`` truncated to
    [0, 1], or uniform too if ``prior_std`` is None. Untrained, the flow is the identity on the cube.

    Densities are in nm on the space that ``coordinates`` parametrize: for `InternalCoordinates` the positions modulo
    rigid motion, that is with respect to the Cartesian volume integrated over translations and rotations; for
    `BoxCoordinates` the positions in the box. Outside the coordinates' domain ``log_prob`` is -inf. The normalization
    is on the domain: one labelling of equivalent hydrogens, one hand.

    Args:
        coordinates: `InternalCoordinates` or `BoxCoordinates`.
        architecture: ``random`` (masks drawn anew for each of ``n_pairs`` pairs of couplings) or ``hierarchical``
            (torsions, then angles given torsions, then bonds given both).
        mask_seed: of the random masks.
        width, depth, activation: hidden layers of each coupling's conditioner.
        n_bins: of each spline.
        compile: ``true``, ``false`` or ``auto`` (where there is a GPU): splines through torch.compile, which takes a
            minute at the first calls and makes each several times faster.

    >>> import torch
    >>> flow = SplineFlow(BoxCoordinates(1, [-2, -1], [2, 3]), n_pairs=1, width=8, depth=1, compile=False)
    >>> x, log_q = flow.sample(100, torch.Generator().manual_seed(0))
    >>> x.shape, log_q.shape
    (torch.Size([100, 1, 2]), torch.Size([100]))
    >>> torch.allclose(flow.log_prob(x), log_q, atol=1e-4)
    True
    >>> flow.log_prob(torch.tensor([[[2.5, 0.0]]])).item()  # outside of the box
    -inf
    """

    bounded: Tensor

    def __init__(
        self,
        coordinates: InternalCoordinates | BoxCoordinates,
        *,
        architecture: str = "random",
        n_pairs: int = 8,
        mask_seed: int = 0,
        width: int = 256,
        depth: int = 5,
        activation: str = "relu",
        n_bins: int = 8,
        prior_std: float | None = 0.1,
        compile: str | bool = "auto",
    ) -> None:
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise UserError(f"Unknown architecture '{architecture}': choose one of {', '.join(ARCHITECTURES)}.")
        if activation not in ACTIVATIONS:
            raise UserError(f"Unknown activation '{activation}': choose one of {', '.join(ACTIVATIONS)}.")
        self.coordinates = coordinates
        self.prior_std = prior_std
        self.register_buffer("bounded", torch.nonzero(~coordinates.circular).squeeze(1), persistent=False)
        splits = ARCHITECTURES[architecture](coordinates.groups, n_pairs, torch.Generator().manual_seed(mask_seed))
        settings: dict[str, Any] = {"width": width, "depth": depth, "activation": activation, "n_bins": n_bins}
        settings["fused"] = wants_compiling(compile)
        self.couplings = nn.ModuleList(
            SplineCoupling(transformed, given, coordinates.circular, cut=k * GOLDEN % 1, **settings)
            for k, (transformed, given) in enumerate(splits)
        )

    @property
    def dimension(self) -> int:
        """d, the number of coordinates."""
        return self.coordinates.dimension

    def sample_with_log_prob(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Positions (n, atoms, dim) in nm and log q (n,), float64, both differentiable in the flow's parameters."""
        y, log_q = self.sample_on_cube(n, generator)
        positions, log_volume = self.coordinates.to_positions(y)
        return positions, log_q - log_volume.double()

    def sample_on_cube(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Coordinates (n, d) and log q (n,) with respect to these, as `cube_log_prob` has it; both differentiable."""
        z = self._draw(n, generator)
        y, log_det = self._through(z)
        return y, self._log_prior(z) - log_det

    def sample_with_fixed_log_prob(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Positions in nm without gradient and log q (n,), float64, differentiable as ``log_prob`` of these is.

        One pass through the networks less than a draw and its ``log_prob``.
        """
        z, log_prior, of_prior = self._draw_with_gradient(n, generator)
        y, log_q = log_prob_of_draws(self.couplings, z, log_prior, of_prior)
        with torch.no_grad():
            positions, log_volume = self.coordinates.to_positions(y.T)
        return positions, log_q - log_volume.double()

    def sample_with_path_log_prob(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """As `sample_with_log_prob`, but the gradient of log q is ∇_x log q · ∂x/∂weights, through the positions alone.

        Such path gradients of a divergence vanish draw by draw where the flow is right (Roeder et al. 2017, arXiv
        1703.09194; for flows Vaitl et al. 2024, arXiv 2403.15881).
        """
        z, log_prior, of_prior = self._draw_with_gradient(n, generator)
        y, log_q = path_log_prob_of_draws(self.couplings, z, log_prior, of_prior)
        positions, log_volume = self.coordinates.to_positions(y.T)
        return positions, log_q - log_volume.double()

    def log_prob(self, positions: Tensor) -> Tensor:
        """log q (batch,), float64, of positions (batch, atoms, dim) in nm, differentiable; -inf outside the domain."""
        y, log_volume = self.coordinates.to_unit(positions)
        log_q = self.cube_log_prob(y)
        return log_q + torch.where(log_q.isfinite(), log_volume, 0.0).double()

    def cube_log_prob(self, y: Tensor) -> Tensor:
        """log q (batch,), float64, of coordinates y (batch, d), with respect to these; -inf outside the cube."""
        bounded = y[:, self.bounded]
        inside = ((bounded >= 0) & (bounded <= 1)).all(dim=1)
        y = torch.where(inside.unsqueeze(1), y, 0.5)  # where it would be -inf, gradients are finite and zero
        z, log_det = self._through(y, inverse=True)
        return torch.where(inside, self._log_prior(z) + log_det, -math.inf)

    @torch.no_grad()
    def sample(
        self, n_samples: int, generator: torch.Generator | None = None, *, batch_size: int = 8192
    ) -> tuple[Tensor, Tensor]:
        """As `sample_with_log_prob`, in batches and without gradients."""
        sizes = [min(batch_size, n_samples - start) for start in range(0, n_samples, batch_size)]
        parts = [self.sample_with_log_prob(size, generator) for size in sizes]
        return torch.cat([x for x, _ in parts]), torch.cat([log_q for _, log_q in parts])

    def _through(self, y: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Points of the cube (batch, d) through all couplings, and the log-determinant (batch,), float64."""
        y = y.T.contiguous()  # coordinates first, as the couplings want them
        log_det = torch.zeros(y.shape[1], dtype=torch.float64, device=y.device)
        for coupling in reversed(self.couplings) if inverse else self.couplings:
            y, change = coupling(y, inverse)
            log_det = log_det + change
        return y.T, log_det

    # ---- prior ------------------------------------------------------------------------------------------------------

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        """Points of the cube (n, d) from the prior, by its inverse distribution function."""
        circular = self.coordinates.circular
        u = torch.rand(n, self.dimension, generator=generator, dtype=torch.float64, device=circular.device)
        if self.prior_std is not None:
            edge = math.erf(0.5 / self.prior_std / math.sqrt(2))
            normal = 0.5 + self.prior_std * math.sqrt(2) * torch.erfinv(edge * (2 * u - 1))
            u = torch.where(circular, u, normal.clamp(0, 1))
        return u.to(self._dtype)

    def _draw_with_gradient(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        """Points (d, n) from the prior, their log-density (n,) and its gradient (d, n)."""
        z = self._draw(n, generator)
        with torch.enable_grad():
            leaf = z.clone().requires_grad_()
            log_prior = self._log_prior(leaf)
            gradient = torch.autograd.grad(log_prior.sum(), leaf)[0] if log_prior.requires_grad else torch.zeros_like(z)
        return z.T.contiguous(), log_prior.detach(), gradient.T

    def _log_prior(self, z: Tensor) -> Tensor:
        if self.prior_std is None:
            return torch.zeros(len(z), dtype=torch.float64, device=z.device)
        edge = math.erf(0.5 / self.prior_std / math.sqrt(2))
        constant = math.log(self.prior_std * math.sqrt(2 * math.pi) * edge)
        normal = (z[:, self.bounded] - 0.5) / self.prior_std
        return -0.5 * normal.square().sum(1).double() - constant * len(self.bounded)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.couplings.parameters()).dtype


class SplineCoupling(nn.Module):
    """Splines of some coordinates of the cube, parametrized by others: (d, batch) -> (d, batch), and log-det (batch,).

    Coordinates come first and the batch last, so that all of a coupling's parameters come from one matrix product and
    every operation runs over contiguous memory. Circles are opened at ``cut``, which stays where it is, and have one
    slope at both its sides; the conditioner sees their cosine and sine. At first the identity.

    Nothing turns a circle as a whole by a function of the other coordinates: where a torsion is nearly free the density
    would not feel it, and noise would drive such turns until everything that depends on the torsion is scrambled.
    """

    transformed: Tensor
    given_bounded: Tensor
    given_circular: Tensor
    layers: Any  # nn.ModuleList of nn.Linear

    def __init__(
        self,
        transformed: Sequence[int],
        given: Sequence[int],
        circular: Tensor,
        *,
        width: int,
        depth: int,
        activation: str,
        n_bins: int,
        cut: float = 0.0,
        fused: bool = False,
    ) -> None:
        super().__init__()
        of_circle = circular.tolist()
        tables = {
            "transformed": sorted(transformed, key=lambda k: of_circle[k]),  # bounded ones first
            "given_bounded": [k for k in given if not of_circle[k]],
            "given_circular": [k for k in given if of_circle[k]],
        }
        for name, table in tables.items():
            self.register_buffer(name, torch.tensor(table, dtype=torch.long))
        self.cut, self.n_bins, self.n_bounded = cut, n_bins, sum(not of_circle[k] for k in transformed)
        self.activation, self.fused = ACTIVATIONS[activation], fused
        n_in = len(tables["given_bounded"]) + 2 * len(tables["given_circular"])
        sizes = [n_in, *[width] * depth, (3 * n_bins + 1) * len(transformed)]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, y: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        return self.with_parameters(y, self.parameters_of(y), inverse)

    def with_parameters(self, y: Tensor, of_y: Parameters, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """As `forward`, given `parameters_of` y."""
        x, log_slope = rational_quadratic(self._opened(y[self.transformed]), *of_y, inverse, self.fused)
        return y.index_copy(0, self.transformed, self._closed(x)), log_slope.sum(0)

    @torch.no_grad()
    def with_pullback(self, y: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor, Callable]:
        """As `forward`, given `parameters_of` y, and the gradient of the inverse spline, see `flows.spline`."""
        opened = self._opened(y[self.transformed])
        x, log_slope, pullback = rational_quadratic_with_pullback(opened, *parameters, self.fused)
        return y.index_copy(0, self.transformed, self._closed(x)), log_slope.sum(0), pullback

    def parameters_of(self, y: Tensor) -> Parameters:
        """Widths, heights and slopes of the splines of y (d, batch); a circle's first slope is the last one too."""
        n, k = self.n_bounded, self.n_bins
        widths, heights, slopes = self._conditioner(y).unflatten(0, (3 * k + 1, -1)).split([k, k, k + 1])
        if n < slopes.shape[1]:
            slopes = torch.cat([slopes[:k], torch.cat([slopes[k:, :n], slopes[:1, n:]], 1)])
        return widths, heights, slopes

    def _opened(self, x: Tensor) -> Tensor:
        """The coordinates to be transformed, circles opened at the cut."""
        n = self.n_bounded
        return torch.cat([x[:n], on_circle(x[n:] - self.cut)]) if n < len(x) else x

    def _closed(self, x: Tensor) -> Tensor:
        n = self.n_bounded
        return torch.cat([x[:n], on_circle(x[n:] + self.cut)]) if n < len(x) else x

    def _conditioner(self, y: Tensor) -> Tensor:
        phase = 2 * math.pi * y[self.given_circular]
        h = torch.cat([INPUT_SCALE * (y[self.given_bounded] - 0.5), phase.cos(), phase.sin()])
        for layer in self.layers[:-1]:
            h = self.activation(torch.addmm(layer.bias.unsqueeze(1), layer.weight, h))
        return torch.addmm(self.layers[-1].bias.unsqueeze(1), self.layers[-1].weight, h)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": nn.functional.relu, "silu": nn.functional.silu}
GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples modulo 1 are spread most evenly
INPUT_SCALE = 10.0  # makes the bounded coordinates' prior one of unit variance


def on_circle(x: Tensor) -> Tensor:
    """x modulo 1; rounding may give 1, which is 0 again."""
    return x - x.detach().floor()


# ---- architectures: (groups, n_pairs, generator) -> splits ----------------------------------------------------------


def halves(among: Sequence[int], generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Two random halves."""
    order = [among[k] for k in torch.randperm(len(among), generator=generator)]
    return sorted(order[: len(order) // 2]), sorted(order[len(order) // 2 :])


def random_masks(groups: dict[str, list[int]], n_pairs: int, generator: torch.Generator) -> list[Split]:
    """Pairs of couplings: a random half of all coordinates given the other half, then the other way round."""
    every = sorted(itertools.chain(*groups.values()))
    splits = [halves(every, generator) for _ in range(n_pairs)]
    return [split for a, b in splits for split in ((a, b), (b, a)) if split[0]]


def hierarchical(groups: dict[str, list[int]], n_pairs: int, generator: torch.Generator) -> list[Split]:
    """Torsions among themselves, angles given torsions, bonds given both: three, two and two times if ``n_pairs=8``."""
    if set(groups) != {"bonds", "angles", "torsions"}:
        raise UserError("architecture=hierarchical is for the internal coordinates of molecules: choose random.")
    bonds, angles, torsions = groups["bonds"], groups["angles"], groups["torsions"]

    def among(group: list[int], n: int = 1) -> list[Split]:
        return random_masks({"": group}, n, generator)

    splits = among(torsions, max(1, 3 * n_pairs // 8))
    n_inner = max(1, n_pairs // 4)
    for _ in range(n_inner):
        splits += [(angles, torsions), *among(angles)]
    for _ in range(n_inner):
        splits += [(bonds, sorted(angles + torsions)), *among(bonds)]
    return splits


ARCHITECTURES = {"random": random_masks, "hierarchical": hierarchical}
