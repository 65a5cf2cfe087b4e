"""The number that a search over settings minimizes."""

import math
from collections.abc import Mapping
from typing import Any

from boltznce.errors import UserError

__all__ = ["objective"]


def objective(metrics: Mapping[str, Any], name: str | None = None) -> float:
    """The number of a run's ``metrics`` that a dotted name leads to; infinity for one that the report does not give.

    None is for -ln of the relative effective sample size of the weighted draws (of many molecules their average), or,
    where a density is learned that is known, for the divergence from it.

    >>> objective({"ess": {"EBM weights": {"ess": 0.5}}})
    0.693...
    >>> objective({"free_energy": {"two_sided": {"std_error": 0.1}}}, "free_energy.two_sided.std_error")
    0.1

    Raises UserError for a name that leads nowhere.
    """
    if name is None:
        return _default(metrics)
    value: Any = metrics
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            known = ", ".join(value) if isinstance(value, Mapping) else "nothing"
            raise UserError(f"minimize={name} is no number of metrics.json: in place of {part} there is {known}.")
        value = value[part]
    if isinstance(value, Mapping | list | str):
        raise UserError(f"minimize={name} is no number of metrics.json, but {value}.")
    return float(value) if value is not None and math.isfinite(value) else math.inf


def _default(metrics: Mapping[str, Any]) -> float:
    if "density" in metrics:
        return objective(metrics, "density.forward_kl")
    ess = metrics["average"]["ess"] if "average" in metrics else next(iter(metrics["ess"].values()))["ess"]
    return -math.log(ess) if ess and math.isfinite(ess) else math.inf
