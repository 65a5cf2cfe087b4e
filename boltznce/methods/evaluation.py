"""The stage before the report.

Fresh weighted samples of every member to test, exact likelihoods of some, and what they cost.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from boltznce.analysis.free_energy import choose_subset
from boltznce.analysis.reweighting import WeightedSamples, WeightedSamplesWriter
from boltznce.clock import clock_of
from boltznce.io import atomic_file
from boltznce.methods.drawing import Generator, draw_to_folder
from boltznce.methods.findings import held_out_data
from boltznce.methods.proxy import refine_frames
from boltznce.methods.refinement import refine, settings_of
from boltznce.methods.workspace import Workspace
from boltznce.smc import Kin
from boltznce.systems.base import System
from boltznce.systems.isomers import allowed_conformers, excluded_conformers, require_some_left

__all__ = ["evaluate", "exact_likelihoods"]


def evaluate(work: Workspace) -> dict:
    """Draw weighted samples of every member to test; refine some; give exact likelihoods to some, and some of the data.

    Where weights are an EBM's, to two subsets of the draws: that drawn uniformly (as many in the state as in the rest)
    measures how far EBM and exact likelihood are apart, and is the flow's side of the two-sided free energy; that drawn
    by weight, with repeats, corrects the free energy. The latter are, where there are refined walkers, the ancestors of
    those. Frames of the data, or refined walkers (drawn by weight, as many in the state), are the other side; data of a
    proxy are annealed from it to the system, to be compared with.
    """
    tests = work.system.members("test")
    return {
        "per_sample": {member.name: _evaluate(work, member) for member in tqdm(tests, desc="evaluation", unit="system")}
    }


def _evaluate(work: Workspace, member: System) -> dict[str, float]:
    """Leaves ``samples/weighted`` and ``samples/exact_*`` of one member; returns seconds a sample of each work."""
    section, generator = work.config.evaluation, work.models.of(member)
    likelihood, draws = generator.default_likelihood, work.folder.leave(work.samples("weighted", member))
    samples = draw_to_folder(
        generator,
        draws,
        section.n_samples,
        likelihood,
        lambda k: work.generator("evaluation", member, k),
        format=section.get("format", "npy"),
    )
    excluded = excluded_conformers(member, samples.positions)
    require_some_left(member, excluded, len(samples), "samples", "train the flow longer (flow.fit.steps)")
    seconds = {"draw": _seconds_per_draw(generator, likelihood, work.generator("timing", member))}
    conformers = samples[allowed_conformers(excluded, len(samples))]
    refined = _refined(work, member, generator, conformers) if section.get("refine") and member.differentiable else None
    if refined is not None:
        seconds["refine"] = refined.meta["refinement"]["seconds"] / len(refined)
        _refine_data(work, member)
    if likelihood == "ebm":
        rng = work.numpy_generator("exact subset", member)
        subset = _subset(member, conformers, section.n_exact, rng, "uniform")
        seconds |= _exact(work, member, "exact_uniform", conformers, subset)
        subset = _subset(member, conformers if refined is None else refined, section.n_correction, rng, "weights")
        if refined is None:
            seconds |= _exact(work, member, "exact_weights", conformers, subset)
        elif len(subset):
            subset = _kin(member, refined, subset)
            seconds |= _exact(work, member, "exact_weights", conformers[refined.ancestors], subset)
        x = torch.from_numpy(np.array(conformers.positions[:4096])).to(work.device)
        generator.ebm.log_prob_in_batches(x[:8])
        seconds["ebm"] = _timed(lambda: generator.ebm.log_prob_in_batches(x), work.device)[1] / len(x)
    if section.get("n_frames") and member.proxy is None:
        frames, subset = _frames(work, member, generator.system, refined)
        seconds |= _exact(work, member, "exact_frames", frames, subset)
    return seconds


def _refined(work: Workspace, member: System, generator: Generator, conformers: WeightedSamples) -> WeightedSamples:
    """Leave some of the draws, refined, in ``samples/refined``."""
    n = work.config.evaluation.refine.n_walkers
    folder = work.folder.leave(work.samples("refined", member))
    seed = int(work.numpy_generator("refinement", member).integers(2**31))
    how = {"seed": seed, "n_walkers": n, "folder": folder, "format": work.config.evaluation.get("format", "npy")}
    return refine(generator, conformers, settings_of(work.config), **how)


def _refine_data(work: Workspace, member: System) -> None:
    """Leave frames of the data that no flow was trained on, refined, in ``samples/frames``, if there is a proxy."""
    n = work.config.evaluation.get("n_frames")
    if n and member.proxy is not None and work.frames_exist(member):
        folder, seed = work.folder.leave(work.samples("frames", member)), work.numpy_generator("frames", member)
        frames = work.unseen(member, work.frames(member))
        if not frames.of_target:  # which annealing from the proxy begins with
            return
        settings = dataclasses.replace(settings_of(work.config).from_proxy, n_walkers=n)
        refine_frames(member, frames, settings, seed=int(seed.integers(2**31)), folder=folder)


def _kin(system: System, refined: WeightedSamples, subset: np.ndarray) -> np.ndarray:
    """For each walker of the subset the first of its kin: of their ancestor one likelihood is enough."""
    kin = Kin.among(refined.ancestors, refined.log_weights, system.in_state(np.array(refined.positions)))
    return kin.first[kin.of[subset]]


def _frames(
    work: Workspace, member: System, system: System, refined: WeightedSamples | None
) -> tuple[WeightedSamples | None, np.ndarray]:
    """What is the other side of the draws, and which of it get exact likelihoods: none, if a side has none.

    These are refined walkers, or the data that no flow was trained on.
    """
    section, frames = work.config.evaluation, refined
    if section.frames == "data":
        data, _ = held_out_data(work, member, system)
        frames = None
        if data is not None and data.whole.of_target:
            kept = data.frames
            frames = WeightedSamples(kept.positions, kept.energies, np.zeros(len(kept)), kept.log_weights)
    if frames is None or system.state is None:
        return None, np.empty(0, dtype=np.int64)
    n = section.n_frames
    subset = _subset(system, frames, n, work.numpy_generator("exact frames", member), "weights")
    return frames, subset if len(subset) == 2 * (n // 2) else subset[:0]


def _exact(
    work: Workspace, member: System, name: str, samples: WeightedSamples | None, subset: np.ndarray
) -> dict[str, float]:
    """Leave exact likelihoods of a subset, with repeats, in ``samples/<name>``; returns the seconds a likelihood."""
    unique, folder = np.unique(subset), work.samples(name, member)
    if not len(unique):
        return {}
    work.folder.leave(folder)
    seconds = exact_likelihoods(work.models.of(member), samples, unique, folder, clock_of(work.device)) / len(unique)
    with atomic_file(work.folder.leave(folder / "subset.npy")) as path, open(path, "wb") as handle:
        np.save(handle, subset)
    return {"exact": seconds}


def exact_likelihoods(
    generator: Generator, samples: WeightedSamples, subset: np.ndarray, folder: Path, clock: Callable[[], float]
) -> float:
    """Save samples with exact log-likelihoods, batch by batch (a killed call goes on); returns the seconds taken."""
    if not (folder / "meta.yaml").exists():
        size = generator.batch_size("exact")
        meta = {"likelihood": "exact", "n": len(subset)}
        writer = WeightedSamplesWriter(folder, generator.system.topology, meta)
        for start in range(writer.n_written, len(subset), size):
            part = samples[subset[start : start + size]]
            begun = clock()
            log_prob = generator.log_prob(torch.from_numpy(np.array(part.positions))).cpu().numpy()
            milliseconds = round(1000 * (clock() - begun))
            writer.append(part.positions, part.energy, log_prob, counts={"milliseconds": milliseconds})
        writer.finish()
    return WeightedSamples.load(folder).meta["counts"]["milliseconds"] / 1000


def _subset(system: System, samples: WeightedSamples, n: int, rng: np.random.Generator, drawn_by: str) -> np.ndarray:
    """Indices of samples to be given exact likelihoods, in order where there are no repeats."""
    if not n or system.state is None:
        return np.empty(0, dtype=np.int64)
    inside = system.in_state(np.array(samples.positions))
    chosen = choose_subset(inside, samples.log_weights, n, rng, drawn_by=drawn_by)
    return np.sort(chosen) if drawn_by == "uniform" else chosen


def _seconds_per_draw(generator: Generator, likelihood: str, numbers: torch.Generator) -> float:
    """Seconds (see `boltznce.clock`) a kept sample of one batch."""
    n = generator.batch_size(likelihood)
    generator.draw(min(8, n), likelihood, numbers)
    kept, seconds = _timed(lambda: generator.draw(n, likelihood, numbers).log_prob, numbers.device)
    return seconds / max(1, len(kept))


def _timed(call: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    """The result of a call, and the seconds that it took."""
    clock = clock_of(device)
    begun = clock()
    result = call().cpu()
    return result, clock() - begun
