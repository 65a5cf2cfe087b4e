"""A point in the plane as simulations see it: a particle with a third coordinate that nothing depends on.

Its energy is in kJ/mol with kT that of as many kelvin as its temperature is; its mass makes the thermal speed one unit
of length a ps.
"""

import dataclasses
import json
import math
from typing import Any

from torch import Tensor

from boltznce.systems import toy
from boltznce.systems.fused import energy_and_gradient
from boltznce.systems.toy import PlaneSystem

__all__ = ["PlaneField", "axis_of", "definition", "system_of"]

AXES = {"x": (1.0, 0.0), "y": (0.0, 1.0), "diagonal": (math.sqrt(0.5), -math.sqrt(0.5)), "angle": ()}


class PlaneField:
    """Energies (batch,) in kJ/mol of positions (batch, 1, 3), and their gradients, as `TorchForceField` has them."""

    def __init__(self, system: PlaneSystem, kT: float):
        self.system, self.kT = system, kT

    def __call__(self, x: Tensor) -> Tensor:
        return self.kT * self.system.energy(x[..., :2])

    def energy_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return energy_and_gradient(self, x)


def axis_of(system: PlaneSystem, name: str) -> tuple[list[float], list[float] | None]:
    """What `boltznce.data.fourier_bias.Axis` makes a named coordinate of: its factors, and its limits."""
    limits = system.coordinate_range(name)
    return list(AXES[name]), None if limits is None else [float(end) for end in limits]


def definition(system: PlaneSystem) -> str:
    """What makes the system, as JSON."""
    given = {each.name: getattr(system, each.name) for each in dataclasses.fields(system) if each.init}
    given["state"] = None  # nothing of which walkers need to know
    return json.dumps({"class": type(system).__name__, **given}, default=_plain)


def system_of(text: str) -> PlaneSystem:
    """The system that `definition` wrote; ValueError for anything else."""
    given = json.loads(text)
    name = given.pop("class", None) if isinstance(given, dict) else None
    if name not in toy.__all__ or name == PlaneSystem.__name__:
        raise ValueError(f"no system in the plane: {name}")
    return getattr(toy, name)(**given)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else list(value)
