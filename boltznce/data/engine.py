"""What all simulations share: the job on disk, its frames, and a loop over segments that a kill cannot harm.

A simulation is cut into segments of fixed length. Each starts from the saved positions and velocities with random seeds
that depend only on (seed, repeat, segment): a run that was killed and continued gives the same frames.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import openmm
from filelock import FileLock, Timeout

from boltznce.errors import UserError
from boltznce.io import atomic_file, full_disk_is_a_user_error
from boltznce.units import GAS_CONSTANT

__all__ = [
    "Job",
    "Sampler",
    "Tick",
    "Unstable",
    "dihedral_angle",
    "frame_dtype",
    "named",
    "picoseconds_done",
    "read_frames",
    "run_job",
    "seconds_spent",
    "wrap",
]

LOCK_PATIENCE = 30.0  # s
PROGRESS_INTERVAL = 1.0  # s
Tick = Callable[[float], None]  # told the picoseconds that have passed
SAMPLERS = {
    "umbrella": "boltznce.data.umbrella:UmbrellaSampler",
    "replica_exchange": "boltznce.data.replica_exchange:ReplicaExchangeSampler",
    "langevin": "boltznce.data.langevin:LangevinSampler",
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One process's share of a simulation. Times in ps, temperature in K, masses in amu.

    ``duration`` is per window (umbrella), replica (replica exchange) or trajectory (Langevin), after the equilibration;
    ``options`` are the settings of the method alone.
    """

    method: str
    temperature: float
    seed: int
    repeat: int
    duration: float
    frame_interval: float
    segment_length: float
    equilibration: float
    timestep: float
    friction: float
    hydrogen_mass: float | None
    platform: str
    dihedral: tuple[int, int, int, int] | None = None
    options: dict = dataclasses.field(default_factory=dict)
    engine: str = "openmm"
    compile: str | bool = "auto"  # of the torch engine

    @property
    def kT(self) -> float:
        """kJ/mol."""
        return GAS_CONSTANT * self.temperature

    @property
    def total(self) -> float:
        """ps of a walker, equilibration included."""
        return self.equilibration + self.n_segments * self.segment_length

    @property
    def n_segments(self) -> int:
        return max(1, round(self.duration / self.segment_length))

    def rng(self, segment: int) -> np.random.Generator:
        """The random numbers of one segment; segment -1 is the equilibration."""
        return np.random.default_rng([self.seed, self.repeat, segment + 1])

    def save(self, folder: Path, system: openmm.System, positions: np.ndarray) -> None:
        """Write the job to ``folder``; another simulation there is refused, a shorter run of this one extended."""
        xml = openmm.XmlSerializer.serialize(system)
        path = folder / "job.json"
        if path.exists():
            old = Job.load(folder)
            names = [field.name for field in dataclasses.fields(self) if field.name != "duration"]
            changed = sorted(name for name in names if getattr(self, name) != getattr(old, name))
            if (folder / "system.xml").read_text() != xml:
                changed.append("the molecule or its force field")
            if changed:
                raise UserError(
                    f"{folder} holds an unfinished simulation with other settings ({', '.join(changed)}): "
                    "delete the folder to start anew, or restore the settings to continue."
                )
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("system.xml", xml), ("job.json", json.dumps(dataclasses.asdict(self), indent=1))):
            with atomic_file(folder / name) as temporary:
                temporary.write_text(text)
        if not (folder / "start.npy").exists():
            with atomic_file(folder / "start.npy") as temporary, open(temporary, "wb") as handle:
                np.save(handle, np.asarray(positions, dtype=np.float64))

    @classmethod
    def load(cls, folder: Path) -> "Job":
        description = json.loads((folder / "job.json").read_text())
        if description["dihedral"] is not None:
            description["dihedral"] = tuple(description["dihedral"])
        return cls(**description)


class Unstable(Exception):
    """Energies that are not finite."""


class Sampler(Protocol):
    """A method: K walkers, positions and velocities (K, n_atoms, 3) in nm and nm/ps; calls ``tick(ps)`` often."""

    def __init__(self, job: Job, system: openmm.System, start: np.ndarray) -> None: ...

    def equilibrate(self, rng: np.random.Generator, tick: Tick) -> tuple[np.ndarray, np.ndarray]:
        """Positions and velocities from which sampling starts."""

    def advance(
        self, positions: np.ndarray, velocities: np.ndarray, segment: int, rng: np.random.Generator, tick: Tick
    ) -> np.ndarray:
        """Move all walkers on by one segment, in place; return the frames (an array of ``frame_dtype``)."""


