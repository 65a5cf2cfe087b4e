"""The generator of TA-BG and of its baselines: a spline flow, from the config's section ``generator``; loading trained ones, drawing."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from boltznce.errors import UserError
from boltznce.flows.box import BoxCoordinates
from boltznce.flows.internal import InternalCoordinates
from boltznce.flows.spline_flow import SplineFlow
from boltznce.methods.drawing import Batch
from boltznce.methods.models import load_trained
from boltznce.systems.base import System
from boltznce.systems.stiffness import harmonic_constants

__all__ = ["SplineModels", "make_coordinates", "make_spline_flow", "weights_path"]


def make_coordinates(system: System, settings: DictConfig) -> InternalCoordinates | BoxCoordinates:
    """Internal coordinates of a molecule, with a peptide's main chain for backbone; for other systems the box of ``settings.box``."""
    if system.dim != 3:
        box = OmegaConf.to_container(settings).get("box")
        if box is None or not all(low < high for low, high in box):
            raise UserError(
                f"The generator of {system.name} needs a box that holds it, not {box}: set generator.box=[[low,high],[low,high]]."
            )
        return BoxCoordinates(system.n_atoms, *zip(*box, strict=True))
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


def weights_path(folder: Path, name: str) -> Path:
    """Where the run in ``folder`` keeps the finished weights of a flow."""
    return Path(folder) / "checkpoints" / f"{name}.safetensors"


@dataclass
class SplineModels:
    """One of the trained flows of a run, with the system at the flow's temperature.

    Attributes:
        flows: name of the weights -> temperature, of all flows of the run, in the order in which they are trained.
    """

    folder: Path
    config: DictConfig
    system: System
    flow: SplineFlow
    flows: dict[str, float]

    likelihoods: ClassVar = ("exact", "none")
    default_likelihood: ClassVar = "exact"

    @classmethod
    def load(
        cls, folder: Path, config: DictConfig, system: System, device: torch.device, flows: dict[str, float], name: str | None = None
    ) -> "SplineModels":
        """The flow ``name`` of a run, by default the last; raises UserError if it has not been trained yet."""
        name = name or list(flows)[-1]
        path = weights_path(folder, name)
        if not path.exists():
            raise UserError(
                f"The run in {folder} has no trained flow at {flows[name]:g} yet: finish it with scripts/train.py resume={folder}."
            )
        flow = load_trained(make_spline_flow(config, system), path).to(device)
        return cls(Path(folder), config, system.at_temperature(flows[name]), flow, flows)

    def named(self, name: str) -> "SplineModels":
        """Another flow of the run."""
        device = next(self.flow.parameters()).device
        return self.load(self.folder, self.config, self.system, device, self.flows, name)

    def batch_size(self, likelihood: str) -> int:
        """That of drawing, unless told otherwise."""
        return self.config.evaluation.batch_size

    def check(self, likelihood: str) -> None:
        """All that can be asked for can be had."""

    @torch.no_grad()
    def draw(self, n: int, likelihood: str, generator: torch.Generator, n_probes: int = 1) -> Batch:
        """``n`` samples at once; what has no finite energy or log q gets the energy +inf, and so the weight zero."""
        x, log_prob = self.flow.sample(n, generator)
        energy = self.system.energy(x).double()
        fine = energy.isfinite() & log_prob.isfinite()
        energy, log_prob = torch.where(fine, energy, math.inf), torch.where(fine, log_prob.double(), 0.0)
        if likelihood == "none":
            log_prob = torch.full_like(energy, torch.nan)
        return Batch(x, energy, log_prob, {"batches": 1, "drawn": n, "not_finite": int((~fine).sum())})

    @torch.no_grad()
    def log_prob(self, positions: np.ndarray) -> np.ndarray:
        """log q (n,) of given positions (n, atoms, dim), in batches; -inf outside the flow's domain."""
        device = next(self.flow.parameters()).device
        parts = torch.from_numpy(np.array(positions)).split(self.config.evaluation.batch_size)
        return np.concatenate([self.flow.log_prob(part.to(device)).cpu().numpy() for part in parts])
