"""Weighted samples on disk: a folder written by chunks, resumed after a kill, and checked when it is read."""

import json
import os
import zlib
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import yaml

from boltznce.analysis.weights import log_importance_weights
from boltznce.errors import UserError
from boltznce.folders import Kind, claim, discard, hold
from boltznce.io import (
    DATA_FORMAT,
    atomic_file,
    check_format,
    disk_errors_told,
    file_digest,
    is_temporary,
    put_in_place,
)
from boltznce.records import damaged, read_array, read_json, read_yaml, sealed
from boltznce.topologies import from_json, pdb_text, to_json

__all__ = ["SAMPLES", "WeightedSamplesWriter", "check_trajectory_format", "read_samples"]

_REMEDY = "restore it from a copy, or delete the folder and draw the samples again"
_DTYPES = {"positions": "<f4", "energy": "<f8", "log_prob": "<f8", "log_weights": "<f8", "ancestors": "<i8"}
_OPTIONAL = "ancestors"
_EXTRAS = ("topology.pdb", "topology.json", "trajectory.dcd", "trajectory.xtc")
_CHUNK = 8192  # samples held in memory while a trajectory is written
# the writer of each format, and how many of its units make a nm
_TRAJECTORIES = {"dcd": (mdtraj.formats.DCDTrajectoryFile, 10.0), "xtc": (mdtraj.formats.XTCTrajectoryFile, 1.0)}

SAMPLES = Kind(
    "weighted samples", "meta.yaml", frozenset({"n_samples", "shape", "digests"}), r"subset\.npy|progress\.json", True
)
_UNFINISHED = Kind(
    "unfinished weighted samples",
    names=rf"({'|'.join(_DTYPES)})\.npy|progress\.json|topology\.pdb|meta\.yaml|trajectory\.({'|'.join(_TRAJECTORIES)})",
    whole=True,
)


def check_trajectory_format(format: str, dim: int = 3) -> None:
    """Raise UserError for a format of weighted samples that does not exist, or is not for positions of ``dim``."""
    if format not in ("npy", *_TRAJECTORIES):
        raise UserError(f"Unknown format {format!r} of weighted samples: choose npy, {' or '.join(_TRAJECTORIES)}.")
    if format != "npy" and dim != 3:
        raise UserError(f"A {format} trajectory holds three-dimensional positions: use format=npy.")


