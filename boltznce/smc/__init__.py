"""Sequential Monte Carlo from a base density that one can draw from to a target: weights that carry.

`anneal` does it; `HMC` is how walkers move, `AnnealSettings` how far a step goes; `Annealed` has walkers, weights and
ancestors. `corrected_by_ancestors` takes off by how much a base that is only learned shifts a free energy.
"""

from boltznce.smc.hmc import HMC
from boltznce.smc.lineage import (
    Kin,
    Lineage,
    corrected_by_ancestors,
    lineages,
    log_normalizer,
    refined_free_energy_difference,
)
from boltznce.smc.path import Counts, Path, Point, ValueAndGradient, conditional_ess, next_beta, with_gradient
from boltznce.smc.resampling import resample_within, systematic
from boltznce.smc.result import Annealed
from boltznce.smc.sampler import anneal
from boltznce.smc.state import AnnealSettings, Step

__all__ = [
    "HMC",
    "AnnealSettings",
    "Annealed",
    "Counts",
    "Kin",
    "Lineage",
    "Path",
    "Point",
    "Step",
    "ValueAndGradient",
    "anneal",
    "conditional_ess",
    "corrected_by_ancestors",
    "lineages",
    "log_normalizer",
    "next_beta",
    "refined_free_energy_difference",
    "resample_within",
    "systematic",
    "with_gradient",
]
