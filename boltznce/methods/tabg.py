"""TA-BG (arXiv 2501.19077): a spline flow on internal coordinates, trained on the energy alone at high temperature, then annealed.

Stages: hot -> annealing -> evaluation -> report. Each leaves its result in the run's folder, and a killed one goes on.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from boltznce.analysis import plotting
from boltznce.analysis.free_energy import free_energy_difference, free_energy_profile
from boltznce.analysis.report import summary_table, write_report
from boltznce.analysis.reweighting import WeightedSamples, WeightedSamplesWriter
from boltznce.annealing import fill_buffer, forget_buffer, forward_kl, reverse_kl, temperature_ladder
from boltznce.errors import UserError
from boltznce.flows.box import BoxCoordinates
from boltznce.flows.internal import InternalCoordinates
from boltznce.flows.spline_flow import SplineFlow
from boltznce.io import atomic_file
from boltznce.methods.free_energy import reference_difference, reference_profile
from boltznce.methods.models import load_trained
from boltznce.methods.workspace import Workspace
from boltznce.systems.base import System
from boltznce.systems.stiffness import harmonic_constants
from boltznce.systems.symmetry import is_trans
from boltznce.training import FitSettings, fit

__all__ = ["STAGES", "anneal", "draw_samples", "evaluate", "make_coordinates", "make_spline_flow", "report", "summary", "train_hot"]

HIGHEST_FREE_ENERGY = 25.0  # kT, of the profile's figure: above, samples are noise


def make_coordinates(system: System, settings: DictConfig) -> InternalCoordinates | BoxCoordinates:
    """Internal coordinates of a molecule, with a peptide's main chain for backbone; for other systems the box of ``settings.box``."""
    if system.dim != 3:
        if settings.get("box") is None:
            raise UserError(f"The generator of {system.name} needs a box that holds it: set generator.box=[[low, low], [high, high]].")
        return BoxCoordinates(system.n_atoms, *OmegaConf.to_container(settings.box))
    bonds, angles = harmonic_constants(system.openmm_system())
    return InternalCoordinates(
        system.positions,
        system.bonds,
        core={atom for atoms in system.dihedrals.values() for atom in atoms} or None,
        bond_constants=bonds,
        angle_constants=angles,
        stereocentres=system.stereocentres,
        methyl_groups=system.methyl_groups,
        **settings.coordinates,
    )


