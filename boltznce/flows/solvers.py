"""Integration of dx/dt = v(x, t), with or without the divergence along the way, on a named time grid or adaptively.

The state is ``(x, l)``: positions and the running integral of div v. ``field(x, t) -> (v, div | None)``.
"""

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torchdiffeq import odeint

from boltznce.settings import require

__all__ = ["SOLVERS", "SolverSettings", "integrate", "time_grid"]

# field(x, t, with_divergence) -> velocity (batch, n, dim), divergence (batch,) or None
Field = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
SOLVERS = ("dopri5", "heun", "rk4")


@dataclass(frozen=True)
class SolverSettings:
    """``dopri5`` is adaptive (rtol, atol); ``heun`` and ``rk4`` take ``steps`` at (k / steps) ** grid_power.

    Raises UserError for others, and for numbers that make no sense.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    steps: int = 20
    grid_power: float = 2.0

    def __post_init__(self) -> None:
        require("solver", **asdict(self))


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
    step = _heun if settings.method == "heun" else _rk4
    return step(field, x, time_grid(settings, t_start, t_end), divergence)


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


def _heun(field: Field, x: Tensor, times: list[float], divergence: bool) -> tuple[Tensor, Tensor]:
    """Heun's method; the divergence is summed by the trapezoidal rule on the accepted points, one evaluation a step."""
    integral = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    v, div = field(x, x.new_tensor(times[0]), divergence)
    for t, t_next in itertools.pairwise(times):
        h = t_next - t
        predicted, _ = field(x + h * v, x.new_tensor(t_next), False)
        x = x + 0.5 * h * (v + predicted)
        if not divergence and t_next == times[-1]:
            break
        v_next, div_next = field(x, x.new_tensor(t_next), divergence)
        if divergence:
            integral += 0.5 * h * (div.double() + div_next.double())
        v, div = v_next, div_next
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
