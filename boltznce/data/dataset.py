"""The dataset on disk, its splits in time, and resampling of its frames.

A folder: ``positions.npy`` (float32, (n, n_atoms, 3), nm), ``energies.npy`` (float64, kT), ``log_weights.npy``
(float64, to the Boltzmann distribution; zeros where the frames follow it), ``time.npy`` (float64, ps), ``window.npy``
and ``repeat.npy`` (int32), ``topology.pdb`` and ``meta.yaml`` (how it was made, and a digest of every file). Frames are
in order of time, over all windows and repeats.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.special import i0e

from boltznce.analysis.weights import normalized_weights
from boltznce.command_line import command_line
from boltznce.errors import UserError
from boltznce.folders import Kind, claim
from boltznce.io import DATA_FORMAT, atomic_folder, check_format, file_digest, require_free_space
from boltznce.records import damaged, read_array, read_yaml, sealed
from boltznce.settings import require
from boltznce.states import State, in_interval
from boltznce.systems.identity import digest

__all__ = [
    "DATASET",
    "Dataset",
    "boltzmann_indices",
    "check_shares",
    "contents_digest",
    "in_order",
    "mode_balanced_indices",
]

STATE_KAPPA = 10.0  # of von Mises' density about a state, its half-width the unit of angle: within it at 3 σ
DATASET = Kind("a dataset", "meta.yaml", frozenset({"n_frames", "digests"}), whole=True)
DTYPES = {"energies": "f8", "log_weights": "f8", "time": "f8", "window": "i4", "repeat": "i4"}
FILES = ("positions.npy", *(f"{name}.npy" for name in DTYPES))
OF_FILES = ("digests", "n_frames", "format", "sha256")  # keys of meta.yaml
REMEDY = "delete its folder and make the data anew, by simulating or by resuming the run"


@dataclasses.dataclass(frozen=True, repr=False)
class Dataset:
    """Frames in order of time; arrays as in the module's docstring, ``positions`` memory-mapped when loaded.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "data"
    >>> data = Dataset.write(folder, np.zeros((1000, 22, 3)), np.zeros(1000), meta={"system": {"name": "aldp"}})
    >>> data
    Dataset(aldp, 1000 frames of 22 atoms)
    >>> train, validation, test = data.split(train=0.7, validation=0.1, test=0.2)
    >>> len(train), len(validation), len(test)
    (700, 90, 190)
    """

    positions: np.ndarray
    energies: np.ndarray
    log_weights: np.ndarray
    time: np.ndarray
    window: np.ndarray
    repeat: np.ndarray
    topology: str | None
    meta: dict

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def digest(self) -> str:
        """A short digest of the whole dataset that these frames are of."""
        return contents_digest(self.meta)

    @property
    def origin(self) -> dict:
        """What ``meta`` says of how the frames were made, without what is of these files: for datasets made of them."""
        return {key: value for key, value in self.meta.items() if key not in OF_FILES}

    @property
    def of_target(self) -> bool:
        """Whether weighted frames are the system's own: not those of explicit solvent, or of bonds without width."""
        return not (self.meta.get("atoms_left_out") or self.meta.get("rigid_bonds"))

    def __repr__(self) -> str:
        name = self.meta.get("system", {}).get("name", "unknown")
        return f"Dataset({name}, {len(self)} frames of {self.positions.shape[1]} atoms)"

    @staticmethod
    def write(
        folder: Path,
        positions: np.ndarray | Iterable[np.ndarray],
        energies: np.ndarray,
        *,
        log_weights: np.ndarray | None = None,
        time: np.ndarray | None = None,
        window: np.ndarray | None = None,
        repeat: np.ndarray | None = None,
        topology: str | None = None,
        meta: dict | None = None,
    ) -> "Dataset":
        """Write a dataset, whole or not at all, and load it.

        Args:
            positions: (n, n_atoms, dim) in nm, or an iterable of chunks of it.
            energies: (n,) in kT.
            log_weights, time, window, repeat: (n,); by default zeros, the frame's number, zeros, zeros.
            topology: the text of a PDB file.
            meta: how the frames were made.

        Raises UserError for energies that are not finite, shapes that do not fit, a full disk, and a folder that has
        anything else in it.
        """
        folder, n = Path(folder), len(energies)
        arrays = {
            "energies": energies,
            "log_weights": np.zeros(n) if log_weights is None else log_weights,
            "time": np.arange(n) if time is None else time,
            "window": np.zeros(n) if window is None else window,
            "repeat": np.zeros(n) if repeat is None else repeat,
        }
        arrays = {name: np.ascontiguousarray(value, dtype=DTYPES[name]) for name, value in arrays.items()}
        _check_arrays(folder, n, arrays)
        if (np.diff(arrays["time"]) < 0).any():
            raise UserError(f"The frames of {folder} must be in order of time: sort them before writing.")
        chunks = [positions] if isinstance(positions, np.ndarray) else positions
        with atomic_folder(folder, lambda: claim(folder, DATASET)) as temporary:
            _write_positions(temporary / "positions.npy", chunks, n)
            for name, value in arrays.items():
                np.save(temporary / f"{name}.npy", value)
            if topology is not None:
                (temporary / "topology.pdb").write_text(topology, encoding="utf-8")
            digests = {path.name: file_digest(path) for path in sorted(temporary.iterdir())}
            contents = {"format": DATA_FORMAT, **(meta or {}), "n_frames": n, "digests": digests}
            text = yaml.safe_dump(sealed(contents), sort_keys=False)
            (temporary / "meta.yaml").write_text(text, encoding="utf-8")
        return Dataset.load(folder)

    @classmethod
    def from_trajectory(
        cls,
        folder: Path | str,
        topology: Path | str | None,
        files: Path | str | Sequence[Path | str],
        system,
        **settings: Any,
    ) -> "Dataset":
        """Write a dataset of trajectories made elsewhere: see `boltznce.data.trajectory.import_trajectory`."""
        from boltznce.data.trajectory import import_trajectory  # which makes datasets

        return import_trajectory(folder, topology, files, system, **settings)

    @classmethod
    def load(cls, folder: Path) -> "Dataset":
        """Open a dataset; UserError names the file and the remedy where shapes, digests or numbers are wrong."""
        folder = Path(folder)
        meta = cls.read_meta(folder)
        digests, n = meta["digests"], meta["n_frames"]
        positions = read_array(folder / "positions.npy", REMEDY, (n, None, None), "f4", mmap=True)
        arrays = {name: read_array(folder / f"{name}.npy", REMEDY, (n,), kind) for name, kind in DTYPES.items()}
        _check_arrays(folder, n, arrays)
        for name in (*FILES, "topology.pdb"):
            if name in digests and not (folder / name).is_file():
                raise damaged(folder / name, "it is missing", REMEDY)
            if name in digests and file_digest(folder / name) != digests[name]:
                raise damaged(folder / name, "its contents do not fit the digest in meta.yaml", REMEDY)
        topology = (folder / "topology.pdb").read_text(encoding="utf-8") if "topology.pdb" in digests else None
        return cls(positions, **arrays, topology=topology, meta=meta)

    @staticmethod
    def read_meta(folder: Path) -> dict:
        """What ``meta.yaml`` says, without opening the arrays; UserError as for `load`."""
        path = Path(folder) / "meta.yaml"
        if not path.is_file():
            simulate = command_line("simulate")
            raise UserError(f"There is no dataset in {folder}: make one with {simulate}, or correct the path.")
        meta = read_yaml(path, REMEDY)
        check_format(meta.get("format"), DATA_FORMAT, folder)
        digests, n = meta.get("digests"), meta.get("n_frames")
        if not isinstance(n, int) or not isinstance(digests, dict) or not set(FILES) <= set(digests):
            raise damaged(path, "it lacks the number of frames or a digest", REMEDY)
        return meta

    def take(self, indices: np.ndarray | slice) -> "Dataset":
        """The frames of ``indices``, in that order; a slice copies no positions."""
        names = ("positions", *DTYPES)
        return dataclasses.replace(self, **{name: getattr(self, name)[indices] for name in names})

    def split(
        self, train: float = 0.7, validation: float = 0.1, test: float = 0.2, gap: float = 0.01
    ) -> tuple["Dataset", "Dataset", "Dataset"]:
        """Three contiguous blocks of time, the same for all windows and repeats.

        The fractions are of the simulated time. ``gap`` is the fraction that is left out at each of the two borders,
        taken from their later side, so that frames on either side have little memory of each other.
        """
        check_shares(train, validation, test, gap)
        edges = self.time[0] + (self.time[-1] - self.time[0]) * np.cumsum([0.0, train, validation, test])
        edges[-1] = np.inf
        skip = gap * (self.time[-1] - self.time[0])
        starts = np.searchsorted(self.time, edges[:-1] + np.array([0.0, skip, skip]))
        stops = np.searchsorted(self.time, edges[1:])
        if (stops <= starts).any():
            raise UserError(f"A dataset of {len(self)} frames is too short to split: simulate longer.")
        first, second, third = (self.take(slice(a, b)) for a, b in zip(starts, stops, strict=True))
        return first, second, third


