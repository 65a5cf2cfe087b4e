"""Reference data: independent repeats of a simulation, one process each, gathered into a dataset."""

import dataclasses
import itertools
import math
import os
import platform as machine
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from tqdm import tqdm

from boltznce.compiling import wants_compiling
from boltznce.data import metadynamics, umbrella
from boltznce.data.dataset import DATASET, Dataset
from boltznce.data.engine import (
    SAMPLERS,
    Job,
    check_frames,
    dihedral_angle,
    frame_dtype,
    picoseconds_done,
    read_frames,
    seconds_spent,
)
from boltznce.data.matching import made_here, require_settings, require_system
from boltznce.data.plane import axis_of
from boltznce.data.replica_exchange import temperature_ladder
from boltznce.data.result import SimulationResult, of_walkers
from boltznce.data.umbrella import Ring, largest_gap
from boltznce.data.walkers import ENGINES
from boltznce.errors import UserError
from boltznce.folders import Kind, claim, discard, only_process
from boltznce.io import require_free_space
from boltznce.settings import require, require_keywords
from boltznce.systems.workers import available_cores
from boltznce.topologies import pdb_text
from boltznce.units import GAS_CONSTANT

__all__ = [
    "Plan",
    "choose_engine",
    "force_evaluations",
    "gather",
    "jobs_of",
    "plan",
    "require_reference",
    "result_of",
    "run_plans",
    "simulate",
    "working_folder",
]

UNFINISHED = Kind("an unfinished simulation", names=r"repeat_\d+", whole=True)
MBAR_MAX_FRAMES = 40_000
DURATIONS = {"metadynamics": 100.0}  # ps, where none is given
DURATION = 2000.0  # of other methods
MIN_ATOMS_AT_A_TIME = 400  # from which compiled torch is faster on a CPU, see `choose_engine`
RECORDED = {  # the option that says how many frames are kept at a time
    "umbrella": "n_windows",
    "replica_exchange": "n_ladders",
    "langevin": "n_walkers",
    "metadynamics": "n_walkers",
}
ONE_PROCESS = {
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "PYTHONIOENCODING": "utf-8",
}  # a worker starts no others


def simulate(
    system,
    folder: Path,
    method: str = "auto",
    *,
    n_processes: int | None = None,
    progress: bool = True,
    **settings,
) -> Dataset:
    """Simulate a molecule and write a dataset to ``folder``; go on where a killed call with these settings stopped.

    ``settings`` are those of `plan`; ``n_processes`` repeats run at a time (default: one a core).

    Raises UserError as `plan` does, for an unstable simulation and for a full disk.
    """
    require(n_processes=n_processes)
    with only_process(folder, beside=True, wait=True):
        work = plan(system, folder, method, **settings)
        run_plans([work], n_processes, f"simulation of {system.name}", progress)
        return work.finish()


@dataclasses.dataclass(frozen=True)
class Plan:
    """A simulation to be run or gone on with, its jobs on disk; or one whose dataset is there, without jobs."""

    system: Any
    folder: Path
    jobs: list[Job]
    job_folders: list[Path]

    def finish(self) -> Dataset:
        """The dataset; written now if all jobs have just ended."""
        if not self.jobs:
            dataset = Dataset.load(self.folder)
            require_system(self.folder, dataset, self.system)
            return dataset
        if not (self.folder / "meta.yaml").exists():
            gather(self.system, self.job_folders, self.folder)
            discard(working_folder(self.folder), UNFINISHED)
        return Dataset.load(self.folder)


def plan(system, folder: Path, method: str = "auto", **settings: Any) -> Plan:
    """Write the jobs of a simulation beside ``folder``, if its dataset is not there yet.

    ``settings`` are those of `jobs_of`. Raises UserError as that does, for another simulation in the folder (see
    `boltznce.data.matching`) and for a full disk.
    """
    require_keywords(jobs_of, settings, "a simulation")
    folder, jobs = Path(folder), jobs_of(system, method, **settings)
    job = jobs[0]
    if (folder / "meta.yaml").exists():
        recorded = Dataset.read_meta(folder).get("settings") or {}
        if not made_here(recorded):
            raise UserError(f"{folder} holds data that no simulation of this library has made: choose another name.")
        require_settings(folder, recorded, job.settings(len(jobs)))
        discard(working_folder(folder), UNFINISHED)  # a kill came before it was gone
        return Plan(system, folder, [], [])

    claim(folder, DATASET, "another name, or data.folder")
    claim(working_folder(folder), UNFINISHED, "another name, or data.folder")
    n_frames = len(jobs) * job.options.get(RECORDED[job.method], 1) * round(job.duration / job.frame_interval)
    require_free_space(folder, 2 * n_frames * frame_dtype(system.n_atoms).itemsize)
    folders = [working_folder(folder) / f"repeat_{job.repeat}" for job in jobs]
    start = np.zeros((system.n_atoms, 3))
    start[:, : system.dim] = system.positions
    for job, path in zip(jobs, folders, strict=True):
        job.save(path, system if system.exact else system.openmm_system(), start)
    return Plan(system, folder, jobs, folders)


