"""The last stages of a run with a flow and an EBM: fresh weighted samples, exact likelihoods of some of them, and the report."""

import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from boltznce.analysis import plotting
from boltznce.analysis.free_energy import (
    choose_subset,
    corrected_free_energy_difference,
    free_energy_difference,
    free_energy_profile,
    in_state,
    stratum_log_weights,
)
from boltznce.analysis.metrics import likelihood_agreement
from boltznce.analysis.report import write_report
from boltznce.analysis.reweighting import WeightedSamples, WeightedSamplesWriter
from boltznce.io import atomic_file
from boltznce.methods.drawing import draw_to_folder
from boltznce.methods.free_energy import reference_difference, reference_profile, state_in_words
from boltznce.methods.models import FlowModels, solver_settings
from boltznce.methods.report_parts import (
    allowed_conformers,
    data_difference,
    ess_row,
    excluded_conformers,
    learning_curves,
    mode_weights,
    resampled,
    wasserstein_distances,
)
from boltznce.methods.views import view_of
from boltznce.methods.workspace import Workspace

__all__ = ["LOSSES", "evaluate", "exact_likelihoods", "report"]

LOSSES = {
    "flow": {"loss": "flow loss"},
    "ebm": {"score": "EBM, score loss", "nce": "EBM, NCE loss", "regression": "EBM, regression (kT²)"},
}


def evaluate(work: Workspace) -> dict:
    """Draw fresh samples with EBM weights, and give two subsets of them exact likelihoods.

    Subset "uniform" (as many in the state as in the rest) measures how far EBM and exact likelihood are apart; subset "weighted" (by EBM
    weight, with repeats) corrects the free energy.
    """
    section, folder = work.config.evaluation, work.folder.path / "samples"
    samples = draw_to_folder(
        work.models, folder / "weighted", section.n_samples, "ebm", lambda k: work.generator("evaluation", k), batch_size=section.batch_size
    )
    name, state = work.system.state
    conformers = _conformers(work, samples)
    angle, log_weights = work.system.coordinate(conformers.positions, name), conformers.log_weights
    rng = work.numpy_generator("exact subset")
    uniform = choose_subset(angle, log_weights, section.n_exact, rng, state, "uniform")
    weighted = choose_subset(angle, log_weights, section.n_correction, rng, state, "weights")
    seconds = {}
    for label, subset in (("exact_uniform", np.sort(uniform)), ("exact_weighted", np.unique(weighted))):
        if len(subset):
            seconds[label] = exact_likelihoods(work.models, conformers, subset, folder / label) / len(subset)
    with atomic_file(folder / "subsets.npz") as path, open(path, "wb") as handle:
        np.savez(handle, uniform=uniform, weighted=weighted)
    return {"exact_seconds_per_sample": seconds.get("exact_uniform"), "ebm_seconds_per_sample": _ebm_seconds(work, conformers)}


def report(work: Workspace) -> dict:
    """Compute every number of the report from what is on disk, draw the figures, and write both."""
    results, figures = _results(work)
    write_report(work.folder.path, results, figures)
    return {}


# ---- likelihoods ------------------------------------------------------------------------------------------------------


def exact_likelihoods(models: FlowModels, samples: WeightedSamples, subset: np.ndarray, folder: Path) -> float:
    """Save exact log-likelihoods of a subset, batch by batch (a killed call goes on); returns the seconds they took in all."""
    if not (folder / "meta.yaml").exists():
        section = models.config.evaluation
        writer = WeightedSamplesWriter(folder, getattr(models.system, "topology", None), {"likelihood": "exact", "n": len(subset)})
        for start in range(writer.n_written, len(subset), section.exact_batch_size):
            part = samples[subset[start : start + section.exact_batch_size]]
            begun = time.perf_counter()
            log_prob = models.flow.log_prob(
                torch.from_numpy(np.array(part.positions)).to(models.flow.basis.device),
                solver=solver_settings(section.solver),
                batch_size=section.exact_batch_size,
            )
            log_prob = log_prob.cpu().numpy() + (np.log(2) if models.mirrors else 0.0)
            milliseconds = round(1000 * (time.perf_counter() - begun))
            writer.append(part.positions, part.energy, log_prob, -part.energy - log_prob, counts={"milliseconds": milliseconds})
        writer.finish()
    return WeightedSamples.load(folder).meta["counts"]["milliseconds"] / 1000


