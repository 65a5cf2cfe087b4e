"""What an annealing ends with: walkers, weights and ancestors, and errors that know them."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from boltznce.analysis.free_energy import FreeEnergyDifference
from boltznce.analysis.weights import effective_sample_size
from boltznce.smc.lineage import Lineage, lineages, log_normalizer, refined_free_energy_difference
from boltznce.smc.path import Counts
from boltznce.smc.state import Step

__all__ = ["Annealed"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Annealed:
    """Walkers at the target: positions (n, ...) and reduced energies u (n,), log weights and ancestors (n,).

    ``ancestors`` are the numbers of the walkers at the start, each in the population ancestor modulo ``n_populations``.
    """

    positions: np.ndarray
    energy: np.ndarray
    log_weights: np.ndarray
    ancestors: np.ndarray
    history: tuple[Step, ...]
    counts: Counts
    n_populations: int

    def __repr__(self) -> str:
        value, error = self.log_normalizer
        return (
            f"Annealed: {len(self.positions)} walkers in {len(self.history)} steps, ESS {self.ess:.2%}, "
            f"{len(np.unique(self.ancestors))} ancestors, log Z {value:.2f} ± {error:.2f}"
        )

    @property
    def ess(self) -> float:
        """Relative effective sample size of the weights, which does not know of common ancestors."""
        return effective_sample_size(self.log_weights)

    @property
    def populations(self) -> np.ndarray:
        """The population (n,) of every walker."""
        return self.ancestors % self.n_populations

    @property
    def units(self) -> np.ndarray:
        """What is independent, as numbers (n,), for errors: ``walkers=`` of `free_energy_difference`.

        Populations, where there are several, else ancestors. The latter's error is an upper bound: numbers of offspring
        vary more between ancestors than the totals that resampling keeps.
        """
        return self.populations if self.n_populations > 1 else self.ancestors

    @property
    def log_normalizer(self) -> tuple[float, float]:
        """log(∫ exp(-u) / ∫ q̃) and its standard error, where walkers started as draws of q̃, or weighted to it."""
        n = self.n_populations if self.n_populations > 1 else len(self.ancestors)
        return log_normalizer(self.log_weights, self.units, n)

    def lineages(self, labels: np.ndarray) -> Mapping[int, Lineage]:
        """Walkers and ancestors of each state, by the labels (n,) of the final positions."""
        return lineages(self.ancestors, self.log_weights, labels)

    def free_energy_difference(
        self, angle: np.ndarray, state: tuple[float, float] = (0.0, 2.0), confidence: float = 0.95
    ) -> FreeEnergyDifference:
        """ΔF in kT of the final walkers, by their coordinate (n,), with the error of `units`."""
        given = angle, self.log_weights, self.ancestors, state, confidence
        return refined_free_energy_difference(*given, units=self.units)
