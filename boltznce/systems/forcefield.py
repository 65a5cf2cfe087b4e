"""An OpenMM System as a batched, differentiable torch function.

Inside, arrays are laid out with the batch last: coordinates (3, n_atoms, batch), one row a term, so that every operation
runs over contiguous conformers. Lengths nm, energies kJ/mol, as in OpenMM.
"""

import copy
import math
from collections import defaultdict
from functools import cached_property

import openmm
import torch
from openmm import unit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from boltznce.errors import UserError

__all__ = ["TorchForceField"]

COULOMB = 138.93545764438198  # kJ mol⁻¹ nm e⁻²: 1 / (4π ε₀), CODATA 2018, as in OpenMM
CLOSEST = 2e-3  # nm; below it pair energies stay constant, which keeps them and their gradients finite in float32
TINY = 1e-20  # added to squared lengths (nm², nm⁴) under a root, whose gradient at zero it keeps finite
OBC_OFFSET = 0.009  # nm, subtracted from the intrinsic radii
OBC_ALPHA, OBC_BETA, OBC_GAMMA = 1.0, 0.8, 4.85  # model II of Onufriev, Bashford & Case, Proteins 55, 383 (2004)
PROBE_RADIUS = 0.14  # nm, of the surface-area term

Vectors = tuple[Tensor, Tensor, Tensor]


class Geometry:
    """Coordinates (3, n_atoms, batch) of a batch of conformers, and the pair distances that several terms share."""

    def __init__(self, x: Tensor, pairs: Tensor):
        self.xyz = x.permute(2, 1, 0).contiguous()
        self.pairs = pairs

    def vectors(self, start: Tensor, end: Tensor) -> Vectors:
        """Vectors from atoms ``start`` to atoms ``end``, as their x, y and z, each (n, batch)."""
        return (self.xyz.index_select(1, end) - self.xyz.index_select(1, start)).unbind()

    @cached_property
    def squared_distances(self) -> Tensor:
        """Of all pairs i < j in row-major order, (n_pairs, batch), nm²."""
        d = self.vectors(*self.pairs)
        return dot(d, d).clamp(min=CLOSEST**2)

    @cached_property
    def distances(self) -> Tensor:
        return self.squared_distances.sqrt()

    @cached_property
    def inverse_distances(self) -> Tensor:
        return 1 / self.distances


def dot(a: Vectors, b: Vectors) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def cross(a: Vectors, b: Vectors) -> Vectors:
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


class Term(nn.Module):
    """One force: tables as buffers (floats in one dtype, indices), ``forward(geometry) -> (batch,)`` in kJ/mol."""

    def table(self, **columns: Tensor | tuple) -> None:
        """Register each column, as a tensor, under its name."""
        for name, values in columns.items():
            self.register_buffer(name, torch.as_tensor(values))


class HarmonicBonds(Term):
    """Σ ½ k (r - r₀)²."""

    def __init__(self, force: openmm.HarmonicBondForce):
        super().__init__()
        i, j, length, k = zip(*(plain(force.getBondParameters(n)) for n in range(force.getNumBonds())), strict=True)
        self.table(i=i, j=j, length=column(length)[:, None], half_k=0.5 * column(k))

    def forward(self, geometry: Geometry) -> Tensor:
        d = geometry.vectors(self.i, self.j)
        r = (dot(d, d) + TINY).sqrt()
        return self.half_k @ (r - self.length).square()


class HarmonicAngles(Term):
    """Σ ½ k (θ - θ₀)², with θ from sine and cosine, which is accurate at 180° as well."""

    def __init__(self, force: openmm.HarmonicAngleForce):
        super().__init__()
        i, j, k, angle, stiffness = zip(*(plain(force.getAngleParameters(n)) for n in range(force.getNumAngles())), strict=True)
        self.table(i=i, j=j, k=k, angle=column(angle)[:, None], half_k=0.5 * column(stiffness))

    def forward(self, geometry: Geometry) -> Tensor:
        a, b = geometry.vectors(self.j, self.i), geometry.vectors(self.j, self.k)
        normal = cross(a, b)
        theta = torch.atan2((dot(normal, normal) + TINY).sqrt(), dot(a, b))
        return self.half_k @ (theta - self.angle).square()


