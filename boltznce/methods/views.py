"""What is compared and drawn of positions: the torsions of each residue of a molecule, or the plane itself."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from matplotlib.figure import Figure

from boltznce.analysis import plotting
from boltznce.analysis.metrics import SampledDistance, plane_w2, torus_w2
from boltznce.systems.base import System

__all__ = ["PlaneView", "TorsionView", "View", "symbol_of", "views_of"]

PointsAndWeights = tuple[np.ndarray, np.ndarray | None]
SYMBOLS = {"phi": "φ", "psi": "ψ"}


class View(Protocol):
    """Two coordinates of every sample: how far two sets are apart in them, and how they are drawn.

    Attributes:
        data, figure, distance: what reports call the reference data, the figure and the distance.
        symbols: of the two coordinates.
        periodic: whether they are angles.
    """

    data: str
    figure: str
    distance: str
    symbols: tuple[str, str]
    periodic: bool

    def points(self, positions: np.ndarray) -> np.ndarray:
        """(n, 2) of positions (n, atoms, dim)."""

    def w2(self, points1: np.ndarray, points2: np.ndarray, w1: np.ndarray | None = None, **options) -> SampledDistance:
        """Wasserstein-2 distance of two sets of points, the first one weighted."""

    def draw(self, panels: Mapping[str, PointsAndWeights], **options) -> Figure:
        """Free energy over the two coordinates, a panel for each titled set of points and log weights."""


class TorsionView:
    """The (φ, ψ) of one residue, on the torus."""

    data, distance, periodic = "MD", "T-W2 (rad)", True

    def __init__(self, system: System, number: int) -> None:
        """``number``: of the residue with both, from the N-terminus, the first being 1."""
        suffix = "" if number == 1 else str(number)
        self.system, self.names, self.figure = system, (f"phi{suffix}", f"psi{suffix}"), f"ramachandran{suffix}"
        self.symbols = tuple(map(symbol_of, self.names))

    def points(self, positions: np.ndarray) -> np.ndarray:
        return np.stack([self.system.dihedral(np.asarray(positions), name) for name in self.names], axis=-1)

    def w2(self, points1, points2, w1=None, **options) -> SampledDistance:
        return torus_w2(points1, points2, w1, **options)

    def draw(self, panels: Mapping[str, PointsAndWeights], **options) -> Figure:
        return plotting.plot_ramachandran(panels, angle_names=self.symbols, **options)


class PlaneView:
    """The positions of one particle in the plane."""

    data, figure, distance, symbols, periodic = "data", "plane", "W2", ("x", "y"), False

    def __init__(self, system: System) -> None:
        self.system = system

    def points(self, positions: np.ndarray) -> np.ndarray:
        return np.asarray(positions)[:, 0]

    def w2(self, points1, points2, w1=None, **options) -> SampledDistance:
        return plane_w2(points1, points2, w1, **options)

    def draw(self, panels: Mapping[str, PointsAndWeights], **options) -> Figure:
        return plotting.plot_plane(panels, self.system.box, **options)


def views_of(system: System) -> list[View]:
    """The plane for a particle in it; of a molecule every residue that has a φ and a ψ, from the N-terminus.

    May be empty.
    """
    if system.box is not None:
        return [PlaneView(system)]
    numbers = range(1, 1 + len(system.dihedrals))
    views = [TorsionView(system, number) for number in numbers]
    return [view for view in views if set(view.names) <= set(system.dihedrals)]


def symbol_of(name: str) -> str:
    """Of a coordinate: φ2 for phi2; other names stand for themselves."""
    return next((symbol + name.removeprefix(word) for word, symbol in SYMBOLS.items() if name.startswith(word)), name)
