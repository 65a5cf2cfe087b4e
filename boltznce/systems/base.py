"""What every system offers: a reduced energy, its shape and its temperature."""

import abc
import copy
import json
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from torch import Tensor

from boltznce.errors import UserError

__all__ = ["System"]

REFERENCE_FOLDER = Path(__file__).parents[1] / "data" / "reference"

Array = TypeVar("Array", Tensor, np.ndarray)


class System(abc.ABC):
    """A Boltzmann distribution proportional to exp(-u(x)).

    Positions x have shape (batch, n_atoms, dim), in nm for molecules. Subclasses set the attributes below.

    Attributes:
        state: a coordinate (see `coordinate`) and the interval of it whose free energy is asked for, or None.
        differentiable: whether the energy has a gradient that leads anywhere.
    """

    name: str
    n_atoms: int
    dim: int
    temperature: float
    translation_invariant: bool
    state: tuple[str, tuple[float, float]] | None = None
    differentiable: bool = True

    @property
    @abc.abstractmethod
    def positions(self) -> Tensor:
        """A typical point, (n_atoms, dim), float32."""

    @abc.abstractmethod
    def energy(self, x: Tensor) -> Tensor:
        """Reduced energy u(x) = U(x) / kT, (batch,), differentiable, in the dtype of x."""

    @abc.abstractmethod
    def coordinate(self, x: Array, name: str) -> Array:
        """A named coordinate of positions, (batch,), along which states are told apart: for molecules a dihedral, in (-π, π]."""

    def coordinate_range(self, name: str) -> tuple[float, float] | None:
        """Where a profile along the coordinate begins and ends; None for an angle, whose profile goes round the circle."""
        return None

    @property
    def identity(self) -> dict[str, Any]:
        """What makes data of this system its own, in types that YAML keeps: recorded with a dataset, compared when it is used."""
        return {"name": self.name}

    def require_gradient(self, purpose: str) -> None:
        """Raise UserError if the energy has no gradient; to be called by what needs one, named by ``purpose``."""
        if not self.differentiable:
            raise UserError(f"The energy of {self.name} has no gradient, which {purpose} needs: choose another system or method.")

    def at_temperature(self, temperature: float) -> Self:
        """The same system at another temperature (K; dimensionless for toy systems)."""
        if not temperature > 0:
            raise UserError(f"A temperature must be positive, not {temperature}.")
        other = copy.copy(self)
        other.temperature = float(temperature)
        return other

    def reference(self) -> dict[str, Any] | None:
        """The reference result shipped for this system, or None.

        None too where the file was made for another temperature or force field than this system now has.
        """
        path = REFERENCE_FOLDER / f"{self.name}.json"
        if not path.is_file():
            return None
        contents = json.loads(path.read_text())
        made_for = {"temperature": self.temperature, "force_field": getattr(self, "forcefield", contents["force_field"])}
        return contents if all(contents[key] == value for key, value in made_for.items()) else None