class PeriodicTorsions(Term):
    """Σ k (1 + cos(nφ - δ)), summed for each four atoms as one Fourier series in φ."""

    def __init__(self, force: openmm.PeriodicTorsionForce):
        super().__init__()
        terms = [plain(force.getTorsionParameters(n)) for n in range(force.getNumTorsions())]
        series = defaultdict(lambda: torch.zeros(2, 1 + max(n for *_, n, _, _ in terms), dtype=torch.float64))
        for *atoms, n, phase, k in terms:
            series[tuple(atoms)][:, n] += torch.tensor((k * math.cos(phase), k * math.sin(phase)), dtype=torch.float64)
        i, j, k, l = zip(*series, strict=True)  # noqa: E741
        cosine, sine = torch.stack(list(series.values()), dim=-1)
        self.table(i=i, j=j, k=k, l=l, cosine=cosine, sine=sine)
        self.constant = sum(k for *_, k in terms)

    def forward(self, geometry: Geometry) -> Tensor:
        a, b, c = geometry.vectors(self.i, self.j), geometry.vectors(self.j, self.k), geometry.vectors(self.k, self.l)
        m, n = cross(a, b), cross(b, c)
        scale = (dot(m, m) + TINY).rsqrt() * (dot(n, n) + TINY).rsqrt()
        cos = dot(m, n) * scale
        sin = dot(a, n) * (dot(b, b) + TINY).sqrt() * scale
        total = self.constant + self.cosine[0].sum()
        cos_n, sin_n = cos, sin  # of nφ, by the addition theorems
        for order in range(1, len(self.cosine)):
            if order > 1:
                cos_n, sin_n = cos_n * cos - sin_n * sin, sin_n * cos + cos_n * sin
            total = total + self.cosine[order] @ cos_n + self.sine[order] @ sin_n
        return total


class Nonbonded(Term):
    """Σ qᵢqⱼ / (4πε₀ r) + 4ε ((σ/r)¹² - (σ/r)⁶) over all pairs, exceptions with their own parameters."""

    def __init__(self, force: openmm.NonbondedForce):
        super().__init__()
        if force.getNonbondedMethod() != openmm.NonbondedForce.NoCutoff:
            raise unknown("NonbondedForce with a cutoff")
        if force.getNumParticleParameterOffsets() or force.getNumExceptionParameterOffsets():
            raise unknown("NonbondedForce with parameter offsets")
        n_atoms = force.getNumParticles()
        q, sigma, epsilon = map(column, zip(*(plain(force.getParticleParameters(n)) for n in range(n_atoms)), strict=True))
        charges = q[:, None] * q
        sigmas = 0.5 * (sigma[:, None] + sigma)
        epsilons = (epsilon[:, None] * epsilon).sqrt()
        for n in range(force.getNumExceptions()):
            i, j, *parameters = plain(force.getExceptionParameters(n))
            for matrix, value in zip((charges, sigmas, epsilons), parameters, strict=True):
                matrix[i, j] = matrix[j, i] = value
        i, j = torch.triu_indices(n_atoms, n_atoms, 1)
        attraction = 4 * epsilons[i, j] * sigmas[i, j] ** 6
        self.table(coulomb=COULOMB * charges[i, j], attraction=attraction[:, None], repulsion=(attraction * sigmas[i, j] ** 6)[:, None])

    def forward(self, geometry: Geometry) -> Tensor:
        inverse = geometry.inverse_distances
        square = inverse * inverse
        sixth = square * square * square
        return self.coulomb @ inverse + ((self.repulsion * sixth - self.attraction) * sixth).sum(0)


