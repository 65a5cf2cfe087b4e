"""What is compared and drawn of positions: backbone torsions of a molecule, or the plane itself."""

from collections.abc import Mapping
from typing import ClassVar, Protocol

import numpy as np
from matplotlib.figure import Figure

from boltznce.analysis import plotting
from boltznce.analysis.metrics import SampledDistance, plane_w2, plane_w2_floor, torus_w2, torus_w2_floor
from boltznce.systems.base import System

__all__ = ["PlaneView", "TorsionView", "View", "view_of"]

PointsAndWeights = tuple[np.ndarray, np.ndarray | None]


class View(Protocol):
    """Two coordinates of every sample: how far two sets are apart in them, and how they are drawn.

    Attributes:
        data, figure, distance: what reports call the reference data, the figure and the distance.
        highest: kT, of the profile's figure: above, samples are noise.
        symbols: of named coordinates.
        notes: sentences for the report.
    """

    data: str
    figure: str
    distance: str
    highest: float
    symbols: ClassVar[Mapping[str, str]]
    notes: tuple[str, ...]

    def points(self, positions: np.ndarray) -> np.ndarray:
        """(n, 2) of positions (n, atoms, dim)."""

    def w2(self, points1: np.ndarray, points2: np.ndarray, w1: np.ndarray | None = None, **options) -> SampledDistance:
        """Wasserstein-2 distance of two sets of points, the first one weighted."""

    def w2_floor(self, points: np.ndarray, **options) -> SampledDistance:
        """The distance between the halves of one set."""

    def draw(self, panels: Mapping[str, PointsAndWeights]) -> Figure:
        """Free energy over the two coordinates, a panel for each titled set of points and log weights."""


class TorsionView(View):
    """The (φ, ψ) of a molecule, on the torus."""

    data = "MD"
    figure = "ramachandran"
    distance = "T-W2 (rad)"
    highest = 16.0  # kT, of the profile's figure: above, samples are noise
    symbols: ClassVar = {"phi": "φ", "psi": "ψ"}
    notes = ("All figures are conditional on L chirality and trans peptide bonds, on both sides.",)

    def __init__(self, system: System) -> None:
        self.system = system

    def points(self, positions: np.ndarray) -> np.ndarray:
        return np.stack([self.system.dihedral(np.asarray(positions), name) for name in ("phi", "psi")], axis=-1)

    def w2(self, points1: np.ndarray, points2: np.ndarray, w1: np.ndarray | None = None, **options) -> SampledDistance:
        return torus_w2(points1, points2, w1, **options)

    def w2_floor(self, points: np.ndarray, **options) -> SampledDistance:
        return torus_w2_floor(points, **options)

    def draw(self, panels: Mapping[str, PointsAndWeights], **options) -> Figure:
        return plotting.plot_ramachandran(panels, **options)


class PlaneView(View):
    """The positions of one particle in the plane."""

    data = "data"
    figure = "plane"
    distance = "W2"
    highest = 12.0  # kT, of the profile's figure
    symbols: ClassVar = {}
    notes = ()

    def __init__(self, system: System) -> None:
        self.system = system

    def points(self, positions: np.ndarray) -> np.ndarray:
        return np.asarray(positions)[:, 0]

    def w2(self, points1: np.ndarray, points2: np.ndarray, w1: np.ndarray | None = None, **options) -> SampledDistance:
        return plane_w2(points1, points2, w1, **options)

    def w2_floor(self, points: np.ndarray, **options) -> SampledDistance:
        return plane_w2_floor(points, **options)

    def draw(self, panels: Mapping[str, PointsAndWeights], **options) -> Figure:
        return plotting.plot_plane(panels, self.system.box, **options)


def view_of(system: System) -> View:
    """The plane for a particle in it, backbone torsions for a molecule."""
    return PlaneView(system) if system.dim == 2 else TorsionView(system)
