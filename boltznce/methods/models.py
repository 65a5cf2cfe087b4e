"""Interpolant flows and their energy-based models: made, loaded, bound to a molecule, drawn from.

One network serves one molecule or many. What is a molecule's own beside it are its scales, the prior's covariance and
the means and spreads of the network's inputs: measured on the molecule's own frames (``scales: frames``), or on rough
conformers of its structure (``scales: conformers``), which a molecule that was never seen has too.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from boltznce.analysis.weights import guard
from boltznce.checkpoint import load_weights
from boltznce.command_line import command_line
from boltznce.config import build
from boltznce.ebm import EnergyBasedModel
from boltznce.errors import UserError
from boltznce.flows.coupling import Coupling
from boltznce.flows.interpolant_flow import InterpolantFlow
from boltznce.flows.solvers import SolverSettings
from boltznce.methods.drawing import Batch, Generator
from boltznce.molecules import Molecules
from boltznce.networks.compile import compile_forward
from boltznce.networks.published import load_published_vector_field
from boltznce.precision import ordinary_tensors
from boltznce.settings import require
from boltznce.systems.base import System
from boltznce.systems.bond_graph import BondGraph
from boltznce.systems.conformers import random_conformers
from boltznce.systems.symmetry import mend_chirality

__all__ = [
    "FlowGenerator",
    "FlowModels",
    "Model",
    "load_models",
    "load_trained",
    "make",
    "solver_settings",
    "weights_path",
]

MODELS = {"flow": InterpolantFlow, "ebm": EnergyBasedModel}
N_CONFORMERS = 1024  # rough ones, on which a molecule's scales are measured


# ---- one network, the molecules that it serves ----------------------------------------------------------------------


class Model(nn.Module):
    """What is trained: a network, and ``of(molecule)``, the flow or the energy-based model of one of its molecules.

    Scales follow from each molecule's structure, so that the parameters are those of the network alone.

    Args:
        network: its parameters are trained.
        bound: (network, molecule) -> `InterpolantFlow` or `EnergyBasedModel` around it.
    """

    def __init__(self, network: nn.Module, bound: Callable[[nn.Module, System], nn.Module]) -> None:
        super().__init__()
        self.network, self._bound = network, bound
        self._known: dict[str, nn.Module] = {}  # no submodules: they hold nothing of their own that is trained

    @ordinary_tensors()
    def of(self, molecule: System) -> nn.Module:
        """The model of a molecule, on the network's device; made at the first call."""
        device = next(self.parameters()).device
        if molecule.name not in self._known:
            model = self.unscaled(molecule).to(device)
            if model.needs_calibration:
                # on the CPU, from a seed of its own: the same on every device and in every run
                generator = torch.Generator().manual_seed(0)
                rough = random_conformers(molecule.positions, molecule.bonds, N_CONFORMERS, generator)
                model.calibrate(rough.to(device), torch.Generator(device).manual_seed(0))
            self._known[molecule.name] = model
        return self._known[molecule.name].train(self.training).to(device)

    def unscaled(self, molecule: System) -> nn.Module:
        """A model of a molecule whose scales are not measured."""
        return self._bound(self.network, molecule)

    def on(self, molecule: System, batch: Molecules) -> nn.Module:
        """The model of a padded batch of unlike molecules, with the settings that any one of them has."""
        return self.of(molecule).on(batch)

    def calibrate(self, molecule: System, frames: Tensor, generator: torch.Generator) -> None:
        """Nothing is measured on frames."""


class OneMolecule(nn.Module):
    """A `Model` of one molecule alone, whose scales are measured on its frames and are saved with the weights."""

    def __init__(self, own: nn.Module, molecule: System) -> None:
        super().__init__()
        self.own, self._name = own, molecule.name

    def of(self, molecule: System) -> nn.Module:
        """The model. Raises UserError for another molecule."""
        if molecule.name != self._name:
            raise UserError(
                f"This model has the scales of {self._name}'s frames and none of {molecule.name}: draw {self._name}, "
                "or train with flow.scales=conformers."
            )
        return self.own

    def unscaled(self, molecule: System) -> nn.Module:
        """The model, as it is."""
        return self.of(molecule)

    def calibrate(self, molecule: System, frames: Tensor, generator: torch.Generator) -> None:
        """Measure the scales on the molecule's frames (batch, n, dim) in nm."""
        self.of(molecule).calibrate(frames, generator)