class WeightedSamplesWriter:
    """Append samples to ``folder`` while it is under construction (``.<name>.partial`` beside it); `finish` renames it.

    After a kill, a writer opened with the same ``folder`` and ``meta`` goes on at ``n_written``: what the last,
    uncommitted append left behind is cut off. ``resume=False`` starts afresh. Memory holds one chunk.

    Raises UserError for a folder that has anything else in it, one that another process writes, and for files that are
    shorter than what has been recorded of them.
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
        self._progress: dict[str, Any] = {"n": 0, "shape": None, "counts": {}, "meta": self.meta, "crc": {}}
        claim(self.folder, SAMPLES)
        claim(self._partial, _UNFINISHED)
        self._held = hold(self.folder, beside=True)
        if not resume:
            discard(self._partial, _UNFINISHED)
        if (self._partial / "progress.json").exists():
            self._progress |= self._read_progress()
        elif (self._partial / "meta.yaml").exists():  # all that was missing is its new name
            self._progress |= _progress(read_yaml(self._partial / "meta.yaml", f"delete {self._partial}"))
        if self._progress["meta"] != self.meta:
            self._held.release()
            raise UserError(f"{self._partial} was begun with other settings or weights: delete it, or use those.")
        with disk_errors_told(self.folder):
            self._partial.mkdir(parents=True, exist_ok=True)

    def _read_progress(self) -> dict[str, Any]:
        """What is recorded, after a look at the arrays: what is said to be safe must be there, and what was written."""
        remedy = f"delete {self._partial}, and the samples are drawn anew"
        progress = read_json(self._partial / "progress.json", remedy)
        if not {"n", "shape", "counts", "meta"} <= set(progress):
            raise damaged(self._partial / "progress.json", "it lacks an entry", remedy)
        shapes = {name: (progress["shape"] or []) if name == "positions" else [] for name in _DTYPES}
        for name, crc in progress.get("crc", {}).items():
            path, dtype = self._partial / f"{name}.npy", np.dtype(_DTYPES[name])
            n_bytes = progress["n"] * dtype.itemsize * int(np.prod(shapes[name]))
            if _crc(path, n_bytes) != crc:
                raise damaged(path, "it is shorter than its record says, or not what was written", remedy)
        return progress

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
        ancestors: np.ndarray | None = None,
        counts: dict[str, int] | None = None,
    ) -> None:
        """Add a chunk: positions (m, atoms, dim) in nm, arrays (m,), and ``counts`` to be summed up.

        ``log_weights`` default to `log_importance_weights`; every chunk has ancestors, or none has. The chunk is safe
        once this has returned.
        """
        log_weights = log_importance_weights(energy, log_prob) if log_weights is None else log_weights
        chunk = zip(_DTYPES.items(), (positions, energy, log_prob, log_weights, ancestors), strict=True)
        arrays = {
            name: np.ascontiguousarray(values, dtype=dtype) for (name, dtype), values in chunk if values is not None
        }
        (n, *shape), *others = shapes = [values.shape for values in arrays.values()]
        if shape != (self._progress["shape"] or shape) or any(other != (n,) for other in others):
            raise UserError(f"Samples of one shape are needed in {self.folder}: got {shapes} after {self._progress}.")
        with disk_errors_told(self.folder):
            for name, values in arrays.items():
                _write_rows(self._partial / f"{name}.npy", values, self.n_written)
        crc = self._progress["crc"]
        bytes_of = {name: values.reshape(-1).view("u1").data for name, values in arrays.items()}
        crc = {name: zlib.crc32(each, crc.get(name, 0)) for name, each in bytes_of.items()}
        total = {name: self.counts.get(name, 0) + value for name, value in (counts or {}).items()}
        self._progress |= {"n": self.n_written + n, "shape": shape, "counts": self.counts | total, "crc": crc}
        with atomic_file(self._partial / "progress.json") as path:
            path.write_text(json.dumps(sealed(self._progress)), encoding="utf-8")

    def finish(self, format: str = "npy") -> Path:
        """Write topology, trajectory (``dcd``, ``xtc``) and ``meta.yaml`` with digests; rename; return the folder."""
        if self.n_written == 0:
            raise UserError(f"No samples were written to {self.folder}: draw some before finishing it.")
        check_trajectory_format(format, self._progress["shape"][-1])
        with disk_errors_told(self.folder):
            positions = np.load(self._partial / "positions.npy", mmap_mode="r")
            names = [f"{name}.npy" for name in _DTYPES if name in self._progress["crc"]]
            if self.topology is not None:
                (self._partial / "topology.pdb").write_text(pdb_text(self.topology, positions[0]), encoding="utf-8")
                (self._partial / "topology.json").write_text(to_json(self.topology), encoding="utf-8")
                names += ["topology.pdb", "topology.json"]
            if format != "npy":
                _write_trajectory(self._partial / f"trajectory.{format}", positions)
                names.append(f"trajectory.{format}")
            del positions
            digests = {name: file_digest(self._partial / name) for name in names}
            meta = self.meta | ({"counts": self.counts} if self.counts else {})
            contents = {"format": DATA_FORMAT, "n_samples": self.n_written, "shape": self._progress["shape"]}
            contents |= {"digests": digests, "meta": meta}
            with atomic_file(self._partial / "meta.yaml") as path:
                path.write_text(yaml.safe_dump(sealed(contents), sort_keys=False), encoding="utf-8")
            for path in self._partial.iterdir():  # meta.yaml has it all from now on
                if path.name == "progress.json" or is_temporary(path.name):
                    path.unlink()
            claim(self.folder, SAMPLES)
            put_in_place(self._partial, self.folder)
        self._held.release()
        return self.folder


def read_samples(folder: str | Path, verify: bool = True) -> dict[str, Any]:
    """Contents of a folder of weighted samples: arrays (positions memory-mapped), ``topology`` (or None), ``meta``.

    Sizes are always checked, digests if ``verify``; UserError names the file that does not fit.
    """
    folder = Path(folder)
    if not (folder / "meta.yaml").exists():
        raise UserError(
            f"{folder} holds no weighted samples (there is no meta.yaml): give the folder that samples were saved to."
        )
    contents: Any = read_yaml(folder / "meta.yaml", _REMEDY)
    check_format(contents.get("format"), DATA_FORMAT, folder)
    n, shape, digests, meta = (contents.get(key) for key in ("n_samples", "shape", "digests", "meta"))
    names = [f"{name}.npy" for name in _DTYPES if name != _OPTIONAL]
    fits = isinstance(n, int) and isinstance(shape, list) and isinstance(digests, dict) and isinstance(meta, dict)
    if not fits or not set(names) <= set(digests):
        raise damaged(folder / "meta.yaml", "it lacks an entry", _REMEDY)
    names += [name for name in (f"{_OPTIONAL}.npy",) if name in digests]
    result: dict[str, Any] = {"meta": meta, "topology": None}
    for name in [*names, *(name for name in _EXTRAS if name in digests)]:
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing: {_REMEDY}.")
        if name in names:
            wanted = (n, *shape) if path.stem == "positions" else (n,)
            result[path.stem] = read_array(path, _REMEDY, wanted, _DTYPES[path.stem], mmap=path.stem == "positions")
        if verify and file_digest(path) != digests[name]:
            raise damaged(path, "its digest does not fit meta.yaml", _REMEDY)
    if "topology.json" in digests:
        try:
            result["topology"] = from_json((folder / "topology.json").read_text(encoding="utf-8"))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise damaged(folder / "topology.json", "it cannot be read", _REMEDY) from error
    elif "topology.pdb" in digests:  # of samples older than topology.json
        result["topology"] = mdtraj.load_pdb(folder / "topology.pdb", standard_names=False).topology
    return result


def _crc(path: Path, n_bytes: int) -> int | None:
    """CRC-32 of the first bytes behind an array's header; None where the file is shorter, or no such file."""
    crc = 0
    try:
        with open(path, "rb") as handle:
            np.lib.format.read_magic(handle)
            np.lib.format.read_array_header_1_0(handle)
            while n_bytes and (chunk := handle.read(min(n_bytes, 2**24))):
                crc, n_bytes = zlib.crc32(chunk, crc), n_bytes - len(chunk)
    except Exception:  # numpy's reader fails in as many ways as a file can be wrong
        return None
    return None if n_bytes else crc


