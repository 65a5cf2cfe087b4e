"""Replica exchange in temperature (Sugita and Okamoto, Chem. Phys. Lett. 314, 141 (1999)); keeps the coldest frames."""

import numpy as np
import openmm

from boltznce.data.engine import Job, Sampler, Tick, dihedral_angle, frame_dtype
from boltznce.data.walkers import make_walkers

__all__ = ["ReplicaExchangeSampler", "temperature_ladder"]


def temperature_ladder(lowest: float, highest: float, n: int) -> np.ndarray:
    """A geometric ladder (n,) in K."""
    return np.geomspace(lowest, highest, n)


class ReplicaExchangeSampler(Sampler):
    """Replicas on a ladder. Options: ``n_replicas``, ``max_temperature`` (K), ``exchange_interval`` (ps).

    ``n_ladders`` (1): independent ladders, all in one batch; a frame's window is the number of its ladder.
    """

    def __init__(self, job: Job, system: openmm.System, start: np.ndarray):
        self.job, self.start = job, start
        self.n_ladders = job.options.get("n_ladders", 1)
        self.n_replicas = job.options["n_replicas"]
        self.temperatures = np.tile(
            temperature_ladder(job.temperature, job.options["max_temperature"], self.n_replicas), self.n_ladders
        )
        self.interval = job.options["exchange_interval"]
        self.walkers = make_walkers(job, system, self.temperatures)

    def equilibrate(self, rng: np.random.Generator, tick: Tick) -> tuple[np.ndarray, np.ndarray]:
        """Every replica from the minimized structure, then with exchange for the equilibration time."""
        self.walkers.reseed(rng)
        positions, velocities = np.empty((2, len(self.temperatures), *self.start.shape))
        for k in range(len(self.temperatures)):
            positions[k], velocities[k] = self.walkers.prepare(k, self.start, rng)
        for block in range(round(self.job.equilibration / self.interval)):
            self._block(positions, velocities, block, rng, tick)
        return positions, velocities

    def advance(
        self, positions: np.ndarray, velocities: np.ndarray, segment: int, rng: np.random.Generator, tick: Tick
    ) -> np.ndarray:
        """One segment; frames of the lowest temperature, by time, then ladder; energies in kT of that temperature."""
        self.walkers.reseed(rng)
        n_blocks = round(self.job.segment_length / self.interval)
        stride = round(self.job.frame_interval / self.interval)
        frames = np.zeros((n_blocks // stride, self.n_ladders), dtype=frame_dtype(len(self.start)))
        for block in range(n_blocks):
            x, energy = self._block(positions, velocities, block, rng, tick)
            if (block + 1) % stride == 0:
                frame = frames[block // stride]
                frame["positions"], frame["energy"], frame["window"] = x, energy, np.arange(self.n_ladders)
                frame["time"] = segment * self.job.segment_length + (block + 1) * self.interval
        frames = frames.ravel()
        if self.job.dihedral is not None:
            frames["dihedral"] = dihedral_angle(frames["positions"], self.job.dihedral)
        return frames

    def _block(self, positions, velocities, block, rng, tick) -> tuple[np.ndarray, np.ndarray]:
        """Run every replica, exchange neighbours by turns; the coldest positions and energies before the exchange."""
        energies = self.walkers.run(positions, velocities, self.interval)
        tick(self.interval)
        lowest = slice(None, None, self.n_replicas)
        target = positions[lowest].copy(), energies[lowest].copy()
        reduced_beta = self.job.temperature / self.temperatures
        for ladder in range(self.n_ladders):
            first = ladder * self.n_replicas
            for low in range(first + block % 2, first + self.n_replicas - 1, 2):
                high = low + 1
                if np.log(rng.random()) < (reduced_beta[low] - reduced_beta[high]) * (energies[low] - energies[high]):
                    scale = np.sqrt(self.temperatures[low] / self.temperatures[high])
                    positions[[low, high]] = positions[[high, low]]
                    velocities[low], velocities[high] = velocities[high] * scale, velocities[low] / scale
        return target
