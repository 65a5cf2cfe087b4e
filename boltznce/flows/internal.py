"""Cartesian <-> normalized internal coordinates of a molecule, with the log-determinant modulo rigid motion.

Each atom is placed from three others by a bond, an angle and a torsion (natural extension reference frame, Parsons et
al., J. Comput. Chem. 26, 1063, 2005). The Cartesian volume, integrated over translations and rotations, is |J| dq with
|J| = b₂² · b₃² sin θ₃ · Π_{i≥4} b_i² sin θ_i (DESIGN.md, section 6).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from boltznce.errors import UserError
from boltznce.flows.zmatrix import ZMatrix, build_zmatrix
from boltznce.units import GAS_CONSTANT

__all__ = ["InternalCoordinates", "dihedral", "extend"]

PLANAR = 5 * math.pi / 6  # siblings further apart around a bond to a centre of three neighbours are in a plane with it
STRAIGHT = 0.1  # rad; angles are kept this far from 0 and π, where torsions lose their meaning
MARGIN = 1e-3  # rad; a torsion with a handedness is kept this far from 0 and π, so that no rounding changes its sign
RANGE = 10.0  # standard deviations, half to each side: a prior of 0.1 on [0, 1] is then the thermal distribution
DEFAULT_WIDTHS = {"bond": 0.07, "angle": 1.5}  # nm, rad: where the force field has no harmonic term

Atoms = tuple[int, ...]


class InternalCoordinates(nn.Module):
    """The map between positions (batch, n_atoms, 3) in nm and the unit cube (batch, d), d = 3 n_atoms - 6.

    The cube's coordinates are the n - 1 bonds, the n - 2 angles and the n - 3 torsions, from the root of the z-matrix
    outward. Bonds and angles are ``(q - q_ref) / width + ½``, the width ten standard deviations of their harmonic term
    at ``temperature``. Torsions are ``circular``, their period mapped to [0, 1], but for those that tell the atoms on
    one centre apart and stay near their reference: these are bounded, as bonds and angles are.

    Args:
        positions: a minimized structure (n_atoms, 3) in nm, the centre of the cube.
        bonds: pairs of bonded atoms.
        core: atoms that may form the backbone, see `build_zmatrix`; default all with more than one neighbour.
        bond_constants, angle_constants: harmonic constants in kJ/mol/nm² and kJ/mol/rad², by atoms in either direction.
        temperature: the highest at which the coordinates are used, in K.
        stereocentres: (centre, three neighbours).
        fix_chirality: torsions that have a handedness, on centres of four neighbours, stay in the half of the circle in
            which they are in ``positions``. So do stereocentres, and labels of equivalent atoms that only an inversion
            can exchange (as in CH2).
        methyl_groups: triples of equivalent hydrogens on one atom.
        fix_methyls: the hydrogens of a methyl keep their order, and their mean torsion the third of the circle around
            that of ``positions``: one of the six ways to label them.

    Raises UserError if the atoms are not all connected, and for a structure with an angle near 180°, beyond which no
    torsion is defined.
    """

    root: Tensor
    place: Tensor
    rows: Tensor
    differences: Tensor
    means: Tensor
    dihedrals: Tensor
    methyls: Tensor
    branch: Tensor
    sense: Tensor
    centre: Tensor
    width: Tensor
    circular: Tensor

    def __init__(
        self,
        positions: Tensor,
        bonds: Sequence[tuple[int, int]],
        *,
        core: Collection[int] | None = None,
        bond_constants: Mapping[Atoms, float] | None = None,
        angle_constants: Mapping[Atoms, float] | None = None,
        temperature: float = 1200.0,
        stereocentres: Sequence[tuple[int, int, int, int]] = (),
        fix_chirality: bool = True,
        methyl_groups: Sequence[tuple[int, int, int]] = (),
        fix_methyls: bool = True,
    ) -> None:
        super().__init__()
        n = len(positions)
        degree = torch.bincount(torch.tensor(bonds).flatten(), minlength=n).tolist()
        core = [atom for atom in range(n) if degree[atom] > 1] if core is None else core
        self.n_atoms, self.dimension = n, 3 * n - 6
        self.zmatrix = build_zmatrix(n, bonds, core, stereocentres)
        methyls = [rows for group in methyl_groups if (rows := methyl_rows(self.zmatrix, group)) is not None]
        self._add_tables(self.zmatrix)
        self._add_linear_maps(self.zmatrix, methyls if fix_methyls else [])

        bond, angle, torsion = (q.squeeze(0) for q in self._measure(positions.detach().double().cpu().unsqueeze(0)))
        for atoms, theta in zip(self.angle_atoms, angle.tolist(), strict=True):
            if theta > math.pi - STRAIGHT:
                raise UserError(
                    f"There are no internal coordinates of atoms on a line, as {atoms}: use a Cartesian flow."
                )
        kt = GAS_CONSTANT * temperature
        bond_width = thermal_widths(self.bond_atoms, bond_constants or {}, kt, DEFAULT_WIDTHS["bond"])
        angle_width = thermal_widths(self.angle_atoms, angle_constants or {}, kt, DEFAULT_WIDTHS["angle"])
        bond_width = torch.minimum(bond_width, 1.8 * bond)  # a bond stays positive
        angle_width = torch.minimum(angle_width, 2 * torch.minimum(angle, math.pi - angle) - 2 * STRAIGHT)
        held = {k for group in methyls for k in group} if fix_methyls else set()
        free = {k for group in methyls for k in group} - held
        torsion_reference = wrapped(self.differences @ torsion)
        centre, width, circular = torsion_domains(self.zmatrix, torsion_reference, degree, fix_chirality, held, free)
        # atan2 of a bounded torsion is continued beyond ±π to where the domain's centre is
        self.register_buffer("branch", torch.where(circular, 0.0, centre))
        # in which sense the reference's methyls are labelled
        self.register_buffer("sense", torch.sign(centre[self.methyls[:, 1]]).long())
        first = self.methyls[:, 0]
        centre[first], width[first] = self._coordinates(torsion)[first], 2 * math.pi / 3
        self.register_buffer("centre", torch.cat([bond, angle, centre]))
        self.register_buffer("width", torch.cat([bond_width, angle_width, width]))
        self.register_buffer("circular", torch.cat([torch.zeros(2 * n - 3, dtype=torch.bool), circular]))

    # ---- what the coordinates are -----------------------------------------------------------------------------------

    @property
    def groups(self) -> dict[str, list[int]]:
        """Numbers of the coordinates that are bonds, angles and torsions."""
        ends = [self.n_atoms - 1, 2 * self.n_atoms - 3, self.dimension]
        starts = zip(("bonds", "angles", "torsions"), [0, *ends], ends, strict=False)
        return {name: list(range(start, end)) for name, start, end in starts}

    @property
    def bond_atoms(self) -> list[Atoms]:
        x1, x2, x3 = self.zmatrix.root
        return [(x2, x1), (x3, x2), *((row.atom, row.a) for row in self.zmatrix.rows)]

    @property
    def angle_atoms(self) -> list[Atoms]:
        x1, x2, x3 = self.zmatrix.root
        return [(x3, x2, x1), *((row.atom, row.a, row.b) for row in self.zmatrix.rows)]

    # ---- the map ----------------------------------------------------------------------------------------------------

    def to_unit(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates y (batch, d) of positions (batch, n_atoms, 3) in nm, made `canonical`, and log|dy/dx| (batch,).

        A bounded coordinate outside [0, 1] is outside the domain.
        """
        bond, angle, torsion = self._measure(self.canonical(positions))
        q = torch.cat([bond, angle, self._coordinates(torsion)], dim=1)
        y = (q - self.centre.to(q)) / self.width.to(q) + 0.5
        y = torch.where(self.circular, y - y.floor(), y)
        return y, -log_volume(bond, angle) - self.width.log().sum().to(q)

    def to_positions(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (batch, n_atoms, 3) in nm of coordinates y (batch, d), centred, and log|dx/dy| (batch,)."""
        q = (y - 0.5) * self.width.to(y) + self.centre.to(y)
        bond, angle, torsion = q.split([self.n_atoms - 1, self.n_atoms - 2, self.n_atoms - 3], dim=1)
        x = self._place(bond, angle, torsion @ self.dihedrals.to(y).T)
        return x - x.mean(dim=1, keepdim=True), log_volume(bond, angle) + self.width.log().sum().to(y)

    def canonical(self, positions: Tensor) -> Tensor:
        """``positions`` with the hydrogens of methyls relabelled as the domain has them, which changes no energy."""
        if not len(self.methyls):
            return positions
        rows = self.rows[:, self.methyls]  # (4, groups, 3)
        torsion = dihedral(*(positions[:, atoms] for atoms in rows)).remainder(2 * math.pi)
        angle, order = torsion.sort(dim=-1)
        gap = (angle.roll(-1, -1) - angle).remainder(2 * math.pi)  # to the next hydrogen around
        mean = angle + (gap - gap.roll(1, -1)) / 3  # torsion of the three, counted from this one
        centre = self.centre[2 * self.n_atoms - 3 + self.methyls[:, 0]].to(mean).unsqueeze(-1)
        first = (mean - centre + math.pi / 3).remainder(2 * math.pi).argmin(dim=-1, keepdim=True)
        around = (first + self.sense.unsqueeze(-1) * torch.arange(3, device=positions.device)) % 3
        source = rows[0].expand_as(order).gather(-1, order.gather(-1, around))
        index = torch.arange(self.n_atoms, device=positions.device).repeat(len(positions), 1)
        index[:, rows[0].flatten()] = source.flatten(1)
        return positions.gather(1, index.unsqueeze(-1).expand_as(positions))

    def _measure(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bonds, angles and dihedrals (the rows' own, not differences) of positions (batch, n_atoms, 3)."""
        x1, x2, x3 = x[:, self.root].unbind(1)
        atom, a, b, c = (x[:, atoms] for atoms in self.rows)
        ends, middles = torch.cat([x2[:, None], x3[:, None], atom], 1), torch.cat([x1[:, None], x2[:, None], a], 1)
        bond = torch.linalg.vector_norm(ends - middles, dim=-1)
        inner = torch.cat([x1[:, None], b], 1) - middles[:, 1:]
        outer = ends[:, 1:] - middles[:, 1:]
        angle = torch.atan2(torch.linalg.vector_norm(torch.linalg.cross(inner, outer), dim=-1), (inner * outer).sum(-1))
        return bond, angle, dihedral(atom, a, b, c)

    def _coordinates(self, torsion: Tensor) -> Tensor:
        """Dihedrals (..., n - 3) -> differences to siblings, on their branch -> a methyl's mean for its first."""
        branch = self.branch.to(torsion)
        difference = torsion @ self.differences.to(torsion).T
        return (wrapped(difference - branch) + branch) @ self.means.to(torsion).T

    def _place(self, bond: Tensor, angle: Tensor, torsion: Tensor) -> Tensor:
        """Positions from bonds, angles, dihedrals; the first at 0, the second on the x axis, the third at z = 0."""
        zero = torch.zeros_like(bond[:, 0])
        x2 = torch.stack([bond[:, 0], zero, zero], -1)
        x3 = x2 + bond[:, 1:2] * torch.stack([-angle[:, 0].cos(), angle[:, 0].sin(), zero], -1)
        x = torch.stack([torch.zeros_like(x2), x2, x3], 1)
        for k in range(self.n_levels):
            rows, a, b, c = getattr(self, f"level_{k}")
            new = extend(x[:, a], x[:, b], x[:, c], bond[:, 2 + rows], angle[:, 1 + rows], torsion[:, rows])
            x = torch.cat([x, new], 1)
        return x[:, self.place]

    # ---- setting up -------------------------------------------------------------------------------------------------

    def _add_tables(self, zmatrix: ZMatrix) -> None:
        """Atoms of each row, (4, n - 3); level by level rows and reference atoms, atoms counted as they are placed."""
        order = [*zmatrix.root, *(zmatrix.rows[k].atom for level in zmatrix.levels for k in level)]
        place = {atom: k for k, atom in enumerate(order)}
        tables: dict[str, Any] = {"root": zmatrix.root, "place": [place[atom] for atom in range(len(order))]}
        tables["rows"] = [[getattr(row, name) for row in zmatrix.rows] for name in ("atom", "a", "b", "c")]
        self.n_levels = len(zmatrix.levels)
        for number, level in enumerate(zmatrix.levels):
            rows = [zmatrix.rows[k] for k in level]
            references = ([place[getattr(row, name)] for row in rows] for name in ("a", "b", "c"))
            tables[f"level_{number}"] = [level, *references]
        for name, table in tables.items():
            self.register_buffer(name, torch.tensor(table, dtype=torch.long), persistent=False)

    def _add_linear_maps(self, zmatrix: ZMatrix, methyls: Sequence[tuple[int, int, int]]) -> None:
        """``differences`` to siblings, ``means`` of methyls, and ``dihedrals``, their inverse: all of determinant 1."""
        number = {row.atom: k for k, row in enumerate(zmatrix.rows)}
        differences = torch.eye(len(number), dtype=torch.float64)
        means = differences.clone()
        for k, row in enumerate(zmatrix.rows):
            if row.sibling in number:  # the dihedral of a root atom is 0
                differences[k, number[row.sibling]] = -1.0
        for first, second, third in methyls:
            means[first, second] = means[first, third] = 1 / 3
        maps = {"differences": differences, "means": means, "dihedrals": torch.linalg.inv(means @ differences)}
        for name, matrix in maps.items():
            self.register_buffer(name, matrix, persistent=False)
        self.register_buffer("methyls", torch.tensor(methyls, dtype=torch.long).view(-1, 3), persistent=False)


def dihedral(atom: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Dihedral atom-a-b-c of positions (..., 3), (...,) in (-π, π], IUPAC sign."""
    b1, b2, b3 = a - atom, b - a, c - b
    m, n = torch.linalg.cross(b1, b2), torch.linalg.cross(b2, b3)
    return torch.atan2((b1 * n).sum(-1) * torch.linalg.vector_norm(b2, dim=-1), (m * n).sum(-1))


def extend(a: Tensor, b: Tensor, c: Tensor, bond: Tensor, angle: Tensor, torsion: Tensor) -> Tensor:
    """The atom (..., 3) at ``bond`` from a, with ``angle`` at a to b and dihedral ``torsion`` about a-b to c."""
    along = nn.functional.normalize(a - b, dim=-1)
    normal = nn.functional.normalize(torch.linalg.cross(b - c, along), dim=-1)
    inward = torch.linalg.cross(normal, along)
    out = angle.sin()
    step = torch.stack([-angle.cos(), out * torsion.cos(), out * torsion.sin()], -1).unsqueeze(-1)
    return a + bond.unsqueeze(-1) * (torch.stack([along, inward, normal], -2) * step).sum(-2)


def log_volume(bond: Tensor, angle: Tensor) -> Tensor:
    """log|J| = Σ 2 log b + Σ log sin θ, (batch,)."""
    return 2 * bond.log().sum(-1) + angle.sin().log().sum(-1)


def wrapped(angle: Tensor) -> Tensor:
    """The same angle in [-π, π)."""
    return (angle + math.pi).remainder(2 * math.pi) - math.pi


def thermal_widths(atoms: Sequence[Atoms], constants: Mapping[Atoms, float], kt: float, default: float) -> Tensor:
    """`RANGE` standard deviations sqrt(kT / k) of the harmonic term on each tuple of ``atoms``, float64."""
    found = [constants.get(key) or constants.get(key[::-1]) for key in atoms]
    return torch.tensor([RANGE * math.sqrt(kt / k) if k else default for k in found], dtype=torch.float64)


def methyl_rows(zmatrix: ZMatrix, group: Sequence[int]) -> tuple[int, int, int] | None:
    """The rows of a methyl's three hydrogens, first the one that the others follow; None if the root has one."""
    rows = [k for k, row in enumerate(zmatrix.rows) if row.atom in group]
    leaders = [k for k in rows if zmatrix.rows[k].sibling is None]
    if len(rows) < 3 or len(leaders) != 1:
        return None
    first, second, third = (*leaders, *(k for k in rows if k not in leaders))
    return first, second, third


def torsion_domains(
    zmatrix: ZMatrix, reference: Tensor, degree: Sequence[int], fix_chirality: bool, held: set[int], free: set[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Centre and width (n - 3,) of the domain of each row's torsion in rad, and whether it is a circle.

    reference: the torsions, differences for siblings, of the reference structure in [-π, π).
    degree: number of neighbours of each atom.
    held, free: rows that are bounded, or circles, whatever ``fix_chirality`` says.
    """
    centre, width = torch.zeros_like(reference), torch.full_like(reference, 2 * math.pi)
    circular = torch.ones(len(reference), dtype=torch.bool)
    for k, row in enumerate(zmatrix.rows):
        value = float(reference[k])
        if row.sibling is None:
            continue
        if degree[row.a] == 3 and abs(value) > PLANAR:
            centre[k], width[k], circular[k] = math.pi, math.pi, False
        elif degree[row.a] == 4 and (k in held or (fix_chirality and k not in free)):
            half = min(abs(value), math.pi - abs(value)) - MARGIN
            centre[k], width[k], circular[k] = value, 2 * half, False
    return centre, width, circular
