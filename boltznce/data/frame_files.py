"""Frames in files of others, some at a time: trajectories that mdtraj reads, and arrays of numpy."""

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import mdtraj
import numpy as np
from mdtraj import open as open_trajectory

from boltznce.errors import UserError

__all__ = ["LENGTH_UNITS", "Chunk", "FrameFile", "open_frames", "read_column", "read_topology"]

ARRAYS = (".npy", ".npz")
TIMED = (".xtc", ".trr", ".nc", ".ncdf", ".netcdf", ".h5", ".hdf5")  # whose frames have times
TRAJECTORIES = (".dcd", *TIMED, ".pdb")
WITH_TOPOLOGY = (".pdb", ".h5", ".hdf5")
LENGTH_UNITS: dict[Any, Any] = {"nm": 1.0, "angstrom": 0.1}  # in nm
SMALLEST_BOX = 0.5  # nm: what programs write where there is none is smaller


class Chunk(NamedTuple):
    """Positions (n, n_atoms, 3) in nm, float32; times (n,) in ps, or frame numbers; boxes (n, 3, 3) in nm or None."""

    positions: np.ndarray
    time: np.ndarray
    box: np.ndarray | None


class FrameFile(Protocol):
    """A file of ``n_frames`` frames of ``n_atoms`` atoms; ``timed``: whether it tells their times."""

    @property
    def path(self) -> Path: ...

    @property
    def n_frames(self) -> int: ...

    @property
    def n_atoms(self) -> int: ...

    @property
    def timed(self) -> bool: ...

    def chunks(self, size: int, atoms: np.ndarray) -> Iterator[Chunk]:
        """All frames in order, ``size`` at a time, the positions of ``atoms`` in their order."""


@dataclass(frozen=True)
class Trajectory:
    path: Path
    n_frames: int
    n_atoms: int
    topology: mdtraj.Topology

    @property
    def timed(self) -> bool:
        return self.path.suffix.lower() in TIMED

    def chunks(self, size: int, atoms: np.ndarray) -> Iterator[Chunk]:
        kept = np.sort(atoms)
        order = np.searchsorted(kept, atoms)
        parts = mdtraj.iterload(str(self.path), chunk=size, top=self.topology, atom_indices=kept)
        while True:
            with _told(self.path):
                part = next(parts, None)
            if part is None:
                return
            box = part.unitcell_vectors
            if box is not None and not (np.linalg.norm(box, axis=-1) > SMALLEST_BOX).all():
                box = None
            yield Chunk(part.xyz[:, order], np.asarray(part.time, dtype=np.float64), box)


@dataclass(frozen=True)
class Array:
    path: Path
    positions: np.ndarray  # (n, n_atoms, 3), memory-mapped where it can be
    unit: float
    timed: bool = False

    @property
    def n_frames(self) -> int:
        return len(self.positions)

    @property
    def n_atoms(self) -> int:
        return self.positions.shape[1]

    def chunks(self, size: int, atoms: np.ndarray) -> Iterator[Chunk]:
        for start in range(0, self.n_frames, size):
            part = self.positions[start : start + size][:, atoms] * np.float32(self.unit)
            yield Chunk(part.astype(np.float32), np.arange(start, start + len(part), dtype=np.float64), None)


