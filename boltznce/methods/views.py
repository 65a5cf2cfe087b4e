"""What is compared and drawn of positions: backbone torsions of a molecule, or the plane itself."""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from matplotlib.figure import Figure

from boltznce.analysis import plotting
from boltznce.analysis.metrics import SampledDistance, plane_w2, plane_w2_floor, torus_w2, torus_w2_floor
from boltznce.systems.base import System

__all__ = ["PlaneView", "TorsionView", "view_of"]

PointsAndWeights = tuple[np.ndarray, np.ndarray | None]


class TorsionView:
    """The (φ, ψ) of a molecule, on the torus."""

    data = "MD"
    figure = "ramachandran"
    distance = "T-W2 (rad)"
    highest = 25.0  # kT, of the profile's figure: above, samples are noise
    symbols: ClassVar = {"phi": "φ", "psi": "ψ"}
    notes = ("All figures are conditional on L chirality and trans peptide bonds, on both sides.",)

    def __init__(self, system: System) -> None:
        self.system = system

    def points(self, positions: np.ndarray) -> np.ndarray:
        """(n, 2) of positions (n, atoms, 3)."""
        return np.stack([self.system.dihedral(np.asarray(positions), name) for name in ("phi", "psi")], axis=-1)

    def w2(self, points1: np.ndarray, points2: np.ndarray, w1: np.ndarray | None = None, **options) -> SampledDistance:
        return torus_w2(points1, points2, w1, **options)

    def w2_floor(self, points: np.ndarray, **options) -> SampledDistance:
        return torus_w2_floor(points, **options)

    def draw(self, panels: Mapping[str, PointsAndWeights], **options) -> Figure:
        return plotting.plot_ramachandran(panels, **options)


class PlaneView:
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
        """(n, 2) of positions (n, 1, 2)."""
        return np.asarray(positions)[:, 0]

    def w2(self, points1: np.ndarray, points2: np.ndarray, w1: np.ndarray | None = None, **options) -> SampledDistance:
        return plane_w2(points1, points2, w1, **options)

    def w2_floor(self, points: np.ndarray, **options) -> SampledDistance:
        return plane_w2_floor(points, **options)

    def draw(self, panels: Mapping[str, PointsAndWeights], **options) -> Figure:
        return plotting.plot_plane(panels, self.system.box, **options)


def view_of(system: System) -> TorsionView | PlaneView:
    return PlaneView(system) if system.dim == 2 else TorsionView(system)
