"""What a report of one system is made from: draws, data and exact likelihoods, loaded, filtered and weighed once."""

import itertools
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from boltznce.analysis.convergence import time_blocks
from boltznce.analysis.free_energy import FreeEnergyDifference, free_energy_difference
from boltznce.analysis.metrics import energy_cut
from boltznce.analysis.reweighting import WeightedSamples
from boltznce.data.dataset import Dataset, boltzmann_indices
from boltznce.errors import UserError
from boltznce.methods.views import View, views_of
from boltznce.methods.workspace import Workspace
from boltznce.records import damaged, read_array
from boltznce.run_folder import AGAIN
from boltznce.systems.base import System
from boltznce.systems.isomers import allowed_conformers, excluded_conformers

log = logging.getLogger(__name__)

__all__ = [
    "COSTS",
    "Data",
    "ExactSubset",
    "Findings",
    "Frames",
    "gather",
    "held_out_data",
    "training_costs",
    "training_seconds",
    "walker_of",
]

MANY_WALKERS = 20  # of metadynamics, which can be taken for independent visits to states
NO_FRAMES = "There is no comparison with data of {}: no frames of its proxy were refined to it (evaluation.n_frames)."
COSTS = ("cpu_seconds", "seconds")  # of a stage, by the CPU's clock and by that on the wall
N_GROUPS = 1000  # of frames that can be taken for independent surroundings, walkers or blocks of their time


@dataclass(frozen=True)
class ExactSubset:
    """Exact log-likelihoods (m,) of the samples of ``index`` (m,), which may come more than once."""

    index: np.ndarray
    log_prob: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> "ExactSubset | None":
        """What `evaluation.exact_subset` left; None where there is none."""
        if not (folder / "subset.npy").exists():
            return None
        index, log_prob = read_array(folder / "subset.npy", AGAIN, (None,), "i8"), WeightedSamples.load(folder).log_prob
        if len(np.unique(index)) != len(log_prob):
            raise damaged(folder / "subset.npy", "it is not of the samples beside it", AGAIN)
        return cls(index, log_prob[np.searchsorted(np.unique(index), index)])


def walker_of(frames: Dataset) -> np.ndarray:
    """A number (n,) for the trajectory of each frame: a window, walker or replica of a repeat."""
    return frames.repeat.astype(np.int64) * (int(frames.window.max()) + 1) + frames.window


@dataclass(frozen=True)
class Data:
    """What samples are compared with.

    Attributes:
        whole: all that there is of the system.
        frames: those that no flow was trained on and that are not left out, with their weights.
        resampled: of these, some resampled to the Boltzmann distribution, in order of time.
        excluded: masks of what is left out of those that no flow was trained on; ``log_weights``: of these.
    """

    whole: Dataset
    frames: Dataset
    resampled: Dataset
    excluded: Mapping[str, np.ndarray]
    log_weights: np.ndarray

    @property
    def method(self) -> str | None:
        """What made the frames; None where nothing tells."""
        return (self.frames.meta.get("settings") or {}).get("method")

    @property
    def is_simulated(self) -> bool:
        """Whether a simulation made the frames, here or elsewhere."""
        return bool(self.frames.meta.get("cpu_seconds")) or self.method == "imported"

    @property
    def is_time_series(self) -> bool:
        """Whether frames follow the Boltzmann distribution and come one after another in time."""
        return np.ptp(self.frames.log_weights) == 0 and self.is_simulated

    @property
    def has_trajectories(self) -> bool:
        """Whether the frames of a walker follow each other as its moves do, under whatever bias."""
        return self.is_time_series or self.method == "metadynamics"

    @property
    def walker(self) -> np.ndarray:
        """A number (frames,) for the trajectory of each frame (see `walker_of`)."""
        return walker_of(self.frames)

    @property
    def walkers(self) -> list[np.ndarray]:
        """Masks of the frames of each trajectory."""
        return [self.walker == walker for walker in np.unique(self.walker)]


class Frames(NamedTuple):
    """What follows the target on each side of a state: (k,) conformers, log weights, numbers of what is independent."""

    positions: np.ndarray
    energies: np.ndarray
    log_weights: np.ndarray
    groups: np.ndarray


