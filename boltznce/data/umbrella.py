"""Umbrella sampling along a dihedral, with Hamiltonian exchange between neighbouring windows, and MBAR.

All windows share the molecule's potential, so that MBAR needs the bias energies only (Shirts and Chodera, J. Chem.
Phys. 129, 124105 (2008)).
"""

import dataclasses

import numpy as np
import openmm
from scipy.special import logsumexp

from boltznce.data import mbar
from boltznce.data.engine import Job, Sampler, Tick, dihedral_angle, frame_dtype, wrap
from boltznce.data.result import SimulationResult
from boltznce.data.walkers import Restraints, make_walkers
from boltznce.errors import UserError
from boltznce.states import in_interval
from boltznce.units import GAS_CONSTANT

__all__ = ["Ring", "UmbrellaSampler", "analyse", "bias_energies", "largest_gap", "ring_of", "window_centres"]


def window_centres(n_windows: int) -> np.ndarray:
    """Centres (n_windows,) in rad, evenly spaced on the circle."""
    return wrap(np.arange(n_windows) * 2 * np.pi / n_windows - np.pi)


def bias_energies(dihedral: np.ndarray, n_windows: int, kappa: float, kT: float) -> np.ndarray:
    """Reduced bias (n_windows, n) at ``dihedral`` (n,): kappa/2 (wrapped difference)², kappa and kT in kJ/mol."""
    return 0.5 * kappa / kT * wrap(dihedral[None, :] - window_centres(n_windows)[:, None]) ** 2


WALL = 1e4  # kT, beyond the cut
DRAG_TIME = 2.0  # ps in each window on the way around the circle


