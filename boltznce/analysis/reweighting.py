"""Samples of a generator with the weights that turn them into samples of the Boltzmann distribution."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
from scipy.special import logsumexp

from boltznce.analysis.pareto import pareto_k
from boltznce.analysis.samples_io import FORMATS, WeightedSamplesWriter, read_samples
from boltznce.errors import UserError
from boltznce.io import require_free_space

__all__ = ["WeightedSamples", "WeightedSamplesWriter", "effective_sample_size", "log_importance_weights", "normalized_weights", "pareto_k"]

_CHUNK = 65536  # samples written at once


def log_importance_weights(energy: np.ndarray, log_prob: np.ndarray) -> np.ndarray:
    """log w = -u - log q (n,), float64; zeros (equal weights) where no likelihood is known, that is, ``log_prob`` is all NaN."""
    energy, log_prob = np.asarray(energy, dtype=np.float64), np.asarray(log_prob, dtype=np.float64)
    if np.isnan(log_prob).all():
        return np.zeros_like(energy)
    return -energy - log_prob


def normalized_weights(log_weights: np.ndarray) -> np.ndarray:
    """Weights (n,) that sum to one, from unnormalized log weights; the one place where this is done.

    ``-inf`` (an infinite energy) becomes 0. Raises :class:`UserError` for NaN, ``+inf``, or nothing finite.
    """
    log_weights = np.asarray(log_weights, dtype=np.float64)
    bad = np.isnan(log_weights) | (log_weights == np.inf)
    if bad.any():
        raise UserError(
            f"{bad.sum()} of {len(log_weights)} log weights are NaN or +inf: drop the samples whose energy or likelihood is not a number."
        )
    if not np.isfinite(log_weights).any():
        raise UserError(
            f"None of {len(log_weights)} samples has a finite weight: there are no samples, or all their energies are infinite."
        )
    return np.exp(log_weights - logsumexp(log_weights))


def effective_sample_size(log_weights: np.ndarray) -> float:
    """Relative effective sample size (sum w)^2 / (n sum w^2), in (0, 1] (Kish)."""
    weights = normalized_weights(log_weights)
    return min(1.0, float(1.0 / (len(weights) * np.square(weights).sum())))


@dataclass(eq=False)
class WeightedSamples:
    """Positions (n, atoms, dim) in nm with reduced energies u, log-likelihoods log q and log weights, each (n,) float64.

    ``log_weights`` default to -u - log q. ``log_prob`` may be known up to a constant (EBM), or be all NaN (not computed: equal weights).
    Operations return new objects and leave this one as it is.
    """

    positions: np.ndarray
    energy: np.ndarray
    log_prob: np.ndarray
    log_weights: np.ndarray | None = None
    topology: mdtraj.Topology | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.energy = np.asarray(self.energy, dtype=np.float64)
        self.log_prob = np.asarray(self.log_prob, dtype=np.float64)
        n = len(self.positions)
        if (
            np.ndim(self.positions) != 3
            or self.energy.shape != (n,)
            or self.log_prob.shape != (n,)
            or np.shape(self.log_weights) not in ((), (n,))
        ):
            raise UserError(
                f"Weighted samples need positions (n, atoms, dim) and three arrays (n,): got {np.shape(self.positions)}, "
                f"{self.energy.shape}, {self.log_prob.shape} and {np.shape(self.log_weights)}."
            )
        if self.log_weights is None:
            self.log_weights = log_importance_weights(self.energy, self.log_prob)
        self.log_weights = np.asarray(self.log_weights, dtype=np.float64)
        if self.topology is not None and self.topology.n_atoms != np.shape(self.positions)[1]:
            raise UserError(
                f"The topology has {self.topology.n_atoms} atoms, the positions {np.shape(self.positions)[1]}: give those of one molecule."
            )
        if np.isnan(self.log_weights).any():
            raise UserError(
                f"{np.isnan(self.log_weights).sum()} of {n} log weights are NaN: drop the samples without a finite energy and likelihood."
            )

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: slice | np.ndarray) -> "WeightedSamples":
        """The samples of a slice, a mask or an array of indices."""
        return replace(
            self,
            positions=self.positions[index],
            energy=self.energy[index],
            log_prob=self.log_prob[index],
            log_weights=self.log_weights[index],
        )

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

    def clip(self, fraction: float) -> "WeightedSamples":
        """The top ``fraction`` of the log weights set to the smallest of them (TA-BG uses 1e-4); biases what is computed from them."""
        top = self._top(fraction)
        log_weights = self.log_weights.copy()
        if len(top):
            log_weights[top] = log_weights[top].min()
        return replace(self, log_weights=log_weights)

    def remove_top(self, fraction: float) -> "WeightedSamples":
        """Without the ``fraction`` of samples of the largest weights (BoltzNCE uses 0.002); biases what is computed from them."""
        keep = np.ones(len(self), dtype=bool)
        keep[self._top(fraction)] = False
        return self[keep]

    def resample(self, n: int, generator: np.random.Generator) -> "WeightedSamples":
        """``n`` samples drawn with replacement in proportion to their weights; their log weights are zero."""
        index = np.sort(generator.choice(len(self), size=n, p=self.weights))
        return replace(self[index], log_weights=np.zeros(n))

    @staticmethod
    def merge(parts: Sequence["WeightedSamples"]) -> "WeightedSamples":
        """One after another, with topology and meta of the first. Sound only if their log weights share one additive constant."""
        if not parts:
            raise UserError("There is nothing to merge: give at least one set of weighted samples.")
        if len({np.shape(part.positions)[1:] for part in parts}) > 1:
            raise UserError("Weighted samples of different molecules cannot be merged: their positions differ in shape.")
        arrays = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in ("positions", "energy", "log_prob", "log_weights")
        }
        return replace(parts[0], **arrays)

    def save(self, folder: str | Path, format: str = "npy") -> Path:
        """Write ``folder`` (positions, energy, log_prob, log_weights, topology.pdb, meta.yaml), whole or not at all.

        ``format="dcd"`` or ``"xtc"`` adds ``trajectory.dcd`` or ``.xtc`` for MD tools.
        """
        if format not in FORMATS:
            raise UserError(f"Unknown format {format!r} of weighted samples: choose one of {', '.join(FORMATS)}.")
        n_bytes = 4 * np.size(self.positions) * (1 if format == "npy" else 2) + 24 * len(self)
        require_free_space(Path(folder), n_bytes)
        writer = WeightedSamplesWriter(folder, self.topology, self.meta, resume=False)
        for start in range(0, len(self), _CHUNK):
            part = slice(start, start + _CHUNK)
            writer.append(self.positions[part], self.energy[part], self.log_prob[part], self.log_weights[part])
        return writer.finish(format)

    @classmethod
    def load(cls, folder: str | Path, verify: bool = True) -> "WeightedSamples":
        """Read what :meth:`save` wrote; positions are memory-mapped. Raises :class:`UserError` naming a damaged file."""
        return cls(**read_samples(folder, verify))

    def _top(self, fraction: float) -> np.ndarray:
        if not 0.0 <= fraction < 1.0:
            raise UserError(f"A fraction of the top weights lies in [0, 1): got {fraction}.")
        n_top = int(np.ceil(fraction * len(self) - 1e-9))  # 0.1 * 30 is a little more than 3
        return np.argpartition(self.log_weights, len(self) - n_top)[len(self) - n_top :] if n_top else np.empty(0, dtype=int)