class GBSAOBC(Term):
    """Generalized Born solvation with OBC2 radii (Onufriev et al. 2004, eqs. 2-6) and the ACE surface-area term."""

    def __init__(self, force: openmm.GBSAOBCForce):
        super().__init__()
        if force.getNonbondedMethod() != openmm.GBSAOBCForce.NoCutoff:
            raise unknown("GBSAOBCForce with a cutoff")
        n_atoms = force.getNumParticles()
        q, radius, scale = map(column, zip(*(plain(force.getParticleParameters(n)) for n in range(n_atoms)), strict=True))
        offset = radius - OBC_OFFSET
        i, j = torch.triu_indices(n_atoms, n_atoms, 1)
        pair_number = torch.zeros(n_atoms, n_atoms, dtype=torch.long)
        pair_number[i, j] = pair_number[j, i] = torch.arange(len(i))
        others = ~torch.eye(n_atoms, dtype=torch.bool)
        prefactor = -COULOMB * (1 / force.getSoluteDielectric() - 1 / force.getSolventDielectric())
        surface_tension = plain([force.getSurfaceAreaEnergy()])[0]
        self.table(
            i=i,
            j=j,
            ordered=pair_number[others],
            offset=offset[:, None],
            inverse_radius=1 / radius[:, None],
            scaled=(scale * offset).expand(n_atoms, n_atoms)[others].view(n_atoms, n_atoms - 1, 1),
            pair=prefactor * q[i] * q[j],
            own=0.5 * prefactor * q.square(),
            surface=4 * math.pi * surface_tension * (radius + PROBE_RADIUS).square() * radius**6,
        )

    def forward(self, geometry: Geometry) -> Tensor:
        inverse_born = self.inverse_born_radii(geometry)
        inverse_product = inverse_born.index_select(0, self.i) * inverse_born.index_select(0, self.j)
        r2 = geometry.squared_distances
        screened = (r2 + torch.exp(-0.25 * r2 * inverse_product) / inverse_product).rsqrt()
        return self.pair @ screened + self.own @ inverse_born + self.surface @ inverse_born.square() ** 3

    def inverse_born_radii(self, geometry: Geometry) -> Tensor:
        """(n_atoms, batch), nm⁻¹."""
        r = geometry.distances.index_select(0, self.ordered).view(len(self.offset), len(self.offset) - 1, -1)
        psi = 0.5 * self.offset * Descreening.apply(r, self.offset[:, None], self.scaled).sum(1)
        return 1 / self.offset - torch.tanh(psi * (OBC_ALPHA + psi * (-OBC_BETA + psi * OBC_GAMMA))) * self.inverse_radius


