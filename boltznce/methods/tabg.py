"""TA-BG (arXiv 2501.19077): a spline flow on internal coordinates, trained on the energy alone at high temperature, then annealed.

Stages: hot -> annealing -> evaluation -> report. Each leaves its result in the run's folder, and a killed one goes on.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from boltznce.annealing import fill_buffer, forget_buffer, forward_kl, reverse_kl, reverse_kl_along_paths, temperature_ladder
from boltznce.errors import UserError
from boltznce.flows.spline_flow import SplineFlow
from boltznce.io import atomic_file
from boltznce.methods.models import load_trained
from boltznce.methods.report_parts import summary
from boltznce.methods.spline_models import SplineModels, make_spline_flow, weights_path
from boltznce.methods.spline_report import evaluate, report
from boltznce.methods.workspace import Workspace
from boltznce.systems.base import System
from boltznce.training import FitSettings, fit

__all__ = ["STAGES", "anneal", "ladder", "load_models", "summary", "train_hot"]

GRADIENTS = ("total", "path")


def train_hot(work: Workspace) -> dict:
    """Reverse KL at the highest temperature, where no modes are separated.

    The paper's estimator is ``hot.gradient=total``, which leaves out the highest energies of a batch. Ours for smaller budgets is
    ``path``: less noise, so fewer steps at higher learning rates, and no energies left out, which would leave the less likely
    conformations of φ without a gradient.
    """
    section = work.config.hot
    work.system.require_gradient(f"method={work.config.method.name}")
    if section.gradient not in GRADIENTS:
        raise UserError(f"Unknown hot.gradient={section.gradient}: choose one of {', '.join(GRADIENTS)}.")
    system = work.system.at_temperature(section.temperature)

    def loss(flow: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        x, log_q = flow.sample_with_log_prob(section.batch_size, generator)
        if section.gradient == "path":
            return reverse_kl_along_paths(x, flow.log_prob, system.energy, section.path_clip, section.energy_cut)
        return reverse_kl(log_q, system.energy(x), section.drop_highest, section.energy_cut)

    return _fit(work, "hot", make_spline_flow(work.config, work.system), loss, section)


def anneal(work: Workspace) -> dict:
    """Down the ladder: each step draws from the flow so far, weights to the next temperature, and trains on the resampled draws.

    A finished step is its weights, ``checkpoints/anneal_<k>.safetensors``, and its record, ``annealing/<k>.json``.
    """
    section, flow = work.config.annealing, _trained(work, "hot")
    records = []
    for k, temperatures in enumerate(ladder(work.config)):
        folder, name = work.folder.path / "annealing" / f"{k:02d}", f"anneal_{k:02d}"
        record_path = folder.with_suffix(".json")
        if record_path.exists():
            flow = load_trained(flow, weights_path(work.folder.path, name))
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


def load_models(folder: Path, config: DictConfig, system: System, device: torch.device) -> SplineModels:
    """The last flow of the ladder; raises UserError if it has not been trained yet."""
    flows = {"hot": config.hot.temperature} | {f"anneal_{k:02d}": cold for k, (_, cold) in enumerate(ladder(config))}
    return SplineModels.load(folder, config, system, device, flows)


STAGES = {"hot": train_hot, "annealing": anneal, "evaluation": evaluate, "report": report}


def _on_buffer(data: Tensor, batch_size: int) -> Callable:
    def loss(flow: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        index = torch.randint(len(data), (batch_size,), generator=generator, device=generator.device)
        return forward_kl(flow.log_prob(data[index.cpu()].to(generator.device)))

    return loss


def ladder(config: DictConfig) -> list[tuple[float, float]]:
    """(drawn at, weighted to) of every step of the annealing."""
    section = config.annealing
    return temperature_ladder(config.hot.temperature, section.temperature, section.n_steps, section.repeat_last, section.repeat_first)


def _trained(work: Workspace, name: str) -> SplineFlow:
    flow = make_spline_flow(work.config, work.system)
    return load_trained(flow, weights_path(work.folder.path, name)).to(work.device)


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