@dataclass(frozen=True)
class Findings:
    """Of one system, at the temperature of the weights.

    Attributes:
        drawn: all kept draws; ``excluded``: masks of those that are left out, by why; ``samples``: the others.
        subsets: exact likelihoods of samples drawn uniformly, and by weight, and of ``frames`` by theirs. Where there
            are refined walkers it is these that are drawn by weight, and the likelihoods are their ancestors'.
        seconds: a sample, of each kind of work.
        settings: the config's section ``evaluation``; ``seed``: of bootstraps and subsets.
        notes: sentences on how the samples were made.
        flows: (temperature, draws) at other temperatures; ``steps``: records of the annealing between them.
        frames_log_prob: exact log q of the data's frames, where it costs little.
        training_seconds: spent before the evaluation, the simulation of the data that were trained on among them.
        refined: some of the samples, annealed to the target, their ancestors among the samples; None where none were.
    """

    system: System
    views: list[View]
    drawn: WeightedSamples
    excluded: Mapping[str, np.ndarray]
    samples: WeightedSamples
    data: Data | None
    subsets: Mapping[str, ExactSubset]
    reference: dict | None
    seconds: Mapping[str, float]
    settings: Mapping[str, Any]
    seed: int
    notes: tuple[str, ...] = ()
    flows: tuple[tuple[float, WeightedSamples], ...] = ()
    steps: tuple[Mapping, ...] = ()
    frames_log_prob: np.ndarray | None = None
    training_seconds: float = 0.0
    refined: WeightedSamples | None = None

    @property
    def weighed(self) -> bool:
        """Whether energies and weights of the draws are those of the system, and not of its proxy."""
        return self.system.proxy is None

    @property
    def likelihood(self) -> str:
        """Whose likelihood the weights are made of: ``ebm`` or ``exact``."""
        return self.drawn.meta["likelihood"]

    @property
    def exact(self) -> ExactSubset | None:
        return self.subsets.get("uniform")

    @property
    def correction(self) -> ExactSubset | None:
        return self.subsets.get("weights")

    @cached_property
    def sides(self) -> tuple[ExactSubset, ExactSubset, np.ndarray] | None:
        """Of draws (at random in each state) and of ``frames`` exact likelihoods, with the frames' log weights.

        None where one of them is not known, or either state has no frames.
        """
        draws, frames = self.exact, self.subsets.get("frames")
        if self.likelihood == "exact":
            draws = ExactSubset(np.arange(len(self.samples)), self.samples.log_prob)
        if self.frames is None or draws is None or self.system.state is None or not self.weighed:
            return None
        if self.frames_log_prob is not None:
            frames = ExactSubset(np.arange(len(self.frames_log_prob)), self.frames_log_prob)
            log_weights = self.frames.log_weights
        elif frames is not None:
            index, first, repeats = np.unique(frames.index, return_index=True, return_counts=True)
            frames, log_weights = ExactSubset(index, frames.log_prob[first]), np.log(repeats)
        else:
            return None
        inside = self.inside_of(self.frames)[frames.index]
        return (draws, frames, log_weights) if inside.any() and not inside.all() else None

    @cached_property
    def frames(self) -> Frames | None:
        """The other side of the draws in two-sided estimates: refined walkers, or the data, whichever is asked for.

        None where there are none, or the data are not of the target.
        """
        if self.refined_frames:
            walkers = self.refined
            if walkers is None:
                return None
            return Frames(walkers.positions, walkers.energy, walkers.log_weights, walkers.ancestors)
        if self.data is None or not self.data.whole.of_target:
            return None
        data = self.data.frames
        return Frames(data.positions, data.energies, data.log_weights, self.frame_groups)

    @property
    def frames_name(self) -> str:
        """What reports call them."""
        return "refined walkers" if self.refined_frames else f"{self.data_name} that no flow was trained on"

    @property
    def refined_frames(self) -> bool:
        """Whether they are refined walkers."""
        return self.settings.get("frames") == "refined"

    @cached_property
    def frame_groups(self) -> np.ndarray:
        """A number (frames,) of the data for what two-sided estimates take for independent: blocks of a walker's time.

        About a thousand in all: frames need not have changed states, only what surrounds them in one, so blocks may be
        short. Exact draws all are independent.
        """
        frames, walker = self.data.frames, self.data.walker
        if self.system.exact and not frames.meta.get("cpu_seconds"):
            return np.arange(len(frames))
        n = max(1, round(N_GROUPS / len(self.data.walkers)))
        edges = np.linspace(frames.time[0], frames.time[-1], n + 1)[1:-1]
        return walker * n + np.searchsorted(edges, frames.time)

    @property
    def bootstrap(self) -> dict:
        return {"n_bootstrap": self.settings.n_bootstrap, "seed": self.seed}

    @cached_property
    def md_difference(self) -> FreeEnergyDifference | None:
        """ΔF of a simulation, its error by what is independent in it; None of data whose errors are not known."""
        if self.md_units is None:
            return None
        frames = self.data.frames
        return free_energy_difference(self.inside_of(frames), frames.log_weights, walkers=self.md_units)

    @cached_property
    def md_units(self) -> np.ndarray | None:
        """What is independent in a simulation of the system's state (see `units_of`); None without a state."""
        if self.system.state is None or self.data is None:
            return None
        return self.units_of(self.inside_of(self.data.frames))

    def units_of(self, inside: np.ndarray) -> np.ndarray | None:
        """A number (frames,) for what visits a state, a mask of frames, independently: blocks of time, or many walkers.

        None of windows of umbrella sampling, say, whose weights have errors in common, and of what is not the target's.
        """
        if not self.data.is_simulated or not self.data.whole.of_target:
            return None
        if self.data.is_time_series:
            return time_blocks(inside, self.data.walker)
        return self.data.walker if self.data.has_trajectories and len(self.data.walkers) >= MANY_WALKERS else None

    def inside_of(self, frames: Dataset | WeightedSamples | Frames) -> np.ndarray:
        """Mask of who is in the state."""
        return self.system.in_state(np.asarray(frames.positions))

    @cached_property
    def inside(self) -> np.ndarray:
        """Mask of the samples in the state."""
        return self.inside_of(self.samples)

    @cached_property
    def refined_inside(self) -> np.ndarray | None:
        """Mask of the refined samples in the state; None without a state, or refined walkers."""
        known = self.refined is not None and self.system.state is not None
        return self.inside_of(self.refined) if known else None

    @property
    def data_name(self) -> str:
        """What reports call the data."""
        return "data" if self.system.exact else "MD"

    @property
    def cut(self) -> float:
        """Energy above which samples are left out of E-W2."""
        return energy_cut(self.data.resampled.energies)

    def panels(self, of: Callable[[np.ndarray], Any], frames: Dataset | None = None) -> dict[str, tuple[Any, Any]]:
        """What ``of`` makes of positions, and log weights: data (resampled, or ``frames``), flow, weighted, refined."""
        ours, data = of(self.samples.positions), {}
        if self.data is not None:
            chosen = (self.data.resampled, None) if frames is None else (frames, frames.log_weights)
            data = {self.data_name: (of(chosen[0].positions), chosen[1])}
        found = data | {"flow": (ours, None)}
        if self.weighed:
            found["flow, weighted"] = (ours, self.samples.log_weights)
        if self.refined is not None:
            found["refined"] = (of(self.refined.positions), self.refined.log_weights)
        return found


