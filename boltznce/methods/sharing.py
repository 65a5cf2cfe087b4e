"""One network, many molecules: the flow or the energy-based model of each molecule is made around the same network when it is asked for."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from boltznce.systems.conformers import random_conformers
from boltznce.systems.molecular import MolecularSystem

__all__ = ["SharedModel"]

N_CONFORMERS = 1024  # rough ones, on which a molecule's model is calibrated


class SharedModel(nn.Module):
    """What is trained on many molecules: a network, and ``of(molecule)``, the `InterpolantFlow` or `EnergyBasedModel` of one of them.

    Its parameters are those of the network alone. What is a molecule's own (prior, scales of inputs) follows from its structure: where the
    model or its network is calibrated, that is done on rough conformers of the minimized structure, for molecules of the training and
    for those never seen in the same way, and needs no simulation. A network with ``bind`` is bound to each molecule.

    Args:
        network: called as ``network(x, t, features)``, or one whose ``bind(features, bonds)`` returns such a one.
        model: `InterpolantFlow` or `EnergyBasedModel`.
        settings: its settings, but for network, sizes and features.
    """

    def __init__(self, network: nn.Module, model: Callable[..., nn.Module], settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.network = network
        self._model, self._settings = model, dict(settings)
        self._known: dict[str, nn.Module] = {}  # no submodules: they hold nothing of their own that is trained

    def of(self, molecule: MolecularSystem) -> nn.Module:
        """The model of a molecule, on the network's device; made at the first call."""
        device = next(self.network.parameters()).device
        if molecule.name not in self._known:
            features = molecule.features.to(device)
            bound = self.network.bind(features, molecule.bonds) if hasattr(self.network, "bind") else self.network
            model = self._model(bound, molecule.n_atoms, molecule.dim, features=features, **self._settings).to(device)
            if getattr(model, "whiten", False) or hasattr(bound, "calibrate"):
                # on the CPU, from a seed of its own: the same on every device and in every run
                generator = torch.Generator().manual_seed(0)
                rough = random_conformers(molecule.positions, molecule.bonds, N_CONFORMERS, generator)
                model.calibrate(rough.to(device), torch.Generator(device).manual_seed(0))
            self._known[molecule.name] = model
        return self._known[molecule.name].train(self.training).to(device)

    def forward(self, molecule: MolecularSystem, positions: Tensor, generator: torch.Generator | None = None) -> Any:
        """The loss on conformers (batch, n, 3) of one molecule in nm."""
        return self.of(molecule).loss(positions, generator)
