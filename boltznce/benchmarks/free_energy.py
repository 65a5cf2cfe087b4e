"""CPU seconds to ±0.1 kT on a free-energy difference: by simulations, and by what a run has learned."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from boltznce.analysis.convergence import time_blocks
from boltznce.analysis.free_energy import (
    FreeEnergyDifference,
    choose_subset,
    free_energy_difference,
    judged_by_exact,
)
from boltznce.analysis.plotting import plot_seconds
from boltznce.analysis.reweighting import WeightedSamples
from boltznce.benchmarks.finished import measured_refinement, of_own_isomer, open_finished
from boltznce.benchmarks.timing import time_once
from boltznce.compiling import wants_compiling
from boltznce.data.dataset import Dataset
from boltznce.data.jobs import jobs_of
from boltznce.data.reference import result_of
from boltznce.data.simulate import simulate
from boltznce.errors import UserError
from boltznce.methods.drawing import Generator
from boltznce.methods.findings import COSTS, training_costs, walker_of
from boltznce.methods.refinement import require_base
from boltznce.precision import ordinary_tensors
from boltznce.run import Run
from boltznce.settings import require_keywords
from boltznce.smc import corrected_by_ancestors, refined_free_energy_difference
from boltznce.systems.base import System
from boltznce.systems.isomers import own_isomers

__all__ = ["free_energy_figure", "free_energy_table", "measure_free_energy", "seconds_to"]

TARGET = 0.1  # kT, the standard error to which all are brought
NO_COMPILER = "left out, for want of a C++ compiler"


def measure_free_energy(
    run: str | None,
    simulations: Mapping[str, Mapping[str, Any]],
    *,
    n_draws: int,
    n_walkers: int,
    n_correction: int,
    trust: bool = False,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> list[dict]:
    """One row for each way to the ΔF of a run's state: simulations made anew, fresh draws of the run, these refined.

    A row has ``value`` and ``std_error`` in kT (None: not finite), ``reliable`` and, if not, why in ``message``;
    ``spent``, CPU seconds of this process and its workers, compiling and analysis left aside, of which ``fixed`` do not
    depend on the error that is wanted; ``training``, those of the run's training and the simulation of its data, 0 of
    simulations; ``off`` and ``off_error``, the distance to the reference that ships with the package and its error,
    None without one. A row that this machine cannot have says so in ``message``, and has nothing else.

    Args:
        run: the folder of a finished run of one molecule that can be refined.
        simulations: label -> keywords of `boltznce.data.jobs.jobs_of`.
        n_draws, n_walkers: how many are drawn, and how many of these refined, as many of the state as of the rest.
        n_correction: walkers drawn by weight whose ancestors' exact likelihoods correct an EBM.

    Raises UserError for another run, settings of simulations that make no sense, and where there is a GPU.
    """
    opened = open_finished(run, "free_energy", device, trust)
    system, generator = opened.system, opened.generator()
    if torch.cuda.is_available():
        raise UserError("what=free_energy counts CPU seconds: hide the GPU, by CUDA_VISIBLE_DEVICES= before python.")
    if system.state is None:
        raise UserError(f"what=free_energy is about a state, and {system.name} has none: choose a run with one.")
    require_base(generator)
    plans = {}
    for label, settings in simulations.items():
        require_keywords(jobs_of, settings, f"the simulation {label}")
        plans[label] = jobs_of(system, **settings, seed=seed)[0]
    rows = []
    with tqdm(total=len(plans) + 1, desc="free energy", unit="way") as bar:
        for label, job in plans.items():
            way = label.replace("_", " ")
            if job.engine == "torch" and str(job.compile).lower() == "true" and not wants_compiling("true"):
                rows.append({"way": way, "message": NO_COMPILER})
            else:
                with tempfile.TemporaryDirectory() as folder:
                    rows.append({"way": way} | _simulated(system, Path(folder), simulations[label], seed))
            bar.update()
        rows += _learned(opened, generator, n_draws, n_walkers, n_correction, seed)
        bar.update()
    reference = system.reference()
    for row in rows:
        row["off"] = row["off_error"] = None
        if reference is not None and row.get("std_error") is not None:
            known = reference["delta_f"]
            row |= {"off": row["value"] - known["value"], "off_error": math.hypot(row["std_error"], known["std_error"])}
    return rows


# ---- simulations ----------------------------------------------------------------------------------------------------


def _simulated(system: System, folder: Path, settings: Mapping[str, Any], seed: int) -> dict:
    """One simulation, in a worker. A ps of a walker costs the same all along; fixed are those before its frames."""
    dataset = simulate(system, folder / "data", n_processes=1, **settings, seed=seed)
    job, (value, error, message) = dataset.meta["settings"], _free_energy_of(dataset, system)
    building, sampling = job["options"].get("bias_duration", 0.0), dataset.meta["ps_per_walker"]
    a_picosecond = dataset.meta["cpu_seconds"] / (building + sampling)  # the equilibration is not among them
    fixed = (job["equilibration"] + building) * a_picosecond
    spent = fixed + sampling * a_picosecond
    return _estimate(value, error, not message, message) | {"spent": spent, "fixed": fixed, "training": 0.0}


def _free_energy_of(dataset: Dataset, system: System) -> tuple[float, float, str]:
    """ΔF, its standard error, and why not to rely on them; of data with a bias as `boltznce simulate` has them."""
    if dataset.meta["settings"]["method"] in ("umbrella", "metadynamics"):
        result = result_of(dataset, system)
        return result.delta_f, result.delta_f_error, result.message
    frames = dataset.take(own_isomers(system, dataset.positions))
    inside = system.in_state(np.asarray(frames.positions))
    found = free_energy_difference(inside, frames.log_weights, walkers=time_blocks(inside, walker_of(frames)))
    return found.value, found.std_error, found.message


# ---- what was learned -----------------------------------------------------------------------------------------------


@ordinary_tensors()
def _learned(run: Run, generator: Generator, n_draws: int, n_walkers: int, n_correction: int, seed: int) -> list[dict]:
    """Rows of fresh draws by their weights, refined, and, of an EBM, corrected by exact likelihoods of ancestors."""
    system, device, likelihood = run.system, generator.device, generator.default_likelihood
    n_batch = min(n_draws, generator.batch_size(likelihood))
    run.sample(n_batch, seed=seed + 1)  # compiles what is compiled
    drawn, drawing = time_once(lambda: run.sample(n_draws, seed=seed), device)
    draws = of_own_isomer(system, drawn)
    weighted = free_energy_difference(system.in_state(np.asarray(draws.positions)), draws.log_weights, seed=seed)
    refined, refining = measured_refinement(generator, draws, seed, n_walkers)
    inside = system.in_state(np.asarray(refined.positions))
    by_ancestors = inside, refined.log_weights, refined.ancestors
    after = refined_free_energy_difference(*by_ancestors)
    refining += drawing
    found = {f"flow + {likelihood.replace('ebm', 'EBM')} weights": (weighted, drawing), "refined": (after, refining)}
    if likelihood == "ebm":
        rng = np.random.default_rng(seed)
        subset = choose_subset(inside, refined.log_weights, n_correction, rng, drawn_by="weights")
        ancestors, of = np.unique(refined.ancestors[subset], return_inverse=True)
        exact, correcting = _exact(generator, draws, ancestors)
        corrected = corrected_by_ancestors(*by_ancestors, subset, draws.log_prob[ancestors][of], exact[of])
        found = {way: (judged_by_exact(own, corrected), seconds) for way, (own, seconds) in found.items()}
        found["refined, corrected by exact likelihoods"] = corrected, refining + correcting
    training = training_costs(run.folder.stages, COSTS[device.type != "cpu"])
    return [{"way": way} | _row(*each) | {"training": training} for way, each in found.items()]


def _exact(generator: Generator, draws: WeightedSamples, index: np.ndarray) -> tuple[np.ndarray, float]:
    """Exact log q of some draws, and the seconds taken."""
    x = torch.from_numpy(np.array(draws.positions[index]))
    batches = x.split(generator.batch_size("exact"))
    generator.log_prob(x[:1])  # compiles what is compiled
    log_q, seconds = time_once(lambda: torch.cat([generator.log_prob(batch) for batch in batches]), generator.device)
    return log_q.cpu().numpy(), seconds


def _row(found: FreeEnergyDifference, seconds: float) -> dict:
    known = _estimate(found.value, found.std_error, found.reliable, found.message)
    return known | {"spent": seconds, "fixed": 0.0}


def _estimate(value: float, error: float, reliable: bool, message: str) -> dict:
    """What a row says of ΔF; None for what is not finite."""
    numbers = (float(number) if math.isfinite(number) else None for number in (value, error))
    return dict(zip(("value", "std_error"), numbers, strict=True)) | {"reliable": reliable, "message": message}


# ---- table and figure -----------------------------------------------------------------------------------------------


def seconds_to(row: Mapping[str, Any], target: float = TARGET) -> float:
    """CPU seconds to a standard error of ``target`` kT: what is not fixed goes as one over the error squared.

    >>> seconds_to({"spent": 100.0, "fixed": 40.0, "std_error": 0.2}, 0.1)
    280.0
    """
    return row["fixed"] + (row["spent"] - row["fixed"]) * (row["std_error"] / target) ** 2


def free_energy_table(rows: Sequence[Mapping]) -> str:
    """Markdown: a line for each way; sentences on those that cannot be relied on, or are not there."""
    titles = ("way", "spent (s)", "ΔF (kT)", "− reference", f"seconds to ±{TARGET} kT", "with training")
    lines, notes = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"], []
    for row in rows:
        if row["message"]:
            notes.append(f"- {row['way']}: {row['message']}")
        if "spent" not in row:
            continue
        off = "-" if row["off"] is None else f"{row['off']:+.2f} ± {row['off_error']:.2f}"
        seconds = trained = "not reliable"
        if row["reliable"]:
            seconds, trained = f"{seconds_to(row):.0f}", f"{seconds_to(row) + row['training']:.0f}"
        value = "-" if row["std_error"] is None else f"{row['value']:.2f} ± {row['std_error']:.2f}"
        cells = (row["way"], f"{row['spent']:.0f}", value, off, seconds)
        lines.append(f"| {' | '.join(cells)} | {trained if row['training'] else '-'} |")
    return "\n".join([*lines, "", *notes]).strip()


def free_energy_figure(rows: Sequence[Mapping]) -> Figure:
    """Seconds to ±0.1 kT, and with the training, of the ways that can be relied on."""
    reliable = [row for row in rows if row.get("reliable")]
    return plot_seconds(
        {row["way"]: (seconds_to(row), row["training"]) for row in reliable}, f"CPU seconds to ±{TARGET} kT"
    )
