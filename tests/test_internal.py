"""Internal coordinates against autograd of the full Cartesian map, and their domains against the molecule's hands."""

import functools
import itertools
import math

import pytest
import torch

import boltznce as bz
from boltznce.errors import UserError
from boltznce.flows.internal import InternalCoordinates, dihedral
from boltznce.flows.zmatrix import build_zmatrix
from boltznce.systems.stiffness import harmonic_constants

WATER = torch.tensor([[0.0, 0.06, 0.0], [0.0, 0.0, 0.0], [0.09, -0.02, 0.0]])
MOLECULES = ["water", "aldp", "ACE-AAA-NME", "ACE-F-NME", "ACE-P-NME", "AK", "ACE-IT-NME"]


@functools.cache
def load(name):
    system = bz.load_system(name)
    return system, harmonic_constants(system.openmm_system()), system.positions


def main_chain(system):
    return {atom for atoms in system.dihedrals.values() for atom in atoms}


def coordinates_of(name, **settings):
    if name == "water":
        return InternalCoordinates(WATER, [(0, 1), (1, 2)])
    system, (bonds, angles), _ = load(name)
    return InternalCoordinates(
        system.positions,
        system.bonds,
        core=main_chain(system),
        bond_constants=bonds,
        angle_constants=angles,
        stereocentres=system.stereocentres,
        methyl_groups=system.methyl_groups,
        **settings,
    )


