"""What is compared and drawn of positions: the torsions of each residue of a molecule, or the plane itself."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from boltznce.analysis.metrics import SampledDistance, plane_w2, torus_w2
from boltznce.analysis.plotting import plot_plane, plot_ramachandran
from boltznce.systems.base import System

__all__ = ["View", "symbol_of", "views_of"]

SYMBOLS = {"phi": "φ", "psi": "ψ"}


@dataclass(frozen=True)
class View:
    """Two coordinates of every sample: how far two sets are apart in them, and how they are drawn.

    Attributes:
        figure, distance: what reports call the figure and the distance.
        symbols: of the two coordinates.
        points: positions (n, atoms, dim) -> (n, 2).
        w2: Wasserstein-2 distance of two sets of points, the first one weighted (see `torus_w2`).
        draw: title -> (points, log weights) -> free energy over the two coordinates, a panel for each.
        periodic: whether the coordinates are angles.
    """

    figure: str
    distance: str
    symbols: tuple[str, str]
    points: Callable[[np.ndarray], np.ndarray]
    w2: Callable[..., SampledDistance]
    draw: Callable[..., Figure]
    periodic: bool


def views_of(system: System) -> list[View]:
    """The plane for a particle in it; of a molecule every residue that has a φ and a ψ. May be empty."""
    if system.box is not None:
        draw = partial(plot_plane, box=system.box)
        return [View("plane", "W2", ("x", "y"), lambda x: np.asarray(x)[:, 0], plane_w2, draw, periodic=False)]
    suffixes = ["", *map(str, range(2, 1 + len(system.dihedrals)))]
    return [_torsions(system, s) for s in suffixes if {f"phi{s}", f"psi{s}"} <= set(system.dihedrals)]


def _torsions(system: System, suffix: str) -> View:
    names = f"phi{suffix}", f"psi{suffix}"

    def points(positions: np.ndarray) -> np.ndarray:
        return np.stack([system.dihedral(np.asarray(positions), name) for name in names], axis=-1)

    symbols = symbol_of(names[0]), symbol_of(names[1])
    draw = partial(plot_ramachandran, angle_names=symbols)
    return View(f"ramachandran{suffix}", "T-W2 (rad)", symbols, points, torus_w2, draw, periodic=True)


def symbol_of(name: str) -> str:
    """Of a coordinate: φ2 for phi2; other names stand for themselves."""
    return next((symbol + name.removeprefix(word) for word, symbol in SYMBOLS.items() if name.startswith(word)), name)
