"""Datasets of trajectories that were made elsewhere: read, checked, and written as those of a simulation."""

import logging
import math
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from boltznce.data.atom_order import Match, match_atoms
from boltznce.data.dataset import DATASET, Dataset, in_order
from boltznce.data.frame_checks import FrameChecks
from boltznce.data.frame_files import FrameFile, open_frames, read_column, read_topology
from boltznce.data.whole import make_whole, spanning_bonds
from boltznce.errors import UserError
from boltznce.folders import claim, only_process
from boltznce.io import file_digest, require_free_space, scratch_folder
from boltznce.settings import require
from boltznce.topologies import system_pdb
from boltznce.units import GAS_CONSTANT

__all__ = ["import_trajectory"]

log = logging.getLogger(__name__)
MOST_FRAMES, MOST_PAIRS = 1000, 4_000_000  # at a time; of atoms in them, which the energy takes at once
SAME_ENERGY = 0.5  # kT times the root of the number of atoms: rounded positions of XTC give 0.3

RIGID_BONDS = (
    "{n} of {n_bonds} bonds of the data, {n_hydrogen} of them of hydrogens, hardly vary, as if constrained. The target "
    "has a width along them and the data have none: a flow trained on them draws few conformers that count, and no "
    "estimate takes them for frames of the target. Data of a simulation without constraints have no such fault."
)
SOLVENT = (
    "The data were made in explicit solvent, or among other molecules, which were left out: weights and free energies "
    "are of the system's own energy, with implicit solvent or none, and no estimate takes them for frames of that."
)
BOX = "The data were made in a periodic box. If there was solvent in it, weights and free energies do not know of it."
LEFT_OUT = "{n} of {n_seen} frames were left out of the data: their energies are no conformer's."
REORDERED = "The atoms of the data were put in the order of {name}, by residue and name."
OTHER_ENERGIES = (
    "The energies that came with the data differ from those of {name} by {mean:.3g} kT on average, and vary about that "
    "by {spread:.3g} kT, as with another force field or cutoff, or rounded positions; those of {name} were taken."
)


class _Part(NamedTuple):
    """The frames of a file that are kept: positions (n, n_atoms, 3), energies (n,), times (n,), numbers in the file."""

    positions: np.ndarray
    energies: np.ndarray
    time: np.ndarray
    number: np.ndarray
    boxed: bool


