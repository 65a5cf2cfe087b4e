"""Systems in the plane, on which success and failure can be seen: exact densities, exact draws, known free energies.

One particle, positions (batch, 1, 2); lengths, energies and temperatures are dimensionless with k = 1, so that u = U /
T. Whatever the system and its temperature, normalizer, populations and draws come from one table of its energy on a
fine grid.
"""

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from boltznce.errors import UserError
from boltznce.settings import require
from boltznce.states import State
from boltznce.systems.base import Interval, System, check_name
from boltznce.systems.coordinates import Coordinate, as_tensor
from boltznce.systems.identity import digest

__all__ = [
    "Checkerboard",
    "CircleOfGaussians",
    "DoubleWell",
    "GaussianMixture",
    "MuellerBrown",
    "PlaneSystem",
    "RandomGaussians",
    "TwoMoons",
]

COORDINATES = ("angle", "diagonal", "x", "y")
N_CELLS = 400  # of the table, along each side
NEGLIGIBLE = 30.0  # kT above the lowest energy: what lies outside the table is as high or higher
NO_PHYSICS = ("name", "temperature", "box", "state", "length_scale")  # of the fields of a system
LONGEST = 16  # numbers of a parameter that an identity keeps as they are
SEEN = 1e-11  # a bin of a profile with less probability is a gap

Array = TypeVar("Array", Tensor, np.ndarray)


