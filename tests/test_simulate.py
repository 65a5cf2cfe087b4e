"""Simulation: exact resume, three methods on alanine dipeptide, umbrella analysis of a known distribution."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from filelock import FileLock
from interrupted import interrupt
from openmm import app, unit

from boltznce.config import load_system
from boltznce.data import engine
from boltznce.data.engine import Job, dihedral_angle, read_frames, run_job, wrap
from boltznce.data.reference import REFERENCE_FOLDER, load_reference, make_reference, result_of, save_reference
from boltznce.data.result import SimulationResult
from boltznce.data.simulate import plan, simulate, working_folder
from boltznce.data.umbrella import Ring, analyse, bias_energies, largest_gap, window_centres
from boltznce.errors import UserError
from boltznce.units import GAS_CONSTANT

ROOT = Path(__file__).parents[1]
KT = GAS_CONSTANT * 300
OPTIONS = {
    "umbrella": {"n_windows": 4, "kappa": 10.0, "exchange_interval": 0.05},
    "replica_exchange": {"n_replicas": 3, "max_temperature": 500.0, "exchange_interval": 0.05},
    "langevin": {},
    "metadynamics": {"n_walkers": 3, "bias_duration": 0.5, "compile": False},
}
SHORT = {"frame_interval": 0.1, "segment_length": 0.5, "equilibration": 0.2}


@pytest.fixture(scope="module")
def aldp():
    return load_system("aldp")


def make_job(system, folder, method, duration, engine="openmm", **lengths):
    job = Job(
        method=method,
        temperature=300.0,
        seed=4,
        repeat=1,
        duration=duration,
        timestep=0.002,
        friction=1.0,
        hydrogen_mass=4.0,
        platform="auto",
        dihedral=system.dihedrals["phi"],
        options=OPTIONS[method],
        engine=engine,
        **{**SHORT, **lengths},
    )
    job.save(folder, system.openmm_system(), system.positions.double().numpy())
    return job


@pytest.mark.parametrize(
    ("method", "interruptions"), [("umbrella", (3, 33, 20)), ("replica_exchange", (3, 33, 20)), ("langevin", (2, 9, 8))]
)
def test_interrupted_and_resumed_gives_identical_frames(aldp, tmp_path, method, interruptions):
    """Interrupted after so many ticks: in the equilibration, and in the middle of segments."""
    check_resume(aldp, tmp_path, method, interruptions, 2.0)


def test_interrupted_torch_engine_gives_identical_frames(aldp, tmp_path):
    """In the equilibration, and in the middle of the second segment."""
    check_resume(aldp, tmp_path, "umbrella", (3, 14), 0.4, engine="torch", segment_length=0.2, equilibration=0.1)


def check_resume(aldp, tmp_path, method, interruptions, duration, **settings):
    make_job(aldp, tmp_path / "whole", method, duration, **settings)
    run_job(tmp_path / "whole")
    make_job(aldp, tmp_path / "pieces", method, duration, **settings)
    for calls in interruptions:
        interrupt(tmp_path / "pieces", calls)
        with open(tmp_path / "pieces" / "frames.bin", "ab") as handle:
            handle.write(b"half a frame")
    run_job(tmp_path / "pieces")
    assert (tmp_path / "pieces" / "frames.bin").read_bytes() == (tmp_path / "whole" / "frames.bin").read_bytes()
    frames = read_frames(tmp_path / "whole")
    assert frames["time"][-1] == pytest.approx(duration)
    assert len(np.unique(frames["energy"])) == len(frames) == round(10 * duration) * (4 if method == "umbrella" else 1)


def test_killed_worker_resumes_exactly_and_extends(aldp, tmp_path):
    make_job(aldp, tmp_path / "killed", "umbrella", 10.0)
    worker = start_worker(tmp_path / "killed", os.getpid())
    while not (tmp_path / "killed" / "frames.bin").exists() or (tmp_path / "killed" / "frames.bin").stat().st_size == 0:
        assert worker.poll() is None
        time.sleep(0.02)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    assert len(read_frames(tmp_path / "killed")) < 400
    run_job(tmp_path / "killed")
    make_job(aldp, tmp_path / "whole", "umbrella", 5.0)
    run_job(tmp_path / "whole")
    make_job(aldp, tmp_path / "whole", "umbrella", 10.0)  # extend
    run_job(tmp_path / "whole")
    assert (tmp_path / "killed" / "frames.bin").read_bytes() == (tmp_path / "whole" / "frames.bin").read_bytes()


@pytest.mark.parametrize(("kept", "message"), [(0, "shorter than state.npz"), (0.5, "shorter"), (1, "not what was")])
def test_frames_that_are_gone_do_not_become_zeros(aldp, tmp_path, kept, message):
    make_job(aldp, tmp_path, "langevin", 1.0)
    run_job(tmp_path)
    path = tmp_path / "frames.bin"
    frames = path.read_bytes()
    path.write_bytes(frames[: int(kept * len(frames))] if kept < 1 else frames[:-9] + b"?" + frames[-8:])
    make_job(aldp, tmp_path, "langevin", 2.0)  # to be extended
    damaged = path.read_bytes()
    with pytest.raises(UserError, match=rf"frames\.bin is damaged .*{message}.*delete {tmp_path}"):
        run_job(tmp_path)
    assert path.read_bytes() == damaged


def start_worker(folder, parent):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "boltznce.data.worker", str(folder), str(parent)],
        env=environment,
        stderr=subprocess.PIPE,
    )


def test_a_second_process_is_refused(aldp, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "LOCK_PATIENCE", 0.0)
    make_job(aldp, tmp_path, "langevin", 1.0)
    with FileLock(tmp_path / "lock"), pytest.raises(UserError, match="Another process"):
        run_job(tmp_path)
    run_job(tmp_path)


def test_worker_ends_with_its_parent(aldp, tmp_path):
    make_job(aldp, tmp_path, "langevin", 1e6)
    worker = start_worker(tmp_path, os.getpid() + 1)
    assert b"parent" in worker.communicate(timeout=60)[1]
    assert worker.returncode == 1


def test_a_job_of_other_settings_is_refused(aldp, tmp_path):
    make_job(aldp, tmp_path, "langevin", 2.0)
    with pytest.raises(UserError, match=r"other settings .*method"):
        make_job(aldp, tmp_path, "umbrella", 2.0)
    with pytest.raises(UserError, match="force field"):
        make_job(load_system("aldp_amber96"), tmp_path, "langevin", 2.0)
    with pytest.raises(UserError, match=r"other settings .*engine"):
        make_job(aldp, tmp_path, "langevin", 2.0, "torch")
    description = json.loads((tmp_path / "job.json").read_text())
    assert description.pop("sha256")
    assert description.pop("engine") == "openmm"  # as written before there were engines
    (tmp_path / "job.json").write_text(json.dumps(description))
    assert make_job(aldp, tmp_path, "langevin", 2.0) == Job.load(tmp_path)


def test_a_dataset_by_torch_has_true_energies_and_serves_in_place_of_openmms(aldp, tmp_path):
    options = {"n_repeats": 1, "duration": 0.5, "progress": False, **OPTIONS["replica_exchange"], **SHORT}
    dataset = simulate(aldp, tmp_path / "set", "replica_exchange", engine="torch", **options)
    assert dataset.meta["engine"] == "torch"
    expected = aldp.energy(torch.from_numpy(np.array(dataset.positions)).double())
    np.testing.assert_allclose(dataset.energies, expected, rtol=0, atol=1e-6)
    same = simulate(aldp, tmp_path / "set", "replica_exchange", engine="openmm", **options)
    assert same.meta == dataset.meta


@pytest.mark.parametrize("method", list(OPTIONS))
def test_simulate_writes_a_dataset_with_true_energies(aldp, tmp_path, method):
    options = {**OPTIONS[method], **SHORT}
    dataset = simulate(aldp, tmp_path / "set", method, duration=1.0, n_repeats=2, seed=1, progress=False, **options)
    assert not working_folder(tmp_path / "set").exists()
    assert len(dataset) == 2 * 10 * {"umbrella": 4, "metadynamics": 3}.get(method, 1)
    assert set(dataset.repeat) == {0, 1}
    assert (dataset.log_weights == 0).all() == (method not in ("umbrella", "metadynamics"))
    np.testing.assert_allclose(dataset.positions.mean(1), 0, atol=1e-6)
    context = openmm.Context(
        aldp.openmm_system(), openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    for x, u in zip(dataset.positions[::7], dataset.energies[::7], strict=True):
        context.setPositions(x.astype(float))
        energy = context.getState(getEnergy=True).getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
        assert energy / KT == pytest.approx(u, abs=1e-3)
    assert (
        simulate(aldp, tmp_path / "set", method, duration=1.0, n_repeats=2, seed=1, progress=False, **options).energies
        == dataset.energies
    ).all()
    with pytest.raises(UserError, match="other settings"):
        simulate(aldp, tmp_path / "set", method, duration=1.0, n_repeats=2, seed=2, progress=False, **options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "alchemy"}, "choose one of auto, metadynamics, umbrella"),
        ({"dihedral": "chi7"}, "no dihedral 'chi7': choose one of phi, psi"),
        ({"frame_interval": 0.3}, "must be a multiple"),
        ({"n_windows": 7}, "even"),
        ({"timestep": 0.0}, "positive"),
        ({"platform": "Abacus"}, "no platform 'Abacus'"),
        ({"timestep": 0.025, "exchange_interval": 0.5, "hydrogen_mass": None}, "unstable"),
    ],
)
def test_bad_settings(aldp, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        simulate(
            aldp,
            tmp_path / "set",
            **{"method": "umbrella", "duration": 20.0, "n_repeats": 1, "progress": False, **settings},
        )
    assert not (tmp_path / "set").exists()


def test_crashed_worker_is_an_error_and_not_a_wait(aldp, tmp_path, monkeypatch):
    make_job_folder = working_folder(tmp_path / "set") / "repeat_0"
    plan(aldp, tmp_path / "set", "langevin", duration=1.0, n_repeats=1, **SHORT)
    (make_job_folder / "job.json").unlink()
    (make_job_folder / "state.npz").write_bytes(b"not an archive")
    with pytest.raises(UserError, match=r"state\.npz is damaged.*delete"):
        simulate(aldp, tmp_path / "set", "langevin", duration=1.0, n_repeats=1, progress=False, **SHORT)
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended with status 1"):
        simulate(aldp, tmp_path / "set", "langevin", duration=1.0, n_repeats=1, progress=False, **SHORT)


def test_dihedral_and_wrap():
    x = np.array([[1.0, 0, 0], [0, 0, 0], [0, 0, 1], [np.cos(0.7), np.sin(0.7), 1]])
    assert dihedral_angle(x, (0, 1, 2, 3)) == pytest.approx(0.7)
    np.testing.assert_allclose(
        wrap(np.array([np.pi, -np.pi, 3 * np.pi + 0.1, -0.2])), [np.pi, np.pi, -np.pi + 0.1, -0.2]
    )


class VonMisesWindows:
    """Samples of umbrella windows on p ∝ a vonMises(-1.5, 3) + b vonMises(1, 8) by inverse distribution function, with
    exact answers.

    ``barrier`` adds a Gaussian barrier (kT) at 2.1 rad; ``stuck`` then samples each window on the centre's side of it
    only.
    """

    n_windows, kappa, top = 24, 60.0, 2.1
    grid = np.linspace(-np.pi, np.pi, 20_001)

    def __init__(self, n, seed, barrier=0.0, stuck=False):
        self.barrier = barrier
        rng = np.random.default_rng(seed)
        samples = []
        for centre, b in zip(
            window_centres(self.n_windows), bias_energies(self.grid, self.n_windows, self.kappa, KT), strict=True
        ):
            density = np.exp(self.log_p(self.grid) - b)
            if stuck:
                density[(wrap(self.grid - centre) > wrap(self.top - centre)) != (wrap(self.top - centre) < 0)] = 0
            cdf = np.concatenate([[0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
            samples.append(np.interp(rng.random(n), cdf / cdf[-1], self.grid))
        self.dihedral = np.stack(samples, 1).ravel()
        self.window = np.tile(np.arange(self.n_windows), n)
        self.time = np.repeat(np.arange(1, n + 1), self.n_windows).astype(float)

    @property
    def frames(self):
        return self.dihedral, self.window, self.time, np.arange(len(self.time)) // self.n_windows % 2

    def log_p(self, phi):
        density = np.exp(3 * np.cos(phi + 1.5)) + 1e-3 * np.exp(8 * (np.cos(phi - 1) - 1))
        return np.log(density) - self.barrier * np.exp(-0.5 * (wrap(phi - self.top) / 0.25) ** 2)

    def mass(self, low, high):
        x = np.linspace(low, high, 4001)
        return np.trapezoid(np.exp(self.log_p(x)), x)

    def delta_f(self, low=0.0, high=2.0):
        inside = self.mass(low, high)
        return -np.log(inside / (self.mass(-np.pi, np.pi) - inside))


@pytest.mark.parametrize("cut", [None, 2.5])
def test_umbrella_analysis_recovers_a_known_distribution(cut):
    toy = VonMisesWindows(120, seed=0)
    result = analyse(*toy.frames, ring=Ring(toy.n_windows, toy.kappa, KT, cut))
    assert abs(result.delta_f - toy.delta_f()) < 4 * result.delta_f_error
    assert 0.1 < result.delta_f_error < 0.4  # over independent samples of this size ΔF has a standard deviation of 0.21
    width = np.pi / 72
    exact = -np.log([toy.mass(c - width, c + width) for c in result.centres])
    lowest = np.argmin(result.profile)
    exact -= exact[lowest]
    others = np.arange(72) != lowest
    z = (result.profile - exact)[others] / result.profile_error[others]
    assert np.sqrt(np.mean(z**2)) < 2.5
    assert np.abs(z).max() < 6
    assert result.parts.shape == (2, 10)


def test_fewer_frames_than_blocks_have_no_errors():
    frames = np.linspace(-3.0, 3.0, 24), np.arange(24) // 3, np.tile(np.arange(1.0, 4.0), 8), np.zeros(24, int)
    with pytest.raises(UserError, match="10 blocks of time, and there are 3 frames"):
        analyse(*frames, ring=Ring(8, 60.0, KT))


@pytest.mark.parametrize("state", [(2.5, 4.2), (-3.8, -2.0)])
def test_umbrella_analysis_of_a_state_across_pi(state):
    toy = VonMisesWindows(60, seed=3)
    result = analyse(*toy.frames, ring=Ring(toy.n_windows, toy.kappa, KT), state=state, n_blocks=5)
    assert abs(result.delta_f - toy.delta_f(*state)) < 4 * result.delta_f_error < 1.0


def test_windows_stuck_on_one_side_of_a_barrier_do_not_harm():
    """Bistable windows that never cross mislead MBAR by much; cut at the barrier, they do not."""
    toy = VonMisesWindows(200, seed=2, barrier=25.0, stuck=True)
    cut = largest_gap(toy.dihedral)
    assert cut == pytest.approx(toy.top, abs=0.3)
    errors = {}
    for name, ring in (("whole", Ring(24, 60.0, KT)), ("cut", Ring(24, 60.0, KT, cut))):
        w = np.exp(ring.log_weights(toy.dihedral, toy.window, ring.free_energies(toy.dihedral, toy.window)))
        inside = (toy.dihedral > 0) & (toy.dihedral < 2)
        errors[name] = abs(-np.log(w[inside].sum() / w[~inside].sum()) - toy.delta_f())
    assert errors["cut"] < 0.3
    assert errors["whole"] > 0.5


@pytest.mark.parametrize("cut", [None, -2.0])
def test_mbar_weights_are_the_exact_ones(cut):
    """Free energies of the states, and the mean of cos and sin under the weights, against quadrature."""
    toy = VonMisesWindows(1000, seed=1)
    ring = Ring(toy.n_windows, toy.kappa, KT, cut)
    with np.errstate(divide="ignore"):
        exact = -np.log(np.trapezoid(np.exp(toy.log_p(toy.grid) - ring.bias(toy.grid)), toy.grid, axis=1))
    f = ring.free_energies(toy.dihedral, toy.window)
    sampled = np.flatnonzero(np.bincount(ring.state(toy.dihedral, toy.window), minlength=48) > 50)
    np.testing.assert_allclose((f - exact)[sampled], np.mean((f - exact)[sampled]), atol=0.4)
    w = np.exp(ring.log_weights(toy.dihedral, toy.window, f))
    for function in (np.cos, np.sin):
        expected = np.trapezoid(function(toy.grid) * np.exp(toy.log_p(toy.grid)), toy.grid) / toy.mass(-np.pi, np.pi)
        # standard deviation over independent samples: 0.02 to 0.03
        assert (w * function(toy.dihedral)).sum() / w.sum() == pytest.approx(expected, abs=0.1)


def test_window_centres_are_even_on_the_circle():
    centres = window_centres(24)
    np.testing.assert_allclose(np.abs(wrap(np.diff(centres))), 2 * np.pi / 24)
    assert (centres > -np.pi).all()
    assert (centres <= np.pi).all()


def test_reference_file(aldp, tmp_path):
    dataset = simulate(
        aldp, tmp_path / "set", "umbrella", duration=2.0, n_repeats=1, progress=False, **OPTIONS["umbrella"], **SHORT
    )
    centres = np.linspace(-3, 3, 72)
    result = SimulationResult(
        5.0, 0.05, centres, np.where(centres > 2.5, np.nan, centres**2), np.full(72, 0.1), np.full((1, 10), 5.0)
    )
    reference = make_reference(aldp, dataset.meta, result, "python scripts/simulate.py")
    save_reference(reference, tmp_path / "reference.json")
    assert load_reference(tmp_path / "reference.json") == reference
    assert reference["profile"]["f"][-1] is None
    assert reference["made_by"]["ps_per_walker"] == pytest.approx(2.0)
    (tmp_path / "reference.json").write_text('{"system": "aldp"}')
    with pytest.raises(UserError, match="keys are missing"):
        load_reference(tmp_path / "reference.json")
    assert np.isfinite(result_of(dataset, aldp, n_blocks=2).profile).any()


@pytest.mark.parametrize("path", sorted(REFERENCE_FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_reference(path):
    """Of the system that its name means, precise, and the same in both repeats."""
    system = load_system(path.stem)
    reference = load_reference(path)
    assert system.reference() == reference
    error = reference["delta_f"]["std_error"]
    assert error <= {"aldp": 0.03, "aldp_amber96": 0.03, "tetrapeptide": 0.1, "hexapeptide": 0.2}.get(path.stem, 0.08)
    assert all(each["std_error"] <= 0.1 for each in reference.get("others", {}).values())
    if "surface" in reference:
        parts = np.array(reference["made_by"]["delta_f_of_parts"])
        first, second = parts.mean(1)
        assert abs(first - second) < 3 * 2 * error  # each repeat has √2 of the error, their difference twice
        f = np.array([[np.nan if f is None else f for f in row] for row in reference["surface"]["f"]])
        inside = (np.arange(36) >= 18) & (np.arange(36) < 18 + 2 / (np.pi / 18) - 0.5)
        p = np.exp(-np.nan_to_num(f, nan=np.inf)).sum(1)
        assert np.log(p[~inside].sum() / p[inside].sum()) == pytest.approx(reference["delta_f"]["value"], abs=0.15)


def test_structure_is_l_trans_alanine_dipeptide():
    pdb = app.PDBFile(str(ROOT / "boltznce" / "systems" / "structures" / "aldp.pdb"))
    x = pdb.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    n, carbon, beta = x[6] - x[8], x[14] - x[8], x[10] - x[8]
    assert np.cross(n, carbon) @ beta > 0  # L
    angles = np.degrees(
        [dihedral_angle(x, atoms) for atoms in ((4, 6, 8, 14), (6, 8, 14, 16), (1, 4, 6, 8), (8, 14, 16, 18))]
    )
    assert angles[0] == pytest.approx(-80, abs=15)
    assert angles[1] == pytest.approx(150, abs=15)
    assert (np.abs(angles[2:]) > 170).all()
    for files in (
        ("amber99sbildn.xml", "amber99_obc.xml"),
        ("amber96.xml", "amber96_obc.xml"),
        ("amber14-all.xml", "implicit/obc1.xml"),
    ):
        assert app.ForceField(*files).createSystem(pdb.topology).getNumParticles() == 22


def test_script_tells_a_mistake_without_a_trace(forks, tmp_path):
    (tmp_path / "data").mkdir()
    done = forks.run("simulate", "duration=0.3", "data_dir=data", "sampling=langevin", cwd=tmp_path)
    assert done.status == 2
    (told,) = done.told
    assert told.startswith("Error: segment_length=")
    assert not list((tmp_path / "data").iterdir())