def import_trajectory(
    folder: Path | str,
    topology: Path | str | None,
    files: Path | str | Sequence[Path | str],
    system,
    *,
    temperature: float,
    stride: int = 1,
    weights: Path | str | None = None,
    bias: Path | str | None = None,
    energies: Path | str | None = None,
    key: str | None = None,
    length_unit: str | float = "nm",
    progress: bool = True,
) -> Dataset:
    """Write a dataset of a molecule's trajectories to ``folder``, with the energies of ``system``.

    Frames follow the Boltzmann distribution at ``temperature``, unless there are ``weights`` or a ``bias``.

    Args:
        topology: a file with all atoms of the frames in their order (PDB, or what else mdtraj reads); None: that of the
            first file, which is then PDB or HDF5. Solvent, ions and other molecules in it are left out.
        files: one trajectory each: DCD, XTC, TRR, NetCDF, HDF5 or PDB; arrays .npy or .npz of positions
            (n, n_atoms, 3) or (n, 3 n_atoms).
        temperature: K, at which the frames were made; must be the system's.
        stride: every how-manieth frame of each file is taken, the first among them.
        weights, bias: log weights, or energies in kJ/mol of a bias that the simulation felt beside its own: .npy or
            text, a number for each frame of all files one after another, before ``stride``.
        energies: energies in kJ/mol, likewise; they are compared with the system's, and that is all.
        key, length_unit: of arrays, see `boltznce.data.frame_files.open_frames`.

    Files whose times go on (parts of one trajectory) or run side by side are split by these times; where a file tells
    none, by numbers of frames. What the user should know is logged and kept in ``meta["notes"]``. Raises UserError for
    whatever is not of this system, before it is written.
    """
    given = {"topology": topology, "weights": weights, "bias": bias, "energies": energies, "key": key}
    paths = [Path(path) for path in ([files] if isinstance(files, Path | str) else files)]
    require("import", files=[str(path) for path in paths], temperature=temperature, stride=stride)
    require("import", length_unit=length_unit, **{name: value and str(value) for name, value in given.items()})
    system, folder = _molecule_at(system, temperature), Path(folder)
    claim(folder, DATASET, "another name")
    if (folder / "meta.yaml").exists():
        raise UserError(f"There is a dataset in {folder} already: choose another name, or delete it.")
    theirs = read_topology(topology, paths[0])
    match = match_atoms(theirs, system)
    sources = [open_frames(path, theirs, key, length_unit) for path in paths]
    log_weights = _log_weights(weights, bias, sources, system)
    own = None if energies is None else _column(energies, "energies", sources) / (GAS_CONSTANT * temperature)
    if own is not None and match.n_left_out:
        raise UserError("energies= are of all atoms of the trajectory, some of which are left out: leave it out too.")
    require_free_space(folder, 2 * 12 * system.n_atoms * sum(-(-source.n_frames // stride) for source in sources))
    settings = {
        "method": "imported",
        "temperature": float(temperature),
        "files": [path.name for path in paths],
        "file_digests": [file_digest(path.expanduser()) for path in paths],
        **{name: value and Path(value).name for name, value in given.items()},
        "length_unit": length_unit,
        "stride": stride,
        "software": "unknown",
    }
    with only_process(folder, beside=True), scratch_folder(folder) as scratch:
        checks = FrameChecks(system)
        return _write(folder, sources, match, checks, scratch, settings, log_weights, own, progress)


def _write(
    folder: Path,
    sources: Sequence[FrameFile],
    match: Match,
    checks: FrameChecks,
    scratch: Path,
    settings: dict[str, Any],
    log_weights: np.ndarray | None,
    given: np.ndarray | None,
    progress: bool,
) -> Dataset:
    """Read all files and write the dataset; log weights and ``given`` energies (kT) are of all frames of the files."""
    n_frames = [source.n_frames for source in sources]
    with tqdm(total=sum(n_frames), desc="import", unit="frame", disable=not progress, mininterval=1.0) as bar:
        places = [scratch / str(number) for number in range(len(sources))]
        parts = [
            _read(source, match, checks, settings["stride"], place, bar)
            for source, place in zip(sources, places, strict=True)
        ]
    checks.finish()
    starts = np.cumsum([0, *n_frames[:-1]])
    rows = np.concatenate([start + part.number for start, part in zip(starts, parts, strict=True)])
    energies = np.concatenate([part.energies for part in parts])
    timed = all(source.timed and _runs(part.time) for source, part in zip(sources, parts, strict=True))
    time = np.concatenate([part.time if timed else part.number for part in parts])
    notes = _notes(checks, match, any(part.boxed for part in parts), energies, None if given is None else given[rows])
    for note in notes:
        log.warning(note)
    order = np.argsort(time, kind="stable")
    return Dataset.write(
        folder,
        in_order([part.positions for part in parts], order),
        energies[order],
        log_weights=None if log_weights is None else log_weights[rows][order],
        time=time[order],
        window=np.repeat(np.arange(len(parts)), [len(part.energies) for part in parts])[order],
        topology=system_pdb(checks.system),
        meta={
            "system": checks.system.identity,
            "settings": settings | {"time": "ps" if timed else "numbers of frames"},
            "rigid_bonds": int(checks.rigid_bonds.sum()),
            "atoms_left_out": match.n_left_out,
            "frames_left_out": checks.n_left_out,
            "notes": notes,
            "versions": {name: version(name) for name in ("mdtraj", "torch", "numpy")},
            "date": date.today().isoformat(),
        },
    )


def _molecule_at(system, temperature: float):
    """The system that energies are of; UserError for what is no single molecule, or at another temperature."""
    if system.is_family:
        raise UserError(f"A trajectory is of one molecule, {system.name} stands for many: set system= to one of them.")
    if system.topology is None:
        raise UserError(f"{system.name} is no molecule, and has no trajectories: set system= to one.")
    if not math.isclose(temperature, system.temperature):
        raise UserError(
            f"temperature={temperature:g} of the trajectory is not that of {system.name} ({system.temperature:g} K): "
            f"set system.temperature={temperature:g} here and in training, or take frames of {system.temperature:g} K."
        )
    return system.cheap


def _column(path: Path | str, setting: str, sources: Sequence[FrameFile]) -> np.ndarray:
    """A number for each frame of all files, before any stride."""
    values, n = read_column(path, setting), sum(source.n_frames for source in sources)
    if len(values) != n:
        raise UserError(
            f"{setting}={path} has {len(values)} numbers, and the trajectories {n} frames: give one for each frame, "
            "before stride, of one file after another."
        )
    return values


def _log_weights(
    weights: Path | str | None, bias: Path | str | None, sources: Sequence[FrameFile], system
) -> np.ndarray | None:
    if weights is not None and bias is not None:
        raise UserError("weights= and bias= are two ways to say the same: give one of them.")
    setting, path = ("weights", weights) if bias is None else ("bias", bias)
    if path is None:
        return None
    values = _column(path, setting, sources) / (1.0 if bias is None else GAS_CONSTANT * system.temperature)
    if np.isnan(values).any() or (values == np.inf).any() or not np.isfinite(values).any():
        raise UserError(f"{setting}={path} has numbers that are not finite: log weights may be -inf, and nothing else.")
    return values


def _read(source: FrameFile, match: Match, checks: FrameChecks, stride: int, scratch: Path, bar: tqdm) -> _Part:
    """A file's frames, whole and centred, positions in a file of their own: any number of them takes little memory."""
    system, done, boxed = checks.system, 0, False
    columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    steps = spanning_bonds(system.bonds, system.n_atoms)
    size = max(1, min(MOST_FRAMES, MOST_PAIRS // system.n_atoms**2))
    with open(scratch, "wb") as handle:
        for x, time, box in source.chunks(size, match.atoms):
            rows = np.arange((-done) % stride, len(x), stride)
            bar.update(len(x))
            done, boxed = done + len(x), boxed or box is not None
            if not len(rows):
                continue
            x = x[rows] if box is None else make_whole(x[rows], box[rows], steps)
            x = np.ascontiguousarray(x - x.mean(axis=1, keepdims=True), dtype=np.float32)
            u = checks.energies(x)
            fine = checks.take(source, x, u, first=not columns)
            handle.write(x[fine].tobytes())
            columns.append((u[fine], time[rows][fine], (done - len(time) + rows)[fine]))
    energies, time, index = (np.concatenate(column) for column in zip(*columns, strict=True))
    positions = np.memmap(scratch, dtype=np.float32, mode="r", shape=(len(energies), system.n_atoms, 3))
    return _Part(positions, energies, time, index, boxed)


def _runs(time: np.ndarray) -> bool:
    """Whether times are some, and never go back."""
    return bool(np.isfinite(time).all() and (np.diff(time) >= 0).all() and (len(time) < 2 or time[-1] > time[0]))


def _notes(checks: FrameChecks, match: Match, boxed: bool, energies: np.ndarray, given: np.ndarray | None) -> list[str]:
    """Sentences on what data differ in from those of a simulation of the system."""
    system, rigid, notes = checks.system, checks.rigid_bonds, []
    if match.n_left_out:
        notes.append(SOLVENT)
    elif boxed:
        notes.append(BOX)
    if rigid.any():
        symbols = [{system.topology.atom(i).element.symbol for i in pair} for pair in system.bonds]
        n_hydrogen = sum("H" in pair for pair, each in zip(symbols, rigid, strict=True) if each)
        notes.append(RIGID_BONDS.format(n=rigid.sum(), n_bonds=len(rigid), n_hydrogen=n_hydrogen))
    if checks.n_left_out:
        notes.append(LEFT_OUT.format(n=checks.n_left_out, n_seen=checks.n_seen))
    if match.reordered:
        notes.append(REORDERED.format(name=system.name))
    if given is not None:
        off, same = given - energies, SAME_ENERGY * math.sqrt(system.n_atoms)
        if not (abs(off.mean()) < same and off.std() < same):
            notes.append(OTHER_ENERGIES.format(name=system.name, mean=off.mean(), spread=off.std()))
    return notes
