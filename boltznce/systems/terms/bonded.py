"""Terms along the bond graph: bonds, angles, torsions, and maps over two torsions."""

import math
from collections import defaultdict
from typing import Any

import openmm
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

from boltznce.systems.terms.geometry import TINY, Chained, Geometry, column, columns, cross, dot, unknown

__all__ = [
    "CMAPTorsions",
    "HarmonicAngles",
    "HarmonicBonds",
    "HarmonicTorsions",
    "PeriodicTorsions",
    "RyckaertBellemansTorsions",
]

Four = tuple[int, int, int, int]
# energies of harmonic torsions, up to the first semicolon, and the factor of k
UNWRAPPED = "k*(theta-theta0)^2"
HARMONIC = {"k*min(dtheta,2*pi-dtheta)^2": 1.0, "0.5*k*(thetap-theta0)^2": 0.5, UNWRAPPED: 1.0}


class HarmonicBonds(Chained):
    """Σ ½ k (r - r₀)² (Cornell et al., J. Am. Chem. Soc. 117, 5179 (1995), eq. 1, whose k is half of this one)."""

    def __init__(self, force: openmm.HarmonicBondForce, n_atoms: int):
        *atoms, length, k = columns(force.getBondParameters, force.getNumBonds())
        super().__init__(rows(atoms), n_atoms)
        self.table(rest=column(length)[:, None], half_k=0.5 * column(k)[:, None])

    def forward(self, geometry: Geometry) -> Tensor:
        (d,) = geometry.vectors(self)
        r = (dot(d, d) + TINY).sqrt()
        return (self.half_k * (r - self.rest).square()).sum(0)


class HarmonicAngles(Chained):
    """Σ ½ k (θ - θ₀)² (Cornell et al. 1995, eq. 1), with θ from sine and cosine, which is accurate at 180° as well."""

    def __init__(self, force: openmm.HarmonicAngleForce, n_atoms: int):
        *atoms, angle, k = columns(force.getAngleParameters, force.getNumAngles())
        super().__init__(rows(atoms), n_atoms)
        self.table(angle=column(angle)[:, None], half_k=0.5 * column(k)[:, None])

    def forward(self, geometry: Geometry) -> Tensor:
        a, b = geometry.vectors(self)
        normal = cross(a, b)
        theta = torch.atan2((dot(normal, normal) + TINY).sqrt(), -dot(a, b))
        return (self.half_k * (theta - self.angle).square()).sum(0)


class TorsionSeries(Chained):
    """Σ aₙ cos nφ + bₙ sin nφ: one Fourier series for each four atoms, whatever number of terms it came from."""

    def __init__(self, series: dict[Four, Tensor], n_atoms: int):
        """``series``: four atoms -> (2, orders) float64, the aₙ and the bₙ, n from 0, in kJ/mol."""
        super().__init__(list(series), n_atoms)
        cosine, sine = torch.stack(list(series.values()), dim=-1)
        self.table(cosine=cosine[..., None], sine=sine[..., None])
        self.constant = float(cosine[0].sum())

    def forward(self, geometry: Geometry) -> Tensor:
        cos, sin = geometry.torsions(self)
        total: Any = 0.0
        cos_n, sin_n = cos, sin  # of nφ, by the addition theorems
        for order in range(1, len(self.cosine)):
            if order > 1:
                cos_n, sin_n = cos_n * cos - sin_n * sin, sin_n * cos + cos_n * sin
            total = total + self.cosine[order] * cos_n + self.sine[order] * sin_n
        return self.constant + total.sum(0)


class PeriodicTorsions(TorsionSeries):
    """Σ k (1 + cos(nφ - δ)) (Cornell et al. 1995, eq. 1)."""

    def __init__(self, force: openmm.PeriodicTorsionForce, n_atoms: int):
        terms = list(zip(*columns(force.getTorsionParameters, force.getNumTorsions()), strict=True))
        orders = 1 + max([1, *(n for *_, n, _, _ in terms)])
        series: dict[Four, Tensor] = defaultdict(lambda: torch.zeros(2, orders, dtype=torch.float64))
        for *atoms, n, phase, k in terms:
            series[tuple(atoms)][0, 0] += k
            series[tuple(atoms)][:, n] += torch.tensor((k * math.cos(phase), k * math.sin(phase)), dtype=torch.float64)
        super().__init__(series, n_atoms)


class RyckaertBellemansTorsions(TorsionSeries):
    """Σ cₙ (cos(φ - π))ⁿ, n = 0 to 5 (Ryckaert & Bellemans, Chem. Phys. Lett. 30, 123 (1975)), as a Fourier series."""

    def __init__(self, force: openmm.RBTorsionForce, n_atoms: int):
        series: dict[Four, Tensor] = defaultdict(lambda: torch.zeros(2, 6, dtype=torch.float64))
        for n in range(force.getNumTorsions()):
            i, j, k, l, *powers = force.getTorsionParameters(n)  # noqa: E741
            polynomial = [(-1) ** order * c._value for order, c in enumerate(powers)]  # in cos φ = -cos(φ - π)
            cosine = chebyshev.poly2cheb(polynomial)  # cos nφ is the n-th Chebyshev polynomial of cos φ
            series[i, j, k, l][0, : len(cosine)] += torch.from_numpy(cosine)
        super().__init__(series, n_atoms)


