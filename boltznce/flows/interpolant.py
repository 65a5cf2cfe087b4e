"""Schedules of stochastic interpolants x_t = α(t) x_0 + σ(t) x_1 and the velocity of an endpoint.

t = 0 is data, t = 1 is the prior (BoltzNCE, arXiv 2507.00846, section 2; Albergo et al. 2023, arXiv 2303.08797).
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from boltznce.errors import UserError

__all__ = ["INTERPOLANTS", "Interpolant", "LinearInterpolant", "TrigInterpolant", "make_interpolant"]


class Interpolant(ABC):
    """α, σ and their derivatives at times ``t`` of any shape; every conversion follows from these four."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """α(t), the share of the data."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """σ(t), the share of the prior."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """dα/dt."""

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor:
        """dσ/dt."""

    def wronskian(self, t: Tensor) -> Tensor:
        """α σ' - α' σ: 1 for the linear schedule, π/2 for the trigonometric one."""
        return self.alpha(t) * self.d_sigma(t) - self.d_alpha(t) * self.sigma(t)

    def mix(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """x_t for data ``x0``, prior ``x1`` (batch, n, dim) at times ``t`` (batch,)."""
        t = _as_column(t)
        return self.alpha(t) * x0 + self.sigma(t) * x1

    def velocity_target(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """dx_t/dt = α' x_0 + σ' x_1."""
        t = _as_column(t)
        return self.d_alpha(t) * x0 + self.d_sigma(t) * x1

    def velocity_from_endpoint(self, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """Velocity at ``x`` when the expected data point is ``x0``; singular at t = 0."""
        t = _as_column(t)
        rate = self.d_sigma(t) / self.sigma(t)
        return rate * x + (self.d_alpha(t) - self.alpha(t) * rate) * x0

    def endpoint_error_factor(self, t: Tensor) -> Tensor:
        """|α' σ - α σ'| / σ: an error of the endpoint times this is the error of the velocity."""
        return self.wronskian(t).abs() / self.sigma(t)


class LinearInterpolant(Interpolant):
    """α = 1 - t, σ = t."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


class TrigInterpolant(Interpolant):
    """α = cos(πt/2), σ = sin(πt/2): keeps the variance where data and prior have the same."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(math.pi / 2 * t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(math.pi / 2 * t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return math.pi / 2 * torch.cos(math.pi / 2 * t)


INTERPOLANTS: dict[str, type[Interpolant]] = {"linear": LinearInterpolant, "trig": TrigInterpolant}


def make_interpolant(name: str) -> Interpolant:
    """The schedule of that name; raises UserError that lists the known ones."""
    if name not in INTERPOLANTS:
        raise UserError(f"Unknown interpolant '{name}': choose one of {', '.join(INTERPOLANTS)}.")
    return INTERPOLANTS[name]()


def _as_column(t: Tensor) -> Tensor:
    return t.reshape(-1, 1, 1) if t.dim() == 1 else t
