"""What the stages of a method share: the run's folder, config, system, device and random streams."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import nn

from boltznce import ranks
from boltznce.config import build, locate
from boltznce.data.dataset import Dataset
from boltznce.data.members import load_data
from boltznce.errors import UserError
from boltznce.logger import Logger
from boltznce.methods.live import live_curves
from boltznce.run_folder import RunFolder
from boltznce.systems.base import System
from boltznce.training import FitSettings, Loss, Validation, fit, step_generator

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Workspace", "make_fabric"]


def make_fabric(
    device: str, precision: str = "32-true", devices: int = 1, num_nodes: int = 1, strategy: str = "auto"
) -> "Fabric":
    """One process a device: ``auto`` takes GPUs where there are any. What is more than one is to be `ranks.join`ed.

    Raises UserError for a device that is not there, for devices that contradict each other, and where the processes
    that exist are not so many.
    """
    from lightning_fabric import Fabric  # slow to import, and only runs need it
    from lightning_fabric.plugins.environments import LightningEnvironment
    from lightning_fabric.strategies import DDPStrategy

    kind, _, number = device.partition(":")
    if number and devices * num_nodes > 1:
        raise UserError(f"device={device} is one device, not devices={devices}: set device={kind}, or devices=1.")
    ranks.check_world(devices, num_nodes)
    where: dict[str, Any] = {"plugins": [ranks.environment() or LightningEnvironment()]}
    if devices * num_nodes > 1 or strategy == "ddp":
        # some losses leave parameters out, such as an additive constant, or the layers of another molecule
        where["strategy"] = DDPStrategy(find_unused_parameters=True)
    try:
        own = [int(number)] if number else devices
        return Fabric(accelerator=kind, devices=own, num_nodes=num_nodes, precision=precision, **where)
    except Exception as error:  # Fabric has no common class of error for a device that is not there
        what = f"device={device}" + (f" devices={devices}" if devices > 1 else "")
        raise UserError(f"{what} cannot be used ({error}): choose auto or cpu.") from error


@dataclass
class Workspace:
    """Handed from stage to stage.

    What is made for one member of the system (its frames, draws, random numbers) goes by ``what``, in words, and the
    member's label, which is empty where the system is its only member.
    """

    folder: RunFolder
    config: DictConfig
    fabric: "Fabric"
    logger: Logger | None = None

    @cached_property
    def system(self) -> System:
        """What the run samples, or the family of it; UserError if it is no longer what it was when the run began."""
        system = build(self.config.system)
        self.folder.check_identity(system)
        return system

    @cached_property
    def models(self) -> Any:
        """The trained models so far, ``models.of(member)`` a `Generator`; UserError where there is none yet."""
        method = locate(self.config.method._target_, ModuleType)
        return method.load_models(self.folder.path, self.config, self.system, self.device)

    @property
    def parent(self) -> Mapping[str, Any]:
        """What is known of the run that this one's models come from (see `boltznce.methods.finetune`), if any."""
        return self.config.get("parent") or {}

    @property
    def trained_on(self) -> list[str]:
        """Names of the molecules that the models have learned from, here or before."""
        own = [member.name for member in self.system.members("train")]
        if not self.parent:
            return own
        before, here = list(self.parent["trained_on"]), any(map(self.steps, ("flow", "ebm")))
        return before + [name for name in own if here and name not in before]

    def steps(self, name: str) -> int:
        """How many a model has been trained for in this run."""
        return self.folder.stages.get(name, {}).get("steps", 0)

    def frames_exist(self, member: System) -> bool:
        """Whether there are data of the member."""
        section = self.config.data
        return section.folder is not None and (Path(section.folder) / self.system.label(member) / "meta.yaml").exists()

    def frames(self, member: System) -> Dataset:
        """The member's data. Raises UserError for those of another system, and for others than the run began with."""
        folder = Path(self.config.data.folder)
        dataset = load_data(self.system, member, folder)
        digests = self.folder.stages.get("data", {}).get("datasets", {})
        if digests.get(member.name, dataset.digest) != dataset.digest:
            raise UserError(
                f"{folder} no longer holds the data of {member.name} that {self.folder.path} began with: restore them, "
                "or start a new run."
            )
        return dataset

    def unseen(self, member: System, frames: Dataset) -> Dataset:
        """Those of a member's data that no flow of this run was trained on: the test part, or all where none was."""
        trained = self.steps("flow") and member in self.system.members("train")
        return frames.split(**self.config.data.split)[2] if trained else frames

    def samples(self, what: str, member: System) -> Path:
        """The folder of a member's samples."""
        return self.folder.path / "samples" / what / self.system.label(member)

    def fit(
        self,
        name: str,
        module: nn.Module,
        loss: Loss,
        validate: Validation | None = None,
        memory: nn.Module | None = None,
        **settings: Any,
    ) -> dict:
        """Train ``module`` by ``config.<name>.fit``, or by the settings given; returns what the record keeps of it."""
        self.folder.leave(self.folder.path / "checkpoints" / f"{name}.safetensors")
        result = fit(
            module,
            loss,
            FitSettings(**(settings or self.config[name].fit)),
            self.folder.path,
            fabric=self.fabric,
            seed=self.config.seed,
            name=name,
            validate=validate,
            memory=memory,
            after_checkpoint=live_curves(self.folder.path, name),
            logger=self.logger,
        )
        self.__dict__.pop("models", None)  # there is one more, or a better one
        return {"steps": result.steps, "skipped_steps": result.skipped_steps, "validation_loss": result.validation}

    @property
    def device(self) -> torch.device:
        """Where the run computes."""
        return self.fabric.device

    def generator(self, what: str, member: System | None = None, index: int = 0) -> torch.Generator:
        """Random numbers on the device, a function of the run's seed, of ``what``, the member and an index alone."""
        return step_generator(self.config.seed, self._stream(what, member), index, self.device)

    def numpy_generator(self, what: str, member: System | None = None) -> np.random.Generator:
        """Random numbers of numpy, likewise."""
        return np.random.default_rng(step_generator(self.config.seed, self._stream(what, member), 0).initial_seed())

    def _stream(self, what: str, member: System | None) -> str:
        return what if member is None else f"{what} {self.system.label(member)}".strip()