@ordinary_tensors()
def make(config: DictConfig, system: System, name: str) -> Model | OneMolecule:
    """The untrained ``flow`` or ``ebm`` of a run; its first weights follow from the config's seed.

    Raises UserError for settings that contradict each other or the system.
    """
    section, first = config[name], system.example
    published = section.get("published_weights")
    settings = OmegaConf.to_container(section.model, resolve=True)
    if published and settings["whiten"]:
        raise UserError("flow.published_weights belong to a flow with an isotropic prior: set flow.model.whiten=false.")
    if isinstance(settings.get("coupling"), dict):  # one of the user's
        settings["coupling"] = build(settings["coupling"], Coupling)
    require(name, scales=section.scales)
    if section.scales == "frames" and system.is_family:
        raise UserError(
            f"{name}.scales=frames are those of one molecule, and {system.name} has more: set {name}.scales=conformers."
        )
    n_features = None if first.features is None else first.features.shape[1]
    offered = {"dim": first.dim, "n_features": n_features}
    if not system.is_family:
        offered |= {"n_atoms": first.n_atoms, "bonds": first.bonds}
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        network = (
            load_published_vector_field(published)
            if published
            else build(section.network, kind=nn.Module, offered=offered)
        )
    bind = getattr(network, "bind", None)  # of networks whose weights are made from what the atoms are
    if bind is None:
        compile_forward(network, config.compile)
    elif first.features is None or len(first.features.unique(dim=0)) < first.n_atoms:
        raise UserError(
            f"{type(network).__name__} wants all atoms of a molecule told apart: set system.encoding=numbered."
        )
    if section.padded and (bind is not None or settings.get("whiten") or section.scales == "frames"):
        raise UserError(
            f"Padded batches need a network with masks, no whitening and scales=conformers: set {name}.padded=false, "
            "or another network."
        )

    if settings.get("contrast_weight") and section.scales != "frames":
        raise UserError(
            f"The walkers of {name}.model.contrast_weight are saved with the weights of one molecule: set it to 0, or "
            f"{name}.scales=frames."
        )

    def bound(network: nn.Module, molecule: System) -> nn.Module:
        device = next(network.parameters()).device
        features = None if molecule.features is None else molecule.features.to(device)
        around = network if bind is None else bind(features, molecule.bonds)
        sizes, centred = (molecule.n_atoms, molecule.dim), molecule.translation_invariant
        return MODELS[name](around, *sizes, features=features, centred=centred, **settings)

    return OneMolecule(bound(network, first), first) if section.scales == "frames" else Model(network, bound)


@ordinary_tensors()
def load_trained(module: nn.Module, path: Path) -> nn.Module:
    """Put finished weights into ``module``. Raises UserError for weights of another architecture."""
    try:
        module.load_state_dict(load_weights(path)[0])
    except RuntimeError as error:
        raise UserError(
            f"The weights in {path} are those of another network or of an older version: train anew."
        ) from error
    return module.eval()


def weights_path(folder: Path, name: str) -> Path:
    """Where the run in ``folder`` keeps finished weights."""
    return Path(folder) / "checkpoints" / f"{name}.safetensors"


def solver_settings(section: DictConfig) -> SolverSettings:
    """A ``solver`` section of the config."""
    return SolverSettings(**OmegaConf.to_container(section, resolve=True))


# ---- trained models, drawn from -------------------------------------------------------------------------------------


