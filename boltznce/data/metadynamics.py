"""Well-tempered metadynamics of many walkers that share one bias, which is then held fixed while frames are taken.

Barducci et al., Phys. Rev. Lett. 100, 020603 (2008); many walkers: Raiteri et al., J. Phys. Chem. B 110, 3533
(2006). Frames under the fixed bias V (in kT) have the exact weights exp(V), whether or not V has converged: what must
be seen is that walkers go round, not that V is right.
"""

from pathlib import Path

import numpy as np
import openmm
import torch
from scipy.special import logsumexp

from boltznce.data.engine import Job, Sampler, Tick, dihedral_angle, frame_dtype, read_memory
from boltznce.data.fourier_bias import Axis, FourierBias
from boltznce.data.result import SimulationResult
from boltznce.data.torch_walkers import TorchWalkers
from boltznce.data.walkers import OpenMMWalkers
from boltznce.states import in_interval

__all__ = ["MetadynamicsSampler", "analyse", "bias_of", "log_weights", "n_building_segments", "transitions"]

FULL_HEIGHT = 0.25  # of the rounds, after which hills shrink with the number of the round
LATE = 0.75  # of the rounds, at which the bias is kept to see how far it still changes


def n_building_segments(job: Job) -> int:
    """Segments in which the bias is built, before those that give frames."""
    return round(job.options["bias_duration"] / job.segment_length)


def bias_of(options: dict, kT: float, device: torch.device | str = "cpu") -> FourierBias:
    """The bias of a job's options, without hills; kT in kJ/mol."""
    axes = [Axis(tuple(atoms)) for atoms in options["coordinates"]]
    return FourierBias(axes, options["n_terms"], options["hill_width"], kT, device)


class MetadynamicsSampler(Sampler):
    """Walkers under a common bias on one or two coordinates.

    Options: ``coordinates`` (four atoms each), ``n_walkers``, ``bias_duration`` (ps a walker in which the bias is
    built), ``hill_interval`` (ps), ``hill_height`` (kT, of all walkers' hills of a round together), ``hill_width``
    (rad), ``bias_factor``, ``n_terms`` (of the Fourier series, a coordinate).

    In the k-th of K rounds each of n walkers adds a hill of height h / n · exp(-V / (bias_factor - 1)) · min(1, K/4k).
    """

    def __init__(self, job: Job, system: openmm.System, start: np.ndarray):
        self.job, self.system, self.start = job, system, start
        self.n_walkers = job.options["n_walkers"]
        temperatures = np.full(self.n_walkers, job.temperature)
        self.walkers = TorchWalkers(job, system, temperatures)
        self.bias = self.walkers.bias = bias_of(job.options, job.kT, self.walkers.device)
        self.late = torch.zeros_like(self.bias.coefficients)
        self.n_rounds = round(job.options["bias_duration"] / job.options["hill_interval"])

    @property
    def memory(self) -> dict[str, np.ndarray]:
        return {"bias": self.bias.coefficients.cpu().numpy(), "late_bias": self.late.cpu().numpy()}

    @memory.setter
    def memory(self, arrays: dict[str, np.ndarray]) -> None:
        self.bias.coefficients = torch.from_numpy(arrays["bias"]).to(self.walkers.device)
        self.late = torch.from_numpy(arrays["late_bias"]).to(self.walkers.device)

    def equilibrate(self, rng: np.random.Generator, tick: Tick) -> tuple[np.ndarray, np.ndarray]:
        """All walkers from the minimized structure with velocities of their own, for the equilibration time."""
        openmm_walkers = OpenMMWalkers(self.job, openmm.XmlSerializer.clone(self.system), self.walkers.temperatures)
        x, _ = openmm_walkers.prepare(0, self.start, rng)
        positions = np.repeat((x - x.mean(0))[None], self.n_walkers, axis=0)
        spread = np.sqrt(self.job.kT / openmm_walkers.masses)[:, None]
        velocities = rng.standard_normal(positions.shape) * spread
        self.walkers.reseed(rng)
        for _ in range(round(self.job.equilibration / self.job.frame_interval)):
            self.walkers.run(positions, velocities, self.job.frame_interval)
            tick(self.job.frame_interval)
        return positions, velocities

    def advance(
        self, positions: np.ndarray, velocities: np.ndarray, segment: int, rng: np.random.Generator, tick: Tick
    ) -> np.ndarray:
        """One segment: none while the bias is built, then frames ordered by time, then walker (their window)."""
        self.walkers.reseed(rng)
        x, v = self.walkers.tensor(positions), self.walkers.tensor(velocities)
        building = n_building_segments(self.job)
        interval = self.job.options["hill_interval"] if segment < building else self.job.frame_interval
        n = round(self.job.segment_length / interval)
        frames = np.zeros((0 if segment < building else n, self.n_walkers), dtype=frame_dtype(len(self.start)))
        for k in range(n):
            x, v = self.walkers.move(x, v, interval)
            if segment < building:
                self._add_hills(x, segment * n + k + 1)
            else:
                frame = frames[k]
                frame["energy"], frame["positions"] = self.walkers.energies(x), x.cpu().numpy()
                frame["window"] = np.arange(self.n_walkers)
                frame["time"] = (segment - building) * self.job.segment_length + (k + 1) * interval
            tick(interval)
        self.walkers.energies(x)  # must be finite
        positions[:], velocities[:] = x.cpu().numpy(), v.cpu().numpy()
        frames = frames.ravel()
        frames["dihedral"] = dihedral_angle(frames["positions"], self.job.options["coordinates"][0])
        return frames

    def _add_hills(self, x: torch.Tensor, number: int) -> None:
        """The hills of round ``number``, counted from 1."""
        values = self.bias.coordinates(x)
        height = self.job.options["hill_height"] / self.n_walkers * min(1.0, FULL_HEIGHT * self.n_rounds / number)
        scale = self.job.options["bias_factor"] - 1.0
        self.bias.add_hills(values, height * torch.exp(-self.bias.energy(values.double()) / scale))
        if number == round(LATE * self.n_rounds):
            self.late = self.bias.coefficients.clone()


