"""The last stages of a run for many molecules: weighted draws for every test peptide, which it has never seen, and one report of all."""

import time
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from boltznce.analysis import plotting
from boltznce.analysis.convergence import frames_for_error
from boltznce.analysis.free_energy import choose_subset, free_energy_difference, free_energy_profile, in_state, stratum_log_weights
from boltznce.analysis.metrics import SampledDistance, likelihood_agreement
from boltznce.analysis.report import write_report
from boltznce.analysis.reweighting import WeightedSamples
from boltznce.analysis.tica import tica_projection
from boltznce.data.dataset import Dataset
from boltznce.data.many import load_many
from boltznce.errors import UserError
from boltznce.io import atomic_file
from boltznce.methods.drawing import draw_to_folder
from boltznce.methods.evaluation import LOSSES, exact_likelihoods
from boltznce.methods.free_energy import state_in_words
from boltznce.methods.report_parts import (
    allowed_conformers,
    ess_row,
    excluded_conformers,
    learning_curves,
    resampled,
    wasserstein_distances,
)
from boltznce.methods.transfer import TransferModels, shared_models
from boltznce.methods.views import TorsionView
from boltznce.methods.workspace import Workspace
from boltznce.systems.molecular import MolecularSystem

__all__ = ["evaluate", "evaluate_peptide", "peptide_results", "report", "write_peptide_report"]

HIGHEST_FREE_ENERGY = 25.0  # kT, of a profile's figure
MD_BLOCKS = 20  # of time, for the error of the simulation's own ΔF
MD_POINTS = 20_000  # frames of the simulation that figures and distances are made from


def evaluate(work: Workspace) -> dict:
    """Weighted draws for each test peptide; where the weights are an EBM's, exact likelihoods of a subset too."""
    models, seconds = shared_models(work), {}
    for member in tqdm(work.system.members("test"), desc="test peptides", unit="peptide"):
        seconds[member.name] = evaluate_peptide(work, models.of(member))
    return {"seconds_per_kept_sample": seconds}


def evaluate_peptide(work: Workspace, models: TransferModels) -> float:
    """Draws for one peptide in ``peptides/<sequence>/`` of the run's folder; returns CPU seconds a kept sample, likelihood included."""
    section, member = work.config.evaluation, models.system
    folder, likelihood = work.folder.path / "peptides" / member.name, models.default_likelihood
    n = section.n_exact if likelihood == "exact" else section.n_samples
    samples = draw_to_folder(models, folder / "weighted", n, likelihood, lambda k: work.generator(f"evaluation {member.name}", k))
    if likelihood == "ebm":
        conformers = _conformers(member, samples)
        name, state = member.state
        angle = member.dihedral(np.array(conformers.positions), name)
        subset = np.sort(
            choose_subset(angle, conformers.log_weights, section.n_exact, work.numpy_generator(f"subset {member.name}"), state, "uniform")
        )
        if len(subset):
            exact_likelihoods(models, conformers, subset, folder / "exact_uniform")
        with atomic_file(folder / "subset.npy") as path, open(path, "wb") as handle:
            np.save(handle, subset)
    return _seconds_per_sample(models, likelihood, work.generator(f"timing {member.name}"))


def report(work: Workspace) -> dict:
    """Compute every number of the report from what is on disk, draw the figures, and write both."""
    tests = work.system.members("test")
    data = load_many(work.system, work.config.data.folder, ("test",))
    peptides, figures = {}, {}
    for member in tests:
        peptides[member.name], drawn = peptide_results(work, member, data[member.name])
        figures |= drawn
    curves = learning_curves(work.folder.path, LOSSES)
    if curves:
        figures["learning_curves"] = plotting.plot_learning_curves(curves)
    write_report(work.folder.path, _results(work, peptides), figures, _captions(work, figures))
    return {}


def write_peptide_report(work: Workspace, member: MolecularSystem, md: Dataset, earlier: dict[str, dict]) -> None:
    """The report of one peptide, beside ``earlier`` rows of the table."""
    row, figures = peptide_results(work, member, md)
    results = _results(work, {member.name: row})
    results["peptides"] = earlier | results["peptides"]
    del results["average"]
    write_report(work.folder.path, results, figures, _captions(work, figures))