def open_frames(
    path: Path | str, topology: mdtraj.Topology, key: str | None = None, length_unit: str | float = "nm"
) -> FrameFile:
    """A file of frames by its ending.

    Args:
        topology: of all its atoms.
        key: which array of an .npz file; None: the only one.
        length_unit: of arrays, "nm", "angstrom" or a number of nm; trajectories have that of their format.

    Raises UserError for what cannot be read, has another number of atoms, or no frames.
    """
    path = _existing(path, "files")
    ending = path.suffix.lower()
    file: FrameFile
    if ending in ARRAYS:
        file = Array(path, _positions(path, key), LENGTH_UNITS.get(length_unit, length_unit))
    elif ending in TRAJECTORIES:
        if length_unit != "nm":
            raise UserError(f"length_unit={length_unit} is for {', '.join(ARRAYS)}: {path} has the unit of its format.")
        _require_reader(path)
        with _told(path), open_trajectory(str(path)) as handle:
            n_atoms = (handle.positions if ending == ".pdb" else handle.read(n_frames=1)[0]).shape[1]
            file = Trajectory(path, len(handle), n_atoms, topology)
    else:
        raise UserError(f"{path} is none of {', '.join((*TRAJECTORIES, *ARRAYS))}: convert it to one of these.")
    if file.n_atoms != topology.n_atoms:
        raise UserError(
            f"{path} has {file.n_atoms} atoms and its topology {topology.n_atoms}: set topology= to a file of exactly "
            "the atoms that it has, in their order."
        )
    if not file.n_frames:
        raise UserError(f"{path} has no frames: leave it out of files.")
    return file


def read_topology(path: Path | str | None, first: Path | str) -> mdtraj.Topology:
    """The topology in a file that mdtraj reads; that of the ``first`` trajectory where there is none.

    Raises UserError for what cannot be read, and for trajectories that have none.
    """
    if path is None:
        if Path(first).suffix.lower() not in WITH_TOPOLOGY:
            raise UserError(
                f"{first} does not say which atoms it has: set topology= to a PDB file of all of them, in their order."
            )
        path = first
    path = _existing(path, "topology")
    _require_reader(path)
    with _told(path):
        return mdtraj.load_topology(str(path))


def read_column(path: Path | str, setting: str) -> np.ndarray:
    """Numbers (n,), float64, of a file .npy or of a text; raises UserError for anything else.

    ``setting`` is what it was given for.
    """
    path = _existing(path, setting)
    try:
        values = np.load(path, allow_pickle=False) if path.suffix.lower() == ".npy" else np.loadtxt(path, ndmin=1)
        values = np.asarray(values, dtype=np.float64).squeeze()
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{setting}={path} cannot be read ({error}): give .npy, or text, a number a line.") from error
    if values.ndim > 1:
        raise UserError(f"{setting}={path} has {values.shape} numbers: give one column, a number for each frame.")
    return np.atleast_1d(values)


def _positions(path: Path, key: str | None) -> np.ndarray:
    """Positions (n, n_atoms, 3) of an array, flat or not; raises UserError for anything else."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(found, np.lib.npyio.NpzFile):
            names = found.files
            if key not in names and not (key is None and len(names) == 1):
                raise UserError(f"{path} has the arrays {', '.join(names)}: set key= to that of the positions.")
            found = found[key or names[0]]
    except UserError:
        raise
    except Exception as error:  # zipfile and numpy have no common class of error for what is no array
        raise UserError(
            f"{path} cannot be read as an array of numbers ({error}): save the positions alone, by numpy.save."
        ) from error
    if found.ndim == 2 and found.shape[1] % 3 == 0:
        found = found.reshape(len(found), -1, 3)
    if found.ndim != 3 or found.shape[2] != 3 or found.dtype.kind != "f":
        raise UserError(
            f"{path} has shape {found.shape} of {found.dtype}: give positions (n_frames, n_atoms, 3), or "
            "(n_frames, n_atoms * 3), of floating-point numbers."
        )
    return found


def _existing(path: Path | str, setting: str) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"There is no file {path}: correct {setting}=.")
    return path


def _require_reader(path: Path) -> None:
    if path.suffix.lower() in (".h5", ".hdf5") and importlib.util.find_spec("tables") is None:
        raise UserError(f'{path} needs PyTables: pip install "boltznce[hdf5]", or convert it to DCD or XTC.')


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """A block in which mdtraj reads: no warnings, and its errors, which have no common class, as UserErrors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} cannot be read ({reason}): write it again.") from error