def jobs_of(
    system,
    method: str = "auto",
    *,
    duration: float | None = None,
    n_repeats: int = 2,
    seed: int = 0,
    engine: str = "auto",
    compile: str | bool | None = None,
    dihedral: str | None = None,
    frame_interval: float = 1.0,
    equilibration: float = 50.0,
    segment_length: float = 20.0,
    timestep: float = 0.002,
    friction: float = 1.0,
    hydrogen_mass: float | None = 4.0,
    platform: str = "auto",
    n_windows: int = 24,
    kappa: float = 60.0,
    exchange_interval: float = 0.5,
    n_replicas: int = 6,
    max_temperature: float = 800.0,
    n_ladders: int = 1,
    n_walkers: int | None = None,
    bias_along: Sequence[str] | Sequence[Sequence[str]] | None = None,
    bias_duration: float = 120.0,
    hill_interval: float = 0.1,
    hill_height: float = 7.5,
    hill_width: float = 0.25,
    bias_factor: float = 16.0,
    n_terms: int = 12,
    start_temperature: float = 800.0,
) -> list[Job]:
    """The jobs of a simulation, one for each repeat, its settings checked; nothing is written.

    Args:
        method: ``metadynamics`` (many walkers under one bias), ``umbrella`` (windows along ``dihedral``, MBAR),
            ``replica_exchange`` (in temperature), ``langevin``, or ``auto``: metadynamics of a molecule with one φ
            whose torch energy can be compiled here, umbrella of others.
        duration: ps per walker, after ``equilibration`` ps (and ``bias_duration``); raise it to extend an unfinished
            run. Default 2000, of metadynamics 100.
        n_repeats: independent repeats.
        engine: ``openmm``, one walker after another; ``torch``, all in one batch; or ``auto``, see `choose_engine`.
        compile: whether ``engine=torch`` is compiled; default as ``system.compile`` says, and of metadynamics where
            there is a compiler.
        dihedral: name in ``system.dihedrals``; default that of ``system.state``, else the first.
        frame_interval, segment_length: ps between frames, and between saves that a killed run goes on from.
        timestep, friction, hydrogen_mass: ps, 1/ps, amu. Heavy hydrogens allow 2 fs and change no configuration.
        platform: an OpenMM platform, or ``auto``: Reference for small molecules, else OpenMM's fastest.
        n_windows, kappa, exchange_interval: umbrella: windows on the circle, kJ/mol/rad², ps.
        n_replicas, max_temperature, exchange_interval: replica exchange: geometric ladder up to max_temperature in K.
        n_ladders: replica exchange: independent ladders of each repeat.
        n_walkers: trajectories of each repeat; Langevin 1, metadynamics 256, with several biases 128 a group.
        bias_along: metadynamics: one or two names in ``system.dihedrals``, or a list of such pairs for a bias each and
            bias exchange every ``exchange_interval``; default every φ, each with the ψ beside it.
        bias_duration, hill_interval: metadynamics: ps a walker in which the bias is built, and between hills.
        hill_height, hill_width, bias_factor: metadynamics: kT, of all walkers' hills of a round together; rad; see
            `boltznce.data.metadynamics.MetadynamicsSampler`.
        n_terms: metadynamics: of the bias's Fourier series, a coordinate.
        start_temperature: metadynamics: K during the equilibration.

    Raises UserError for settings that do not fit, and for a system whose energy is not a force field's.
    """
    given = dict(locals())  # before there are others
    require("simulation", **{key: value for key, value in given.items() if key not in ("system", "compile")})
    if system.exact and method != "metadynamics":
        raise UserError(
            f"There is nothing to simulate in {system.name}: scripts/train.py draws its data exactly. To see how well "
            "metadynamics does, set sampling=metadynamics."
        )
    if system.energy_backend == "xtb":
        raise UserError(
            f"OpenMM cannot simulate {system.name}, whose energy is GFN2-xTB: simulate a system with a force field, "
            "or set data.folder to a dataset that was made otherwise."
        )
    compile = system.compile if compile is None else compile
    if method == "auto":
        method = "metadynamics" if _one_phi(system) and wants_compiling("true") else "umbrella"
    if method == "metadynamics" and str(compile) == "auto":
        compile = True
    duration = DURATIONS.get(method, DURATION) if duration is None else duration
    at_a_time = {"umbrella": n_windows, "replica_exchange": n_replicas * n_ladders}.get(method, n_walkers or 1)
    if method == "metadynamics" and engine == "auto":
        engine = "torch"
    if not system.exact:
        engine = choose_engine(engine, system, at_a_time, compile)
    if method == "metadynamics" and engine != "torch":
        raise UserError("Metadynamics moves all walkers at once by the torch energy: set engine=torch, or sampling.")
    atoms = None if system.exact else _dihedral_atoms(system, dihedral, required=method == "umbrella")
    if method == "metadynamics":
        bias_along = _biases(system, dihedral, bias_along)
        if len({len(one) for one in bias_along}) > 1:
            raise UserError(f"Every bias of bias_along={bias_along} must have as many coordinates: one, or two.")
        n_groups = len(bias_along) + (len(bias_along) > 1)
        n_walkers = n_walkers or (256 if n_groups == 1 else 128 * n_groups)
        if n_walkers % n_groups:
            raise UserError(f"n_walkers={n_walkers} must be a multiple of {n_groups}: the biases, and a group without.")
    options = {
        "umbrella": {"n_windows": n_windows, "kappa": kappa, "exchange_interval": exchange_interval},
        "replica_exchange": {
            "n_replicas": n_replicas,
            "max_temperature": max_temperature,
            "exchange_interval": exchange_interval,
        }
        | ({"n_ladders": n_ladders} if n_ladders != 1 else {}),  # {}: as in datasets older than this option
        "langevin": {"n_walkers": n_walkers} if n_walkers not in (None, 1) else {},
        "metadynamics": {
            "bias_along": bias_along,
            **_axes(system, bias_along or ()),
            "n_walkers": n_walkers,
            "bias_duration": bias_duration,
            "hill_interval": hill_interval,
            "hill_height": hill_height,
            "hill_width": hill_width,
            "bias_factor": bias_factor,
            "n_terms": n_terms,
            "start_temperature": system.temperature if system.exact else start_temperature,
        }
        | ({"exchange_interval": exchange_interval} if len(bias_along or ()) > 1 else {}),
    }
    jobs = [
        Job(
            method=method,
            temperature=system.temperature,
            seed=seed,
            repeat=repeat,
            duration=duration,
            frame_interval=frame_interval,
            segment_length=min(segment_length, duration),
            equilibration=equilibration,
            timestep=timestep,
            friction=friction,
            hydrogen_mass=hydrogen_mass,
            platform=platform,
            dihedral=atoms,
            options=options[method],
            engine=engine,
            compile=compile,
        )
        for repeat in range(n_repeats)
    ]
    _check(jobs)
    return jobs


