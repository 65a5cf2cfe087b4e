"""The path of densities from a base to a target, points on it with all that is known there, and how far a step goes."""

import dataclasses
import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from boltznce.analysis.weights import guard
from boltznce.systems.fused import energy_and_gradient

__all__ = ["Counts", "Path", "Point", "ValueAndGradient", "conditional_ess", "next_beta", "with_gradient"]

ValueAndGradient = Callable[[Tensor], tuple[Tensor, Tensor]]  # x (n, ...) -> values (n,), gradients (n, ...)

BISECTIONS = 50


@dataclasses.dataclass
class Counts:
    """How many points were asked for the value and the gradient of the base, and of the target."""

    base: int = 0
    target: int = 0


@dataclasses.dataclass(frozen=True)
class Point:
    """Walkers: positions (n, ...), log q̃ and u (n,), float64, and their gradients (n, ...): no move asks twice.

    Where either is not finite, u is inf, log q̃ is 0, and so are the gradients.
    """

    positions: Tensor
    log_base: Tensor
    u: Tensor
    base_gradient: Tensor
    u_gradient: Tensor

    def log_prob(self, beta: float) -> Tensor:
        """log π_β = (1-β) log q̃ - β u (n,), float64; -inf where u is inf."""
        return torch.where(self.u.isfinite(), (1 - beta) * self.log_base - beta * self.u, -math.inf)

    def gradient(self, beta: float) -> Tensor:
        """∇ log π_β (n, ...)."""
        return (1 - beta) * self.base_gradient - beta * self.u_gradient

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: Tensor | slice) -> Self:
        return type(self)(*(each[index] for each in self._parts()))

    def where(self, mask: Tensor, other: Self) -> Self:
        """Walkers of this point where ``mask`` (n,), of the ``other`` elsewhere."""
        pairs = zip(self._parts(), other._parts(), strict=True)
        return type(self)(*(torch.where(_like(mask, own), own, others) for own, others in pairs))

    def _parts(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


@dataclasses.dataclass
class Path:
    """log π_β = (1-β) log q̃ - β u, from a ``base`` to a ``target``, which are asked for ``chunk`` walkers at a time.

    With ``beyond`` it goes on over the target, to β above 1.

    >>> normal = with_gradient(lambda x: -0.5 * (x**2).sum(-1))
    >>> path = Path(base=normal, target=with_gradient(lambda x: 2.0 * (x**2).sum(-1)))
    >>> point = path.point(torch.tensor([[1.0, 0.0]]))
    >>> point.log_prob(0.5), point.gradient(0.5), path.counts
    (tensor([-1.2500], dtype=torch.float64), tensor([[-2.5000, -0.0000]]), Counts(base=1, target=1))
    """

    base: ValueAndGradient
    target: ValueAndGradient
    chunk: int | None = None
    counts: Counts = dataclasses.field(default_factory=Counts)
    beyond: bool = False

    def point(self, positions: Tensor, beta: float = 0.0) -> Point:
        """What is known of positions (n, ...); at ``beta`` 1, where most paths end, the base is not asked, and 0."""
        parts = [self._point(x, beta < 1 or self.beyond) for x in positions.split(self.chunk or max(1, len(positions)))]
        return Point(*(torch.cat(each) for each in zip(*(part._parts() for part in parts), strict=True)))

    def _point(self, x: Tensor, with_base: bool) -> Point:
        u, u_gradient = self.target(x)
        self.counts.target += len(x)
        if with_base:
            log_base, base_gradient = self.base(x)
            self.counts.base += len(x)
        else:
            log_base, base_gradient = torch.zeros_like(u), torch.zeros_like(u_gradient)
        u, log_base, _ = guard(u, log_base)
        gradients = (torch.where(_like(u.isfinite(), x), each, 0.0).to(x) for each in (base_gradient, u_gradient))
        return Point(x, log_base, u, *(each.nan_to_num(0.0, 0.0, 0.0) for each in gradients))


def with_gradient(function: Callable[[Tensor], Tensor]) -> ValueAndGradient:
    """x (n, ...) -> values (n,) of a differentiable function and their gradients (n, ...), without a graph.

    >>> with_gradient(lambda x: (x**2).sum(-1))(torch.tensor([[3.0, 1.0]]))
    (tensor([10.]), tensor([[6., 2.]]))
    """
    return lambda x: energy_and_gradient(function, x)


def conditional_ess(log_weights: Tensor, increments: Tensor, groups: Tensor | None = None) -> float:
    """(Σ W v)² / Σ W v², in [0, 1]: what increments log v (n,) leave of the weights W, which sum to one.

    Zhou, Johansen & Aston 2016. With ``groups`` (n,), numbers from zero on, each group has weights that sum to one of
    its own, and the result is the least of theirs. A group that weighs nothing does not count.

    >>> round(conditional_ess(torch.zeros(4), torch.tensor([0.0, 0.0, 0.0, -torch.inf])), 6)
    0.75
    """
    groups = torch.zeros(len(log_weights), dtype=torch.long, device=log_weights.device) if groups is None else groups
    total = _log_sums(log_weights, groups)
    alive = total.isfinite()
    w = log_weights - torch.where(alive, total, 0.0)[groups]
    log_ratio = 2 * _log_sums(w + increments, groups) - _log_sums(w + 2 * increments, groups)
    return float(log_ratio[alive].exp().nan_to_num(0.0).min())


def next_beta(
    point: Point,
    log_weights: Tensor,
    beta: float,
    least: float,
    groups: Tensor | None = None,
    smallest_step: float = 1e-3,
) -> tuple[float, float]:
    """The β up to which the conditional ESS of the step stays at ``least``, at most 1, by bisection; and that ESS.

    It is further than ``beta`` by ``smallest_step`` at least: walkers that would weigh nothing after any step do after
    this one.

    Increments are (β' - β) (-u - log q̃) at the walkers' places. Adapting β to the walkers adds a bias of the order of
    one over their number (Beskos, Jasra, Kantas & Thiery 2016).
    """
    slope = -point.u - point.log_base

    def ess(to: float) -> float:
        return conditional_ess(log_weights, (to - beta) * slope, groups)

    low, high = min(1.0, beta + smallest_step), 1.0
    if (at_high := ess(high)) >= least or low == high:
        return high, at_high
    if (at_low := ess(low)) <= least:
        return low, at_low
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if ess(middle) > least else (low, middle)
    return low, ess(low)


def _log_sums(values: Tensor, groups: Tensor) -> Tensor:
    """log Σ exp of ``values`` (n,) over each of the groups; -inf over none."""
    values = values.double()
    n_groups = int(groups.max()) + 1
    top = values.new_full((n_groups,), -math.inf).scatter_reduce(0, groups, values, "amax")
    top = torch.where(top.isfinite(), top, 0.0)
    return top + values.new_zeros(n_groups).index_add(0, groups, (values - top[groups]).exp()).log()


def _like(mask: Tensor, x: Tensor) -> Tensor:
    """A mask (n,) that broadcasts to x (n, ...)."""
    return mask.reshape(-1, *[1] * (x.dim() - 1))