def log_weights(job: Job, folder: Path, frames: np.ndarray) -> np.ndarray:
    """log exp(V) of a job's frames (n,), of mean weight 1."""
    bias = bias_of(job.options, job.kT)
    bias.coefficients = torch.from_numpy(read_memory(folder, {"bias": tuple(bias.coefficients.shape)})["bias"])
    angles = [dihedral_angle(frames["positions"], atoms) for atoms in job.options["coordinates"]]
    log_w = bias.energy(torch.from_numpy(np.stack(angles, axis=-1))).numpy()
    return log_w - logsumexp(log_w) + np.log(len(log_w))


def analyse(
    values: np.ndarray,
    log_weights: np.ndarray,
    window: np.ndarray,
    time: np.ndarray,
    repeat: np.ndarray,
    *,
    state: tuple[float, float] = (0.0, 2.0),
    n_bins: int = 72,
    n_parts: int = 4,
    n_bootstrap: int = 500,
    surface_of: tuple[str, ...] = (),
    seed: int = 0,
) -> SimulationResult:
    """ΔF, profile and surface of frames (n,) under fixed biases, with standard errors by bootstrap over the walkers.

    Args:
        values: (n, d), coordinates in rad, the first that of the state.
        log_weights: (n,), of one mean in every repeat.
        window, time, repeat: (n,), number of the walker in its repeat, ps, number of the repeat.
        n_parts: stretches of time that are also analysed by themselves.
        surface_of: names of the coordinates, where there are two.
    """
    weights, inside = np.exp(log_weights), in_interval(values[:, 0], state)
    bins = [np.clip(((column + np.pi) / (2 * np.pi) * n_bins).astype(int), 0, n_bins - 1) for column in values.T]
    walker = np.unique(np.stack([repeat, window]), axis=1, return_inverse=True)[1].ravel()
    n_walkers = walker.max() + 1

    def sums(number: np.ndarray, n: int, chosen: np.ndarray | slice = slice(None)) -> np.ndarray:
        """(n_walkers, n): the weight of each walker in each of n places."""
        flat = walker[chosen] * n + number[chosen]
        return np.bincount(flat, weights[chosen], minlength=n_walkers * n).reshape(n_walkers, n)

    def delta_f(sides: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log(sides[..., 0]) - np.log(sides[..., 1])

    sides, profile = sums(inside.astype(int), 2), sums(bins[0], n_bins)
    counts = np.random.default_rng(seed).multinomial(n_walkers, np.full(n_walkers, 1 / n_walkers), size=n_bootstrap)
    with np.errstate(divide="ignore", invalid="ignore"):
        free, replicates = -np.log(profile.sum(0)), -np.log(counts @ profile)
        lowest = free.argmin()
        error = np.std(replicates - replicates[:, [lowest]], axis=0, ddof=1)
        surface = None
        if len(surface_of) == 2:
            surface = -np.log(np.bincount(bins[0] * n_bins + bins[1], weights, minlength=n_bins**2))
            surface = np.where(np.isfinite(surface), surface - surface.min(), np.nan).reshape(n_bins, n_bins)
    part = np.minimum((time / time.max() * n_parts - 1e-9).astype(int), n_parts - 1)
    repeats = np.unique(repeat)
    return SimulationResult(
        delta_f=float(delta_f(sides.sum(0))),
        delta_f_error=float(np.std(delta_f(counts @ sides), ddof=1)),
        centres=(np.arange(n_bins) + 0.5) * 2 * np.pi / n_bins - np.pi,
        profile=np.where(np.isfinite(free), free - free[lowest], np.nan),
        profile_error=np.where(np.isfinite(error), error, np.nan),
        parts=np.array(
            [
                [delta_f(sums(inside.astype(int), 2, (repeat == r) & (part == p)).sum(0)) for p in range(n_parts)]
                for r in repeats
            ]
        ),
        checks={
            "transitions a walker": transitions(values[:, 0], walker, state) / n_walkers,
            "effective share of frames": float(weights.sum() ** 2 / (weights**2).sum() / len(weights)),
        },
        surface=surface,
        surface_of=surface_of,
    )


def transitions(angle: np.ndarray, walker: np.ndarray, state: tuple[float, float]) -> int:
    """How often walkers went from the middle half of the state to that of the rest or back; frames in order of time."""
    low, high = state
    rest = (high, low + 2 * np.pi)
    core = np.zeros(len(angle), dtype=int)
    for side, (a, b) in ((1, state), (-1, rest)):
        core[in_interval(angle, (a + (b - a) / 4, b - (b - a) / 4))] = side
    order = np.argsort(walker, kind="stable")
    order = order[core[order] != 0]
    same = walker[order][1:] == walker[order][:-1]
    return int((same & (core[order][1:] != core[order][:-1])).sum())