@dataclass(kw_only=True, eq=False, repr=False)
class PlaneSystem(System):
    """A particle in a potential U(x, y), the density proportional to exp(-U / T).

    Args:
        name: what to call it.
        box: ((x low, x high), (y low, y high)) of figures and of comparisons on a grid.
        state: a coordinate of `COORDINATES` and an interval of it, or several (see `System.state_of`). None: no state.
        temperature: dimensionless.
        length_scale: a typical size, in which networks measure positions.
    """

    n_atoms, dim = 1, 2
    translation_invariant = False
    exact = True
    energy_backend, compile = "torch", "auto"
    temperature_unit = ""

    name: str
    box: tuple[Interval, Interval] = field()
    state: State | None = field()
    temperature: float = 1.0
    length_scale: float = 1.0

    def __post_init__(self) -> None:
        check_name(self.name)
        require("system", **{each.name: getattr(self, each.name) for each in fields(self) if each.init})
        self.temperature, self.length_scale = float(self.temperature), float(self.length_scale)
        (x0, x1), (y0, y1) = self.box
        self.box = ((float(x0), float(x1)), (float(y0), float(y1)))
        self.state = None if self.state is None else self.state_of(self.state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, a point in the plane, T = {self.temperature:g})"

    @abc.abstractmethod
    def potential(self, r: Tensor) -> Tensor:
        """U (batch,) of points (batch, 2), in their dtype."""

    def mode(self, x: Tensor) -> Tensor:
        """Number of each position's mode, (batch, 1, 2) -> (batch,); by default 1 in the state and 0 elsewhere."""
        if self.state is None:
            return torch.zeros(len(x), dtype=torch.long)
        return self.in_state(x).long()

    def typical_energy(self) -> float:
        """0: energies are near it."""
        return 0.0

    def energy(self, x: Array) -> Array:
        """Reduced energy U / T (batch,) of positions (batch, 1, 2), in the dtype of x; an array of an array."""
        u = self._reduced(self.tensor_of(x)[:, 0])
        return u if isinstance(x, Tensor) else u.numpy()

    def at_temperature(self, temperature: float) -> Self:
        other = super().at_temperature(temperature)
        other.__dict__.pop("_table", None)
        return other

    @property
    def identity(self) -> dict[str, Any]:
        entries = {"name": self.name, "temperature": self.temperature, "kind": type(self).__name__}
        own = [field.name for field in fields(self) if field.name not in NO_PHYSICS]
        return entries | {"parameters": {name: _plain(getattr(self, name)) for name in own}}

    # ---- density ----------------------------------------------------------------------------------------------------

    @property
    def log_normalizer(self) -> float:
        """log ∫ exp(-u) dx dy, by the midpoint rule."""
        return self._table.log_normalizer

    def log_prob(self, x: Tensor) -> Tensor:
        """Normalized log-density (batch,) in the plane, float64."""
        return -self.energy(x.double()) - self.log_normalizer

    def support(self, x: Tensor) -> Tensor:
        """Where the density is above zero, (batch,): everywhere, but for the checkerboard."""
        return torch.ones(len(x), dtype=torch.bool)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` independent, exact draws (n, 1, 2), float32, on the generator's device.

        A cell of the table is drawn by an upper bound of its density, a point in it uniformly, and kept with
        probability density / bound.
        """
        require(n=n)
        table = self._table
        draws, missing = [], n
        while missing > 0:
            size = math.ceil(1.2 * missing) + 16
            uniform = torch.rand(size, 4, generator=generator, device=_device(generator), dtype=torch.float64).cpu()
            corner, log_bound = table.draw_cells(uniform[:, 0])
            x = (corner + table.cell * uniform[:, 1:3]).unsqueeze(1)
            kept = x[uniform[:, 3].log() < -self.energy(x) - log_bound]
            draws.append(kept[:missing])
            missing -= len(draws[-1])
        return torch.cat(draws).float().to(_device(generator))

    def grid(self, n: int = 200) -> Tensor:
        """Centres (n², 1, 2), float64, of n x n equal cells of ``box``; y runs fastest."""
        return _cell_centres(self.box, n).unsqueeze(1)

    @cached_property
    def positions(self) -> Tensor:
        """The point of lowest energy on the grid, (1, 2), float32."""
        x = self.grid()
        return x[self.energy(x).argmin()].float()

    @cached_property
    def _table(self) -> "_Table":
        return _Table(self._reduced, self.box)

    def _reduced(self, r: Tensor) -> Tensor:
        return self.potential(r) / self.temperature

    # ---- what is known ----------------------------------------------------------------------------------------------

    def named_coordinate(self, name: str) -> Coordinate:
        """``x``, ``y``, ``diagonal`` (x - y) / √2, or ``angle`` in (-π, π]."""
        (x0, x1), (y0, y1) = self.box
        choices: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Interval | None]] = {
            "angle": (lambda a, b: torch.atan2(b, a), None),
            "diagonal": (lambda a, b: (a - b) / math.sqrt(2), ((x0 - y1) / math.sqrt(2), (x1 - y0) / math.sqrt(2))),
            "x": (lambda a, b: a, self.box[0]),
            "y": (lambda a, b: b, self.box[1]),
        }
        if name not in choices:
            raise UserError(f"{self.name} has no coordinate {name!r}: choose one of {', '.join(COORDINATES)}.")
        values_of, limits = choices[name]

        def of(x: Array) -> Array:
            values = values_of(*as_tensor(x)[:, 0].unbind(-1))
            return values if isinstance(x, Tensor) else values.numpy()

        return Coordinate(name, of, "" if limits else "rad", limits is None, limits)

    @property
    def mode_weights(self) -> np.ndarray | None:  # type: ignore[override]
        """Exact population of every mode, (modes,), at this temperature; None where all is one."""
        if self.state is None and type(self).mode is PlaneSystem.mode:
            return None
        return np.bincount(self.mode(self._table.centres.unsqueeze(1)).numpy(), weights=self._table.mass)

    def reference(self) -> dict[str, Any] | None:
        """The exact ΔF of the state and the profile along its first coordinate (100 bins), as a shipped reference."""
        if self.state is None:
            return None
        mass, centres = self._table.mass, self._table.centres.unsqueeze(1)
        state = mass[self.in_state(centres)].sum()
        coordinate = self.coordinate_of(self.state.sides[0][0])
        values = coordinate(centres).double().numpy()
        bins = np.histogram(values, bins=100, range=coordinate.range_of(values) or (-np.pi, np.pi), weights=mass)
        f = -np.log(np.where(bins[0] > SEEN, bins[0], np.nan))
        return {
            "system": self.name,
            "temperature": self.temperature,
            "delta_f": {"value": float(np.log(1 - state) - np.log(state)), "std_error": 0.0},
            "profile": {"phi": (bins[1][1:] + bins[1][:-1]) / 2, "f": f - np.nanmin(f), "std_error": 0.0 * f},
        }


@dataclass(kw_only=True, eq=False, repr=False)
class GaussianMixture(PlaneSystem):
    """Gaussians of one width; U = -log p, so that at T = 1 it is the mixture itself and at another temperature p^(1/T).

    Args:
        means: (n, 2).
        std: of every Gaussian, along x and y.
        weights: (n,), scaled to sum to one; equal if None.

    A position belongs to the mode of the mean that is nearest.
    """

    means: Any  # kept as a tensor
    std: float
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.means = torch.as_tensor(self.means, dtype=torch.float64)
        weights = torch.as_tensor([1.0] * len(self.means) if self.weights is None else self.weights)
        if len(weights) != len(self.means) or not (weights > 0).all():
            raise UserError(f"{self.name} needs a positive weight for each of {len(self.means)} Gaussians.")
        self.log_weights = (weights.double() / weights.double().sum()).log()

    def potential(self, r: Tensor) -> Tensor:
        means = self.means.to(r)
        squares = r.square().sum(-1, keepdim=True) - 2 * r @ means.T + means.square().sum(-1)
        return math.log(2 * math.pi * self.std**2) - torch.logsumexp(
            self.log_weights.to(r) - squares / (2 * self.std**2), dim=-1
        )

    def mode(self, x: Tensor) -> Tensor:
        return torch.cdist(x[:, 0], self.means.to(x)).argmin(-1)


@dataclass(kw_only=True, eq=False, repr=False)
class CircleOfGaussians(GaussianMixture):
    """Gaussians evenly on a circle from the x axis on: with eight, BoltzNCE's first in 2D (arXiv 2507.00846)."""

    means: Tensor = field(init=False)
    weights: Sequence[float] = field()
    radius: float = 1.0
    std: float = 0.1

    def __post_init__(self) -> None:
        angles = 2 * math.pi / len(self.weights) * torch.arange(len(self.weights), dtype=torch.float64)
        self.means = self.radius * torch.stack([angles.cos(), angles.sin()], dim=-1)
        super().__post_init__()


@dataclass(kw_only=True, eq=False, repr=False)
class RandomGaussians(GaussianMixture):
    """Gaussians with means uniform in a square: with 40, half width 40, seed 0 and std softplus(1), the "GMM-40" of
    Midgley et al. 2023 (arXiv 2208.01893), on which TA-BG (arXiv 2501.19077) is checked.
    """

    means: Tensor = field(init=False)
    weights: None = field(init=False, default=None)
    n_modes: int
    half_width: float
    seed: int

    def __post_init__(self) -> None:
        places = torch.rand(self.n_modes, 2, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float32)
        self.means = (2 * places - 1) * self.half_width
        super().__post_init__()


@dataclass(kw_only=True, eq=False, repr=False)
class TwoMoons(GaussianMixture):
    """Two interlocked half circles of radius 1: 32 Gaussians along each, about as far apart as they are wide."""

    POINTS = 32

    means: Tensor = field(init=False)
    weights: None = field(init=False, default=None)

    def __post_init__(self) -> None:
        angles = math.pi / self.POINTS * (torch.arange(self.POINTS, dtype=torch.float64) + 0.5)
        upper = torch.stack([angles.cos() - 0.5, angles.sin() - 0.25], dim=-1)
        self.means = torch.cat([upper, -upper])
        super().__post_init__()

    def mode(self, x: Tensor) -> Tensor:
        return super().mode(x) // self.POINTS


class MuellerBrown(PlaneSystem):
    """The surface of Müller and Brown (Theor. Chim. Acta 53, 75 (1979)): three minima, two saddle points."""

    TERMS = (  # A, a, b, c, x0, y0 of A exp(a (x - x0)² + b (x - x0)(y - y0) + c (y - y0)²)
        (-200.0, -1.0, 0.0, -10.0, 1.0, 0.0),
        (-100.0, -1.0, 0.0, -10.0, 0.0, 0.5),
        (-170.0, -6.5, 11.0, -6.5, -0.5, 1.5),
        (15.0, 0.7, 0.6, 0.7, -1.0, 1.0),
    )

    def potential(self, r: Tensor) -> Tensor:
        amplitude, a, b, c, x0, y0 = (r.new_tensor(column) for column in zip(*self.TERMS, strict=True))
        dx, dy = r[:, :1] - x0, r[:, 1:] - y0
        return (amplitude * torch.exp(a * dx**2 + b * dx * dy + c * dy**2)).sum(-1)


@dataclass(kw_only=True, eq=False, repr=False)
class DoubleWell(PlaneSystem):
    """U = barrier (x² - 1)² + tilt x + stiffness y² / 2."""

    barrier: float
    tilt: float
    stiffness: float

    def potential(self, r: Tensor) -> Tensor:
        x, y = r.unbind(-1)
        return self.barrier * (x**2 - 1) ** 2 + self.tilt * x + self.stiffness / 2 * y**2


@dataclass(kw_only=True, eq=False, repr=False)
class Checkerboard(PlaneSystem):
    """Uniform on every second cell of a square board, the lower left one among them: U = 0 there, `WALL` elsewhere.

    Its log-density has no gradient: ``differentiable`` is False, and an energy that is to be differentiated raises a
    UserError.
    """

    WALL = 1e4
    differentiable = False

    half_width: float
    cell: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self.n_cells = round(2 * self.half_width / self.cell)
        if not math.isclose(self.n_cells * self.cell, 2 * self.half_width):
            raise UserError(f"The board's side {2 * self.half_width} must be a multiple of cell={self.cell}.")

    def inside(self, r: Tensor) -> Tensor:
        """Whether points (batch, 2) lie on the cells that are occupied."""
        column = torch.floor((r + self.half_width) / self.cell)
        on_board = ((column >= 0) & (column < self.n_cells)).all(-1)
        return on_board & (column.sum(-1) % 2 == 0)

    def support(self, x: Tensor) -> Tensor:
        return self.inside(x[:, 0])

    def potential(self, r: Tensor) -> Tensor:
        if torch.is_grad_enabled() and r.requires_grad:
            self.require_gradient("what was asked for")
        return torch.where(self.inside(r), 0.0, self.WALL).to(r)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` exact draws (n, 1, 2), float32: a cell, then a point in it."""
        i, j = torch.cartesian_prod(*2 * [torch.arange(self.n_cells)]).T
        cells = torch.stack([i, j], dim=-1)[(i + j) % 2 == 0].to(_device(generator))
        chosen = cells[torch.randint(len(cells), (n,), generator=generator, device=_device(generator))]
        place = torch.rand(n, 2, generator=generator, device=_device(generator), dtype=torch.float64)
        return ((chosen + place) * self.cell - self.half_width).unsqueeze(1).float()

    def mode(self, x: Tensor) -> Tensor:
        """Number of the occupied cell; elsewhere, of that at the left (at the right in the first column)."""
        column, row = torch.floor((x[:, 0] + self.half_width) / self.cell).long().clamp(0, self.n_cells - 1).unbind(-1)
        return row * ((self.n_cells + 1) // 2) + (column - row % 2).clamp(min=0) // 2


class _Table:
    """The energies of a potential on a fine grid that reaches from ``box`` outwards to where the density is negligible.

    ``centres`` (cells, 2) and ``mass`` (cells,), probabilities of the cells by the midpoint rule.
    """

    def __init__(self, energy, box: tuple[Interval, Interval]) -> None:
        self.box = _wide_enough(energy, box)
        self.low = torch.tensor([side[0] for side in self.box], dtype=torch.float64)
        self.cell = torch.tensor([(high - low) / N_CELLS for low, high in self.box], dtype=torch.float64)
        self.centres = _cell_centres(self.box, N_CELLS)
        self._energy = energy
        log_density = -_in_parts(energy, self.centres)
        total = torch.logsumexp(log_density, dim=0)
        self.mass = (log_density - total).exp().numpy()
        self.log_normalizer = float(total + self.cell.log().sum())

    @cached_property
    def _bounds(self) -> tuple[Tensor, Tensor]:
        """Upper bound of the log-density in each cell, and the cumulated bounds.

        The bound is the highest of a cell's corners plus what a parabola of the local curvature can rise between them,
        four times over.
        """
        axes = [torch.linspace(low, high, N_CELLS + 1, dtype=torch.float64) for low, high in self.box]
        corners = -_in_parts(self._energy, torch.cartesian_prod(*axes)).view(N_CELLS + 1, N_CELLS + 1)
        rise = torch.zeros_like(corners)
        rise[1:-1] = corners.diff(n=2, dim=0).abs() / 2
        rise[:, 1:-1] += corners.diff(n=2, dim=1).abs() / 2
        bound = (_highest_corner(corners) + _highest_corner(rise)).flatten()
        return bound, (bound - bound.max()).exp().cumsum(0)

    def draw_cells(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Lower left corners (n, 2) and log bounds (n,) of cells drawn by their bounds with uniform numbers (n,)."""
        bound, cumulated = self._bounds
        index = torch.searchsorted(cumulated, uniform * cumulated[-1], right=True).clamp(max=len(bound) - 1)
        return self.centres[index] - self.cell / 2, bound[index]


