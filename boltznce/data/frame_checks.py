"""Whether frames made elsewhere are conformers of a system: lengths, energies, handedness, and bonds that are rigid."""

import numpy as np
import torch

from boltznce.data.frame_files import LENGTH_UNITS, Array, FrameFile
from boltznce.errors import UserError

__all__ = ["FrameChecks"]

# kT a degree of freedom, from what is usual; at four times the temperature it is 1.5, of clashes thousands
ABSURD = 10.0
ALIKE = 0.05  # how far bonds may differ in the factor by which they are too long, where it is the unit that is wrong
SAME_UNIT = (0.8, 1.25)  # ratio of bond lengths
# nm at 300 K: heat alone varies bonds by 0.002 to 0.003, and rounding to the 0.001 of an XTC file by 0.0004
RIGID = 0.001
FEWEST = 10  # frames that tell a spread


class FrameChecks:
    """What chunk after chunk of frames tells; ``n_seen`` frames, of which ``n_left_out`` are no conformers."""

    def __init__(self, system):
        self.system, self.n_seen, self.n_left_out = system, 0, 0
        self._pairs = np.array(system.bonds, dtype=int).reshape(-1, 2)
        self._usual, self._reference = system.typical_energy(), self._lengths(system.positions.numpy()[None])[0]
        self._sums = np.zeros((2, len(self._pairs)))  # of the bonds' lengths from those of the structure, and squares
        self._inverted = np.zeros(len(system.stereocentres))
        self._energies: list[np.ndarray] = []

    def energies(self, x: np.ndarray) -> np.ndarray:
        """Reduced energies (n,), float64, of positions (n, n_atoms, 3) in nm."""
        with torch.no_grad():
            return self.system.energy(torch.from_numpy(x).double()).cpu().numpy()

    def take(self, file: FrameFile, x: np.ndarray, energies: np.ndarray, first: bool) -> np.ndarray:
        """Mask (n,) of the frames that are conformers, of positions (n, n_atoms, 3) in nm and energies (n,) in kT.

        Raises UserError where the ``first`` frames of a file are in another unit, or most of them no conformers.
        """
        lengths = self._lengths(x)
        if first:
            self._require_unit(file, lengths)
        with np.errstate(invalid="ignore"):
            fine = np.abs(energies - self._usual) <= ABSURD * 3 * self.system.n_atoms
        self.n_seen, self.n_left_out = self.n_seen + len(x), self.n_left_out + int((~fine).sum())
        self._energies.append(energies)
        if first and not fine.mean() > 0.5:
            raise self._no_conformers(f"{file.path} begins with", energies, int((~fine).sum()))
        off = lengths[fine] - self._reference
        self._sums += off.sum(0), np.square(off).sum(0)
        self._inverted += (self.system.chirality(x[fine]) < 0).sum(0)
        return fine

    def finish(self) -> None:
        """Raise UserError where most of all frames are no conformers, or of another handedness."""
        if self.n_left_out > self.n_seen / 2:
            raise self._no_conformers("The trajectory has", np.concatenate(self._energies), self.n_left_out)
        if (self._inverted > 0.5 * (self.n_seen - self.n_left_out)).any():
            raise UserError(
                f"In most frames a stereocentre has another handedness than in {self.system.name}: give a structure of "
                "that handedness (system.structure), or mirror the trajectory if it was mirrored."
            )

    @property
    def rigid_bonds(self) -> np.ndarray:
        """Mask (n_bonds,) of the system's bonds that vary far less than by heat, as if they were constrained."""
        n = self.n_seen - self.n_left_out
        if n < FEWEST:
            return np.zeros(len(self._pairs), dtype=bool)
        mean, square = self._sums / n
        spread = np.sqrt(np.maximum(square - mean**2, 0))
        return spread < RIGID * np.sqrt(self.system.temperature / 300)

    def _lengths(self, x: np.ndarray) -> np.ndarray:
        """(n, n_bonds) in nm."""
        return np.linalg.norm(x[:, self._pairs[:, 0]].astype(np.float64) - x[:, self._pairs[:, 1]], axis=-1)

    def _require_unit(self, file: FrameFile, lengths: np.ndarray) -> None:
        """Raise UserError where bonds all are too long, or too short, by one factor."""
        lengths = lengths[np.isfinite(lengths).all(axis=1)]
        if not lengths.size:
            return
        ratios = np.median(lengths, axis=0) / self._reference
        ratio = float(np.median(ratios))
        if np.median(np.abs(ratios - ratio)) > ALIKE * ratio or SAME_UNIT[0] < ratio < SAME_UNIT[1]:
            return
        remedy = "write it anew in the unit of its format, or give the positions as .npy with length_unit="
        if isinstance(file, Array):
            right = file.unit / ratio
            near = [name for name, unit in LENGTH_UNITS.items() if SAME_UNIT[0] < right / unit < SAME_UNIT[1]]
            remedy = f"set length_unit={near[0] if near else f'about {right:.2g}, the nm of one unit'}"
        unit = "in Å for nm" if 8 < ratio < 12 else "in nm for Å" if 0.08 < ratio < 0.12 else "in another unit"
        raise UserError(
            f"Bonds in {file.path} are {ratio:.2g} times as long as those of {self.system.name}, as if lengths were "
            f"{unit}: {remedy}."
        )

    def _no_conformers(self, what: str, energies: np.ndarray, n: int) -> UserError:
        middle = np.median(np.where(np.isnan(energies), np.inf, energies))
        return UserError(
            f"{what} {n} of {len(energies)} frames whose energies no conformer of {self.system.name} has "
            f"(median {middle:.3g} kT, where {self._usual:.3g} is usual), as if atoms were in another order, or "
            "molecules cut by a periodic box that the file does not tell: set topology= to a file with the atoms in "
            "the order of the frames, or make the molecule whole."
        )
