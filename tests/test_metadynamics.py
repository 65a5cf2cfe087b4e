"""Metadynamics: a bias is the sum of its hills, weights give back known distributions, a killed run goes on exactly."""

import dataclasses
import math

import numpy as np
import openmm
import pytest
import torch
from interrupted import interrupt

from boltznce.config import load_system
from boltznce.data import metadynamics, plane
from boltznce.data.engine import Job, dihedral_angle, read_frames, run_job
from boltznce.data.fourier_bias import Axis, BiasGroups, FourierBias
from boltznce.data.jobs import jobs_of
from boltznce.data.metadynamics import MetadynamicsSampler
from boltznce.data.reference import result_of
from boltznce.data.result import of_walkers, transitions
from boltznce.data.simulate import simulate
from boltznce.data.torch_walkers import TorchWalkers
from boltznce.errors import UserError
from boltznce.states import State

PHI, PSI = (4, 6, 8, 14), (6, 8, 14, 16)
STATE = State("first", (0.0, 2.0))
CHAIN = dict(
    bias_duration=4.0,
    hill_interval=0.1,
    hill_height=20.0,
    hill_width=0.35,
    bias_factor=12.0,
    n_terms=8,
    start_temperature=800.0,
)


def angles(axis: Axis, width: float, centres: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Gaussian hills at ``centres``, written out: images on the circle, or reflected at limits; (values, centres)."""
    if axis.limits is None:
        images = [centres + 2 * math.pi * turn for turn in (-1, 0, 1)]
    else:
        low, high = axis.limits
        images = [centres, 2 * low - centres, 2 * high - centres]
    return sum(torch.exp(-0.5 * ((values[:, None] - image) / width) ** 2) for image in images)


@pytest.mark.parametrize("limits", [[None], [(-1.0, 3.0)], [None, None], [None, (-1.0, 3.0)]])
def test_bias_is_the_sum_of_its_hills(limits):
    """On the circle and between limits, in one and two dimensions, at the hills and elsewhere."""
    axes = [Axis((0, 1, 2, 3) if each is None else (1.0, 0.0), each) for each in limits]
    width, rng = 0.3, torch.Generator().manual_seed(0)
    bias = FourierBias(axes, 40, width, 2.5)
    spans = [(-math.pi, math.pi) if each is None else each for each in limits]

    def points(n):
        columns = [low + (high - low) * torch.rand(n, generator=rng, dtype=torch.float64) for low, high in spans]
        return torch.stack(columns, dim=1)

    centres, heights, values = points(20), torch.rand(20, generator=rng, dtype=torch.float64), points(200)
    bias.add_hills(centres, heights)
    hills = [angles(axis, width, centres[:, i], values[:, i]) for i, axis in enumerate(axes)]
    torch.testing.assert_close(bias.energy(values), math.prod(hills) @ heights, rtol=0, atol=1e-6)


def test_bias_is_flat_beyond_its_limits():
    bias = FourierBias([Axis((1.0, 0.0), (0.0, 1.0))], 10, 0.1, 1.0)
    bias.add_hills(torch.tensor([[0.9]]), torch.ones(1))
    x = torch.tensor([[[1.0, 0.0]], [[1.5, 0.0]]], dtype=torch.float64).requires_grad_()
    energy = bias.energy(bias.coordinates(x))
    assert energy[0] == energy[1] > 0
    assert torch.autograd.grad(energy[1], x)[0].abs().max() == 0


def test_each_group_feels_its_own_bias_and_the_last_none():
    """Forces by finite differences of what `energies` tells, for three groups of two walkers."""
    system = load_system("aldp")
    job = job_of(system.openmm_system(), [[PHI, PSI], [PSI, PHI]], 6)
    walkers = TorchWalkers(job, system.openmm_system(), np.full(6, 300.0), dtype=torch.float64)
    groups = metadynamics.groups_of(job)
    rng = torch.Generator().manual_seed(1)
    for bias in groups.biases:
        bias.add_hills(6 * torch.rand(30, 2, generator=rng), 3 * torch.rand(30, generator=rng))
    x = system.positions.double() + 0.01 * torch.randn(6, 22, 3, generator=rng, dtype=torch.float64)
    free = walkers.gradient(x)
    walkers.bias = groups
    force = walkers.gradient(x, *groups.parameters) - free
    assert groups.energies(x).shape == (6, 3)
    felt = groups.energies(x)[torch.arange(6), torch.arange(6) // 2]
    torch.testing.assert_close(groups.potential(x, *groups.parameters), job.kT * felt)
    for atom, axis in [(4, 0), (8, 1), (16, 2), (0, 0)]:
        step = torch.zeros_like(x)
        step[:, atom, axis] = 1e-6
        up, down = (groups.potential(x + sign * step, *groups.parameters) for sign in (1, -1))
        torch.testing.assert_close(force[:, atom, axis], (up - down) / 2e-6, rtol=1e-4, atol=1e-4)
    assert force[4:].abs().max() == 0 < force[:4].abs().max()


# ---- chains of particles, whose torsions are independent of all else ------------------------------------------------


def chain(n_torsions: int) -> openmm.System:
    """Particles in a chain: stiff bonds and angles, and torsions U = a (1 + cos φ) + b sin φ, of 8 kT between wells."""
    system = openmm.System()
    bonds, bends, torsions = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce(), openmm.PeriodicTorsionForce()
    n = n_torsions + 3
    for _ in range(n):
        system.addParticle(12.0)
    for i in range(n - 1):
        bonds.addBond(i, i + 1, 0.15, 50_000.0)
    for i in range(n - 2):
        bends.addAngle(i, i + 1, i + 2, 1.9, 400.0)
    for i in range(n - 3):
        torsions.addTorsion(i, i + 1, i + 2, i + 3, 2, math.pi, 8.0)  # minima at 0 and π
        torsions.addTorsion(i, i + 1, i + 2, i + 3, 1, 0.4, 1.5)
    for force in (bonds, bends, torsions):
        system.addForce(force)
    return system


def torsion_populations(kT: float) -> tuple[float, float]:
    """P(inside), P(outside) of STATE's interval for one torsion."""
    phi = np.linspace(-np.pi, np.pi, 20_000, endpoint=False)
    p = np.exp(-(8.0 * (1 + np.cos(2 * phi - math.pi)) + 1.5 * (1 + np.cos(phi - 0.4))) / kT)
    inside = (phi > 0) & (phi < 2)
    return p[inside].sum() / p.sum(), p[~inside].sum() / p.sum()


def job_of(system: openmm.System, coordinates, n_walkers: int, duration: float = 4.0, **options) -> Job:
    exchange = {"exchange_interval": 0.1} if len(coordinates) > 1 else {}
    return Job(
        method="metadynamics",
        temperature=300.0,
        seed=5,
        repeat=0,
        duration=duration,
        frame_interval=0.1,
        segment_length=1.0,
        equilibration=0.5,
        timestep=0.005,
        friction=5.0,
        hydrogen_mass=None,
        platform="Reference",
        options={**CHAIN, "coordinates": coordinates, "n_walkers": n_walkers, **exchange, **options},
        engine="torch",
        compile=False,
    )


def zigzag(n: int) -> np.ndarray:
    return np.stack([0.12 * np.arange(n), 0.05 * (np.arange(n) % 2), 0.02 * (np.arange(n) // 2)], axis=1)


@pytest.mark.parametrize(("n_torsions", "n_walkers"), [(1, 96), (2, 144)])
def test_weights_give_back_a_known_distribution(tmp_path, n_torsions, n_walkers):
    """ΔF of torsions with an exact distribution; of two by bias exchange, with the joint populations."""
    system = chain(n_torsions)
    fours = [tuple(range(i, i + 4)) for i in range(n_torsions)]
    job = job_of(system, [[four] for four in fours], n_walkers)
    job.save(tmp_path, system, zigzag(n_torsions + 3))
    run_job(tmp_path)
    frames = read_frames(tmp_path)
    log_w, change = metadynamics.weigh(job, tmp_path, frames)
    assert 0 < change < 2.0
    names = ["first", "second"][:n_torsions]
    found = {name: dihedral_angle(frames["positions"], four) for name, four in zip(names, fours, strict=True)}
    columns = (frames["window"], frames["time"], np.zeros(len(frames), dtype=int))
    result = of_walkers(found, log_w, *columns, state=STATE, pairs=[[name] for name in names])
    inside, outside = torsion_populations(job.kT)
    exact = math.log(outside / inside)
    assert 0.02 < result.delta_f_error < 0.3
    assert abs(result.delta_f - exact) < 3.5 * result.delta_f_error
    assert result.checks["transitions a walker"] > 0.5
    if n_torsions == 2:
        value, error = result.others["second"]
        assert abs(value - exact) < 3.5 * error
        for pattern, exactly in {"++": inside**2, "+-": inside * outside, "--": outside**2}.items():
            p, error = result.populations[pattern]
            assert abs(p - exactly) < 4 * error + 1e-3


@pytest.mark.parametrize("n_torsions", [1, 2])
def test_a_killed_run_goes_on_exactly(tmp_path, n_torsions):
    """In the equilibration, while the bias grows, and while frames are taken."""
    system = chain(n_torsions)
    fours = [[tuple(range(i, i + 4))] for i in range(n_torsions)]
    job = dataclasses.replace(job_of(system, fours, 6, duration=1.0, bias_duration=1.0), segment_length=0.5)
    for name in ("whole", "killed"):
        job.save(tmp_path / name, system, zigzag(n_torsions + 3))
    run_job(tmp_path / "whole")
    for after in (2, 7, 13, 7):
        interrupt(tmp_path / "killed", after)
    run_job(tmp_path / "killed")
    whole, killed = (np.array(read_frames(tmp_path / name)) for name in ("whole", "killed"))
    assert len(whole) == 10 * 6
    assert (whole == killed).all()
    weights = [metadynamics.weigh(job, tmp_path / name, whole)[0] for name in ("whole", "killed")]
    assert (weights[0] == weights[1]).all()


def test_exchange_keeps_every_configuration():
    """Positions, velocities and the number of the trajectory change places together."""
    system = chain(2)
    job = job_of(system, [[(0, 1, 2, 3)], [(1, 2, 3, 4)]], 9)
    sampler = MetadynamicsSampler(job, system, zigzag(5))
    rng = np.random.default_rng(0)
    for bias in sampler.groups.biases:
        bias.add_hills(torch.tensor([[1.0], [-2.0]]), torch.tensor([3.0, 3.0]))
    x = torch.randn(9, 5, 3)
    v = x + 100.0
    there, orders = (x, v), set()
    for _ in range(20):
        there = sampler._exchange(*there, rng)
        orders.add(tuple(sampler.order))
        torch.testing.assert_close(there[0], x[torch.from_numpy(sampler.order)], rtol=0, atol=0)
        torch.testing.assert_close(there[1], there[0] + 100.0, rtol=0, atol=1e-4)
    assert len(orders) > 10


# ---- in the plane ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["double_well", "mueller_brown", "gaussians8_unequal", "gaussians40", "two_moons"])
def test_a_system_in_the_plane_is_its_definition(name):
    system = load_system(name)
    again = plane.system_of(plane.definition(system))
    x = system.sample(50, torch.Generator().manual_seed(0))
    assert (again.energy(x) == system.energy(x)).all()
    assert again.identity == system.identity
    for text in ('{"class": "PlaneSystem"}', '{"class": "__doc__"}', "[]"):
        with pytest.raises(ValueError, match="no system"):
            plane.system_of(text)


def test_double_well_by_metadynamics_is_the_exact_one(tmp_path):
    system = load_system("double_well")
    settings = {"duration": 20.0, "bias_duration": 20.0, "segment_length": 10.0, "frame_interval": 0.5}
    more = {"n_repeats": 1, "n_walkers": 192, "equilibration": 1.0, "timestep": 0.02, "compile": False, "seed": 2}
    dataset = simulate(system, tmp_path / "well", "metadynamics", **settings, **more, progress=False)
    assert dataset.positions.shape == (40 * 192, 1, 2)
    result = result_of(dataset, system)
    exact = system.reference()
    assert result.message == ""
    assert 0.02 < result.delta_f_error < 0.12
    assert abs(result.delta_f - exact["delta_f"]["value"]) < 3.5 * result.delta_f_error
    assert result.centres[0] > system.box[0][0]
    known = np.interp(result.centres, exact["profile"]["phi"], exact["profile"]["f"])
    low = known < 4.0
    off = (result.profile - known)[low]
    assert np.abs(off - off.mean()).mean() < 0.2


# ---- analysis -------------------------------------------------------------------------------------------------------


def test_error_is_the_spread_between_walkers():
    """Frames of a walker that never moves count once: the error is that of as many draws as there are walkers."""
    rng = np.random.default_rng(2)
    n_walkers, n_times = 400, 30
    angle = np.where(rng.random(n_walkers) < 0.3, 1.0, -1.5)
    frames = np.tile(angle, n_times)
    window, time = np.tile(np.arange(n_walkers), n_times), np.repeat(np.arange(1.0, n_times + 1), n_walkers)
    zeros = np.zeros(len(frames))
    result = of_walkers({"first": frames}, zeros, window, time, zeros.astype(int), state=STATE)
    p = (angle > 0).mean()
    assert result.delta_f == pytest.approx(math.log((1 - p) / p))
    assert result.delta_f_error == pytest.approx(1 / math.sqrt(n_walkers * p * (1 - p)), rel=0.06)
    assert result.checks["transitions a walker"] == 0


def test_what_did_not_go_round_is_not_reliable():
    rng = np.random.default_rng(0)
    angle = np.tile(np.where(rng.random(50) < 0.5, 1.0, -2.0), 20)
    columns = (np.tile(np.arange(50), 20), np.repeat(np.arange(1.0, 21.0), 50), np.zeros(1000, dtype=int))
    stuck = of_walkers({"first": angle}, np.zeros(1000), *columns, state=STATE)
    assert stuck.message.startswith("walkers went between state and rest 0 times each")
    moving = np.where(rng.random(1000) < 0.5, 1.0, -2.0)
    assert of_walkers({"first": moving}, np.zeros(1000), *columns, state=STATE).message == ""
    drifting = np.where(rng.random(1000) < np.repeat([0.2, 0.8], 500), 1.0, -2.0)
    assert "half of the time" in of_walkers({"first": drifting}, np.zeros(1000), *columns, state=STATE).message


def test_transitions_are_from_core_to_core():
    """What turns back at the edge of a state has not crossed."""
    angle = np.array([1.0, 1.9, 2.1, 1.9, -2.0, 0.1, -0.1, 1.0])
    assert transitions(angle, np.zeros(8, dtype=int), STATE) == 2
    assert transitions(np.repeat(angle, 2), np.tile([0, 1], 8), STATE) == 4
    x = np.array([1.0, 0.2, -0.2, 1.0, -1.0, -0.2, 1.0])
    assert transitions(x, np.zeros(7, dtype=int), State("x", (0.0, math.inf)), (-2.0, 2.0)) == 2


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "openmm"}, "engine=torch"),
        ({"bias_along": ["phi", "chi"]}, "chi|phi, psi"),
        ({"bias_along": [["phi"], ["psi"]], "n_walkers": 8}, "multiple of 3"),
        ({"bias_along": [["phi", "psi"], ["psi"]]}, "as many"),
        ({"bias_duration": 15.0}, "segment_length"),
        ({"hill_interval": 0.03}, "hill_interval"),
        ({"bias_factor": 1.0}, "bias_factor"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(UserError, match=message):
        jobs_of(load_system("aldp"), "metadynamics", duration=20.0, **settings)


def test_bias_is_on_every_phi_with_the_psi_beside_it():
    asked = {
        "aldp": [["phi", "psi"]],
        "AK": [["phi", "psi"]],
        "ACE-AA-NME": [["phi", "psi"], ["phi2", "psi2"]],
    }
    for name, pairs in asked.items():
        system = load_system(name)
        (job,) = jobs_of(system, "metadynamics", n_repeats=1)
        assert job.options["bias_along"] == pairs
        assert job.options["n_walkers"] == (256 if len(pairs) == 1 else 384)
        for names, fours in zip(pairs, job.options["coordinates"], strict=True):
            assert [tuple(four) for four in fours] == [tuple(system.dihedrals[each]) for each in names]
    one = jobs_of(load_system("aldp"), "metadynamics", dihedral="psi")[0]
    assert one.options["bias_along"] == [["psi"]]
    assert dataclasses.replace(one, repeat=1).total == one.equilibration + 120.0 + 100.0


def test_auto_is_metadynamics_where_one_bias_is_enough_and_can_be_compiled(monkeypatch):
    def chosen(system):
        return jobs_of(system, "auto", n_repeats=1)[0].method

    one, two = load_system("aldp"), load_system("ACE-AA-NME")
    monkeypatch.setattr("boltznce.data.jobs.wants_compiling", lambda mode: str(mode).lower() == "true")
    assert (chosen(one), chosen(two)) == ("metadynamics", "umbrella")
    monkeypatch.setattr("boltznce.data.jobs.wants_compiling", lambda mode: False)
    assert chosen(one) == "umbrella"
    with pytest.raises(UserError, match=r"nothing to simulate in double_well.*sampling=metadynamics"):
        jobs_of(load_system("double_well"))


def test_groups_share_the_walkers():
    bias = FourierBias([Axis(PHI)], 3, 0.3, 1.0)
    assert (BiasGroups([bias], 8).n_groups, BiasGroups([bias], 8).size) == (1, 8)
    assert (BiasGroups([bias] * 3, 8).n_groups, BiasGroups([bias] * 3, 8).size) == (4, 2)