def gather(work: Workspace, member: System) -> Findings:
    """Everything that is on disk of one member, and what it is compared with."""
    generator = work.models.of(member)
    system = generator.system
    drawn = WeightedSamples.load(work.samples("weighted", member))
    excluded = excluded_conformers(system, drawn.positions)
    samples = drawn[allowed_conformers(excluded, len(drawn))]
    data, missing = held_out_data(work, member, system)
    place = work.samples("refined", member)
    refined = WeightedSamples.load(place) if (place / "meta.yaml").exists() else None
    kinds = ("uniform", "weights", "frames")
    subsets = {kind: ExactSubset.load(work.samples(f"exact_{kind}", member)) for kind in kinds}
    return Findings(
        system,
        views_of(system),
        drawn,
        excluded,
        samples,
        data,
        {kind: subset for kind, subset in subsets.items() if subset is not None},
        system.reference(),
        work.folder.stages["evaluation"]["per_sample"][member.name],
        work.config.evaluation,
        work.config.seed,
        (*generator.notes, *missing),
        training_seconds=training_seconds(work),
        refined=refined,
    )


def training_seconds(work: Workspace) -> float:
    """Of a run and the one that its models come from: of the CPU, or by the wall clock where the device is a GPU."""
    key = COSTS[work.device.type != "cpu"]
    return training_costs(work.folder.stages, key) + work.parent.get("costs", {}).get(key, 0.0)


def training_costs(stages: Mapping[str, Mapping[str, Any]], key: str) -> float:
    """Of all stages before the evaluation; of the data, what their simulation took, in whichever run that was.

    ``stages``: a run's records; ``key``: which of `COSTS`.
    """
    before = itertools.takewhile(lambda name: name != "evaluation", stages)
    spent = sum(stages[name].get(key, np.nan) for name in before if name != "data")
    return spent + stages.get("data", {}).get("simulation_seconds", 0.0)


def held_out_data(work: Workspace, member: System, system: System) -> tuple[Data | None, tuple[str, ...]]:
    """Frames that the flow was not trained on, exact draws where they can be had, or None where there is nothing.

    And a sentence where data were there once, or are no data of this run: they are not compared with, and that is all.
    """
    section, missing = work.config.evaluation, ()
    if member.name in work.folder.stages.get("data", {}).get("datasets", {}) and not work.frames_exist(member):
        folder = work.config.data.folder
        missing = (f"There is no comparison with the data of {member.name}, which are no longer in {folder}.",)
    n = section.n_reference or sys.maxsize
    if system.proxy is not None:
        place = work.samples("frames", member)
        if not (place / "meta.yaml").exists():
            return None, (NO_FRAMES.format(system.name), *missing)
        whole = frames = Dataset.load(place)
    elif work.frames_exist(member):
        try:
            whole = work.frames(member)
        except UserError as error:
            return None, (f"There is no comparison with data: {error}",)
        frames = work.unseen(member, whole)
    elif system.exact:
        n = section.n_reference or section.n_samples
        x = system.sample(n, work.generator("exact draws", member)).cpu()
        zeros, order, energies = np.zeros(n), np.arange(n), system.energy(x).double().numpy()
        whole = frames = Dataset(x.numpy(), energies, zeros, order, zeros, order % 2, None, {})
    else:
        return None, missing
    excluded = excluded_conformers(system, frames.positions)
    kept = frames.take(allowed_conformers(excluded, len(frames)))
    if not len(kept) or not np.isfinite(kept.log_weights).any():
        log.warning("All data of %s are other isomers than its structure: compared with none.", member.name)
        return None, missing
    index = boltzmann_indices(kept.log_weights, min(n, len(kept)), work.numpy_generator("held out", member))
    return Data(whole, kept, kept.take(np.sort(index)), excluded, frames.log_weights), missing
