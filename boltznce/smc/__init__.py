"""Sequential Monte Carlo from a base density that one can draw from to a target: weights that carry.

`anneal` does it; `HMC` is how walkers move, `AnnealSettings` how far a step goes; `Annealed` has walkers, weights and
ancestors. `base_bias` measures by how much a base that is only learned shifts a free-energy difference.
"""

from boltznce.smc.hmc import HMC
from boltznce.smc.lineage import BaseBias, Lineage, base_bias, lineages, log_normalizer
from boltznce.smc.path import Counts, Path, Point, conditional_ess, next_beta, with_gradient
from boltznce.smc.resampling import resample_within, systematic
from boltznce.smc.result import Annealed
from boltznce.smc.sampler import anneal
from boltznce.smc.state import AnnealSettings, Step

__all__ = [
    "HMC",
    "AnnealSettings",
    "Annealed",
    "BaseBias",
    "Counts",
    "Lineage",
    "Path",
    "Point",
    "Step",
    "anneal",
    "base_bias",
    "conditional_ess",
    "lineages",
    "log_normalizer",
    "next_beta",
    "resample_within",
    "systematic",
    "with_gradient",
]
