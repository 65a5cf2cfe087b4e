"""Integration of dx/dt = v(x, t), with or without the divergence along the way, on a named time grid or adaptively.

The state is ``(x, l)``: positions and the running integral of div v. ``field(x, t) -> (v, div | None)``.
"""

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint

from boltznce.errors import UserError
from boltznce.settings import require

__all__ = ["SOLVERS", "SolverSettings", "integrate", "time_grid"]

# field(x, t, with_divergence) -> velocity (batch, n, dim), divergence (batch,) or None
Field = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | Any]]
SOLVERS = ("dopri5", "heun", "rk4")


@dataclass(frozen=True)
class SolverSettings:
    """``dopri5`` is adaptive (rtol, atol); ``heun`` and ``rk4`` take ``steps`` at (k / steps) ** grid_power.

    ``heun`` takes the divergence, which costs far more than the field, at every ``divergence_every``-th of them alone:
    along a path it is smooth, and what errs first is the path. Raises UserError for others, and for numbers that make
    no sense.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    steps: int = 20
    grid_power: float = 2.0
    divergence_every: int = 1

    def __post_init__(self) -> None:
        require("solver", **asdict(self))
        if self.divergence_every > 1 and (self.method != "heun" or self.steps % self.divergence_every):
            raise UserError(
                f"divergence_every={self.divergence_every} is for method=heun, and must divide steps={self.steps}: set "
                "it to 1, or choose others."
            )


def time_grid(settings: SolverSettings, t_start: float, t_end: float) -> list[float]:
    """Times from ``t_start`` to ``t_end``, denser towards t = 0 at whichever end that is."""
    low, high = sorted((t_start, t_end))
    times = [low + (high - low) * (k / settings.steps) ** settings.grid_power for k in range(settings.steps + 1)]
    return times if t_start < t_end else times[::-1]


def integrate(
    field: Field, x: Tensor, t_start: float, t_end: float, settings: SolverSettings, divergence: bool
) -> tuple[Tensor, Tensor]:
    """``x`` (batch, n, dim) carried from ``t_start`` to ``t_end``, and ∫ div v dt (batch,), float64 (zero without)."""
    if settings.method == "dopri5":
        return _adaptive(field, x, t_start, t_end, settings, divergence)
    times = time_grid(settings, t_start, t_end)
    if settings.method == "heun":
        return _heun(field, x, times, settings.divergence_every if divergence else 0)
    return _rk4(field, x, times, divergence)


def _adaptive(
    field: Field, x: Tensor, t_start: float, t_end: float, settings: SolverSettings, divergence: bool
) -> tuple[Tensor, Tensor]:
    def derivative(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        v, div = field(state[0], t, divergence)
        return v, div.to(x.dtype) if divergence else torch.zeros_like(state[1])

    start = (x, torch.zeros(len(x), dtype=x.dtype, device=x.device))
    times = torch.tensor([t_start, t_end], dtype=x.dtype, device=x.device)
    path, integral = odeint(derivative, start, times, rtol=settings.rtol, atol=settings.atol, method="dopri5")
    return path[-1], integral[-1].double()


def _heun(field: Field, x: Tensor, times: list[float], every: int) -> tuple[Tensor, Tensor]:
    """Heun's method; the divergence is summed by the trapezoidal rule on ``every``-th accepted point (0: nowhere)."""
    integral, since = torch.zeros(len(x), dtype=torch.float64, device=x.device), times[0]
    v, div = field(x, x.new_tensor(times[0]), every > 0)
    for k, (t, t_next) in enumerate(itertools.pairwise(times), start=1):
        h = t_next - t
        predicted, _ = field(x + h * v, x.new_tensor(t_next), False)
        x = x + 0.5 * h * (v + predicted)
        wanted = every > 0 and k % every == 0
        if not wanted and t_next == times[-1]:
            break
        v, div_next = field(x, x.new_tensor(t_next), wanted)
        if wanted:
            integral += 0.5 * (t_next - since) * (div.double() + div_next.double())
            div, since = div_next, t_next
    return x, integral


def _rk4(field: Field, x: Tensor, times: list[float], divergence: bool) -> tuple[Tensor, Tensor]:
    """The classical fourth-order method on state and divergence together."""
    integral = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for t, t_next in itertools.pairwise(times):
        h = t_next - t
        middle = x.new_tensor(t + 0.5 * h)
        v1, d1 = field(x, x.new_tensor(t), divergence)
        v2, d2 = field(x + 0.5 * h * v1, middle, divergence)
        v3, d3 = field(x + 0.5 * h * v2, middle, divergence)
        v4, d4 = field(x + h * v3, x.new_tensor(t_next), divergence)
        x = x + h / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
        if divergence:
            integral += h / 6 * (d1.double() + 2 * d2.double() + 2 * d3.double() + d4.double())
    return x, integral