def _ebm_seconds(work: Workspace, samples: WeightedSamples, n: int = 4096) -> float:
    """Seconds a sample of the EBM's likelihood, in batches of the size that sampling uses."""
    x = torch.from_numpy(np.array(samples.positions[:n])).to(work.device)
    work.models.ebm.log_prob_in_batches(x)
    begun = time.perf_counter()
    work.models.ebm.log_prob_in_batches(x).cpu()
    return (time.perf_counter() - begun) / len(x)


def _conformers(work: Workspace, samples: WeightedSamples) -> WeightedSamples:
    """The samples that figures are conditional on: peptide bonds trans, chirality right (it has been mended)."""
    return samples[allowed_conformers(excluded_conformers(work.system, samples.positions), len(samples))]


# ---- report -----------------------------------------------------------------------------------------------------------


def _results(work: Workspace) -> tuple[dict, dict]:
    config, system, section = work.config, work.system, work.config.evaluation
    name, state = system.state
    folder = work.folder.path / "samples"
    drawn = WeightedSamples.load(folder / "weighted")
    samples = _conformers(work, drawn)
    subsets = np.load(folder / "subsets.npz")
    exact = WeightedSamples.load(folder / "exact_uniform")
    view = view_of(system)
    symbol, limits = view.symbols.get(name, name), system.coordinate_range(name)
    phi = system.coordinate(samples.positions, name)
    uniform = np.sort(subsets["uniform"])
    inside = in_state(phi[uniform], state)
    exact_weights = exact.log_weights + stratum_log_weights(phi, uniform, state)
    bootstrap = {"n_bootstrap": section.n_bootstrap, "seed": config.seed}
    md = resampled(work.dataset.split(**config.data.split)[2], view, section.n_samples, work.numpy_generator("held out"))
    reference = system.reference()

    free_energy = {"reference": reference_difference(reference)} if reference else {}
    free_energy |= {
        "ebm": free_energy_difference(phi, samples.log_weights, state, **bootstrap),
        "corrected": _corrected(work, samples, phi, subsets["weighted"], bootstrap),
        "exact": free_energy_difference(phi[uniform], exact_weights, state, **bootstrap),
        "unweighted": free_energy_difference(phi, None, state, **bootstrap),
        f"training data ({view.data}), error not estimated": data_difference(
            work.dataset.log_weights, system.coordinate(work.dataset.positions, name), state
        ),
    }
    points = view.points(samples.positions)
    distances, above_cut = wasserstein_distances(view, samples, md, section.n_torus, config.seed)
    ess = {
        "EBM weights": ess_row(samples.log_weights),
        "EBM weights, top 0.2% removed": ess_row(samples.remove_top(0.002).log_weights),
        "exact weights (subset)": ess_row(exact_weights),
    }
    cost = work.folder.stages["evaluation"]
    counts = drawn.meta["counts"]
    agreement = likelihood_agreement(samples.log_prob[uniform], exact.log_prob, inside, **bootstrap) if len(exact) >= 3 else None
    results = {
        "system": system.name,
        "method": config.method.name,
        "budget": config.budget,
        "state": state_in_words(symbol, state),
        "free_energy": free_energy,
        "ess": ess,
        "distances": distances,
        "energy_cut": above_cut,
        "modes": mode_weights(system, samples),
        "likelihood": agreement,
        "timing": {
            "ebm_per_sample": cost["ebm_seconds_per_sample"],
            "exact_per_sample": cost["exact_seconds_per_sample"],
            "stages": {stage: record["seconds"] for stage, record in work.folder.stages.items() if stage != "report"},
            "peak_memory_mib": max(record["peak_memory"] for record in work.folder.stages.values()),
        },
        "counts": {
            "drawn": counts["drawn"],
            **(_molecular_counts(counts, drawn, samples) if system.dim == 3 else {}),
            "exact likelihoods, uniform subset": len(exact),
            "exact likelihoods, weighted subset": len(np.unique(subsets["weighted"])),
            f"training frames ({view.data})": len(work.dataset),
        },
        "settings": _settings(work),
        "notes": _notes(work),
    }
    figures = {
        view.figure: view.draw({view.data: (md["points"], None), "flow": (points, None), "flow, weighted": (points, samples.log_weights)}),
        "energy_histograms": plotting.plot_energy_histograms(
            {view.data: (md["energy"], None), "flow": (samples.energy, None), "flow, weighted": (samples.energy, samples.log_weights)}
        ),
        "profile": plotting.plot_profiles(
            {
                "flow, unweighted": free_energy_profile(phi, None, 72, limits=limits),
                "EBM weights": free_energy_profile(phi, samples.log_weights, 72, limits=limits),
            },
            reference_profile(reference),
            state,
            angle_name=symbol,
            highest=view.highest,
            limits=limits,
        ),
        "learning_curves": plotting.plot_learning_curves(learning_curves(work.folder.path, LOSSES)),
        "weights": plotting.plot_weights({"EBM": samples.log_weights, "exact": exact_weights}),
    }
    if agreement is not None:
        figures["likelihood"] = plotting.plot_likelihood_agreement(samples.log_prob[uniform], exact.log_prob, inside)
    return results, figures


