"""Plain Langevin dynamics: one walker, no bias."""

from collections.abc import Callable

import numpy as np
import openmm

from boltznce.data.engine import Job, Walker, dihedral_angle, frame_dtype

__all__ = ["LangevinSampler"]


class LangevinSampler:
    """One trajectory at the job's temperature. It crosses no barrier above some 8 kT in affordable time."""

    def __init__(self, job: Job, system: openmm.System, start: np.ndarray):
        self.job, self.start = job, start
        self.walker = Walker(system, job)

    def equilibrate(self, rng: np.random.Generator, tick: Callable[[float], None]) -> tuple[np.ndarray, np.ndarray]:
        """Minimize, give thermal velocities, run for the equilibration time."""
        self.walker.reseed(rng)
        x, v = self.walker.minimize(self.start), self.walker.thermal_velocities(rng)
        for _ in range(round(self.job.equilibration / self.job.frame_interval)):
            x, v = self.walker.run(x, v, self.job.frame_interval)
            tick(self.job.frame_interval)
        return x[None].copy(), v[None].copy()

    def advance(
        self, positions: np.ndarray, velocities: np.ndarray, segment: int, rng: np.random.Generator, tick: Callable[[float], None]
    ) -> np.ndarray:
        """One segment of the trajectory."""
        self.walker.reseed(rng)
        frames = np.zeros(round(self.job.segment_length / self.job.frame_interval), dtype=frame_dtype(len(self.start)))
        for i, frame in enumerate(frames):
            positions[0], velocities[0] = self.walker.run(positions[0], velocities[0], self.job.frame_interval)
            frame["positions"], frame["energy"] = positions[0], self.walker.energy()
            frame["time"] = segment * self.job.segment_length + (i + 1) * self.job.frame_interval
            tick(self.job.frame_interval)
        if self.job.dihedral is not None:
            frames["dihedral"] = dihedral_angle(frames["positions"], self.job.dihedral)
        return frames
