"""Coordinates of conformers: distances, angles, dihedrals, sums of these, and functions of the user's."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from boltznce.errors import UserError
from boltznce.settings import require
from boltznce.states import in_interval, interval_in_words
from boltznce.systems.dihedral import dihedral_angle
from boltznce.trust import locate

__all__ = ["Coordinate", "as_tensor", "geometric", "make_coordinate", "symbol_of"]

Array = TypeVar("Array", Tensor, np.ndarray)
Interval = tuple[float, float]

SYMBOLS = {"phi": "φ", "psi": "ψ", "chi": "χ"}
OUTSIDE = 0.001  # of the values, on either side of what a profile shows
MARGIN = 0.05  # of their range, beyond them


class _System(Protocol):
    name: str
    n_atoms: int
    topology: Any  # mdtraj.Topology, or None

    def named_coordinate(self, name: str) -> "Coordinate": ...


@dataclass(frozen=True)
class Coordinate:
    """A number for each conformer.

    Attributes:
        name: for titles.
        of: positions (n, atoms, dim), nm, an array or a tensor -> (n,) of the same kind.
        unit: "rad", "nm", or "".
        periodic: whether it goes round the circle, in (-π, π].
        limits: what a profile shows, where that is known beforehand.
        atoms: the four of a dihedral.

    >>> from boltznce import load_system
    >>> system = load_system("aldp")
    >>> d = system.coordinate_of({"distance": [[1, "C"], [3, "N"]]})
    >>> d.name, d.unit, round(float(d(system.positions[None])), 2)
    ('distance 1:C 3:N', 'nm', 0.43)
    """

    name: str
    of: Callable[[Array], Array]
    unit: str = ""
    periodic: bool = False
    limits: Interval | None = None
    atoms: tuple[int, ...] = ()

    def __call__(self, x: Array) -> Array:
        """Values (n,) of positions (n, atoms, dim), a tensor of a tensor and else an array."""
        return self.of(x if isinstance(x, Tensor) else np.asarray(x))

    def contains(self, values: Array, interval: Interval) -> Array:
        """Mask of the values inside an open interval (see `in_interval`)."""
        return in_interval(values, interval, self.periodic)

    @property
    def symbol(self) -> str:
        """For axes."""
        return symbol_of(self.name)

    def in_words(self, interval: Interval) -> str:
        """An interval of it, for titles."""
        return interval_in_words(interval, self.symbol, self.unit)

    def range_of(self, values: np.ndarray) -> Interval | None:
        """What a profile of values (n,) shows; None for the circle."""
        if self.periodic or self.limits is not None:
            return self.limits
        low, high = np.quantile(values.astype(np.float64), [OUTSIDE, 1.0 - OUTSIDE])
        margin = MARGIN * (high - low) or 0.5
        return float(low - margin), float(high + margin)


def make_coordinate(given: Any, system: _System) -> Coordinate:
    """The coordinate that a setting means, or a Python function, or a `Coordinate` itself.

    Settings are a name; ``{distance: [a, b]}`` (nm), ``{angle: [a, b, c]}`` at b, in [0, π], ``{dihedral: [a, b, c,
    d]}``; ``{linear: [[factor, coordinate], ...]}``, which goes round the circle where all parts do and factors are
    whole; and ``{_target_: my_module.my_function, unit: nm, periodic: false}``. An atom is its number from 0 on, or
    [number of its residue, its name]. A function takes positions (n, atoms, dim), an array in nm, and returns (n,);
    what a periodic one returns is wrapped.

    Raises UserError for anything else, and for atoms that the system does not have.
    """
    if isinstance(given, Coordinate):
        return given
    require(coordinate=given)
    if isinstance(given, str):
        return system.named_coordinate(given)
    if not isinstance(given, Mapping):
        return _of_function(given)
    if "_target_" in given:
        options = {key: value for key, value in given.items() if key != "_target_"}
        return _of_function(locate(given["_target_"], Callable), **options)
    ((kind, content),) = given.items()
    if kind == "linear":
        return _linear([(float(factor), make_coordinate(part, system)) for factor, part in content])
    if system.topology is None:
        raise UserError(f"{system.name} has no atoms for a {kind}: choose one of its own coordinates, as x.")
    words = [f"{atom[0]}:{atom[1]}" if isinstance(atom, Sequence) else str(atom) for atom in content]
    return geometric(f"{kind} {' '.join(words)}", kind, [_atom(system, atom) for atom in content])


def geometric(name: str, kind: str, atoms: Sequence[int]) -> Coordinate:
    """A ``distance``, ``angle`` or ``dihedral`` between two, three or four atoms, by their numbers."""
    kinds: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, Any]]] = {
        "distance": (_distance, {"unit": "nm"}),
        "angle": (_angle, {"unit": "rad", "limits": (0.0, math.pi)}),
        "dihedral": (dihedral_angle, {"unit": "rad", "periodic": True, "atoms": tuple(atoms)}),
    }
    function, options = kinds[kind]

    def of(x: Array) -> Array:
        values = function(as_tensor(x[..., list(atoms), :]))
        return values if isinstance(x, Tensor) else values.numpy()

    return Coordinate(name, of, **options)


def as_tensor(x: Any) -> Tensor:
    """A tensor as it is; an array or lists as a tensor of its own memory, float32 where they are, else float64."""
    if isinstance(x, Tensor):
        return x if x.is_floating_point() else x.double()
    x = np.asarray(x)
    return torch.from_numpy(np.array(x, dtype=np.float32 if x.dtype == np.float32 else np.float64))


def symbol_of(name: str) -> str:
    """Of a coordinate: φ2 for phi2; other names stand for themselves."""
    return next((symbol + name.removeprefix(word) for word, symbol in SYMBOLS.items() if name.startswith(word)), name)


def _distance(points: Tensor) -> Tensor:
    return (points[..., 1, :] - points[..., 0, :]).norm(dim=-1)


def _angle(points: Tensor) -> Tensor:
    """At the second of three points; well-behaved near 0 and π, where an arc cosine is not."""
    a, b = points[..., 0, :] - points[..., 1, :], points[..., 2, :] - points[..., 1, :]
    return torch.atan2(torch.linalg.cross(a, b).norm(dim=-1), (a * b).sum(-1))


def _linear(parts: Sequence[tuple[float, Coordinate]]) -> Coordinate:
    circles = [part.periodic for _, part in parts]
    if any(circles) and not all(part.periodic and factor.is_integer() for factor, part in parts):
        raise UserError(
            "linear: a sum with dihedrals jumps where they go round the circle, but for whole multiples of dihedrals "
            "alone: give whole factors, or distances and angles between three atoms."
        )

    def of(x: Array) -> Array:
        total: Any = sum(factor * part(x) for factor, part in parts)
        return _wrapped(total) if all(circles) else total

    units = {part.unit for _, part in parts}
    terms = " + ".join(f"{'' if factor == 1 else f'{factor:g} '}{part.symbol}" for factor, part in parts)
    name, unit = terms.replace("+ -1 ", "− ").replace("+ -", "− "), units.pop() if len(units) == 1 else ""
    return Coordinate(name, of, unit, all(circles))


def _of_function(function: Callable, unit: str = "", periodic: bool = False) -> Coordinate:
    name = getattr(function, "__name__", type(function).__name__)

    def of(x: Array) -> Array:
        given = x.detach().cpu().numpy() if isinstance(x, Tensor) else x
        values = np.asarray(function(given))
        if values.shape != (len(given),) or values.dtype.kind not in "bif":
            raise UserError(f"{name} must return a number for each of {len(given)} conformers: got {values.shape}.")
        if values.dtype != bool:
            values = _wrapped(values.astype(np.float64)) if periodic else values.astype(np.float64)
        return torch.from_numpy(values).to(x.device) if isinstance(x, Tensor) else values

    return Coordinate(name, of, unit or ("rad" if periodic else ""), periodic)


def _wrapped(angle: Array) -> Array:
    """In (-π, π]."""
    return math.pi - (math.pi - angle) % (2 * math.pi)


def _atom(system: _System, given: int | Sequence) -> int:
    """The number of an atom that a system has."""
    if not isinstance(given, Sequence):
        if given >= system.n_atoms:
            raise UserError(f"{system.name} has no atom {given}: its {system.n_atoms} atoms count from 0.")
        return int(given)
    number, name = given
    residues = [residue for residue in system.topology.residues if residue.resSeq == number]
    found = [atom.index for residue in residues for atom in residue.atoms if atom.name == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{len(found)} atoms of {system.name} are {name} of a residue {number}: give atom numbers.")
    there = [atom.name for residue in residues for atom in residue.atoms]
    residues = [f"{residue.resSeq} ({residue.name})" for residue in system.topology.residues]
    choices = f"that residue has {', '.join(there)}" if there else f"its residues are {', '.join(residues[:8])}"
    raise UserError(f"{system.name} has no atom {name} in a residue {number}: {choices}.")