def make_spline_flow(config: DictConfig, system: System) -> SplineFlow:
    """An untrained generator; its first weights follow from the config's seed."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return SplineFlow(make_coordinates(system, config.generator), **config.generator.model)


def train_hot(work: Workspace) -> dict:
    """Reverse KL at the highest temperature, where no modes are separated."""
    section = work.config.hot
    system = work.system.at_temperature(section.temperature)

    def loss(flow: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        x, log_q = flow.sample_with_log_prob(section.batch_size, generator)
        return reverse_kl(log_q, system.energy(x), section.drop_highest, section.energy_cut)

    return _fit(work, "hot", make_spline_flow(work.config, work.system), loss, section)


def anneal(work: Workspace) -> dict:
    """Down the ladder: each step draws from the flow so far, weights to the next temperature, and trains on the resampled draws.

    A finished step is its weights, ``checkpoints/anneal_<k>.safetensors``, and its record, ``annealing/<k>.json``.
    """
    section, flow = work.config.annealing, _trained(work, "hot")
    records = []
    for k, temperatures in enumerate(_ladder(work.config)):
        folder, name = work.folder.path / "annealing" / f"{k:02d}", f"anneal_{k:02d}"
        record_path = folder.with_suffix(".json")
        if record_path.exists():
            flow = load_trained(flow, _weights(work, name))
        else:
            cold = work.system.at_temperature(temperatures[1])
            buffer, covered = fill_buffer(
                lambda n, generator, flow=flow: flow.sample(n, generator),
                cold.energy,
                folder,
                temperatures=temperatures,
                n_draws=section.n_draws,
                n_buffer=section.n_buffer,
                clip=section.clip,
                batch_size=section.draw_batch_size,
                generator_of=lambda i, name=name: work.generator(f"{name} draws", i),
                rng=work.numpy_generator(f"{name} resampling"),
            )
            data = torch.from_numpy(np.array(buffer))
            fitted = _fit(work, name, flow, _on_buffer(data, section.batch_size), section)
            with atomic_file(record_path) as path:
                path.write_text(json.dumps(asdict(covered) | fitted, indent=1))
            forget_buffer(folder)
        records.append(json.loads(record_path.read_text()))
    return {"steps": records, "energy_evaluations": sum(record["energy_evaluations"] for record in records)}


def draw_samples(work: Workspace, name: str, weights: Path, temperature: float, n: int) -> WeightedSamples:
    """``n`` draws of the flow with these weights, weighted at ``temperature``, in ``samples/<name>``; a killed call goes on."""
    folder, size = work.folder.path / "samples" / name, work.config.evaluation.batch_size
    if not (folder / "meta.yaml").exists():
        flow = load_trained(make_spline_flow(work.config, work.system), weights).to(work.device)
        system = work.system.at_temperature(temperature)
        meta = {"system": system.name, "likelihood": "exact", "n": n, "batch_size": size, "temperature": temperature}
        writer = WeightedSamplesWriter(folder, getattr(system, "topology", None), meta)
        while writer.n_written < n:
            start = writer.n_written
            x, log_q = flow.sample(min(size, n - start), work.generator(f"samples {name}", start // size))
            with torch.no_grad():
                u = system.energy(x).double()
            writer.append(*(a.cpu().numpy() for a in (x, u, log_q, -u - log_q)))
        writer.finish()
    return WeightedSamples.load(folder)


def evaluate(work: Workspace) -> dict:
    """Weighted draws of the final flow at the last temperature, and some of the flow of every step at its own."""
    section = work.config.evaluation
    for name, temperature in _steps(work.config):
        draw_samples(work, name, _weights(work, name), temperature, section.n_ladder)
    name, temperature = _steps(work.config)[-1]
    begun = time.perf_counter()
    samples = draw_samples(work, "weighted", _weights(work, name), temperature, section.n_samples)
    return {"seconds_per_sample": (time.perf_counter() - begun) / len(samples)}


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


STAGES = {"hot": train_hot, "annealing": anneal, "evaluation": evaluate, "report": report}
CAPTIONS = {
    "ladder": "Effective sample size of each step's draws, weighted to the next temperature.",
    "temperatures": "Free energy over φ and ψ of the flow at each temperature of the ladder, not weighted.",
}


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
                for step, temperature in _steps(work.config)
            }
        )


def _is_trans(system: System, samples: WeightedSamples) -> np.ndarray:
    x = torch.from_numpy(np.array(samples.positions))
    omegas = [system.dihedral(x, name) for name in system.omegas]
    return is_trans(torch.stack(omegas, dim=-1)).numpy() if omegas else np.ones(len(samples), dtype=bool)


def _torsions(system: System, samples: WeightedSamples) -> np.ndarray:
    """(φ, ψ) of samples, (n, 2)."""
    return np.stack([system.dihedral(np.array(samples.positions), name) for name in ("phi", "psi")], axis=-1)


def _on_buffer(data: Tensor, batch_size: int) -> Callable:
    def loss(flow: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        index = torch.randint(len(data), (batch_size,), generator=generator, device=generator.device)
        return forward_kl(flow.log_prob(data[index.cpu()].to(generator.device)))

    return loss


def _steps(config: DictConfig) -> list[tuple[str, float]]:
    """Names of the trained flows, from hot to cold, and the temperature of each."""
    return [("hot", config.hot.temperature), *((f"anneal_{k:02d}", cold) for k, (_, cold) in enumerate(_ladder(config)))]


def _weights(work: Workspace, name: str) -> Path:
    return work.folder.path / "checkpoints" / f"{name}.safetensors"


def _ladder(config: DictConfig) -> list[tuple[float, float]]:
    section = config.annealing
    return temperature_ladder(config.hot.temperature, section.temperature, section.n_steps, section.repeat_last)


def _trained(work: Workspace, name: str) -> SplineFlow:
    flow = make_spline_flow(work.config, work.system)
    return load_trained(flow, _weights(work, name)).to(work.device)


def _fit(work: Workspace, name: str, flow: nn.Module, loss: Callable, section: DictConfig) -> dict:
    """Train ``flow`` in place; returns what the run's record keeps of it."""
    result = fit(
        flow,
        loss,
        FitSettings(**section.fit),
        work.folder.path,
        fabric=work.fabric,
        seed=work.config.seed,
        name=name,
        logger=work.logger,
    )
    spent = {"energy_evaluations": result.steps * section.batch_size} if name == "hot" else {}
    return {"steps": result.steps, "skipped_steps": result.skipped_steps} | spent
