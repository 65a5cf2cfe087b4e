"""Padded batches of unlike molecules, molecules of similar size together."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from boltznce.errors import UserError
from boltznce.molecules import Molecules, pad

__all__ = ["Batches", "size_buckets"]


def size_buckets(sizes: Sequence[int], max_padding: float) -> list[list[int]]:
    """Molecules by size, small ones first: none is padded by more than ``max_padding`` of its group's largest."""
    order = sorted(range(len(sizes)), key=lambda k: (-sizes[k], k))
    buckets: list[list[int]] = []
    for k in order:
        if buckets and sizes[k] >= (1 - max_padding) * sizes[buckets[-1][0]]:
            buckets[-1].append(k)
        else:
            buckets.append([k])
    return buckets[::-1]


@dataclass(frozen=True)
class Batches:
    """Batch ``step`` of an endless stream, a function of ``seed`` and ``step`` alone: a run is resumed by its step.

    In an epoch every frame comes once, but for the last few of each bucket that fill no batch of ``batch_size``.

    Args:
        positions: per molecule (n_frames, n_k, dim), arrays or memory maps, in nm.
        features: per molecule (n_k, F).
        per_molecule: rows of a batch that are of one molecule together, so that optimal transport has some to pair.
        max_padding: largest share of a row that is padding; 0 puts only equal sizes together.
    """

    positions: Sequence[np.ndarray]
    features: Sequence[Tensor]
    batch_size: int
    seed: int
    per_molecule: int = 1
    max_padding: float = 0.2
    # the epoch that was last asked for
    _cache: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for k, (x, features) in enumerate(zip(self.positions, self.features, strict=True)):
            if x.shape[1] != len(features):
                raise UserError(
                    f"Molecule {k} has {x.shape[1]} atoms in its positions, {len(features)} in its features."
                )
        if not 0 <= self.max_padding < 1:
            raise UserError(f"max_padding must be in [0, 1), not {self.max_padding}.")
        if self.steps_per_epoch == 0:
            raise UserError(f"No group has {self.batch_size} frames: lower batch_size or raise max_padding.")

    @property
    def buckets(self) -> list[list[int]]:
        return size_buckets([x.shape[1] for x in self.positions], self.max_padding)

    @property
    def steps_per_epoch(self) -> int:
        return sum(sum(len(self.positions[k]) for k in bucket) // self.batch_size for bucket in self.buckets)

    def __call__(self, step: int) -> tuple[Tensor, Molecules]:
        """Positions (batch_size, n, dim) in nm, float32, centred on the mean of the real atoms, and their molecules."""
        epoch, place = divmod(step, self.steps_per_epoch)
        rows = self._epoch(epoch)[place].tolist()
        size = max(self.positions[k].shape[1] for k, _ in rows)
        x = [torch.from_numpy(np.array(self.positions[k][frame], dtype=np.float32)) for k, frame in rows]
        molecules = Molecules.stack(self.features, [k for k, _ in rows], size)
        return torch.stack([pad(row - row.mean(dim=0), size) for row in x]), molecules

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch, each (batch_size, 2): molecule and frame."""
        if self._cache.get("epoch") != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            batches = [batch for bucket in self.buckets for batch in self._shuffled(bucket, rng)]
            self._cache.update(epoch=epoch, batches=[batches[i] for i in rng.permutation(len(batches))])
        return self._cache["batches"]

    def _shuffled(self, bucket: list[int], rng: np.random.Generator) -> list[np.ndarray]:
        groups = []
        for k in bucket:
            frames = rng.permutation(len(self.positions[k]))
            rows = np.stack([np.full_like(frames, k), frames], axis=1)
            groups += [rows[i : i + self.per_molecule] for i in range(0, len(rows), self.per_molecule)]
        rows = np.concatenate([groups[i] for i in rng.permutation(len(groups))])
        n = len(rows) // self.batch_size
        return list(rows[: n * self.batch_size].reshape(n, self.batch_size, 2))