class UmbrellaSampler(Sampler):
    """A ring of windows. Options: ``n_windows`` (even), ``kappa`` (kJ/mol/rad²), ``exchange_interval`` (ps)."""

    def __init__(self, job: Job, system: openmm.System, start: np.ndarray):
        self.job, self.start = job, start
        self.n_windows, self.kappa = job.options["n_windows"], job.options["kappa"]
        self.interval = job.options["exchange_interval"]
        self.centres = window_centres(self.n_windows)
        temperatures = np.full(self.n_windows, job.temperature)
        self.walkers = make_walkers(job, system, temperatures, Restraints(job.dihedral, self.kappa, self.centres))

    def equilibrate(self, rng: np.random.Generator, tick: Tick) -> tuple[np.ndarray, np.ndarray]:
        """Drag the dihedral around the circle, both ways, then run with exchange for the equilibration time."""
        positions, velocities = np.empty((2, self.n_windows, *self.start.shape))
        first = int(np.abs(wrap(self.centres - dihedral_angle(self.start, self.job.dihedral))).argmin())
        half = self.n_windows // 2
        self.walkers.reseed(rng)
        for path in (range(half + 1), range(0, half - self.n_windows, -1)):
            x = self.start
            for step in path:
                window = (first + step) % self.n_windows
                x, v = self.walkers.prepare(window, x, rng, DRAG_TIME)
                positions[window], velocities[window] = x, v
                tick(0.0)
        for block in range(round(self.job.equilibration / self.interval)):
            self._block(positions, velocities, block, rng, tick)
        return positions, velocities

    def advance(
        self, positions: np.ndarray, velocities: np.ndarray, segment: int, rng: np.random.Generator, tick: Tick
    ) -> np.ndarray:
        """One segment; frames are ordered by time, then window."""
        self.walkers.reseed(rng)
        n_blocks = round(self.job.segment_length / self.interval)
        stride = round(self.job.frame_interval / self.interval)
        frames = np.zeros((n_blocks // stride, self.n_windows), dtype=frame_dtype(len(self.start)))
        for block in range(n_blocks):
            save = (block + 1) % stride == 0
            frame = frames[block // stride] if save else None
            self._block(positions, velocities, block, rng, tick, frame)
            if frame is not None:
                frame["time"] = segment * self.job.segment_length + (block + 1) * self.interval
        return frames.ravel()

    def _block(self, positions, velocities, block, rng, tick, frame=None) -> None:
        """Run every window for one exchange interval, record the frames, exchange even or odd pairs of neighbours."""
        energies = self.walkers.run(positions, velocities, self.interval)
        tick(self.interval)
        angles = dihedral_angle(positions, self.job.dihedral)
        if frame is not None:
            frame["positions"], frame["energy"] = positions, energies
            frame["dihedral"], frame["window"] = angles, np.arange(self.n_windows)
        bias = bias_energies(angles, self.n_windows, self.kappa, self.job.kT)
        left = np.arange(block % 2, self.n_windows, 2)
        right = (left + 1) % self.n_windows
        gain = bias[left, left] + bias[right, right] - bias[left, right] - bias[right, left]
        swap = np.log(rng.random(len(left))) < gain
        left, right = left[swap], right[swap]
        for array in (positions, velocities):
            array[np.concatenate([left, right])] = array[np.concatenate([right, left])]


@dataclasses.dataclass(frozen=True)
class Ring:
    """The windows as MBAR sees them: each is split in two states at the angle ``cut`` (None: not split).

    At a high barrier a window is bistable, and how often its two sides are visited does not settle in affordable time;
    MBAR would take that share for the truth. Either side by itself is sampled well, and is an ensemble of its own: the
    window's bias with a wall at the barrier. So the states of the two sides are linked only where the ring is sampled
    without a gap, and any ``cut`` is valid.
    """

    n_windows: int
    kappa: float  # kJ/mol/rad²
    kT: float  # kJ/mol
    cut: float | None = None

    def _beyond(self, dihedral: np.ndarray, centres: np.ndarray) -> np.ndarray:
        """Whether an angle lies on the far side of the cut, on the way up from a window's centre and around."""
        if self.cut is None:
            return np.zeros(np.broadcast_shapes(dihedral.shape, centres.shape), dtype=bool)
        return wrap(dihedral - centres) >= wrap(self.cut - centres)

    def state(self, dihedral: np.ndarray, window: np.ndarray) -> np.ndarray:
        """State (n,) of each frame in [0, 2 n_windows)."""
        return window + self.n_windows * self._beyond(dihedral, window_centres(self.n_windows)[window])

    def bias(self, dihedral: np.ndarray) -> np.ndarray:
        """Reduced bias (2 n_windows, n) of every state, a wall of ``WALL`` kT included."""
        bias = bias_energies(dihedral, self.n_windows, self.kappa, self.kT)
        beyond = self._beyond(dihedral[None, :], window_centres(self.n_windows)[:, None])
        return np.concatenate([np.where(beyond, WALL, bias), np.where(beyond, bias, WALL)])

    def free_energies(self, dihedral: np.ndarray, window: np.ndarray, guess: np.ndarray | None = None) -> np.ndarray:
        """Reduced free energies (2 n_windows,) by MBAR from frames (n,); NaN where there are no frames."""
        state = self.state(dihedral, window)
        counts = np.bincount(state, minlength=2 * self.n_windows)
        sampled = counts > 0
        order = np.argsort(state, kind="stable")  # MBAR wants the frames of one state together
        start = None if guess is None else np.nan_to_num(guess[sampled])
        f = np.full(len(counts), np.nan)
        f[sampled] = mbar.free_energies(self.bias(dihedral[order])[sampled], counts[sampled], start)
        return f

    def log_weights(self, dihedral: np.ndarray, window: np.ndarray, f: np.ndarray) -> np.ndarray:
        """Log weights (n,) to the ensemble without bias, -log Σ_k N_k exp(f_k - b_k), of mean weight 1."""
        counts = np.bincount(self.state(dihedral, window), minlength=len(f))
        used = (counts > 0) & ~np.isnan(f)
        terms = (f[used] + np.log(counts[used]))[:, None]
        chunks = np.array_split(dihedral, max(1, len(dihedral) // 50_000))
        log_w = np.concatenate([-logsumexp(terms - self.bias(chunk)[used], axis=0) for chunk in chunks])
        return log_w - logsumexp(log_w) + np.log(len(log_w))


def ring_of(options: dict, temperature: float, dihedral: np.ndarray) -> Ring:
    """The ring of a job's options at a temperature (K), cut where no frame (n,) is."""
    return Ring(options["n_windows"], options["kappa"], GAS_CONSTANT * temperature, largest_gap(dihedral))


def largest_gap(dihedral: np.ndarray) -> float:
    """The middle of the widest stretch of the circle without a frame: where the ring of windows is best cut."""
    angles = np.sort(dihedral)
    gaps = np.diff(angles, append=angles[0] + 2 * np.pi)
    return float(wrap(angles[gaps.argmax()] + gaps.max() / 2))


def analyse(
    dihedral: np.ndarray,
    window: np.ndarray,
    time: np.ndarray,
    repeat: np.ndarray,
    *,
    ring: Ring,
    state: tuple[float, float] = (0.0, 2.0),
    n_bins: int = 72,
    n_blocks: int = 10,
    max_frames: int = 200_000,
    seed: int = 0,
) -> SimulationResult:
    """ΔF and profile by MBAR from frames of the ``ring`` (arrays (n,)), with jackknife standard errors over blocks.

    A block is one stretch of time of one repeat, all windows together, so that slow motions that exchange carries
    around the ring stay inside a block (``n_blocks`` for each repeat). MBAR is solved on at most ``max_frames`` frames,
    drawn at random if there are more, to bound its memory; all frames are then weighted. Raises UserError for fewer
    frames of a window than blocks.
    """
    if (n := len(np.unique(time))) < n_blocks:
        raise UserError(f"Errors are those of {n_blocks} blocks of time, and there are {n} frames: simulate longer.")
    rng = np.random.default_rng(seed)
    edges = np.linspace(-np.pi, np.pi, n_bins + 1)
    bins = np.clip(np.digitize(dihedral, edges) - 1, 0, n_bins - 1)
    inside = in_interval(dihedral, state)
    kept = np.zeros(len(dihedral), dtype=bool)
    kept[rng.permutation(len(dihedral))[:max_frames]] = True

    def estimate(frames: np.ndarray, guess: np.ndarray | None = None) -> tuple[np.ndarray, float, np.ndarray]:
        solved = frames[kept[frames]]
        f = ring.free_energies(dihedral[solved], window[solved], guess)
        w = np.exp(ring.log_weights(dihedral[frames], window[frames], f))
        with np.errstate(divide="ignore"):
            profile = -np.log(np.bincount(bins[frames], weights=w, minlength=n_bins))
            return f, float(np.log(w[~inside[frames]].sum()) - np.log(w[inside[frames]].sum())), profile

    f, delta_f, profile = estimate(np.arange(len(dihedral)))
    lowest = profile.argmin()
    repeats, number = np.unique(repeat, return_inverse=True)
    block = number * n_blocks + np.minimum((time / time.max() * n_blocks - 1e-9).astype(int), n_blocks - 1)
    present = range(len(repeats) * n_blocks)
    left_out = [estimate(np.flatnonzero(block != b), f) for b in present]
    seen = np.isfinite(profile)
    with np.errstate(invalid="ignore"):  # bins that nobody saw
        shapes = np.array([shape - shape[lowest] for _, _, shape in left_out])
    return SimulationResult(
        delta_f=delta_f,
        delta_f_error=float(_jackknife_error(np.array([value for _, value, _ in left_out]))),
        centres=0.5 * (edges[1:] + edges[:-1]),
        profile=np.where(seen, profile - profile[lowest], np.nan),
        profile_error=np.where(seen, _jackknife_error(shapes), np.nan),
        parts=np.array([estimate(np.flatnonzero(block == b), f)[1] for b in present]).reshape(len(repeats), n_blocks),
    )


def _jackknife_error(left_out: np.ndarray) -> np.ndarray:
    """Standard error from estimates (n_blocks, ...) that each leave out a block; NaN where one saw nothing."""
    with np.errstate(invalid="ignore"):
        return np.sqrt((len(left_out) - 1) * np.var(left_out, axis=0))
