"""A baseline of TA-BG: its flow trained by reverse KL at the system's own temperature, where it collapses onto some of the modes.

Stages: hot -> evaluation -> report; the section ``hot`` is TA-BG's, with ``hot.temperature`` that of the system.
"""

from pathlib import Path

import torch
from omegaconf import DictConfig

from boltznce.errors import UserError
from boltznce.methods.report_parts import summary
from boltznce.methods.spline_models import SplineModels
from boltznce.methods.spline_report import evaluate, report
from boltznce.methods.tabg import train_hot
from boltznce.methods.workspace import Workspace
from boltznce.systems.base import System

__all__ = ["STAGES", "load_models", "summary"]


def load_models(folder: Path, config: DictConfig, system: System, device: torch.device) -> SplineModels:
    """The flow; raises UserError if it has not been trained yet."""
    return SplineModels.load(folder, config, system, device, {"hot": config.hot.temperature})


def train(work: Workspace) -> dict:
    """TA-BG's first stage, at the system's temperature; raises UserError where its objective is another one."""
    objective = work.config.hot.objective
    if objective != "reverse_kl":
        raise UserError(f"method=reverse_kl trains by reverse KL alone, not hot.objective={objective}: leave it out, or take method=tabg.")
    return train_hot(work)


STAGES = {"hot": train, "evaluation": evaluate, "report": report}
