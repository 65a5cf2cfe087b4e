"""Equilibrium samples and free energies of molecules from generative models.

- `load_system`, `System`: a molecule or toy system with its reduced energy.
- `load_run`, `Run`: a trained generator; ``run.sample(n, likelihood="ebm")`` gives `WeightedSamples`.
- `free_energy_difference`, `free_energy_profile`: what the weights say, with uncertainties.
"""

from boltznce.analysis.free_energy import corrected_free_energy_difference, free_energy_difference, free_energy_profile
from boltznce.analysis.reweighting import WeightedSamples
from boltznce.config import load_system
from boltznce.errors import UserError
from boltznce.run import Run, load_run
from boltznce.systems.base import System

__all__ = [
    "Run",
    "System",
    "UserError",
    "WeightedSamples",
    "corrected_free_energy_difference",
    "free_energy_difference",
    "free_energy_profile",
    "load_run",
    "load_system",
]
