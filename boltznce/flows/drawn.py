"""log q of a flow's own draws, with the gradient that it has at these fixed points, or that along their path alone.

A draw goes through the couplings from z to x, and a gradient of log q(x), in the weights at fixed x as well as in x at
fixed weights, goes through their inverses: that is from z to x too. So what the draw has computed in each coupling
serves the gradient, and no second pass through the networks is needed.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["log_prob_of_draws", "path_log_prob_of_draws"]

Couplings = Iterable[Any]  # a list or torch's ModuleList of `SplineCoupling`


def log_prob_of_draws(couplings: Couplings, z: Tensor, log_prior: Tensor, of_prior: Tensor) -> tuple[Tensor, Tensor]:
    """Points (d, n) that the couplings make of z (d, n), and their log q (n,), float64, differentiable once in weights.

    Args:
        couplings: in the order of drawing.
        log_prior, of_prior: log-density of z (n,) and its gradient (d, n).
    """
    weights = [weight for coupling in couplings for weight in coupling.parameters()]
    return _LogProbOfDraws.apply(couplings, z, log_prior, of_prior, *weights)


class _LogProbOfDraws(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, couplings: Couplings, z: Tensor, log_prior: Tensor, of_prior: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.of_prior, ctx.passed = of_prior, []
        y, log_q = z, log_prior
        for coupling in couplings:
            given = y.detach().requires_grad_()
            with torch.enable_grad():
                parameters = coupling.parameters_of(given)
            y, log_slope, pullback = coupling.with_pullback(y, parameters)
            log_q = log_q - log_slope
            ctx.passed.append((coupling, given, parameters, pullback))
        ctx.mark_non_differentiable(y)
        return y, log_q

    @staticmethod
    @once_differentiable
    def backward(ctx, _: Tensor, of_log_q: Tensor):
        """From z to x: gradients of each coupling's input in the inverse pass, its conditioner's input, its weights."""
        of_log = of_log_q.to(ctx.of_prior.dtype)
        of_y, of_weights = ctx.of_prior * of_log, []
        for coupling, given, parameters, pullback in ctx.passed:
            of_transformed = of_y[coupling.transformed]
            of_transformed, *of_parameters = pullback(of_transformed, of_log.expand_as(of_transformed))
            of_given, *found = torch.autograd.grad(parameters, [given, *coupling.parameters()], of_parameters)
            of_y = (of_y + of_given).index_copy(0, coupling.transformed, of_transformed)
            of_weights += found
        ctx.passed = None
        return None, None, None, None, *of_weights


def path_log_prob_of_draws(
    couplings: Couplings, z: Tensor, log_prior: Tensor, of_prior: Tensor
) -> tuple[Tensor, Tensor]:
    """As `log_prob_of_draws`, but points are differentiable in the weights, and log q only through the points."""
    y, log_q, score = z.requires_grad_(), log_prior, of_prior
    for coupling in couplings:
        parameters = coupling.parameters_of(y)
        _, log_slope, pullback = coupling.with_pullback(y.detach(), tuple(part.detach() for part in parameters))
        of_transformed = score[coupling.transformed]
        of_transformed, *of_parameters = pullback(of_transformed, torch.ones_like(of_transformed))
        of_given = torch.autograd.grad(parameters, y, of_parameters, retain_graph=True)[0]
        score = (score + of_given).index_copy(0, coupling.transformed, of_transformed)
        log_q = log_q - log_slope
        y, _ = coupling.with_parameters(y, parameters)
    along_path = (score * y).sum(dim=0).double()
    return y, log_q + along_path - along_path.detach()
