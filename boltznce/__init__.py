"""Equilibrium samples and free energies of molecules from generative models.

What a notebook needs is here:

- `load_system`, `System`: a molecule, a peptide by its sequence, or a system in the plane, with its reduced energy;
  `MolecularSystem.from_openmm`: a molecule of OpenMM's objects.
- `train_run`: what ``boltznce train`` does, from Python. `load_run`, `Run`: a trained generator; ``run.sample(n)``
  gives `WeightedSamples`: positions, energies, likelihoods and log weights, and how far they can be trusted.
  `load_pretrained`: a run that ships with the package.
- `free_energy_difference`, `free_energy_profile`, `free_energy_surface`, `corrected_free_energy_difference`: what the
  weights say, as does ``samples.mean(f)``. `Coordinate`: a coordinate of your own, beside those of a system's settings.
- `register`: lets run folders and files of systems name a network, a system, a method or a function of your own.
- `UserError`: what is raised for a mistake that one can mend; its message says how.

The parts, in the order of the computation (``help(boltznce.systems)`` and so on):

- `boltznce.systems`: energies. `boltznce.data`: simulation and datasets.
- `boltznce.flows`: generators. `boltznce.networks`: the networks in them. `boltznce.ebm`: their learned likelihood.
- `boltznce.annealing`: from high temperature to low without data. `boltznce.smc`: from a density to the target, walker
  by walker.
- `boltznce.analysis`: weights, free energies, metrics, figures, reports.
- `boltznce.training`: the loop that trains them all. `boltznce.methods`: the published methods, each a list of stages.
  `boltznce.run`: a run in its folder. `boltznce.config`: names to settings to objects. `boltznce.commands`: what the
  command line offers.

Positions are float32 tensors (batch, atoms, 3) in nm, energies are in kT, angles in radians in (-π, π], log weights
float64 and unnormalized. Time runs from the data, t = 0, to the prior, t = 1.
"""

import importlib
from typing import Any

__version__ = "0.2.0"  # pyproject.toml and the wheel have it from here

_HOMES = {  # each is imported when it is first asked for: torch alone takes seconds
    "Coordinate": "systems.coordinates",
    "MolecularSystem": "systems.molecular",
    "Run": "run",
    "System": "systems.base",
    "UserError": "errors",
    "WeightedSamples": "analysis.reweighting",
    "corrected_free_energy_difference": "analysis.free_energy",
    "free_energy_difference": "analysis.free_energy",
    "free_energy_profile": "analysis.profiles",
    "free_energy_surface": "analysis.profiles",
    "load_pretrained": "run",
    "load_run": "run",
    "load_system": "config",
    "register": "trust",
    "train_run": "run",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"boltznce.{_HOMES[name]}"), name)
    try:
        return importlib.import_module(f"boltznce.{name}")
    except ModuleNotFoundError:
        raise AttributeError(f"module 'boltznce' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