def _write_rows(path: Path, values: np.ndarray, start: int) -> None:
    """Write ``values`` from row ``start`` on, cut the file behind them, and bring the header up to date.

    numpy pads the header of an .npy file so that its length does not depend on the number of rows. Raises UserError for
    a file that is shorter than ``start`` rows: nothing is written past its end.
    """
    with open(path, "r+b" if path.exists() else "w+b") as handle:
        shape = (start + len(values), *values.shape[1:])
        header = {"descr": values.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(handle, header)
        place = handle.tell() + start * values.dtype.itemsize * int(np.prod(shape[1:]))
        if start and handle.seek(0, os.SEEK_END) < place:
            raise UserError(f"{path} is shorter than its {start} samples: delete {path.parent}, and draw them again.")
        handle.seek(place)
        handle.write(values.data)
        handle.truncate()
        handle.flush()
        os.fsync(handle.fileno())


def _progress(contents: dict[str, Any]) -> dict[str, Any]:
    """The progress of samples whose ``meta.yaml`` is written."""
    meta = {key: value for key, value in contents["meta"].items() if key != "counts"}
    counts = contents["meta"].get("counts", {})
    return {"n": contents["n_samples"], "shape": contents["shape"], "counts": counts, "meta": meta}


def _plain(value: Any) -> Any:
    """A numpy scalar or array as plain numbers, anything else as a string."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else str(value)


def _write_trajectory(path: Path, positions: np.ndarray) -> None:
    opener, scale = _TRAJECTORIES[path.suffix[1:]]
    with opener(str(path), "w") as trajectory:
        for start in range(0, len(positions), _CHUNK):
            trajectory.write(np.ascontiguousarray(positions[start : start + _CHUNK] * np.float32(scale)))
