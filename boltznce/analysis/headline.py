"""Which of several free-energy differences a report puts first: a rule, written down before there are numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Headline", "choose_headline"]

_FURTHEST_APART = 3.0  # joint standard errors


class Estimate(Protocol):
    """A ΔF in kT with a standard error, and whether these can be relied on."""

    value: float
    std_error: float
    reliable: bool


@dataclass(frozen=True)
class Headline:
    """The ``row`` that comes first; None where none can be relied on, or where two of them, ``apart``, disagree."""

    row: str | None = None
    apart: tuple[str, str] | None = None


def choose_headline(rows: Mapping[str, Estimate]) -> Headline:
    """Of the reliable ``rows`` that of the smallest error, if no other is more than three joint ones away; else none.

    Their errors must be total ones; |ΔF_a - ΔF_b| is held against ``3 √(error_a² + error_b²)``.

    >>> from types import SimpleNamespace as Row
    >>> good, poor = Row(value=3.7, std_error=0.1, reliable=True), Row(value=4.5, std_error=0.3, reliable=True)
    >>> choose_headline({"corrected": poor, "two_sided": good, "exact": Row(value=9, std_error=0.01, reliable=False)})
    Headline(row='two_sided', apart=None)
    >>> choose_headline({"corrected": poor, "two_sided": Row(value=3.0, std_error=0.1, reliable=True)})
    Headline(row=None, apart=('two_sided', 'corrected'))
    """
    order = sorted((name for name, row in rows.items() if row.reliable), key=lambda name: rows[name].std_error)
    for other in order[1:]:
        best, row = rows[order[0]], rows[other]
        if abs(best.value - row.value) > _FURTHEST_APART * math.hypot(best.std_error, row.std_error):
            return Headline(apart=(order[0], other))
    return Headline(order[0] if order else None)
