"""Plain Langevin dynamics: independent walkers, no bias."""

import numpy as np
import openmm

from boltznce.data.engine import Job, Sampler, Tick, dihedral_angle, frame_dtype
from boltznce.data.walkers import make_walkers

__all__ = ["LangevinSampler"]


class LangevinSampler(Sampler):
    """Trajectories at one temperature; barriers above some 8 kT are out of reach. Option: ``n_walkers`` (1)."""

    def __init__(self, job: Job, system: openmm.System, start: np.ndarray):
        self.job, self.start = job, start
        self.n_walkers = job.options.get("n_walkers", 1)
        self.walkers = make_walkers(job, system, np.full(self.n_walkers, job.temperature))

    def equilibrate(self, rng: np.random.Generator, tick: Tick) -> tuple[np.ndarray, np.ndarray]:
        """Minimize, give thermal velocities, run for the equilibration time."""
        self.walkers.reseed(rng)
        positions, velocities = np.empty((2, self.n_walkers, *self.start.shape))
        for k in range(self.n_walkers):
            positions[k], velocities[k] = self.walkers.prepare(k, self.start, rng)
        for _ in range(round(self.job.equilibration / self.job.frame_interval)):
            self.walkers.run(positions, velocities, self.job.frame_interval)
            tick(self.job.frame_interval)
        return positions, velocities

    def advance(
        self, positions: np.ndarray, velocities: np.ndarray, segment: int, rng: np.random.Generator, tick: Tick
    ) -> np.ndarray:
        """One segment of each trajectory; frames ordered by time, then walker, whose number stands for the window."""
        self.walkers.reseed(rng)
        n_frames = round(self.job.segment_length / self.job.frame_interval)
        frames = np.zeros((n_frames, self.n_walkers), dtype=frame_dtype(len(self.start)))
        for i, frame in enumerate(frames):
            frame["energy"] = self.walkers.run(positions, velocities, self.job.frame_interval)
            frame["positions"], frame["window"] = positions, np.arange(self.n_walkers)
            frame["time"] = segment * self.job.segment_length + (i + 1) * self.job.frame_interval
            tick(self.job.frame_interval)
        frames = frames.ravel()
        if self.job.dihedral is not None:
            frames["dihedral"] = dihedral_angle(frames["positions"], self.job.dihedral)
        return frames