def run_plans(
    plans: Sequence[Plan], n_processes: int | None = None, title: str = "simulations", progress: bool = True
) -> None:
    """Run the jobs of all plans, one process each, ``n_processes`` at a time (default: one a core)."""
    require(n_processes=n_processes)
    jobs = [job for each in plans for job in each.jobs]
    folders = [path for each in plans for path in each.job_folders]
    _run(jobs, folders, n_processes or available_cores(), title, progress)


def choose_engine(engine: str, system, n_walkers: int = 1, compile: str | bool | None = None) -> str:
    """The engine that ``engine`` means for a system: ``auto`` is the faster one, torch where there is a GPU.

    On a CPU torch is faster only where it is compiled (``compile``, or ``system.compile``) and has work enough at a
    time. µs a step and walker on one core, OpenMM and compiled torch: alanine dipeptide, 24 walkers, 35 and 17; 6
    walkers, 35 and 54; hexapeptide, 8 walkers, 247 and 141. Compiling takes about 20 seconds; without it torch takes
    154, 462 and 705 µs. A `CustomGBForce` (implicit/obc1.xml and the like) OpenMM interprets: dipeptide AG, 8 walkers,
    3059 µs, and torch 919 (not compiled) or 90; 32 walkers, 35; compiling takes a minute.

    Raises UserError for an unknown engine, and for torch where the system's energy is not the torch energy.
    """
    if engine not in (*ENGINES, "auto"):
        raise UserError(f"Unknown engine '{engine}': choose one of {', '.join(ENGINES)}, auto.")
    has_torch = system.energy_backend == "torch"
    if engine == "torch" and not has_torch:
        raise UserError(f"{system.name} has energy_backend={system.energy_backend}, not torch: set engine=openmm.")
    if engine == "auto":
        if not has_torch:
            return "openmm"
        interpreted = any(isinstance(force, openmm.CustomGBForce) for force in system.openmm_system().getForces())
        compiled = (
            wants_compiling(system.compile if compile is None else compile)
            and n_walkers * system.n_atoms >= MIN_ATOMS_AT_A_TIME
        )
        return "torch" if torch.cuda.is_available() or interpreted or compiled else "openmm"
    return engine


