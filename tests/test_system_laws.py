"""Laws that every system keeps: its energy, its coordinate, its temperature, its members."""

import functools
import importlib.util
import math
import pickle

import numpy as np
import pytest
import torch

from boltznce import UserError, load_system
from boltznce.systems.base import ROLES, System

PLANE = ("gaussians8", "gaussians8_unequal", "checkerboard", "two_moons", "gaussians40", "mueller_brown", "double_well")
OPENMM, XTB = ("aldp", {"energy_backend": "openmm"}), ("aldp_xtb", {"n_workers": 1})
MOLECULES = [("aldp", {}), ("hexapeptide", {}), ("AK", {}), ("ACE-PT-NME", {}), OPENMM]
if importlib.util.find_spec("tblite"):
    MOLECULES.append(XTB)
SYSTEMS = [(name, {}) for name in PLANE] + MOLECULES
FAMILY = {"tiny": {"train": ["AG", "GA"], "test": ["AA"]}}


@functools.cache
def load(k):
    return load_system(SYSTEMS[k][0], **SYSTEMS[k][1])


@pytest.fixture(
    params=range(len(SYSTEMS)), ids=[f"{name} {' '.join(map(str, more.values()))}" for name, more in SYSTEMS]
)
def system(request):
    return load(request.param)


@pytest.fixture
def x(system):
    """Some points of not too high energy, float64."""
    generator = torch.Generator().manual_seed(0)
    if system.exact:
        return system.sample(50, generator).double()
    noise = torch.randn(4, system.n_atoms, 3, generator=generator, dtype=torch.float64)
    return system.positions.double() + 0.01 * noise


def iterates(system):
    """Whether energies are solutions of finite precision, on a grid around the solute that does not turn with it."""
    return "xTB" in repr(system)


def test_shapes_and_facts(system, x):
    assert isinstance(system, System)
    assert system.positions.shape == x.shape[1:] == (system.n_atoms, system.dim)
    assert system.positions.dtype == torch.float32
    assert math.isfinite(system.typical_energy())
    assert system.name in repr(system)
    assert f"{system.temperature:g}" in repr(system)
    assert max((atom for bond in system.bonds for atom in bond), default=0) < system.n_atoms
    assert set(system.omegas) <= set(system.dihedrals)
    if system.features is not None:
        assert system.features.shape[0] == system.n_atoms
    signs = system.chirality(system.positions[None])
    assert signs.shape == (1, len(system.stereocentres))
    assert (signs == 1).all()
    assert isinstance(system.chirality(x.numpy()), np.ndarray)
    if system.exact:
        assert system.sample(3).shape == (3, system.n_atoms, system.dim)
    else:
        with pytest.raises(UserError, match="cannot be drawn from exactly"):
            system.sample(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_energy_is_of_each_conformer_alone_in_its_dtype(system, x, dtype):
    given = x.to(dtype)
    energy = system.energy(given)
    assert (energy.dtype, energy.shape) == (dtype, (len(x),))
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(system.energy(given.flip(0)).flip(0), energy, **close)
    torch.testing.assert_close(torch.cat([system.energy(row[None]) for row in given[:3]]), energy[:3], **close)
    torch.testing.assert_close(energy.double(), system.energy(x), rtol=1e-3, atol=1e-3)
    assert system.energy(given[:0]).shape == (0,)
    if system.differentiable:
        given = given.clone().requires_grad_()
        assert torch.autograd.grad(system.energy(given).sum(), given)[0].dtype == dtype


def test_gradients_are_those_of_finite_differences(system, x):
    if not system.differentiable:
        with pytest.raises(UserError, match=f"{system.name} has no gradient"):
            system.require_gradient("method=tabg")
        return
    system.require_gradient("anything")
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(system.energy(x).sum(), x)
    step, bars = 1e-5 * float(x.detach().std()), {"rtol": 1e-5, "atol": 1e-5 if system.exact else 1e-3}
    if iterates(system):
        step, bars = 1e-4, {"rtol": 1e-3, "atol": 1.0}
    for seed in range(2):
        along = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
        slope = (system.energy(x.detach() + step * along) - system.energy(x.detach() - step * along)) / (2 * step)
        torch.testing.assert_close((gradient * along).sum((1, 2)), slope, **bars)


def test_a_molecule_moves_and_turns_freely(system, x):
    if not system.translation_invariant:
        return
    generator = torch.Generator().manual_seed(1)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=x.dtype))
    shift = torch.randn(3, generator=generator, dtype=x.dtype)
    for moved in (x @ rotation, x + shift):
        torch.testing.assert_close(
            system.energy(moved), system.energy(x), rtol=1e-9, atol=0.05 if iterates(system) else 1e-6
        )
    turned = x @ (rotation * torch.linalg.det(rotation))
    name = system.state.coordinate
    torch.testing.assert_close(system.coordinate(turned, name), system.coordinate(x, name))
    assert torch.equal(system.chirality(turned), system.chirality(x))
    torch.testing.assert_close(system.chirality(-x), -system.chirality(x))