def peptide_results(work: Workspace, member: MolecularSystem, md: Dataset) -> tuple[dict[str, Any], dict[str, Figure]]:
    """Numbers (as in the report's ``peptides``) of one peptide, its samples in the run's folder against its simulation.

    And figures, by names that begin with the peptide's.
    """
    seconds_per_sample = work.folder.stages["evaluation"]["seconds_per_kept_sample"][member.name]
    section, folder = work.config.evaluation, work.folder.path / "peptides" / member.name
    name, state = member.state
    drawn = WeightedSamples.load(folder / "weighted")
    samples, likelihood = _conformers(member, drawn), drawn.meta["likelihood"]
    phi, view = member.dihedral(np.array(samples.positions), name), TorsionView(member)
    bootstrap = {"n_bootstrap": section.n_bootstrap, "seed": work.config.seed}
    md = md.take(allowed_conformers(excluded_conformers(member, md.positions), len(md)))
    md_phi = member.dihedral(np.array(md.positions), name)
    md_difference = free_energy_difference(md_phi, None, state, n_blocks=_md_blocks(md_phi), **bootstrap)
    weighted = free_energy_difference(phi, samples.log_weights, state, **bootstrap)

    data = resampled(md, view, min(MD_POINTS, len(md)), work.numpy_generator(f"held out {member.name}"))
    distances, above_cut = wasserstein_distances(view, samples, data, section.n_torus, work.config.seed)
    counts = drawn.meta["counts"]
    results = {
        "right_graph": counts["right_graph"] / counts["drawn"],
        "kept": counts["right_chirality"] / counts["drawn"],
        "reordered": counts["reordered"] / counts["drawn"],
        "mirrored": counts["mirrored"] / counts["drawn"],
        "cis": 1 - len(samples) / len(drawn),
        "drawn": counts["drawn"],
        "likelihood": likelihood,
        "ess": ess_row(samples.log_weights),
        "free_energy": {
            "reference": md_difference,
            "weighted": weighted,
            "unweighted": free_energy_difference(phi, None, state, **bootstrap),
        },
        "error": _error(weighted.value, md_difference.value),
        "distances": distances,
        "energy_cut": above_cut,
        "seconds_per_sample": seconds_per_sample,
        "md": _md_cost(md, in_state(md_phi, state), weighted, md_difference.value, seconds_per_sample * len(drawn)),
    }
    if (folder / "exact_uniform" / "meta.yaml").exists():
        subset, exact = np.load(folder / "subset.npy"), WeightedSamples.load(folder / "exact_uniform")
        inside = in_state(phi[subset], state)
        log_weights = exact.log_weights + stratum_log_weights(phi, subset, state)
        results["free_energy"]["exact"] = free_energy_difference(phi[subset], log_weights, state, **bootstrap)
        results["ess_exact"] = ess_row(log_weights)
        if len(exact) >= 3:
            results["agreement"] = likelihood_agreement(samples.log_prob[subset], exact.log_prob, inside, **bootstrap)
    figures = _figures(work, member, md, samples, data, phi, md_phi)
    return results, {f"{member.name}_{kind}": figure for kind, figure in figures.items()}


def _conformers(member: MolecularSystem, samples: WeightedSamples) -> WeightedSamples:
    """Those that figures are conditional on: peptide bonds trans (the chirality has been mended)."""
    return samples[allowed_conformers(excluded_conformers(member, samples.positions), len(samples))]


def _walkers(md: Dataset) -> list[np.ndarray]:
    """Masks of the frames of each trajectory: a window or replica of a repeat."""
    walkers = md.repeat.astype(np.int64) * (int(md.window.max()) + 1) + md.window
    return [walkers == walker for walker in np.unique(walkers)]


