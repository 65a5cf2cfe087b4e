"""States: an open interval of a coordinate, on the circle or a half line; the one place that says what lies inside."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from torch import Tensor

from boltznce.errors import UserError
from boltznce.settings import require

__all__ = ["State", "in_interval", "patterns", "require_radians"]

ROUNDING = 1e-5  # of float32 angles


class State(NamedTuple):
    """A state of a system: its ``coordinate`` (see `System.coordinate`) and the open ``interval`` of it.

    >>> state = State.of(["phi", [2.5, 4.0]])
    >>> state.contains([3.0, -3.0, 0.0])
    array([ True,  True, False])
    >>> round(state.centre, 4), state.in_words("φ")
    (-3.0332, '2.5 < φ < 4 rad')
    """

    coordinate: str
    interval: tuple[float, float]

    @classmethod
    def of(cls, given: Sequence[Any]) -> Self:
        """From a config's ``[coordinate, [low, high]]``; raises UserError for any other, as `in_interval` does."""
        require("system", state=given)
        coordinate, (low, high) = given
        in_interval(0.0, (low, high))
        return cls(coordinate, (float(low), float(high)))

    @property
    def centre(self) -> float:
        """The middle of the interval, in (-π, π]; raises UserError for a half line."""
        if math.isinf(sum(self.interval)):
            raise UserError(f"The state {self.in_words()} is a half line and has no centre: set mu to a number.")
        return math.pi - (math.pi - sum(self.interval) / 2) % (2 * math.pi)

    @property
    def width(self) -> float:
        """The length of the interval."""
        return self.interval[1] - self.interval[0]

    @property
    def rest(self) -> Self:
        """The other part of the circle."""
        return type(self)(self.coordinate, (self.interval[1], self.interval[0] + 2 * math.pi))

    def contains(self, values: Any) -> Any:
        """Mask of coordinates inside the state (see `in_interval`)."""
        return in_interval(values, self.interval)

    def in_words(self, symbol: str | None = None) -> str:
        """For titles; ``symbol`` stands for the coordinate."""
        (low, high), symbol = self.interval, symbol or self.coordinate
        if math.isinf(high):
            return f"{symbol} > {low:g}"
        return f"{symbol} < {high:g}" if math.isinf(low) else f"{low:g} < {symbol} < {high:g} rad"


def in_interval(values: Any, interval: tuple[float, float]) -> Any:
    """Mask of ``values`` (tensor or array, any shape) inside the open ``interval``.

    It lies on the circle, in radians, and may reach across π: (3.0, 4.0). With one infinite end it is a half line, of a
    coordinate that is no angle: (0, inf). Raises UserError for any other, and for values on the circle that cannot be
    radians.
    """
    low, high = interval
    values = values.double() if isinstance(values, Tensor) else np.asarray(values, dtype=np.float64)
    if math.isinf(low) != math.isinf(high):
        return (values > low) & (values < high)
    if _beyond_the_circle(low, high):
        radians = ", ".join(f"{math.radians(end):.4g}" for end in interval)
        raise UserError(
            "A state is an interval in radians, shorter than the circle and between -2π and 2π: got "
            f"({low:g}, {high:g}), which in degrees would be ({radians})."
        )
    if not 0 < high - low < 2 * math.pi:
        raise UserError(
            "A state is an interval (low, high) in radians, shorter than the circle, with low below high: got "
            f"({low:g}, {high:g}); one that reaches across π goes on beyond it, as (3.0, 4.0)."
        )
    require_radians(values)
    offset = (values - low) % (2 * math.pi)
    return (offset > 0) & (offset < high - low)


def patterns(inside: Sequence[np.ndarray]) -> np.ndarray:
    """Words (n,) of masks (n,), + where one holds and - where not.

    >>> patterns([[True, False], [False, False]]).tolist()
    ['+-', '--']
    """
    return functools.reduce(np.char.add, [np.where(mask, "+", "-") for mask in inside])


def require_radians(angles: Any) -> None:
    """Raise UserError for angles (any shape) beyond ±2π, as degrees are; NaN and no angles at all pass."""
    angles = np.ravel(angles.detach().cpu() if isinstance(angles, Tensor) else angles)
    known = angles[np.isfinite(angles)]
    if len(known) and _beyond_the_circle(known.min(), known.max()):
        raise UserError(
            f"Angles are in radians, and these reach from {known.min():.4g} to {known.max():.4g}: convert "
            "degrees with numpy.radians (or wrap angles that were unrolled into (-π, π])."
        )


def _beyond_the_circle(low: float, high: float) -> bool:
    return math.isfinite(low) and math.isfinite(high) and max(abs(low), abs(high)) > 2 * math.pi + ROUNDING