def _corrected(work: Workspace, samples: WeightedSamples, phi: np.ndarray, subset: np.ndarray, bootstrap: dict):
    exact = WeightedSamples.load(work.folder.path / "samples" / "exact_weighted")
    place = np.searchsorted(np.unique(subset), subset)
    return corrected_free_energy_difference(
        phi, samples.log_weights, subset, samples.log_prob[subset], exact.log_prob[place], work.system.state[1], "weights", **bootstrap
    )


def _molecular_counts(counts: dict, drawn: WeightedSamples, samples: WeightedSamples) -> dict[str, int]:
    return {
        "with the molecule's chirality": counts["right_chirality"],
        "of these mirrored": counts["mirrored"],
        "kept for analysis": len(drawn),
        "of these with a cis peptide bond, left out": len(drawn) - len(samples),
    }


def _settings(work: Workspace) -> dict[str, str]:
    config, stages = work.config, work.folder.stages

    def network(name: str) -> str:
        section = config[name]
        return f"{section.network._target_.rpartition('.')[2]}, {stages[name]['steps']} steps of {section.batch_size}"

    objective = config.ebm.model.objective
    if config.ebm.regression_weight:
        objective += f" + {config.ebm.regression_weight:g} × regression onto {config.samples.likelihood} likelihoods"
    return {
        "flow network": network("flow"),
        "flow": f"{config.flow.model.interpolant} interpolant, {config.flow.model.coupling} coupling",
        "solver": ", ".join(f"{key} {value}" for key, value in asdict(solver_settings(config.flow.solver)).items()),
        "EBM network": network("ebm"),
        "EBM objective": objective,
        "samples the EBM was trained on": str(config.samples.n_train),
        "data": f"{work.dataset.meta['settings']['method']}, {len(work.dataset)} frames",
        "seed": str(config.seed),
    }


def _notes(work: Workspace) -> list[str]:
    notes = list(view_of(work.system).notes)
    if work.models.mirrors:
        notes.append("Mirror images that the flow made were mirrored; their two densities are added up (log 2).")
    if work.system.reference() is None:
        notes.append("No reference ships for this system at this temperature and with this force field.")
    return notes