def _md_blocks(md_phi: np.ndarray) -> int:
    """Blocks of the bootstrap over a simulation, whose frames are no independent draws."""
    return min(MD_BLOCKS, len(md_phi) // 2)


def _error(value: float, reference: float) -> float:
    """NaN where one of them is infinite: a side that was not visited."""
    return value - reference if np.isfinite([value, reference]).all() else float("nan")


# ---- numbers ----------------------------------------------------------------------------------------------------------


def _seconds_per_sample(models: TransferModels, likelihood: str, generator: torch.Generator) -> float:
    """CPU seconds a kept sample of one batch, as it is drawn: all threads together (wall clock where there is a GPU)."""
    clock = time.process_time if models.flow.basis.device.type == "cpu" else time.perf_counter
    n = models.batch_size(likelihood)
    models.draw(min(8, n), likelihood, generator)
    begun = clock()
    batch = models.draw(n, likelihood, generator)
    batch.log_prob.cpu()
    return (clock() - begun) / max(1, len(batch.energy))


def _md_cost(md: Dataset, inside: np.ndarray, flow, reference: float, flow_seconds: float) -> dict:
    """CPU seconds after which the simulation knows ΔF as well as the flow's samples: to their distance from the reference, or their error.

    The larger of the two; None where one of the sides is missing or the simulation's cost was not recorded.
    """
    error = max(abs(flow.value - reference), flow.std_error) if np.isfinite(flow.std_error) else np.nan
    result = {"error": error, "flow_seconds": flow_seconds, "md_seconds": None, "speed_up": None}
    series = [inside[mask] for mask in _walkers(md)]
    length = min(map(len, series))
    try:
        frames = frames_for_error(np.stack([each[:length] for each in series]), error)
    except UserError:
        return result
    if md.meta.get("cpu_seconds") and np.isfinite(frames):
        result["md_seconds"] = float(frames * md.meta["cpu_seconds"] / len(md))
        result["speed_up"] = result["md_seconds"] / flow_seconds
    return result


def _results(work: Workspace, peptides: dict[str, dict]) -> dict:
    config, stages = work.config, work.folder.stages
    name, state = work.system.state
    return {
        "system": work.system.name,
        "method": config.method.name,
        "budget": config.budget,
        "state": state_in_words(TorsionView.symbols.get(name, name), state),
        "peptides": peptides,
        "average": _average(peptides),
        "timing": {
            "stages": {stage: record["seconds"] for stage, record in stages.items() if stage != "report"},
            "peak_memory_mib": max(record["peak_memory"] for record in stages.values()),
        },
        "counts": {
            "peptides trained on": len(work.system.sequences["train"]),
            **({"frames of the simulations": sum(stages["data"]["frames"].values())} if "data" in stages else {}),
        },
        "settings": {
            "trained on": " ".join(work.system.sequences["train"]),
            "validated on": " ".join(work.system.sequences["validation"]) or "held-out frames of the same",
            "atom encoding": work.system.encoding,
            "flow network": config.flow.network._target_.rpartition(".")[2],
            "flow": f"{config.flow.model.interpolant} interpolant, {config.flow.model.coupling} coupling",
            "steps of the flow": str(stages["flow"]["steps"]),
            "data": work.system.simulation.get("method", "replica_exchange"),
            "seed": str(config.seed),
        },
        "notes": _notes(work),
    }


def _average(peptides: dict[str, dict]) -> dict[str, float]:
    """Means over peptides of what can be averaged; NaN where a peptide has no such number."""

    def mean(values: list) -> float:
        return float(np.mean([np.nan if value is None else value for value in values]))

    rows = list(peptides.values())
    distances = {
        f"{name}, {kind}": mean([_value(row["distances"][name][kind]) for row in rows])
        for name in ("E-W2 (kT)", TorsionView.distance)
        for kind in ("unweighted", "weighted")
    }
    return {
        "right_graph": mean([row["right_graph"] for row in rows]),
        "kept": mean([row["kept"] for row in rows]),
        "ess": mean([row["ess"]["ess"] for row in rows]),
        "abs_error": mean([abs(row["error"]) for row in rows]),
        "speed_up": mean([row["md"]["speed_up"] for row in rows]),
        **distances,
    }


def _value(distance: SampledDistance | float) -> float:
    return distance.mean if isinstance(distance, SampledDistance) else distance


def _notes(work: Workspace) -> list[str]:
    notes = [
        *TorsionView.notes,
        "No test peptide was trained on or looked at before the evaluation.",
        "Speed-up: CPU time of a simulation like that of the test data, until its ΔF is as exact as that of the flow's samples, over the "
        "CPU time of these. The training, which all peptides share, is not counted.",
    ]
    missing = work.folder.stages["flow"].get("not_balanced")
    if missing:
        notes.append(f"The simulations of {', '.join(missing)} never were in the state: trained on as they are.")
    return notes


# ---- figures ----------------------------------------------------------------------------------------------------------


def _figures(
    work: Workspace, member: MolecularSystem, md: Dataset, samples: WeightedSamples, data: dict, phi: np.ndarray, md_phi: np.ndarray
) -> dict[str, Figure]:
    points = TorsionView(member).points(samples.positions)
    panels = {"MD": (data["points"], None), "flow": (points, None), "flow, weighted": (points, samples.log_weights)}
    figures = {
        "ramachandran": plotting.plot_ramachandran(panels),
        "energies": plotting.plot_energy_histograms(
            {"MD": (data["energy"], None), "flow": (samples.energy, None), "flow, weighted": (samples.energy, samples.log_weights)}
        ),
        "profile": plotting.plot_profiles(
            {
                "flow, unweighted": free_energy_profile(phi, None, 72),
                "flow, weighted": free_energy_profile(phi, samples.log_weights, 72),
            },
            free_energy_profile(md_phi, None, 72, n_blocks=_md_blocks(md_phi)),
            member.state[1],
            highest=HIGHEST_FREE_ENERGY,
            reference_name="MD",
        ),
    }
    if work.config.evaluation.tica_lag:
        figures["tica"] = _tica_figure(work.config.evaluation.tica_lag, member, md, samples)
    return figures


def _tica_figure(lag: int, member: MolecularSystem, md: Dataset, samples: WeightedSamples) -> Figure:
    features = slow_features(member, md.positions)
    project = tica_projection([features[mask] for mask in _walkers(md)], lag)
    of_md, of_flow = project(features), project(slow_features(member, samples.positions))
    low, high = np.quantile(of_md, 0.001, axis=0), np.quantile(of_md, 0.999, axis=0)
    margin = 0.1 * (high - low)
    box = tuple((float(a), float(b)) for a, b in zip(low - margin, high + margin, strict=True))
    panels = {"MD": (of_md, None), "flow": (of_flow, None), "flow, weighted": (of_flow, samples.log_weights)}
    return plotting.plot_plane(panels, box, n_bins=60, axes_names=("TIC 1", "TIC 2"), aspect="auto")


def slow_features(member: MolecularSystem, positions: np.ndarray) -> np.ndarray:
    """Sines and cosines of the backbone torsions and distances between heavy atoms (nm): (n, features)."""
    x = torch.from_numpy(np.array(positions))
    angles = torch.stack([member.dihedral(x, name) for name in member.dihedrals], dim=-1)
    heavy = [atom.index for atom in member.topology.atoms if atom.element.symbol != "H"]
    i, j = torch.triu_indices(len(heavy), len(heavy), 1)
    distances = (x[:, heavy][:, i] - x[:, heavy][:, j]).norm(dim=-1)
    return torch.cat([angles.sin(), angles.cos(), distances], dim=-1).numpy()


def _captions(work: Workspace, figures: dict) -> dict[str, str]:
    lag = work.config.evaluation.tica_lag
    texts = {
        "ramachandran": "Free energy over φ and ψ, on one colour scale with one zero (the lowest bin of the first panel).",
        "energies": "Potential energy of the simulation, the flow's samples, and these with their weights.",
        "profile": "Free-energy profile of the first φ; bands are 95% (1.96 standard errors), the state is shaded, gaps are not known.",
        "tica": f"Free energy over the slowest coordinates of the simulation (TICA, lag {lag} frames of replica exchange at its lowest "
        "temperature, whose time is not a physical one).",
    }
    named = (key.partition("_") for key in figures)
    return {f"{peptide}_{name}": f"{peptide}: {texts[name]}" for peptide, _, name in named if name in texts}
