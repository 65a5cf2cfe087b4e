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
        n = len(widths)
        scale = 1 - MIN_SIZE * n
        p, q = widths.softmax(0), heights.softmax(0)  # shares of the bins, to which MIN_SIZE is added
        p_sum, q_sum = p.cumsum(0), q.cumsum(0)
        number = torch.arange(1, n, dtype=x.dtype, device=x.device).view(-1, *[1] * x.dim())
        edges = torch.add(MIN_SIZE * number, (q_sum if inverse else p_sum)[:-1], alpha=scale)
        k = (x >= edges).sum(0, keepdim=True)
        p_k, q_k, p_sum, q_sum = (table.gather(0, k).squeeze(0) for table in (p, q, p_sum, q_sum))
        p_below, q_below = p_sum - p_k, q_sum - q_k
        below = MIN_SIZE * k.squeeze(0).to(x.dtype)
        w, h, left, bottom = MIN_SIZE + scale * p_k, MIN_SIZE + scale * q_k, below + scale * p_below, below + scale * q_below
        raw = torch.cat([slopes.gather(0, k), slopes.gather(0, k + 1)]) + UNIT_SLOPE
        low, high = (softplus(raw) + MIN_SLOPE).unbind()
        place = _solve(x - bottom, w, h, low, high) if inverse else ((x - left) / w).clamp(0, 1)
        piece = _Piece(w, h, low, high, place)
        s, _, ratio, denominator, m = piece.parts()
        log_slope = torch.log(m * (s / denominator).square())
        ctx.inverse = inverse
        ctx.save_for_backward(p, q, p_below, q_below, k, raw, log_slope, *piece)
        if inverse:
            return (left + w * place).clamp(0, 1), -log_slope
        return (bottom + h * ratio).clamp(0, 1), log_slope

    @staticmethod
    @once_differentiable
    def backward(ctx, of_output: Tensor, of_log: Tensor):
        p, q, p_below, q_below, k, raw, log_slope, *piece = ctx.saved_tensors
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
            _bins_backward(p, k, p_below, of_w, of_left),
            _bins_backward(q, k, q_below, of_h, of_y),
            table,
            None,
        )


def _solve(y: Tensor, w: Tensor, h: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The place in the bin at which the quotient is ``y`` above the bin's bottom: the root in [0, 1] of a ξ² + b ξ + c.

    The upper half is solved from the top downward, which is the same with the slopes exchanged: so nothing cancels at either edge.
    """
    upper = 2 * y > h
    y = torch.where(upper, h - y, y)
    near = torch.where(upper, high, low)
    s = h / w
    bend = y * (low + high - 2 * s)
    a, b, c = h * (s - near) + bend, h * near - bend, -s * y
    place = (-2 * c / (b + (b * b - 4 * a * c).clamp_min(TINY).sqrt())).clamp(0, 1)
    return torch.where(upper, 1 - place, place)


def _bins_backward(shares: Tensor, k: Tensor, below: Tensor, of_size: Tensor, of_edge: Tensor) -> Tensor:
    """Gradient of the unconstrained sizes (k, ...) from that of bin k's size and of its lower edge, the sum of the sizes below.

    Of a softmax: p (g - Σ p g), where g is that of the edge for the bins below, that of the size for bin k, and 0 above.
    """
    scale = 1 - MIN_SIZE * len(shares)
    of_size, of_edge = scale * of_size, scale * of_edge
    mean = of_size * shares.gather(0, k).squeeze(0) + of_edge * below
    number = torch.arange(len(shares), device=k.device).view(-1, *[1] * of_size.dim())
    return torch.where(number < k, of_edge - mean, -mean).scatter_(0, k, (of_size - mean).unsqueeze(0)).mul_(shares)
