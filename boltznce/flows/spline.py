"""Monotonic rational-quadratic splines of the unit interval (Durkan et al. 2019, arXiv 1906.04032, section 3.1)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

__all__ = ["rational_quadratic"]

MIN_SIZE = 1e-3  # of a bin
MIN_SLOPE = 1e-3
UNIT_SLOPE = math.log(math.expm1(1 - MIN_SLOPE))  # softplus(this) + MIN_SLOPE = 1
TINY = 1e-30


def rational_quadratic(x: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """Spline of x (...) in [0, 1], or its inverse, and the logarithm of its derivative, (...).

    widths, heights: (k, ...) unconstrained; their softmax gives the bins. slopes: (k + 1, ...) unconstrained, at the edges of the bins. All
    zero is the identity. The parameters come first, so that every operation runs over contiguous memory. Differentiable once.
    """
    return _RationalQuadratic.apply(x, widths, heights, slopes, inverse)


class _Piece(NamedTuple):
    """The quotient on one bin, (...): y = bottom + h N / D with slope s = h / w, at the relative place ξ = (x - left) / w.

    N = s ξ² + d₀ ξ (1 - ξ), D = s + (d₀ + d₁ - 2 s) ξ (1 - ξ), dy/dx = s² M / D², M = d₁ ξ² + 2 s ξ (1 - ξ) + d₀ (1 - ξ)².
    """

    w: Tensor
    h: Tensor
    low: Tensor  # d₀
    high: Tensor  # d₁
    place: Tensor  # ξ

    def parts(self) -> tuple[Tensor, ...]:
        """s, ξ (1 - ξ), N / D, D and M."""
        s = self.h / self.w
        mixed = self.place * (1 - self.place)
        square = self.place - mixed
        denominator = s + (self.low + self.high - 2 * s) * mixed
        ratio = (s * square + self.low * mixed) / denominator
        return s, mixed, ratio, denominator, self.high * square + 2 * s * mixed + self.low * (1 - self.place - mixed)


class _RationalQuadratic(torch.autograd.Function):
    """With its gradient written out: a third of the operations that automatic differentiation would need."""

    @staticmethod
    def forward(ctx, x: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        p, q = widths.softmax(0), heights.softmax(0)
        w, right = _bins(p)
        h, top = _bins(q)
        k = (x >= (top if inverse else right)[:-1]).sum(0, keepdim=True)
        w, right, h, top = (table.gather(0, k).squeeze(0) for table in (w, right, h, top))
        raw = torch.stack([slopes.gather(0, k), slopes.gather(0, k + 1)]).squeeze(1) + UNIT_SLOPE
        low, high = (softplus(raw) + MIN_SLOPE).unbind()
        left, bottom = right - w, top - h
        place = _solve(x - bottom, w, h, low, high) if inverse else ((x - left) / w).clamp(0, 1)
        piece = _Piece(w, h, low, high, place)
        s, _, ratio, denominator, m = piece.parts()
        log_slope = torch.log(m * (s / denominator).square())
        ctx.inverse = inverse
        ctx.save_for_backward(p, q, k, raw, log_slope, *piece)
        if inverse:
            return (left + w * place).clamp(0, 1), -log_slope
        return (bottom + h * ratio).clamp(0, 1), log_slope

    @staticmethod
    @once_differentiable
    def backward(ctx, of_output: Tensor, of_log: Tensor):
        p, q, k, raw, log_slope, *piece = ctx.saved_tensors
        piece = _Piece(*piece)
        w, h, low, high, place = piece
        s, mixed, ratio, denominator, m = piece.parts()
        tilt = 1 - 2 * place
        denominator_place = (low + high - 2 * s) * tilt / denominator  # ∂D/∂ξ / D
        m_place = 2 * (high * place + s * tilt - low * (1 - place)) / m
        log_place = m_place - 2 * denominator_place  # ∂(log dy/dx) / ∂ξ
        if ctx.inverse:
            # x(y, θ) solves y = f(x, θ): dx = (dy - ∂f/∂θ dθ) / f', and the second output is -log f' at that x
            of_input = (of_output - of_log * log_place / w) * torch.exp(-log_slope)
            of_y, of_log = -of_input, -of_log
        else:
            of_y = of_output
        scaled = of_y * h / denominator
        both = 2 * of_log * mixed / denominator + scaled * ratio * mixed
        of_place = scaled * (2 * s * place + low * tilt - ratio * denominator * denominator_place) + of_log * log_place
        square, rest = place - mixed, 1 - place - mixed  # ξ² and (1 - ξ)²
        over_m = of_log / m
        flat = 1 - 2 * mixed
        of_s = scaled * (square - ratio * flat) + 2 * (of_log * (1 / s - flat / denominator) + over_m * mixed)
        of_slopes = torch.stack([scaled * mixed + over_m * rest - both, over_m * square - both]) * torch.sigmoid(raw)
        of_left = -of_place / w
        of_w = -(of_place * place + of_s * s) / w
        of_h = of_y * ratio + of_s / w
        table = torch.zeros((len(p) + 1, *k.shape[1:]), dtype=p.dtype, device=p.device)
        table.scatter_(0, torch.cat([k, k + 1]), of_slopes)
        return (
            of_input if ctx.inverse else of_place / w,
            _bins_backward(p, k, of_w, of_left),
            _bins_backward(q, k, of_h, of_y),
            table,
            None,
        )


def _solve(y: Tensor, w: Tensor, h: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The place in the bin at which the quotient is ``y`` above the bin's bottom: the root in [0, 1] of a ξ² + b ξ + c."""
    s = h / w
    bend = y * (low + high - 2 * s)
    a, b, c = h * (s - low) + bend, h * low - bend, -s * y
    return (-2 * c / (b + (b * b - 4 * a * c).clamp_min(TINY).sqrt())).clamp(0, 1)


def _bins(shares: Tensor) -> tuple[Tensor, Tensor]:
    """Sizes and upper edges (k, ...) of bins that fill [0, 1]."""
    sizes = MIN_SIZE + (1 - MIN_SIZE * len(shares)) * shares
    return sizes, sizes.cumsum(0)


def _bins_backward(shares: Tensor, k: Tensor, of_size: Tensor, of_edge: Tensor) -> Tensor:
    """Gradient of the unconstrained sizes (k, ...) from that of bin k's size and of its lower edge, the sum of the sizes below."""
    number = torch.arange(len(shares), device=k.device).view(-1, *[1] * of_size.dim())
    weighted = shares * torch.where(number < k, of_edge, torch.where(number == k, of_size, 0.0))
    return (1 - MIN_SIZE * len(shares)) * (weighted - shares * weighted.sum(0))
