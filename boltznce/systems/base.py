"""What every system offers: a reduced energy, its shape and its temperature, and the facts by which systems differ."""

import abc
import copy
import functools
import operator
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self, TypeVar

import mdtraj
import numpy as np
import torch
from torch import Tensor

from boltznce.errors import UserError
from boltznce.settings import require
from boltznce.states import State
from boltznce.systems.coordinates import Coordinate, as_tensor, make_coordinate
from boltznce.systems.identity import differences
from boltznce.systems.reference import find_reference
from boltznce.trust import is_plain_name

__all__ = ["ROLES", "System", "check_name"]

ROLES = ("train", "validation", "test")

Array = TypeVar("Array", Tensor, np.ndarray)
Interval = tuple[float, float]


def check_name(name: object) -> None:
    """Raise UserError for a system's name that cannot be that of a file: folders are called after it."""
    if not is_plain_name(name):
        raise UserError(f"A system cannot be called {name!r}: give it a name without slashes, as one of a file.")


class System(abc.ABC):
    """A Boltzmann distribution proportional to exp(-u(x)), and a family of one (see `members`).

    Positions x have shape (batch, n_atoms, dim), in nm for molecules. Subclasses set the attributes without a default.

    Attributes:
        is_family: whether it stands for many members (see `PeptideFamily`).
        state: the state whose free energy is asked for, or None.
        differentiable: whether the energy has a gradient that leads anywhere.
        exact: whether `sample` draws from the distribution itself.
        temperature_unit: "K"; "" in the plane.
        simulation: default settings of its simulation: those of `boltznce.data.simulate.plan`.
        proxy: the same atoms at the same temperature with a cheap energy to go by, where the own one is dear.
        topology: mdtraj.Topology of a molecule.
        bonds: pairs of bonded atoms.
        dihedrals: name -> four atoms; omegas: names of those about peptide bonds.
        stereocentres: (centre, three neighbours).
        methyl_groups: triples of equivalent hydrogens.
        features: (n_atoms, n_classes) float32, what tells a network the atoms apart.
        box: ((x low, x high), (y low, y high)) of figures and grids in the plane.
        mode_weights: (modes,), the exact population of every mode, where known.

    >>> from boltznce import load_system
    >>> system = load_system("aldp")
    >>> system
    MolecularSystem(aldp, 22 atoms, 300 K, amber99sbildn.xml + amber99_obc.xml)
    >>> x = system.positions[None]
    >>> round(float(system.energy(x)), 1), round(float(system.at_temperature(600.0).energy(x)), 1)
    (-53.5, -26.7)
    >>> round(float(system.dihedral(x, "phi")), 1), system.state
    (-1.3, State(coordinate='phi', interval=(0.0, 2.0)))
    """

    name: str
    n_atoms: int
    dim: int
    temperature: float
    translation_invariant: bool
    is_family: bool = False
    state: State | None = None
    differentiable: bool = True
    exact: bool = False
    temperature_unit: str = "K"
    simulation: Mapping[str, Any] = MappingProxyType({})
    proxy: "System | None" = None
    topology: mdtraj.Topology | None = None
    bonds: Sequence[tuple[int, int]] = ()
    dihedrals: Mapping[str, tuple[int, int, int, int]] = MappingProxyType({})
    omegas: Sequence[str] = ()
    stereocentres: Sequence[tuple[int, int, int, int]] = ()
    methyl_groups: Sequence[tuple[int, int, int]] = ()
    features: Tensor | None = None
    box: tuple[Interval, Interval] | None = None
    mode_weights: np.ndarray | None = None

    @property
    @abc.abstractmethod
    def positions(self) -> Tensor:
        """A typical point, (n_atoms, dim), float32."""

    @abc.abstractmethod
    def energy(self, x: Array) -> Array:
        """Reduced energy u(x) = U(x) / kT, (batch,), differentiable, in the dtype of x; an array of an array."""

    def named_coordinate(self, name: str) -> Coordinate:
        """The coordinate of a name; UserError for one that there is not."""
        raise UserError(f"{self.name} has no coordinate {name!r}: give a function of positions.")

    def coordinate_of(self, given: Any) -> Coordinate:
        """What a setting, a name or a function means (see `make_coordinate`)."""
        return make_coordinate(given, self)

    def coordinate(self, x: Array, given: Any) -> Array:
        """Values (batch,) of a coordinate (see `coordinate_of`) of positions: of angles in rad, of distances in nm."""
        return self.coordinate_of(given)(x)

    def state_of(self, given: Any) -> State:
        """The state of this system that a setting means (see `State.of`); UserError for one that it cannot have."""
        state = State.of(given)
        for coordinate, interval in state.sides:
            self.coordinate_of(coordinate).contains(np.zeros(0), interval)
        return state

    def in_state(self, x: Array, state: Any = None) -> Array:
        """Mask (batch,) of the positions in a state (see `state_of`), by default the system's own.

        >>> from boltznce import load_system
        >>> system = load_system("gaussians8")
        >>> system.in_state(np.array([[[1.0, 0.0]], [[0.0, 1.0]]]), [["x", [0.5, 1.5]], ["y", [-0.5, 0.5]]])
        array([ True, False])
        """
        sides = [each.contains(each(x), interval) for each, interval in self._sides(state)]
        return functools.reduce(operator.and_, sides)

    def state_in_words(self, state: Any = None) -> str:
        """For titles, of `in_state`'s."""
        return " and ".join(each.in_words(interval) for each, interval in self._sides(state))

    def _sides(self, state: Any = None) -> list[tuple[Coordinate, Interval]]:
        """The coordinates and their intervals of a state, by default the system's own."""
        meant = self.state if state is None else self.state_of(state)
        if meant is None:
            raise UserError(f"{self.name} has no state of its own: give one.")
        return [(self.coordinate_of(coordinate), interval) for coordinate, interval in meant.sides]

    @property
    def along_an_angle(self) -> bool:
        """Whether the state is one interval of a coordinate that goes round the circle."""
        ((coordinate, interval), *others) = self._sides()
        return not others and coordinate.periodic and bool(np.isfinite(interval).all())

    def coordinate_range(self, given: Any) -> Interval | None:
        """Where a profile along the coordinate begins and ends; None for the circle, and where samples tell."""
        return self.coordinate_of(given).limits

    def chirality(self, x: Array) -> Array:
        """Per stereocentre +1 for the handedness of the system and -1 for its mirror image, (batch, n_centres)."""
        return x[:, :0, 0]

    def isomers(self, x: Array) -> Array:
        """Per peptide bond +1 where it is cis or trans as in ``positions``, -1 where turned, (batch, n_omegas)."""
        return x[:, :0, 0]

    def tensor_of(self, x: Any) -> Tensor:
        """Positions (batch, n_atoms, dim), a tensor, an array or lists, as a tensor of floating-point numbers.

        Raises UserError for another shape, and for what are no numbers.
        """
        try:
            given = as_tensor(x)
        except (TypeError, ValueError) as error:
            raise UserError(f"Positions of {self.name} must be numbers (batch, {self.n_atoms}, {self.dim}).") from error
        if given.dim() != 3 or given.shape[1:] != (self.n_atoms, self.dim):
            raise UserError(
                f"Positions of {self.name} must have shape (batch, {self.n_atoms}, {self.dim}), not "
                f"{tuple(given.shape)}."
            )
        return given

    def typical_energy(self) -> float:
        """About the mean reduced energy: of a molecule harmonic about its minimum, u(positions) + (3 n - 6) / 2."""
        return float(self.energy(self.positions.unsqueeze(0))) + (3 * self.n_atoms - 6) / 2

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` exact draws (n, n_atoms, dim), float32, on the generator's device; UserError where there are none."""
        raise UserError(f"{self.name} cannot be drawn from exactly: give data.simulation, how to simulate it.")

    @property
    def identity(self) -> dict[str, Any]:
        """What makes data of this system its own, in types that YAML keeps; recorded with data, references and runs.

        Compared by `boltznce.systems.identity.differences`; the name is for the reader.
        """
        return {"name": self.name, "temperature": self.temperature}

    def require_gradient(self, purpose: str) -> None:
        """Raise UserError if the energy has no gradient; to be called by what needs one, named by ``purpose``."""
        if not self.differentiable:
            raise UserError(f"{self.name} has no gradient, which {purpose} needs: choose another system or method.")

    def at_temperature(self, temperature: float) -> Self:
        """The same system at another temperature (K; dimensionless in the plane)."""
        require(temperature=temperature)
        other = copy.copy(self)
        other.temperature = float(temperature)
        other.proxy = self.proxy and self.proxy.at_temperature(temperature)
        return other

    @property
    def cheap(self) -> "System":
        """What data, flows and the weights of draws are of: the proxy, or the system itself where it has none.

        Only refinement goes on from there to the system.
        """
        return self.proxy or self

    def reference(self) -> dict[str, Any] | None:
        """The reference result that ships for this system; None without one of its identity, dihedral and state."""
        return None if self.state is None else find_reference(self)

    # ---- a family of one --------------------------------------------------------------------------------------------

    @property
    def example(self) -> "System":
        """A member, to be asked what is the same for all."""
        return self

    def members(self, role: str) -> list["System"]:
        """What is trained on, validated on or tested on, by a role of `ROLES`: the system itself."""
        return [self]

    def all_members(self) -> list["System"]:
        """Every member once, those to be trained on first."""
        return [self]

    def label(self, member: "System") -> str:
        """What tells a member's folder and random streams from another's: nothing, where there is no other."""
        return ""

    @property
    def labels(self) -> Sequence[str]:
        """Those of all members, which need not be made for it."""
        return ("",)

    def choose(self, system: "System | str | None" = None) -> "System":
        """The member that is meant: itself, by None, its name or its equal; raises UserError for another."""
        if system in (None, self.name) or (isinstance(system, System) and self.equals(system)):
            return self
        name = system if isinstance(system, str) else system.name
        raise UserError(
            f"This is a run of {self.name} alone, not of {name}: leave system= out, "
            "or choose a run of many molecules (system=dipeptides)."
        )

    def equals(self, other: "System") -> bool:
        """Whether data of one are data of the other, whatever their names."""
        return not differences(other.identity, self.identity)