def working_folder(folder: Path) -> Path:
    """Where the unfinished simulation of the dataset ``folder`` lives."""
    return Path(folder).with_name(f"{Path(folder).name}.unfinished")


def gather(system, folders: list[Path], output: Path) -> Dataset:
    """Make a dataset of the frames of the jobs in ``folders``, up to the time that all have reached."""
    jobs = [Job.load(path) for path in folders]
    for path in folders:
        check_frames(path)
    frames = [read_frames(path) for path in folders]
    end = min(f["time"][-1] for f in frames)
    frames = [f[: np.searchsorted(f["time"], end, side="right")] for f in frames]
    repeat = np.repeat([job.repeat for job in jobs], [len(f) for f in frames])
    columns = {name: np.concatenate([f[name] for f in frames]) for name in ("energy", "dihedral", "window", "time")}
    log_weights, extra = np.zeros(len(repeat)), {}
    if jobs[0].method == "umbrella":
        angle, window = columns["dihedral"], columns["window"]
        ring = _ring(jobs[0].options, jobs[0].temperature, angle)
        thin = np.random.default_rng(jobs[0].seed).permutation(len(angle))[:MBAR_MAX_FRAMES]
        log_weights = ring.log_weights(angle, window, ring.free_energies(angle[thin], window[thin]))
        extra["cut"] = ring.cut
    elif jobs[0].method == "metadynamics":
        weighed = [metadynamics.weigh(*each) for each in zip(jobs, folders, frames, strict=True)]
        log_weights = np.concatenate([log_w for log_w, _ in weighed])
        extra["bias_change"] = [round(change, 4) for _, change in weighed]
    elif jobs[0].method == "replica_exchange":
        options = jobs[0].options
        extra["ladder"] = [
            float(t) for t in temperature_ladder(jobs[0].temperature, options["max_temperature"], options["n_replicas"])
        ]
    order = np.argsort(columns["time"], kind="stable")
    starts = np.cumsum([0] + [len(f) for f in frames])
    return Dataset.write(
        output,
        (chunk[..., : system.dim] for chunk in _chunks(frames, starts, order)),
        columns["energy"][order],
        log_weights=log_weights[order],
        time=columns["time"][order],
        window=columns["window"][order],
        repeat=repeat[order],
        topology=None if system.exact else _pdb(system),
        meta={
            "system": system.identity,
            "settings": jobs[0].settings(len(jobs)),
            "engine": jobs[0].engine,
            "ps_per_walker": float(end),
            "cpu_seconds": round(sum(seconds_spent(path) for path in folders), 2),
            **extra,
            "versions": {name: version(name) for name in ("openmm", "torch", "pymbar", "numpy")},
            "date": date.today().isoformat(),
            "machine": _machine(jobs[0].engine),
        },
    )


def _machine(engine: str) -> str:
    if engine == "torch" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{machine.system()} {machine.machine()}, {os.cpu_count()} cores"