def in_order(parts: Sequence[np.ndarray], order: np.ndarray, size: int = 50_000) -> Iterator[np.ndarray]:
    """Rows of the concatenated ``parts``, each (n, n_atoms, dim), in the given order, ``size`` at a time."""
    starts = np.cumsum([0] + [len(part) for part in parts])
    for rows in np.array_split(order, max(1, -(-len(order) // size))):
        owner = np.searchsorted(starts, rows, side="right") - 1
        chunk = np.empty((len(rows), *parts[0].shape[1:]), dtype=np.float32)
        for i, part in enumerate(parts):
            mine = owner == i
            chunk[mine] = part[rows[mine] - starts[i]]
        yield chunk


def contents_digest(meta: dict) -> str:
    """A short digest of all files of a dataset with this ``meta.yaml``."""
    return digest(sorted(meta.get("digests", {}).items()))


def check_shares(train: float = 0.7, validation: float = 0.1, test: float = 0.2, gap: float = 0.01) -> None:
    """Raise UserError for shares of a split that make no sense (see `Dataset.split`)."""
    require("split", train=train, validation=validation, test=test, gap=gap)
    if min(train, validation, test) <= gap or abs(train + validation + test - 1) > 1e-6:
        raise UserError(f"Shares {train}, {validation}, {test} of a split must sum to 1 and exceed gap={gap}.")


def boltzmann_indices(log_weights: np.ndarray, n: int, generator: np.random.Generator) -> np.ndarray:
    """``n`` frame numbers drawn with replacement by exp(log_weights): frames of the Boltzmann distribution."""
    return generator.choice(len(log_weights), size=n, p=normalized_weights(log_weights))


def mode_balanced_indices(
    values: np.ndarray,
    log_weights: np.ndarray,
    n: int,
    generator: np.random.Generator,
    state: State,
    c: float | str = 150.0,
    kappa: float | None = None,
    mu: float | None = None,
) -> np.ndarray:
    """``n`` frame numbers drawn with replacement by w (c · vonmises.pdf(angle - mu, kappa) + 1), for a rare state.

    Where it is the rest that is rare, the rest takes the place of the state. Of a state that is no interval of an angle
    ``values`` are a mask of who is inside, which takes the place of the density.

    Args:
        values: (n_frames,) of the state's coordinate, an angle in radians.
        mu: default the state's centre.
        kappa: default 10 / (half the state's width)²: the 10 of the papers for their 0 < φ < 2.
        c: "auto" takes P(rest) / P(state) of the weighted frames (BoltzNCE for peptides; 150 for alanine dipeptide).

    Raises UserError if no frame is in the state.
    """
    values, log_weights = np.asarray(values), np.asarray(log_weights, dtype=np.float64)
    is_mask = values.dtype == bool
    inside = normalized_weights(log_weights)[in_interval(values, state.interval)].sum()
    if 0.5 < inside < 1 and mu is None:
        state, values, inside = (state, ~values, 1 - inside) if is_mask else (state.rest, values, 1 - inside)
    if c == "auto":
        if inside == 0:
            words = "is in the state" if is_mask else f"has {state.in_words()}"
            raise UserError(f"No frame {words}: simulate by umbrella sampling, or set c to a number.")
        c = (1 - inside) / inside
    if is_mask:
        return boltzmann_indices(log_weights + np.log(float(c) * values + 1), n, generator)
    angle = values.astype(np.float64)
    from_mode = angle - (state.centre if mu is None else mu)
    kappa = 4 * STATE_KAPPA / state.width**2 if kappa is None else kappa
    density = np.exp(kappa * (np.cos(from_mode) - 1)) / (2 * np.pi * i0e(kappa))
    return boltzmann_indices(log_weights + np.log(float(c) * density + 1), n, generator)


def _write_positions(path: Path, chunks: Iterable[np.ndarray], n: int) -> None:
    """One after another: what is written to mapped memory on a full disk ends the process."""
    shape, done = None, 0
    with open(path, "wb") as handle:
        for chunk in chunks:
            if shape is None:
                shape = chunk.shape[1:]
                require_free_space(path.parent, 4 * n * int(np.prod(shape)))
                np.lib.format.write_array_header_1_0(
                    handle, {"descr": "<f4", "fortran_order": False, "shape": (n, *shape)}
                )
            if not np.isfinite(chunk).all():
                raise UserError("Positions are not finite: the simulation was unstable, use a shorter timestep.")
            if done + len(chunk) <= n:
                handle.write(np.ascontiguousarray(np.broadcast_to(chunk, (len(chunk), *shape)), dtype="<f4").data)
            done += len(chunk)
    if done != n:
        raise UserError(f"A dataset of {n} energies needs as many positions, not {done}.")


def _check_arrays(folder: Path, n: int, arrays: dict[str, np.ndarray]) -> None:
    for name, value in arrays.items():
        path = folder / f"{name}.npy"
        if value.shape != (n,):
            raise damaged(path, f"its shape is {value.shape}, not ({n},)", REMEDY)
        finite = np.isfinite(value)
        if name == "log_weights":
            finite |= np.isneginf(value)
        if not finite.all():
            raise UserError(
                f"{path} has {(~finite).sum()} values that are not finite (the first at frame {finite.argmin()}): "
                "the simulation was unstable, make the dataset anew with a shorter timestep."
            )
