"""Walkers of both engines: OpenMM's own steps, exact distributions, conserved energy, fair exchange."""

import dataclasses
import math

import numpy as np
import openmm
import pytest
import torch
from scipy import stats

from boltznce.config import load_system
from boltznce.data.engine import Job, dihedral_angle, read_frames, run_job, wrap
from boltznce.data.jobs import choose_engine
from boltznce.data.replica_exchange import ReplicaExchangeSampler
from boltznce.data.torch_walkers import TorchWalkers
from boltznce.data.umbrella import UmbrellaSampler, bias_energies, window_centres
from boltznce.data.walkers import ENGINES, OpenMMWalkers, Restraints, make_walkers
from boltznce.errors import UserError
from boltznce.units import GAS_CONSTANT

JOB = Job(
    method="langevin",
    temperature=300.0,
    seed=3,
    repeat=0,
    duration=1.0,
    frame_interval=0.1,
    segment_length=0.5,
    equilibration=0.2,
    timestep=0.002,
    friction=1.0,
    hydrogen_mass=4.0,
    platform="auto",
)
PHI = (4, 6, 8, 14)


@pytest.fixture(scope="module")
def aldp():
    return load_system("aldp")


@pytest.fixture(scope="module")
def thermal(aldp):
    """Positions and velocities (4, 22, 3) after 1 ps at 300 K."""
    walkers = OpenMMWalkers(JOB, aldp.openmm_system(), np.full(4, 300.0))
    rng = np.random.default_rng(0)
    walkers.reseed(rng)
    start = [walkers.prepare(k, aldp.positions.double().numpy(), rng, 1.0) for k in range(4)]
    return tuple(np.stack(arrays) for arrays in zip(*start, strict=True))


@pytest.mark.parametrize(("friction", "temperature"), [(0.0, 300.0), (20.0, 0.0)])
def test_steps_without_noise_are_openmms(aldp, thermal, friction, temperature):
    """Without friction, and with friction at 0 K: masses, order of the steps, damping, forces and bias."""
    job = dataclasses.replace(JOB, friction=friction)
    bias = Restraints(PHI, 60.0, np.array([-2.0, -1.0, 1.0, 3.1]))
    ends = []
    for engine in (OpenMMWalkers, TorchWalkers):
        more = {"dtype": torch.float64} if engine is TorchWalkers else {}
        walkers = engine(job, aldp.openmm_system(), np.full(4, temperature), bias, **more)
        x, v = (array.copy() for array in thermal)
        ends.append((walkers.run(x, v, 0.1), x, v))
    for torchs, openmms in zip(*reversed(ends), strict=True):
        np.testing.assert_allclose(torchs, openmms, rtol=0, atol=1e-6)
    np.testing.assert_allclose(ends[1][1].mean(1), 0, atol=1e-9)


