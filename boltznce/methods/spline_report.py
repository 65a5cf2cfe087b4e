"""The last stages of a run with a spline flow: weighted samples with exact likelihoods, and the report."""

import json
import time

import numpy as np
import torch
from omegaconf import OmegaConf

from boltznce.analysis import plotting
from boltznce.analysis.free_energy import free_energy_difference, free_energy_profile
from boltznce.analysis.report import summary_table, write_report
from boltznce.analysis.reweighting import WeightedSamples
from boltznce.methods.drawing import draw_to_folder
from boltznce.methods.free_energy import reference_difference, reference_profile
from boltznce.methods.spline_models import SplineModels
from boltznce.methods.workspace import Workspace
from boltznce.systems.base import System
from boltznce.systems.symmetry import is_trans

__all__ = ["evaluate", "report", "summary"]

HIGHEST_FREE_ENERGY = 25.0  # kT, of the profile's figure: above, samples are noise


def evaluate(work: Workspace) -> dict:
    """Weighted draws of the last flow, and some of every flow of the run at its own temperature."""
    section, models = work.config.evaluation, work.models
    for name in models.flows:
        _draw(work, models.named(name), name, section.n_ladder)
    _draw(work, models, "weighted", section.n_samples)
    return {"seconds_per_sample": _seconds_per_sample(work, section.batch_size)}


def report(work: Workspace) -> dict:
    """Compute every number of the report from what is on disk, draw the figures, and write both."""
    config, stages, folder = work.config, work.folder.stages, work.folder.path / "samples"
    samples = WeightedSamples.load(folder / "weighted")
    steps = stages["annealing"]["steps"]
    clip = config.annealing.clip
    clipped = samples.clip(clip)
    results = {
        "system": work.system.name,
        "method": config.method.name,
        "budget": config.budget,
        "ess": {
            "exact weights": {"ess": samples.ess, "pareto_k": samples.pareto_k, "n": len(samples)},
            f"exact weights, top {clip:.2%} clipped": {"ess": clipped.ess, "pareto_k": clipped.pareto_k, "n": len(samples)},
        }
        | {
            f"ladder, {step['drawn_at']:.4g} to {step['weighted_to']:.4g}": {
                "ess": step["ess"],
                "pareto_k": step["pareto_k"],
                "n": step["n_draws"],
            }
            for step in steps
        },
        "timing": {
            "exact_per_sample": stages["evaluation"]["seconds_per_sample"],
            "stages": {stage: record["seconds"] for stage, record in stages.items() if stage != "report"},
            "peak_memory_mib": max(record["peak_memory"] for record in stages.values()),
        },
        "counts": {
            "energy evaluations, reverse KL": stages["hot"]["energy_evaluations"],
            "energy evaluations, annealing": stages["annealing"]["energy_evaluations"],
            "weighted samples": len(samples),
        },
        "settings": {key: str(value) for key, value in OmegaConf.to_container(config.generator.model).items()} | {"seed": str(config.seed)},
        "notes": ["log q is normalized modulo rigid motion: a likelihood is not comparable with that of a Cartesian flow."],
    }
    figures = {
        "ladder": plotting.plot_ladder(
            [step["weighted_to"] for step in steps],
            {"all weights": [step["ess"] for step in steps], f"top {clip:.2%} clipped": [step["ess_clipped"] for step in steps]},
            "K" if work.system.dim == 3 else "",
        ),
        "weights": plotting.plot_weights({"exact": samples.log_weights}),
    }
    if work.system.state is not None:
        _add_conformations(work, samples, results, figures)
    write_report(work.folder.path, results, figures, CAPTIONS)
    return {}


def summary(work: Workspace) -> str:
    """The report's main numbers as a table for the terminal."""
    return summary_table(json.loads((work.folder.path / "metrics.json").read_text())) + f"\n\nReport: {work.folder.path / 'report.md'}"


CAPTIONS = {
    "ladder": "Effective sample size of each step's draws, weighted to the next temperature.",
    "temperatures": "Free energy over φ and ψ of the flow at each temperature of the ladder, not weighted.",
}


def _draw(work: Workspace, models: SplineModels, name: str, n: int) -> WeightedSamples:
    return draw_to_folder(
        models,
        work.folder.path / "samples" / name,
        n,
        "exact",
        lambda k: work.generator(f"samples {name}", k),
        meta={"temperature": models.system.temperature},
    )


def _seconds_per_sample(work: Workspace, n: int) -> float:
    """Of a draw with its log q, in a batch of ``n``; the energy is not in it."""
    flow = work.models.flow
    flow.sample(n, work.generator("timing"))
    begun = time.perf_counter()
    flow.sample(n, work.generator("timing"))[1].cpu()
    return (time.perf_counter() - begun) / n


def _add_conformations(work: Workspace, drawn: WeightedSamples, results: dict, figures: dict) -> None:
    """Free energy of the system's state and figures over its torsions, conditional on trans peptide bonds."""
    system, section = work.system, work.config.evaluation
    name, state = system.state
    trans = _is_trans(system, drawn)
    samples = drawn[trans]
    phi, reference = system.dihedral(np.array(samples.positions), name), system.reference()
    bootstrap = {"n_bootstrap": section.n_bootstrap, "seed": work.config.seed}
    results["state"] = f"{state[0]:g} < {name} < {state[1]:g} rad"
    results["free_energy"] = {"reference": reference_difference(reference)} if reference else {}
    results["free_energy"] |= {
        "exact": free_energy_difference(phi, samples.log_weights, state, **bootstrap),
        "unweighted": free_energy_difference(phi, None, state, **bootstrap),
    }
    results["counts"] |= {
        "of these with a cis peptide bond, left out": int((~trans).sum()),
        "their share by weight": float(drawn.weights[~trans].sum()),
        "with another chirality": int((system.chirality(np.array(drawn.positions)) < 0).any(axis=1).sum()),
    }
    figures["profile"] = plotting.plot_profiles(
        {"flow, unweighted": free_energy_profile(phi, None, 72), "exact weights": free_energy_profile(phi, samples.log_weights, 72)},
        reference_profile(reference),
        state,
        highest=HIGHEST_FREE_ENERGY,
    )
    if {"phi", "psi"} <= set(system.dihedrals):
        angles = _torsions(system, samples)
        figures["ramachandran"] = plotting.plot_ramachandran({"flow": (angles, None), "flow, weighted": (angles, samples.log_weights)})
        folder = work.folder.path / "samples"
        figures["temperatures"] = plotting.plot_ramachandran(
            {
                f"{temperature:.0f} K": (_torsions(system, WeightedSamples.load(folder / step)), None)
                for step, temperature in work.models.flows.items()
            }
        )


def _is_trans(system: System, samples: WeightedSamples) -> np.ndarray:
    x = torch.from_numpy(np.array(samples.positions))
    omegas = [system.dihedral(x, name) for name in system.omegas]
    return is_trans(torch.stack(omegas, dim=-1)).numpy() if omegas else np.ones(len(samples), dtype=bool)


def _torsions(system: System, samples: WeightedSamples) -> np.ndarray:
    """(φ, ψ) of samples, (n, 2)."""
    return np.stack([system.dihedral(np.array(samples.positions), name) for name in ("phi", "psi")], axis=-1)
