"""What every system offers: a reduced energy, its shape and its temperature."""

import abc
import copy
import json
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from boltznce.errors import UserError

__all__ = ["System"]

REFERENCE_FOLDER = Path(__file__).parents[1] / "data" / "reference"


class System(abc.ABC):
    """A Boltzmann distribution proportional to exp(-u(x)).

    Positions x have shape (batch, n_atoms, dim), in nm for molecules. Subclasses set the attributes below.
    """

    name: str
    n_atoms: int
    dim: int
    temperature: float
    translation_invariant: bool

    @property
    @abc.abstractmethod
    def positions(self) -> Tensor:
        """A typical point, (n_atoms, dim), float32."""

    @abc.abstractmethod
    def energy(self, x: Tensor) -> Tensor:
        """Reduced energy u(x) = U(x) / kT, (batch,), differentiable, in the dtype of x."""

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