class Descreening(torch.autograd.Function):
    """What a sphere of radius ``scaled`` at distance r takes from the Coulomb integral outside one of radius ``own``.

    The integral has kinks where the spheres touch, but its limits do not enter its derivative: writing that by hand
    saves most of the backward pass. Hawkins, Cramer & Truhlar, J. Phys. Chem. 100, 19824 (1996), eqs. 10-13.
    """

    @staticmethod
    def forward(ctx, r: Tensor, own: Tensor, scaled: Tensor) -> Tensor:
        ctx.save_for_backward(r, own, scaled)
        lower, upper, inside = Descreening.limits(r, own, scaled)
        integral = lower - upper + 0.25 * (r - scaled * scaled / r) * (upper * upper - lower * lower) + 0.5 * torch.log(upper / lower) / r
        return integral + inside * (1 / own - lower)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        r, own, scaled = ctx.saved_tensors
        lower, upper, _ = Descreening.limits(r, own, scaled)
        inverse_r = 1 / r
        ratio = scaled * inverse_r
        slope = 0.25 * (1 + ratio * ratio) * (upper * upper - lower * lower) - 0.5 * torch.log(upper / lower) * inverse_r * inverse_r
        return grad * slope, None, None

    @staticmethod
    def limits(r: Tensor, own: Tensor, scaled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inverse limits of the integral, and 2 where the own sphere's centre is inside the other, else 0.

        A neighbour wholly inside the own sphere has equal limits, which makes its integral zero.
        """
        reach = r - scaled
        return 1 / torch.maximum(reach.abs(), own), 1 / torch.maximum(r + scaled, own), 2.0 * (reach < 0)


TERMS = {
    "HarmonicBondForce": HarmonicBonds,
    "HarmonicAngleForce": HarmonicAngles,
    "PeriodicTorsionForce": PeriodicTorsions,
    "NonbondedForce": Nonbonded,
    "GBSAOBCForce": GBSAOBC,
}


class TorchForceField(nn.Module):
    """Potential energy of an OpenMM System: positions (batch, n_atoms, 3) in nm -> kJ/mol, (batch,).

    Differentiable any number of times; computed in the dtype and on the device of the positions. Atoms closer than
    ``CLOSEST`` give a large finite energy and a finite gradient. Batches beyond ``chunk_size`` go piece by piece,
    and their gradients recompute each piece, so that memory does not grow with the batch.

    Raises UserError for a force that is not among ``TERMS``.
    """

    def __init__(self, system: openmm.System, chunk_size: int = 1024):
        super().__init__()
        self.n_atoms = system.getNumParticles()
        self.chunk_size = chunk_size
        terms = nn.ModuleList(term_of(force) for force in system.getForces() if not is_empty(force))
        pairs = torch.triu_indices(self.n_atoms, self.n_atoms, 1)
        # A plain dict, not submodules: the float64 tables must survive a .float() of whatever module holds this one.
        self._tables = {(torch.float64, torch.device("cpu")): (pairs, terms)}

    def forward(self, x: Tensor) -> Tensor:
        if len(x) <= self.chunk_size:
            return self._energy(x)
        pieces = x.split(self.chunk_size)
        if torch.is_grad_enabled() and x.requires_grad:
            return torch.cat([checkpoint(self._energy, piece, use_reentrant=False) for piece in pieces])
        return torch.cat([self._energy(piece) for piece in pieces])

    def _energy(self, x: Tensor) -> Tensor:
        pairs, terms = self._tables_like(x)
        geometry = Geometry(x, pairs)
        return sum((term(geometry) for term in terms), x.new_zeros(len(x)))

    def _tables_like(self, x: Tensor) -> tuple[Tensor, nn.ModuleList]:
        key = (x.dtype, x.device)
        if key not in self._tables:
            pairs, terms = self._tables[torch.float64, torch.device("cpu")]
            self._tables[key] = (pairs.to(x.device), copy.deepcopy(terms).to(x))
        return self._tables[key]


def term_of(force: openmm.Force) -> Term:
    if type(force).__name__ not in TERMS:
        raise unknown(type(force).__name__)
    if type(force) not in (openmm.NonbondedForce, openmm.GBSAOBCForce) and force.usesPeriodicBoundaryConditions():
        raise unknown(f"{type(force).__name__} with periodic boundaries")
    return TERMS[type(force).__name__](force)


def is_empty(force: openmm.Force) -> bool:
    """Force fields add a force without terms for, say, the torsions of a molecule that has none."""
    counters = {"HarmonicBondForce": "getNumBonds", "HarmonicAngleForce": "getNumAngles", "PeriodicTorsionForce": "getNumTorsions"}
    name = type(force).__name__
    return name in counters and getattr(force, counters[name])() == 0


def unknown(force: str) -> UserError:
    return UserError(f"The torch energy does not know {force}: set energy_backend=openmm to have OpenMM compute the energy instead.")


def plain(parameters: list) -> list:
    """Numbers in OpenMM's unit system (nm, ps, kJ/mol, radian, elementary charge) in place of quantities."""
    return [p.value_in_unit_system(unit.md_unit_system) if unit.is_quantity(p) else p for p in parameters]


def column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
