"""The numbers of a run that a table of several runs shows, and their mean and spread over seeds.

They are taken from what a report leaves (`boltznce.analysis.report`); one that a run does not have is not there.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "DELTA_F",
    "DENSITY",
    "ERROR_OF_DELTA_F",
    "Number",
    "OverSeeds",
    "form_of",
    "free_energies",
    "main_numbers",
    "over_seeds",
]

DENSITY = {
    "forward_kl": "KL(true ‖ learned)",
    "reverse_kl": "KL(learned ‖ true)",
    "leaked_mass": "leaked mass",
    "mode_weight_error": "mode-weight error",
}
DELTA_F, ERROR_OF_DELTA_F, WEIGHTED = "ΔF (kT)", "error of ΔF (kT)", "ΔF, by weights alone (kT)"
SIDES = ("weighted", "refined")  # of the distances to the reference data
FORMS = {"ΔF": ".2f", "|ΔF": ".2f", "error of ΔF": ".2f", "ESS": ".2%", "E-W2": ".2f", "T-W2": ".2f", "energies": ".3g"}
FORMS |= {"NLL": ".2f", "EBM −": ".2f", "seconds": ".0f"}
OTHER_FORM = ".4f"


class Number(NamedTuple):
    """One run's number; with an ``interval``, where it has one that can be believed."""

    value: float
    reliable: bool = True
    interval: tuple[float, float] | None = None


class OverSeeds(NamedTuple):
    """Mean, and standard deviation of a single run (NaN of one), over ``n`` runs.

    >>> OverSeeds(3.87, 0.11, 3).in_words(".2f"), OverSeeds(3.87, math.nan, 1).in_words(".2f")
    ('3.87 ± 0.11', '3.87')
    """

    mean: float
    std: float
    n: int

    def in_words(self, form: str) -> str:
        """Mean ± standard deviation, each in this form."""
        if not self.n:
            return "–"
        return format(self.mean, form) + ("" if math.isnan(self.std) else f" ± {format(self.std, form)}")


def over_seeds(numbers: Sequence[Number]) -> OverSeeds:
    """Of those that are reliable, or of all where none is.

    >>> over_seeds([Number(1.0), Number(3.0), Number(90.0, reliable=False)])
    OverSeeds(mean=2.0, std=1.4142135623730951, n=2)
    """
    values = [number.value for number in numbers if number.reliable] or [number.value for number in numbers]
    mean = float(np.mean(values)) if values else math.nan
    return OverSeeds(mean, float(np.std(values, ddof=1)) if len(values) > 1 else math.nan, len(values))


def form_of(title: str) -> str:
    """How a number is written, by the beginning of its title.

    >>> form_of("ESS"), form_of("flow, validation loss")
    ('.2%', '.4f')
    """
    return next((form for start, form in FORMS.items() if title.startswith(start)), OTHER_FORM)


def free_energies(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """{title: row} of a run's free energies that stand in a table, with ``row``, its name, and ``reliable``.

    `DELTA_F` is its headline, or where none is reliable its best row; `WEIGHTED` that of plain weights, by which
    likelihoods are compared. None where the system has no state, and of many molecules.
    """
    rows, headline = metrics.get("free_energy") or {}, (metrics.get("headline") or {}).get("row")
    names = {DELTA_F: headline or metrics.get("weighted")}
    names[WEIGHTED] = next((name for name in ("ebm", "exact") if rows.get(name)), None)
    judged = {DELTA_F: bool(headline)}
    return {
        title: {**rows[name], "row": name, "reliable": judged.get(title, rows[name].get("reliable") is not False)}
        for title, name in names.items()
        if rows.get(name)
    }


def main_numbers(metrics: Mapping[str, Any], losses: Mapping[str, float | None]) -> dict[str, Number]:
    """{title: number} of one run; of many molecules means over those that were tested.

    Args:
        metrics: what `boltznce.analysis.report.write_report` has written.
        losses: {what was trained: its validation loss}.
    """
    average, density = metrics.get("average") or {}, metrics.get("density") or {}
    found: dict[str, Any] = {title: density.get(key) for key, title in DENSITY.items()}
    reference = ((metrics.get("free_energy") or {}).get("reference") or {}).get("value")
    for title, row in free_energies(metrics).items():
        value, reliable = row["value"], row["reliable"]
        if value is not None:
            found[title] = Number(value, reliable, row.get("interval") if reliable else None)
            if title == DELTA_F and reference is not None:
                found[ERROR_OF_DELTA_F] = Number(value - reference, reliable)
    found["|ΔF − reference| (kT)"] = average.get("abs_error")
    found["ESS"] = average.get("ess", next((row["ess"] for row in (metrics.get("ess") or {}).values()), None))
    for name, sides in (metrics.get("distances") or {}).items():
        found |= {f"{name}, {side}": _mean(sides.get(side)) for side in SIDES}
    found |= {key: value for key, value in average.items() if key.endswith(tuple(f", {side}" for side in SIDES))}
    found["EBM − exact (kT)"] = (metrics.get("likelihood") or {}).get("std")
    found["NLL"] = next((row["nll"] for row in (metrics.get("held_out") or {}).values()), None)
    found["energies in training"] = (metrics.get("counts") or {}).get("energy evaluations, training in all")
    found |= {f"{name}, validation loss": loss for name, loss in losses.items()}
    found["seconds"] = sum(((metrics.get("timing") or {}).get("stages") or {}).values()) or None
    numbers = {
        title: value if isinstance(value, Number) else Number(float(value))
        for title, value in found.items()
        if value is not None
    }
    return {title: number for title, number in numbers.items() if math.isfinite(number.value)}


def _mean(entry: Any) -> float | None:
    return entry.get("mean") if isinstance(entry, Mapping) else entry
