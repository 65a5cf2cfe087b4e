"""States: open intervals of coordinates, on the circle or the line; the one place that says what lies inside."""

import functools
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from boltznce.errors import UserError
from boltznce.settings import require

__all__ = ["State", "between", "in_interval", "interval_in_words", "patterns", "require_radians"]

ROUNDING = 1e-5  # of float32 angles


class State(NamedTuple):
    """A state of a system: a coordinate (see `boltznce.systems.coordinates`) and the open ``interval`` of it.

    Of a box over several, ``coordinate`` and ``interval`` are tuples of as many. A function that says who is inside is
    a coordinate, and ``interval`` (0.5, inf). Who is inside the system knows: `System.in_state`.

    >>> state = State.of(["phi", [2.5, 4.0]])
    >>> state.contains([3.0, -3.0, 0.0])
    array([ True,  True, False])
    >>> round(state.centre, 4), state.in_words("φ")
    (-3.0332, '2.5 < φ < 4 rad')
    >>> State.of([["phi", [0, 2]], ["psi", [-1, 1]]]).sides
    (('phi', (0.0, 2.0)), ('psi', (-1.0, 1.0)))
    """

    coordinate: Any
    interval: tuple

    @classmethod
    def of(cls, given: Any) -> Self:
        """From a config's ``[coordinate, [low, high]]``, a list of these, or a function; UserError for any other."""
        require("system", state=given)
        if isinstance(given, cls):
            return given
        if callable(given) or isinstance(given, Mapping):
            return cls(given, (0.5, math.inf))
        if not isinstance(given[0], list | tuple):
            given = [given]
        sides = [(coordinate, (float(low), float(high))) for coordinate, (low, high) in given]
        return cls(*(sides[0] if len(sides) == 1 else zip(*sides, strict=True)))

    @property
    def sides(self) -> tuple[tuple[Any, tuple[float, float]], ...]:
        """Every coordinate with its interval."""
        if isinstance(self.interval[0], Real):
            return ((self.coordinate, self.interval),)
        return tuple(zip(self.coordinate, self.interval, strict=True))

    @property
    def setting(self) -> list:
        """What a config has for it; raises UserError for a function that has no path there."""
        if any(callable(coordinate) for coordinate, _ in self.sides):
            raise UserError("A state by a Python function cannot be saved: name it, {_target_: module.function}.")
        sides = [[coordinate, list(interval)] for coordinate, interval in self.sides]
        return sides[0] if len(sides) == 1 else sides

    @property
    def name(self) -> str | None:
        """The coordinate's, where it is one and has a name."""
        return self.coordinate if isinstance(self.coordinate, str) else None

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
        """Mask of angles, or other values where it is a half line, inside the state (see `in_interval`)."""
        return in_interval(values, self.interval)

    def in_words(self, symbol: str | None = None) -> str:
        """For titles; ``symbol`` stands for the coordinate, an angle."""
        is_half_line = math.isinf(sum(self.interval))
        return interval_in_words(self.interval, symbol or self.coordinate, "" if is_half_line else "rad")


def interval_in_words(interval: tuple[float, float], symbol: str, unit: str = "") -> str:
    """For titles.

    >>> interval_in_words((0.2, 0.5), "d", "nm"), interval_in_words((0.2, math.inf), "x")
    ('0.2 < d < 0.5 nm', 'x > 0.2')
    """
    low, high = interval
    below, above = "" if math.isinf(low) else f"{low:g} < ", "" if math.isinf(high) else f" < {high:g}"
    text = f"{below}{symbol}{above}" if above else f"{symbol} > {low:g}"
    return f"{text} {unit}".rstrip()


def in_interval(values: Any, interval: tuple[float, float], periodic: bool = True) -> Any:
    """Mask of ``values`` (tensor or array, any shape) inside the open ``interval``.

    It lies on the circle, in radians, and may reach across π: (3.0, 4.0). With one infinite end it is a half line, of a
    coordinate that is no angle: (0, inf); another interval of such a one is ``periodic=False``. Values that are a mask
    already stay as they are. Raises UserError for any other, and for values on the circle that cannot be radians.
    """
    values = values if isinstance(values, Tensor) else np.asarray(values)
    if values.dtype in (torch.bool, np.bool_):
        return values
    low, high = interval
    values = values.double() if isinstance(values, Tensor) else values.astype(np.float64)
    if not periodic and not low < high:
        raise UserError(f"A state is an interval (low, high) with low below high: got ({low:g}, {high:g}).")
    if not periodic or math.isinf(low) != math.isinf(high):
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


def between(inside: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Numbers (m,) of what is in either of two states, by their masks (n,); raises UserError where they overlap.

    ΔF between the two is that of the one against the rest, among these alone.
    """
    inside, other = np.asarray(inside), np.asarray(other)
    if inside.shape != other.shape or inside.dtype != bool or other.dtype != bool:
        raise UserError("Two states are compared by two masks of the same samples: give one of each, (n,).")
    if n := (inside & other).sum():
        raise UserError(f"{n} samples are in both states: choose states that do not overlap.")
    return np.flatnonzero(inside | other)


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
