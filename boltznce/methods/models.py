"""An interpolant flow and its energy-based model, from the config's ``flow`` and ``ebm`` sections; loading trained ones, drawing."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from boltznce.checkpoint import load_weights
from boltznce.ebm import EnergyBasedModel
from boltznce.errors import UserError
from boltznce.flows.interpolant_flow import InterpolantFlow
from boltznce.flows.solvers import SolverSettings
from boltznce.methods.drawing import Batch
from boltznce.networks.build import build_network
from boltznce.networks.compile import compile_forward
from boltznce.networks.published import load_published_vector_field
from boltznce.systems.base import System
from boltznce.systems.symmetry import mend_chirality

__all__ = ["FlowModels", "load_models", "load_trained", "make_ebm", "make_flow", "solver_settings"]


def make_flow(config: DictConfig, system: System) -> InterpolantFlow:
    """An untrained flow; its first weights follow from the config's seed, or are those of the file ``flow.published_weights``."""
    published = config.flow.get("published_weights")
    if published and config.flow.model.whiten:
        raise UserError("flow.published_weights belong to a flow with an isotropic prior: set flow.model.whiten=false.")
    return _make(InterpolantFlow, config.flow, system, config, load_published_vector_field(published) if published else None)


def make_ebm(config: DictConfig, system: System) -> EnergyBasedModel:
    """An untrained energy-based model; its first weights follow from the config's seed."""
    return _make(EnergyBasedModel, config.ebm, system, config)


def _make(
    model_class: type[nn.Module], section: DictConfig, system: System, config: DictConfig, network: nn.Module | None = None
) -> nn.Module:
    features = getattr(system, "features", None)
    offered = {
        "n_atoms": system.n_atoms,
        "dim": system.dim,
        "n_features": None if features is None else features.shape[1],
        "bonds": getattr(system, "bonds", ()),
    }
    if network is None:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            network = build_network(OmegaConf.to_container(section.network, resolve=True), **offered)
    compile_forward(network, config.compile)
    settings = OmegaConf.to_container(section.model, resolve=True)
    return model_class(network, system.n_atoms, system.dim, features=features, centred=system.translation_invariant, **settings)


def load_trained(module: nn.Module, path: Path) -> nn.Module:
    """Put finished weights into ``module``."""
    module.load_state_dict(load_weights(path)[0])
    return module.eval()


def solver_settings(section: DictConfig) -> SolverSettings:
    """A ``solver`` section of the config."""
    return SolverSettings(**OmegaConf.to_container(section, resolve=True))


@dataclass
class FlowModels:
    """A trained flow and, where the run has come so far, its EBM."""

    config: DictConfig
    system: System
    flow: InterpolantFlow
    ebm: EnergyBasedModel | None = None

    likelihoods: ClassVar = ("ebm", "exact", "hutchinson", "none")
    default_likelihood: ClassVar = "ebm"

    @property
    def mirrors(self) -> bool:
        """Whether the flow makes mirror images of molecules as often as the molecules."""
        return self.system.dim == 3 and getattr(self.flow.network, "parity_equivariant", True)

    def check(self, likelihood: str) -> None:
        """Raise UserError if the likelihood is that of an EBM which the run does not have yet."""
        if likelihood == "ebm" and self.ebm is None:
            raise UserError(
                "likelihood=ebm needs a trained EBM, and this run has none: finish it with scripts/train.py resume=..., or choose exact."
            )

    def batch_size(self, likelihood: str) -> int:
        """Exact likelihoods need far more memory a sample."""
        section = self.config.evaluation
        return section.exact_batch_size if likelihood == "exact" else section.batch_size

    @torch.no_grad()
    def draw(self, n: int, likelihood: str, generator: torch.Generator, n_probes: int = 1) -> Batch:
        """Draw ``n`` samples at once, mend their chirality, and give those kept energies and likelihoods.

        "exact" and "hutchinson" are integrated along the sampling path; folding mirror images together adds log 2 to them.
        """
        on_path = likelihood if likelihood in ("exact", "hutchinson") else "none"
        solver = solver_settings(self.config.flow.solver)
        x, log_prob = self.flow.sample(n, generator, solver=solver, likelihood=on_path, n_probes=n_probes, batch_size=n)
        x, kept, counts = self.mend(x)
        energy = self.system.energy(x).double()
        if likelihood == "ebm":
            log_prob = self.ebm.log_prob(x)
        elif likelihood == "none":
            log_prob = torch.full_like(energy, torch.nan)
        else:
            log_prob = log_prob[kept] + (math.log(2) if self.mirrors else 0.0)
        return Batch(x, energy, log_prob, {"batches": 1, "drawn": n} | counts)

    def mend(self, x: Tensor) -> tuple[Tensor, Tensor, dict[str, int]]:
        """Samples (n, atoms, dim) as the molecule, those that can be; which of the given ones they are, (n,) bool; counts."""
        if self.system.dim != 3:
            return x, torch.ones(len(x), dtype=torch.bool, device=x.device), {"right_chirality": len(x), "mirrored": 0}
        mended = mend_chirality(x, self.system.chirality(x), self.mirrors)
        return mended.positions, mended.kept, {"right_chirality": len(mended.positions), "mirrored": mended.n_mirrored}


def load_models(folder: Path, config: DictConfig, system: System, device: torch.device) -> FlowModels:
    """The trained models in a run's folder; raises UserError if there is no flow yet."""
    flow_path, ebm_path = (Path(folder) / "checkpoints" / f"{name}.safetensors" for name in ("flow", "ebm"))
    if not flow_path.exists():
        raise UserError(f"The run in {folder} has no trained flow yet: finish it with scripts/train.py resume={folder}.")
    models = FlowModels(config, system, load_trained(make_flow(config, system), flow_path).to(device))
    if ebm_path.exists():
        models.ebm = load_trained(make_ebm(config, system), ebm_path).to(device)
    return models