def test_bias_is_that_of_the_analysis_and_its_gradient_the_slope(aldp, thermal):
    """Also where the shorter way from the centre leads across ±π."""
    centres = np.array([3.1, -3.1, 0.0, 1.5])
    restraints = Restraints(PHI, 60.0, centres)
    walkers = TorchWalkers(JOB, aldp.openmm_system(), np.full(4, 300.0), restraints, dtype=torch.float64)
    free = TorchWalkers(JOB, aldp.openmm_system(), np.full(4, 300.0), dtype=torch.float64)
    x = torch.from_numpy(thermal[0])

    def energy(x):
        return restraints.potential(x, *restraints.parameters)

    expected = 30.0 * wrap(dihedral_angle(thermal[0], PHI) - centres) ** 2
    np.testing.assert_allclose(energy(x), expected, rtol=1e-9)
    assert np.abs(dihedral_angle(thermal[0], PHI) - centres).max() > np.pi
    slope = walkers.gradient(x, *restraints.parameters) - free.gradient(x)
    for atom, axis in [(4, 0), (6, 1), (8, 2), (14, 0), (14, 1), (0, 0)]:
        step = torch.zeros_like(x)
        step[:, atom, axis] = 1e-6
        difference = (energy(x + step) - energy(x - step)) / 2e-6
        torch.testing.assert_close(slope[:, atom, axis], difference, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_steps_recorded_on_a_gpu_are_the_steps(aldp, thermal):
    """Without noise the same positions as step by step; with it other numbers at each replay."""
    still, shaken = (
        TorchWalkers(dataclasses.replace(JOB, friction=friction), aldp.openmm_system(), np.full(4, 300.0))
        for friction in (0.0, 1.0)
    )
    x, v = (still.tensor(array) for array in thermal)
    recorded = still.move(x, v, 0.2)[0]
    with torch.no_grad():
        one_by_one = still._steps(100, x, v)[0]
    torch.testing.assert_close(recorded, one_by_one - one_by_one.mean(1, keepdim=True), rtol=0, atol=1e-3)
    assert (shaken.move(x, v, 0.2)[0] != shaken.move(x, v, 0.2)[0]).any()


SPRINGS = 1000.0, 300.0  # kJ/mol/nm²


def chain():
    """Three atoms on two springs of no length, whose Boltzmann distribution is Gaussian."""
    system, springs = openmm.System(), openmm.HarmonicBondForce()
    for mass in (3.0, 5.0, 7.0):
        system.addParticle(mass)
    for atom, stiffness in enumerate(SPRINGS):
        springs.addBond(atom, atom + 1, 0.0, stiffness)
    system.addForce(springs)
    return system


def z_scores(values, expected):
    """(mean over independent walkers - expected) / standard error; values (n_walkers, ...)."""
    return (values.mean(0) - expected) / (values.std(0) / np.sqrt(len(values)))


@pytest.mark.parametrize("engine", ENGINES)
def test_harmonic_molecule_has_its_exact_distribution_at_any_timestep(engine):
    """The middle scheme is exact for a harmonic potential (ω dt = 0.9), velocities half a step before."""
    n = 100
    temperatures = np.repeat([150.0, 300.0, 600.0], n)
    job = dataclasses.replace(JOB, timestep=0.04, friction=5.0, engine=engine)
    walkers = make_walkers(job, chain(), temperatures)
    rng = np.random.default_rng(5)
    walkers.reseed(rng)
    x = 0.03 * rng.standard_normal((3 * n, 3, 3))
    v = np.zeros_like(x)
    walkers.run(x, v, 4.0)
    springs, kinetic, energies = [], [], []
    for _ in range(40):
        energies.append(walkers.run(x, v, 0.4))
        springs.append((np.diff(x, axis=1) ** 2).sum(-1) * SPRINGS)
        kinetic.append((v**2).sum(-1) * [3.0, 5.0, 7.0])
    np.testing.assert_allclose(energies[-1] * job.kT, 0.5 * springs[-1].sum(-1), rtol=1e-5)
    for samples in (springs, kinetic):  # each is 3 kT on average
        per_walker = np.mean(samples, axis=0) / (3 * GAS_CONSTANT * temperatures)[:, None]
        assert np.abs(z_scores(per_walker.reshape(3, n, -1).swapaxes(0, 1), 1.0)).max() < 4
        assert np.abs(per_walker.mean() - 1) < 0.02


def total_energy(walkers, masses, x, v):
    """(K,) in kJ/mol, with velocities moved on by half a step to where the positions are; in float64."""
    x, v = torch.from_numpy(x), torch.from_numpy(v)
    energy, gradient = walkers.field.energy_and_gradient(x)
    v = v - walkers.half_step * gradient / masses
    return (energy + 0.5 * (masses * v.square()).sum((1, 2))).numpy()


def conserved(aldp, thermal, timestep, dtype, duration=0.1, interval=0.01):
    """Total energies (n, K) along a run without friction, from the same positions and velocities for every timestep."""
    job = dataclasses.replace(JOB, timestep=timestep, friction=0.0, compile=duration > 1)
    walkers = TorchWalkers(job, aldp.openmm_system(), np.full(4, 300.0), dtype=dtype)
    masses = job.timestep / walkers.kick.double()
    x, v = (array.copy() for array in thermal)
    v += walkers.half_step * (walkers.field.energy_and_gradient(torch.from_numpy(x))[1] / masses).numpy()
    energies = [total_energy(walkers, masses, x, v)]
    for _ in range(round(duration / interval)):
        walkers.run(x, v, interval)
        energies.append(total_energy(walkers, masses, x, v))
    return np.array(energies)


def rms(values):
    return float(np.sqrt(np.mean(values**2)))


def test_energy_is_conserved_to_second_order_and_float32_suffices(aldp, thermal):
    errors = {}
    for timestep in (0.002, 0.001, 0.0005):
        energies = conserved(aldp, thermal, timestep, torch.float64)
        errors[timestep] = rms(energies - energies[0])
    assert errors[0.002] / errors[0.001] == pytest.approx(4, rel=0.15)
    assert errors[0.001] / errors[0.0005] == pytest.approx(4, rel=0.15)
    rounded = conserved(aldp, thermal, 0.0005, torch.float32)
    assert rms(rounded - rounded[0] - (energies - energies[0])) < 1e-3  # kJ/mol; the error of 2 fs is 0.7


@pytest.mark.slow
def test_float32_does_not_heat(aldp, thermal):
    """10 ps without friction: no drift beside the 80 kJ/mol/ps that a friction of 1/ps exchanges with the bath."""
    energies = conserved(aldp, thermal, 0.001, torch.float32, duration=10.0, interval=0.1)
    drift = np.polyfit(0.1 * np.arange(len(energies)), energies, 1)[0]
    assert np.abs(drift).max() < 0.05


def energy_moments(aldp, engine, duration, n=12, seed=0):
    """Mean and variance (2 n, 2) of the energy of n walkers at 300 K and n at 600 K, and their φ (frames, 2 n)."""
    job = dataclasses.replace(JOB, engine=engine, compile=duration > 10)
    temperatures = np.repeat([300.0, 600.0], n)
    walkers = make_walkers(job, aldp.openmm_system(), temperatures)
    rng = np.random.default_rng(seed)
    walkers.reseed(rng)
    start = [walkers.prepare(k, aldp.positions.double().numpy(), rng, 1.0) for k in range(2 * n)]
    x, v = (np.stack(arrays) for arrays in zip(*start, strict=True))
    energies = np.array([walkers.run(x, v, 0.05) for _ in range(round(duration / 0.05))])
    return np.stack((energies.mean(0), energies.var(0)), axis=1)


def assert_equal_moments(aldp, duration):
    torchs, openmms = (energy_moments(aldp, engine, duration).reshape(2, -1, 2) for engine in ("torch", "openmm"))
    error = np.sqrt((torchs.var(1) + openmms.var(1)) / (torchs.shape[1] - 1))
    z = (torchs.mean(1) - openmms.mean(1)) / error
    print(
        f"{duration} ps: mean and variance (300, 600 K; kT, kT²): {torchs.mean(1)} {openmms.mean(1)} ± {error}, z {z}"
    )
    assert np.abs(z).max() < 4
    heat = np.diff(openmms.mean(1)[:, 0])[0]
    assert error[:, 0].max() < 0.15 * heat


def test_energies_of_alanine_dipeptide_are_those_of_openmm(aldp):
    assert_equal_moments(aldp, 1.5)


@pytest.mark.slow
def test_energies_of_alanine_dipeptide_are_those_of_openmm_long(aldp):
    assert_equal_moments(aldp, 60.0)


def window_angles(aldp, folder, engine, duration, seed):
    """Dihedrals (frames, windows) of umbrella sampling with exchange."""
    options = {"n_windows": 24, "kappa": 60.0, "exchange_interval": 0.5}
    job = dataclasses.replace(
        JOB,
        method="umbrella",
        duration=duration,
        frame_interval=0.5,
        segment_length=10.0,
        equilibration=10.0,
        seed=seed,
        options=options,
    )
    job = dataclasses.replace(job, engine=engine, compile=True, dihedral=PHI)
    job.save(folder, aldp.openmm_system(), aldp.positions.double().numpy())
    run_job(folder)
    return read_frames(folder)["dihedral"].reshape(-1, 24)


@pytest.mark.slow
def test_windows_of_alanine_dipeptide_are_those_of_openmm(aldp, tmp_path):
    """Mean and variance of φ about the centre in each of 24 windows, errors from 20 blocks of time."""
    moments = []
    for engine in ENGINES:
        d = wrap(window_angles(aldp, tmp_path / engine, engine, 100.0, seed=1) - window_centres(24))
        blocks = d.reshape(20, -1, 24)
        moments.append(np.stack((blocks.mean(1), blocks.var(1)), axis=-1))
    error = np.sqrt(sum(m.var(0) for m in moments) / 19)
    z = (moments[0].mean(0) - moments[1].mean(0)) / error
    print(f"z of means and variances: rms {np.sqrt((z**2).mean(0))}, largest {np.abs(z).max(0)}")
    assert np.sqrt((z**2).mean()) < 1.5
    assert np.abs(z).max() < 5


class Drawn:
    """Walkers drawn anew from their distributions at each run, so that exchange is all that can go wrong."""

    def __init__(self, draw):
        self.draw = draw

    def run(self, positions, velocities, duration):
        positions[:], velocities[:], energies = self.draw()
        self.last = positions.copy()
        return energies


def exchanges(sampler, n_blocks, seed):
    """Positions and velocities (n_blocks, K, n_atoms, 3) after each block; whether each was exchanged (n_blocks, K)."""
    rng = np.random.default_rng(seed)
    positions, velocities = np.empty((2, *sampler.shape))
    after, speeds, moved = [], [], []
    for block in range(n_blocks):
        sampler._block(positions, velocities, block, rng, lambda ps: None)
        after.append(positions.copy())
        speeds.append(velocities.copy())
        moved.append((positions != sampler.walkers.last).any((1, 2)))
    return np.array(after), np.array(speeds), np.array(moved)


def test_replica_exchange_keeps_every_temperature():
    """Energies of a harmonic chain are Gamma distributed: acceptance by quadrature, distributions unchanged."""
    options = {"n_replicas": 3, "max_temperature": 900.0, "exchange_interval": 0.1}
    job = dataclasses.replace(JOB, method="replica_exchange", options=options)
    sampler = ReplicaExchangeSampler(job, chain(), np.zeros((3, 3)))
    temperatures = sampler.temperatures
    draws = np.random.default_rng(1)

    def draw():
        x = draws.standard_normal((3, 3, 3)) * np.sqrt(temperatures / 300.0)[:, None, None]
        v = draws.standard_normal((3, 3, 3)) * np.sqrt(temperatures)[:, None, None]
        return x, v, 0.5 * (x**2).sum((1, 2))

    sampler.walkers, sampler.shape = Drawn(draw), (3, 3, 3)
    n = 10_000
    x, v, moved = exchanges(sampler, n, seed=2)
    for low in (0, 1):
        pair = temperatures[low : low + 2] / 300.0
        gap = 1 / pair[0] - 1 / pair[1]
        grid = np.linspace(0.0, 100.0, 2001)
        cold, hot = (stats.gamma(4.5, scale=t).pdf(grid) * grid[1] for t in pair)
        expected = cold @ np.minimum(1, np.exp(gap * (grid[:, None] - grid))) @ hot
        tried = moved[low::2]
        assert tried[:, low].mean() == pytest.approx(expected, abs=4 * np.sqrt(0.25 / len(tried)))
        assert not tried[:, 2 - 2 * low].any()  # at the end of the ladder, without a neighbour
    for sample in (x / np.sqrt(temperatures / 300.0)[:, None, None], v / np.sqrt(temperatures)[:, None, None]):
        squares = (sample**2).sum((2, 3))  # 9 on average, variance 18
        assert np.abs((squares.mean(0) - 9) / np.sqrt(18 / n)).max() < 4
        assert np.abs(squares.var(0) / 18 - 1).max() < 0.1


def test_umbrella_exchange_keeps_every_window():
    """Without a potential windows are Gaussian: acceptance erfc(δ √(κ/kT) / 2), distributions unchanged."""
    n_windows, kappa, n = 12, 20.0, 5_000
    job = dataclasses.replace(
        JOB,
        method="umbrella",
        dihedral=(0, 1, 2, 3),
        options={"n_windows": n_windows, "kappa": kappa, "exchange_interval": 0.1},
    )
    system = openmm.System()
    for _ in range(4):
        system.addParticle(12.0)
    shape = np.array([[1.0, 0, 0], [0, 0, 0], [0, 0, 1], [1, 0, 1]])
    sampler = UmbrellaSampler(job, system, shape)
    draws, centres = np.random.default_rng(3), window_centres(n_windows)
    spread = np.sqrt(job.kT / kappa)

    def draw():
        angles = centres + spread * draws.standard_normal(n_windows)
        x = np.tile(shape, (n_windows, 1, 1))
        x[:, 3, 0], x[:, 3, 1] = np.cos(angles), np.sin(angles)
        return x, np.zeros_like(x), bias_energies(angles, n_windows, kappa, job.kT)[0]

    sampler.walkers, sampler.shape = Drawn(draw), (n_windows, 4, 3)
    x, _, moved = exchanges(sampler, n, seed=4)
    expected = math.erfc(2 * np.pi / n_windows * np.sqrt(kappa / job.kT) / 2)
    assert np.abs(moved.mean(0) - expected).max() < 4 * np.sqrt(0.25 / n)
    d = wrap(dihedral_angle(x, job.dihedral) - centres) / spread
    assert np.abs(d.mean(0)).max() < 4 / np.sqrt(n)
    assert np.abs(d.var(0) - 1).max() < 4 * np.sqrt(2 / n)


def test_a_bond_that_explodes_is_told(aldp, tmp_path):
    job = dataclasses.replace(JOB, timestep=0.025, hydrogen_mass=None, engine="torch", frame_interval=0.5)
    job.save(tmp_path, aldp.openmm_system(), aldp.positions.double().numpy())
    with pytest.raises(UserError, match="unstable"):
        run_job(tmp_path)


@pytest.mark.parametrize("engine", ENGINES)
def test_trajectories_of_a_repeat_are_unlike_and_numbered(aldp, tmp_path, engine):
    job = dataclasses.replace(JOB, engine=engine, options={"n_walkers": 3}, duration=0.5, dihedral=PHI)
    job.save(tmp_path, aldp.openmm_system(), aldp.positions.double().numpy())
    run_job(tmp_path)
    frames = read_frames(tmp_path)
    assert frames["window"].tolist() == [0, 1, 2] * 5
    assert len(np.unique(frames["dihedral"])) == 15
    np.testing.assert_allclose(frames["time"], np.repeat([0.1, 0.2, 0.3, 0.4, 0.5], 3))


def test_engine_is_torch_on_a_gpu_where_the_energy_is(aldp, monkeypatch):
    openmms = load_system("aldp", energy_backend="openmm")
    monkeypatch.setattr("boltznce.data.jobs.wants_compiling", lambda mode: mode is True)  # there may be no compiler
    compiled = load_system("aldp", compile=True)
    assert (
        choose_engine("auto", aldp, 24)
        == choose_engine("auto", openmms, 24)
        == choose_engine("auto", compiled, 6)
        == "openmm"
    )
    assert choose_engine("auto", compiled, 24) == "torch"
    assert choose_engine("torch", aldp) == "torch"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_engine("auto", aldp) == "torch"
    assert choose_engine("auto", openmms) == choose_engine("openmm", aldp) == "openmm"
    with pytest.raises(UserError, match="set engine=openmm"):
        choose_engine("torch", openmms)
    with pytest.raises(UserError, match="choose one of openmm, torch, auto"):
        choose_engine("gromacs", aldp)


@pytest.mark.slow
def test_compiled_step_is_the_eager_one(aldp, thermal):
    x, v = (torch.from_numpy(array).float() for array in thermal)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    bias = Restraints(PHI, 60.0, np.array([-2.0, -1.0, 1.0, 3.1]))
    ends = []
    for compile in (False, True):
        job = dataclasses.replace(JOB, compile=compile)
        walkers = TorchWalkers(job, aldp.openmm_system(), np.full(4, 300.0), bias)
        walkers.reseed(np.random.default_rng(0))
        a, b = (array.copy() for array in thermal)
        walkers.run(a, b, 0.02)
        assert (walkers._kernel == walkers.step) != compile
        ends.append((*walkers._kernel(x, v, noise), torch.from_numpy(a), torch.from_numpy(b)))
    for compiled, eager in zip(*reversed(ends), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
