"""TA-BG (arXiv 2501.19077): a spline flow on internal coordinates, trained on the energy alone at high temperature, then annealed.

Stages: hot -> annealing -> evaluation -> report. Each leaves its result in the run's folder, and a killed one goes on.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from boltznce.analysis.reweighting import WeightedSamples, WeightedSamplesWriter
from boltznce.annealing import fill_buffer, forget_buffer, forward_kl, reverse_kl, temperature_ladder
from boltznce.errors import UserError
from boltznce.flows.box import BoxCoordinates
from boltznce.flows.internal import InternalCoordinates
from boltznce.flows.spline_flow import SplineFlow
from boltznce.io import atomic_file
from boltznce.methods.models import load_trained
from boltznce.methods.workspace import Workspace
from boltznce.systems.base import System
from boltznce.systems.stiffness import harmonic_constants
from boltznce.training import FitSettings, fit

__all__ = ["anneal", "draw_samples", "make_coordinates", "make_spline_flow", "train_hot"]


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
            flow = load_trained(flow, work.folder.path / "checkpoints" / f"{name}.safetensors")
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


def _on_buffer(data: Tensor, batch_size: int) -> Callable:
    def loss(flow: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        index = torch.randint(len(data), (batch_size,), generator=generator, device=generator.device)
        return forward_kl(flow.log_prob(data[index.cpu()].to(generator.device)))

    return loss


def _ladder(config: DictConfig) -> list[tuple[float, float]]:
    section = config.annealing
    return temperature_ladder(config.hot.temperature, section.temperature, section.n_steps, section.repeat_last)


def _trained(work: Workspace, name: str) -> SplineFlow:
    flow = make_spline_flow(work.config, work.system)
    return load_trained(flow, work.folder.path / "checkpoints" / f"{name}.safetensors").to(work.device)


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
