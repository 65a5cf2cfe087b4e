"""Samples of a generator with the weights that turn them into samples of the Boltzmann distribution."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np

from boltznce.analysis.free_energy import UNKNOWN_BIAS
from boltznce.analysis.means import Mean, weighted_mean
from boltznce.analysis.pareto import pareto_k
from boltznce.analysis.samples_io import WeightedSamplesWriter, check_trajectory_format, read_samples
from boltznce.analysis.weights import effective_sample_size, guard, log_importance_weights, normalized_weights
from boltznce.errors import UserError
from boltznce.io import require_free_space
from boltznce.settings import require

__all__ = [
    "WeightedSamples",
    "WeightedSamplesWriter",
    "effective_sample_size",
    "guard",
    "log_importance_weights",
    "normalized_weights",
    "pareto_k",
]

_CHUNK = 65536  # samples written at once


@dataclass(eq=False, repr=False)
class WeightedSamples:
    """Positions (n, atoms, dim) in nm with reduced energies u, log q and log weights, each (n,) float64.

    ``log_weights`` default to -u - log q. ``log_prob`` may be known up to a constant (EBM), or be all NaN (not
    computed: equal weights). Refined samples have ``ancestors`` (n,), the draws that they come from: those with one in
    common are not independent. Operations return new objects and leave this one as it is.

    >>> samples = WeightedSamples(np.zeros((4, 1, 3)), energy=[0.0, 0.0, 0.0, np.inf], log_prob=np.zeros(4))
    >>> samples
    WeightedSamples: 4 of 1 atom, ESS 75.00%, Pareto-k nan
    >>> samples.weights.round(2)
    array([0.33, 0.33, 0.33, 0.  ])
    >>> len(samples[samples.energy < 1.0])
    3
    """

    positions: np.ndarray
    energy: np.ndarray
    log_prob: np.ndarray
    log_weights: np.ndarray | Any = None  # -u - log q, where none are given
    topology: mdtraj.Topology | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    ancestors: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.energy = np.asarray(self.energy, dtype=np.float64)
        self.log_prob = np.asarray(self.log_prob, dtype=np.float64)
        shape, shapes = np.shape(self.positions), [self.energy.shape, self.log_prob.shape]
        shapes += [np.shape(each) for each in (self.log_weights, self.ancestors) if each is not None]
        n = len(self.positions)
        if len(shape) != 3 or any(each != (n,) for each in shapes):
            raise UserError(
                f"Weighted samples need positions (n, atoms, dim) and arrays (n,): got {shape} and {shapes}."
            )
        if self.log_weights is None:
            self.log_weights = log_importance_weights(self.energy, self.log_prob)
        self.log_weights = np.asarray(self.log_weights, dtype=np.float64)
        if self.topology is not None and self.topology.n_atoms != shape[1]:
            raise UserError(
                f"The topology has {self.topology.n_atoms} atoms, the positions {shape[1]}: give those of one molecule."
            )
        if n_bad := np.isnan(self.log_weights).sum():
            raise UserError(
                f"{n_bad} of {n} log weights are NaN: drop the samples without a finite energy and likelihood."
            )

    def __len__(self) -> int:
        return len(self.positions)

    def __repr__(self) -> str:
        n, atoms = np.shape(self.positions)[:2]
        quality = (
            f"ESS {self.ess:.2%}, Pareto-k {self.pareto_k:.2f}" if np.isfinite(self.log_weights).any() else "no weight"
        )
        return f"WeightedSamples: {n} of {atoms} atom{'s' * (atoms != 1)}, {quality}"

    def __getitem__(self, index: slice | np.ndarray) -> "WeightedSamples":
        """The samples of a slice, a mask or an array of indices."""
        arrays = {name: getattr(self, name) for name in ("positions", "energy", "log_prob", "log_weights", "ancestors")}
        return replace(self, **{name: each[index] for name, each in arrays.items() if each is not None})

    @property
    def weights(self) -> np.ndarray:
        """Normalized weights (n,)."""
        return normalized_weights(self.log_weights)

    @property
    def ess(self) -> float:
        """Relative effective sample size, in (0, 1]."""
        return effective_sample_size(self.log_weights)

    @property
    def pareto_k(self) -> float:
        """Shape of the tail of the weights; means over them cannot be trusted above 0.7."""
        return pareto_k(self.log_weights)

    def mean(self, of: Callable[[np.ndarray], np.ndarray] | np.ndarray, confidence: float = 0.95) -> Mean:
        """⟨f⟩ over the Boltzmann distribution, with its interval (see `weighted_mean`).

        ``of`` is f, of positions (n, atoms, dim), or its values (n,), numbers or a mask. Refined samples of one
        ancestor count as one. Weights from an EBM's likelihood have its error, which no interval of theirs knows: such
        a mean is not called reliable.

        >>> samples = WeightedSamples(np.linspace(-1, 1, 100)[:, None, None], np.zeros(100), np.zeros(100))
        >>> samples.mean(lambda x: x[:, 0, 0] ** 2)
        0.3401 ± 0.031 [0.2792, 0.401]
        """
        values = of(np.asarray(self.positions)) if callable(of) else of
        found = weighted_mean(values, self.log_weights, self.ancestors, confidence)
        if self.meta.get("likelihood") != "ebm":
            return found
        return replace(found, reliable=False, message="; ".join(filter(None, (found.message, UNKNOWN_BIAS))))

    def clip(self, fraction: float) -> "WeightedSamples":
        """The top ``fraction`` of the log weights set to the smallest of them (TA-BG: 1e-4); biases what follows."""
        top, log_weights = self._top(fraction), self.log_weights.copy()
        if len(top):
            log_weights[top] = log_weights[top].min()
        return replace(self, log_weights=log_weights)

    def remove_top(self, fraction: float) -> "WeightedSamples":
        """Without the ``fraction`` of samples of the largest weights (BoltzNCE: 0.002); biases what follows."""
        keep = np.ones(len(self), dtype=bool)
        keep[self._top(fraction)] = False
        return self[keep]

    def resample(self, n: int, generator: np.random.Generator) -> "WeightedSamples":
        """``n`` samples drawn with replacement in proportion to their weights; their log weights are zero."""
        require(n=n)
        index = np.sort(generator.choice(len(self), size=n, p=self.weights))
        return replace(self[index], log_weights=np.zeros(n))

    def save(self, folder: str | Path, format: str = "npy") -> Path:
        """Write ``folder`` (positions, energy, log_prob, log_weights, topology.pdb, meta.yaml), whole or not at all.

        ``format="dcd"`` or ``"xtc"`` adds ``trajectory.dcd`` or ``.xtc`` for MD tools.
        """
        check_trajectory_format(format, np.shape(self.positions)[2])
        n_bytes = 4 * np.size(self.positions) * (1 if format == "npy" else 2) + 24 * len(self)
        require_free_space(Path(folder), n_bytes)
        writer = WeightedSamplesWriter(folder, self.topology, self.meta, resume=False)
        for start in range(0, len(self), _CHUNK):
            part = self[start : start + _CHUNK]
            writer.append(part.positions, part.energy, part.log_prob, part.log_weights, part.ancestors)
        return writer.finish(format)

    @classmethod
    def load(cls, folder: str | Path, verify: bool = True) -> "WeightedSamples":
        """Read what `save` wrote; positions are memory-mapped. Raises UserError naming a damaged file."""
        return cls(**read_samples(folder, verify))

    def _top(self, fraction: float) -> np.ndarray:
        if not 0.0 <= fraction < 1.0:
            raise UserError(f"A fraction of the top weights lies in [0, 1): got {fraction}.")
        n_rest = len(self) - int(np.ceil(fraction * len(self) - 1e-9))  # 0.1 * 30 is a little more than 3
        return np.argpartition(self.log_weights, min(n_rest, len(self) - 1))[n_rest:]
