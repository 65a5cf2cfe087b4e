"""The flow and the energy-based model of a molecule, from the config's ``flow`` and ``ebm`` sections."""

from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from boltznce.checkpoint import load_weights
from boltznce.ebm import EnergyBasedModel
from boltznce.errors import UserError
from boltznce.flows.interpolant_flow import InterpolantFlow
from boltznce.flows.solvers import SolverSettings
from boltznce.networks.build import build_network
from boltznce.networks.compile import compile_forward
from boltznce.networks.published import load_published_vector_field
from boltznce.systems.base import System

__all__ = ["load_trained", "make_ebm", "make_flow", "solver_settings"]


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
