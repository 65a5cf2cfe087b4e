"""What the stages of a method share: the run's folder, config, system, device and random streams."""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import nn

from boltznce.config import build
from boltznce.data.dataset import Dataset
from boltznce.errors import UserError
from boltznce.logger import Logger
from boltznce.methods import find_method
from boltznce.methods.drawing import Models
from boltznce.run_folder import RunFolder
from boltznce.systems.base import System
from boltznce.training import FitSettings, Loss, Validation, fit, step_generator

__all__ = ["Workspace", "make_fabric"]

log = logging.getLogger(__name__)


def make_fabric(device: str, precision: str = "32-true") -> Fabric:
    """One device: ``auto`` takes the GPU where there is one."""
    accelerator = "auto" if device == "auto" else device.split(":")[0]
    try:
        return Fabric(accelerator=accelerator, devices=[int(device.split(":")[1])] if ":" in device else 1, precision=precision)
    except Exception as error:  # Fabric has no common class of error for a device that is not there
        raise UserError(f"device={device} cannot be used ({error}): choose auto or cpu.") from error


@dataclass
class Workspace:
    """Handed from stage to stage."""

    folder: RunFolder
    config: DictConfig
    fabric: Fabric
    logger: Logger | None = None

    @cached_property
    def system(self) -> System:
        return build(self.config.system)

    @cached_property
    def dataset(self) -> Dataset:
        """The data that the run trains on and compares with; raises UserError if they are of another system."""
        dataset = Dataset.load(Path(self.config.data.folder))
        made_of, system = dataset.meta.get("system", {}), self.system
        same = all(made_of.get(key, value) == value for key, value in system.identity.items())
        if not same or dataset.positions.shape[1:] != (system.n_atoms, system.dim):
            raise UserError(
                f"{self.config.data.folder} holds data of another system ({made_of.get('name', 'unknown')}, not {system.name}): "
                "set data.folder to another folder; data are made there if it does not exist."
            )
        return dataset

    @cached_property
    def models(self) -> Models:
        """The trained models as far as the run has come; drop it with ``del work.models`` after training more.

        Raises UserError where there is nothing to draw from, or nothing yet.
        """
        return find_method(self.config.method.name).load_models(self.folder.path, self.config, self.system, self.device)

    def fit(
        self,
        name: str,
        module: nn.Module,
        loss: Loss,
        validate: Validation | None = None,
        section: str | None = None,
        **settings: Any,
    ) -> dict:
        """Train ``module``; returns what the run's record keeps of it.

        Its settings are the ``fit`` of the config's ``section`` (default ``name``), with those of ``settings`` in their place.
        """
        result = fit(
            module,
            loss,
            FitSettings(**{**self.config[section or name].fit, **settings}),
            self.folder.path,
            fabric=self.fabric,
            seed=self.config.seed,
            name=name,
            validate=validate,
            logger=self.logger,
        )
        return {"steps": result.steps, "skipped_steps": result.skipped_steps, "validation_loss": result.validation}

    @property
    def device(self) -> torch.device:
        """Where the run computes."""
        return self.fabric.device

    def generator(self, name: str, index: int = 0) -> torch.Generator:
        """Random numbers on the device, a function of the run's seed, a name and an index alone."""
        return step_generator(self.config.seed, name, index, self.device)

    def numpy_generator(self, name: str) -> np.random.Generator:
        """Random numbers of numpy, likewise."""
        return np.random.default_rng(step_generator(self.config.seed, name, 0).initial_seed())
