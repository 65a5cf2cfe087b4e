"""What all simulations share: the job on disk, its frames, and a loop over segments that a kill cannot harm.

A simulation is cut into segments of fixed length. Each starts from the saved positions and velocities with random seeds
that depend only on (seed, repeat, segment): a run that was killed and continued gives the same frames.
"""

import abc
import contextlib
import dataclasses
import importlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from xml.etree.ElementTree import ParseError

import numpy as np
import openmm
from filelock import FileLock, Timeout

from boltznce.data.plane import definition, system_of
from boltznce.errors import UserError
from boltznce.io import atomic_file, disk_errors_told
from boltznce.records import damaged, read_archive, read_array, read_json, sealed
from boltznce.systems.identity import openmm_digest
from boltznce.systems.toy import PlaneSystem
from boltznce.units import GAS_CONSTANT

__all__ = [
    "Job",
    "Sampler",
    "Tick",
    "Unstable",
    "check_frames",
    "dihedral_angle",
    "frame_dtype",
    "named",
    "picoseconds_done",
    "read_frames",
    "read_state",
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
    "metadynamics": "boltznce.data.metadynamics:MetadynamicsSampler",
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One process's share of a simulation. Times in ps, temperature in K, masses in amu.

    ``duration`` is per window (umbrella), replica (replica exchange) or walker (Langevin, metadynamics), after the
    equilibration and what ``options``, the settings of the method alone, call ``bias_duration``.
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
    dihedral: tuple[int, int, int, int] | Any = None  # of the methods that have one
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
        return max(1, round((self.options.get("bias_duration", 0.0) + self.duration) / self.segment_length))

    def rng(self, segment: int) -> np.random.Generator:
        """The random numbers of one segment; segment -1 is the equilibration."""
        return np.random.default_rng([self.seed, self.repeat, segment + 1])

    def settings(self, n_repeats: int) -> dict:
        """What the distribution of the frames of so many repeats depends on, in types that YAML keeps."""
        settings = json.loads(json.dumps(dataclasses.asdict(self)))
        for name in ("repeat", "platform", "engine", "compile"):
            del settings[name]
        return {**settings, "n_repeats": n_repeats}

    def save(self, folder: Path, system: openmm.System | PlaneSystem, positions: np.ndarray) -> None:
        """Write the job to ``folder``; another simulation there is refused, a shorter run of this one extended."""
        if isinstance(system, PlaneSystem):
            file, text = "plane.json", definition(system)
        else:
            file, text = "system.xml", openmm.XmlSerializer.serialize(system)
        if (folder / "job.json").exists():
            old = Job.load(folder)
            names = [field.name for field in dataclasses.fields(self) if field.name != "duration"]
            changed = [
                f"{name}: {getattr(old, name)}, not {getattr(self, name)}"
                for name in names
                if getattr(self, name) != getattr(old, name)
            ]
            if not _same_energy(folder / file, text):
                changed.append("another molecule or force field")
            if changed:
                raise UserError(
                    f"{folder} holds an unfinished simulation with other settings ({'; '.join(changed)}): "
                    "delete the folder to start anew, or restore the settings to continue."
                )
        folder.mkdir(parents=True, exist_ok=True)
        for name, contents in ((file, text), ("job.json", json.dumps(sealed(dataclasses.asdict(self)), indent=1))):
            with atomic_file(folder / name) as temporary:
                temporary.write_text(contents, encoding="utf-8")
        if not (folder / "state.npz").exists():  # later only its shape is read
            with atomic_file(folder / "start.npy") as temporary, open(temporary, "wb") as handle:
                np.save(handle, np.asarray(positions, dtype=np.float64))

    @classmethod
    def load(cls, folder: Path) -> "Job":
        """The job of a folder; raises UserError for one that is damaged or of another version."""
        description = read_json(folder / "job.json", _remedy(folder))
        try:
            if description["dihedral"] is not None:
                description["dihedral"] = tuple(description["dihedral"])
            return cls(**description)
        except (KeyError, TypeError) as error:
            raise damaged(folder / "job.json", "it has other entries than a job", _remedy(folder)) from error


def _same_energy(path: Path, text: str) -> bool:
    """Whether the file has the energy of a serialized System, by whatever version of OpenMM it was written."""
    try:
        if path.suffix == ".json":
            return path.read_text(encoding="utf-8") == text
        return openmm_digest(path.read_text(encoding="utf-8")) == openmm_digest(text)
    except (OSError, UnicodeDecodeError, ParseError):
        return False


class Unstable(Exception):
    """Energies that are not finite."""


class Sampler(abc.ABC):
    """A method: K walkers, positions and velocities (K, n_atoms, 3) in nm and nm/ps; calls ``tick(ps)`` often.

    ``memory``: arrays beside these from which a run goes on; set before it does.
    """

    memory: Mapping[str, np.ndarray] = MappingProxyType({})

    @abc.abstractmethod
    def __init__(self, job: Job, system: openmm.System | PlaneSystem, start: np.ndarray) -> None: ...

    @abc.abstractmethod
    def equilibrate(self, rng: np.random.Generator, tick: Tick) -> tuple[np.ndarray, np.ndarray]:
        """Positions and velocities from which sampling starts."""

    @abc.abstractmethod
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
        return float((folder / "progress").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # a bar shows it, and nothing else depends on it
        return 0.0


def read_frames(folder: Path) -> np.ndarray:
    """Frames saved so far, also by a running job: a memory-mapped array of ``frame_dtype``, ordered by time."""
    dtype, path = frame_dtype(_start(folder).shape[0]), folder / "frames.bin"
    n = path.stat().st_size // dtype.itemsize if path.exists() else 0
    if n == 0:
        raise UserError(f"{folder} has no frames yet: let the simulation run on.")
    return np.memmap(path, dtype=dtype, mode="r", shape=(n,))


def check_frames(folder: Path) -> None:
    """Raise UserError where the frames of a folder are fewer than its state says, or not what was written."""
    folder = Path(folder)
    state = read_state(folder, {"n_frames?": (), "crc?": ()})
    if "n_frames" not in state:
        return
    path, n_bytes = folder / "frames.bin", int(state["n_frames"]) * frame_dtype(_start(folder).shape[0]).itemsize
    if n_bytes > (path.stat().st_size if path.is_file() else 0):
        raise damaged(path, "it is shorter than state.npz says", _remedy(folder))
    if "crc" in state and _crc(path, n_bytes) != int(state["crc"]):
        raise damaged(path, "it is not what was written", _remedy(folder))


def run_job(folder: Path, alive: Callable[[], None] = lambda: None) -> None:
    """Start or continue the job of ``folder`` to its end. ``alive`` is called often and may raise to stop the run."""
    folder = Path(folder)
    job = Job.load(folder)
    system = _read_system(folder)
    with _only_process(folder, alive):
        check_frames(folder)  # before anything is cut off or added
        sampler: Sampler = named(SAMPLERS[job.method])(job, system, np.array(_start(folder)))
        try:
            _run_segments(folder, job, sampler, frame_dtype(_start(folder).shape[0]), alive)
        except Unstable as error:
            raise _unstable(folder) from error
        except openmm.OpenMMException as error:
            if "NaN" not in str(error):
                raise
            raise _unstable(folder) from error


def _read_system(folder: Path) -> openmm.System | PlaneSystem:
    in_plane = (folder / "plane.json").exists()
    path, read = folder / ("plane.json" if in_plane else "system.xml"), openmm.XmlSerializer.deserialize
    try:
        return (system_of if in_plane else read)(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, UserError, openmm.OpenMMException) as error:
        raise damaged(path, "it cannot be read", _remedy(folder)) from error


def _run_segments(folder: Path, job: Job, sampler: Sampler, dtype: np.dtype, alive: Callable[[], None]) -> None:
    state = _load_state(folder)
    if state is not None:
        done, n_frames, crc = int(state["segment"]), int(state["n_frames"]), int(state.get("crc", -1))
        positions, velocities = state["positions"], state["velocities"]
        started = time.process_time() - float(state.get("seconds", 0.0))
        if crc < 0:  # begun by an older version
            crc = _crc(folder / "frames.bin", n_frames * dtype.itemsize)
        if sampler.memory:
            sampler.memory = read_state(folder, {name: array.shape for name, array in sampler.memory.items()})
    else:
        positions, velocities = sampler.equilibrate(job.rng(-1), _clock(folder, 0.0, alive))
        done, n_frames, crc = 0, 0, 0
        started = time.process_time()  # compiling and equilibration are not counted
        _save_state(folder, positions, velocities, done, n_frames, 0.0, crc, sampler.memory)

    tick = _clock(folder, job.equilibration + done * job.segment_length, alive)
    with disk_errors_told(folder), open(folder / "frames.bin", "ab") as handle:
        handle.truncate(n_frames * dtype.itemsize)  # frames of a segment that a kill cut short
        for segment in range(done, job.n_segments):
            frames = sampler.advance(positions, velocities, segment, job.rng(segment), tick)
            if not (np.isfinite(frames["energy"]).all() and np.isfinite(frames["positions"]).all()):
                raise _unstable(folder)
            handle.write(written := frames.tobytes())
            handle.flush()
            os.fsync(handle.fileno())
            n_frames, crc = n_frames + len(frames), zlib.crc32(written, crc)
            seconds = time.process_time() - started
            _save_state(folder, positions, velocities, segment + 1, n_frames, seconds, crc, sampler.memory)


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
                temporary.write_text(f"{elapsed:.6g}", encoding="utf-8")

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
    return float(read_state(folder, {"seconds?": ()}).get("seconds", 0.0))


def _remedy(folder: Path) -> str:
    return f"delete {folder}, and this simulation starts anew"


def _start(folder: Path) -> np.ndarray:
    return read_array(folder / "start.npy", _remedy(folder), (None, 3), "f8", mmap=True)


def _load_state(folder: Path) -> dict[str, np.ndarray] | None:
    """What `_save_state` wrote last; None before anything."""
    walkers = (None, _start(folder).shape[0], 3)
    shapes = {"positions": walkers, "velocities": walkers, "segment": (), "n_frames": (), "seconds?": (), "crc?": ()}
    return read_state(folder, shapes) or None


def read_state(folder: Path, shapes: dict[str, tuple]) -> dict[str, np.ndarray]:
    """Arrays of these names and shapes that were kept at the last segment's end; "?": older versions had none."""
    path = folder / "state.npz"
    return read_archive(path, _remedy(folder), shapes) if path.exists() else {}


def _crc(path: Path, n_bytes: int) -> int:
    """CRC-32 of the first bytes of a file."""
    crc = 0
    if not n_bytes:
        return crc
    with open(path, "rb") as handle:
        while n_bytes and (chunk := handle.read(min(n_bytes, 2**24))):
            crc, n_bytes = zlib.crc32(chunk, crc), n_bytes - len(chunk)
    return crc


def _save_state(
    folder: Path,
    positions: np.ndarray,
    velocities: np.ndarray,
    segment: int,
    n_frames: int,
    seconds: float,
    crc: int,
    memory: Mapping[str, Any],
) -> None:
    state: dict[str, Any] = {"positions": positions, "velocities": velocities, "segment": segment, "n_frames": n_frames}
    with atomic_file(folder / "state.npz") as temporary, open(temporary, "wb") as handle:
        np.savez(handle, **state, seconds=seconds, crc=crc, **memory)
