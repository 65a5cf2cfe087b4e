"""The generator of TA-BG and of its baselines: a spline flow, from the config's section ``generator``.

Loading trained ones, drawing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from boltznce.analysis.weights import guard
from boltznce.command_line import command_line
from boltznce.errors import UserError
from boltznce.flows.box import BoxCoordinates
from boltznce.flows.internal import InternalCoordinates
from boltznce.flows.spline_flow import SplineFlow
from boltznce.methods.drawing import Batch, Generator
from boltznce.methods.models import load_trained, weights_path
from boltznce.precision import ordinary_tensors
from boltznce.settings import require_keywords
from boltznce.systems.base import System
from boltznce.systems.stiffness import harmonic_constants

__all__ = ["SplineGenerator", "SplineModels", "make_coordinates", "make_spline_flow"]


def make_coordinates(system: System, settings: DictConfig) -> InternalCoordinates | BoxCoordinates:
    """Internal coordinates of a molecule, its main chain for backbone; for other systems ``settings.box``.

    Raises UserError for a system without bonds and a box that holds nothing.
    """
    if not system.bonds:
        box = settings.get("box")
        if box is None or not all(low < high for low, high in box):
            raise UserError(
                f"The generator of {system.name} needs a box that holds it, not {box}: "
                "set generator.box=[[low,high],[low,high]]."
            )
        return BoxCoordinates(system.n_atoms, *zip(*box, strict=True))
    require_keywords(InternalCoordinates, settings.coordinates, "generator.coordinates")
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


@ordinary_tensors()
def make_spline_flow(config: DictConfig, system: System) -> SplineFlow:
    """An untrained generator; its first weights follow from the config's seed."""
    require_keywords(SplineFlow, config.generator.model, "generator.model")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return SplineFlow(make_coordinates(system, config.generator), **config.generator.model)


@dataclass
class SplineGenerator(Generator):
    """A trained flow, with the system at the flow's temperature."""

    config: DictConfig
    system: System
    flow: SplineFlow

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for a report."""
        text = (
            "log q is normalized modulo rigid motion, on the domain of the internal coordinates (one hand, one "
            "labelling of equivalent hydrogens): an NLL is comparable with those of such flows only."
        )
        return (text,) if self.system.bonds else ()

    @property
    def base_log_prob(self) -> Callable[[Tensor], Tensor]:
        """The flow's exact log-likelihood."""
        return self.flow.log_prob

    @property
    def device(self) -> torch.device:
        """That of the flow."""
        return next(self.flow.parameters()).device

    def models(self, likelihood: str) -> Sequence[nn.Module]:
        """The flow."""
        return (self.flow,)

    @ordinary_tensors()
    @torch.no_grad()
    def draw(self, n: int, likelihood: str, generator: torch.Generator, n_probes: int = 1) -> Batch:
        """``n`` samples at once; what has no finite energy or log q gets the energy +inf, and so the weight zero."""
        x, log_prob = self.flow.sample(n, generator)
        energy, log_prob, n_bad = guard(self.system.cheap.energy(x), log_prob)
        if likelihood == "none":
            log_prob = torch.full_like(energy, torch.nan)
        return Batch(x, energy, log_prob, {"batches": 1, "drawn": n, "not_finite": n_bad})

    @ordinary_tensors()
    @torch.no_grad()
    def log_prob(self, positions: Tensor) -> Tensor:
        """log q (n,), float64, of given positions (n, atoms, dim) in nm, in batches; -inf outside the flow's domain."""
        parts = positions.split(self.config.evaluation.batch_size)
        return torch.cat([self.flow.log_prob(part.to(self.device)) for part in parts])


@dataclass
class SplineModels:
    """The trained flows of a run.

    Attributes:
        flows: name of the weights -> temperature, of all flows of the run, in the order in which they are trained.
    """

    folder: Path
    config: DictConfig
    device: torch.device
    flows: dict[str, float]

    def of(self, member: System, name: str | None = None) -> SplineGenerator:
        """The flow ``name``, by default the last. Raises UserError if it has not been trained yet."""
        name = name or list(self.flows)[-1]
        path, temperature = weights_path(self.folder, name), self.flows[name]
        if not path.exists():
            raise UserError(
                f"The run in {self.folder} has no trained flow at {temperature:g} yet: "
                f"finish it with {command_line('train', f'resume={self.folder}')}."
            )
        flow = load_trained(make_spline_flow(self.config, member), path).to(self.device)
        return SplineGenerator(self.config, member.at_temperature(temperature), flow)