@dataclass
class FlowGenerator(Generator):
    """A trained flow of one system and, where the run has one, its EBM."""

    config: DictConfig
    system: System
    flow: InterpolantFlow
    ebm: EnergyBasedModel | None = None

    likelihoods: ClassVar = ("ebm", "exact", "hutchinson", "none")

    @property
    def default_likelihood(self) -> str:
        return "exact" if self.ebm is None else "ebm"

    @property
    def base_log_prob(self) -> Callable[[Tensor], Tensor] | None:
        """The EBM's log-likelihood: a gradient of the flow's own costs as much as all of its Jacobian."""
        return None if self.ebm is None else self.ebm.log_prob

    @property
    def device(self) -> torch.device:
        """That of the flow."""
        return self.flow.basis.device

    @property
    def mirrors(self) -> bool:
        """Whether the flow makes mirror images of a molecule as often as it: its density is then that of both."""
        return bool(self.system.stereocentres) and self.flow.parity_equivariant

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for a report."""
        text = "Mirror images that the flow made were mirrored; their two densities are added up (log 2)."
        return (text,) if self.mirrors else ()

    def check(self, likelihood: str) -> None:
        """Raise UserError if the likelihood is that of an EBM which the run does not have yet."""
        if likelihood == "ebm" and self.ebm is None:
            raise UserError(
                "likelihood=ebm needs a trained EBM, and this run has none: finish it with "
                f"{command_line('train', 'resume=...')}, or choose exact."
            )

    def models(self, likelihood: str) -> Sequence[nn.Module]:
        """The flow and, for its likelihoods, the EBM."""
        return (self.flow, self.ebm) if likelihood == "ebm" else (self.flow,)

    def batch_size(self, likelihood: str) -> int:
        """Exact likelihoods need far more memory a sample."""
        section = self.config.evaluation
        return section.exact_batch_size if likelihood == "exact" else section.batch_size

    @ordinary_tensors()
    @torch.no_grad()
    def draw(self, n: int, likelihood: str, generator: torch.Generator, n_probes: int = 1) -> Batch:
        """Draw ``n`` samples at once, keep those that are the molecule or can be mended, with energies and likelihoods.

        "exact" and "hutchinson" are integrated along the sampling path.
        """
        on_path = likelihood if likelihood in ("exact", "hutchinson") else "none"
        solver = solver_settings(self.config.flow.solver)
        drawn = self.flow.sample(n, generator, solver=solver, likelihood=on_path, n_probes=n_probes, batch_size=n)
        x, kept, counts = self.mend(drawn[0])
        energy = self.system.cheap.energy(x).double()
        counts = {"batches": 1, "drawn": n} | counts
        if likelihood == "none":
            return Batch(x, energy, torch.full_like(energy, torch.nan), counts)
        log_prob = self.ebm.log_prob(x) if likelihood == "ebm" else self._folded(drawn[1][kept])
        energy, log_prob, n_bad = guard(energy, log_prob)
        return Batch(x, energy, log_prob, counts | {"not_finite": n_bad})

    @ordinary_tensors()
    @torch.no_grad()
    def log_prob(self, positions: Tensor) -> Tensor:
        """Exact log q (n,), float64, of given positions (n, atoms, dim) in nm, mirror images included."""
        section = self.config.evaluation
        options = {"solver": solver_settings(section.solver), "batch_size": section.exact_batch_size}
        return self._folded(self.flow.log_prob(positions.to(self.device), **options))

    def _folded(self, log_prob: Tensor) -> Tensor:
        """Of a molecule that was drawn as itself or as its mirror image: the two densities add up."""
        return log_prob + math.log(2) if self.mirrors else log_prob

    def mend(self, x: Tensor) -> tuple[Tensor, Tensor, dict[str, int]]:
        """Draws (n, atoms, dim) as the molecule: right bonds and chirality, reordered or mirrored if that mends them.

        Returns those that can be had so, which of the given ones they are, (n,) bool, and counts. Reordering exchanges
        atoms that the network takes for equal, so it changes no density; where it tells them apart, conformers that
        need it are dropped.
        """
        if self._bond_graph is None:
            return x, torch.ones(len(x), dtype=torch.bool, device=x.device), {}
        checked = self._bond_graph.check(x)
        right = checked.right & ~checked.reordered if self._tells_atoms_apart else checked.right
        right = right.to(x.device)
        ordered = checked.apply(x)[right]
        mended = mend_chirality(ordered, self.system.chirality(ordered), self.mirrors)
        kept = torch.zeros_like(right)
        kept[right] = mended.kept
        counts = {
            "right_graph": int(right.sum()),
            "reordered": int((checked.reordered.to(x.device) & right).sum()),
            "right_chirality": len(mended.positions),
            "mirrored": mended.n_mirrored,
        }
        return mended.positions, kept, counts

    @cached_property
    def _bond_graph(self) -> BondGraph | None:
        return None if self.system.topology is None else BondGraph.of(self.system.topology)

    @cached_property
    def _tells_atoms_apart(self) -> bool:
        features = self.system.features
        return self.flow.tells_atoms_apart or len(features.unique(dim=0)) == self.system.n_atoms


@dataclass
class FlowModels:
    """The trained flow of a run and, where it has come so far, its EBM."""

    config: DictConfig
    flow: Model | OneMolecule
    ebm: Model | OneMolecule | None

    def of(self, member: System) -> FlowGenerator:
        """What is drawn from for one member of the run's system, seen in training or not."""
        return FlowGenerator(self.config, member, self.flow.of(member), self.ebm and self.ebm.of(member))


def load_models(folder: Path, config: DictConfig, system: System, device: torch.device) -> FlowModels:
    """The trained models of the run in ``folder``. Raises UserError if there is no flow yet."""
    paths = {name: weights_path(folder, name) for name in MODELS if name in config}
    if not paths["flow"].exists():
        finish = command_line("train", f"resume={folder}")
        raise UserError(f"The run in {folder} has no trained flow yet: finish it with {finish}.")
    found = {
        name: load_trained(make(config, system, name), path).to(device) for name, path in paths.items() if path.exists()
    }
    return FlowModels(config, found["flow"], found.get("ebm"))