def result_of(dataset: Dataset, system, **options) -> SimulationResult:
    """ΔF of the system's state, profile and checks of its dataset, made with a bias.

    ``options`` go to `boltznce.data.umbrella.analyse` or `boltznce.data.result.of_walkers`. Raises UserError for other
    data, and for umbrella windows along another dihedral than the state's.
    """
    settings, state = dataset.meta["settings"], system.state
    columns = (dataset.window, dataset.time, dataset.repeat)
    require_reference(system, settings["method"], _name_of(system, settings["dihedral"]))
    if settings["method"] == "metadynamics":
        pairs = settings["options"]["bias_along"]
        names = {state.coordinate, *itertools.chain(*pairs)}
        coordinates = {name: system.coordinate(np.asarray(dataset.positions), name) for name in sorted(names)}
        options["limits"] = {name: ends for name in names if (ends := system.coordinate_range(name)) is not None}
        result = of_walkers(coordinates, dataset.log_weights, *columns, state=state, pairs=pairs, **options)
        change = max(dataset.meta["bias_change"])
        return dataclasses.replace(result, checks={**result.checks, "late change of the bias (kT)": change})
    angle = dihedral_angle(dataset.positions, settings["dihedral"])
    ring = _ring(settings["options"], settings["temperature"], angle)
    return umbrella.analyse(angle, *columns, ring=ring, state=state.interval, **options)


def require_reference(system, sampling: str, dihedral: str | None = None) -> None:
    """Raise UserError where sampling along ``dihedral`` (None: the state's) gives no reference of a state."""
    if sampling not in ("umbrella", "metadynamics", "auto"):
        raise UserError("A reference needs a bias along a dihedral: set sampling to umbrella or metadynamics.")
    if system.state is None:
        raise UserError(f"A reference is of a state, and {system.name} has none: set system.state, as [phi,[0.0,2.0]].")
    if sampling == "umbrella" and dihedral not in (None, system.state.coordinate):
        raise UserError(
            f"The state is one of {system.state.coordinate}, and the simulation along {dihedral}: set system.state to "
            f"one of {dihedral}, or leave settings.dihedral out."
        )


def force_evaluations(meta: dict) -> int:
    """How often the simulation in a dataset's ``meta`` has computed forces; 0 where nothing was simulated here."""
    settings = meta.get("settings") or {}
    if settings.get("method") not in SAMPLERS or "ps_per_walker" not in meta:
        return 0
    options = settings["options"]
    n_walkers = next((options[key] for key in ("n_windows", "n_replicas", "n_walkers") if key in options), 1)
    steps = (meta["ps_per_walker"] + options.get("bias_duration", 0.0) + settings["equilibration"]) / settings[
        "timestep"
    ]
    return settings["n_repeats"] * n_walkers * options.get("n_ladders", 1) * round(steps)


def _run(jobs: list[Job], folders: list[Path], n_processes: int, title: str, progress: bool) -> None:
    """Run every job in a process of its own, ``n_processes`` at a time; a failure or an interrupt ends them all."""
    waiting = list(folders)  # a finished job ends at once
    running: dict[Path, subprocess.Popen] = {}
    try:
        with tqdm(
            total=sum(job.total for job in jobs), desc=title, unit="ps", disable=not progress, mininterval=1.0
        ) as bar:
            while waiting or running:
                while waiting and len(running) < n_processes:
                    path = waiting.pop(0)
                    running[path] = _start(path)
                time.sleep(0.1)
                for path, process in list(running.items()):
                    if process.poll() is not None:
                        del running[path]
                        _raise_for(process.returncode, path)
                bar.update(sum(picoseconds_done(path) for path in folders) - bar.n)
            bar.update(bar.total - bar.n)
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def _start(folder: Path) -> subprocess.Popen:
    environment = {**os.environ, **ONE_PROCESS, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "boltznce.data.worker", str(folder), str(os.getpid())]
    with open(folder / "log", "w", encoding="utf-8") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)


def _raise_for(status: int, folder: Path) -> None:
    if status == 0:
        return
    message = (folder / "log").read_text(errors="replace", encoding="utf-8").strip()
    if status == 2 and message:
        raise UserError(message.splitlines()[-1])
    raise RuntimeError(f"{folder} ended with status {status}; run again to go on. Its log:\n{message[-2000:]}")


def _check(jobs: list[Job]) -> None:
    """Raise UserError for settings that cannot be run as they stand."""
    job = jobs[0]
    pairs = [
        ("duration", job.duration, "segment_length", job.segment_length),
        ("segment_length", job.segment_length, "frame_interval", job.frame_interval),
        ("frame_interval", job.frame_interval, "timestep", job.timestep),
    ]
    if step := job.options.get("exchange_interval"):
        pairs += [
            ("frame_interval", job.frame_interval, "exchange_interval", step),
            ("exchange_interval", step, "timestep", job.timestep),
        ]
    if step := job.options.get("hill_interval"):
        pairs += [
            ("bias_duration", job.options["bias_duration"], "segment_length", job.segment_length),
            ("segment_length", job.segment_length, "hill_interval", step),
            ("hill_interval", step, "timestep", job.timestep),
        ]
    for whole, a, part, b in pairs:
        if not b > 0 or round(a / b) < 1 or abs(a / b - round(a / b)) > 1e-6:
            raise UserError(f"{whole}={a} must be a multiple of {part}={b} (ps).")
    if job.options.get("max_temperature", math.inf) <= job.temperature:
        hottest = job.options["max_temperature"]
        raise UserError(f"max_temperature={hottest} must be above the system's {job.temperature} K.")
    if job.platform != "auto" and job.platform not in (names := _platforms()):
        raise UserError(f"There is no platform {job.platform!r}: choose auto or one of {', '.join(names)}.")


