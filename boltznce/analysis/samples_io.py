"""Weighted samples on disk: a folder written by chunks, resumed after a kill, and checked when it is read."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import yaml

from boltznce.analysis.weights import log_importance_weights
from boltznce.errors import UserError
from boltznce.io import DATA_FORMAT, atomic_file, check_format, file_digest, full_disk_is_a_user_error

__all__ = ["WeightedSamplesWriter", "check_trajectory_format", "read_samples"]

_DTYPES = {"positions": "<f4", "energy": "<f8", "log_prob": "<f8", "log_weights": "<f8"}
_CHUNK = 8192  # samples held in memory while a trajectory is written
# the writer of each format, and how many of its units make a nm
_TRAJECTORIES = {"dcd": (mdtraj.formats.DCDTrajectoryFile, 10.0), "xtc": (mdtraj.formats.XTCTrajectoryFile, 1.0)}


def check_trajectory_format(format: str) -> None:
    """Raise UserError for a format of weighted samples that does not exist."""
    if format not in ("npy", *_TRAJECTORIES):
        raise UserError(f"Unknown format {format!r} of weighted samples: choose npy, {' or '.join(_TRAJECTORIES)}.")


class WeightedSamplesWriter:
    """Append samples to ``folder`` while it is under construction (``.<name>.partial`` beside it); `finish` renames it.

    After a kill, a writer opened with the same ``folder`` and ``meta`` goes on at ``n_written``: what the last,
    uncommitted append left behind is cut off. ``resume=False`` starts afresh. Memory holds one chunk.
    """

    def __init__(
        self,
        folder: str | Path,
        topology: mdtraj.Topology | None = None,
        meta: dict[str, Any] | None = None,
        resume: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self.topology = topology
        self.meta = json.loads(json.dumps(meta or {}, default=_plain))
        self._partial = self.folder.absolute().with_name(f".{self.folder.absolute().name}.partial")
        self._progress: dict[str, Any] = {"n": 0, "shape": None, "counts": {}, "meta": self.meta}
        if not resume:
            shutil.rmtree(self._partial, ignore_errors=True)
        if (self._partial / "progress.json").exists():
            self._progress = json.loads((self._partial / "progress.json").read_text())
        if self._progress["meta"] != self.meta:
            raise UserError(f"{self._partial} was begun with other settings: delete it, or go on with those.")
        self._partial.mkdir(parents=True, exist_ok=True)

    @property
    def n_written(self) -> int:
        """Number of samples safely on disk."""
        return self._progress["n"]

    @property
    def counts(self) -> dict[str, int]:
        """Sums of the counts given with each chunk so far; they end up in ``meta["counts"]``."""
        return dict(self._progress["counts"])

    def append(
        self,
        positions: np.ndarray,
        energy: np.ndarray,
        log_prob: np.ndarray,
        log_weights: np.ndarray | None = None,
        counts: dict[str, int] | None = None,
    ) -> None:
        """Add a chunk: positions (m, atoms, dim) in nm, three arrays (m,), and ``counts`` to be summed up.

        ``log_weights`` default to `log_importance_weights`. The chunk is safe once this has returned.
        """
        log_weights = log_importance_weights(energy, log_prob) if log_weights is None else log_weights
        chunk = zip(_DTYPES.items(), (positions, energy, log_prob, log_weights), strict=True)
        arrays = {name: np.ascontiguousarray(values, dtype=dtype) for (name, dtype), values in chunk}
        (n, *shape), *others = shapes = [values.shape for values in arrays.values()]
        if shape != (self._progress["shape"] or shape) or any(other != (n,) for other in others):
            raise UserError(f"Samples of one shape are needed in {self.folder}: got {shapes} after {self._progress}.")
        with full_disk_is_a_user_error(self.folder):
            for name, values in arrays.items():
                _write_rows(self._partial / f"{name}.npy", values, self.n_written)
        total = {name: self.counts.get(name, 0) + value for name, value in (counts or {}).items()}
        self._progress |= {"n": self.n_written + n, "shape": shape, "counts": self.counts | total}
        with atomic_file(self._partial / "progress.json") as path:
            path.write_text(json.dumps(self._progress))

    def finish(self, format: str = "npy") -> Path:
        """Write topology, trajectory (``dcd``, ``xtc``) and ``meta.yaml`` with digests; rename; return the folder."""
        if self.n_written == 0:
            raise UserError(f"No samples were written to {self.folder}: draw some before finishing it.")
        check_trajectory_format(format)
        with full_disk_is_a_user_error(self.folder):
            positions = np.load(self._partial / "positions.npy", mmap_mode="r")
            names = [f"{name}.npy" for name in _DTYPES]
            if self.topology is not None:
                _write_topology(self._partial / "topology.pdb", positions[0], self.topology)
                names.append("topology.pdb")
            if format != "npy":
                _write_trajectory(self._partial / f"trajectory.{format}", positions)
                names.append(f"trajectory.{format}")
            del positions
            digests = {name: file_digest(self._partial / name) for name in names}
            meta = self.meta | ({"counts": self.counts} if self.counts else {})
            contents = {"format": DATA_FORMAT, "n_samples": self.n_written, "shape": self._progress["shape"]}
            contents |= {"digests": digests, "meta": meta}
            (self._partial / "meta.yaml").write_text(yaml.safe_dump(contents, sort_keys=False))
            shutil.rmtree(self.folder, ignore_errors=True)
            os.replace(self._partial, self.folder)
            for leftover in ("progress.json", ".progress.json.*.tmp"):  # last: a kill before this loses nothing
                for path in self.folder.glob(leftover):
                    path.unlink()
        return self.folder


def read_samples(folder: str | Path, verify: bool = True) -> dict[str, Any]:
    """Contents of a folder of weighted samples: arrays (positions memory-mapped), ``topology`` (or None), ``meta``.

    Sizes are always checked, digests if ``verify``; UserError names the file that does not fit.
    """
    folder = Path(folder)
    remedy = "restore it from a copy, or delete the folder and draw the samples again"
    try:
        contents = yaml.safe_load((folder / "meta.yaml").read_text())
        check_format(contents.get("format"), DATA_FORMAT, folder)
        n, shape, digests = contents["n_samples"], tuple(contents["shape"]), contents["digests"]
        result: dict[str, Any] = {"meta": contents["meta"], "topology": None}
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no weighted samples (there is no meta.yaml): give the folder that samples were saved to."
        ) from None
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        raise UserError(f"{folder / 'meta.yaml'} is damaged: {remedy}.") from None
    shapes = {name: (n, *shape) if name == "positions" else (n,) for name in _DTYPES}
    for file_name, digest in digests.items():
        path = folder / file_name
        if not path.exists():
            raise UserError(f"{path} is missing: {remedy}.")
        if path.stem in shapes:
            try:
                result[path.stem] = np.load(path, mmap_mode="r" if path.stem == "positions" else None)
            except (ValueError, OSError, EOFError):
                raise UserError(f"{path} is truncated or damaged: {remedy}.") from None
            if result[path.stem].shape != shapes[path.stem]:
                raise UserError(f"{path} has shape {result[path.stem].shape}, not {shapes[path.stem]}: {remedy}.")
        if verify and file_digest(path) != digest:
            raise UserError(f"{path} is damaged (its digest does not fit meta.yaml): {remedy}.")
    if "topology.pdb" in digests:
        result["topology"] = mdtraj.load_pdb(folder / "topology.pdb", standard_names=False).topology
    return result


def _write_rows(path: Path, values: np.ndarray, start: int) -> None:
    """Write ``values`` from row ``start`` on, cut the file behind them, and bring the header up to date.

    numpy pads the header of an .npy file so that its length does not depend on the number of rows.
    """
    with open(path, "r+b" if path.exists() else "w+b") as handle:
        shape = (start + len(values), *values.shape[1:])
        header = {"descr": values.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(handle, header)
        handle.seek(start * values.dtype.itemsize * int(np.prod(shape[1:])), os.SEEK_CUR)
        handle.write(values.data)
        handle.truncate()
        handle.flush()
        os.fsync(handle.fileno())


def _plain(value: Any) -> Any:
    """A numpy scalar or array as plain numbers, anything else as a string."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else str(value)


def _write_topology(path: Path, positions: np.ndarray, topology: mdtraj.Topology) -> None:
    frame = np.clip(np.nan_to_num(positions), -99.0, 99.0)  # the columns of a PDB file hold no more
    mdtraj.Trajectory(frame[None], topology).save_pdb(str(path))


def _write_trajectory(path: Path, positions: np.ndarray) -> None:
    if positions.shape[2] != 3:
        raise UserError(f"A {path.suffix[1:]} trajectory holds three-dimensional positions: use format=npy.")
    opener, scale = _TRAJECTORIES[path.suffix[1:]]
    with opener(str(path), "w") as trajectory:
        for start in range(0, len(positions), _CHUNK):
            trajectory.write(np.ascontiguousarray(positions[start : start + _CHUNK] * np.float32(scale)))