def _wide_enough(energy, box: tuple[Interval, Interval]) -> tuple[Interval, Interval]:
    """``box``, widened until the energy on its border is `NEGLIGIBLE` kT above the lowest inside."""
    while True:
        (x0, x1), (y0, y1) = box
        inside = energy(_cell_centres(box, 200))
        s = torch.linspace(0, 1, 401, dtype=torch.float64)
        along_x, along_y = x0 + (x1 - x0) * s, y0 + (y1 - y0) * s
        sides = [
            (along_x, torch.full_like(s, y0)),
            (along_x, torch.full_like(s, y1)),
            (torch.full_like(s, x0), along_y),
        ]
        border = torch.cat([torch.stack(side, -1) for side in [*sides, (torch.full_like(s, x1), along_y)]])
        if energy(border).min() - inside.min() >= NEGLIGIBLE:
            return box
        dx, dy = 0.1 * (x1 - x0), 0.1 * (y1 - y0)
        box = ((x0 - dx, x1 + dx), (y0 - dy, y1 + dy))


def _cell_centres(box: tuple[Interval, Interval], n: int) -> Tensor:
    """Centres (n², 2), float64, of n x n cells; y runs fastest."""
    axes = [low + (high - low) / n * (torch.arange(n, dtype=torch.float64) + 0.5) for low, high in box]
    return torch.cartesian_prod(*axes)


def _highest_corner(values: Tensor) -> Tensor:
    """(n + 1, n + 1) at the corners -> (n, n), the highest of each cell's four."""
    rows = torch.maximum(values[1:], values[:-1])
    return torch.maximum(rows[:, 1:], rows[:, :-1])


def _in_parts(energy, r: Tensor, size: int = 60_000) -> Tensor:
    return torch.cat([energy(part) for part in r.split(size)])


def _plain(value: Any) -> Any:
    """A parameter in types that YAML keeps: a list of numbers, their digest where there are many."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    rounded = torch.as_tensor(value).double().mul(1e6).round().div(1e6).add(0.0).tolist()  # no -0.0
    return digest(rounded) if torch.as_tensor(value).numel() > LONGEST else rounded


def _device(generator: torch.Generator | None) -> torch.device | str:
    return "cpu" if generator is None else generator.device