def _platforms() -> list[str]:
    return [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]


def _dihedral_atoms(system, name: str | None, required: bool) -> tuple[int, int, int, int] | None:
    name = name or (system.state.coordinate if system.state else None)
    if name is None and not required:
        return None
    return tuple(_atoms_of(system, name or next(iter(system.dihedrals), None)))


def _one_phi(system) -> bool:
    """Whether a bias on φ and ψ is all that a molecule needs, and its energy can move many walkers at once."""
    phis = [name for name in system.dihedrals if name.startswith("phi")]
    is_state = system.state is None or system.state.coordinate in phis
    return len(phis) == 1 and is_state and system.energy_backend == "torch"


def _biases(system, dihedral: str | None, given: Sequence | None) -> list[list[str]]:
    """Names of the coordinates of each bias: every φ with the ψ at its Cα, else another; or ``dihedral`` alone."""
    if given:
        return [list(given)] if isinstance(given[0], str) else [list(each) for each in given]
    if dihedral is not None:
        return [[dihedral]]
    if system.exact:
        return [[system.state.coordinate if system.state else "x"]]
    phis = [name for name in system.dihedrals if name.startswith("phi")]
    psis = [name for name in system.dihedrals if name.startswith("psi")]
    if not phis or (system.state and system.state.coordinate not in phis):
        phis = [system.state.coordinate if system.state else next(iter(system.dihedrals), None)]

    def beside(phi: str) -> list[str]:
        axis = set(_atoms_of(system, phi)[1:3])
        return sorted(psis, key=lambda psi: not axis & set(system.dihedrals[psi][1:3]))[:1]

    return [[phi, *beside(phi)] for phi in phis]


def _axes(system, bias_along: Sequence[Sequence[str]]) -> dict[str, list]:
    """What `boltznce.data.fourier_bias.Axis` makes the coordinates of."""
    if not system.exact:
        return {"coordinates": [[_atoms_of(system, name) for name in one] for one in bias_along]}
    axes = [[axis_of(system, name) for name in one] for one in bias_along]
    return {"coordinates": [[a for a, _ in one] for one in axes], "limits": [[ends for _, ends in one] for one in axes]}


def _name_of(system, atoms: Sequence[int] | None) -> str | None:
    return next((name for name, four in system.dihedrals.items() if list(four) == list(atoms or ())), None)


def _atoms_of(system, name: str | None) -> list[int]:
    if name not in system.dihedrals:
        choices = ", ".join(system.dihedrals) or "none here"
        raise UserError(
            f"A bias needs a dihedral: set dihedral (or bias_along) to one of {choices}, or sampling to langevin or "
            "replica_exchange."
        )
    return [int(atom) for atom in system.dihedrals[name]]


def _ring(options: dict, temperature: float, dihedral: np.ndarray) -> Ring:
    return Ring(options["n_windows"], options["kappa"], GAS_CONSTANT * temperature, largest_gap(dihedral))


def _chunks(
    frames: list[np.ndarray], starts: np.ndarray, order: np.ndarray, size: int = 50_000
) -> Iterator[np.ndarray]:
    """Positions of the concatenated ``frames`` in the given order, some at a time."""
    for part in np.array_split(order, max(1, -(-len(order) // size))):
        owner = np.searchsorted(starts, part, side="right") - 1
        chunk = np.empty((len(part), *frames[0]["positions"].shape[1:]), dtype=np.float32)
        for i, source in enumerate(frames):
            mine = owner == i
            chunk[mine] = source["positions"][part[mine] - starts[i]]
        yield chunk


def _pdb(system) -> str:
    ids = [(residue.id, residue.insertionCode) for residue in system.openmm_topology().residues()]
    return pdb_text(system.topology, system.positions.numpy(), ids)
