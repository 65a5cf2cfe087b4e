"""TA-BG (arXiv 2501.19077): a spline flow on internal coordinates, trained on the energy alone at high temperature, then annealed.

Stages: hot -> annealing -> evaluation -> report. Each leaves its result in the run's folder, and a killed one goes on.
"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from boltznce.analysis.reweighting import WeightedSamples
from boltznce.annealing import fill_buffer, forget_buffer, forward_kl, log_variance, reverse_kl, temperature_ladder
from boltznce.errors import UserError
from boltznce.flows.spline_flow import SplineFlow
from boltznce.io import atomic_file
from boltznce.methods.models import load_trained
from boltznce.methods.report_parts import summary
from boltznce.methods.spline_models import SplineModels, make_spline_flow, weights_path
from boltznce.methods.spline_report import evaluate, report
from boltznce.methods.workspace import Workspace
from boltznce.systems.base import System
from boltznce.training import Loss

__all__ = ["STAGES", "anneal", "ladder", "load_models", "summary", "train_hot"]


def train_hot(work: Workspace) -> dict:
    """Reverse KL at the highest temperature, where no modes are separated."""
    section = work.config.hot
    work.system.require_gradient(f"method={work.config.method.name}")
    system = work.system.at_temperature(section.temperature)

    def loss(flow: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        x, log_q = flow.sample_with_log_prob(section.batch_size, generator)
        return reverse_kl(log_q, system.energy(x), section.drop_highest, section.energy_cut)

    fitted = work.fit("hot", make_spline_flow(work.config, work.system), loss)
    return fitted | {"energy_evaluations": fitted["steps"] * section.batch_size}


def anneal(work: Workspace) -> dict:
    """Down the ladder: each step draws from the flow so far, weights to the next temperature, and trains on the draws.

    How is ``annealing.objective``: the paper's ``forward_kl`` on draws resampled by their clipped weights, or ``log_variance`` on the draws
    as they are. A finished step is its weights, ``checkpoints/anneal_<k>.safetensors``, and its record, ``annealing/<k>.json``.
    """
    section = work.config.annealing
    if section.objective not in OBJECTIVES:
        raise UserError(f"Unknown annealing.objective={section.objective}: choose one of {', '.join(OBJECTIVES)}.")
    flow, records = _trained(work, "hot"), []
    for k, temperatures in enumerate(ladder(work.config)):
        folder, name = work.folder.path / "annealing" / f"{k:02d}", f"anneal_{k:02d}"
        record_path = folder.with_suffix(".json")
        if record_path.exists():
            flow = load_trained(flow, weights_path(work.folder.path, name))
        else:
            cold = work.system.at_temperature(temperatures[1])
            drawn, covered = fill_buffer(
                lambda n, generator, flow=flow: flow.sample(n, generator),
                cold.energy,
                folder,
                temperatures=temperatures,
                n_draws=section.n_draws,
                clip=section.clip,
                batch_size=section.draw_batch_size,
                generator_of=lambda i, name=name: work.generator(f"{name} draws", i),
            )
            loss = OBJECTIVES[section.objective](drawn, section, work.numpy_generator(f"{name} resampling"), work.device)
            fitted = work.fit(name, flow, loss, section="annealing")
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


def _forward_kl_of(drawn: WeightedSamples, section: DictConfig, rng: np.random.Generator, device: torch.device) -> Loss:
    """On ``n_buffer`` samples, drawn with replacement by the weights."""
    data = torch.from_numpy(drawn.resample(section.n_buffer, rng).positions).to(device)

    def loss(flow: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        index = torch.randint(len(data), (section.batch_size,), generator=generator, device=device)
        return forward_kl(flow.log_prob(data[index]))

    return loss


def _log_variance_of(drawn: WeightedSamples, section: DictConfig, rng: np.random.Generator, device: torch.device) -> Loss:
    """On all draws of finite energy; their weights are not used."""
    drawn = drawn[np.isfinite(drawn.log_weights)]
    data, energies = torch.from_numpy(drawn.positions).to(device), torch.from_numpy(drawn.energy).to(device)

    def loss(flow: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        index = torch.randint(len(data), (section.batch_size,), generator=generator, device=device)
        return log_variance(flow.log_prob(data[index]), energies[index], section.deviation, section.covering)

    return loss


OBJECTIVES = {"forward_kl": _forward_kl_of, "log_variance": _log_variance_of}


def ladder(config: DictConfig) -> list[tuple[float, float]]:
    """(drawn at, weighted to) of every step of the annealing."""
    section = config.annealing
    repeats = section.repeat_last, section.repeat_first, section.repeat_between
    return temperature_ladder(config.hot.temperature, section.temperature, section.n_steps, *repeats)


def _trained(work: Workspace, name: str) -> SplineFlow:
    flow = make_spline_flow(work.config, work.system)
    return load_trained(flow, weights_path(work.folder.path, name)).to(work.device)