class HarmonicTorsions(Chained):
    """Σ k (φ - φ₀)², the difference taken on the circle: CHARMM's and GROMACS's impropers, a CustomTorsionForce.

    Recognized by the expressions that OpenMM's readers of their files write. Raises UserError for another one.
    """

    def __init__(self, force: openmm.CustomTorsionForce, n_atoms: int):
        expression = force.getEnergyFunction().replace(" ", "").partition(";")[0]
        names = [force.getPerTorsionParameterName(n) for n in range(force.getNumPerTorsionParameters())]
        if expression not in HARMONIC or sorted(names) != ["k", "theta0"] or force.getNumGlobalParameters():
            raise unknown("CustomTorsionForce of another expression than a harmonic improper's")
        *atoms, values = columns(force.getTorsionParameters, force.getNumTorsions())
        given = dict(zip(names, map(column, zip(*values, strict=True)), strict=True))
        if expression == UNWRAPPED and given["theta0"].any():
            raise unknown("a CustomTorsionForce whose angles are not taken on the circle")
        super().__init__(rows(atoms), n_atoms)
        k, angle = HARMONIC[expression] * given["k"], given["theta0"][:, None]
        self.table(k=k[:, None], cosine=angle.cos(), sine=angle.sin())

    def forward(self, geometry: Geometry) -> Tensor:
        cos, sin = geometry.torsions(self)
        # atoms on a line: any angle will do, as long as its gradient is finite
        undefined = cos.square() + sin.square() < 0.5
        cos, sin = cos.masked_fill(undefined, 1.0), sin.masked_fill(undefined, 0.0)
        away = torch.atan2(sin * self.cosine - cos * self.sine, cos * self.cosine + sin * self.sine)
        return (self.k * away.square()).sum(0)


class CMAPTorsions(Chained):
    """Σ E(φ, ψ): energy maps over pairs of torsions (MacKerell, Feig & Brooks, J. Comput. Chem. 25, 1400 (2004)).

    Bicubic between the points of a map, with the slopes there of periodic cubic splines through them.
    """

    def __init__(self, force: openmm.CMAPTorsionForce, n_atoms: int):
        numbers, *atoms = columns(force.getTorsionParameters, force.getNumTorsions())
        super().__init__(rows(atoms[:4]) + rows(atoms[4:]), n_atoms)
        maps = [force.getMapParameters(n) for n in range(force.getNumMaps())]
        sizes = torch.tensor([size for size, _ in maps])
        starts = (sizes**2).cumsum(0) - sizes**2
        # OpenMM's maps are stored with the first angle running fastest.
        patches = [bicubic(column(tuple(energy._value)).view(size, size).T).flatten(2) for size, energy in maps]
        number = torch.tensor(numbers)
        self.table(
            size=sizes[number].repeat(2)[:, None],
            start=starts[number][:, None],
            coefficients=torch.cat(patches, dim=2),
        )

    def forward(self, geometry: Geometry) -> Tensor:
        cos, sin = geometry.torsions(self)
        # atoms on a line: any angle will do, as long as its gradient is finite
        undefined = cos.square() + sin.square() < 0.5
        angle = torch.atan2(sin.masked_fill(undefined, 0.0), cos.masked_fill(undefined, 1.0))
        place = (angle * self.size / (2 * math.pi)).remainder(self.size)
        # Rounding can make ``place`` equal to the size: that is the end of the last patch.
        corner = torch.minimum(place.detach().floor().long(), self.size - 1)
        (row, col), (a, b) = corner.chunk(2), (place - corner).chunk(2)
        size = self.size[: len(row)]
        c = self.coefficients[:, :, self.start + row * size + col]
        c = ((c[:, 3] * b + c[:, 2]) * b + c[:, 1]) * b + c[:, 0]
        return (((c[3] * a + c[2]) * a + c[1]) * a + c[0]).sum(0)


def rows(columns: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The atoms of each term, from a column for each of their places."""
    return list(zip(*columns, strict=True))


def bicubic(energy: Tensor) -> Tensor:
    """Coefficients (4, 4, size, size) of aᵖ bᵠ, a and b in [0, 1], on each patch of a periodic map (size, size)."""
    size = len(energy)
    one = torch.eye(size, dtype=energy.dtype)
    before, after = one.roll(1, dims=0), one.roll(-1, dims=0)
    # A cubic spline's slopes d in units of the grid: d₋₁ + 4 d + d₊₁ = 3 (E₊₁ - E₋₁).
    slope = torch.linalg.solve(before + 4 * one + after, 3 * (after - before))
    rows = torch.stack((energy, slope @ energy))
    rows = torch.cat((rows, rows.roll(-1, dims=1)))
    both = torch.stack((rows, rows @ slope.T), dim=1)
    both = torch.cat((both, both.roll(-1, dims=3)), dim=1)
    # from value, slope, next value, next slope
    hermite = energy.new_tensor([[1, 0, 0, 0], [0, 1, 0, 0], [-3, -2, 3, -1], [2, 1, -2, 1]])
    return torch.einsum("pi,qj,ijab->pqab", hermite, hermite, both)
