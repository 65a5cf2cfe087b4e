"""Divergence of a velocity field: exactly by forward-mode derivatives along a basis, or estimated with random probes."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["exact_divergence", "hutchinson_divergence", "rademacher"]

Field = Callable[[Tensor], Tensor]


def exact_divergence(field: Field, x: Tensor, basis: Tensor, directions_at_once: int = 64) -> tuple[Tensor, Tensor]:
    """Velocity (batch, n, dim) and its trace of the Jacobian (batch,) over the orthonormal ``basis`` (d, n, dim)."""

    def along(direction: Tensor) -> tuple[Tensor, Tensor]:
        tangent = direction.expand_as(x)
        v, jv = torch.func.jvp(field, (x,), (tangent,))
        return v, (jv * tangent).sum(dim=(-2, -1))

    divergence = x.new_zeros(len(x))
    for directions in basis.to(x).split(directions_at_once):
        v, terms = torch.func.vmap(along, out_dims=(None, 0))(directions)
        divergence = divergence + terms.sum(dim=0)
    return v, divergence


def hutchinson_divergence(field: Field, x: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """Velocity and the mean of εᵀ(∂v/∂x)ε over ``probes`` (m, batch, n, dim): unbiased for the divergence if E[ε εᵀ] = 1."""

    def along(probe: Tensor) -> tuple[Tensor, Tensor]:
        v, jv = torch.func.jvp(field, (x,), (probe,))
        return v, (jv * probe).sum(dim=(-2, -1))

    if len(probes) == 1:
        return along(probes[0])
    v, terms = torch.func.vmap(along, out_dims=(None, 0))(probes)
    return v, terms.mean(dim=0)


def rademacher(shape: tuple[int, ...], generator: torch.Generator | None, like: Tensor) -> Tensor:
    """Random signs of the dtype and device of ``like``."""
    return torch.randint(0, 2, shape, generator=generator, device=like.device).to(like.dtype).mul_(2).sub_(1)
