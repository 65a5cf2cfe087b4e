"""Well-tempered metadynamics of many walkers that share a bias, which is then held fixed while frames are taken.

Barducci et al., Phys. Rev. Lett. 100, 020603 (2008); many walkers: Raiteri et al., J. Phys. Chem. B 110, 3533 (2006);
several biases and one group of walkers without, by bias exchange: Piana and Laio, J. Phys. Chem. B 111, 4553 (2007).
Frames under the fixed bias V (in kT) have the exact weights exp(V), whether or not V has converged: what must be seen
is that walkers go round, not that V is right. Those of several groups are joined by MBAR.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import openmm
import torch
from scipy.special import logsumexp
from torch import Tensor

from boltznce.data import mbar
from boltznce.data.engine import Job, Sampler, Tick, frame_dtype, read_state
from boltznce.data.fourier_bias import Axis, BiasGroups, FourierBias
from boltznce.data.torch_walkers import TorchWalkers
from boltznce.data.walkers import OpenMMWalkers
from boltznce.systems.toy import PlaneSystem

__all__ = ["MetadynamicsSampler", "groups_of", "n_building_segments", "weigh"]

FULL_HEIGHT = 0.25  # of the rounds, after which hills shrink with the number of the round
LATE = 0.75  # of the rounds, at which the bias is kept to see how far it still changes


def n_building_segments(job: Job) -> int:
    """Segments in which the bias is built, before those that give frames."""
    return round(job.options["bias_duration"] / job.segment_length)


def groups_of(job: Job, device: torch.device | str = "cpu") -> BiasGroups:
    """The biases of a job, without hills."""
    options = job.options
    limits = options.get("limits", [[None] * len(one) for one in options["coordinates"]])
    biases = [
        FourierBias(list(map(Axis, map(tuple, atoms), ends)), options["n_terms"], options["hill_width"], job.kT, device)
        for atoms, ends in zip(options["coordinates"], limits, strict=True)
    ]
    return BiasGroups(biases, options["n_walkers"])


class MetadynamicsSampler(Sampler):
    """Walkers under a common bias on one or two coordinates, or in groups, each with its own, that exchange places.

    Options: ``coordinates`` (of each bias, four atoms each; in the plane see `Axis`, with ``limits``), ``n_walkers``,
    ``bias_duration`` (ps a walker in which the biases are built), ``hill_interval`` (ps), ``hill_height`` (kT, of all
    hills of a round and bias together), ``hill_width`` (rad), ``bias_factor``, ``n_terms`` (of the Fourier series, a
    coordinate), ``exchange_interval`` (ps), ``start_temperature`` (K, of the equilibration, so that side chains begin
    in all their rotamers).

    In the k-th of K rounds each of n walkers adds a hill of height h / n · exp(-V / (bias_factor - 1)) · min(1, K/4k).
    A frame's window is the trajectory that it is of, however often this changed its group.
    """

    def __init__(self, job: Job, system: openmm.System | PlaneSystem, start: np.ndarray):
        self.job, self.system, self.start, self.options = job, system, start, job.options
        self.n_walkers = self.options["n_walkers"]
        self.walkers = TorchWalkers(job, system, np.full(self.n_walkers, job.temperature))
        self.groups = self.walkers.bias = groups_of(job, self.walkers.device)
        self.late = [torch.zeros_like(bias.coefficients) for bias in self.groups.biases]
        self.order = np.arange(self.n_walkers)
        self.n_rounds = round(self.options["bias_duration"] / self.options["hill_interval"])

    @property
    def memory(self) -> Mapping[str, np.ndarray]:
        biases = {"bias": self.groups.parameters, "late_bias": self.late}
        return {name: torch.stack(list(each)).cpu().numpy() for name, each in biases.items()} | {"order": self.order}

    @memory.setter
    def memory(self, arrays: Mapping[str, np.ndarray]) -> None:
        device = self.walkers.device
        self.late = list(torch.from_numpy(arrays["late_bias"]).to(device))
        for bias, coefficients in zip(self.groups.biases, torch.from_numpy(arrays["bias"]).to(device), strict=True):
            bias.coefficients = coefficients.clone()
        self.order = arrays["order"]

    def equilibrate(self, rng: np.random.Generator, tick: Tick) -> tuple[np.ndarray, np.ndarray]:
        """All walkers from the minimized structure with velocities of their own, hot for the equilibration time."""
        x = self.start
        if not self.walkers.in_plane:
            by_openmm = OpenMMWalkers(self.job, openmm.XmlSerializer.clone(self.system), self.walkers.temperatures)
            x, _ = by_openmm.prepare(0, x, rng)
            x = x - x.mean(0)
        positions = np.repeat(x[None], self.n_walkers, axis=0)
        spread = np.sqrt(self.job.kT / self.walkers.masses)[:, None]
        velocities = rng.standard_normal(positions.shape) * spread
        self.walkers.reseed(rng)
        self.walkers.heat(max(1.0, self.options["start_temperature"] / self.job.temperature))
        for _ in range(round(self.job.equilibration / self.job.frame_interval)):
            self.walkers.run(positions, velocities, self.job.frame_interval)
            tick(self.job.frame_interval)
        self.walkers.heat(1.0)
        return positions, velocities

    def advance(
        self, positions: np.ndarray, velocities: np.ndarray, segment: int, rng: np.random.Generator, tick: Tick
    ) -> np.ndarray:
        """One segment: no frames while the biases are built, then frames ordered by time, then walker."""
        self.walkers.reseed(rng)
        x, v = self.walkers.tensor(positions), self.walkers.tensor(velocities)
        sampled = segment - n_building_segments(self.job)
        building = sampled < 0
        between = self.options.get("exchange_interval", self.job.frame_interval)
        interval = self.options["hill_interval"] if building else between
        n, stride = round(self.job.segment_length / interval), round(self.job.frame_interval / interval)
        frames = np.zeros((0 if building else n // stride, self.n_walkers), dtype=frame_dtype(len(self.start)))
        for k in range(1, n + 1):
            x, v = self.walkers.move(x, v, interval)
            if building:
                self._add_hills(x, segment * n + k)
            elif k % stride == 0:
                frame = frames[k // stride - 1]
                frame["energy"], frame["positions"] = self.walkers.energies(x), x.cpu().numpy()
                frame["window"], frame["time"] = self.order, sampled * self.job.segment_length + k * interval
            if self.groups.n_groups > 1 and k % max(1, round(between / interval)) == 0:
                x, v = self._exchange(x, v, rng)
            tick(interval)
        self.walkers.energies(x)  # must be finite
        positions[:], velocities[:] = x.cpu().numpy(), v.cpu().numpy()
        frames = frames.ravel()
        first = self.groups.biases[0].axes[0]
        frames["dihedral"] = first.values(torch.from_numpy(frames["positions"].astype(np.float64))).numpy()
        return frames

    def _add_hills(self, x: Tensor, number: int) -> None:
        """The hills of round ``number``, counted from 1."""
        height = self.options["hill_height"] / self.groups.size * min(1.0, FULL_HEIGHT * self.n_rounds / number)
        scale = self.options["bias_factor"] - 1.0
        for bias, part in zip(self.groups.biases, x.split(self.groups.size), strict=False):
            values = bias.coordinates(part).double()
            bias.add_hills(values, height * torch.exp(-bias.energy(values) / scale))
        if number == round(LATE * self.n_rounds):
            self.late = [bias.coefficients.clone() for bias in self.groups.biases]

    def _exchange(self, x: Tensor, v: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Pairs at random exchange their places in the groups by Metropolis' rule on the biases."""
        bias, group = self.groups.energies(x).cpu().numpy(), np.arange(self.n_walkers) // self.groups.size
        a, b = rng.permutation(self.n_walkers)[: self.n_walkers // 2 * 2].reshape(2, -1)
        gain = bias[a, group[a]] + bias[b, group[b]] - bias[a, group[b]] - bias[b, group[a]]
        swap = np.log(rng.random(len(a))) < gain
        index = np.arange(self.n_walkers)
        index[a[swap]], index[b[swap]] = b[swap], a[swap]
        self.order = self.order[index]
        on_device = torch.from_numpy(index).to(x.device)
        return x[on_device], v[on_device]


def weigh(job: Job, folder: Path, frames: np.ndarray) -> tuple[np.ndarray, float]:
    """Log weights of a job's frames (n,) to the ensemble without bias, of mean weight 1; how far the biases changed.

    The latter is the standard deviation, over frames, of what the last quarter of the rounds added to a bias, in kT.
    """
    groups = groups_of(job)
    stacked = (len(groups.biases), *groups.parameters[0].shape)
    memory = read_state(folder, {"bias": stacked, "late_bias": stacked})
    energies = {}
    for name in ("late_bias", "bias"):
        for each, coefficients in zip(groups.biases, torch.from_numpy(memory[name]), strict=True):
            each.coefficients = coefficients
        chunks = np.array_split(frames["positions"], max(1, len(frames) // 50_000))
        energies[name] = np.concatenate([groups.energies(torch.from_numpy(np.array(x))).numpy() for x in chunks])
    bias, n_biases = energies["bias"], len(groups.biases)
    change = float(np.std(bias - energies["late_bias"], axis=0)[:n_biases].max())
    f = np.zeros(1) if groups.n_groups == 1 else _free_energies(bias, np.random.default_rng(job.seed))
    log_w = -logsumexp(f - bias, axis=1)
    return log_w - logsumexp(log_w) + np.log(len(log_w)), change


def _free_energies(bias: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Of the groups (G,) in kT by MBAR, from biases (n, G) of frames, as many of each."""
    some = rng.permutation(len(bias))[: mbar.MBAR_MAX_FRAMES]
    some = some[: len(some) // bias.shape[1] * bias.shape[1]]
    return mbar.free_energies(bias[some].T, np.full(bias.shape[1], len(some) // bias.shape[1]))
