"""Monotonic rational-quadratic splines of the unit interval (Durkan et al. 2019, arXiv 1906.04032, section 3.1)."""

import functools
import itertools
import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

__all__ = ["rational_quadratic", "rational_quadratic_with_pullback"]

log = logging.getLogger(__name__)

MIN_SIZE = 1e-3  # of a bin
MIN_SLOPE = 1e-3
UNIT_SLOPE = math.log(math.expm1(1 - MIN_SLOPE))  # softplus(this) + MIN_SLOPE = 1
TINY = 1e-30


def rational_quadratic(
    x: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, inverse: bool = False, fused: bool = False
) -> tuple[Tensor, Tensor]:
    """Spline of x (...) in [0, 1], or its inverse, and the logarithm of its derivative, (...).

    widths, heights: (k, ...) unconstrained; their softmax gives the bins. slopes: (k + 1, ...) unconstrained, at the
    edges of the bins. All zero is the identity. The parameters come first, so that every operation runs over contiguous
    memory. Differentiable once.
    fused: through torch.compile, which makes one loop of each of forward and backward, in half a minute at first.
    """
    return _RationalQuadratic.apply(x, widths, heights, slopes, inverse, fused)


def rational_quadratic_with_pullback(
    x: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, fused: bool = False
) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor], tuple[Tensor, ...]]]:
    """The spline y of x and log dy/dx as `rational_quadratic` gives them, and the gradient of the *inverse* at y.

    The last is a function: from the gradients of x and log dx/dy to those of y, widths, heights and slopes. It costs no
    new pass.
    """
    with torch.no_grad():
        y, log_slope, *saved = _run(_spline, fused, x, widths, heights, slopes, False)

    def pullback(of_x: Tensor, of_log: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return _run(_spline_backward, fused, of_x, of_log, widths, heights, -log_slope, *saved, True)

    return y, log_slope, pullback


class _Piece(NamedTuple):
    """The quotient on one bin, (...): y = bottom + h N / D with slope s = h / w, at the place ξ = (x - left) / w.

    N = s ξ² + d₀ ξ (1 - ξ), D = s + (d₀ + d₁ - 2 s) ξ (1 - ξ),
    dy/dx = s² M / D², M = d₁ ξ² + 2 s ξ (1 - ξ) + d₀ (1 - ξ)².
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


class _Bin(NamedTuple):
    """The bin that holds a point, (...): its number, shares of width and height, its own and below it, raw slopes."""

    number: Tensor
    p: Tensor
    q: Tensor
    p_below: Tensor
    q_below: Tensor
    low: Tensor
    high: Tensor


class _RationalQuadratic(torch.autograd.Function):
    """With its gradient written out: a third of the operations that automatic differentiation would need."""

    @staticmethod
    def forward(
        ctx, x: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, inverse: bool, fused: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.inverse, ctx.fused = inverse, fused
        y, log_slope, *saved = _run(_spline, fused, x, widths, heights, slopes, inverse)
        ctx.save_for_backward(widths, heights, log_slope, *saved)
        return y, log_slope

    @staticmethod
    @once_differentiable
    def backward(ctx, of_output: Tensor, of_log: Tensor):
        return *_run(_spline_backward, ctx.fused, of_output, of_log, *ctx.saved_tensors, ctx.inverse), None, None


def _spline(x: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, inverse: bool) -> tuple[Tensor, ...]:
    """The spline, the logarithm of its derivative, and what the gradient needs."""
    p, q = widths.softmax(0), heights.softmax(0)  # shares of the bins, to which MIN_SIZE is added
    scale = 1 - MIN_SIZE * len(p)
    here = _find(x, p, q, slopes, inverse)
    below = MIN_SIZE * here.number
    w, h = MIN_SIZE + scale * here.p, MIN_SIZE + scale * here.q
    left, bottom = below + scale * here.p_below, below + scale * here.q_below
    low, high = (softplus(raw + UNIT_SLOPE) + MIN_SLOPE for raw in (here.low, here.high))
    place = _solve(x - bottom, w, h, low, high) if inverse else ((x - left) / w).clamp(0, 1)
    piece = _Piece(w, h, low, high, place)
    s, _, ratio, denominator, m = piece.parts()
    log_slope = torch.log(m * (s / denominator).square())
    y, log_slope = (left + w * place, -log_slope) if inverse else (bottom + h * ratio, log_slope)
    return y.clamp(0, 1), log_slope, place, *here


def _find(x: Tensor, p: Tensor, q: Tensor, slopes: Tensor, inverse: bool) -> _Bin:
    """By a walk over the few bins: a search and a lookup in tables would be no single loop over the points."""
    n = len(p)
    zero = torch.zeros_like(x)
    here = _Bin(zero, p[0], q[0], zero, zero, slopes[0], slopes[1])
    for k, (p_below, q_below) in enumerate(zip(_sums_below(p), _sums_below(q), strict=True), start=1):
        reached = x >= MIN_SIZE * k + (1 - MIN_SIZE * n) * (q_below if inverse else p_below)
        there = (torch.full_like(x, k), p[k], q[k], p_below, q_below, slopes[k], slopes[k + 1])
        here = _Bin(*(torch.where(reached, new, old) for new, old in zip(there, here, strict=True)))
    return here


def _sums_below(shares: Tensor) -> list[Tensor]:
    """Of each share but the first, the sum of those below it, from the nearer end: rounding is least at the edges."""
    n = len(shares)
    below = list(itertools.accumulate(shares.unbind()))
    above = list(itertools.accumulate(shares.flip(0).unbind()))
    return [below[k - 1] if 2 * k <= n else 1 - above[n - 1 - k] for k in range(1, n)]


def _spline_backward(
    of_output: Tensor, of_log: Tensor, widths: Tensor, heights: Tensor, log_slope: Tensor, place: Tensor, *rest
) -> tuple[Tensor, ...]:
    """Gradients of x, widths, heights and slopes from those of the spline and of the logarithm of its derivative."""
    here, inverse = _Bin(*rest[:-1]), rest[-1]
    n = len(widths)
    scale = 1 - MIN_SIZE * n
    w, h = MIN_SIZE + scale * here.p, MIN_SIZE + scale * here.q
    raw_low, raw_high = here.low + UNIT_SLOPE, here.high + UNIT_SLOPE
    low, high = softplus(raw_low) + MIN_SLOPE, softplus(raw_high) + MIN_SLOPE
    s, mixed, ratio, denominator, m = _Piece(w, h, low, high, place).parts()
    tilt = 1 - 2 * place
    denominator_place = (low + high - 2 * s) * tilt / denominator  # ∂D/∂ξ / D
    m_place = 2 * (high * place + s * tilt - low * (1 - place)) / m
    log_place = m_place - 2 * denominator_place  # ∂(log dy/dx) / ∂ξ
    if inverse:
        # x(y, θ) solves y = f(x, θ): dx = (dy - ∂f/∂θ dθ) / f', and the second output is -log f' at that x
        of_input = (of_output - of_log * log_place / w) * torch.exp(log_slope)
        of_y, of_log = -of_input, -of_log
    else:
        of_y = of_output
    scaled = of_y * h / denominator
    both = 2 * of_log * mixed / denominator + scaled * ratio * mixed
    of_place = scaled * (2 * s * place + low * tilt - ratio * denominator * denominator_place) + of_log * log_place
    square, rest_square = place - mixed, 1 - place - mixed  # ξ² and (1 - ξ)²
    over_m = of_log / m
    flat = 1 - 2 * mixed
    of_s = scaled * (square - ratio * flat) + 2 * (of_log * (1 / s - flat / denominator) + over_m * mixed)
    of_low = (scaled * mixed + over_m * rest_square - both) * torch.sigmoid(raw_low)
    of_high = (over_m * square - both) * torch.sigmoid(raw_high)
    of_left = -of_place / w
    of_w = -(of_place * place + of_s * s) / w
    of_h = of_y * ratio + of_s / w
    number = _numbers(n + 1, place)
    of_slopes = torch.where(number == here.number, of_low, 0.0) + torch.where(number == here.number + 1, of_high, 0.0)
    return (
        of_input if inverse else of_place / w,
        _bins_backward(widths.softmax(0), here.number, here.p, here.p_below, scale * of_w, scale * of_left),
        _bins_backward(heights.softmax(0), here.number, here.q, here.q_below, scale * of_h, scale * of_y),
        of_slopes,
    )


def _bins_backward(
    shares: Tensor, number: Tensor, share: Tensor, below: Tensor, of_size: Tensor, of_edge: Tensor
) -> Tensor:
    """Gradient of the unconstrained sizes (k, ...) from that of one bin's size and of its lower edge, the sum below it.

    Of a softmax: p (g - Σ p g), g that of the edge for the bins below, that of the size for the bin itself, 0 above.
    """
    mean = of_size * share + of_edge * below
    k = _numbers(len(shares), number)
    return shares * (torch.where(k < number, of_edge, torch.where(k == number, of_size, 0.0)) - mean)


def _numbers(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, dtype=like.dtype, device=like.device).view(-1, *[1] * like.dim())


def _solve(y: Tensor, w: Tensor, h: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The place in the bin at which the quotient is ``y`` above the bin's bottom: the root in [0, 1] of a ξ² + b ξ + c.

    The upper half is solved from the top downward, with the slopes exchanged: so nothing cancels at either edge.
    """
    upper = 2 * y > h
    y = torch.where(upper, h - y, y)
    near = torch.where(upper, high, low)
    s = h / w
    bend = y * (low + high - 2 * s)
    a, b, c = h * (s - near) + bend, h * near - bend, -s * y
    place = (-2 * c / (b + (b * b - 4 * a * c).clamp_min(TINY).sqrt())).clamp(0, 1)
    return torch.where(upper, 1 - place, place)


# ---- fused kernels --------------------------------------------------------------------------------------------------


def _run(function: Callable, fused: bool, x: Tensor, *rest: Tensor | bool) -> tuple[Tensor, ...]:
    """``function`` as it is or compiled, points counted along one dimension, so that one kernel serves all shapes."""
    if not fused:
        return function(x, *rest)
    shape = x.shape
    flat = [a.reshape(*a.shape[: a.dim() - len(shape)], -1) if isinstance(a, Tensor) else a for a in (x, *rest)]
    return tuple(part.view(*part.shape[:-1], *shape) for part in _compiled(function)(*flat))


@functools.cache
def _compiled(function: Callable) -> Callable:
    kernel = torch.compile(function, dynamic=True)
    failed: list[bool] = []

    def call(*arguments):
        if not failed:
            try:
                return kernel(*arguments)
            except Exception as error:  # the compiler's failures have no common class
                log.warning("torch.compile failed on the splines (%s); going on without it.", error)
                failed.append(True)
        return function(*arguments)

    return call
