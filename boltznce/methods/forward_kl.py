"""A baseline of TA-BG: its flow trained by forward KL, that is by maximum likelihood, on data.

Stages: data -> flow -> evaluation -> report.
"""

from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from boltznce.annealing import forward_kl
from boltznce.data.dataset import boltzmann_indices
from boltznce.data.jobs import force_evaluations
from boltznce.methods import stages
from boltznce.methods.ladder import evaluate_ladder, report_ladder
from boltznce.methods.preflight import check_fit_of, check_training_data
from boltznce.methods.report import summary
from boltznce.methods.spline_models import SplineModels, make_spline_flow
from boltznce.methods.workspace import Workspace
from boltznce.systems.base import System

__all__ = ["STAGES", "check", "load_models", "make_data", "summary", "train_flow"]


def check(config: DictConfig, system: System) -> None:
    """Raise UserError for what can be known to fail (see `preflight`)."""
    check_training_data(config, system)
    check_fit_of(config.flow, "flow", validates=True)
    make_spline_flow(config, system)


def make_data(work: Workspace) -> dict:
    """The force evaluations of a simulation count, as TA-BG's energy evaluations do."""
    frames = stages.make_data(work)
    return frames | {"energy_evaluations": force_evaluations(work.frames(work.system).meta)}


def train_flow(work: Workspace) -> dict:
    """Fit the flow to training frames, drawn with replacement by their weights; no mode is made more frequent."""
    section, rng = work.config.flow, work.numpy_generator("forward KL")
    train, validation, _ = work.frames(work.system).split(**work.config.data.split)
    x_train, x_validation = (
        torch.from_numpy(part.positions[boltzmann_indices(part.log_weights, n, rng)]).to(work.device)
        for part, n in ((train, section.n_train), (validation, section.n_validation))
    )

    def loss(flow: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        return forward_kl(flow.log_prob(stages.minibatch(x_train, section.batch_size, generator)))

    @torch.no_grad()
    def validate(flow: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        return forward_kl(torch.cat([flow.log_prob(x) for x in x_validation.split(section.batch_size)]))

    return work.fit("flow", make_spline_flow(work.config, work.system).to(work.device), loss, validate)


def load_models(folder: Path, config: DictConfig, system: System, device: torch.device) -> SplineModels:
    """The flow."""
    return SplineModels(Path(folder), config, device, {"flow": system.temperature})


STAGES = {"data": make_data, "flow": train_flow, "evaluation": evaluate_ladder, "report": report_ladder}
