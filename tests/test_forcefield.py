"""The torch energy against OpenMM's Reference platform, and its behaviour where OpenMM's is no guide."""

import openmm
import pytest
import torch

from boltznce import UserError, load_system
from boltznce.systems.forcefield import TorchForceField
from boltznce.systems.openmm_energy import OpenMMEnergy


@pytest.fixture(scope="module", params=["aldp", "aldp_amber96"])
def system(request):
    return load_system(request.param)


@pytest.fixture(scope="module")
def thermal(system):
    """32 conformers of hot dynamics, (32, 22, 3), float64."""
    integrator = openmm.LangevinMiddleIntegrator(500, 10, 0.001)
    integrator.setRandomNumberSeed(1)
    context = openmm.Context(system.openmm_system(), integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(system.positions.double().numpy())
    frames = []
    for _ in range(32):
        integrator.step(200)
        frames.append(torch.from_numpy(context.getState(positions=True).getPositions(asNumpy=True)._value))
    return torch.stack(frames)


def distorted(x, size, seed=0):
    return x + size * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


def energy_and_force(energy, x):
    x = x.detach().requires_grad_()
    values = energy(x)
    return values.detach(), -torch.autograd.grad(values.sum(), x)[0]


def relative(forces, expected):
    return ((forces.double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max()


@pytest.mark.parametrize("size", [0.0, 0.01, 0.03, 0.1])
def test_double_precision_equals_openmm(system, thermal, size):
    x = distorted(thermal, size)
    expected, forces = OpenMMEnergy(system.openmm_system()).evaluate(x)
    energy, force = energy_and_force(TorchForceField(system.openmm_system()), x)
    assert ((energy - expected).abs() <= 1e-3 + 1e-12 * expected.abs()).all()
    assert relative(force, forces) < 1e-5


def test_single_precision_equals_openmm(system, thermal):
    expected, forces = OpenMMEnergy(system.openmm_system()).evaluate(thermal)
    energy, force = energy_and_force(TorchForceField(system.openmm_system()), thermal.float())
    assert energy.dtype == force.dtype == torch.float32
    assert (energy - expected).abs().max() < 1e-2
    assert relative(force, forces) < 1e-3


def test_each_force_alone_equals_openmm(system, thermal):
    whole = system.openmm_system()
    for kept in range(whole.getNumForces()):
        part = system.openmm_system()
        for n in reversed(range(part.getNumForces())):
            if n != kept:
                part.removeForce(n)
        expected, _ = OpenMMEnergy(part).evaluate(thermal)
        torch.testing.assert_close(TorchForceField(part)(thermal), expected, rtol=1e-9, atol=1e-6)


def test_derivatives_are_those_of_the_energy(system, thermal):
    field = TorchForceField(system.openmm_system())
    x = distorted(thermal[:1], 0.03).requires_grad_()
    assert torch.autograd.gradcheck(field, x, eps=1e-7, rtol=1e-4, atol=1e-1)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)

    def gradient(step):
        y = (x.detach() + step * direction).requires_grad_()
        return torch.autograd.grad(field(y).sum(), y, create_graph=True)[0]

    (slope,) = torch.autograd.grad(field(x).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad((slope * direction).sum(), x)
    torch.testing.assert_close(curvature, (gradient(1e-6) - gradient(-1e-6)) / 2e-6, rtol=1e-4, atol=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_overlapping_atoms_give_a_large_finite_energy(system, dtype):
    field = TorchForceField(system.openmm_system())
    one = system.positions.to(dtype)
    pair, near, all_at_once = one.clone(), one.clone(), torch.zeros_like(one)
    pair[20] = pair[0]
    near[20] = near[0] + 1e-4
    line = torch.arange(22, dtype=dtype)[:, None] * torch.tensor([0.1, 0.0, 0.0], dtype=dtype)
    energy, force = energy_and_force(field, torch.stack((pair, near, all_at_once, line)))
    assert energy.isfinite().all()
    assert force.isfinite().all()
    assert (energy[:3] > 1e8).all()


def test_pieces_of_a_batch_give_what_the_whole_gives(system, thermal):
    whole, pieces = TorchForceField(system.openmm_system()), TorchForceField(system.openmm_system(), chunk_size=5)
    for result, expected in zip(energy_and_force(pieces, thermal), energy_and_force(whole, thermal), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-8)
    torch.testing.assert_close(pieces(thermal), whole(thermal), rtol=1e-10, atol=1e-8)
    assert whole(thermal[:0]).shape == (0,)


def test_unknown_force_is_named_and_openmm_offered():
    system = load_system("aldp").openmm_system()
    system.addForce(openmm.CustomExternalForce("x"))
    with pytest.raises(UserError, match=r"CustomExternalForce.*energy_backend=openmm"):
        TorchForceField(system)


def test_cutoff_is_refused_by_torch_and_computed_by_openmm():
    settings = {"nonbonded_method": "CutoffNonPeriodic", "cutoff_nm": 2.0}
    with pytest.raises(UserError, match=r"cutoff.*energy_backend=openmm"):
        load_system("aldp", **settings)
    system = load_system("aldp", **settings, energy_backend="openmm")
    assert system.energy(system.positions[None]).isfinite().all()