def test_the_state_is_told_by_the_coordinate(system, x):
    name, (low, high) = system.state
    values = system.coordinate(x, name)
    np.testing.assert_allclose(system.coordinate(x.numpy(), name), values, atol=1e-12)
    is_angle = system.coordinate_range(name) is None
    turns = 2 * math.pi * torch.tensor([-1.0, 0.0, 1.0]) if is_angle else torch.zeros(1)
    inside = torch.stack([(values + turn > low) & (values + turn < high) for turn in turns]).any(0)
    assert torch.equal(system.state.contains(values), inside)
    np.testing.assert_array_equal(system.state.contains(values.numpy()), inside)
    if is_angle:
        assert ((values > -math.pi) & (values <= math.pi)).all()
    with pytest.raises(UserError, match="choose one of"):
        system.coordinate(x, "nowhere")


def test_energy_scales_with_the_inverse_temperature(system, x):
    temperature = system.temperature
    hot = system.at_temperature(4 * temperature)
    assert (hot.temperature, system.temperature) == (4 * temperature, temperature)
    torch.testing.assert_close(4 * hot.energy(x), system.energy(x))
    if system.translation_invariant:
        assert hot.reference() is None
    for wrong in (0.0, -300.0):
        with pytest.raises(UserError, match="positive"):
            system.at_temperature(wrong)


def test_wrong_shapes_are_refused(system, x):
    for wrong in (x[0], x[:, :, :-1], x[:, :0], x.flatten(1)):
        with pytest.raises(UserError, match=f"{system.n_atoms}, {system.dim}"):
            system.energy(wrong)


def test_it_survives_pickling(system, x):
    again = pickle.loads(pickle.dumps(system))
    torch.testing.assert_close(again.energy(x), system.energy(x))
    assert (again.identity, again.state) == (system.identity, system.state)


def test_a_single_system_is_a_family_of_one(system):
    assert [system.members(role) for role in ROLES] == 3 * [[system]]
    assert system.all_members() == [system]
    assert system.label(system) == ""
    again = system.at_temperature(system.temperature)
    assert system.choose() is system.choose(system) is system.choose(system.name) is system.choose(again) is system
    for other in ("elsewhere", system.at_temperature(2 * system.temperature)):
        with pytest.raises(UserError, match=f"a run of {system.name} alone"):
            system.choose(other)


def test_a_family_is_its_members():
    family = load_system("dipeptides", selection="tiny", selections=FAMILY)
    assert [[member.name for member in family.members(role)] for role in ROLES] == [["AG", "GA"], [], ["AA"]]
    members = family.all_members()
    labels = [family.label(member) for member in members]
    assert labels == ["AG", "GA", "AA"]
    for label, member in zip(labels, members, strict=True):
        assert family.choose(label) is family.choose(member) is family.choose(load_system(label)) is member
        assert (member.temperature, member.state) == (family.temperature, family.state)
        assert member.features.shape[1] == family.n_features
    assert family.choose("GG").name == "GG"  # listed or not
    assert repr(family) == (
        "PeptideFamily(dipeptides, tiny: 2 train, 1 test peptides, 310 K, amber14-all.xml + implicit/obc1.xml)"
    )
    with pytest.raises(UserError, match="say which one is meant, for example system=AA"):
        family.choose()
    with pytest.raises(UserError, match="another force field or temperature"):
        family.choose(load_system("AG", temperature=300.0))
