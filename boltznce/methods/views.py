"""What is compared and drawn of positions: φ and ψ of each residue, else a molecule's own torsions, or the plane."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from boltznce.analysis.metrics import SampledDistance, plane_w2, torus_w2
from boltznce.analysis.plotting import plot_marginals, plot_plane, plot_ramachandran
from boltznce.systems.base import System
from boltznce.systems.coordinates import symbol_of

__all__ = ["View", "residues", "views_of"]


@dataclass(frozen=True)
class View:
    """Two coordinates of every sample, or the one torsion that there is: how far sets are apart in them, and a figure.

    Attributes:
        figure, distance: what reports call the figure and the distance.
        symbols: of the k coordinates, one or two.
        points: positions (n, atoms, dim) -> (n, k).
        w2: Wasserstein-2 distance of two sets of points, the first one weighted (see `torus_w2`).
        draw: title -> (points, log weights) -> free energy over two coordinates, a panel for each; density over one.
        periodic: whether the coordinates are angles.
    """

    figure: str
    distance: str
    symbols: tuple[str, ...]
    points: Callable[[np.ndarray], np.ndarray]
    w2: Callable[..., SampledDistance]
    draw: Callable[..., Figure]
    periodic: bool


def views_of(system: System) -> list[View]:
    """The plane for a particle in it; of a molecule every residue that has a φ and a ψ, else its first two torsions.

    Where no residue has both, as in peptides of two, φ and ψ of one number, as the papers have it. Empty where nothing
    turns.
    """
    if system.box is not None:
        draw = partial(plot_plane, box=system.box)
        return [View("plane", "W2", ("x", "y"), lambda x: np.asarray(x)[:, 0], plane_w2, draw, periodic=False)]
    if pairs := residues(system.dihedrals):
        return [_torsions(system, f"ramachandran{phi.removeprefix('phi')}", (phi, psi)) for phi, psi in pairs]
    names = [name for name in system.dihedrals if name not in system.omegas] or list(system.omegas)
    return [_torsions(system, "torsions", tuple(names[:2]))] if names else []


def residues(dihedrals: Mapping[str, tuple[int, ...]]) -> list[tuple[str, str]]:
    """Names of φ and ψ on the same N, Cα and C; where no residue has both, those of the same number."""
    phis = {name: atoms[1:] for name, atoms in dihedrals.items() if name.startswith("phi")}
    psis = {atoms[:3]: name for name, atoms in dihedrals.items() if name.startswith("psi")}
    same = [(name, psis[atoms]) for name, atoms in phis.items() if atoms in psis]
    numbered = [(name, f"psi{name.removeprefix('phi')}") for name in phis]
    return same or [pair for pair in numbered if pair[1] in dihedrals]


def _torsions(system: System, figure: str, names: tuple[str, ...]) -> View:
    def points(positions: np.ndarray) -> np.ndarray:
        return np.stack([system.dihedral(np.asarray(positions), name) for name in names], axis=-1)

    symbols = tuple(map(symbol_of, names))
    draw = partial(plot_ramachandran if len(names) == 2 else _draw_one, angle_names=symbols)
    return View(figure, "T-W2 (rad)", symbols, points, torus_w2, draw, periodic=True)


def _draw_one(panels: Mapping, angle_names: tuple[str, ...], n_bins: int = 72, zero_of: str | None = None) -> Figure:
    """Densities have their zero in common."""
    return plot_marginals(panels, angle_names, n_bins)
