"""Monotonic rational-quadratic splines of the unit interval (Durkan et al. 2019, arXiv 1906.04032, section 3.1)."""

import math

from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["rational_quadratic"]

MIN_SIZE = 1e-3  # of a bin
MIN_SLOPE = 1e-3
TINY = 1e-30
UNIT_SLOPE = math.log(math.expm1(1 - MIN_SLOPE))  # softplus(this) + MIN_SLOPE = 1


def rational_quadratic(x: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """Spline of x (...) in [0, 1], or its inverse, and the logarithm of its derivative, (...).

    widths, heights: (k, ...) unconstrained; their softmax gives the bins. slopes: (k + 1, ...) unconstrained, at the edges of the bins. All
    zero is the identity. The parameters come first, so that every operation runs over contiguous memory.
    """
    w, right = _bins(widths)
    h, top = _bins(heights)
    k = (x >= (top if inverse else right)[:-1]).sum(0, keepdim=True)
    w, right, h, top = (table.gather(0, k).squeeze(0) for table in (w, right, h, top))
    low, high = (MIN_SLOPE + softplus(slopes.gather(0, index).squeeze(0) + UNIT_SLOPE) for index in (k, k + 1))
    slope = h / w
    bend = low + high - 2 * slope
    if inverse:
        y = x - (top - h)
        a, b, c = h * (slope - low) + y * bend, h * low - y * bend, -slope * y
        place = (-2 * c / (b + (b * b - 4 * a * c).clamp_min(TINY).sqrt())).clamp(0, 1)
    else:
        place = ((x - (right - w)) / w).clamp(0, 1)
    rest = 1 - place
    mixed = place * rest
    denominator = slope + bend * mixed
    log_slope = 2 * slope.log() + (high * place.square() + 2 * slope * mixed + low * rest.square()).log() - 2 * denominator.log()
    if inverse:
        return (right - w + w * place).clamp(0, 1), -log_slope
    return (top - h + h * (slope * place.square() + low * mixed) / denominator).clamp(0, 1), log_slope


def _bins(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Sizes and upper edges (k, ...) of bins that fill [0, 1]."""
    sizes = MIN_SIZE + (1 - MIN_SIZE * len(raw)) * raw.softmax(0)
    return sizes, sizes.cumsum(0)
