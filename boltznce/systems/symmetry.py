"""What a Cartesian generator gets wrong or leaves open about a molecule's symmetry, and how it is mended."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Mended", "mend_chirality", "rotate_methyls"]


def rotate_methyls(
    x: Tensor, groups: Sequence[tuple[int, int, int]], generator: torch.Generator | None = None
) -> Tensor:
    """Permute the hydrogens of every methyl cyclically and at random, as a methyl's rotation does.

    x (batch, n_atoms, 3); groups are triples of atom numbers.
    """
    if not groups:
        return x
    atoms = torch.as_tensor(groups, device=x.device)
    shift = torch.randint(0, 3, (len(x), len(atoms), 1), generator=generator, device=x.device)
    turned = atoms.expand(len(x), -1, -1).gather(2, (torch.arange(3, device=x.device) + shift) % 3)
    order = torch.arange(x.shape[1], device=x.device).repeat(len(x), 1)
    order[:, atoms.flatten()] = turned.flatten(1)
    return x.gather(1, order.unsqueeze(-1).expand_as(x))


@dataclass(frozen=True)
class Mended:
    """Conformers with every stereocentre right, which of the given ones they are, how many were mirrored or dropped."""

    positions: Tensor
    kept: Tensor  # (batch,) bool
    n_mirrored: int
    n_dropped: int


def mend_chirality(x: Tensor, signs: Tensor, mirror: bool) -> Mended:
    """Keep conformers whose ``signs`` (batch, n_centres) are all +1; with ``mirror`` reflect first where all are -1.

    Mirroring is right only where energy and density do not change under x -> -x.
    """
    right, inverted = (signs > 0).all(dim=1), (signs < 0).all(dim=1)
    if signs.shape[1] == 0 or not mirror:
        inverted = torch.zeros_like(right)
    kept = right | inverted
    flip = torch.where(inverted, -1.0, 1.0).to(x).reshape(-1, 1, 1)
    return Mended((x * flip)[kept], kept, int(inverted.sum()), int((~kept).sum()))
