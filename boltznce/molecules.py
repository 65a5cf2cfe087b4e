"""What a batch of unlike molecules is besides positions: features, which atoms are real, which molecule each row is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from boltznce.errors import UserError

__all__ = ["Molecules"]


@dataclass(frozen=True)
class Molecules:
    """A padded batch; positions (batch, n, dim) beside it are zero on padded atoms.

    features: (batch, n, F), zero on padded atoms. mask: (batch, n) bool, true for real atoms. index: (batch,) int64,
    equal for rows that are the same molecule: only these are paired by optimal transport.
    """

    features: Tensor
    mask: Tensor
    index: Tensor

    @classmethod
    def stack(cls, features: Sequence[Tensor], index: Sequence[int], n_atoms: int | None = None) -> "Molecules":
        """A row for each of ``index``, places in the list of ``features`` (n_k, F), padded to ``n_atoms``."""
        sizes = [len(features[k]) for k in index]
        n_atoms = n_atoms or max(sizes)
        if max(sizes) > n_atoms:
            raise UserError(f"A molecule of {max(sizes)} atoms cannot be padded to {n_atoms}: raise n_atoms.")
        known = {k: pad(features[k], n_atoms) for k in set(index)}
        mask = torch.arange(n_atoms) < torch.tensor(sizes).unsqueeze(-1)
        stacked = torch.stack([known[k] for k in index])
        return cls(stacked, mask.to(stacked.device), torch.tensor(index, device=stacked.device))

    @property
    def n_atoms(self) -> Tensor:
        """Real atoms (batch,)."""
        return self.mask.sum(dim=1)

    def to(self, device: torch.device | str) -> "Molecules":
        """The same on another device."""
        return Molecules(self.features.to(device), self.mask.to(device), self.index.to(device))


def pad(rows: Tensor, n: int) -> Tensor:
    """(..., k, m) with zero rows added to (..., n, m)."""
    return torch.nn.functional.pad(rows, (0, 0, 0, n - rows.shape[-2]))