def points(coordinates, n, seed=0, spread=0.15):
    """Points (n, d) of the cube, float64, bounded coordinates around the middle, all of them inside."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.rand(n, coordinates.dimension, generator=generator, dtype=torch.float64)
    near = 0.5 + spread * torch.randn(y.shape, generator=generator, dtype=torch.float64)
    return torch.where(coordinates.circular, y, near.clamp(0.01, 0.99))


def distances(x):
    return (x.unsqueeze(-2) - x.unsqueeze(-3)).norm(dim=-1)


def on_circle(difference):
    return difference - difference.round()


@pytest.mark.parametrize("name", MOLECULES)
def test_round_trip(name):
    coordinates = coordinates_of(name)
    y = points(coordinates, 32)
    x, log_det = coordinates.to_positions(y)
    again, log_back = coordinates.to_unit(x)
    assert on_circle(again - y).abs().max() < 1e-11
    torch.testing.assert_close(log_back, -log_det, atol=1e-9, rtol=0)
    x_again, _ = coordinates.to_positions(again)
    torch.testing.assert_close(x_again, x, atol=1e-11, rtol=0)


@pytest.mark.parametrize("name", MOLECULES)
def test_reference_is_the_centre_and_rigid_motion_leaves_no_trace(name):
    coordinates = coordinates_of(name)
    x = (WATER if name == "water" else load(name)[0].positions).double()
    y, log_det = coordinates.to_unit(x[None])
    bounded = ~coordinates.circular
    planar = coordinates.width == math.pi  # whose domain is centred on the plane, not on the reference
    torch.testing.assert_close(
        y[0, bounded & ~planar], torch.full_like(y[0, bounded & ~planar], 0.5), atol=1e-7, rtol=0
    )
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    turn = turn * torch.linalg.det(turn)
    moved, log_moved = coordinates.to_unit((x @ turn.T + 1.3)[None])
    assert on_circle(moved - y).abs().max() < 1e-10
    torch.testing.assert_close(log_moved, log_det)
    rebuilt, _ = coordinates.to_positions(y)
    torch.testing.assert_close(distances(rebuilt[0]), distances(x), atol=1e-11, rtol=0)


def euler(angles):
    """Rz(α) Ry(β) Rz(γ); Haar measure sin β."""

    def turn(angle, axis):
        c, s, one, zero = angle.cos(), angle.sin(), torch.ones_like(angle), torch.zeros_like(angle)
        rows = [c, -s, zero, s, c, zero, zero, zero, one] if axis == "z" else [c, zero, s, zero, one, zero, -s, zero, c]
        return torch.stack(rows).view(3, 3)

    return turn(angles[0], "z") @ turn(angles[1], "y") @ turn(angles[2], "z")


@pytest.mark.parametrize("name", ["water", "aldp", "ACE-AAA-NME", "ACE-F-NME", "ACE-P-NME"])
def test_log_det_is_that_of_the_full_map_without_the_haar_factor(name):
    """All 3N coordinates: internals, three translations of the first atom, three Euler angles."""
    coordinates = coordinates_of(name)
    d = coordinates.dimension
    for y in points(coordinates, 1, seed=3):

        def full(z):
            x, _ = coordinates.to_positions(z[None, :d])
            return ((x[0] - x[0, coordinates.zmatrix.root[0]]) @ euler(z[d + 3 :]).T + z[d : d + 3]).flatten()

        angles = torch.tensor([0.4, 1.1, -2.0], dtype=torch.float64)
        z = torch.cat([y, torch.tensor([0.3, -0.1, 0.2], dtype=torch.float64), angles])
        jacobian = torch.autograd.functional.jacobian(full, z)
        expected = torch.linalg.slogdet(jacobian).logabsdet - math.log(math.sin(1.1))
        torch.testing.assert_close(coordinates.to_positions(y[None])[1][0], expected, atol=1e-8, rtol=0)


def test_log_det_is_the_formula():
    coordinates = coordinates_of("aldp")
    y = points(coordinates, 4)
    q = (y - 0.5) * coordinates.width + coordinates.centre
    bond, angle = q[:, coordinates.groups["bonds"]], q[:, coordinates.groups["angles"]]
    formula = (bond**2).prod(1) * angle.sin().prod(1) * coordinates.width.prod()
    torch.testing.assert_close(coordinates.to_positions(y)[1], formula.log())


@pytest.mark.parametrize("name", ["aldp", "ACE-AAA-NME", "AK", "ACE-IT-NME"])
def test_torsions_that_matter_are_coordinates_of_their_own(name):
    system, coordinates = load(name)[0], coordinates_of(name)
    of_atoms = {(row.atom, row.a, row.b, row.c): row.sibling for row in coordinates.zmatrix.rows}
    for atoms in system.dihedrals.values():
        assert of_atoms.get(tuple(reversed(atoms)), "missing") is None
    x = coordinates.to_positions(points(coordinates, 3))[0]
    for atoms in system.dihedrals.values():
        torch.testing.assert_close(dihedral(*(x[:, k] for k in atoms)), dihedral(*(x[:, k] for k in reversed(atoms))))


@pytest.mark.parametrize("name", ["aldp", "ACE-AAA-NME", "AK", "ACE-P-NME", "ACE-IT-NME", "ACE-TW-NME"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_point_of_the_cube_has_the_right_chirality(name, dtype):
    system, coordinates = load(name)[0], coordinates_of(name)
    y = torch.rand(512, coordinates.dimension, generator=torch.Generator().manual_seed(5)).to(dtype)
    y[:100] = y[:100].round()  # corners too
    x, _ = coordinates.to_positions(y)
    assert (system.chirality(x) == 1).all()


def test_without_fixed_chirality_both_hands_are_made():
    system, coordinates = load("aldp")[0], coordinates_of("aldp", fix_chirality=False, fix_methyls=False)
    x, _ = coordinates.to_positions(torch.rand(400, coordinates.dimension, generator=torch.Generator().manual_seed(5)))
    assert 0.4 < (system.chirality(x) > 0).float().mean() < 0.6
    mirrored, _ = coordinates.to_unit(-system.positions[None])
    bounded = ~coordinates.circular
    assert ((mirrored >= 0) & (mirrored <= 1))[:, bounded].all()
    fixed = coordinates_of("aldp")
    mirrored, _ = fixed.to_unit(-system.positions[None])
    assert not ((mirrored >= 0) & (mirrored <= 1)).all()  # outside the domain


def test_methyl_domain_holds_one_of_the_six_labellings():
    """Of all labellings of a methyl's hydrogens one is in the domain, and `canonical` finds it."""
    system, coordinates = load("aldp")[0], coordinates_of("aldp")
    x, _ = coordinates.to_positions(points(coordinates, 200, spread=0.08))
    y, _ = coordinates.to_unit(x)
    for group in system.methyl_groups:
        inside = []
        for permutation in itertools.permutations(group):
            relabelled = x.clone()
            relabelled[:, list(group)] = x[:, list(permutation)]
            same = (coordinates.canonical(relabelled) == x).flatten(1).all(1)
            assert same.all(), "canonical undoes every relabelling"
            # what a point's raw torsions say, without `canonical`
            rows = next(
                k for k in coordinates.methyls.tolist() if {coordinates.zmatrix.rows[i].atom for i in k} == set(group)
            )
            q = coordinates._coordinates(coordinates._measure(relabelled)[2])
            start = 2 * system.n_atoms - 3
            place = (q - coordinates.centre[start:]) / coordinates.width[start:]
            mean = (q[:, rows[0]] - coordinates.centre[start + rows[0]] + math.pi).remainder(2 * math.pi) - math.pi
            inside.append((mean.abs() < math.pi / 3) & (place[:, list(rows[1:])].abs() < 0.5).all(1))
        assert (torch.stack(inside).sum(0) == 1).all()
    torch.testing.assert_close(coordinates.to_positions(y)[0], x, atol=1e-10, rtol=0)


