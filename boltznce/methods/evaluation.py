"""The stage before the report.

Fresh weighted samples of every member to test, exact likelihoods of some, and what they cost.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from boltznce.analysis.free_energy import choose_subset
from boltznce.analysis.reweighting import WeightedSamples, WeightedSamplesWriter
from boltznce.errors import UserError
from boltznce.io import atomic_file
from boltznce.methods.drawing import Generator, draw_to_folder
from boltznce.methods.models import FlowGenerator
from boltznce.methods.workspace import Workspace
from boltznce.systems.base import System

__all__ = ["allowed_conformers", "evaluate", "exact_likelihoods", "excluded_conformers", "require_some_left"]

TURNED = "peptide bond turned"
SUBSETS = {"uniform": "n_exact", "weights": "n_correction"}  # how they are drawn, and the setting that says how many


def evaluate(work: Workspace) -> dict:
    """Draw weighted samples of every member to test; give two subsets exact likelihoods, where weights are an EBM's.

    The subset drawn uniformly (as many in the state as in the rest) measures how far EBM and exact likelihood are
    apart; that drawn by weight, with repeats, corrects the free energy.
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
        generator, draws, section.n_samples, likelihood, lambda k: work.generator("evaluation", member, k)
    )
    excluded = excluded_conformers(member, samples.positions)
    require_some_left(member, excluded, len(samples), "samples", "train the flow longer (flow.fit.steps)")
    seconds = {"draw": _seconds_per_draw(generator, likelihood, work.generator("timing", member))}
    if likelihood != "ebm":
        return seconds
    conformers = samples[allowed_conformers(excluded, len(samples))]
    rng = work.numpy_generator("exact subset", member)
    for drawn_by, count in SUBSETS.items():
        subset = _subset(member, conformers, section[count], rng, drawn_by)
        unique = np.unique(subset)
        folder = work.samples(f"exact_{drawn_by}", member)
        if len(unique):
            work.folder.leave(folder)
            seconds.setdefault("exact", exact_likelihoods(generator, conformers, unique, folder) / len(unique))
            with atomic_file(work.folder.leave(folder / "subset.npy")) as path, open(path, "wb") as handle:
                np.save(handle, subset)
    x = torch.from_numpy(np.array(conformers.positions[:4096])).to(work.device)
    seconds["ebm"] = _seconds(lambda: generator.ebm.log_prob_in_batches(x)) / len(x)
    return seconds


def excluded_conformers(system: System, positions: np.ndarray) -> dict[str, np.ndarray]:
    """Masks (n,) of other isomers than the structure is, which no simulation at 300 K turns into it, by why.

    Figures are conditional on the structure's own cis and trans peptide bonds and stereocentres.
    """
    x, masks = torch.from_numpy(np.array(positions)), {}
    if system.omegas:
        masks[TURNED] = (system.isomers(x) < 0).any(dim=1).numpy()
    if system.stereocentres:
        masks["inverted stereocentre"] = (system.chirality(x) < 0).any(dim=1).numpy()
    return masks


def allowed_conformers(excluded: Mapping[str, np.ndarray], n: int) -> np.ndarray:
    """Mask (n,) of what no mask of `excluded_conformers` holds."""
    return ~np.any([np.zeros(n, dtype=bool), *excluded.values()], axis=0)


def require_some_left(
    system: System,
    excluded: Mapping[str, np.ndarray],
    n: int,
    what: str,
    remedy: str,
    weights: np.ndarray | None = None,
) -> float:
    """The share by ``weights`` (n,) that no mask excludes; UserError, with its ``remedy``, where nothing is left."""
    kept = allowed_conformers(excluded, n)
    share = float(np.average(kept, weights=weights))
    if not share > 0:
        reasons = " or ".join(why for why, mask in excluded.items() if mask.any())
        raise UserError(
            f"All {n} {what} of {system.name} are other isomers than its structure ({reasons}), so that nothing is "
            f"left to report on: {remedy}."
        )
    return share


def exact_likelihoods(generator: FlowGenerator, samples: WeightedSamples, subset: np.ndarray, folder: Path) -> float:
    """Save samples with exact log-likelihoods, batch by batch (a killed call goes on); returns the seconds taken."""
    if not (folder / "meta.yaml").exists():
        size = generator.batch_size("exact")
        meta = {"likelihood": "exact", "n": len(subset)}
        writer = WeightedSamplesWriter(folder, generator.system.topology, meta)
        for start in range(writer.n_written, len(subset), size):
            part = samples[subset[start : start + size]]
            begun = time.perf_counter()
            log_prob = generator.log_prob(torch.from_numpy(np.array(part.positions))).cpu().numpy()
            milliseconds = round(1000 * (time.perf_counter() - begun))
            writer.append(part.positions, part.energy, log_prob, counts={"milliseconds": milliseconds})
        writer.finish()
    return WeightedSamples.load(folder).meta["counts"]["milliseconds"] / 1000


def _subset(system: System, samples: WeightedSamples, n: int, rng: np.random.Generator, drawn_by: str) -> np.ndarray:
    """Indices of samples to be given exact likelihoods, in order where there are no repeats."""
    if not n or system.state is None:
        return np.empty(0, dtype=np.int64)
    values = system.coordinate(np.array(samples.positions), system.state.coordinate)
    chosen = choose_subset(values, samples.log_weights, n, rng, system.state.interval, drawn_by)
    return np.sort(chosen) if drawn_by == "uniform" else chosen


def _seconds_per_draw(generator: Generator, likelihood: str, numbers: torch.Generator) -> float:
    """CPU seconds a kept sample of one batch, all threads together (wall clock where there is a GPU)."""
    clock = time.process_time if numbers.device.type == "cpu" else time.perf_counter
    n = generator.batch_size(likelihood)
    generator.draw(min(8, n), likelihood, numbers)
    begun = clock()
    kept = generator.draw(n, likelihood, numbers).log_prob.cpu()
    return (clock() - begun) / max(1, len(kept))


def _seconds(call: Callable[[], Tensor]) -> float:
    """Wall-clock seconds of a second call."""
    call()
    begun = time.perf_counter()
    call().cpu()
    return time.perf_counter() - begun