def named(path: str) -> Any:
    """What ``module:name`` names."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def frame_dtype(n_atoms: int) -> np.dtype:
    """One frame: mean-free positions (nm), energy (kT, no bias), dihedral (rad), window, time (ps)."""
    return np.dtype(
        [("positions", "f4", (n_atoms, 3)), ("energy", "f8"), ("dihedral", "f8"), ("window", "i4"), ("time", "f8")]
    )


def wrap(angle: np.ndarray) -> np.ndarray:
    """An angle in (-pi, pi]."""
    return np.pi - (np.pi - angle) % (2 * np.pi)


def dihedral_angle(positions: np.ndarray, atoms: tuple[int, int, int, int]) -> np.ndarray:
    """Dihedral (...,) in (-pi, pi] of ``positions`` (..., n_atoms, 3), IUPAC sign."""
    i, j, k, l = (positions[..., a, :].astype(np.float64) for a in atoms)  # noqa: E741
    b1, b2, b3 = j - i, k - j, l - k
    n1, n2 = np.cross(b1, b2), np.cross(b2, b3)
    return np.arctan2(np.linalg.norm(b2, axis=-1) * (b1 * n2).sum(-1), (n1 * n2).sum(-1))


def picoseconds_done(folder: Path) -> float:
    """How far the job of a folder is, equilibration included."""
    try:
        return float((folder / "progress").read_text())
    except FileNotFoundError:
        return 0.0


def read_frames(folder: Path) -> np.ndarray:
    """Frames saved so far, also by a running job: a memory-mapped array of ``frame_dtype``, ordered by time."""
    dtype = frame_dtype(np.load(folder / "start.npy", mmap_mode="r").shape[0])
    path = folder / "frames.bin"
    n = path.stat().st_size // dtype.itemsize if path.exists() else 0
    if n == 0:
        raise UserError(f"{folder} has no frames yet: let the simulation run on.")
    return np.memmap(path, dtype=dtype, mode="r", shape=(n,))


def run_job(folder: Path, alive: Callable[[], None] = lambda: None) -> None:
    """Start or continue the job of ``folder`` to its end. ``alive`` is called often and may raise to stop the run."""
    folder = Path(folder)
    job = Job.load(folder)
    system = openmm.XmlSerializer.deserialize((folder / "system.xml").read_text())
    with _only_process(folder, alive):
        sampler: Sampler = named(SAMPLERS[job.method])(job, system, np.load(folder / "start.npy"))
        try:
            _run_segments(folder, job, sampler, frame_dtype(system.getNumParticles()), alive)
        except Unstable as error:
            raise _unstable(folder) from error
        except openmm.OpenMMException as error:
            if "NaN" not in str(error):
                raise
            raise _unstable(folder) from error


def _run_segments(folder: Path, job: Job, sampler: Sampler, dtype: np.dtype, alive: Callable[[], None]) -> None:
    if (folder / "state.npz").exists():
        with np.load(folder / "state.npz") as state:
            done, n_frames = int(state["segment"]), int(state["n_frames"])
            positions, velocities = state["positions"], state["velocities"]
            spent = float(state["seconds"]) if "seconds" in state else 0.0
        started = time.process_time() - spent
    else:
        positions, velocities = sampler.equilibrate(job.rng(-1), _clock(folder, 0.0, alive))
        done, n_frames = 0, 0
        started = time.process_time()  # compiling and equilibration are not counted
        _save_state(folder, positions, velocities, done, n_frames, 0.0)

    tick = _clock(folder, job.equilibration + done * job.segment_length, alive)
    with full_disk_is_a_user_error(folder), open(folder / "frames.bin", "ab") as handle:
        handle.truncate(n_frames * dtype.itemsize)  # frames of a segment that a kill cut short
        for segment in range(done, job.n_segments):
            frames = sampler.advance(positions, velocities, segment, job.rng(segment), tick)
            if not (np.isfinite(frames["energy"]).all() and np.isfinite(frames["positions"]).all()):
                raise _unstable(folder)
            handle.write(frames.tobytes())
            handle.flush()
            os.fsync(handle.fileno())
            n_frames += len(frames)
            _save_state(folder, positions, velocities, segment + 1, n_frames, time.process_time() - started)


def _clock(folder: Path, elapsed: float, alive: Callable[[], None]) -> Tick:
    """A ``tick`` that asks whether to go on and tells the progress, about once a second."""
    told = -PROGRESS_INTERVAL

    def tick(picoseconds: float) -> None:
        nonlocal elapsed, told
        alive()
        elapsed += picoseconds
        if time.monotonic() - told > PROGRESS_INTERVAL:
            told = time.monotonic()
            with atomic_file(folder / "progress") as temporary:
                temporary.write_text(f"{elapsed:.6g}")

    return tick


def _unstable(folder: Path) -> UserError:
    return UserError(f"The simulation in {folder} became unstable: delete that folder and use a shorter timestep.")


@contextlib.contextmanager
def _only_process(folder: Path, alive: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a job's folder; wait a little for a killed run's process to end."""
    lock, deadline = FileLock(folder / "lock"), time.monotonic() + LOCK_PATIENCE
    while not lock.is_locked:
        alive()
        try:
            lock.acquire(timeout=0.2)
        except Timeout:
            if time.monotonic() > deadline:
                raise UserError(f"Another process is running the simulation in {folder}: wait for it.") from None
    try:
        yield
    finally:
        lock.release()


def seconds_spent(folder: Path) -> float:
    """CPU time of a job so far, from the end of the equilibration on; none in jobs older than this record."""
    with np.load(folder / "state.npz") as state:
        return float(state["seconds"]) if "seconds" in state else 0.0


def _save_state(
    folder: Path, positions: np.ndarray, velocities: np.ndarray, segment: int, n_frames: int, seconds: float
) -> None:
    with atomic_file(folder / "state.npz") as temporary, open(temporary, "wb") as handle:
        np.savez(
            handle, positions=positions, velocities=velocities, segment=segment, n_frames=n_frames, seconds=seconds
        )