def test_canonical_changes_no_energy_and_leaves_other_atoms_alone():
    system, coordinates = load("aldp")[0], coordinates_of("aldp")
    x = system.positions.double()[None] + 0.005 * torch.randn(
        50, 22, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    group = list(system.methyl_groups[1])
    x[:, group] = x[:, group[1:] + group[:1]]
    new = coordinates.canonical(x)
    assert (new != x).any()
    torch.testing.assert_close(system.energy(new), system.energy(x))
    hydrogens = {atom for group in system.methyl_groups for atom in group}
    rest = [atom for atom in range(22) if atom not in hydrogens]
    assert (new[:, rest] == x[:, rest]).all()
    assert ((coordinates.to_unit(x)[0] - coordinates.to_unit(new)[0]).abs() < 1e-12).all()


def test_hot_molecular_dynamics_stays_in_the_domain():
    """Langevin dynamics at 1200 K: no bounded coordinate leaves [0, 1], and their spread is near the prior's."""
    import openmm
    from openmm import unit

    system, coordinates = load("aldp")[0], coordinates_of("aldp")
    integrator = openmm.LangevinMiddleIntegrator(1200, 10, 0.0005)
    integrator.setRandomNumberSeed(1)
    context = openmm.Context(system.openmm_system(), integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(system.positions.double().numpy())
    frames = []
    for _ in range(200):
        integrator.step(100)
        frames.append(
            torch.from_numpy(context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer))
        )
    y, _ = coordinates.to_unit(torch.stack(frames[20:]))
    bounded = y[:, ~coordinates.circular]
    assert ((bounded > 0) & (bounded < 1)).all()
    assert 0.05 < bounded.std(0).median() < 0.12
    assert bounded.std(0).max() < 0.25


def test_gradients_are_finite_in_float32():
    system, coordinates = load("ACE-AAA-NME")[0], coordinates_of("ACE-AAA-NME")
    y = torch.rand(64, coordinates.dimension, generator=torch.Generator().manual_seed(0), requires_grad=True)
    x, log_det = coordinates.to_positions(y)
    assert x.dtype == torch.float32
    (x.square().sum() + log_det.sum()).backward()
    assert y.grad.isfinite().all()
    x = system.positions[None].clone().requires_grad_()
    y, log_det = coordinates.to_unit(x)
    (y.sum() + log_det.sum()).backward()
    assert x.grad.isfinite().all()
    again = coordinates.to_positions(y.detach())[0]
    torch.testing.assert_close(distances(again), distances(x), atol=2e-6, rtol=0)


def test_zmatrix_of_any_graph():
    ring = build_zmatrix(7, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0), (0, 6)])
    assert len(ring.rows) == 4
    placed = set(ring.root)
    for level in ring.levels:
        assert all({ring.rows[k].a, ring.rows[k].b, ring.rows[k].c} <= placed for k in level)
        placed |= {ring.rows[k].atom for k in level}
    assert placed == set(range(7))
    with pytest.raises(UserError, match="not bonded to the rest"):
        build_zmatrix(5, [(0, 1), (1, 2), (3, 4)])
    with pytest.raises(UserError, match="three atoms"):
        build_zmatrix(2, [(0, 1)])
    line = torch.tensor([[0.0, 0, 0], [0.1, 0, 0], [0.2, 0, 0], [0.2, 0.1, 0]])
    with pytest.raises(UserError, match="on a line"):
        InternalCoordinates(line, [(0, 1), (1, 2), (2, 3)])
