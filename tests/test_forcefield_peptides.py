"""The torch energy against OpenMM: what the field's papers simulate, and dipeptides of all 20 residues."""

import openmm
import pytest
import torch
from openmm_reference import absolute_terms, energy_and_force, reference, relative, wild

from boltznce import load_system
from boltznce.systems.forcefield import TorchForceField

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
DIPEPTIDES = [a + RESIDUES[(n + step) % len(RESIDUES)] for step in (1, 7) for n, a in enumerate(RESIDUES)]
UNCUT = {"nonbonded_method": "NoCutoff", "cutoff_nm": None}
MOLECULES = [("aldp", {}), ("aldp_amber96", {}), ("tetrapeptide", {}), ("hexapeptide", {})]
MOLECULES += [(name, settings) for name in DIPEPTIDES for settings in ({}, UNCUT)]
N_CONFORMERS = 100


def hot_frames(system, n):
    """Frames of dynamics at 400 K, (n, n_atoms, 3), float32; in vacuum, which is fast."""
    vacuum = system.openmm_system()
    for number in reversed(range(vacuum.getNumForces())):
        if "GB" in type(vacuum.getForce(number)).__name__:
            vacuum.removeForce(number)
    integrator = openmm.LangevinMiddleIntegrator(400, 10, 0.001)
    integrator.setRandomNumberSeed(1)
    context = openmm.Context(vacuum, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(system.positions.double().numpy())
    frames = []
    for _ in range(n):
        integrator.step(30)
        frames.append(torch.from_numpy(context.getState(positions=True).getPositions(asNumpy=True)._value))
    return torch.stack(frames).float()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "settings"), MOLECULES, ids=[f"{name}{', no cutoff' if s else ''}" for name, s in MOLECULES]
)
def test_energies_and_forces_equal_openmm(name, settings):
    system = load_system(name, **settings)
    target = system.openmm_system()
    field = TorchForceField(target)
    thermal = hot_frames(system, N_CONFORMERS)
    energies, forces = reference(target, thermal)
    strained = wild(thermal.double()).float()
    wild_energies, wild_forces = reference(target, strained)
    scale = absolute_terms(target, strained)
    for dtype, thermal_bar, wild_bar, force_bar in (
        (torch.float64, 1e-3, 1e-9, 1e-5),
        (torch.float32, 1e-2, 1e-5, 1e-3),
    ):
        energy, force = energy_and_force(field, thermal.to(dtype))
        assert (energy - energies).abs().max() < thermal_bar
        assert relative(force, forces) < force_bar
        energy, force = energy_and_force(field, strained.to(dtype))
        assert ((energy - wild_energies).abs() / scale).max() < wild_bar
        assert relative(force, wild_forces) < force_bar
